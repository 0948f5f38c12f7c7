"""The routes and the one shape of their errors."""

import secrets
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    File,
    HTTPException,
    Query,
    Request,
    Response,
    UploadFile,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException

from app.inference import InferenceService, ModelLoadError, ModelMissingError, OverloadedError
from app.ml.artifacts import ModelRecord
from app.ml.predictor import ClassProbability
from app.ml.preprocessing import ImageTooLargeError, UnreadableImageError, UnsupportedImageError
from app.nutrition import food_facts, food_table
from app.schemas import ErrorBody, Food, FoodPrediction, Health, ModelInfo, Ready, TopPrediction

router = APIRouter()
token_of = HTTPBearer(auto_error=False, description="the server's NUTRILEARN_RELOAD_TOKEN")

# code -> (status, an example of its sentence)
ERRORS = {
    "unreadable_image": (400, "the image data is damaged: image file is truncated"),
    "malformed_request": (400, "There was an error parsing the body"),
    "wrong_token": (401, "send the reload token as Authorization: Bearer ..."),
    "not_found": (404, "Not Found"),
    "method_not_allowed": (405, "Method Not Allowed"),
    "upload_too_slow": (408, "the upload took longer than 60 s"),
    "model_rejected": (409, "no version 7 in ml-models; there: [1, 2]. Version 2 goes on serving"),
    "too_large": (413, "the upload is larger than 20971520 bytes"),
    "unsupported_image": (415, "not an image in a supported format (JPEG, PNG, WEBP, GIF, AVIF)"),
    "invalid_request": (422, "body.file: Field required"),
    "overloaded": (429, "too many photos are waiting; try again in a moment"),
    "internal_error": (500, "something went wrong on the server; its log has the request id"),
    "no_model": (503, "no model is loaded; train one: python backend/train_model.py --sample"),
}
# HTTP errors that the framework raises by status alone
CODE_OF_STATUS = {status: code for code, (status, _) in ERRORS.items()}
CODE_OF_EXCEPTION: dict[type[Exception], str] = {
    UnreadableImageError: "unreadable_image",
    UnsupportedImageError: "unsupported_image",
    ImageTooLargeError: "too_large",
    OverloadedError: "overloaded",
    ModelMissingError: "no_model",
    ModelLoadError: "model_rejected",
}
HEADERS = {"overloaded": {"Retry-After": "1"}, "wrong_token": {"WWW-Authenticate": "Bearer"}}


def service_of(request: Request) -> InferenceService:
    service = request.app.state.service
    assert isinstance(service, InferenceService)
    return service


