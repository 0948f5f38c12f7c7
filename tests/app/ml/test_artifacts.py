"""Released models: all or nothing, never half; every changed byte is found."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.released import RECORD
from torch import Tensor

from app.ml import artifacts
from app.ml.artifacts import (
    CENTROIDS,
    CLASS_MAP_NAME,
    CONFIG_NAME,
    LOCK_NAME,
    ONNX,
    PUBLISHING,
    WEIGHTS,
    ArtifactError,
    DamagedArtifactError,
    Decision,
    ModelRecord,
    NewVersion,
    NoModelError,
    OwnAnswers,
    SaveError,
    centroids_name,
    list_versions,
    make_current,
    new_version,
    onnx_name,
    read_checked,
    read_record,
    read_state,
    record_name,
    released_files,
    report_folder_name,
    state_bytes,
    weights_name,
)

Folder = dict[str, bytes]


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """Thousands of files are written here; waiting for the disk each time would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


Check = Callable[[NewVersion], object]


def loads(version: NewVersion) -> None:
    read_state(version.folder, read_record(version.folder, version.number))


def write_report(version: NewVersion) -> None:
    (version.report_folder / "report.html").write_text(f"version {version.number}")


def save(
    folder: Path,
    seed: int = 0,
    classes: int = 3,
    *,
    forms: Mapping[str, bytes] = {ONNX: b"onnx " * 9},
    report: Check = write_report,
    check: Check = loads,
) -> ModelRecord:
    """Release three numbers as if they were a network; each seed has its own."""
    class_to_idx = {f"class_{seed}_{i}": i for i in range(classes)}
    with new_version(folder) as version:
        version.write(WEIGHTS, state_bytes({"weight": torch.full((3,), float(seed))}))
        version.write(CENTROIDS, state_bytes(torch.eye(classes)))
        for suffix, data in forms.items():
            version.write(suffix, data)
        record = dataclasses.replace(
            RECORD, version=version.number, sha256=version.sha256, class_to_idx=class_to_idx
        )
        version.write_record(record)
        report(version)
        check(version)
    return record


def contents(folder: Path) -> Folder:
    """Every file but the lock, which holds nothing."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def loaded(folder: Path) -> tuple[ModelRecord, dict[str, Tensor]]:
    record = read_record(folder)
    read_checked(folder, onnx_name(record.version), record)
    return record, read_state(folder, record)


# Saving ---------------------------------------------------------------------------------------


def test_versions_count_up_and_the_last_is_current(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "ml-models"
    for version in (1, 2, 3):
        assert save(folder, seed=version).version == version
    assert list_versions(folder) == [1, 2, 3]
    record, state = loaded(folder)
    assert record.version == 3 and state["weight"].tolist() == [3.0, 3.0, 3.0]
    assert read_state(folder, read_record(folder, 1))["weight"].tolist() == [1.0, 1.0, 1.0]
    names = {path.name for path in folder.iterdir()}
    own = {f(v) for f in (weights_name, onnx_name, record_name, report_folder_name) for v in (1, 3)}
    assert own | {CLASS_MAP_NAME, CONFIG_NAME} < names
    assert not [name for name in names if "tmp" in name or "staging" in name]
    assert (folder / CONFIG_NAME).read_bytes() == (folder / record_name(3)).read_bytes()
    assert json.loads((folder / CLASS_MAP_NAME).read_text()) == record.class_to_idx


def test_a_version_has_the_forms_that_were_written(tmp_path: Path) -> None:
    record = save(tmp_path, forms={})
    assert list(record.sha256) == [weights_name(1), centroids_name(1)]
    assert not (tmp_path / onnx_name(1)).exists()
    record = save(tmp_path, forms={".int8.onnx": b"small", ".other": b"form"})
    for name, content in (("food_model_v2.int8.onnx", b"small"), ("food_model_v2.other", b"form")):
        assert read_checked(tmp_path, name, record) == content


def test_the_new_version_is_checked_where_it_lies_before_it_is_seen(tmp_path: Path) -> None:
    save(tmp_path, seed=1)
    seen: list[tuple[int, list[float]]] = []

    def check(version: NewVersion) -> None:
        record = read_record(version.folder, version.number)
        assert (version.report_folder / "report.html").exists()
        assert list_versions(tmp_path) == [1]  # not yet
        seen.append((record.version, read_state(version.folder, record)["weight"].tolist()))

    save(tmp_path, seed=2, check=check)
    assert seen == [(2, [2.0, 2.0, 2.0])]


def test_a_version_can_be_released_beside_the_current_one(tmp_path: Path) -> None:
    save(tmp_path, seed=1)

    def stay_behind(version: NewVersion) -> None:
        version.becomes_current = False

    save(tmp_path, seed=2, check=stay_behind)
    assert list_versions(tmp_path) == [1, 2]
    assert loaded(tmp_path)[0].version == 1
    assert read_state(tmp_path, read_record(tmp_path, 2))["weight"].tolist() == [2.0, 2.0, 2.0]


def test_every_file_of_a_version_is_named(tmp_path: Path) -> None:
    record = save(tmp_path, forms={".int8.onnx": b"small"})
    named = {path.relative_to(tmp_path).as_posix() for path in released_files(tmp_path, record)}
    assert named == contents(tmp_path).keys()


def unverified(_: NewVersion) -> None:
    raise RuntimeError("other logits")


class Injected:
    """Raises at the n-th of all the steps that a save consists of."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at, self.error, self.steps = at, error, 0

    def wrap(self, function: Any, after: bool) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            fails = self.steps == self.at
            if fails and not after:
                raise self.error
            result = function(*args, **kwargs)
            if fails:
                raise self.error
            return result

        return step


