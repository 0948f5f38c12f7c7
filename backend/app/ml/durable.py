"""Write files that hold their old or their new content after any crash, on any file system.

Network shares, FUSE mounts and sync clients lack calls that a local disk has. What only adds safety
is optional: its failure is logged once. A write that may not have reached the disk is an error.
"""

import errno
import logging
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

NOT_IMPLEMENTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
REFUSED = NOT_IMPLEMENTED | {errno.EPERM, errno.EACCES, errno.EIO}
NO_LOCKS = NOT_IMPLEMENTED | {errno.ENOLCK}
REPLACE_DELAYS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8)  # seconds, 2 in all

_told: set[str] = set()  # what a warning was logged about

logger = logging.getLogger(__name__)


class FolderError(OSError):
    """A folder or a lock file that cannot be used; the message says why and what to do."""


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Replace a file so that after any crash it holds its old or its new content, whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            with optional("fsync of files", NOT_IMPLEMENTED):
                os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_file(source: Path, target: Path) -> None:
    """Rename over what is there; on Windows a virus scanner or sync client may hold it briefly.

    Raises:
        OSError: it is still held after two seconds, or cannot be renamed at all.
    """
    for delay in REPLACE_DELAYS:
        try:
            os.replace(source, target)
        except PermissionError:
            time.sleep(delay)
        else:
            return
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    with optional("fsync of folders", REFUSED):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def optional(call: str, refusals: set[int]) -> Iterator[None]:
    """Continue without a call that the file system refuses; log the first refusal."""
    try:
        yield
    except OSError as error:
        if error.errno not in refusals:
            raise
        _tell_once(call, f"{call} refused by the file system ({error}); continuing without it")


def _tell_once(subject: str, line: str) -> None:
    if subject not in _told:
        _told.add(subject)
        logger.warning("%s", line)


@contextmanager
def file_lock(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock among processes; where the file system has none, warn and continue without it.

    timeout: seconds to wait for another holder; negative waits forever.

    Raises:
        filelock.Timeout: another process still holds it.
        FolderError: the lock file may not be opened.
    """
    lock = FileLock(path)
    try:
        with warnings.catch_warnings():  # filelock says that it takes a soft lock instead
            warnings.filterwarnings("ignore", message="flock not supported")
            lock.acquire(timeout)
    except PermissionError as error:
        raise FolderError(_not_ours(path, error)) from error
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
            raise
        line = f"{path.parent} has no file locks ({error}); let only one process write there"
        _tell_once("locks", line)
    try:
        yield
    finally:
        lock.release()


def _not_ours(path: Path, error: OSError) -> str:
    if not path.exists():
        return f"{path} cannot be made: {error.strerror}; choose a folder that you may write to"
    return (
        f"{path} belongs to {_owner(path)} and cannot be opened: {error.strerror}; ask for "
        f"chmod a+w on it, or choose another folder"
    )


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, NotImplementedError):  # a number without a name, and Windows
        return f"user {path.stat().st_uid}"


def check_writable(folder: Path, flag: str, lock_name: str | None = None) -> None:
    """Prove that files can be written, replaced and locked in a folder, which is made if missing.

    lock_name: the lock file that will be held there, if it is known already.

    Raises:
        FolderError: one line that names the flag.
    """
    probe = folder / f".write-test-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for content in (b"old", b"new"):
            write_durably(probe, content)
        with suppress(Timeout), file_lock(folder / lock_name if lock_name else probe, timeout=0):
            pass
    except FolderError as error:
        raise FolderError(f"{flag} {folder}: {error}") from error
    except OSError as error:
        raise FolderError(
            f"{flag} {folder} cannot be written to ({error}); choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
