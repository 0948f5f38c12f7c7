"""What is known about a dish: its name, its cuisine and its sourced nutrition; nothing invented."""

import csv
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("nutrition.csv")
NUTRIENTS = {
    "calories": "kcal_100g",
    "protein": "protein_g_100g",
    "carbs": "carbs_g_100g",
    "fat": "fat_g_100g",
    "fiber": "fiber_g_100g",
}


@dataclass(frozen=True)
class SourcedNutrition:
    """The entry of a food composition table for a dish.

    per_100g: calories in kcal, the others in g, per 100 g of the dish.
    match: how well the food in the table matches this dish: "exact", "close" or "proxy".
    """

    serving_g: float
    per_100g: dict[str, float]
    source: str
    match: str

    @property
    def per_serving(self) -> dict[str, float]:
        share = self.serving_g / 100
        return {name: round(amount * share, 1) for name, amount in self.per_100g.items()}


@dataclass(frozen=True)
class FoodFacts:
    """The facts of one class; None where there is no source."""

    class_name: str
    food_name: str
    category: str | None = None
    cuisine: str | None = None
    nutrition: SourcedNutrition | None = None


def food_facts(class_name: str) -> FoodFacts:
    """Return the facts of a class; for an unknown one, only a readable name."""
    name = string.capwords(class_name.replace("_", " "))
    return food_table().get(class_name) or FoodFacts(class_name, name)


@cache
def food_table() -> dict[str, FoodFacts]:
    """Read nutrition.csv, once: class_name -> facts.

    Raises:
        ValueError: a class listed twice, or a row with only some of its nutrition.
    """
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = {row["class_name"]: _parse(row) for row in rows}
    if len(table) != len(rows):
        raise ValueError(f"{TABLE.name} lists a class twice")
    return table


def _parse(row: dict[str, str]) -> FoodFacts:
    return FoodFacts(
        class_name=row["class_name"],
        food_name=row["display_name"],
        category=row["category"] or None,
        cuisine=row["cuisine"] or None,
        nutrition=_parse_nutrition(row),
    )


def _parse_nutrition(row: dict[str, str]) -> SourcedNutrition | None:
    values = [row[column] for column in ("serving_g", "source", *NUTRIENTS.values())]
    if not any(values):
        return None
    if not all(values):
        raise ValueError(f"{TABLE.name}: the nutrition of {row['class_name']} is incomplete")
    return SourcedNutrition(
        serving_g=float(row["serving_g"]),
        per_100g={name: float(row[column]) for name, column in NUTRIENTS.items()},
        source=f"{row['source']}: {row['source_description']} ({row['source_id']})",
        match=row["match_quality"],
    )
