"""The server. In `backend/`:

    uvicorn app.main:app --no-access-log --timeout-graceful-shutdown 10

Then open http://127.0.0.1:8000, or post a photo:

    curl -F file=@lunch.jpg http://127.0.0.1:8000/api/v1/predict

Settings are environment variables, see `settings.py`. Without a model the server starts all the
same and says how to train one.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import add_error_handlers, router
from app.inference import LOGGER, InferenceService, ModelLoadError
from app.metrics import Metrics
from app.settings import Settings, load_settings

WEB = Path(__file__).with_name("web")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def __getattr__(name: str) -> FastAPI:
    """`app`, made when uvicorn asks for it: importing this module reads no environment."""
    if name == "app":
        return create_app()
    raise AttributeError(f"module {__name__} has no attribute {name}")


def create_app(settings: Settings | None = None) -> FastAPI:
    """The server with these settings, else with those of the environment."""
    service = InferenceService(settings or load_settings(), Metrics())
    app = FastAPI(
        title="NutriLearn",
        summary="From a photo of a dish to its name and sourced nutrition.",
        version="1",
        lifespan=_lifespan,
        redoc_url=None,
    )
    app.state.service = service
    add_error_handlers(app)
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=WEB), name="static")
    app.add_api_route("/", _page, include_in_schema=False)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=service.settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["X-Request-ID"],
        expose_headers=["X-Request-ID", "X-Model-Version", "Retry-After"],
    )
    app.add_middleware(RequestMiddleware, service=service)
    return app


async def _page() -> FileResponse:
    return FileResponse(WEB / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load and warm up the model before the first request; without one, serve the reason."""
    _log_to_stderr()
    service: InferenceService = app.state.service
    try:
        await service.load()
    except ModelLoadError as error:
        LOGGER.error("no model is served: %s", error)
    watcher = asyncio.create_task(service.watch())
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        service.close()


# Requests -------------------------------------------------------------------------------------


class RequestMiddleware:
    """Around every request: its id, its upload limits, its headers, its log line, its numbers."""

    def __init__(self, app: ASGIApp, service: InferenceService) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(Headers(scope=scope))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 500  # what an exception becomes further out

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(scope, MutableHeaders(scope=message))
            await send(message)

        try:
            limits = UploadLimits(scope, receive, self.service.settings)
            await self.app(scope, limits, send_with_headers)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _add_headers(self, scope: Scope, headers: MutableHeaders) -> None:
        state = scope["state"]
        headers["X-Request-ID"] = state["request_id"]
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        predictor = self.service.predictor
        if version := state.get("model_version") or (predictor and predictor.record.version):
            headers["X-Model-Version"] = str(version)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        state, metrics = scope["state"], self.service.metrics
        # The template, not the path: a path is chosen by the client and would never stop growing.
        route = getattr(scope.get("route"), "path", "none")
        metrics.requests.labels(scope["method"], route, status).inc()
        if route == "/api/v1/predict":
            metrics.stages.labels("total").observe(seconds)
        if status >= 400:
            metrics.refusals.labels(state.get("error_code", "internal_error")).inc()
        fields = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
        }
        optional = ("error_code", "verdict", "model_version")
        fields |= {name: state[name] for name in optional if name in state}
        LOGGER.info("request", extra={"fields": fields})


def _request_id(headers: Headers) -> str:
    """The client's id if it is harmless, else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class UploadLimits:
    """A request's `receive` that ends a body which is too long or takes too long.

    FastAPI's own max_body_size answers in plain text from outside every handler, and uvicorn has
    no deadline for a body at all.
    """

    def __init__(self, scope: Scope, receive: Receive, settings: Settings) -> None:
        self.receive = receive
        self.settings = settings
        self.size = 0
        self.complete = False
        self.deadline = time.monotonic() + settings.upload_timeout_seconds
        declared = Headers(scope=scope).get("content-length", "")
        self.declared_size = int(declared) if declared.isdecimal() else 0

    async def __call__(self) -> Message:
        """The next piece of the body.

        Raises:
            HTTPException: 413 or 408.
        """
        if self.complete:
            return await self.receive()  # waits for the client to leave, without a deadline
        self._check_size(self.declared_size)
        try:
            with anyio.fail_after(self.deadline - time.monotonic()):
                message = await self.receive()
        except TimeoutError as error:
            seconds = self.settings.upload_timeout_seconds
            raise HTTPException(
                408, f"the upload took longer than {seconds:g} s", {"Connection": "close"}
            ) from error
        self.size += len(message.get("body", b""))
        self._check_size(self.size)
        self.complete = not message.get("more_body", False)
        return message

    def _check_size(self, size: int) -> None:
        if size > (limit := self.settings.max_upload_bytes):
            raise HTTPException(413, f"the upload is larger than {limit} bytes")


# Log ------------------------------------------------------------------------------------------


class JsonFormatter(logging.Formatter):
    """One JSON object a line; json.dumps escapes whatever a client put into a path."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(values)


def _log_to_stderr() -> None:
    """Show our log, unless whoever runs the server has set up logging themselves."""
    if not LOGGER.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)
