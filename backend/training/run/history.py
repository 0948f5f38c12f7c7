"""Reading `metrics.jsonl`, the record of a run: its events, and what they say together."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD_NAME = "metrics.jsonl"
NOT_METRICS = {"event", "time", "epoch"}

logger = logging.getLogger(__name__)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a record; half a line at its end does not count, damage is named."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            events.append({"time": int(event["time"]), "event": str(event["event"]), **event})
        except (ValueError, TypeError, KeyError):
            logger.warning("skipped line %d of %s: it is not an event", number, path)
    return events


@dataclass
class RunHistory:
    """What the record says, over all starts of one run."""

    start: dict[str, Any]  # the first one: the run's key, name and experiment
    tracking_uri: str = ""
    run_dir: str | None = None  # where the run's folder was when it was last started
    params: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # what it trains on
    epochs: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None  # None while the run lasts, or when it was killed
    last_time: int = 0  # milliseconds since 1970, as all times

    @classmethod
    def read(cls, path: Path) -> "RunHistory | None":
        """Return None if the run has not started yet."""
        events = read_events(path)
        first = next((event for event in events if event["event"] == "start"), None)
        if first is None:
            return None
        history = cls(first)
        for event in events:
            history._add(event)
        return history

    def _add(self, event: dict[str, Any]) -> None:
        self.last_time = event["time"]
        if event["event"] == "epoch":
            self.epochs.append(event)
            return
        self.end = event if event["event"] == "end" else None
        if event["event"] == "start":
            self.tracking_uri, self.system = event["tracking_uri"], event["system"]
            self.run_dir, self.data = event.get("run_dir"), event.get("data") or self.data
            self.params = {**event["params"], **self.params}  # MLflow refuses a second value

    def points(self) -> list[tuple[str, float, int, int]]:
        """Return every metric as (name, value, time, step).

        The step is the epoch; that of a final metric is the last epoch.
        """
        points = [
            (name, float(value), epoch["time"], epoch["epoch"])
            for epoch in self.epochs
            for name, value in epoch.items()
            if name not in NOT_METRICS
        ]
        if self.end:
            step = max((epoch["epoch"] for epoch in self.epochs), default=0)
            final = self.end["metrics"].items()
            points += [(name, float(value), self.end["time"], step) for name, value in final]
        return points