STEPS = [(os, "replace"), (os, "fsync"), (tempfile, "mkdtemp"), (torch, "save")]


@contextmanager
def failing(injected: Injected, after: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module, name in STEPS:
            patch.setattr(module, name, injected.wrap(getattr(module, name), after))
        yield


def save_with(injected: Injected, folder: Path) -> ModelRecord:
    def nothing(_: NewVersion) -> None:
        pass

    return save(
        folder,
        seed=9,
        classes=5,
        check=injected.wrap(nothing, after=False),
        report=injected.wrap(write_report, after=True),
    )


MOST_STEPS = 50  # a save has fewer, so that some of the cases go well
ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("other logits"),
    ImportError("No module named 'onnx'"),
    MemoryError("std::bad_alloc"),
]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with nothing, one and two versions."""
    folders = [tmp_path_factory.mktemp(f"released-{number}") for number in range(3)]
    for number, folder in enumerate(folders):
        for seed in range(number):
            save(folder, seed=seed)
    return folders


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    at=st.integers(1, MOST_STEPS),
    error=st.sampled_from(ERRORS),
    number=st.integers(0, 2),
    after=st.booleans(),
)
def test_property_5_saving_leaves_all_files_or_none(
    at: int, error: Exception, number: int, after: bool, released: list[Path]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(released[number], Path(temporary) / "ml-models")
        before, injected = contents(folder), Injected(at, error)
        try:
            with failing(injected, after):
                record = save_with(injected, folder)
        except SaveError as failed:
            reason = "out of memory" if isinstance(error, MemoryError) else str(error)
            assert failed.__cause__ is error and reason in str(failed)
            assert contents(folder) == before
            assert not [path for path in folder.iterdir() if path.name.startswith(".staging")]
            if number:
                assert loaded(folder)[0].version == number
            # and nothing stands in the way of the next one
            assert save(folder, seed=4).version == number + 1
        else:
            assert 20 < injected.steps < at
            current = {name: before.pop(name, b"") for name in (CLASS_MAP_NAME, CONFIG_NAME)}
            assert before.items() < contents(folder).items()
            assert not current.items() & contents(folder).items()
            assert loaded(folder)[0] == record and record.version == number + 1


def test_weights_that_no_release_wrote_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / weights_name(3)).write_bytes(b"somebody's own")
    assert save(tmp_path).version == 4
    with pytest.raises(SaveError):
        save(tmp_path, check=unverified)
    assert (tmp_path / weights_name(3)).read_bytes() == b"somebody's own"
    assert list_versions(tmp_path) == [4]


def test_a_release_that_was_cut_off_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    save(tmp_path, seed=1)
    before = contents(tmp_path)
    (tmp_path / ".staging-x1").mkdir()
    (tmp_path / ".staging-x1" / weights_name(2)).write_bytes(b"half")
    (tmp_path / f"{PUBLISHING}2").touch()
    (tmp_path / weights_name(2)).write_bytes(b"whole, but without a record")
    (tmp_path / report_folder_name(2)).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert list_versions(tmp_path) == [1]
    assert loaded(tmp_path)[0].version == 1
    with pytest.raises(SaveError):
        save(tmp_path, check=unverified)
    assert contents(tmp_path) == {**before, "notes.txt": b"mine"}


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SaveError, match=r"could not be saved in .*file.*untouched"):
        save(tmp_path / "file" / "ml-models")


SAVE_TWICE = """
import os, sys, time
from pathlib import Path
os.fsync = lambda _: None
sys.path[:0] = sys.argv[2:4]
from tests.app.ml.test_artifacts import save
folder, me = Path(sys.argv[1]), sys.argv[4]
(folder / f"ready-{me}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.01)
for _ in range(4):
    print(save(folder / "ml-models", seed=int(me)).version)
"""


@pytest.mark.slow
def test_two_processes_that_save_at_once_get_different_versions(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", SAVE_TWICE, str(tmp_path), str(root), str(root / "backend")]
    processes = [
        subprocess.Popen([*command, me], stdout=subprocess.PIPE, text=True) for me in ("1", "2")
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    versions = [int(line) for lines in printed for line in lines.split()]
    assert sorted(versions) == list(range(1, 9))
    folder = tmp_path / "ml-models"
    assert list_versions(folder) == sorted(versions)
    for version in versions:
        record = read_record(folder, version)
        state = read_state(folder, record)
        assert f"class_{state['weight'][0]:.0f}_0" in record.class_to_idx
    assert loaded(folder)[0].version == 8


# Reading --------------------------------------------------------------------------------------


def test_the_record_survives_json() -> None:
    assert ModelRecord.from_json(RECORD.to_json()) == RECORD
    assert RECORD.classes == ["café crème", "dosa", "samosa"]


def test_a_path_that_is_not_text_is_recorded_and_read_back(tmp_path: Path) -> None:
    """A folder's name may hold any bytes; it must not cost the model at the end of training."""
    strange = {"data_dir": "/data/not-\udcff-text", "名": "दाल"}

    def record(version: NewVersion) -> None:
        assert version.record
        version.write_record(dataclasses.replace(version.record, training=strange))

    save(tmp_path, report=record)
    assert read_record(tmp_path).training == read_record(tmp_path, 1).training == strange


def test_a_number_json_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(RECORD, metrics={"top1": float("nan")}).to_json()


KEYS = sorted(json.loads(RECORD.to_json()))


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(KEYS), max_size=3), st.sets(st.text(max_size=8), max_size=2))
def test_a_missing_or_unknown_key_is_named(missing: set[str], unknown: set[str]) -> None:
    unknown -= set(KEYS)
    values = {k: v for k, v in json.loads(RECORD.to_json()).items() if k not in missing}
    values |= dict.fromkeys(unknown, 1)
    if not missing and not unknown:
        assert ModelRecord.from_json(json.dumps(values)) == RECORD
        return
    with pytest.raises(ValueError) as raised:
        ModelRecord.from_json(json.dumps(values))
    if "format_version" not in missing:
        assert all(key in str(raised.value) for key in missing | unknown)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format version 2; this code reads 1"),
        ({"format_version": None}, "format version None"),
        ({"model_name": "vgg16"}, "unknown backbone 'vgg16'"),
        ({"class_to_idx": {"a": 0, "b": 2}}, "0 to n-1"),
        ({"class_to_idx": {"a": 0, "b": 0}}, "0 to n-1"),
        ({"class_to_idx": {"a": 1}}, "0 to n-1"),
        ({"class_to_idx": ["a", "b"]}, "cannot be used"),
        ({"preprocessing": {"resize": 256}}, "preprocessing needs exactly"),
        ({"preprocessing": None}, "cannot be used"),
        ({"decision": {"temperature": 1.0}}, "confident_at"),
        ({"decision": {**dataclasses.asdict(RECORD.decision), "more": 1}}, "more"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    save(tmp_path)
    path = tmp_path / record_name(1)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DamagedArtifactError, match=says) as raised:
        read_record(tmp_path, 1)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\x00"])
