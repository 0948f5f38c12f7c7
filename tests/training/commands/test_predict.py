"""Answers for single pictures and for folders of them."""

import csv
import functools
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.app.ml.test_predictor import answering
from tests.repository.test_structure import in_fresh_process
from tests.support.released import release_model
from tests.support.runs import start

import train_model
from app.ml.predictor import FoodPredictor, Prediction, load_model_for_inference
from training.commands import cli
from training.commands import predict as predicting
from training.commands.predict import Shard, predict_paths, predictions
from training.commands.predict import find_images as find_and_audit
from training.data.folders import Audit
from training.errors import DataError

CPU = torch.device("cpu")
REAL_PREDICT_BATCH = FoodPredictor.predict_batch


@pytest.fixture(autouse=True)
def in_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predicting, "BATCH_SIZE", 4)
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FoodPredictor:
    folder = tmp_path_factory.mktemp("models")
    release_model(folder, ["apple_pie", "samosa", "jalebi", "dosa"])
    return load_model_for_inference(folder)


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((240, 180)).save(path)
    return path


@pytest.fixture
def photos() -> Path:
    """9 pictures in two folders, one of them damaged; beside them what is no picture."""
    folder = Path("photos")
    for i in range(8):
        picture(folder / ("lunch" if i % 2 else "dinner") / f"{i:02}.jpg", i)
    (folder / "dinner" / "05.png").write_bytes(b"\x89PNG nothing more")
    for junk in (".hidden.jpg", "notes.txt", "Thumbs.db", "lunch/._00.jpg", ".cache/x.jpg"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"x")
    return folder


def find_images(paths: list[str]) -> list[str]:
    return find_and_audit(paths, Audit())


def predict(model: FoodPredictor, *paths: str, top_k: int = 2) -> int:
    return predict_paths(model, paths, top_k=top_k, device=CPU, num_workers=0)


def rows(path: str = "predictions.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--predict", "photos", "--shard", "8/8"], "8/8: must be I/N with I from 0 to N-1"),
        (["--predict", "photos", "--shard", "-1/8"], "--shard"),
        (["--predict", "photos", "--shard", "3"], "3: must be I/N"),
        (["--shard", "0/8"], "--shard 0/8: goes with --predict"),
    ],
)
def test_a_share_that_is_none_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_model.main(arguments)
    assert said in capsys.readouterr().err


# Shares ---------------------------------------------------------------------------------------


NAMES = st.sets(st.text("ab/é.", min_size=1, max_size=9), max_size=20)


@given(NAMES, st.integers(1, 9), NAMES)
def test_each_picture_is_in_one_share_whatever_else_there_is(
    names: set[str], count: int, more: set[str]
) -> None:
    shares = [{name for name in names if Shard(i, count).holds(name)} for i in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    for i, share in enumerate(shares):
        assert {name for name in names | more if Shard(i, count).holds(name)} >= share


def test_shares_are_about_equal_and_the_same_on_every_machine() -> None:
    names = [f"lunch/{number}.jpg" for number in range(8_000)]
    sizes = [sum(Shard(i, 8).holds(name) for name in names) for i in range(8)]
    assert min(sizes) > 900 and max(sizes) < 1_100
    assert [i for i in range(8) if Shard(i, 8).holds("lunch/0.jpg")] == [0]
    assert [i for i in range(8) if Shard(i, 8).holds(os.path.join("lunch", "0.jpg"))] == [0]


def test_shares_have_tables_that_together_are_the_whole(model: FoodPredictor, photos: Path) -> None:
    assert predict(model, str(photos)) == 0
    whole = {row["file"].removeprefix("photos/"): row for row in rows()}
    found: dict[str, dict[str, str]] = {}
    mounts = ["photos", "mnt/photos"]
    Path("mnt").mkdir()
    Path("mnt", "photos").symlink_to(Path("photos").absolute())
    count = 12  # more than there are pictures: some shares are empty
    for i in range(count):
        folder = mounts[i % 2]
        options = {"top_k": 2, "device": CPU, "num_workers": 2}
        code = predict_paths(model, [folder], **options, shard=Shard(i, count))
        table = rows(f"predictions-{i}-of-{count}.csv")
        assert code == (1 if table and all(row["error"] for row in table) else 0)
        for row in table:
            name = row["file"].removeprefix(f"{folder}/")
            assert name not in found
            found[name] = row
    assert {name: row["class_1"] for name, row in found.items()} == {
        name: row["class_1"] for name, row in whole.items()
    }


# Folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_gets_the_answers_that_its_pictures_get_alone(
    num_workers: int, model: FoodPredictor, photos: Path
) -> None:
    images = find_images([str(photos)])
    batches = list(predictions(model, images, 4, CPU, num_workers))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    found = [pair for batch in batches for pair in batch]
    assert [path for path, _ in found] == images
    for path, answer in found:
        if path.endswith("05.png"):
            assert answer == "the image is cut off or damaged at its start"
            continue
        alone = model.predict(path, 4)
        assert not isinstance(answer, str) and answer.verdict == alone.verdict
        assert [name for name, _ in answer.top] == [name for name, _ in alone.top]
        for (_, together), (_, single) in zip(answer.top, alone.top, strict=True):
            assert together == pytest.approx(single, abs=1e-5)


