"""Whether a new version may replace the current one: the answers of both on the same test images.

Compared is what each version answered in its own test, as its report keeps it: on images that
neither was trained on, at once, and also where the images themselves are far away.
"""

import csv
import logging
from dataclasses import dataclass
from pathlib import Path

from app.ml.artifacts import (
    ArtifactError,
    DamagedArtifactError,
    ModelRecord,
    NoModelError,
    read_record,
    report_folder_name,
)
from training.release.metrics import PREDICTIONS_NAME, PairedTest
from training.release.tables import read_table

logger = logging.getLogger(__name__)


class ComparisonError(ArtifactError):
    """Two versions that cannot be compared; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What a version answered for one test image; rank 1 means that it was right."""

    actual: str
    predicted: str
    confidence: float
    actual_rank: int

    @property
    def correct(self) -> bool:
        return self.actual_rank == 1


@dataclass(frozen=True)
class VersionTest:
    """A version and its answers by image path."""

    record: ModelRecord
    answers: dict[str, Answer]

    @property
    def name(self) -> str:
        return f"v{self.record.version}"


def read_test(model_dir: Path, version: int) -> VersionTest:
    """Read a version's record and what it answered in its test.

    Raises:
        ArtifactError: missing or unreadable.
    """
    record = read_record(model_dir, version)
    path = model_dir / report_folder_name(version) / PREDICTIONS_NAME
    try:
        answers = {row["file"]: _answer(row) for row in read_table(path)}
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise ComparisonError(
            f"{path} cannot be used ({error!r}); it holds the test of version {version}, without "
            "which nothing can be compared"
        ) from error
    return VersionTest(record, answers)


def _answer(row: dict[str, str]) -> Answer:
    return Answer(
        row["actual"], row["predicted"], float(row["confidence"]), int(row["actual_rank"])
    )


def images_of_both(old: VersionTest, new: VersionTest) -> list[str]:
    """List the images that were in both tests under the same class."""
    shared = [path for path in new.answers if path in old.answers]
    return [path for path in shared if old.answers[path].actual == new.answers[path].actual]


def paired_test(old: VersionTest, new: VersionTest) -> PairedTest:
    """Count who alone is right on the images of both."""
    paths = images_of_both(old, new)
    pairs = [(old.answers[path].correct, new.answers[path].correct) for path in paths]
    return PairedTest(pairs.count((False, True)), pairs.count((True, False)), len(paths))


def is_worse_than_current(output_dir: Path, tested: VersionTest) -> bool:
    """Say whether a version is clearly worse than the current one, which is logged.

    Where they cannot be compared there is no reason to say so.
    """
    try:
        current = read_record(output_dir)
        test = paired_test(read_test(output_dir, current.version), tested)
    except NoModelError:
        return False
    except (ComparisonError, DamagedArtifactError) as error:
        logger.warning("not compared with the current version: %s", error)
        return False
    if test.is_worse:
        logger.warning(
            "%s is worse than v%d on the %s test images of both: it alone gets %d right, v%d alone "
            "%d (p = %.2g)",
            tested.name,
            current.version,
            f"{test.total:,}",
            test.gained,
            current.version,
            test.lost,
            test.p_value,
        )
    return test.is_worse
