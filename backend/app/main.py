"""The server. In `backend/`:

    uvicorn app.main:app --no-access-log --timeout-graceful-shutdown 10

Then open http://127.0.0.1:8000, or post a photo:

    curl -F file=@lunch.jpg http://127.0.0.1:8000/api/v1/predict

Settings are environment variables, see `settings.py`. Without a model the server starts all the
same and says how to train one.
"""

import asyncio
import gc
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from app.api import router
from app.errors import add_error_handlers
from app.feedback import FeedbackStorageError, FeedbackStore, RateLimit
from app.feedback_api import review
from app.feedback_api import router as feedback
from app.inference import InferenceService, ModelLoadError
from app.logs import log_to_stderr
from app.metrics import Metrics
from app.middleware import NamedOrigins, RequestMiddleware, RunningRequests
from app.ml.machine import cpu_quota, num_cores
from app.offline import offline_routes
from app.settings import Settings, SettingsError, load_settings
from app.uploads import UploadMemory

logger = logging.getLogger(__name__)
WEB = Path(__file__).with_name("web")
# A thread that parses a form keeps the others waiting this long each time; the event loop waits
# once for each piece of an upload. Python's own 5 ms become half a second for /health.
SWITCH_SECONDS = 0.0001
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def __getattr__(name: str) -> FastAPI:
    """Make `app` when uvicorn asks for it: importing this module reads no environment."""
    if name != "app":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    log_to_stderr()
    # PyTorch brings 400,000 objects that stay; each full collection looked at them for 0.2 seconds,
    # in which nothing else was done.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        return create_app()
    except SettingsError as error:
        raise SystemExit(f"the server cannot start: {error}") from None


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the server with these settings, else with those of the environment."""
    settings, metrics = settings or load_settings(), Metrics()
    service, running = InferenceService(settings, metrics), RunningRequests()
    app = FastAPI(
        title="NutriLearn",
        summary="From a photo of a dish to its name and sourced nutrition.",
        version="1",
        lifespan=_lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service, app.state.running = service, running
    largest = max(settings.upload_memory_bytes, settings.max_upload_bytes)
    app.state.uploads = UploadMemory(largest, metrics)
    add_error_handlers(app)
    folder = settings.feedback_dir
    app.state.feedback = None if folder is None else FeedbackStore(folder, settings)
    app.state.feedback_rate = RateLimit(settings.feedback_per_minute)
    for routes in (router, feedback, review):
        app.include_router(routes)
    if settings.offline_dir:  # before the page that needs the server
        app.include_router(offline_routes(WEB, PAGE_POLICY, settings.offline_dir))
    app.mount("/static", StaticFiles(directory=WEB), name="static")
    app.add_api_route("/", partial(_page, "index.html"), include_in_schema=False)
    app.add_api_route("/review", partial(_page, "review.html"), include_in_schema=False)
    app.add_middleware(RequestMiddleware, service=service, running=running)
    app.add_middleware(
        NamedOrigins,
        allow_origins=settings.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=["X-Request-ID", "X-Model-Version", "Retry-After"],
    )
    return app


async def _page(name: str) -> FileResponse:
    return FileResponse(WEB / name, headers={"Content-Security-Policy": PAGE_POLICY})


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load and warm up the model before the first request; without one, serve the reason."""
    service: InferenceService = app.state.service
    settings = service.settings
    found = {"cores": num_cores(), "cpu_quota": cpu_quota()}
    chosen = {"workers": settings.workers, "threads": settings.threads}
    logger.info("starting", extra={"fields": found | chosen})
    with suppress(ModelLoadError):  # logged; /ready says it too
        await service.load()
    if store := app.state.feedback:
        with suppress(FeedbackStorageError):  # logged; each correction is told so too
            await asyncio.to_thread(store.tidy)
    watcher = asyncio.create_task(service.watch())
    try:
        with _told_to_stop(app.state.running.stop):
            yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        service.close()


@contextmanager
def _told_to_stop(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` when the process is asked to end, before whoever runs the server handles that.

    A server tells its app only after the last request, which may be a long time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can be handled in the main thread only
        return
    loop = asyncio.get_running_loop()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(tell)
        handler = handlers[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    ours = [number for number, handler in handlers.items() if callable(handler)]
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, handlers[number])
