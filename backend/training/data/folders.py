"""What counts in a folder of photos, as people have them: class folders, images, and the rest.

Nothing is opened here, except that a file whose name has no ending is known by its first bytes.
"""

import difflib
import errno
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.ml.class_names import SERVICE_NAME, normalize_class_name, unfit_in
from app.ml.preprocessing import IMAGE_EXTENSIONS
from training.errors import DataError

ImagesByClass = dict[str, list[str]]  # class name -> absolute paths of its images

UNREAD_PICTURE = re.compile(
    r"\.(jxl|jp2|j2k|jpx|tiff?|bmp|dib|ico|tga|svg|psd|dng|cr[23w]|nef|nrw|arw"
    r"|srf|sr2|orf|rw2|raf|pef|raw|rwl|srw|x3f|3fr|iiq|kdc|dcr)"
)
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
UNREAD_FORMAT = "unsupported format"
NOT_A_FILE = "not a regular file"
IMAGE_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP|.{4}ftyp(avi[fs]|he[iv].|mif1|msf1)", re.DOTALL
)
ENDING = re.compile(r"\.(?!\d+$)[a-z0-9]{1,5}", re.ASCII)

# Errors of one file or folder; others mean that its disk has gone.
OF_ONE_ENTRY = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
    errno.ENAMETOOLONG,
}


@dataclass
class Audit:
    """What to tell about the data, collected while it is listed.

    notes: lines to print. skipped: path and reason of each picture and folder that is not used.
    other_files: their number by ending.
    """

    notes: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    other_files: Counter[str] = field(default_factory=Counter)

    def skip(self, path: str | Path, reason: str) -> None:
        self.skipped.append({"path": str(path), "reason": reason})

    def add(self, other: "Audit") -> None:
        self.notes += other.notes
        self.skipped += other.skipped
        self.other_files += other.other_files

    def describe_skipped(self) -> list[str]:
        """Say in a line per reason what was skipped."""
        paths_by_reason = defaultdict(list)
        for entry in self.skipped:
            paths_by_reason[entry["reason"]].append(entry["path"])
        lines = [_describe(reason, paths) for reason, paths in paths_by_reason.items()]
        if self.other_files:
            counts = self.other_files.most_common(10)
            endings = (f"{count:,} {ending or 'without an ending'}" for ending, count in counts)
            lines.append(f"files that are not pictures: {', '.join(endings)}")
        return lines


def _describe(reason: str, paths: Sequence[str]) -> str:
    names = defaultdict(list)
    for path in paths:
        name = Path(path).name
        names[ending_of(name) if reason == UNREAD_FORMAT else ""].append(name)
    shown = "; ".join(
        f"{ending.lstrip('.').upper()}: {join_names(same, 3)}" if ending else join_names(same)
        for ending, same in names.items()
    )
    remedy = "; save them as JPEG" if reason == UNREAD_FORMAT else ""
    return f"warning: skipped {len(paths):,} ({reason}): {shown}{remedy}"


