"""Food-101: its own lists through torchvision, and its download."""

import errno
import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.support.photo_folders import counts, write_food101, write_images
from torchvision.datasets import Food101
from torchvision.datasets import utils as torchvision_utils

from training.data import food101
from training.data.splits import load_food_data
from training.errors import DataError

# The lists ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "food-101"])
def test_food101_goes_through_torchvision(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    parts = []
    init = Food101.__init__

    def spy(self: Food101, root: Path, split: str, **kwargs: object) -> None:
        parts.append(split)
        init(self, root, split, **kwargs)

    monkeypatch.setattr(Food101, "__init__", spy)
    assert counts(load_food_data(root / place)) == (8, 2, 4)
    assert parts == ["train", "test"]


def test_food101_layout_under_another_name(tmp_path: Path) -> None:
    write_food101(tmp_path / "my-photos", {"pizza": (5, 2), "ramen": (5, 2)})
    assert counts(load_food_data(tmp_path / "my-photos")) == (8, 2, 4)


def test_food101_images_that_are_gone_or_empty_are_named(tmp_path: Path) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (6, 2), "ramen": (6, 2)})
    pizza = root / "food-101" / "images" / "pizza"
    (pizza / "0001.jpg").unlink()
    (pizza / "0002.jpg").write_bytes(b"")
    data = load_food_data(root)
    assert sum(counts(data)) == 14
    skipped = {Path(e["path"]).name: e["reason"] for e in data.audit["skipped"]}
    assert skipped.keys() == {"0001.jpg", "0002.jpg"}
    assert "not on disk" in skipped["0001.jpg"] and "empty" in skipped["0002.jpg"]
    assert any("0001.jpg" in note for note in data.notes)


def test_a_class_folder_that_is_gone_is_a_class_with_too_few_images(tmp_path: Path) -> None:
    root = write_food101(tmp_path / "food-101", {f"dish_{i:02}": (5, 1) for i in range(10)})
    shutil.rmtree(root / "food-101" / "images" / "dish_03")
    data = load_food_data(root)
    assert len(data.class_to_idx) == 9 and "dish_03" not in data.class_to_idx
    assert any(
        "too few" in note or "fewer than" in note for note in data.notes if "dish_03" in note
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"pizza": 3}', None])
def test_broken_food101_lists_are_named(tmp_path: Path, text: str | None) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (6, 2), "ramen": (6, 2)})
    listing = root / "food-101" / "meta" / "test.json"
    if text is None:
        listing.unlink()
    else:
        listing.write_text(text)
    with pytest.raises(DataError, match=r"test\.json is not a readable") as caught:
        load_food_data(root)
    assert caught.value.__cause__ is not None


def test_half_a_food101_is_not_trusted(tmp_path: Path) -> None:
    write_images(tmp_path / "food-101" / "images" / "pizza", 3)
    with pytest.raises(DataError, match="incomplete"):
        load_food_data(tmp_path)


def test_food101_unpacked_into_a_folder_of_its_name(tmp_path: Path) -> None:
    write_food101(tmp_path / "food-101" / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    assert counts(load_food_data(tmp_path)) == (8, 2, 4)


# The download ---------------------------------------------------------------------------------


def one_line(error: DataError) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    source = tmp_path / "source"
    write_food101(source / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(source / "food-101", "food-101")
    shutil.rmtree(source)
    return buffer.getvalue()


@pytest.fixture
def served(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Food-101's address leads to loopback; `body` and `status` say what comes from there."""
    answer = SimpleNamespace(body=archive, length=len(archive), status=200)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer.status)
            self.send_header("Content-Length", str(answer.length))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(answer.body)

        def log_message(self, *args: object) -> None:
            """Quiet."""

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(
            Food101, "_URL", f"http://127.0.0.1:{server.server_port}/food-101.tar.gz"
        )
        monkeypatch.setattr(Food101, "_MD5", hashlib.md5(archive).hexdigest())
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20e9))
        yield answer
        server.shutdown()


