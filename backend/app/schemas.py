"""The API's answers, as OpenAPI shows them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.ml.forms import Runtime
from app.nutrition import FoodFacts

Confidence = Field(ge=0, le=1, description="calibrated probability")


class Nutrition(BaseModel):
    """An estimate for a typical recipe: energy in kcal, everything else in g."""

    calories: float
    protein: float
    carbs: float
    fat: float
    fiber: float


class Food(BaseModel):
    """A dish; `null` means that there is no sourced value."""

    food_name: str = Field(description="name to show", examples=["Apple Pie"])
    class_name: str = Field(description="name in the model", examples=["apple_pie"])
    category: str | None = Field(examples=["dessert"])
    cuisine: str | None = Field(examples=["American"])
    nutrition: Nutrition | None = Field(description="per serving")
    serving_g: float | None = Field(description="weight of a usual serving", examples=[150])
    nutrition_per_100g: Nutrition | None
    nutrition_source: str | None = Field(
        description="table, food and id of the values",
        examples=["USDA FNDDS 2021-2023: Pie, apple (53301000)"],
    )
    nutrition_match: Literal["exact", "close", "proxy"] | None = Field(
        description="how well the food in the source matches this dish"
    )

    @staticmethod
    def values(facts: FoodFacts, *, with_nutrition: bool = True) -> dict[str, Any]:
        """Fill the fields of a class, without nutrition where the photo does not support any."""
        nutrition = facts.nutrition if with_nutrition else None
        return {
            "food_name": facts.food_name,
            "class_name": facts.class_name,
            "category": facts.category,
            "cuisine": facts.cuisine,
            "nutrition": nutrition and nutrition.per_serving,
            "serving_g": nutrition and nutrition.serving_g,
            "nutrition_per_100g": nutrition and nutrition.per_100g,
            "nutrition_source": nutrition and nutrition.source,
            "nutrition_match": nutrition and nutrition.match,
        }


class TopPrediction(BaseModel):
    """One of the most probable classes."""

    class_name: str = Field(examples=["apple_pie"])
    food_name: str = Field(examples=["Apple Pie"])
    confidence: float = Confidence


class Activation(BaseModel):
    """Where the network looked for the first dish (a class activation map)."""

    class_name: str = Field(examples=["apple_pie"])
    grid: list[list[float]] | None = Field(
        description="rows from the top, 1 at the place that speaks most for the dish; null where "
        "this network gives none",
        examples=[[[0.0, 0.25], [0.5, 1.0]]],
    )
    side: float = Field(
        description="of the centered square that the grid covers, as a share of the upright "
        "photo's short side"
    )
    reason: str | None = Field(description="why there is no grid")


class FoodPrediction(Food):
    """The dish in the photo."""

    model_config = ConfigDict(protected_namespaces=())

    confidence: float = Confidence
    verdict: Literal["confident", "unsure", "not_food"] = Field(
        description="how far to trust the answer; not_food comes without nutrition"
    )
    top_predictions: list[TopPrediction] = Field(description="in descending order of confidence")
    model_version: int = Field(examples=[3])
    timestamp: datetime = Field(description="UTC")
    activation: Activation | None = Field(None, description="with ?explain=true only")


class Shares(BaseModel):
    """A number among the last answers, and among those to the validation photos."""

    answers: float
    validation: float


class Drift(BaseModel):
    """How the last answers of this version compare with those to its validation photos."""

    answers: int = Field(description="that are compared, at most 1,000")
    stability_index: float = Field(description="of the confidences; above 0.25 is a large shift")
    mean_confidence: Shares
    verdicts: dict[str, Shares]


class ModelInfo(BaseModel):
    """The model being served."""

    model_config = ConfigDict(protected_namespaces=())

    version: int
    runtime: Runtime = Field(description="form of the model that answers")
    model_name: str = Field(examples=["mobilenet_v2"])
    created: str
    classes: list[str]
    preprocessing: dict[str, Any]
    metrics: dict[str, Any] = Field(description="of this form, as evaluated on the test split")
    drift: Drift | None = Field(description="null before the first answer, or without a reference")
    feedback: bool = Field(description="POST /api/v1/feedback takes corrections here")


class FeedbackReceipt(BaseModel):
    """A correction that is stored; its token deletes it."""

    id: str = Field(description="hash of the stored photo")
    token: str = Field(description="send it with DELETE /api/v1/feedback/{id}")
    class_name: str = Field(examples=["dal_makhani"])
    food_name: str = Field(examples=["Dal Makhani"])
    is_new: bool = Field(description="the model does not know this dish yet")
    state: Literal["pending", "accepted"] = Field(description="accepted: trained on next time")


class AnswerInfo(BaseModel):
    """What the server had answered."""

    model_config = ConfigDict(protected_namespaces=(), from_attributes=True)

    model_version: int
    class_name: str
    confidence: float
    verdict: str


class CorrectionInfo(BaseModel):
    """A correction as the operator sees it."""

    id: str
    time: str = Field(description="UTC")
    state: Literal["pending", "accepted"]
    class_name: str = Field(description="the right dish")
    food_name: str
    is_new: bool = Field(description="the model did not know it")
    answer: AnswerInfo | None = Field(description="null where the sender named none")


class CorrectionList(BaseModel):
    """The corrections that were asked for, and how many there are."""

    total: int
    corrections: list[CorrectionInfo]
    accepted_photos: dict[str, int] = Field(description="of each dish here, the accepted photos")
    needed_photos: int = Field(description="accepted photos from which training takes a new dish")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    status: Literal["ready"] = "ready"
    model_version: int


class ErrorBody(BaseModel):
    """Every error of this server looks like this."""

    code: str = Field(description="stable name for programs", examples=["unsupported_image"])
    detail: str = Field(description="one sentence for people")
    request_id: str = Field(description="as in the X-Request-ID header and the log")
