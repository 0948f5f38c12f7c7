"""What does each part of the training recipe cost in time?

    python benchmarks/recipe_cost.py --weights FILE                     on drawn plates
    python benchmarks/recipe_cost.py --weights FILE --data_dir FOLDER

Trains with the default recipe and with one setting changed, an epoch of each in turn, in one
process, on the same images. Above 1 x, the changed setting is faster than the default; the first
line changes nothing and shows the noise.
"""

import tempfile
from pathlib import Path
from typing import Any

import alternating
from training_speed import OurLoop, config_from, epoch_parser, shorten

import train_model
from training.config import PLAIN_RECIPE

CHANGES: list[dict[str, Any]] = [
    {},
    *({name: value} for name, value in PLAIN_RECIPE.items()),
    PLAIN_RECIPE,
    {"augmentation": "trivial"},
]


def main() -> None:
    parser = epoch_parser(__doc__)
    options = parser.parse_args()
    if options.weights == "none":
        parser.error("--weights: random weights have neither a rate of their own nor batch-norm's")
    print(alternating.machine())
    print(f"{'images/s of a training epoch':<44} {'default':>9} {'changed':>9}")
    with tempfile.TemporaryDirectory() as folder:
        default = config_from(options, Path(folder))
        data = shorten(train_model.load_data(default), options.images)
        ours = OurLoop(default, data, Path(folder) / "default")
        for number, change in enumerate(CHANGES):
            config = config_from(options, Path(folder), **change)
            changed = OurLoop(config, data, Path(folder) / f"changed-{number}")
            result = alternating.compare(ours.epoch, changed.epoch, options.rounds)
            alternating.report(_flags(change), "images/s", result)


def _flags(change: dict[str, Any]) -> str:
    if change is PLAIN_RECIPE:
        return "--recipe plain"
    return " ".join(f"--{name} {value}" for name, value in change.items()) or "nothing changed"


if __name__ == "__main__":
    main()