# From 3.12 on Python asks torchvision to name a filter for unpacking.
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
@pytest.mark.usefixtures("served")
class TestDownload:
    @pytest.mark.parametrize("exists", [False, True])
    def test_food101_is_fetched_once(
        self, served: SimpleNamespace, tmp_path: Path, exists: bool
    ) -> None:
        data_dir = tmp_path / "data"
        if exists:
            write_food101(data_dir / "sample" / "food-101", {"drawn": (1, 1)})
            (data_dir / "README.md").write_text("keep me")
        before = set(data_dir.glob("*"))
        assert counts(load_food_data(data_dir)) == (8, 2, 4)
        assert set(data_dir.glob("*")) == before | {data_dir / "food-101"}
        assert not list(data_dir.glob(".*")), "the archive and the temporary folder are gone"
        served.status = 404
        assert counts(load_food_data(data_dir)) == (8, 2, 4)

    def fails_then_works(
        self, data_dir: Path, message: str, mend: Callable[[], None], cause: type[Exception]
    ) -> None:
        with pytest.raises(DataError, match=message) as caught:
            load_food_data(data_dir)
        text = one_line(caught.value)
        assert "--sample" in text and "--data_dir" in text and "by hand" in text
        assert isinstance(caught.value.__cause__, cause)
        assert not data_dir.exists(), "nothing is left of a folder that was made for it"
        mend()
        data_dir.mkdir()
        (data_dir / "notes.txt").write_text("mine")
        assert counts(load_food_data(data_dir)) == (8, 2, 4)
        assert (data_dir / "notes.txt").read_text() == "mine"

    def test_broken_transfer(self, served: SimpleNamespace, archive: bytes, tmp_path: Path) -> None:
        served.body = archive[: len(archive) // 2]
        self.fails_then_works(
            tmp_path / "data",
            "incomplete|IncompleteRead",
            lambda: setattr(served, "body", archive),
            Exception,
        )

    def test_wrong_md5(self, served: SimpleNamespace, archive: bytes, tmp_path: Path) -> None:
        served.body = archive[:-1] + bytes([archive[-1] ^ 1])
        self.fails_then_works(
            tmp_path / "data", "wrong MD5", lambda: setattr(served, "body", archive), RuntimeError
        )

    def test_no_such_page(self, served: SimpleNamespace, tmp_path: Path) -> None:
        served.status = 404
        self.fails_then_works(
            tmp_path / "data", "HTTP Error 404", lambda: setattr(served, "status", 200), OSError
        )

    def test_right_md5_of_a_damaged_archive(
        self,
        served: SimpleNamespace,
        archive: bytes,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        served.body = archive[: len(archive) // 2]
        served.length = len(served.body)
        right = Food101._MD5
        monkeypatch.setattr(Food101, "_MD5", hashlib.md5(served.body).hexdigest())

        def mend() -> None:
            served.body, served.length = archive, len(archive)
            monkeypatch.setattr(Food101, "_MD5", right)

        self.fails_then_works(tmp_path / "data", "could not be downloaded", mend, EOFError)

    @pytest.mark.parametrize("step", ["_urlretrieve", "_extract_tar"])
    def test_the_disk_fills_up(
        self,
        tmp_path: Path,
        step: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fill(*args: object) -> None:
            if step == "_urlretrieve":
                Path(str(args[1])).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if step == "_urlretrieve":
                patch.setattr(torchvision_utils, step, fill)
            else:
                patch.setitem(torchvision_utils._ARCHIVE_EXTRACTORS, ".tar", fill)
            self.fails_then_works(tmp_path / "data", "No space left", patch.undo, OSError)

    def test_too_little_space_is_said_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("started anyway")

        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
        monkeypatch.setattr(torchvision_utils, "_urlretrieve", refuse)
        with pytest.raises(DataError, match=r"needs 10\.6 GB .* 3\.0 GB are free") as caught:
            load_food_data(tmp_path / "data")
        assert "--sample" in one_line(caught.value)
        assert not (tmp_path / "data").exists()

    def test_a_place_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def deny(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", deny)
            with pytest.raises(DataError, match="Permission denied"):
                load_food_data(tmp_path / "data")
        assert counts(load_food_data(tmp_path / "data")) == (8, 2, 4)

    def test_an_interrupt_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setitem(torchvision_utils._ARCHIVE_EXTRACTORS, ".tar", interrupt)
            with pytest.raises(KeyboardInterrupt):
                load_food_data(tmp_path / "data")
        assert not any((tmp_path / "data").iterdir())
        assert counts(load_food_data(tmp_path / "data")) == (8, 2, 4)

    def test_what_a_killed_download_left(self, tmp_path: Path) -> None:
        old, young = (tmp_path / f"{food101.PART_PREFIX}{n}" for n in ("old", "young"))
        for part in (old, young):
            write_food101(part / "food-101", {"half": (1, 1)})
        yesterday = time.time() - 2 * food101.PART_IS_STALE_S
        os.utime(old, (yesterday, yesterday))
        assert counts(load_food_data(tmp_path)) == (8, 2, 4)
        assert not old.exists() and young.exists(), "another run may be at work in the young one"

    def test_a_stale_download_on_a_disk_that_is_read_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_food101(tmp_path / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
        old = tmp_path / f"{food101.PART_PREFIX}old"
        old.mkdir()
        os.utime(old, (1, 1))

        def refuse(*_: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(shutil, "rmtree", refuse)
        assert counts(load_food_data(tmp_path)) == (8, 2, 4)

    @pytest.mark.parametrize("name", ["food-101.tar.gz", "photos.zip", "IMG_1.CR2", "lunch.jpg"])
    def test_nothing_is_downloaded_beside_what_may_be_data(
        self, served: SimpleNamespace, tmp_path: Path, name: str
    ) -> None:
        served.status = 404
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match="no class folder with images") as caught:
            load_food_data(tmp_path)
        assert name in one_line(caught.value)
