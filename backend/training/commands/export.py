"""A released version in the files of other runtimes: phones, browsers, the Hugging Face hub."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.ml.artifacts import ArtifactError, read_record
from training.compute.devices import prepare_machine
from training.release.export import reason_of
from training.release.hub import export_hub
from training.release.standalone import ExportError
from training.release.standalone_formats import (
    Exported,
    export_coreml,
    export_litert,
    export_onnx,
)

EXPORTS = "exports"  # the folder beside the versions
FORMATS: dict[str, Callable[[Path, int, Path], list[Exported]]] = {
    "onnx": export_onnx,
    "litert": export_litert,
    "coreml": export_coreml,
    "hub": export_hub,
}

logger = logging.getLogger(__name__)


def export_version(model_dir: Path, version: int, format: str) -> Path:
    """Write a version in one format, checked, into a folder of its own; return the folder.

    An earlier export of the same version in this format is replaced, and kept if this one fails.

    Raises:
        ArtifactError: the version is missing or damaged, a package is not installed, the converter
            fails, or what it wrote does not answer as the version does.
    """
    prepare_machine()
    read_record(model_dir, version)
    folder = model_dir / EXPORTS / f"v{version}-{format}"
    logger.info("writing v%d for %s, which may take a minute", version, format)
    with new_folder(folder) as staging:
        try:
            files = FORMATS[format](model_dir, version, staging)
        except ArtifactError:
            raise
        except Exception as error:  # the converters raise anything
            raise ExportError(
                f"v{version} cannot be written for {format}: {reason_of(error)}"
            ) from (error)
        sizes = [size_of(file.path) for file in files]
    for file, size in zip(files, sizes, strict=True):
        logger.info("%s, %.1f MB: %s", file.path.name, size / 1e6, file.finding)
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder beside its place; left whole, it takes the place, and else nothing changes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield staging
        shutil.rmtree(folder, ignore_errors=True)
        staging.chmod(0o755)  # mkdtemp's is for its owner alone
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)
