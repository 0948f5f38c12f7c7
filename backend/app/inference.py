"""The loaded model, the threads that run it, and how it is replaced meanwhile.

Nothing here blocks the event loop: photos are decoded and classified on a bounded pool, and a new
model is loaded on a separate thread beside the one being served. Each worker computes one photo at
a time: on a CPU, batches were no faster per photo (benchmarks/serving.py measures it).
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from app.answers import Answer, RecentAnswers
from app.metrics import Metrics
from app.ml.activation import ActivationMap, MapMaker
from app.ml.artifacts import CONFIG_NAME, ModelRecord, reason_of
from app.ml.predictor import FoodPredictor, Prediction, load_model_for_inference
from app.settings import Settings

logger = logging.getLogger(__name__)
TOP_K = 3
Done = TypeVar("Done")
FOLDERS = re.compile(r"(?<![\w.:/])([A-Za-z]:)?([\\/][^\s\\/:'\",;()]+)+[\\/]")


class OverloadedError(RuntimeError):
    """No more photos can be accepted at the moment."""


class ModelMissingError(RuntimeError):
    """There is no model to answer with; the message says how to get one."""


class ModelLoadError(RuntimeError):
    """A model that cannot be served; the one before keeps serving."""


class Recognition(NamedTuple):
    """What a photo was answered, by which model, and where it looked, if that was asked for."""

    prediction: Prediction
    record: ModelRecord
    activation: ActivationMap | None


class InferenceService:
    """Classifies photos with the model that is current; use it from one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.answers = RecentAnswers()
        self.predictor: FoodPredictor | None = None
        self._map_maker: MapMaker | None = None  # of the same version
        self.problem = "the model is being loaded"
        self._seen: tuple[int, int] | None = None  # the release that was loaded last
        self._load_lock = asyncio.Lock()
        # A semaphore, not a counter: the pool's threads release it.
        self._places = threading.BoundedSemaphore(settings.workers + settings.queue_size)
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        # Grad mode and thread count belong to a thread in PyTorch; the predictor handles the first.
        threads = (self.settings.threads,)
        return ThreadPoolExecutor(
            self.settings.workers, "inference", torch.set_num_threads, threads
        )

    # Photos -----------------------------------------------------------------------------------

    async def predict(
        self, read_photo: Callable[[], bytes], *, with_activation: bool = False
    ) -> Recognition:
        """Classify a photo.

        A call that is cancelled while its photo waits is dropped. read_photo: called when the
        photo's turn comes; what it raises is raised here. with_activation: also say where the
        network looked.

        Raises:
            ModelMissingError: no model is loaded.
            OverloadedError: workers + queue_size photos are already accepted.
            ImageError: the photo cannot be used.
        """
        predictor = self.predictor
        if predictor is None:
            raise ModelMissingError(
                "no model is loaded; train one with python backend/train_model.py --sample, "
                "or see /ready for what is wrong"
            )
        map_maker = self._map_maker if with_activation else None
        return await self.run(
            partial(self._compute, predictor, map_maker, read_photo, time.perf_counter())
        )

    def note_answer(self, request_id: str, answer: Answer) -> None:
        """Remember an answer, and count it; one that is given again under its id counts once."""
        if self.answers.add(request_id, answer):
            self.metrics.confidence.labels(answer.verdict).observe(answer.confidence)

    async def run(self, work: Callable[[], Done]) -> Done:
        """Do some work on a photo when its turn comes.

        Raises:
            OverloadedError: workers + queue_size photos are already accepted.
        """
        if not self._places.acquire(blocking=False):
            raise OverloadedError("too many photos are waiting; try again in a moment")
        self.metrics.queue_depth.inc()
        job = self._pool.submit(work)
        job.add_done_callback(self._leave)
        return await asyncio.wrap_future(job)

    def _leave(self, _: "Future[Any]") -> None:
        self.metrics.queue_depth.dec()
        self._places.release()

    def _compute(
        self,
        predictor: FoodPredictor,
        map_maker: MapMaker | None,
        read_photo: Callable[[], bytes],
        queued_at: float,
    ) -> Recognition:
        stages = self.metrics.stages
        stages.labels("queue").observe(time.perf_counter() - queued_at)
        with stages.labels("decode").time():
            pixels = predictor.preprocess(read_photo())
        with stages.labels("inference").time():
            top_k = min(TOP_K, len(predictor.classes))
            (prediction,) = predictor.predict_batch(pixels.unsqueeze(0), top_k)
        activation = None
        if map_maker:
            with stages.labels("activation").time():
                activation = map_maker(pixels, prediction.top[0].class_name)
        return Recognition(prediction, predictor.record, activation)

    # Models -----------------------------------------------------------------------------------

    async def load(self, version: int | None = None) -> FoodPredictor:
        """Load a version (else the pinned one, else the current one), try it, then serve it.

        Raises:
            ModelLoadError: it cannot be served; what served before still does.
        """
        async with self._load_lock:
            version = version or self.settings.model_version
            released = self._released()  # before it is read: what comes meanwhile is newer
            try:
                predictor = await asyncio.to_thread(self._load, version)
            except ModelLoadError as error:
                self.metrics.reloads.labels("failed").inc()
                self.problem = str(error)
                logger.error("the model cannot be served: %s", error.__cause__)
                raise
            self.metrics.reloads.labels("loaded").inc()
            self.metrics.model_version.set(predictor.record.version)
            self.predictor = predictor
            self._map_maker = MapMaker(self.settings.model_dir, predictor.record)
            if version is None:
                self._seen = released
        fields = {"model_version": predictor.record.version, "runtime": predictor.runtime}
        logger.info("model loaded", extra={"fields": fields})
        return predictor

    def _load(self, version: int | None) -> FoodPredictor:
        settings = self.settings
        try:
            _check_device(settings.device)
            predictor = load_model_for_inference(
                settings.model_dir,
                version,
                settings.device,
                num_threads=settings.threads,
                runtime=settings.runtime,
            )
            _warm_up(predictor)
        except Exception as error:  # onnxruntime's errors have no common base but this one
            raise ModelLoadError(for_clients(error, settings.model_dir)) from error
        return predictor

    async def watch(self) -> None:
        """Load what gets released, forever; a release that cannot be loaded is tried again."""
        if not self.settings.reload_poll_seconds or self.settings.model_version:
            return
        while True:
            await asyncio.sleep(self.settings.reload_poll_seconds)
            if self._released() != self._seen:
                with suppress(ModelLoadError):  # logged; the release is tried again
                    await self.load()

    def _released(self) -> tuple[int, int] | None:
        """Identify the current release, which replaces this file as its last step."""
        try:
            status = (self.settings.model_dir / CONFIG_NAME).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def close(self) -> None:
        """Drop all photos, without waiting for them; the service can be used again."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._new_pool()  # has no threads until it is asked


def for_clients(error: Exception, model_dir: Path) -> str:
    """Say in one line what went wrong, without the folders of this machine."""
    one_line = reason_of(error)
    if model_dir.is_absolute():
        one_line = one_line.replace(str(model_dir), model_dir.name)
    return FOLDERS.sub("", one_line)


def _check_device(device: str) -> None:
    """Refuse a device that is not there or that this PyTorch was not built for."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"NUTRILEARN_DEVICE is {device}: {reason}; set it to cpu") from error


def _warm_up(predictor: FoodPredictor) -> None:
    """Run one forward pass, which must give a finite logit for every class."""
    crop = predictor.record.preprocessing.crop
    logits = predictor.logits(torch.zeros(1, 3, crop, crop, dtype=torch.uint8))
    if logits.shape != (1, len(predictor.classes)) or not logits.isfinite().all():
        raise ValueError(
            f"version {predictor.record.version} fails its test: a finite logit for each of the "
            f"{len(predictor.classes)} classes was expected, got shape {tuple(logits.shape)}"
        )