Service = Annotated[InferenceService, Depends(service_of)]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of these statuses, with an example for each of their codes."""
    return {status: _describe(status) for status in (*statuses, 500)}


def _describe(status: int) -> dict[str, Any]:
    examples = {
        code: {"value": {"code": code, "detail": detail, "request_id": "0f9d2c"}}
        for code, (code_status, detail) in ERRORS.items()
        if code_status == status
    }
    return {
        "model": ErrorBody,
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"examples": examples}},
    }


# Photos ---------------------------------------------------------------------------------------


@router.post(
    "/api/v1/predict",
    tags=["photos"],
    summary="Say what is on a photo",
    responses=errors(400, 408, 413, 415, 422, 429, 503),
)
async def predict(
    file: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF or AVIF")],
    request: Request,
    service: Service,
) -> FoodPrediction:
    """The photo is decoded in memory, answered and forgotten; nothing of it is stored or logged."""
    prediction, record = await service.predict(file.file)
    best = prediction.top[0]
    facts = food_facts(best.class_name)
    request.state.model_version = record.version
    request.state.verdict = prediction.verdict
    return FoodPrediction(
        **Food.values(facts, with_nutrition=prediction.verdict != "not_food"),
        confidence=best.probability,
        verdict=prediction.verdict,
        top_predictions=[_top_prediction(guess) for guess in prediction.top],
        model_version=record.version,
        timestamp=datetime.now(timezone.utc),
    )


def _top_prediction(guess: ClassProbability) -> TopPrediction:
    return TopPrediction(
        class_name=guess.class_name,
        food_name=food_facts(guess.class_name).food_name,
        confidence=guess.probability,
    )


@router.get(
    "/api/v1/foods/{class_name}",
    tags=["photos"],
    summary="Look up a dish",
    responses=errors(404, 422),
)
async def food(class_name: str, service: Service) -> Food:
    """What is known about a class of the model or of the nutrition table."""
    in_model = service.predictor is not None and class_name in service.predictor.classes
    if not in_model and class_name not in food_table():
        raise HTTPException(404, "no such food; GET /api/v1/model lists the model's classes")
    return Food(**Food.values(food_facts(class_name)))


# Models ---------------------------------------------------------------------------------------


@router.get(
    "/api/v1/model", tags=["model"], summary="Describe the serving model", responses=errors(503)
)
async def model(service: Service) -> ModelInfo:
    if service.predictor is None:
        raise ModelMissingError(service.problem)
    return _model_info(service.predictor.record)


def _model_info(record: ModelRecord) -> ModelInfo:
    return ModelInfo(
        version=record.version,
        model_name=record.model_name,
        created=record.created,
        classes=record.classes,
        preprocessing=record.preprocessing.to_dict(),
        metrics=record.metrics,
    )


@router.post(
    "/api/v1/model/reload",
    tags=["model"],
    summary="Serve the newest model, or a given version",
    responses=errors(401, 404, 409, 422),
)
async def reload_model(
    service: Service,
    authorization: Annotated[HTTPAuthorizationCredentials | None, Depends(token_of)],
    version: Annotated[int | None, Query(ge=1, le=2**31, description="else the newest")] = None,
) -> ModelInfo:
    """The new model is checked and tried beside the old one; if it fails, the old one stays."""
    token = service.settings.reload_token
    if token is None:
        raise HTTPException(404, "reloading is off; set NUTRILEARN_RELOAD_TOKEN to turn it on")
    given = authorization.credentials if authorization else ""
    if not secrets.compare_digest(given.encode(), token.get_secret_value().encode()):
        raise HTTPException(401, ERRORS["wrong_token"][1])
    try:
        return _model_info(await service.load(version))
    except ModelLoadError as error:
        old = service.predictor
        remaining = f"version {old.record.version} goes on serving" if old else "nothing is served"
        raise ModelLoadError(f"{error}; {remaining}") from error


# Operation ------------------------------------------------------------------------------------


@router.get("/health", tags=["operation"], summary="Is the process alive?", responses=errors())
async def health() -> Health:
    return Health()


@router.get("/ready", tags=["operation"], summary="Is a model loaded?", responses=errors(503))
async def ready(service: Service) -> Ready:
    if service.predictor is None:
        raise ModelMissingError(service.problem)
    return Ready(model_version=service.predictor.record.version)


@router.get(
    "/metrics",
    tags=["operation"],
    summary="Numbers for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **errors()},
)
async def metrics(service: Service) -> Response:
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


# Errors ---------------------------------------------------------------------------------------


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of the app the one shape."""
    for exception in CODE_OF_EXCEPTION:
        app.add_exception_handler(exception, _answer_own)
    app.add_exception_handler(StarletteHTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(Exception, _answer_unexpected)


def _error(request: Request, code: str, detail: str, headers: Any = None) -> JSONResponse:
    request.state.error_code = code
    body = ErrorBody(code=code, detail=detail, request_id=request.state.request_id)
    headers = {**HEADERS.get(code, {}), **(headers or {})}
    return JSONResponse(body.model_dump(), ERRORS[code][0], headers)


async def _answer_own(request: Request, error: Exception) -> JSONResponse:
    return _error(request, CODE_OF_EXCEPTION[type(error)], str(error))


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return _error(request, CODE_OF_STATUS[error.status_code], error.detail, error.headers)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return _error(request, "invalid_request", "; ".join(problems))


async def _answer_unexpected(request: Request, _: Exception) -> JSONResponse:
    # Answered outside the middleware that adds this header to everything else.
    headers = {"X-Request-ID": request.state.request_id}
    return _error(request, "internal_error", ERRORS["internal_error"][1], headers)
