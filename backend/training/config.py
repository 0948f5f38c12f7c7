"""Every setting of a training run, stated once: field, type, default, help and check together.

The command line is derived from `TrainingConfig`; a new field is a new flag.
"""

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from app.ml.model import BACKBONES
from training.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kind:
    """How one sort of value is read from text and checked.

    parse: text -> value, raising ValueError. valid: whether a value is allowed. allowed: in words.
    """

    parse: Callable[[str], Any]
    valid: Callable[[Any], bool]
    allowed: str


def _whole(low: int, high: float = math.inf) -> Kind:
    upper = "" if math.isinf(high) else f" and {high} or less"
    allowed = f"a whole number, {low} or more{upper}"
    return Kind(int, lambda v: type(v) is int and low <= v <= high, allowed)


def _number(low: float, high: float = math.inf, *, low_too: bool = False) -> Kind:
    def valid(value: Any) -> bool:
        above = isinstance(value, (int, float)) and (value >= low if low_too else value > low)
        return bool(above and value < high)

    lower = f"{low:g} or more" if low_too else f"above {low:g}"
    upper = "" if math.isinf(high) else f" and below {high:g}"
    return Kind(float, valid, f"a number {lower}{upper}")


def _choice(*names: str) -> Kind:
    return Kind(str, lambda v: v in names, " or ".join(", ".join(names).rsplit(", ", 1)))


def _or_word(kind: Kind, word: str) -> Kind:
    return Kind(
        lambda text: word if text == word else kind.parse(text),
        lambda v: v == word or kind.valid(v),
        f"{kind.allowed}, or {word}",
    )


