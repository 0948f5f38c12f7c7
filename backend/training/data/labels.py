"""Corrected labels: a CSV that says which photos are of another dish, and which to leave out.

The photos stay where they are. The file has the columns path, relative to the data folder, and
label: a class of the data, or `drop` (or nothing) to leave the photo out. A label that the photo
has already says that a person has looked at it. `train_model.py --audit` writes a page that makes
such a file.
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from app.ml.class_names import normalize_class_name
from training.data.folders import ImagesByClass, join_names, with_close_matches
from training.errors import DataError

COLUMNS = ["path", "label"]
DROP = "drop"


class LabelsRecord(TypedDict):
    """What a file of labels did. sha256: of what it says, however it is written or ordered."""

    file: str
    sha256: str
    relabeled: int
    dropped: int
    confirmed: int
    unused: int


def read_labels(file: Path) -> dict[str, str]:
    """Read path -> class name, or `DROP`, in the order of the file.

    Raises:
        DataError: it cannot be read, a line is malformed, or two lines contradict each other.
    """
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    rows = csv.reader(io.StringIO(_text_of(file), newline=""), strict=True)
    try:
        _check_header(file, next(rows, []))
        for row in filter(None, rows):
            path, label = _parse(row, f"--labels {file}: line {rows.line_num}")
            if labels.setdefault(path, label) != label:
                raise DataError(
                    f"--labels {file}: line {rows.line_num} calls {path} {label!r}, line "
                    f"{lines[path]} {labels[path]!r}; keep one of them"
                )
            lines.setdefault(path, rows.line_num)
    except csv.Error as error:
        raise DataError(f"--labels {file}: line {rows.line_num} is not CSV: {error}") from error
    return labels


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--labels {file} is not text in UTF-8; save it as CSV UTF-8") from error
    except OSError as error:
        raise DataError(f"--labels {file} cannot be read: {error.strerror}") from error


def _check_header(file: Path, header: Sequence[str]) -> None:
    if [name.strip().lower() for name in header] != COLUMNS:
        hint = "; separate the columns by commas" if ";" in "".join(header) else ""
        raise DataError(
            f"--labels {file}: the first line must be path,label, not {','.join(header)!r}{hint}"
        )


def _parse(row: Sequence[str], where: str) -> tuple[str, str]:
    if len(row) != len(COLUMNS):
        raise DataError(
            f"{where} has {len(row)} columns instead of 2; put what holds a comma in quotes"
        )
    path, label = row[0].strip(), row[1].strip()
    if not path:
        raise DataError(f"{where} names no photo")
    if label.lower() in ("", DROP):
        return os.path.normpath(path), DROP
    if not (name := normalize_class_name(label)):
        raise DataError(f"{where}: {label!r} has no letter or digit to call a class by")
    return os.path.normpath(path), name


def digest(labels: Mapping[str, str]) -> str:
    """Digest what a file of labels says, however it is written or ordered."""
    return hashlib.sha256(json.dumps(sorted(labels.items())).encode()).hexdigest()


def apply_labels(
    file: Path,
    parts: Mapping[str, ImagesByClass],
    folders: Sequence[Path],
    known: Collection[str],
) -> tuple[dict[str, ImagesByClass], LabelsRecord]:
    """Move photos to the class that the file says, and leave out those that it drops.

    Each photo stays in its split: which one it is in follows from its folder, so that runs with
    other labels are tested on the same photos.

    parts: split -> class -> paths. folders: what paths are relative to, the data folder first.
    known: all classes of the data; the photos of those that `parts` lacks are left out.

    Raises:
        DataError: the file cannot be read, names an unknown class or a path outside the folders,
            contradicts itself, fits none of the photos, or leaves a class without training images;
            or a class is called `drop`.
    """
    labels = read_labels(file)
    check_no_class_is_drop(known)
    if unknown := sorted(set(labels.values()) - {DROP, *known}):
        hints = ", ".join(with_close_matches(name, known) for name in unknown)
        raise DataError(f"--labels {file}: no such class: {hints}; `drop` leaves a photo out")
    places = {path for images in parts.values() for paths in images.values() for path in paths}
    wanted = _found(file, labels, folders, places)
    changed = {part: _relabeled(images, wanted) for part, images in parts.items()}
    if bare := [name for name, paths in changed["train"].items() if not paths]:
        raise DataError(
            f"--labels {file}: no training image of {join_names(bare)} is left; relabel fewer, or "
            "leave the class out with --classes"
        )
    return changed, _record(file, labels, parts, wanted)


def check_no_class_is_drop(classes: Collection[str]) -> None:
    """Refuse data in which `drop` would be a dish.

    Raises:
        DataError: to keep such a label would leave the photo out.
    """
    if DROP in classes:
        raise DataError(
            f"a class is called {DROP!r}, which leaves photos out in files of labels; give its "
            "folder another name"
        )


def _found(
    file: Path, labels: Mapping[str, str], folders: Sequence[Path], places: Collection[str]
) -> dict[str, str]:
    """Return the labels by absolute path, of the photos that are there."""
    found: dict[str, str] = {}
    for path, label in labels.items():
        candidates = [os.path.normpath(folder / path) for folder in folders]
        inside = [c for c, folder in zip(candidates, folders, strict=True) if _is_in(c, folder)]
        if not inside:
            raise DataError(f"--labels {file}: {path} is outside {folders[0]}")
        here = [candidate for candidate in inside if candidate in places]
        if len(set(here)) > 1:
            raise DataError(
                f"--labels {file}: {path} is in {' and in '.join(map(str, folders))}; give its "
                "whole path"
            )
        for candidate in here:
            if found.setdefault(candidate, label) != label:
                raise DataError(
                    f"--labels {file}: {path} is called {label!r}, and under another path "
                    f"{found[candidate]!r}; keep one of them"
                )
    if labels and not found:
        raise DataError(
            f"--labels {file}: none of its {len(labels):,} photos is among those of {folders[0]}, "
            f"e.g. {next(iter(labels))}; paths are relative to that folder"
        )
    return found


def _is_in(path: str, folder: Path) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _relabeled(images: ImagesByClass, wanted: Mapping[str, str]) -> ImagesByClass:
    changed: ImagesByClass = {name: [] for name in images}
    for name, paths in images.items():
        for path in paths:
            label = wanted.get(path, name)
            if label in changed:  # neither dropped, nor of a class that is not asked for
                changed[label].append(path)
    return changed


def _record(
    file: Path,
    labels: Mapping[str, str],
    parts: Mapping[str, ImagesByClass],
    wanted: Mapping[str, str],
) -> LabelsRecord:
    folder_of = {p: name for images in parts.values() for name in images for p in images[name]}
    kinds = Counter(
        "dropped" if label == DROP else "confirmed" if label == folder_of[path] else "relabeled"
        for path, label in wanted.items()
    )
    return {
        "file": str(file),
        "sha256": digest(labels),
        "relabeled": kinds["relabeled"],
        "dropped": kinds["dropped"],
        "confirmed": kinds["confirmed"],
        "unused": len(labels) - len(wanted),
    }


def describe_labels(record: LabelsRecord) -> list[str]:
    """Say in lines to print what a file of labels did."""
    kinds = f"{record['relabeled']:,} photos relabeled, {record['dropped']:,} dropped, "
    notes = [f"{record['file']}: {kinds}{record['confirmed']:,} confirmed"]
    if record["unused"]:
        notes.append(
            f"warning: photos in {record['file']} that this run does not have: {record['unused']:,}"
        )
    return notes


def name_in_labels(path: str, folders: Sequence[Path], places: Collection[str]) -> str:
    """Return what a file of labels calls a photo: the inverse of how paths are found."""
    for folder in folders:
        if _is_in(path, folder):
            name = os.path.relpath(path, folder)
            others = {os.path.normpath(other / name) for other in folders} - {path}
            return path if others & set(places) else Path(name).as_posix()
    return path