@pytest.mark.parametrize("name", [CONFIG_NAME, CLASS_MAP_NAME, record_name(1)])
def test_what_is_no_record_is_damaged(text: str, name: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DamagedArtifactError):
        read_record(tmp_path, 1 if name == record_name(1) else None)


BEFORE = """{
  "format_version": 1,
  "version": 1,
  "model_name": "efficientnet_lite0",
  "class_to_idx": {"caesar_salad": 0, "cup_cakes": 1},
  "preprocessing": {
    "resize": 256,
    "crop": 224,
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5]
  },
  "decision": {"temperature": 1.01, "confident_at": 0.62, "food_at": 0.41},
  "sha256": {"food_model_v1.pth": "00", "food_model_v1.centroids.pth": "11"},
  "metrics": {"test_top1": 0.5, "test_top1_ci95": [0.3, 0.7]},
  "training": {"run": "a", "epochs_done": 1, "batch_norm": "fixed"},
  "libraries": {"torch": "2.14.1"},
  "created": "2026-11-28T09:00:00+00:00"
}
"""


def test_what_one_form_has_of_its_own_is_kept() -> None:
    own = OwnAnswers(Decision(2.0, confident_at=0.7, food_at=0.3), {"top1": 0.4})
    record = dataclasses.replace(RECORD, metrics={"top1": 0.5, "top5": 0.9}, forms={"int8": own})
    assert ModelRecord.from_json(record.to_json()) == record
    assert record.decision_of("int8") == own.decision
    assert record.decision_of("onnx") == record.decision
    assert record.metrics_of("int8") == {"top1": 0.4, "top5": 0.9}
    assert record.metrics_of("torch") == record.metrics


