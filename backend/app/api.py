"""The routes."""

import asyncio
import secrets
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from app.answers import Answer
from app.errors import ERRORS, ClientGoneError, errors
from app.inference import InferenceService, ModelLoadError, ModelMissingError
from app.ml.drift import reference_of, stability_index
from app.ml.predictor import ClassProbability, FoodPredictor
from app.nutrition import food_facts, food_table
from app.schemas import (
    Activation,
    Drift,
    Food,
    FoodPrediction,
    Health,
    ModelInfo,
    Ready,
    Shares,
    TopPrediction,
)
from app.settings import Integer
from app.uploads import FIELD, Body, UploadMemory, check_content_type, take_photo

router = APIRouter()
token_of = HTTPBearer(auto_error=False, description="the server's NUTRILEARN_RELOAD_TOKEN")
Answered = TypeVar("Answered")


async def service_of(request: Request) -> InferenceService:
    """Async, as all dependencies here: FastAPI gives a plain function a thread, which costs more
    than the function does."""
    service = request.app.state.service
    assert isinstance(service, InferenceService)
    return service


Service = Annotated[InferenceService, Depends(service_of)]

# Photos ---------------------------------------------------------------------------------------


PHOTO = {"type": "string", "contentMediaType": "application/octet-stream"}
PHOTO_BODY = {
    "required": True,
    "description": "JPEG, PNG, WebP, GIF, AVIF or HEIC",
    "content": {
        "multipart/form-data": {
            "schema": {"type": "object", "required": [FIELD], "properties": {FIELD: PHOTO}}
        },
        "image/*": {"schema": PHOTO},
    },
}


def uploaded(request: Request) -> AbstractAsyncContextManager[Body]:
    """Inside, hold the request's body, all of it; as a dependency it would cost more."""
    memory = request.app.state.uploads
    assert isinstance(memory, UploadMemory)
    check_content_type(request.headers.get("content-type", ""))
    return memory.body_of(request)


@router.post(
    "/api/v1/predict",
    tags=["photos"],
    summary="Recognize the dish in a photo",
    responses=errors(400, 408, 413, 415, 422, 429, 503),
    openapi_extra={"requestBody": PHOTO_BODY},
    response_model_exclude_unset=True,
)
async def predict(
    request: Request,
    service: Service,
    explain: Annotated[
        bool, Query(description="also say where the network looked, which takes longer")
    ] = False,
) -> FoodPrediction:
    """The photo is decoded in memory; nothing of it is stored or logged."""
    async with uploaded(request) as body:
        photo = partial(take_photo, body, request.headers["content-type"])
        prediction, record, activation = await unless_gone(
            request, service.predict(photo, with_activation=explain)
        )
    best = prediction.top[0]
    facts = food_facts(best.class_name)
    request.state.model_version = record.version
    request.state.verdict = prediction.verdict
    service.note_answer(
        request.state.request_id,
        Answer(record.version, best.class_name, best.probability, prediction.verdict),
    )
    answer = FoodPrediction(
        **Food.values(facts, with_nutrition=prediction.verdict != "not_food"),
        confidence=best.probability,
        verdict=prediction.verdict,
        top_predictions=[_top_prediction(guess) for guess in prediction.top],
        model_version=record.version,
        timestamp=datetime.now(timezone.utc),
    )
    if activation:  # else the field is left out
        answer.activation = Activation(**asdict(activation))
    return answer


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answered]) -> Answered:
    """Await some work, or drop it as soon as the client has left.

    Raises:
        ClientGoneError: it has.
    """
    answer = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait((answer, departure), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGoneError
        return answer.result()
    finally:
        answer.cancel()
        departure.cancel()


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    """Facts about a class of the model or of the nutrition table."""
    in_model = service.predictor is not None and class_name in service.predictor.classes
    if not in_model and class_name not in food_table():
        raise HTTPException(404, "no such food; GET /api/v1/model lists the model's classes")
    return Food(**Food.values(food_facts(class_name)))


# Models ---------------------------------------------------------------------------------------


@router.get(
    "/api/v1/model",
    tags=["model"],
    summary="Describe the serving model",
    responses=errors(503),
)
async def model(service: Service) -> ModelInfo:
    if service.predictor is None:
        raise ModelMissingError(service.problem)
    return model_info(service.predictor, service)


def model_info(predictor: FoodPredictor, service: InferenceService) -> ModelInfo:
    record = predictor.record
    return ModelInfo(
        version=record.version,
        runtime=predictor.runtime,
        model_name=record.model_name,
        created=record.created,
        classes=record.classes,
        preprocessing=record.preprocessing.to_dict(),
        metrics=record.metrics_of(predictor.runtime),
        drift=drift_of(service),
        feedback=service.settings.feedback_dir is not None,
    )


def drift_of(service: InferenceService) -> Drift | None:
    """Compare the last answers with those to the version's validation photos."""
    predictor = service.predictor
    assert predictor is not None
    expected = reference_of(predictor.record.metrics_of(predictor.runtime))
    found = service.answers.summary(predictor.record.version)
    if expected is None or found is None:
        return None
    return Drift(
        answers=found["count"],
        stability_index=stability_index(expected, found),
        mean_confidence=Shares(
            answers=found["mean_confidence"], validation=expected["mean_confidence"]
        ),
        verdicts={
            name: Shares(answers=share, validation=expected["verdicts"][name])
            for name, share in found["verdicts"].items()
        },
    )


async def check_token(
    service: Service,
    authorization: Annotated[HTTPAuthorizationCredentials | None, Depends(token_of)],
) -> None:
    token = service.settings.reload_token
    if token is None:
        raise HTTPException(404, "this is off; set NUTRILEARN_RELOAD_TOKEN to turn it on")
    given = authorization.credentials if authorization else ""
    # Headers are read as Latin-1, whatever a client has written; the environment may be no text.
    wanted = token.get_secret_value().encode(errors="surrogateescape")
    if not secrets.compare_digest(given.encode("latin-1"), wanted):
        raise HTTPException(401, ERRORS["wrong_token"][1])


@router.post(
    "/api/v1/model/reload",
    tags=["model"],
    summary="Load the current model, or a given version",
    responses=errors(401, 404, 409, 422),
    dependencies=[Depends(check_token)],
)
async def reload_model(
    service: Service,
    version: Annotated[
        Integer | None,
        Query(
            ge=1, le=2**31, description="by default the one that is pinned, else the current one"
        ),
    ] = None,
) -> ModelInfo:
    """The new model is verified beside the old one, which keeps serving if it fails."""
    try:
        return model_info(await service.load(version), service)
    except ModelLoadError as error:
        old = service.predictor
        remaining = f"version {old.record.version} keeps serving" if old else "nothing is served"
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
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **errors()},
)
async def metrics(service: Service) -> Response:
    service.metrics.drift.show(drift_of(service) if service.predictor else None)
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
