"""The routes of corrections: people send them and take them back, an operator reviews them."""

import asyncio
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials

from app.api import PHOTO, Service, check_token, token_of, unless_gone, uploaded
from app.errors import errors
from app.feedback import (
    Correction,
    FeedbackStore,
    RateLimit,
    State,
    class_name_of,
    stored_form,
)
from app.inference import ModelMissingError
from app.ml.class_names import MIN_NEW_CLASS_IMAGES
from app.nutrition import food_facts
from app.schemas import AnswerInfo, CorrectionInfo, CorrectionList, FeedbackReceipt
from app.settings import Integer
from app.uploads import FIELD, Body, FieldError, take_form

router = APIRouter()
OFF = "corrections are not collected here; set NUTRILEARN_FEEDBACK_DIR to turn that on"
TEXT = {"type": "string", "maxLength": 1000}
FORM_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD, "dish", "consent"],
                "properties": {
                    FIELD: PHOTO,
                    "dish": {**TEXT, "description": "the right dish, of the model or another"},
                    "consent": {
                        "const": "true",
                        "description": "the person agreed that the photo is kept to train on",
                    },
                    "request_id": {
                        **TEXT,
                        "description": "X-Request-ID of the answer that was wrong",
                    },
                },
            }
        }
    },
}


async def store_of(request: Request) -> FeedbackStore:
    store = request.app.state.feedback
    if store is None:
        raise HTTPException(404, OFF)
    assert isinstance(store, FeedbackStore)
    return store


Store = Annotated[FeedbackStore, Depends(store_of)]
CorrectionId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]


async def check_rate(request: Request, _: Store) -> None:
    """Count a correction of this client, before its body is read."""
    limit = request.app.state.feedback_rate
    assert isinstance(limit, RateLimit)
    limit.check(request.client.host if request.client else "unknown")


# Sending and taking back ----------------------------------------------------------------------


@router.post(
    "/api/v1/feedback",
    tags=["corrections"],
    summary="Send the right dish of a photo, to train on",
    status_code=201,
    responses={
        200: {"model": FeedbackReceipt, "description": "this photo was here already"},
        **errors(400, 404, 408, 413, 415, 422, 429, 503, 507),
    },
    openapi_extra={"requestBody": FORM_BODY},
    dependencies=[Depends(check_rate)],
)
async def send_feedback(
    request: Request,
    response: Response,
    service: Service,
    store: Store,
) -> FeedbackReceipt:
    """The photo is stored without its metadata and its name, at most 1,024 pixels large.

    It is not trained on until the operator has looked at it. The token deletes it again.
    """
    predictor = service.predictor
    if predictor is None:
        raise ModelMissingError(service.problem)
    async with uploaded(request) as body:
        take = partial(_take_correction, body, request.headers["content-type"])
        photo, class_name, request_id = await unless_gone(request, service.run(take))
    answer = service.answers.to(request_id) if request_id else None
    is_new = class_name not in predictor.classes
    add = partial(store.add, photo, class_name, is_new=is_new, answer=answer)
    correction, token, is_first = await asyncio.to_thread(add)
    response.status_code = 201 if is_first else 200
    return FeedbackReceipt(
        id=correction.id,
        token=token,
        class_name=correction.class_name,
        food_name=food_facts(correction.class_name).food_name,
        is_new=correction.is_new,
        state=correction.state,
    )


def _take_correction(body: Body, content_type: str) -> tuple[bytes, str, str]:
    """Return the photo in its stored form, its class and the request id, or "" for none."""
    if not content_type.lower().startswith("multipart/form-data"):
        raise FieldError("send a form (multipart/form-data) with the fields file, dish and consent")
    photo, texts = take_form(body, content_type, "dish", "consent", "request_id")
    if texts.get("consent") != "true":
        raise FieldError("the field 'consent' must be 'true': ask the person first")
    class_name = class_name_of(texts.get("dish", ""))
    return stored_form(photo), class_name, texts.get("request_id", "")


@router.delete(
    "/api/v1/feedback/{id}",
    tags=["corrections"],
    summary="Delete what was sent",
    status_code=204,
    responses=errors(401, 404, 422, 507),
)
async def delete_feedback(
    id: CorrectionId,
    store: Store,
    authorization: Annotated[HTTPAuthorizationCredentials | None, Depends(token_of)],
) -> None:
    """Also what was accepted is deleted; a model that was trained on it does not change."""
    token = authorization.credentials if authorization else ""
    deleted = await asyncio.to_thread(store.delete, id, token)
    if deleted is None:
        raise _no_correction()
    if not deleted:
        raise HTTPException(401, "send the token that came with the id: Authorization: Bearer ...")


def _no_correction() -> HTTPException:
    return HTTPException(404, "no correction with this id; it may have been deleted")


# Reviewing ------------------------------------------------------------------------------------

review = APIRouter(
    prefix="/api/v1/review", tags=["review"], dependencies=[Depends(check_token), Depends(store_of)]
)


@review.get("", summary="List the corrections", responses=errors(401, 404, 422, 507))
async def list_corrections(
    store: Store,
    state: State = "pending",
    limit: Annotated[Integer, Query(ge=1, le=1000)] = 50,
) -> CorrectionList:
    """Those that wait the longest come first."""
    found = await asyncio.to_thread(store.corrections, state)
    shown = found[:limit]
    names = sorted({correction.class_name for correction in shown})
    counts = [await asyncio.to_thread(store.num_accepted, name) for name in names]
    return CorrectionList(
        total=len(found),
        corrections=[_info(correction) for correction in shown],
        accepted_photos=dict(zip(names, counts, strict=True)),
        needed_photos=MIN_NEW_CLASS_IMAGES,
    )


@review.get(
    "/{id}/photo",
    summary="See a photo",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, **errors(401, 404, 422, 507)},
)
async def corrected_photo(id: CorrectionId, store: Store) -> Response:
    photo = await asyncio.to_thread(store.photo, id)
    if photo is None:
        raise _no_correction()
    return Response(photo, media_type="image/jpeg", headers={"Cache-Control": "no-store"})


@review.post("/{id}", summary="Accept or discard one", responses=errors(401, 404, 422, 507))
async def review_correction(
    id: CorrectionId,
    store: Store,
    decision: Literal["accept", "discard"],
    dish: Annotated[
        str | None, Query(max_length=1000, description="accept it as this dish instead")
    ] = None,
) -> CorrectionInfo:
    """What is accepted is trained on by --custom_data_dir; what is discarded is deleted."""
    if decision == "accept":
        name = None if dish is None else class_name_of(dish)
        decided = await asyncio.to_thread(store.accept, id, name)
    else:
        decided = await asyncio.to_thread(store.discard, id)
    if decided is None:
        raise _no_correction()
    return _info(decided)


def _info(correction: Correction) -> CorrectionInfo:
    answer = correction.answer
    return CorrectionInfo(
        id=correction.id,
        time=correction.time,
        state=correction.state,
        class_name=correction.class_name,
        food_name=food_facts(correction.class_name).food_name,
        is_new=correction.is_new,
        answer=AnswerInfo.model_validate(answer) if answer else None,
    )
