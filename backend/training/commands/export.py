"""A released version in the files of other runtimes: phones, browsers, the Hugging Face hub."""

import logging
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.ml.artifacts import ArtifactError, read_record, reason_of
from app.ml.predictor import load_model_for_inference
from training.commands.average import photos_of_version
from training.compute.devices import prepare_machine
from training.config import TrainingConfig
from training.release.hub import export_hub
from training.release.standalone import ExportError
from training.release.standalone_formats import (
    Exported,
    export_coreml,
    export_litert,
    export_onnx,
)
from training.release.standalone_smaller import export_smaller

EXPORTS = "exports"  # the folder beside the versions
SHOWN_REASON = 200  # characters

logger = logging.getLogger(__name__)


def export_version(config: TrainingConfig, version: int, format: str) -> Path:
    """Write a version in one format, checked, into a folder of its own; return the folder.

    An earlier export of the same version in this format is replaced, and kept if this one fails.

    Raises:
        ArtifactError: the version is missing or damaged, a package is not installed, the converter
            fails, or what it wrote does not answer as the version does.
    """
    prepare_machine()
    read_record(config.output_dir, version)
    folder = config.output_dir / EXPORTS / f"v{version}-{format}"
    logger.info("writing v%d for %s, which may take a minute", version, format)
    with new_folder(folder) as staging:
        try:
            files = FORMATS[format](config, version, staging)
        except ArtifactError:
            raise
        except Exception as error:  # the converters raise anything, some with their whole program
            reason = textwrap.shorten(reason_of(error), SHOWN_REASON, placeholder=" ...")
            raise ExportError(f"v{version} cannot be written for {format}: {reason}") from error
        sizes = [size_of(file.path) for file in files]
    for file, size in zip(files, sizes, strict=True):
        logger.info("%s, %.1f MB: %s", file.path.name, size / 1e6, file.finding)
    return folder


def write_litert(config: TrainingConfig, version: int, folder: Path) -> list[Exported]:
    """Write the LiteRT files; the smaller ones if the photos that judge them are there."""
    predictor = load_model_for_inference(config.output_dir, version, runtime="torch")
    plain = export_litert(predictor, folder)
    try:
        data = photos_of_version(predictor.record, config.checkpoint_dir)
        smaller = export_smaller(plain.path, predictor, data, config.seed)
    except ArtifactError as error:
        logger.info("no fp16 and no INT8 file: %s", error)
        return [plain]
    return [plain, *smaller]


FORMATS: dict[str, Callable[[TrainingConfig, int, Path], list[Exported]]] = {
    "onnx": lambda config, *place: export_onnx(config.output_dir, *place),
    "litert": write_litert,
    "coreml": lambda config, *place: export_coreml(config.output_dir, *place),
    "hub": lambda config, *place: export_hub(config.output_dir, *place),
}


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
