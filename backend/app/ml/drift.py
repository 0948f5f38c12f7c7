"""How far the answers that are served have moved from those to the validation photos.

A release sums up its answers to the validation photos, and the server does the same with the last
ones that it gave; both do it here.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, get_args

Verdict = Literal["confident", "unsure", "not_food"]
NUM_BINS = 10  # of equal width
RECORD_KEY = "validation_answers"  # of a summary, in the metrics of a model's record


class AnswerSummary(TypedDict):
    """The answers to some photos: the share of each verdict, and of each tenth of confidence."""

    count: int
    mean_confidence: float
    verdicts: dict[str, float]
    confidences: list[float]


def sum_up(confidences: Sequence[float], verdicts: Sequence[str]) -> AnswerSummary:
    """Sum up some answers, one at least; a confidence is that of the first class, 0 to 1."""
    count, given = len(confidences), Counter(verdicts)
    tenths = Counter(min(int(c * NUM_BINS), NUM_BINS - 1) for c in confidences)
    return {
        "count": count,
        "mean_confidence": sum(confidences) / count,
        "verdicts": {name: given[name] / count for name in get_args(Verdict)},
        "confidences": [tenths[number] / count for number in range(NUM_BINS)],
    }


def reference_of(metrics: dict[str, Any]) -> AnswerSummary | None:
    """Return a record's summary of its validation photos; None in records that have none."""
    return metrics.get(RECORD_KEY)


def stability_index(expected: AnswerSummary, found: AnswerSummary) -> float:
    """Compute the population stability index of the confidences: 0 where the shares are the same.

    Above 0.25 is usually called a large shift (Siddiqi 2006, Credit Risk Scorecards); chance alone
    reaches 0.18 in one of a hundred with 200 answers on both sides. Half an answer more in each
    tenth keeps it finite.
    """
    pairs = zip(_smoothed(expected), _smoothed(found), strict=True)
    return sum((new - old) * math.log(new / old) for old, new in pairs)


def _smoothed(summary: AnswerSummary) -> list[float]:
    total = summary["count"] + NUM_BINS / 2
    return [(share * summary["count"] + 0.5) / total for share in summary["confidences"]]
