"""Prometheus metrics, in one registry per app."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from app.schemas import Drift

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
CONFIDENCES = tuple(i / 10 for i in range(1, 11))


class Metrics:
    """All metrics; stage is "queue", "decode", "inference", or "total" for the whole request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.stages = Histogram(
            "nutrilearn_stage_seconds",
            "Time of one photo by stage",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.requests = Counter(
            "nutrilearn_requests",
            "Answered requests",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.refusals = Counter(
            "nutrilearn_refusals",
            "Requests answered with an error, by its code",
            ["code"],
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "nutrilearn_queue_depth",
            "Photos accepted but not yet answered",
            registry=self.registry,
        )
        self.upload_bytes = Gauge(
            "nutrilearn_upload_bytes",
            "Bytes of all uploads that are held in memory",
            registry=self.registry,
        )
        self.confidence = Histogram(
            "nutrilearn_confidence",
            "Confidence of the first class, by verdict",
            ["verdict"],
            buckets=CONFIDENCES,
            registry=self.registry,
        )
        self.model_version = Gauge(
            "nutrilearn_model_version",
            "Version being served; 0 without a model",
            registry=self.registry,
        )
        self.reloads = Counter(
            "nutrilearn_model_loads",
            "Attempts to load a model",
            ["outcome"],
            registry=self.registry,
        )
        self.drift = DriftGauges(self.registry)

    def render(self) -> bytes:
        """Write the registry in Prometheus' text format."""
        return generate_latest(self.registry)


class DriftGauges:
    """How the last answers compare with those to the version's validation photos."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.num_answers = Gauge(
            "nutrilearn_drift_answers",
            "Last answers that are compared with those to the validation photos",
            registry=registry,
        )
        self.stability_index = Gauge(
            "nutrilearn_drift_stability_index",
            "Population stability index of their confidences; above 0.25 is a large shift",
            registry=registry,
        )
        self.mean_confidence = Gauge(
            "nutrilearn_drift_mean_confidence",
            "Mean confidence of the last answers, and of those to the validation photos",
            ["of"],
            registry=registry,
        )
        self.verdict_share = Gauge(
            "nutrilearn_drift_verdict_share",
            "Share of each verdict in the last answers, and in those to the validation photos",
            ["verdict", "of"],
            registry=registry,
        )

    def show(self, drift: Drift | None) -> None:
        """Set the gauges; None where there is nothing to compare."""
        self.num_answers.set(drift.answers if drift else 0)
        self.stability_index.set(drift.stability_index if drift else 0)
        self.mean_confidence.clear()
        self.verdict_share.clear()
        if drift is None:
            return
        for of in ("answers", "validation"):
            self.mean_confidence.labels(of).set(getattr(drift.mean_confidence, of))
            for verdict, shares in drift.verdicts.items():
                self.verdict_share.labels(verdict, of).set(getattr(shares, of))
