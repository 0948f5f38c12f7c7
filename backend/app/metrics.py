"""Prometheus metrics, in one registry per app."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

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

    def render(self) -> bytes:
        """Write the registry in Prometheus' text format."""
        return generate_latest(self.registry)
