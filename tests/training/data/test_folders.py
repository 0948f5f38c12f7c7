"""What counts in a folder, as people have them: names in every script, junk, odd files."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from PIL import Image
from tests.support.photo_folders import write_images, write_tree

from app.ml.preprocessing import IMAGE_EXTENSIONS
from training.data.folders import (
    Audit,
    images_by_class,
    list_folder,
    list_images,
)
from training.errors import DataError

at_least_100 = hypothesis_settings(max_examples=150, deadline=None)
needs_links = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


# Names of classes -----------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize(
    ("name", "point"), [("da\tl", "U+0009"), ("da\nl", "U+000A"), ("da\x7fl", "U+007F")]
)
def test_control_characters_are_refused_by_their_number(
    tmp_path: Path, name: str, point: str
) -> None:
    write_tree(tmp_path, {name: 1, "naan": 1})
    with pytest.raises(DataError, match="not text") as caught:
        images_by_class(tmp_path, Audit())
    assert point in str(caught.value) and repr(name) in str(caught.value)


def test_names_that_are_not_utf8_are_refused_all_at_once(tmp_path: Path) -> None:
    try:
        for name in (b"caf\xe9", b"p\xe2t\xe9"):
            (tmp_path / os.fsdecode(name)).mkdir()
    except OSError:
        pytest.skip("this disk takes text only")
    with pytest.raises(DataError, match="not text") as caught:
        images_by_class(tmp_path, Audit())
    assert "'caf\\udce9' (U+DCE9)" in str(caught.value) and "p\\udce2t" in str(caught.value)


def test_files_of_any_name_are_images_all_the_same(tmp_path: Path) -> None:
    write_tree(tmp_path, {"dal": 1})
    image = (tmp_path / "dal" / "0000.jpg").read_bytes()
    odd = [b"caf\xe9.jpg", "\u200f\u0642.JPG".encode(), b"a\tb.jpg"]
    try:
        for name in odd:
            (tmp_path / "dal" / os.fsdecode(name)).write_bytes(image)
    except OSError:
        pytest.skip("this disk takes text only")
    assert len(list_images(tmp_path / "dal", Audit())) == 4


def test_folders_of_one_name_are_one_class(tmp_path: Path) -> None:
    """Two spellings may lie beside each other, on a disk that tells capitals apart or not."""
    spelled = ["Pav Bhaji", "pav-bhaji", "PAV_BHAJI", "cr\u00e8me", "cre\u0300me"]
    for number, name in enumerate(spelled):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name / f"{number}.jpg")
    audit = Audit()
    images = images_by_class(tmp_path, audit)
    assert {name: len(paths) for name, paths in images.items()} == {"pav_bhaji": 3, "cr\u00e8me": 2}
    assert any("Pav Bhaji" in note and "pav-bhaji" in note for note in audit.notes)


# What lies beside classes and images ----------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(".hidden", ".Trash-1000", ".Trashes", ".ipynb_checkpoints", ".AppleDouble", "__MACOSX"),
        *("$RECYCLE.BIN", "$Recycle.Bin", "RECYCLER", "System Volume Information", "FOUND.000"),
        *("lost+found", "LOST.DIR", "Network Trash Folder", "Temporary Items", "#recycle"),
        *("#snapshot", "~snapshot", "@eaDir", "@Recycle", "@Recently-Snapshot", "@Snapshot"),
        *("@tmp", "@__thumb", "__pycache__", "Thumbs.db", "ehthumbs.db", "desktop.ini"),
    ],
)
def test_service_folders_are_never_classes_nor_images(tmp_path: Path, name: str) -> None:
    write_tree(tmp_path, {name: 2, "dal": 1})
    write_images(tmp_path / "dal" / name, 1)
    assert [entry.name for entry in list_folder(tmp_path)] == ["dal"]
    audit = Audit()
    assert images_by_class(tmp_path, audit).keys() == {"dal"} and audit == Audit()


@pytest.mark.parametrize(
    "name", ["@dal", "#1_burger", "recycled_dal", "found", "lost_found", "$2_dal"]
)
def test_dishes_with_odd_names_are_classes(tmp_path: Path, name: str) -> None:
    write_tree(tmp_path, {name: 1})
    assert len(images_by_class(tmp_path, Audit())) == 1


@pytest.mark.parametrize("ending", [*IMAGE_EXTENSIONS, ".JPG", ".Jpeg"])
def test_images_are_known_by_their_endings(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"1{ending}").write_bytes(b"whatever it holds")
    assert names(list_images(tmp_path, Audit())) == [f"1{ending}"]


@pytest.mark.parametrize("name", ["IMG_0001", "lunch.jpg?w=500", "lunch.jpg_large", "1.2", "12:30"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF"])
def test_files_without_an_ending_are_known_by_their_content(
    tmp_path: Path, name: str, kind: str
) -> None:
    try:
        Image.new("RGB", (2, 2)).save(tmp_path / name, kind)
    except OSError:
        pytest.skip("this disk does not take the name")
    (tmp_path / "README").write_text("dal is lentils")
    (tmp_path / "empty").touch()
    (tmp_path / "SCAN").write_bytes(b"II*\0")
    audit = Audit()
    assert names(list_images(tmp_path, audit)) == [name]
    assert audit.other_files == {"": 3}


def test_heic_without_an_ending(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert names(list_images(tmp_path, Audit())) == ["IMG_0001"]


def test_formats_that_are_not_read_are_named_with_the_way_out(tmp_path: Path) -> None:
    for name in ("a.tif", "b.TIFF", "c.bmp", "d.CR2", "e.cr2", "f.svg"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("a.jpg.json", "b.json", "IMG_1.MOV", "IMG_1.AAE", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    audit = Audit()
    assert list_images(tmp_path, audit) == []
    pictures, empty, others = audit.describe_skipped()
    assert pictures == (
        "warning: skipped 6 (unsupported format): TIF: a.tif; TIFF: b.TIFF; BMP: c.bmp; "
        "CR2: d.CR2, e.cr2; SVG: f.svg; save them as JPEG"
    )
    assert empty == f"warning: skipped 1 (a folder without images): {tmp_path.name}"
    assert others == "files that are not pictures: 2 .json, 1 .aae, 1 .mov, 1 .txt"


def test_photos_that_are_still_in_icloud_are_named(tmp_path: Path) -> None:
    (tmp_path / ".IMG_1.HEIC.icloud").write_bytes(b"bplist00")
    audit = Audit()
    assert list_images(tmp_path, audit) == []
    assert audit.skipped[0]["reason"] == "still in iCloud: download it first"


@needs_links
def test_links_are_followed_and_those_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    write_tree(tmp_path, {"dal": 2, "elsewhere/naan": 1})
    dal, elsewhere = tmp_path / "dal", tmp_path / "elsewhere"
    (dal / "link.jpg").symlink_to(elsewhere / "naan" / "0000.jpg")
    (dal / "dead.jpg").symlink_to("nowhere.jpg")
    (dal / "loop.jpg").symlink_to("loop.jpg")
    (dal / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(elsewhere / "naan")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "gone").symlink_to("nowhere")
    audit = Audit()
    images = images_by_class(tmp_path, audit)
    assert {name: len(paths) for name, paths in images.items()} == {"dal": 3, "linked": 1}
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in audit.skipped}
    assert reasons.keys() == {"dead.jpg", "loop.jpg", "up", "naan", "elsewhere"}
    assert reasons["dead.jpg"] == "cannot be opened: No such file or directory"
    assert "links" in reasons["loop.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_no_images(tmp_path: Path) -> None:
    for name in ("pipe.jpg", "pipe"):
        os.mkfifo(tmp_path / name)
    audit = Audit()
    assert list_images(tmp_path, audit) == []
    assert {"path": str(tmp_path / "pipe.jpg"), "reason": "not a regular file"} in audit.skipped


def deny(monkeypatch: pytest.MonkeyPatch, denied: Path, number: int) -> None:
    """chmod does not stop root, under whom tests in containers run."""
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path) == denied:
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)


def test_a_locked_folder_is_named_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path, {"dal": 1, "locked": 1})
    deny(monkeypatch, tmp_path / "locked", errno.EACCES)
    audit = Audit()
    assert images_by_class(tmp_path, audit).keys() == {"dal"}
    assert audit.skipped == [
        {"path": str(tmp_path / "locked"), "reason": "cannot be opened: Permission denied"}
    ]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_disk_that_fails_is_no_empty_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_tree(tmp_path, {"dal": 1, "naan": 1})
    deny(monkeypatch, tmp_path / "naan", number)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        images_by_class(tmp_path, Audit())
    assert caught.value.errno == number