def test_the_table_has_a_row_per_picture(
    model: FoodPredictor, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert predict(model, str(photos)) == 0
    table = rows()
    assert list(table[0]) == [
        *("file", "verdict", "class_1", "probability_1", "class_2", "probability_2", "error")
    ]
    assert [row["file"] for row in table] == find_images([str(photos)])
    for row in table:
        if row["error"]:
            assert set(row.values()) == {row["file"], "", row["error"]}
            continue
        alone = model.predict(row["file"], 2)
        assert (row["verdict"], row["class_1"]) == (alone.verdict, alone.top[0].class_name)
        assert float(row["probability_2"]) == pytest.approx(alone.top[1].probability, abs=1e-5)
    bad = str(photos / "dinner" / "05.png")
    others, skipped, counts, failed, place = caplog.messages
    assert others == "files that are not pictures: 1 .txt"
    assert skipped.startswith(f"skipped {bad}: ")
    verdicts = r"(\d+) confident, (\d+) unsure, (\d+) not_food, 1 could not be read"
    found = re.fullmatch(rf"9 images: {verdicts}; \d+\.\d images/s", counts)
    assert found and sum(map(int, found.groups())) == 8
    assert failed.endswith(f": {bad}") and place == "predictions predictions.csv"


def many_pictures(folder: Path) -> None:
    for i in range(48):  # more than two readers fetch ahead
        picture(folder / f"{i:02}.jpg", i)


def kill_a_reader(model: FoodPredictor, images: torch.Tensor, top_k: int) -> list[Prediction]:
    multiprocessing.active_children()[0].kill()
    return REAL_PREDICT_BATCH(model, images, top_k)


def fail_unforeseen(*_: object) -> list[Prediction]:
    raise ArithmeticError("nobody thought of this")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "code", "said"),
    [
        (kill_a_reader, 1, "a process that reads images died"),
        (fail_unforeseen, 1, "ArithmeticError: nobody thought of this"),
    ],
)
def test_the_command_ends_when_a_reader_is_killed_or_an_error_is_unforeseen(
    act: Callable[..., list[Prediction]], code: int, said: str, model_dir: Path, tmp_path: Path
) -> None:
    """In a process of its own: readers ignore SIGTERM, and it must not wait for them for ever."""
    many_pictures(tmp_path / "many")
    argv = ["--output_dir", str(model_dir), "--predict", str(tmp_path / "many")]
    log = tmp_path / "log.txt"
    process = start([*argv, "--num_workers", "2"], log, prepare=functools.partial(let, act))
    process.join(120)
    ended = process.exitcode
    process.kill()
    assert ended == code
    assert said in log.read_text(encoding="utf-8")


def let(act: Callable[..., list[Prediction]]) -> None:
    FoodPredictor.predict_batch = act  # type: ignore[method-assign]
    predicting.BATCH_SIZE = 4


@pytest.mark.usefixtures("photos")
def test_folders_are_walked_in_order_without_junk() -> None:
    images = find_images(["photos"])
    assert images == sorted(images) and len(images) == 9
    assert not any("/." in image or image.endswith((".txt", ".db")) for image in images)
    assert find_images(["photos/lunch/01.jpg", "photos"])[0] == "photos/lunch/01.jpg"
    assert sorted(find_images(["photos/lunch/01.jpg", "photos"])) == images  # once each


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_back_up_is_no_endless_way(photos: Path) -> None:
    (photos / "lunch" / "up").symlink_to(photos.resolve())
    assert len(find_images(["photos"])) == 9


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for_and_a_link_to_nothing_is_named(photos: Path) -> None:
    before = find_images([str(photos)])
    os.mkfifo(photos / "pipe.jpg")
    (photos / "zz.jpg").symlink_to("nothing.jpg")
    assert find_images([str(photos)]) == [*before, str(photos / "zz.jpg")]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.tif").write_bytes(b"x")
    with pytest.raises(DataError, match=r"notes holds no picture; .*\*\.jpg.*TIF: a\.tif"):
        find_images(["notes"])


