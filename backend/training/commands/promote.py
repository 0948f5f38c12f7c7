"""Make a version the current one: a new one that was held back, or an earlier one again."""

import logging
from pathlib import Path

from app.ml.artifacts import current_version, make_current, read_checked, read_record
from app.ml.predictor import load_model_for_inference
from training.release.promotion import ComparisonError, is_worse_than_current, read_test

logger = logging.getLogger(__name__)


def promote_version(model_dir: Path, version: int) -> None:
    """Check all files of a version, then make it current; a server that polls takes it by itself.

    That it is clearly worse is said, and does not stop whoever asks for it by name.

    Raises:
        ArtifactError: it is missing or damaged, or the folder cannot be written.
    """
    record = read_record(model_dir, version)
    for name in record.sha256:
        read_checked(model_dir, name, record)
    load_model_for_inference(model_dir, version)
    before = current_version(model_dir)
    if before == version:
        logger.info("v%d is the current version already", version)
        return
    try:
        is_worse_than_current(model_dir, read_test(model_dir, version))
    except ComparisonError as error:
        logger.warning("not compared with the current version: %s", error)
    make_current(model_dir, record)
    back = f"; the way back: --promote v{before}" if before else ""
    logger.info("v%d is the current version now%s", version, back)
