"""Writing on file systems that lack calls, beside other users, and under virus scanners."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from app.ml import durable
from app.ml.durable import FolderError, check_writable, file_lock, replace_file, write_durably

BACKEND = Path(durable.__file__).resolve().parents[2]
REFUSALS = ("EPERM", "EACCES", "ENOTSUP", "ENOSYS", "EINVAL", "EIO")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither call nor owner")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(
    function: Callable[..., Any], error: OSError, *, when: Callable[..., bool], times: int = 10**9
) -> Callable[..., Any]:
    """The function, which raises the error as often as that where `when` says so."""
    left = times

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left and when(*args):
            left -= 1
            raise error
        return function(*args, **kwargs)

    return wrapped


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


# Writing --------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut leaves the name with nothing behind it."""
    calls: list[str] = []
    replace = os.replace

    def noted(*paths: Any) -> None:
        calls.append("replace")
        replace(*paths)

    def synced(descriptor: int) -> None:
        calls.append("folder" if is_folder(descriptor) else "file")

    monkeypatch.setattr(os, "replace", noted)
    monkeypatch.setattr(os, "fsync", synced)
    write_durably(tmp_path / "facts.json", b"new")
    assert calls == ["file", "replace", "folder"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_leaves_the_old_content(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    write_durably(path, b"old")
    full = OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fsync", failing(os.fsync, full, when=lambda _: True))
    with pytest.raises(OSError, match=full.strerror):
        write_durably(path, b"new")
    assert names(tmp_path) == ["facts.json"] and path.read_bytes() == b"old"


@needs_posix
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_other_users_may_read_what_the_umask_grants(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_durably(tmp_path / "facts.json", b"new")
        with file_lock(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    for name in ("facts.json", "lock"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


SHIM = """
import errno, os, stat
code = getattr(errno, os.environ["REFUSAL"])
def refused(*_, **__):
    raise OSError(code, os.strerror(code))
os.chmod = os.fchmod = refused
real = os.fsync
def fsync(descriptor):
    return refused() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else real(descriptor)
os.fsync = fsync
"""
WRITE_THRICE = """
import logging, sys
from pathlib import Path
logging.basicConfig(format="%(message)s")
from app.ml.durable import check_writable, file_lock, write_durably
check_writable(Path(sys.argv[1]), "--output_dir")
for number in range(3):
    with file_lock(Path(sys.argv[1]) / "lock"):
        write_durably(Path(sys.argv[1]) / f"{number}.bin", b"whole")
"""


def write_thrice(folder: Path, shim: str, refusal: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own where the shim lets calls fail with this errno."""
    (folder / "sitecustomize.py").write_text(shim)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{BACKEND}", "REFUSAL": refusal}
    command = [sys.executable, "-c", WRITE_THRICE, str(folder / "share")]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@needs_posix
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_share_without_chmod_and_fsync_of_folders_is_written_and_told_once(
    refusal: str, tmp_path: Path
) -> None:
    done = write_thrice(tmp_path, SHIM, refusal)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "fsync of folders" in line and "continuing without" in line
    assert names(tmp_path / "share") == ["0.bin", "1.bin", "2.bin", "lock"]


@pytest.mark.parametrize("code", sorted(durable.NOT_IMPLEMENTED))
def test_a_file_system_without_fsync_still_keeps_the_content(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fsync", failing(os.fsync, missing, when=lambda _: True))
    write_durably(tmp_path / "facts.json", b"new")
    assert names(tmp_path) == ["facts.json"]
    assert (tmp_path / "facts.json").read_bytes() == b"new"


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_file_that_a_virus_scanner_holds_is_replaced_when_it_lets_go(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = PermissionError(errno.EACCES, "Access is denied")
    replace = failing(os.replace, held, when=lambda *_: True, times=times)
    monkeypatch.setattr(os, "replace", replace)
    write_durably(tmp_path / "facts.json", b"new")
    assert (tmp_path / "facts.json").read_bytes() == b"new"
    assert names(tmp_path) == ["facts.json"]


def test_a_file_that_stays_held_is_an_error_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    held = PermissionError(errno.EACCES, "Access is denied")
    monkeypatch.setattr(os, "replace", failing(os.replace, held, when=lambda *_: True))
    monkeypatch.setattr(durable.time, "sleep", slept.append)
    (tmp_path / "new").write_bytes(b"new")
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "new", tmp_path / "old")
    assert 1.5 < sum(slept) < 3


# Locks and folders ----------------------------------------------------------------------------


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    outer, inner = file_lock(tmp_path / "lock"), file_lock(tmp_path / "lock", timeout=0)
    with outer, pytest.raises(Timeout), inner:
        pass
    with file_lock(tmp_path / "lock", timeout=0):
        pass


NO_FLOCK = """
import errno, fcntl, os
code = getattr(errno, os.environ["REFUSAL"])
def flock(*_):
    raise OSError(code, os.strerror(code))
fcntl.flock = flock
"""


@needs_posix
@pytest.mark.parametrize(("refusal", "lines"), [("ENOLCK", 1), ("ENOTSUP", 1), ("ENOSYS", 0)])
def test_a_file_system_without_locks_is_used_and_told_once(
    refusal: str, lines: int, tmp_path: Path
) -> None:
    """Where the call is missing altogether filelock has a way of its own."""
    done = write_thrice(tmp_path, NO_FLOCK, refusal)
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert len(told) == lines
    assert all("share has no file locks" in line and "only one process" in line for line in told)
    assert {"0.bin", "1.bin", "2.bin"} <= set(names(tmp_path / "share"))


def test_a_writable_folder_is_made_and_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "--output_dir")
    assert names(tmp_path / "a" / "b") == []
    with FileLock(tmp_path / "lock"):  # another run is releasing: that is no fault
        check_writable(tmp_path, "--output_dir", "lock")


@pytest.mark.parametrize("call", ["replace", "mkdir", "open"])
def test_a_folder_that_cannot_be_written_to_is_one_line_with_the_flag(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))
    owner = os if call == "replace" else Path
    always = failing(getattr(owner, call), read_only, when=lambda *_: True)
    monkeypatch.setattr(owner, call, always)
    with pytest.raises(FolderError) as raised:
        check_writable(tmp_path / "models", "--checkpoint_dir")
    said = str(raised.value)
    assert said.startswith(f"--checkpoint_dir {tmp_path / 'models'} cannot be written to")
    assert "Read-only" in said and "\n" not in said and "choose another folder" in said


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FolderError, match=r"^--output_dir .*file.* cannot be written to"):
        check_writable(tmp_path / "file" / "ml-models", "--output_dir")


AS_ANOTHER_USER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner,-chown"]
CHECK = """
import sys
from pathlib import Path
from app.ml.durable import FolderError, check_writable, file_lock
try:
    if sys.argv[2] == "check":
        check_writable(Path(sys.argv[1]), "--output_dir", ".lock")
    else:
        with file_lock(Path(sys.argv[1]) / ".lock"):
            pass
except FolderError as error:
    sys.exit(str(error))
"""


@needs_posix
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs two users")
@pytest.mark.parametrize("what", ["check", "lock"])
def test_the_lock_of_another_user_is_named_with_its_owner_and_the_remedy(
    what: str, tmp_path: Path
) -> None:
    (tmp_path / ".lock").touch(0o644)
    os.chown(tmp_path / ".lock", 12345, 12345)
    tmp_path.chmod(0o777)
    command = [*AS_ANOTHER_USER, "--inh-caps", "-all", sys.executable, "-c", CHECK]
    done = subprocess.run(
        [*command, str(tmp_path), what],
        env={**os.environ, "PYTHONPATH": str(BACKEND)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path / '.lock'} belongs to user 12345" in line
    assert "chmod a+w" in line and "another folder" in line
    assert line.startswith("--output_dir") == (what == "check")
