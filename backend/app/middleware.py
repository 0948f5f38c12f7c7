"""What happens around every request, whatever its route."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import anyio
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import CODE_OF_STATUS, error_response
from app.inference import InferenceService
from app.logs import shorten
from app.settings import Settings

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"}
MAX_DRAINED_BYTES = 2**28
MAX_DRAIN_SECONDS = 10.0
STOPPING_SECONDS = 5.0


class NamedOrigins(CORSMiddleware):
    """CORS for the named origins; the preflight of any other goes on to be refused as an error."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = _preflight_origin(scope)
        refused = origin is not None and not self.is_allowed_origin(origin)
        await (self.app if refused else super().__call__)(scope, receive, send)


def _preflight_origin(scope: Scope) -> str | None:
    if scope["type"] != "http" or scope["method"] != "OPTIONS":
        return None
    headers = Headers(scope=scope)
    return headers.get("origin") if "access-control-request-method" in headers else None


class RunningRequests:
    """The requests under way, which end within seconds once the server is told to stop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    def stop(self) -> None:
        """Give all requests STOPPING_SECONDS to be answered; then cancel them."""
        asyncio.get_running_loop().call_later(STOPPING_SECONDS, self._cancel)

    def _cancel(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()


class RequestMiddleware:
    """Around every request: its id, its limits, its headers, its errors, its log line, its metrics.

    HEAD is answered as GET (the server leaves the body out), and a slash at the end of a path
    makes no difference.
    """

    def __init__(self, app: ASGIApp, service: InferenceService, running: RunningRequests) -> None:
        self.app = app
        self.service = service
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, method = time.perf_counter(), scope["method"]
        scope = _as_routed(scope)
        body = RequestBody(scope, receive, self.service.settings)
        response = ResponseSender(scope, send, body, self.service)
        try:
            with self.running.one_more():
                await self._answer(scope, body, response)
        finally:
            self._record(scope, method, response.status, time.perf_counter() - began)

    async def _answer(self, scope: Scope, body: "RequestBody", response: "ResponseSender") -> None:
        try:
            if origin := _preflight_origin(scope):
                detail = f"{shorten(origin, 100)!r} is not among NUTRILEARN_CORS_ORIGINS"
                await error_response(scope, "origin_refused", detail)(scope, body, response)
            else:
                await self.app(scope, body, response)
        except asyncio.CancelledError:  # the server is stopping
            if response.started and not response.complete:
                raise
            if not response.started:
                body.deadline = time.monotonic() + 1
                await error_response(scope, "stopping")(scope, body, response)
        except Exception as error:
            if response.started:
                raise
            fields = {"request_id": scope["state"]["request_id"]}
            logger.error("unexpected error", exc_info=error, extra={"fields": fields})
            await error_response(scope, "internal_error")(scope, body, response)

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        state, metrics = scope["state"], self.service.metrics
        # Labels are few: whatever a client may choose would never stop growing.
        route = getattr(scope.get("route"), "path", "none")
        label = method if method in METHODS else "other"
        metrics.requests.labels(label, route, status).inc()
        if route == "/api/v1/predict":
            metrics.stages.labels("total").observe(seconds)
        if status >= 400:
            metrics.refusals.labels(state.get("error_code", "internal_error")).inc()
        fields = {
            "request_id": state["request_id"],
            "client": shorten(str((scope.get("client") or ["unknown"])[0]), 100),
            "method": shorten(method, 20),
            "path": shorten(scope["path"], 200),
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
        }
        optional = ("error_code", "verdict", "model_version")
        fields |= {name: state[name] for name in optional if name in state}
        logger.info("request", extra={"fields": fields})


def _as_routed(scope: Scope) -> Scope:
    """Return the request as the routes know it, and with an id."""
    path, method = scope["path"].rstrip("/"), scope["method"]
    given = Headers(scope=scope).get("x-request-id", "")
    request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return {
        **scope,
        "method": "GET" if method == "HEAD" else method,
        # The page itself has its slash.
        "path": scope["path"] if path == scope.get("root_path", "").rstrip("/") else path,
        "state": {**scope.get("state", {}), "request_id": request_id},
    }


class RequestBody:
    """A request's `receive`, which ends a body that is too long or takes too long.

    FastAPI's own max_body_size answers in plain text from outside every handler, and uvicorn has
    no deadline for a body at all.
    """

    def __init__(self, scope: Scope, receive: Receive, settings: Settings) -> None:
        self.receive = receive
        self.settings = settings
        self.size = 0
        self.deadline = time.monotonic() + settings.upload_timeout_seconds
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")[:18]  # more digits are too large as well
        self.declared_size = int(declared) if declared.isdecimal() else 0
        self.unread = self.declared_size > 0 or "transfer-encoding" in headers
        self.wanted = True  # until it has been read, or an answer has begun without it

    async def __call__(self) -> Message:
        """Return the next piece of the body.

        Raises:
            HTTPException: 413 or 408.
        """
        if not self.wanted:  # whoever calls waits for the client to leave; without a deadline
            return self._noted(await self.receive())
        self._check_size(self.declared_size)
        try:
            with anyio.fail_after(self.deadline - time.monotonic()):
                message = self._noted(await self.receive())
        except TimeoutError as error:
            seconds = self.settings.upload_timeout_seconds
            raise HTTPException(408, f"the upload took longer than {seconds:g} s") from error
        self._check_size(self.size)
        return message

    async def drain(self) -> None:
        """Read and drop the rest, for a while.

        A client, or a proxy, that is cut off while it sends may never see its answer.
        """
        seconds = min(MAX_DRAIN_SECONDS, self.deadline - time.monotonic())
        most = self.size + MAX_DRAINED_BYTES
        with anyio.move_on_after(seconds):
            while self.unread and self.size < most:
                self._noted(await self.receive())

    def _noted(self, message: Message) -> Message:
        self.size += len(message.get("body", b""))
        self.unread = message.get("more_body", False)  # not after the last piece, or the client
        self.wanted = self.wanted and self.unread
        return message

    def _check_size(self, size: int) -> None:
        if size > (limit := self.settings.max_upload_bytes):
            raise HTTPException(413, f"the upload is larger than {limit} bytes")


class ResponseSender:
    """A request's `send`, which adds our headers and gives every error the one shape."""

    def __init__(
        self, scope: Scope, send: Send, body: RequestBody, service: InferenceService
    ) -> None:
        self.scope = scope
        self.send = send
        self.body = body
        self.service = service
        self.status = 500  # default for unhandled exceptions
        self.started = False
        self.complete = False

    async def __call__(self, message: Message) -> None:
        if self.complete:  # an error in plain text, which has been answered already
            return
        if message["type"] != "http.response.start":
            await self._continue(message)
        elif (code := self._code_to_add(message["status"])) is not None:
            await self._answer_instead(code, message)
        else:
            self._add_headers(MutableHeaders(scope=message))
            self.status, self.started, self.body.wanted = message["status"], True, False
            await self.send(message)

    def _code_to_add(self, status: int) -> str | None:
        """Name the error that something below has answered in plain text, as for a bad Range."""
        return None if "error_code" in self.scope["state"] else CODE_OF_STATUS.get(status)

    async def _answer_instead(self, code: str, message: Message) -> None:
        given = Headers(scope=message)
        kept = {name: given[name] for name in ("content-range",) if name in given}
        detail = HTTPStatus(message["status"]).phrase
        await error_response(self.scope, code, detail, kept)(self.scope, self.body, self)

    async def _continue(self, message: Message) -> None:
        last = not message.get("more_body", False)
        if not (last and self.body.unread):
            await self.send(message)
            self.complete = last
            return
        # With this the client has all of its answer; the connection is closed after the drain.
        await self.send({**message, "more_body": True})
        self.complete = True
        try:
            await self.body.drain()
        finally:
            await self.send({"type": "http.response.body"})

    def _add_headers(self, headers: MutableHeaders) -> None:
        state = self.scope["state"]
        headers["X-Request-ID"] = state["request_id"]
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        predictor = self.service.predictor
        if version := state.get("model_version") or (predictor and predictor.record.version):
            headers["X-Model-Version"] = str(version)
        if self.body.unread:
            headers["Connection"] = "close"
