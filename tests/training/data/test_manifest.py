"""What a run says of the data that it trains on."""

import dataclasses
from pathlib import Path

from training.config import TrainingConfig
from training.data.manifest import describe, fingerprint
from training.data.splits import load_food_data


def test_the_data_set_is_named_counted_and_digested(photos: Path) -> None:
    config = TrainingConfig(data_dir=photos)
    data = load_food_data(photos)
    facts = describe(data, fingerprint(data), config)
    digest = facts.pop("digest")
    assert facts == {
        "name": "photos",
        "source": str(photos),
        "classes": 3,
        "train": 27,
        "val": 6,
        "test": 9,
    }
    fewer = load_food_data(photos, images_per_class=6)
    assert describe(fewer, fingerprint(fewer), config)["digest"] != digest
    again = load_food_data(photos)
    assert describe(again, fingerprint(again), config)["digest"] == digest


def test_custom_dishes_and_drawn_plates_are_named(photos: Path) -> None:
    data, config = load_food_data(photos), TrainingConfig(data_dir=photos)
    merged = dataclasses.replace(config, custom_data_dir=Path("/photos/my dishes"))
    facts = describe(data, "0" * 64, merged)
    assert facts["name"] == "photos + my dishes" and facts["digest"] == "0" * 16
    assert facts["source"] == f"{photos}, /photos/my dishes"
    drawn = dataclasses.replace(config, sample=True)
    assert describe(data, "0" * 64, drawn)["name"] == "sample"
