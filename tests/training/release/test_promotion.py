"""A new version replaces the current one, unless a paired test says that it is worse."""

import dataclasses
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.released import RECORD, release_model

from app.ml.artifacts import read_record, report_folder_name
from training.release.metrics import PREDICTION_COLUMNS, PREDICTIONS_NAME
from training.release.promotion import (
    Answer,
    VersionTest,
    is_worse_than_current,
    paired_test,
    read_test,
)
from training.release.tables import write_table


def answered(version: int, hits: str, actual: str = "dosa") -> VersionTest:
    """A version and its answers, one a letter: "+" was right."""
    answers = {
        f"{number}.jpg": Answer(actual, actual if hit == "+" else "idli", 0.9, 1 + (hit != "+"))
        for number, hit in enumerate(hits)
    }
    return VersionTest(dataclasses.replace(RECORD, version=version), answers)


def release(folder: Path, hits: str) -> int:
    """Release a version whose test went so; it becomes the current one."""
    version = release_model(folder, ["dosa", "idli"]).version
    answers = answered(version, hits).answers
    rows = [
        dict.fromkeys(PREDICTION_COLUMNS, "")
        | {"file": file, "actual": a.actual, "predicted": a.predicted}
        | {"confidence": a.confidence, "actual_rank": a.actual_rank}
        for file, a in answers.items()
    ]
    report = folder / report_folder_name(version)
    report.mkdir(exist_ok=True)
    write_table(report / PREDICTIONS_NAME, PREDICTION_COLUMNS, rows)
    return version


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        ("+" * 20, "+" * 20, False),
        ("+" * 20, "-" * 5 + "+" * 15, False),  # p = 0.0625
        ("+" * 20, "-" * 6 + "+" * 14, True),  # p = 0.03125
        ("-" * 6 + "+" * 14, "+" * 20, False),  # clearly better
        ("+" * 6 + "-" * 6, "-" * 6 + "+" * 6, False),
    ],
)
def test_only_a_clear_loss_is_worse(old: str, new: str, worse: bool, tmp_path: Path) -> None:
    release(tmp_path, old)
    assert is_worse_than_current(tmp_path, answered(2, new)) == worse


@settings(max_examples=100, deadline=None)
@given(st.text("+-", min_size=1, max_size=40), st.randoms())
def test_the_test_is_paired_and_fair(hits: str, random: "object") -> None:
    """No version is worse than itself, and of two at most one is worse."""
    other = "".join(random.sample(hits, len(hits)))  # type: ignore[attr-defined]
    assert not paired_test(answered(1, hits), answered(2, hits)).is_worse
    forth, back = (
        paired_test(answered(1, a), answered(2, b)) for a, b in ((hits, other), (other, hits))
    )
    assert forth.p_value == back.p_value
    assert not (forth.is_worse and back.is_worse)


def test_images_that_changed_their_class_do_not_count(tmp_path: Path) -> None:
    release(tmp_path, "+" * 20)
    assert not is_worse_than_current(tmp_path, answered(2, "-" * 20, actual="idli"))
    assert paired_test(answered(1, "+" * 20), answered(2, "-" * 20, actual="idli")).total == 0


def test_the_reason_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    release(tmp_path, "+" * 10)
    caplog.set_level(logging.INFO)
    assert is_worse_than_current(tmp_path, answered(2, "-" * 9 + "+"))
    assert "v2 is worse than v1 on the 10 test images of both" in caplog.text
    assert "v1 alone 9 (p = 0.0039)" in caplog.text


def test_where_nothing_can_be_compared_nothing_is_held_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = answered(2, "-" * 20)
    assert not is_worse_than_current(tmp_path, new)  # no current version
    version = release(tmp_path, "+" * 20)
    assert read_test(tmp_path, version).answers
    (tmp_path / report_folder_name(version) / PREDICTIONS_NAME).unlink()
    assert not is_worse_than_current(tmp_path, new)
    assert "not compared with the current version" in caplog.text
    (tmp_path / "class_to_idx.json").write_text("{}")
    assert not is_worse_than_current(tmp_path, new)
    assert read_record(tmp_path, version).version == version