def _class_list(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError("empty")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody has no home
        raise ValueError(str(error)) from error


PLAIN_RECIPE = {
    "backbone_rate": 1.0,
    "warmup_epochs": 0.0,
    "batch_norm": "trained",
    "smallest_crop": 0.08,  # torchvision's RandomResizedCrop
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
}

TEXT = Kind(str, lambda v: isinstance(v, str) and bool(v.strip()), "a word that is not empty")
PATH = Kind(_path, lambda v: isinstance(v, Path), "a path that is not empty")
CLASSES = Kind(
    _class_list,
    lambda v: isinstance(v, tuple) and len(v) >= 2,
    "at least two class names with commas between them",
)
SWITCH = Kind(lambda text: text, lambda v: isinstance(v, bool), "no value: it is a switch")


def setting(
    group: str,
    default: Any,
    kind: Kind,
    help: str,
    *,
    optional: bool = False,
    exact: bool = False,
) -> Any:
    """One field. optional: None is allowed. exact: a resumed run must have the same value."""
    metadata = {"group": group, "kind": kind, "help": help, "optional": optional, "exact": exact}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of one run, checked once, when it is made."""

    # model
    model_name: str = setting(
        "model", "mobilenet_v2", _choice(*BACKBONES), "the backbone", exact=True
    )
    weights: str = setting(
        "model",
        "imagenet",
        TEXT,
        "what to start from: imagenet, none (random), or the path of a state_dict",
        exact=True,
    )
    freeze_layers: int | str = setting(
        "model",
        10,
        _or_word(_whole(0), "all"),
        "how many layers (the stem, then each block) keep their pretrained weights",
        exact=True,
    )
    # data
    data_dir: Path = setting(
        "data",
        REPOSITORY / "data",
        PATH,
        "Food-101, or a folder of class folders; Food-101 is downloaded there if missing",
    )
    sample: bool = setting(
        "data", False, SWITCH, "train on a small set of drawn plates: no download", exact=True
    )
    custom_data_dir: Path | None = setting(
        "data", None, PATH, "class folders of your own dishes to merge in", optional=True
    )
    classes: tuple[str, ...] | None = setting(
        "data", None, CLASSES, "train on these classes only: a,b,c", optional=True, exact=True
    )
    images_per_class: int | None = setting(
        "data", None, _whole(5), "use at most this many images a class", optional=True, exact=True
    )
    train_split: float = setting(
        "data", 0.8, _number(0, 1), "share of the training images to train on", exact=True
    )
    num_workers: int | str = setting(
        "data", "auto", _or_word(_whole(0), "auto"), "processes that read images"
    )
    cache_images: str = setting(
        "data", "on", _choice("on", "off"), "keep small decoded copies of the images"
    )
    cache_views: int = setting(
        "data",
        0,
        _whole(0),
        "reuse K augmented views of each image, frozen part computed once (0: a new view each "
        "epoch)",
        exact=True,
    )
    # training
    recipe: str = setting(
        "training",
        "default",
        _choice("default", "plain"),
        "plain: one rate for all layers, no warm-up, smoothing or averaging, trained batch-norm, "
        "crops from 8 %, unless flags say otherwise",
    )
    epochs: int = setting("training", 20, _whole(1), "passes over the training images")
    batch_size: int = setting("training", 32, _whole(1), "images per step", exact=True)
    learning_rate: float = setting("training", 1e-3, _number(0), "Adam's rate", exact=True)
    weight_decay: float = setting(
        "training", 1e-4, _number(0, low_too=True), "Adam's L2 penalty", exact=True
    )
    backbone_rate: float = setting(
        "training",
        0.2,
        _number(0),
        "the pretrained layers' rate, as a share of the head's",
        exact=True,
    )
    warmup_epochs: float = setting(
        "training",
        1.0,
        _number(0, low_too=True),
        "epochs over which the rate grows from nothing",
        exact=True,
    )
    batch_norm: str = setting(
        "training",
        "fixed",
        _choice("fixed", "trained"),
        "statistics of the trained layers' batch-norm: the pretrained ones, or each batch's own "
        "(always so with --weights none)",
        exact=True,
    )
    smallest_crop: float = setting(
        "training",
        0.25,
        Kind(float, lambda v: 0 < v <= 1, "a number above 0, at most 1"),
        "share of the picture's area that an augmented view shows at least",
        exact=True,
    )
    augmentation: str = setting(
        "training",
        "basic",
        _choice("basic", "trivial"),
        "basic: crop, flip and colour; trivial: and one random change of any strength a view "
        "(TrivialAugment)",
        exact=True,
    )
    label_smoothing: float = setting(
        "training",
        0.1,
        _number(0, 1, low_too=True),
        "share of the target that is spread over all classes",
        exact=True,
    )
    scheduler_patience: int = setting(
        "training",
        3,
        _whole(0),
        "epochs without a lower validation loss before the rate falls",
        exact=True,
    )
    scheduler_factor: float = setting(
        "training", 0.5, _number(0, 1), "what the rate is then multiplied by", exact=True
    )
    early_stopping_patience: int = setting(
        "training", 5, _whole(1), "epochs without a lower validation loss before the run ends"
    )
    gradient_clip_max_norm: float = setting(
        "training", 1.0, _number(0), "longest gradient a step may follow", exact=True
    )
    ema_decay: float | str = setting(
        "training",
        "on",
        _or_word(_number(0, 1, low_too=True), "on"),
        "decay of the running average of the weights that is validated and released "
        "(on: fitted to the length of an epoch; 0: off)",
        exact=True,
    )
    seed: int = setting("training", 42, _whole(0, 2**64 - 1), "start of all randomness", exact=True)
    # device
    device: str = setting(
        "device", "auto", _choice("auto", "cuda", "cpu", "mps"), "where to compute"
    )
    precision: str = setting(
        "device",
        "auto",
        _choice("auto", "fp32", "bf16", "fp16"),
        "number format of the network's arithmetic (auto: what the device is fastest in)",
        exact=True,
    )
    # output
    output_dir: Path = setting(
        "output", REPOSITORY / "ml-models", PATH, "where the versioned model goes"
    )
    checkpoint_dir: Path = setting(
        "output", REPOSITORY / "checkpoints", PATH, "where runs keep what resuming needs"
    )
    resume: str | None = setting(
        "output", None, TEXT, "go on with a checkpoint (a path), or auto: the newest", optional=True
    )
    dry_run: bool = setting(
        "output", False, SWITCH, "do the whole job on a handful of images and keep nothing"
    )
    # tracking
    experiment_name: str = setting(
        "tracking", "nutrilearn-food-training", TEXT, "MLflow experiment"
    )
    tracking_uri: str = setting(
        "tracking",
        f"sqlite:///{(REPOSITORY / 'mlflow.db').as_posix()}",
        TEXT,
        "MLflow server or database",
    )
    no_mlflow: bool = setting("tracking", False, SWITCH, "keep the record in metrics.jsonl only")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata
            if value is None and rule["optional"]:
                continue
            if not rule["kind"].valid(value):
                raise ConfigError(f"--{field.name} {value}: must be {rule['kind'].allowed}")

    def to_dict(self) -> dict[str, Any]:
        """Every value as JSON knows it."""
        values = dataclasses.asdict(self)
        values["tracking_uri"] = without_password(self.tracking_uri)
        return {
            name: str(value)
            if isinstance(value, Path)
            else list(value)
            if isinstance(value, tuple)
            else value
            for name, value in values.items()
        }

    def exact_settings(self) -> dict[str, Any]:
        """The values on which every number of the run depends, as JSON knows them."""
        names = {field.name for field in dataclasses.fields(self) if field.metadata["exact"]}
        return {name: value for name, value in self.to_dict().items() if name in names}


def without_password(text: str) -> str:
    """The text with the password of any URI in it starred out, so that it may be shown."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)


class OneLineParser(argparse.ArgumentParser):
    """A bad argument ends with exit code 2 and one line."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.splitlines())
        print(f"{self.prog}: error: {line}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def make_parser(description: str) -> OneLineParser:
    """Flags for every field of TrainingConfig, as --with_underscores and --with-dashes."""
    parser = OneLineParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainingConfig):
        rule = field.metadata
        group = groups.setdefault(rule["group"], None) or parser.add_argument_group(rule["group"])
        groups[rule["group"]] = group
        if rule["kind"] is SWITCH:
            group.add_argument(*flag_names(field.name), action="store_true", help=rule["help"])
        else:
            text = f"{rule['help']} ({_shown(field.default)}; {rule['kind'].allowed})"
            group.add_argument(
                *flag_names(field.name),
                metavar=field.name.split("_")[-1].upper(),
                help=text.replace("%", "%%"),
            )
    return parser


def flag_names(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _shown(default: Any) -> str:
    if isinstance(default, Path) and default.is_relative_to(REPOSITORY):
        return f"default: {default.relative_to(REPOSITORY)}"
    if isinstance(default, str) and default.startswith("sqlite:"):
        return "default: mlflow.db in the repository"
    return "default: none" if default is None else f"default: {default}"


def config_from_args(arguments: argparse.Namespace) -> TrainingConfig:
    """Parse and check.

    Raises:
        ConfigError: for the first value that is not allowed.
    """
    values: dict[str, Any] = dict(PLAIN_RECIPE) if arguments.recipe == "plain" else {}
    for field in dataclasses.fields(TrainingConfig):
        text = getattr(arguments, field.name)
        if field.metadata["kind"] is SWITCH:
            values[field.name] = text
        elif text is not None:
            values[field.name] = _parse(field, text)
    return TrainingConfig(**values)


def _parse(field: dataclasses.Field[Any], text: str) -> Any:
    kind: Kind = field.metadata["kind"]
    try:
        value = kind.parse(text)
        if not kind.valid(value):  # said here too, so that the message has the text as it was typed
            raise ValueError("not allowed")
    except ValueError as error:
        raise ConfigError(f"--{field.name} {text}: must be {kind.allowed}") from error
    return value


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Sequence[str]:
    """What differs between two runs' exact settings, in words."""
    return [
        f"{name} is {ours.get(name)!r} now and was {theirs.get(name)!r} then"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
