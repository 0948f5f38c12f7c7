"""The nutrition facts are complete, plausible and never invented."""

from pathlib import Path

import pytest

from app import nutrition
from app.nutrition import NUTRIENTS, FoodFacts, food_facts, food_table

UNSOURCED = {"jalebi", "dhokla", "poha", "pani_puri", "kadai_paneer"}
CATALOGUES = ("USDA FNDDS", "UK CoFID", "Anses Ciqual")
SOURCED = sorted(set(food_table()) - UNSOURCED)


def test_table_holds_every_dish_once() -> None:
    assert len(food_table()) == 150
    assert {name for name, facts in food_table().items() if not facts.nutrition} == UNSOURCED


@pytest.mark.parametrize("class_name", SOURCED)
def test_values_are_sourced_and_plausible(class_name: str) -> None:
    facts = food_table()[class_name].nutrition
    assert facts is not None
    assert facts.source.startswith(CATALOGUES)
    assert facts.match in ("exact", "close", "proxy")
    assert 10 <= facts.serving_g <= 600
    assert set(facts.per_100g) == set(NUTRIENTS)
    protein, carbs, fat = (facts.per_100g[name] for name in ("protein", "carbs", "fat"))
    assert 0 <= protein + carbs + fat <= 100
    # Atwater: 4, 4 and 9 kcal/g; tables count fibre and alcohol differently, hence the slack.
    energy = 4 * protein + 4 * carbs + 9 * fat
    assert facts.per_100g["calories"] == pytest.approx(energy, rel=0.2, abs=15)


@pytest.mark.parametrize("class_name", SOURCED)
def test_a_serving_is_its_weight_in_hundreds(class_name: str) -> None:
    facts = food_table()[class_name].nutrition
    assert facts is not None
    for name, amount in facts.per_100g.items():
        expected = amount * facts.serving_g / 100
        assert facts.per_serving[name] == pytest.approx(expected, abs=0.05001)


def test_a_known_row() -> None:
    facts = food_facts("apple_pie")
    assert (facts.food_name, facts.category, facts.cuisine) == ("Apple Pie", "dessert", "American")
    assert facts.nutrition is not None
    assert facts.nutrition.per_serving["calories"] == 444.0  # 296 kcal/100 g, 150 g
    assert facts.nutrition.source == "USDA FNDDS 2021-2023: Pie, apple (53301000)"


@pytest.mark.parametrize(
    ("class_name", "food_name"),
    [("paneer_butter_masala", "Paneer Butter Masala"), ("chole", "Chole"), ("x__y_", "X Y")],
)
def test_an_unknown_class_has_only_a_readable_name(class_name: str, food_name: str) -> None:
    assert food_facts(class_name) == FoodFacts(class_name, food_name)


def test_a_dish_without_a_source_keeps_its_name_and_kitchen() -> None:
    facts = food_facts("pani_puri")
    assert (facts.food_name, facts.cuisine, facts.nutrition) == ("Pani Puri", "Indian", None)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["a,A,main,X,100,1,1,1,1,,USDA,1,d,exact"], "the nutrition of a is incomplete"),
        (["a,A,main,X,,,,,,,,,,none"] * 2, "lists a class twice"),
    ],
)
def test_a_broken_table_is_refused(
    rows: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = nutrition.TABLE.read_text(encoding="utf-8").splitlines()[0]
    table = tmp_path / "nutrition.csv"
    table.write_text("\n".join([header, *rows]), encoding="utf-8")
    monkeypatch.setattr(nutrition, "TABLE", table)
    food_table.cache_clear()
    try:
        with pytest.raises(ValueError, match=reason):
            food_table()
    finally:
        food_table.cache_clear()
