"""The one shape of every error, and which exception becomes which."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from app.answers import UnknownAnswerError
from app.feedback import (
    DishNameError,
    FeedbackFullError,
    FeedbackStorageError,
    TooManyCorrectionsError,
)
from app.inference import ModelLoadError, ModelMissingError, OverloadedError
from app.ml.preprocessing import (
    IMAGE_FORMATS,
    ImageTooLargeError,
    UnreadableImageError,
    UnsupportedImageError,
)
from app.schemas import ErrorBody
from app.uploads import FieldError, MalformedFormError, NoPhotoError

# code -> (status, an example of its sentence)
ERRORS = {
    "unreadable_image": (400, "the image data is damaged: image file is truncated"),
    "malformed_request": (400, "the body ends before its last boundary"),
    "origin_refused": (400, "https://example.org is not among NUTRILEARN_CORS_ORIGINS"),
    "wrong_token": (401, "send the reload token as Authorization: Bearer ..."),
    "unknown_answer": (404, "no answer with the request id '0f9d2c' is among the last 1,000"),
    "not_found": (404, "Not Found"),
    "method_not_allowed": (405, "Method Not Allowed"),
    "upload_too_slow": (408, "the upload took longer than 60 s"),
    "model_rejected": (409, "no version 7 in ml-models; there: [1, 2]; version 2 keeps serving"),
    "too_large": (413, "the upload is larger than 20971520 bytes"),
    "unsupported_image": (
        415,
        f"not an image in a supported format ({', '.join(IMAGE_FORMATS)})",
    ),
    "range_not_satisfiable": (416, "Requested Range Not Satisfiable"),
    "invalid_request": (422, "no form field is named 'file'; the form has 'image'"),
    "overloaded": (429, "too many photos are waiting; try again in a moment"),
    "too_many_corrections": (429, "more than 20 corrections a minute from one client"),
    "internal_error": (500, "something went wrong on the server; its log has the request id"),
    "no_model": (503, "no model is loaded; train one: python backend/train_model.py --sample"),
    "stopping": (503, "the server is stopping; try again in a moment"),
    "feedback_full": (507, "1,000 corrections wait to be reviewed, and there is no room for more"),
    "feedback_not_stored": (
        507,
        "the server cannot store corrections at the moment (No space left on device)",
    ),
}
OF_NO_ROUTE = {"origin_refused", "method_not_allowed", "range_not_satisfiable"}
HEADERS = {
    "overloaded": {"Retry-After": "1"},
    "too_many_corrections": {"Retry-After": "60"},
    "stopping": {"Retry-After": "1"},
    "wrong_token": {"WWW-Authenticate": "Bearer"},
}
CODE_OF_EXCEPTION: dict[type[Exception], str] = {
    UnreadableImageError: "unreadable_image",
    UnsupportedImageError: "unsupported_image",
    ImageTooLargeError: "too_large",
    MalformedFormError: "malformed_request",
    NoPhotoError: "invalid_request",
    FieldError: "invalid_request",
    DishNameError: "invalid_request",
    UnknownAnswerError: "unknown_answer",
    TooManyCorrectionsError: "too_many_corrections",
    FeedbackFullError: "feedback_full",
    FeedbackStorageError: "feedback_not_stored",
    OverloadedError: "overloaded",
    ModelMissingError: "no_model",
    ModelLoadError: "model_rejected",
}
# What the framework, and our own HTTPExceptions, say by status alone.
CODE_OF_STATUS = {
    400: "malformed_request",
    401: "wrong_token",
    404: "not_found",
    405: "method_not_allowed",
    408: "upload_too_slow",
    413: "too_large",
    416: "range_not_satisfiable",
}
CLIENT_GONE = 499  # nginx's status for it; nobody sees it but the log and the metrics


class ClientGoneError(RuntimeError):
    """The client has left before it was answered."""


def error_response(
    scope: Scope, code: str, detail: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Build an error's answer, and note its code for the log and the metrics."""
    status, example = ERRORS[code]
    state = scope["state"]
    state["error_code"] = code
    text = (detail or example).encode(errors="backslashreplace").decode()  # a path may be no text
    body = ErrorBody(code=code, detail=text, request_id=state["request_id"])
    return JSONResponse(body.model_dump(), status, {**HEADERS.get(code, {}), **(headers or {})})


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe these statuses for OpenAPI, with an example of each of their codes."""
    return {status: _describe(status) for status in (*statuses, 500)}


def _describe(status: int) -> dict[str, Any]:
    examples = {
        code: {"value": {"code": code, "detail": detail, "request_id": "0f9d2c"}}
        for code, (code_status, detail) in ERRORS.items()
        if code_status == status and code not in OF_NO_ROUTE
    }
    return {
        "model": ErrorBody,
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"examples": examples}},
    }


def add_error_handlers(app: FastAPI) -> None:
    """Give every exception that a route may raise its answer."""
    for exception in CODE_OF_EXCEPTION:
        app.add_exception_handler(exception, _answer_own)
    for exception in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(exception, _answer_nobody)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)


async def _answer_own(request: Request, error: Exception) -> JSONResponse:
    return error_response(request.scope, CODE_OF_EXCEPTION[type(error)], str(error))


async def _answer_nobody(request: Request, _: Exception) -> Response:
    request.state.error_code = "client_gone"
    return Response(status_code=CLIENT_GONE)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"  # which the middleware answers
    return error_response(request.scope, CODE_OF_STATUS[error.status_code], error.detail, headers)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return error_response(request.scope, "invalid_request", "; ".join(problems))