def join_names(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def with_close_matches(name: str, known: Iterable[str]) -> str:
    """Name a class that there is not, with those that may be meant."""
    close = difflib.get_close_matches(normalize_class_name(name), list(known))
    return f"{name} (did you mean {' or '.join(close)}?)" if close else name


def list_folder(folder: Path) -> list["os.DirEntry[str]"]:
    """List a folder by name, without what is hidden and what systems and file servers leave."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not SERVICE_NAME.fullmatch(entry.name)]
    return sorted(kept, key=lambda entry: entry.name)


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Return whether an entry is a folder or a link to one; a dead link is neither."""
    try:
        return entry.is_dir()
    except OSError as error:
        if _is_of_the_disk(error):
            raise
        return False


def list_subfolders(folder: Path) -> dict[str, Path]:
    return {entry.name: Path(entry.path) for entry in list_folder(folder) if is_folder(entry)}


def ending_of(name: str) -> str:
    """Return ".jpg" for "Lunch.JPG", and "" for "IMG_0001", "1.2" or "lunch.jpg?w=500"."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if ENDING.fullmatch(suffix) else ""


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_ENDINGS)


def is_unread_picture(name: str) -> bool:
    return bool(UNREAD_PICTURE.fullmatch(ending_of(name)))


def is_image(entry: "os.DirEntry[str]") -> bool:
    """Return whether a file is read: by its ending or, where it has none, by its content."""
    ending = ending_of(entry.name)
    return ending in IMAGE_EXTENSIONS or (not ending and _starts_as_image(entry))


def _starts_as_image(entry: "os.DirEntry[str]") -> bool:
    try:
        if not entry.is_file():  # reading a pipe would wait forever
            return False
        with open(entry.path, "rb", buffering=0) as file:
            return bool(IMAGE_START.match(file.read(12)))
    except OSError as error:
        if _is_of_the_disk(error):
            raise
        return False


def list_images(folder: Path, audit: Audit) -> list[str]:
    """List the images directly in a folder; the audit gets the rest, or a folder that is locked."""
    try:
        entries = list_folder(folder)
    except OSError as error:
        audit.skip(folder, os_reason(error))
        return []
    images = []
    for entry in entries:
        if is_folder(entry):
            audit.skip(entry.path, "a folder inside a class folder")
        elif not is_image(entry):
            skip_by_ending(entry, audit)
        elif problem := problem_with(entry):
            audit.skip(entry.path, problem)
        else:
            images.append(entry.path)
    if not images:
        audit.skip(folder, "a folder without images")
    return images


def skip_by_ending(entry: "os.DirEntry[str]", audit: Audit) -> None:
    """Note a file that is no image, or none that is read."""
    if entry.name.endswith(".icloud"):  # .IMG_1.HEIC.icloud stands for a file that is elsewhere
        audit.skip(entry.path, "still in iCloud: download it first")
    elif is_unread_picture(entry.name):
        audit.skip(entry.path, UNREAD_FORMAT)
    else:
        audit.other_files[ending_of(entry.name)] += 1


def problem_with(entry: "os.DirEntry[str]") -> str:
    """Say what keeps a file from being used, as far as that is seen without reading it; or ""."""
    try:
        status = entry.stat()
    except OSError as error:
        return os_reason(error)
    if not stat.S_ISREG(status.st_mode):
        return NOT_A_FILE
    return "" if status.st_size else "an empty file"


def os_reason(error: OSError) -> str:
    """Say what is wrong with one file or folder; what is wrong with its disk is raised again."""
    if _is_of_the_disk(error):
        raise error
    return f"cannot be opened: {error.strerror}"


def _is_of_the_disk(error: OSError) -> bool:
    return error.errno not in OF_ONE_ENTRY


def class_folders(root: Path, audit: Audit) -> dict[str, list[Path]]:
    """Return normalized name -> the folders of that class; "" gathers names that say nothing.

    Raises:
        DataError: names that no file of a model can hold.
    """
    folders = defaultdict(list)
    found = list_subfolders(root)
    if unfit := [f"{name!r} (U+{ord(c):04X})" for name in found for c in unfit_in(name)[:1]]:
        raise DataError(
            f"{root} has class folders whose names hold characters that are not text: "
            f"{', '.join(unfit)}; rename them"
        )
    for name, folder in found.items():
        folders[normalize_class_name(name)].append(folder)
    for name, same in folders.items():
        if len(same) > 1:
            spelled = ", ".join(folder.name for folder in same)
            audit.notes.append(f"the folders {spelled} in {root} are one class: {name}")
    return dict(folders)


def images_by_class(root: Path, audit: Audit) -> ImagesByClass:
    """List the images of each class folder; the audit gets the folders without any."""
    images: ImagesByClass = {}
    for name, folders in class_folders(root, audit).items():
        for folder in folders:
            if not name:
                audit.skip(folder, "a folder name without a letter or digit")
            elif found := list_images(folder, audit):
                images.setdefault(name, []).extend(found)
    return images