def test_what_is_not_read_is_counted_by_its_ending(
    model: FoodPredictor, caplog: pytest.LogCaptureFixture
) -> None:
    picture(Path("mixed/lunch.jpg"))
    picture(Path("mixed/dinner.png")).rename("mixed/dinner")  # known by its content
    for name in ("a.tif", "b.TIF", "IMG_1.MOV", "IMG_1.AAE", "README"):
        Path("mixed", name).write_bytes(b"x")
    assert predict(model, "mixed") == 0
    assert [row["file"] for row in rows()] == [
        os.path.join("mixed", name) for name in ("dinner", "lunch.jpg")
    ]
    assert caplog.messages[:2] == [
        "warning: skipped 2 (unsupported format): TIF: a.tif, b.TIF; save them as JPEG",
        "files that are not pictures: 1 .aae, 1 .mov, 1 without an ending",
    ]


def test_a_locked_folder_stops_nothing_unless_it_is_all_there_is(
    photos: Path,
    model: FoodPredictor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path) == photos / "lunch":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert predict(model, "photos") == 0
    assert len(rows()) == 5
    assert "warning: skipped 1 (cannot be opened: Permission denied): lunch" in caplog.messages
    with pytest.raises(DataError, match=r"lunch holds no picture; .*Permission denied"):
        find_images(["photos/lunch"])


@pytest.mark.parametrize("name", ["lost+found", "#recycle", "@eaDir", "System Volume Information"])
def test_service_folders_are_not_walked(photos: Path, name: str) -> None:
    picture(photos / name / "thumb.jpg")
    assert len(find_images(["photos"])) == 9


@pytest.mark.usefixtures("photos")
def test_a_pattern_that_the_shell_left_is_expanded(
    model: FoodPredictor, capsys: pytest.CaptureFixture[str]
) -> None:
    """cmd.exe hands photos\\*.jpg on as it is."""
    pattern = os.path.join("photos", "lunch", "*.jpg")
    assert predict(model, pattern) == 0
    lunches = [os.path.join("photos", "lunch", f"{n:02}.jpg") for n in (1, 3, 5, 7)]
    assert [line for line in capsys.readouterr().out.splitlines() if line[0] != " "] == lunches
    assert predict(model, os.path.join("photos", "l*")) == 0  # a folder
    assert [row["file"] for row in rows()] == lunches
    with pytest.raises(DataError, match=r"--predict nothing\*\.jpg: no file matches"):
        predict(model, "nothing*.jpg")


@pytest.mark.usefixtures("photos")
def test_the_home_folder_is_found_from_any_shell(
    model: FoodPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path.cwd()))
    assert predict(model, os.path.join("~", "photos")) == 0
    assert len(rows()) == 9