@pytest.mark.parametrize(
    "forms", ['{"int8": {}}', '{"int8": {"decision": {}}}', '{"int8": 1}', "[1]"]
)
def test_a_form_that_is_described_otherwise_is_damage(forms: str, tmp_path: Path) -> None:
    save(tmp_path)
    for name in (record_name(1), CONFIG_NAME):
        values = json.loads((tmp_path / name).read_text()) | {"forms": json.loads(forms)}
        (tmp_path / name).write_text(json.dumps(values))
    for version in (None, 1):
        with pytest.raises(DamagedArtifactError, match="cannot be used"):
            read_record(tmp_path, version)


def test_a_record_of_the_first_version_is_read_unchanged() -> None:
    record = ModelRecord.from_json(BEFORE)
    assert json.loads(record.to_json()) == json.loads(BEFORE)
    assert record.classes == ["caesar_salad", "cup_cakes"]


def test_without_a_model_the_way_to_one_is_said(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NoModelError, match=r"no trained model in .*train_model.py --sample"):
            read_record(folder)
    save(tmp_path)
    with pytest.raises(NoModelError, match=r"no version 7 in .*; there: \[1\]"):
        read_record(tmp_path, 7)


def test_two_files_that_disagree_are_named_with_the_remedy(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / CLASS_MAP_NAME).write_text('{"pizza": 0}')
    with pytest.raises(DamagedArtifactError, match=f"name different classes; .*{record_name(1)}"):
        read_record(tmp_path)


def test_a_reader_waits_out_the_moment_between_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    right = (tmp_path / CLASS_MAP_NAME).read_bytes()
    (tmp_path / CLASS_MAP_NAME).write_text('{"pizza": 0}')

    def next_moment(_: float) -> None:
        (tmp_path / CLASS_MAP_NAME).write_bytes(right)

    monkeypatch.setattr(artifacts.time, "sleep", next_moment)
    assert read_record(tmp_path).version == 1


def test_an_interrupted_release_is_finished_or_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = save(tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CLASS_MAP_NAME).write_text("{}")
    (tmp_path / f"{PUBLISHING}1").touch()
    with monkeypatch.context() as patch, pytest.raises(SaveError, match="Read-only"):
        read_only = OSError(errno.EROFS, "Read-only file system")
        patch.setattr(os, "replace", Injected(1, read_only).wrap(os.replace, after=False))
        make_current(tmp_path, record)
    make_current(tmp_path, record)
    assert loaded(tmp_path)[0] == record
    assert not (tmp_path / f"{PUBLISHING}1").exists()


def test_what_sync_clients_leave_is_not_taken_for_a_version(tmp_path: Path) -> None:
    save(tmp_path)
    copies = ("food_model_v1 (conflicted copy).json", f"{PUBLISHING}1 (conflicted copy)")
    for name in copies:
        (tmp_path / name).write_text("{}")
    assert list_versions(tmp_path) == [1]
    assert save(tmp_path).version == 2
    assert all((tmp_path / name).exists() for name in copies)


FILES = (weights_name(1), onnx_name(1), record_name(1), CONFIG_NAME, CLASS_MAP_NAME)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError):
        loaded(tmp_path)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_changed_byte_is_found(
    name: str, place: int, bits: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Or it changes nothing: white space in JSON."""
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        save(folder)
    whole = (folder / name).read_bytes()
    damaged = bytearray(whole)
    damaged[place % len(damaged)] ^= bits
    expected, state = loaded(folder)
    (folder / name).write_bytes(damaged)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(artifacts.time, "sleep", lambda _: None)
            record, again = loaded(folder)
        assert name.endswith(".json")
        assert record == expected and torch.equal(again["weight"], state["weight"])
    except ArtifactError as error:
        assert str(folder) in str(error)
    finally:
        (folder / name).write_bytes(whole)
