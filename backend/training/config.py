"""Every setting of a training run, stated once: field, type, default, help and check together.

The command line is derived from `TrainingConfig`; a new field is a new flag, and help=None keeps it
off the command line: the constants of the recipe, which docs/experiments.md measures.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from app.ml.model import BACKBONES, TIMM, backbone, is_backbone_name, sizes_of
from app.ml.preprocessing import PreprocessConfig
from training.errors import ConfigError
from training.uris import sqlite_uri, without_password

CROP_STEP = 32  # pixels
MAX_SMALL_EPOCHS = 8

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ValueType:
    """How one sort of value is read from text and checked.

    parse: text -> value, raising ValueError. valid: whether a value is allowed. allowed: in words.
    """

    parse: Callable[[str], Any]
    valid: Callable[[Any], bool]
    allowed: str


def integer(low: int, high: float = math.inf) -> ValueType:
    upper = "" if math.isinf(high) else f" and {high} or less"
    allowed = f"a whole number, {low} or more{upper}"
    return ValueType(int, lambda v: type(v) is int and low <= v <= high, allowed)


def number(low: float, high: float = math.inf, *, from_low: bool = False) -> ValueType:
    def valid(value: Any) -> bool:
        above = isinstance(value, (int, float)) and (value >= low if from_low else value > low)
        return bool(above and value < high)

    lower = f"{low:g} or more" if from_low else f"above {low:g}"
    upper = "" if math.isinf(high) else f" and below {high:g}"
    return ValueType(float, valid, f"a number {lower}{upper}")


def choice(*names: str) -> ValueType:
    return ValueType(str, lambda v: v in names, " or ".join(", ".join(names).rsplit(", ", 1)))


def or_word(value_type: ValueType, word: str) -> ValueType:
    return ValueType(
        lambda text: word if text == word else value_type.parse(text),
        lambda v: v == word or value_type.valid(v),
        f"{value_type.allowed}, or {word}",
    )


def _parse_classes(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parse_path(text: str) -> Path:
    if not text.strip():
        raise ValueError("empty")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no such user: ~nobody
        raise ValueError(str(error)) from error


TEXT = ValueType(str, lambda v: isinstance(v, str) and bool(v.strip()), "a word that is not empty")
PATH = ValueType(_parse_path, lambda v: isinstance(v, Path), "a path that is not empty")
CLASSES = ValueType(
    _parse_classes,
    lambda v: isinstance(v, tuple) and len(v) >= 2,
    "at least two class names with commas between them",
)
BACKBONE = ValueType(
    str,
    lambda v: isinstance(v, str) and is_backbone_name(v),
    choice(*BACKBONES, f"{TIMM}NAME").allowed,
)
SEED = integer(0, 2**64 - 1)
SIDE = or_word(integer(32), "auto")
SWITCH = ValueType(lambda text: text, lambda v: isinstance(v, bool), "no value: it is a switch")


def setting(
    group: str, default: Any, value_type: ValueType, help: str | None, *, pinned: bool = False
) -> Any:
    """Declare one field. A default of None is allowed beside the type's own values.

    help: one line; None for a field without a flag. pinned: a resumed run must repeat the value.
    """
    metadata = {"group": group, "type": value_type, "help": help, "pinned": pinned}
    return dataclasses.field(default=default, metadata=metadata)


def pinned(group: str, default: Any, value_type: ValueType, help: str | None) -> Any:
    """Declare a field on whose value every number of a run depends."""
    return setting(group, default, value_type, help, pinned=True)


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of one run, checked once, when it is made."""

    # fmt: off
    model_name: str = pinned(
        "model", "mobilenet_v2", BACKBONE, "backbone")
    weights: str = pinned(
        "model", "imagenet", TEXT,
        "start from: imagenet, none (random), a released version (v3), or a state_dict's path")
    freeze_layers: int | str = pinned(
        "model", 10, or_word(integer(0), "all"),
        "layers (the stem, then each block) that keep their pretrained weights")

    data_dir: Path = setting(
        "data", REPOSITORY / "data", PATH,
        "Food-101, or a folder of class folders; Food-101 is downloaded there if missing")
    sample: bool = pinned(
        "data", False, SWITCH, "train on a small set of drawn plates: no download")
    custom_data_dir: Path | None = setting(
        "data", None, PATH, "class folders of your own dishes to merge in")
    labels: Path | None = setting(  # compared by what it says, with the run's lists of images
        "data", None, PATH, "CSV of corrected labels, as the page of --audit saves it")
    classes: tuple[str, ...] | None = pinned(
        "data", None, CLASSES, "train on these classes only: a,b,c")
    images_per_class: int | None = pinned(
        "data", None, integer(5), "maximum number of training images per class")
    train_split: float = pinned(
        "data", 0.8, number(0, 1), "share of the training images to train on")
    num_workers: int | str = setting(
        "data", "auto", or_word(integer(0), "auto"),
        "processes that read images (0: threads do, as with auto on a CPU)")
    cache_images: str = setting(
        "data", "on", choice("on", "off"), "keep small decoded copies of the images")
    cache_views: int = pinned(
        "data", 0, integer(0),
        "reuse K augmented views of each image, frozen part computed once (0: new every epoch)")

    epochs: int = setting(
        "training", 20, integer(1), "passes over the training images")
    batch_size: int = pinned(
        "training", 32, integer(1), "images per step")
    learning_rate: float = pinned(
        "training", 1e-3, number(0), "Adam's learning rate")
    weight_decay: float = pinned(
        "training", 1e-4, number(0, from_low=True), "Adam's L2 penalty")
    scheduler_patience: int = pinned(
        "training", 3, integer(0),
        "epochs without a lower validation loss before the learning rate is reduced")
    scheduler_factor: float = pinned(
        "training", 0.5, number(0, 1), "factor by which the learning rate is reduced")
    early_stopping_patience: int = setting(
        "training", 5, integer(1), "epochs without a lower validation loss before the run stops")
    gradient_clip_max_norm: float = pinned(
        "training", 1.0, number(0), "maximum gradient norm")
    ema_decay: float | str = pinned(
        "training", "on", or_word(number(0, 1, from_low=True), "on"),
        "decay of the moving average of the weights, which is validated and released (on: set by "
        "the length of an epoch; 0: off)")
    seed: int = pinned(
        "training", 42, SEED, "random seed")
    runs: int = setting(
        "training", 1, integer(1),
        "train this many times, each with another seed, and release the mean of the weights")
    split_seed: int | None = pinned("data", None, SEED, None)  # of the splits, if another one

    # The pretrained layers' learning rate relative to the head's; 1 where nothing is pretrained.
    backbone_lr_scale: float = pinned("training", 0.2, number(0), None)
    warmup_epochs: float = pinned("training", 1.0, number(0, from_low=True), None)
    min_crop_scale: float = pinned(  # smallest area of a random crop, as a share of the picture
        "training", 0.25, number(0, 1), None)
    label_smoothing: float = pinned("training", 0.1, number(0, 1, from_low=True), None)
    # Sides in pixels; auto: the backbone's own. A resumed run keeps those that it began with.
    first_crop: int | str = pinned("training", "auto", SIDE, None)  # it grows to train_crop
    train_crop: int | str = pinned("training", "auto", SIDE, None)
    test_resize: int | str = pinned("training", "auto", SIDE, None)  # short side before the crop
    test_crop: int | str = pinned("training", "auto", SIDE, None)
    small_epochs: int | str = pinned(  # before train_crop is reached; auto: four fifths, 8 at most
        "training", "auto", or_word(integer(0), "auto"), None)

    device: str = setting(
        "device", "auto", choice("auto", "cuda", "cpu", "mps"), "where to compute")
    precision: str = pinned(
        "device", "auto", choice("auto", "fp32", "bf16", "fp16"),
        "number format to compute in (auto: the fastest that the device has)")

    output_dir: Path = setting(
        "output", REPOSITORY / "ml-models", PATH, "where the versioned model goes")
    checkpoint_dir: Path = setting(
        "output", REPOSITORY / "checkpoints", PATH, "where runs keep what resuming needs")
    checkpoint_copy_dir: Path | None = setting(
        "output", None, PATH,
        "also keep verified copies of the checkpoints here, e.g. on a mounted drive")
    no_promote: bool = setting(
        "output", False, SWITCH, "release the new version without making it the current one")
    resume: str | None = setting(
        "output", None, TEXT, "continue from a checkpoint (a path), or auto: the newest")
    dry_run: bool = setting(
        "output", False, SWITCH, "do the whole job on a handful of images and keep nothing")

    experiment_name: str = setting(
        "tracking", "nutrilearn-food-training", TEXT, "MLflow experiment")
    tracking_uri: str = setting(
        "tracking", sqlite_uri(REPOSITORY / "mlflow.db"), TEXT, "MLflow server or database")
    no_mlflow: bool = setting(
        "tracking", False, SWITCH, "keep the record in metrics.jsonl only")
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, value_type = getattr(self, field.name), field.metadata["type"]
            if value is None and field.default is None:
                continue
            if not value_type.valid(value):
                raise ConfigError(f"--{field.name} {value}: must be {value_type.allowed}")
        try:
            backbone(self.model_name)
        except ValueError as error:  # none of timm's
            raise ConfigError(f"--model_name {self.model_name}: {error}") from error

    @property
    def is_pretrained(self) -> bool:
        """Whether the network starts from weights that are worth protecting."""
        return self.weights != "none"

    @property
    def source_dir(self) -> Path:
        """The folder of the data set: with --sample, that of the drawn plates."""
        return self.data_dir / "sample" if self.sample else self.data_dir

    @property
    def sizes(self) -> dict[str, int]:
        """The sides in pixels of pictures in training and in the test, by their settings."""
        own = sizes_of(self.model_name)
        asked = {name: getattr(self, name) for name in own}
        return {name: own[name] if side == "auto" else side for name, side in asked.items()}

    @property
    def num_small_epochs(self) -> int:
        """How many epochs train on pictures smaller than `train_crop`; none on stored views.

        A bound keeps a run of many epochs from stopping early before it has grown.
        """
        if self.cache_views:
            return 0
        automatic = min(self.epochs * 4 // 5, MAX_SMALL_EPOCHS)
        return automatic if self.small_epochs == "auto" else int(self.small_epochs)

    @functools.cached_property  # asked for each picture that is read
    def crops(self) -> dict[int, int]:
        """The sides of training crops, by the epoch that each begins in, counted from 0.

        They grow from `first_crop` to `train_crop` (as in Howard's progressive resizing), by
        `CROP_STEP` pixels at a time: with that many more, each layer pads in the same way.
        """
        small, last = self.num_small_epochs, self.sizes["train_crop"]
        sides = range(self.sizes["first_crop"], last, CROP_STEP)
        begins = {-(-step * small // len(sides)): side for step, side in enumerate(sides)}
        return {**begins, small if sides else 0: last}

    def crop_in(self, epoch: int) -> int:
        """Return the side of training crops in an epoch, counted from 0."""
        return [side for begin, side in self.crops.items() if begin <= epoch][-1]

    @property
    def preprocessing(self) -> PreprocessConfig:
        """How validation, the test and serving prepare a picture."""
        sizes = {"resize": self.sizes["test_resize"], "crop": self.sizes["test_crop"]}
        return PreprocessConfig(**{**backbone(self.model_name).preprocessing, **sizes})

    def with_sizes(self, sizes: Mapping[str, Any]) -> "TrainingConfig":
        """Replace the sides in pixels, see `sizes`."""
        return dataclasses.replace(self, **sizes)

    def to_dict(self) -> dict[str, Any]:
        """Return every value as JSON knows it."""
        values = dataclasses.asdict(self)
        values["tracking_uri"] = without_password(self.tracking_uri)
        return {name: _to_json(value) for name, value in values.items()}

    def exact_settings(self) -> dict[str, Any]:
        """Return the values on which every number of the run depends, as JSON knows them."""
        names = {field.name for field in dataclasses.fields(self) if field.metadata["pinned"]}
        return {name: value for name, value in self.to_dict().items() if name in names}


def config_of_record(training: Mapping[str, Any]) -> TrainingConfig:
    """Rebuild the settings that a model's record names; those it lacks are today's.

    Raises:
        ConfigError: a value that is no longer allowed.
    """
    parse: dict[ValueType, Callable[[Any], Any]] = {PATH: Path, CLASSES: tuple}
    values = {
        field.name: parse.get(field.metadata["type"], lambda value: value)(training[field.name])
        for field in dataclasses.fields(TrainingConfig)
        if training.get(field.name) is not None
    }
    return TrainingConfig(**values)


def _to_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


# The command line -----------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """A bad argument ends with exit code 2 and one line."""

    def error(self, message: str) -> NoReturn:
        line = without_password(" ".join(message.splitlines()))
        print(f"{self.prog}: error: {line}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def make_parser(description: str | None) -> OneLineParser:
    """Make a flag of every field that has help, as --with_underscores and --with-dashes."""
    parser = OneLineParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for field in flag_fields():
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        _add_flag(groups[name], field)
    return parser


def flag_fields() -> list["dataclasses.Field[Any]"]:
    """List the fields that are flags."""
    return [f for f in dataclasses.fields(TrainingConfig) if f.metadata["help"] is not None]


def _add_flag(group: Any, field: "dataclasses.Field[Any]") -> None:
    value_type, help = field.metadata["type"], field.metadata["help"]
    if value_type is SWITCH:
        group.add_argument(*flag_names(field.name), action="store_true", help=help)
        return
    text = f"{help} (default: {_shown(field.default)}; {value_type.allowed})"
    metavar = field.name.split("_")[-1].upper()
    group.add_argument(*flag_names(field.name), metavar=metavar, help=text.replace("%", "%%"))


def flag_names(name: str) -> list[str]:
    """Return both spellings of a flag, or the one that there is."""
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _shown(default: Any) -> str:
    if isinstance(default, Path) and default.is_relative_to(REPOSITORY):
        return str(default.relative_to(REPOSITORY))
    if isinstance(default, str) and default.startswith("sqlite:"):
        return "mlflow.db in the repository"
    return "none" if default is None else str(default)


def config_from_args(arguments: argparse.Namespace) -> TrainingConfig:
    """Parse and check.

    Raises:
        ConfigError: for the first value that is not allowed.
    """
    values: dict[str, Any] = {}
    for field in flag_fields():
        text = getattr(arguments, field.name)
        if field.metadata["type"] is SWITCH:
            values[field.name] = text
        elif text is not None:
            values[field.name] = _parse(field, text)
    return TrainingConfig(**values)


def _parse(field: "dataclasses.Field[Any]", text: str) -> Any:
    value_type: ValueType = field.metadata["type"]
    try:
        value = value_type.parse(text)
        if not value_type.valid(value):  # here too, so that the message has the text as typed
            raise ValueError("not allowed")
    except ValueError as error:
        raise ConfigError(f"--{field.name} {text}: must be {value_type.allowed}") from error
    return value


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Say in words what differs between two runs' exact settings."""
    return [
        f"{name} is {ours.get(name)!r}, was {theirs.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
