"""What does each part of the training recipe cost in time?

    python benchmarks/recipe_cost.py --weights FILE                     on drawn plates
    python benchmarks/recipe_cost.py --weights FILE --data_dir FOLDER

Trains as by default and with one setting changed, an epoch of each in turn, in one process, on the
same images. Above 1 x, the changed setting is faster than the default; the first line changes
nothing and shows the noise.
"""

import tempfile
from pathlib import Path
from typing import Any

import alternating
from training_speed import OurLoop, config_from, epoch_parser, shorten

import train_model

# What a plain script does instead; torchvision's crops show 8% of a picture or more.
PLAIN = {"backbone_lr_scale": 1.0, "warmup_epochs": 0.0, "min_crop_scale": 0.08}
PLAIN |= {"label_smoothing": 0.0, "ema_decay": 0.0}
CHANGES: dict[str, dict[str, Any]] = {
    "nothing changed": {},
    **{f"{name} {value}": {name: value} for name, value in PLAIN.items()},
    "all of these": PLAIN,
}


def main() -> None:
    parser = epoch_parser(__doc__)
    options = parser.parse_args()
    if options.weights == "none":
        parser.error(
            "--weights none has no pretrained layers to slow down; give a file or imagenet"
        )
    print(alternating.machine())
    alternating.report_header("images/s of a training epoch", "default", "changed")
    with tempfile.TemporaryDirectory() as folder:
        default = config_from(options, Path(folder))
        data = shorten(train_model.load_data(default), options.images)
        ours = OurLoop(default, data, Path(folder) / "default")
        for number, (name, change) in enumerate(CHANGES.items()):
            config = config_from(options, Path(folder), **change)
            changed = OurLoop(config, data, Path(folder) / f"changed-{number}")
            result = alternating.compare(ours.epoch, changed.epoch, options.rounds)
            alternating.report(name, "images/s", result)


if __name__ == "__main__":
    main()
