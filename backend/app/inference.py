"""The loaded model, the threads that compute with it, and how it is replaced while they do.

Nothing here blocks the event loop: photos are decoded and classified on a bounded pool, and a new
model is loaded on a thread of its own beside the one that serves. One photo at a time per worker:
on a CPU, batches were no faster per photo (benchmarks/serving.py measures it).
"""

import asyncio
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import torch

from app.metrics import Metrics
from app.ml.artifacts import CONFIG_NAME, ModelRecord
from app.ml.predictor import FoodPredictor, Prediction, load_model_for_inference
from app.settings import Settings

LOGGER = logging.getLogger("nutrilearn")
TOP_K = 3


class OverloadedError(RuntimeError):
    """As many photos are waiting as are allowed to."""


class ModelMissingError(RuntimeError):
    """There is no model to answer with; the message says how to get one."""


class ModelLoadError(RuntimeError):
    """A model that cannot be served; the one before goes on serving."""


class InferenceService:
    """Answers photos with the newest good model; use it from one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.predictor: FoodPredictor | None = None
        self.problem = "the model is being loaded"
        self._load_lock = asyncio.Lock()
        # A semaphore, not a counter: the pool's threads give the places back.
        self._places = threading.BoundedSemaphore(settings.workers + settings.queue_size)
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        # Grad mode and thread count belong to a thread in PyTorch; the predictor sees to the first.
        threads = (self.settings.threads,)
        return ThreadPoolExecutor(
            self.settings.workers, "inference", torch.set_num_threads, threads
        )

    # Photos -----------------------------------------------------------------------------------

    async def predict(self, file: BinaryIO) -> tuple[Prediction, ModelRecord]:
        """Classify an uploaded photo; also returns the record of the model that did it.

        Raises:
            ModelMissingError: no model is loaded.
            OverloadedError: workers + queue_size photos are already on their way.
            ImageError: the photo cannot be used.
        """
        predictor = self.predictor
        if predictor is None:
            raise ModelMissingError(
                "no model is loaded, so there is no answer; train one with "
                "python backend/train_model.py --sample, or see /ready for what is wrong"
            )
        if not self._places.acquire(blocking=False):
            raise OverloadedError("too many photos are waiting; try again in a moment")
        self.metrics.queue_depth.inc()
        job = self._pool.submit(self._compute, predictor, file, time.perf_counter())
        job.add_done_callback(self._leave)
        return await asyncio.wrap_future(job), predictor.record

    def _leave(self, _: "Future[Prediction]") -> None:
        self.metrics.queue_depth.dec()
        self._places.release()

    def _compute(self, predictor: FoodPredictor, file: BinaryIO, queued_at: float) -> Prediction:
        stages = self.metrics.stages
        stages.labels("queue").observe(time.perf_counter() - queued_at)
        # Large uploads lie in a temporary file; reading it only now keeps the queue small.
        with stages.labels("decode").time():
            pixels = predictor.preprocess(file.read())
        with stages.labels("inference").time():
            top_k = min(TOP_K, len(predictor.classes))
            (prediction,) = predictor.predict_batch(pixels.unsqueeze(0), top_k)
        self.metrics.confidence.labels(prediction.verdict).observe(prediction.top[0].probability)
        return prediction

    # Models -----------------------------------------------------------------------------------

    async def load(self, version: int | None = None) -> ModelRecord:
        """Load a version (else the pinned one, else the newest), try it, then serve it.

        Raises:
            ModelLoadError: it cannot be served; what served before still does.
        """
        async with self._load_lock:
            version = version or self.settings.model_version
            try:
                predictor = await asyncio.to_thread(self._load, version)
            except ModelLoadError as error:
                self.metrics.reloads.labels("failed").inc()
                self.problem = str(error)
                raise
            self.metrics.reloads.labels("loaded").inc()
            self.metrics.model_version.set(predictor.record.version)
            self.predictor = predictor
        LOGGER.info("model loaded", extra={"fields": {"model_version": predictor.record.version}})
        return predictor.record

    def _load(self, version: int | None) -> FoodPredictor:
        settings = self.settings
        try:
            predictor = load_model_for_inference(
                settings.model_dir, version, settings.device, num_threads=settings.threads
            )
            _warm_up(predictor)
        except Exception as error:  # onnxruntime's errors have no common base but this one
            one_line = " ".join(str(error).split())  # PyTorch's errors have several
            raise ModelLoadError(one_line or type(error).__name__) from error
        return predictor

    async def watch(self) -> None:
        """Load what gets released, for ever; a release that cannot be loaded is tried again."""
        if not self.settings.reload_poll_seconds or self.settings.model_version:
            return
        seen = self._released()
        while True:
            await asyncio.sleep(self.settings.reload_poll_seconds)
            if (released := self._released()) == seen:
                continue
            try:
                await self.load()
            except ModelLoadError as error:
                LOGGER.error("the released model cannot be served: %s", error)
            else:
                seen = released

    def _released(self) -> tuple[int, int] | None:
        """Changes with every release, whose last act is to replace this one file."""
        try:
            status = (self.settings.model_dir / CONFIG_NAME).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def close(self) -> None:
        """Finish what is being computed, drop what waits; the service can be used again."""
        self._pool.shutdown(cancel_futures=True)
        self._pool = self._new_pool()  # has no threads until it is asked


def _warm_up(predictor: FoodPredictor) -> None:
    """One forward pass, which must give a finite logit for every class."""
    crop = predictor.record.preprocessing.crop
    logits = predictor.logits(torch.zeros(1, 3, crop, crop, dtype=torch.uint8))
    if logits.shape != (1, len(predictor.classes)) or not logits.isfinite().all():
        raise ValueError(
            f"version {predictor.record.version} fails its test: a finite logit for each of the "
            f"{len(predictor.classes)} classes was expected, got shape {tuple(logits.shape)}"
        )