def test_a_file_may_be_named_like_a_pattern(
    model: FoodPredictor, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(picture(Path("lunch [1].jpg")))
    assert predict(model, name) == 0
    assert capsys.readouterr().out.startswith(name)


@pytest.mark.usefixtures("photos")
def test_exit_code_is_1_for_what_was_named_and_for_nothing_at_all(model: FoodPredictor) -> None:
    assert predict(model, "photos") == 0
    assert predict(model, "photos", "missing.jpg") == 1
    assert rows()[-1]["error"].startswith("[Errno 2]")
    assert predict(model, "photos", "photos/dinner/05.png") == 1
    picture(Path("only/bad.jpg")).write_bytes(b"")
    assert predict(model, "only") == 1


def test_no_file_name_becomes_a_formula(model: FoodPredictor) -> None:
    names = ["=1+1", "+1", "@x", "-1", "\tx", "plain"]
    for name in names:
        picture(Path(name) / "lunch.jpg")
    assert predict(model, *names) == 0
    files = [row["file"] for row in rows()]
    found = [os.path.join(name, "lunch.jpg") for name in names]
    assert files == [os.path.join(".", name) for name in found[:5]] + found[5:]
    assert all(Path(file).is_file() for file in files)


def test_a_spreadsheet_reads_the_table_as_utf8(model: FoodPredictor) -> None:
    picture(Path("photos") / "crème.jpg")
    assert predict(model, "photos") == 0
    content = Path("predictions.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbffile,") and "crème.jpg".encode() in content


def test_a_name_that_is_no_text_is_written_all_the_same(model: FoodPredictor) -> None:
    name = os.fsdecode(b"not-\xff-text.jpg")
    try:
        picture(Path("odd") / name)
    except OSError:
        pytest.skip("this disk takes text only")
    assert predict(model, "odd") == 0
    assert rows()[0]["file"].endswith("not-\\udcff-text.jpg")


@pytest.mark.usefixtures("photos")
def test_only_a_table_of_predictions_is_replaced(model: FoodPredictor) -> None:
    assert predict(model, "photos/lunch") == 0
    assert predict(model, "photos", top_k=1) == 0
    assert len(rows()) == 9
    for earlier in ("", "file,verdict,class_1,probability_1,error\n"):  # without a mark
        Path("predictions.csv").write_text(earlier, encoding="utf-8")
        assert predict(model, "photos/lunch") == 0
    mine = "file,verdict\nlunch.jpg,delicious\n"
    Path("predictions.csv").write_text(mine, encoding="utf-8")
    with pytest.raises(DataError, match=r"predictions.csv already exists .* another folder"):
        predict(model, "photos")
    assert Path("predictions.csv").read_text(encoding="utf-8") == mine
    Path("predictions.csv").unlink()
    Path("predictions.csv").mkdir()
    with pytest.raises(DataError, match="already exists"):
        predict(model, "photos")


@pytest.mark.usefixtures("photos")
def test_a_table_that_cannot_be_written_is_said_before_predicting(
    model: FoodPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(path: Path, mode: str = "r", **kwargs: object) -> object:
        if mode == "w":
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, mode, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"predictions.csv cannot be written \(Read-only"):
        predict(model, "photos")


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_table_keeps_what_was_answered(
    number: signal.Signals,
    model: FoodPredictor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By Ctrl-C, or by a cluster that wants its machine back."""

    def interrupted(*arguments: object) -> object:
        yield next(iter(predictions(*arguments)))  # type: ignore[arg-type]
        signal.raise_signal(number)

    monkeypatch.setattr(predicting, "predictions", interrupted)
    before = signal.getsignal(number)
    assert predict(model, "photos") == 128 + number
    assert signal.getsignal(number) is before
    assert len(rows()) == 4 and rows()[0]["class_1"]
    assert f"stopped by {number.name}; predictions.csv holds" in caplog.text


# Single pictures ------------------------------------------------------------------------------


@pytest.mark.usefixtures("photos")
def test_single_pictures_are_printed_and_a_bad_one_stops_nothing(
    model: FoodPredictor, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    first, last = "photos/lunch/01.jpg", "photos/dinner/00.jpg"
    assert predict(model, first, "photos/dinner/05.png", "missing.jpg", last, top_k=9) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 4 + 1) and [lines[0], lines[6]] == [first, last]
    assert not [line for line in lines if line != line.rstrip()]
    top = model.predict(first).top[0]
    share = f"{top.probability:.1%}"
    assert re.fullmatch(rf"  {top.class_name.replace('_', ' ')} +{share}  #*", lines[1])
    assert [m.split(":")[0] for m in caplog.messages] == ["photos/dinner/05.png", "missing.jpg"]
    assert caplog.messages[1] == "missing.jpg: cannot be opened (No such file or directory)"
    assert not Path("predictions.csv").exists()
    assert predict(model, first, last) == 0


def test_a_bar_of_no_length_leaves_no_space(capsys: pytest.CaptureFixture[str]) -> None:
    sure = answering(torch.tensor([[99.0, 0.0]]))
    assert predict(sure, str(picture(Path("lunch.jpg")))) == 0
    assert "  class 1                        0.0%\n" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_a_name_that_is_no_text_is_printed_and_the_next_picture_answered(
    model: FoodPredictor, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    assert predict(model, str(picture(Path(odd))), str(picture(Path("lunch.jpg")))) == 0
    printed = capsys.readouterr().out
    assert "caf\\xe9.jpg\n" in printed and "lunch.jpg\n" in printed


# The command ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("photos")
def test_the_command_walks_folders(model_dir: Path) -> None:
    command = ["--output_dir", str(model_dir), "--num_workers", "0", "--predict", "photos"]
    assert train_model.main([*command, "--top_k", "1"]) == 0
    assert list(rows()[0]) == ["file", "verdict", "class_1", "probability_1", "error"]
    assert len(rows()) == 9


@pytest.mark.usefixtures("photos")
def test_the_device_is_honoured(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cli, "choose_device", lambda name, _: asked.append(name) or CPU)
    command = ["--output_dir", str(model_dir), "--device", "cuda", "--predict"]
    assert train_model.main([*command, "photos/lunch/01.jpg"]) == 0
    assert asked == ["cuda"]


def test_a_folder_without_pictures_ends_the_command_with_one_line(
    tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    assert train_model.main(["--output_dir", str(model_dir), "--predict", "empty"]) == 1
    (said,) = caplog.messages
    assert said.startswith("empty holds no picture")


@pytest.mark.slow
def test_predicting_does_not_pay_for_what_draws_reports(tmp_path: Path) -> None:
    heavy = {"sklearn", "scipy", "matplotlib", "seaborn", "pandas", "mlflow"}
    code = "import train_model, training.commands.predict, training.commands.compare\n"
    code += f"print(*({heavy!r} & sys.modules.keys()))"
    assert in_fresh_process(code, tmp_path).strip() == ""
