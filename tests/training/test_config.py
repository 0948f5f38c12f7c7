"""Every flag: its default, its bad values, its place in the help."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_model
from app.ml.model import BACKBONES, sizes_of
from training.config import (
    REPOSITORY,
    SWITCH,
    TrainingConfig,
    config_from_args,
    config_of_record,
    differences,
    flag_fields,
    make_parser,
)
from training.errors import ConfigError

FIELDS = {field.name: field for field in flag_fields()}
COUNT = ["0", "-1", "2.5", "many", "", "nan", "1e3"]
SHARE = ["0", "1", "-0.5", "1.5", "nan", "inf", "half", ""]
POSITIVE = ["0", "-1", "nan", "inf", "-inf", "fast", ""]
BAD: dict[str, list[str]] = {
    "model_name": ["vgg16", "", "MobileNet_V2", "mobilenet_v2 ", "timm", "resnet18.a1_in1k"],
    "weights": ["", "  "],
    "freeze_layers": ["-1", "2.5", "some", ""],
    "data_dir": ["", " ", "~nobody-of-this-name/x"],
    "custom_data_dir": ["", "~nobody-of-this-name"],
    "labels": ["", "~nobody-of-this-name"],
    "classes": ["", "samosa", ",", "samosa,"],
    "images_per_class": ["0", "4", "-1", "all", ""],
    "train_split": SHARE,
    "num_workers": ["-1", "1.5", "most", ""],
    "cache_images": ["yes", "", "ON"],
    "cache_views": ["-1", "off", ""],
    "epochs": COUNT,
    "batch_size": COUNT,
    "learning_rate": POSITIVE,
    "weight_decay": ["-1", "nan", "inf", "none", ""],
    "scheduler_patience": ["-1", "2.5", "", "nan"],
    "scheduler_factor": SHARE,
    "early_stopping_patience": COUNT,
    "gradient_clip_max_norm": POSITIVE,
    "ema_decay": ["-0.1", "1", "nan", "off", ""],
    "runs": COUNT,
    "seed": ["-1", "0.5", "lucky", "", str(2**64)],
    "device": ["gpu", "cuda:0", ""],
    "precision": ["fp64", "float32", ""],
    "output_dir": [""],
    "checkpoint_dir": [""],
    "checkpoint_copy_dir": ["", "~nobody-of-this-name"],
    "resume": ["", " "],
    "experiment_name": ["", "  "],
    "tracking_uri": ["", "  "],
}
GOOD: dict[str, dict[str, Any]] = {
    "model_name": {"resnet50": "resnet50"},
    "weights": {"none": "none", "a b.pth": "a b.pth"},
    "freeze_layers": {"0": 0, "all": "all", "19": 19},
    "data_dir": {"photos": Path("photos"), "~/photos": Path("~/photos").expanduser()},
    "custom_data_dir": {"dishes": Path("dishes")},
    "labels": {"labels.csv": Path("labels.csv")},
    "classes": {"samosa, pizza": ("samosa", "pizza")},
    "images_per_class": {"5": 5},
    "train_split": {"0.5": 0.5},
    "num_workers": {"auto": "auto", "0": 0},
    "cache_images": {"off": "off"},
    "cache_views": {"3": 3},
    "epochs": {"1": 1},
    "batch_size": {"1": 1},
    "learning_rate": {"1e-4": 1e-4},
    "weight_decay": {"0": 0.0},
    "scheduler_patience": {"0": 0},
    "scheduler_factor": {"0.1": 0.1},
    "early_stopping_patience": {"1": 1},
    "gradient_clip_max_norm": {"5": 5.0},
    "ema_decay": {"0": 0.0, "on": "on", "0.99": 0.99},
    "runs": {"3": 3},
    "seed": {"0": 0, str(2**64 - 1): 2**64 - 1},
    "device": {"cpu": "cpu"},
    "precision": {"bf16": "bf16"},
    "output_dir": {"out": Path("out")},
    "checkpoint_dir": {"kept": Path("kept")},
    "checkpoint_copy_dir": {"drive": Path("drive")},
    "resume": {"auto": "auto", "x.pt": "x.pt"},
    "experiment_name": {"a b": "a b"},
    "tracking_uri": {"http://host": "http://host"},
}
VALUED = [name for name, field in FIELDS.items() if field.metadata["type"] is not SWITCH]
SWITCHES = [name for name in FIELDS if name not in VALUED]


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: object) -> None:
        raise AssertionError("a bad value got as far as training")

    monkeypatch.setattr(train_model, "train", trained)
    monkeypatch.setattr(train_model, "dry_run", trained)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command answers with."""
    with pytest.raises(SystemExit) as raised:
        train_model.main(arguments)
    out, err = capsys.readouterr()
    assert raised.value.code == 2 and not out
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


def test_the_tables_here_name_every_flag() -> None:
    assert BAD.keys() == GOOD.keys() == set(VALUED)


@pytest.mark.parametrize(("name", "value"), [(name, v) for name in BAD for v in BAD[name]])
def test_a_bad_value_is_one_line_and_exit_code_2(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([f"--{name}={value}"], capsys)
    assert f"--{name} {value}: must be {FIELDS[name].metadata['type'].allowed}\n" in line


def test_a_misspelt_flag_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["--tracking_url=http://me:hunter2@host"], capsys)
    assert "--tracking_url=http://me:***@host" in line


@pytest.mark.parametrize("name", VALUED)
def test_a_good_value_is_taken_with_underscores_or_dashes(name: str) -> None:
    for text, value in GOOD[name].items():
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            for arguments in ([flag, text], [f"{flag}={text}"]):
                config = config_from_args(make_parser("").parse_args(arguments))
                assert config == TrainingConfig(**{name: value})
                assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_takes_no_value(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        config = config_from_args(make_parser("").parse_args([flag]))
        assert config == TrainingConfig(**{name: True})
    assert name in refused([f"--{name}=yes"], capsys)


@pytest.mark.parametrize(
    "arguments",
    [["--epoch", "3"], ["--batchsize=3"], ["--learning", "3"], ["stray"], ["--epochs"], ["--seed"]],
)
def test_a_flag_that_is_unknown_or_incomplete_is_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert arguments[0].split("=")[0] in refused(arguments, capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--predict", "x.jpg", "--compare", "v1", "v2"],
        ["--compare", "v1", "v2", "--average", "v1", "v2"],
    ],
)
def test_what_does_not_go_together_starts_nothing(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert arguments[0].split("=")[0] in refused(arguments, capsys)


@pytest.mark.parametrize("value", ["0", "-3", "x"])
def test_top_k_is_checked_too(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["--predict", "x.jpg", f"--top_k={value}"], capsys)
    assert "--top_k" in line and value in line


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(VALUED), text=st.text(max_size=12))
def test_any_text_is_taken_or_refused_in_one_line(name: str, text: str) -> None:
    """Line breaks included; never a traceback."""
    parser = make_parser("")
    try:
        config_from_args(parser.parse_args([f"--{name}={text}"]))
    except ConfigError as error:
        assert str(error) == f"--{name} {text}: must be {FIELDS[name].metadata['type'].allowed}"


def test_a_line_break_in_a_value_does_not_break_the_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "--device a b: must be auto, cuda, cpu or mps" in refused(["--device=a\nb"], capsys)


def test_the_help_lists_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        train_model.main(["--help"])
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert f"--{name}" in text and f"--{name.replace('_', '-')}" in text
        assert field.metadata["help"] in text, name
        if name in VALUED and not isinstance(field.default, (Path, type(None))):
            shown = "mlflow.db in the repository" if name == "tracking_uri" else str(field.default)
            assert f"default: {shown};" in text, name
    for name in ("predict", "top_k", "model_version", "compare", "average", "sync_mlflow"):
        assert f"--{name}" in text


def test_defaults_are_what_is_documented() -> None:
    config = TrainingConfig()
    expected = {
        "model_name": "mobilenet_v2",
        "weights": "imagenet",
        "freeze_layers": 10,
        "train_split": 0.8,
        "epochs": 20,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "scheduler_patience": 3,
        "scheduler_factor": 0.5,
        "early_stopping_patience": 5,
        "gradient_clip_max_norm": 1.0,
        "seed": 42,
        "output_dir": REPOSITORY / "ml-models",
        "checkpoint_dir": REPOSITORY / "checkpoints",
        "data_dir": REPOSITORY / "data",
        "experiment_name": "nutrilearn-food-training",
    }
    assert expected.items() <= vars(config).items()
    assert config_from_args(make_parser("").parse_args([])) == config


def test_paths_do_not_depend_on_the_current_folder(tmp_path: Path) -> None:
    assert (REPOSITORY / "backend" / "train_model.py").is_file()
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        config = config_from_args(make_parser("").parse_args([]))
    finally:
        os.chdir(here)
    paths = [value for value in vars(config).values() if isinstance(value, Path)]
    assert len(paths) == 3 and all(path.is_relative_to(REPOSITORY) for path in paths)
    assert re.fullmatch(r"sqlite:///.*/mlflow\.db", config.tracking_uri)
    assert REPOSITORY.as_posix() in config.tracking_uri


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.0),
        ("epochs", True),
        ("epochs", None),
        ("seed", "1"),
        ("sample", 1),
        ("classes", ["a", "b"]),
        ("data_dir", "data"),
        ("train_split", "0.8"),
    ],
)
def test_a_config_made_in_code_is_checked_as_well(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"--{name} .*: must be "):
        TrainingConfig(**{name: value})


def test_a_config_is_never_changed_and_knows_no_other_names() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainingConfig(epoch=3)  # type: ignore[call-arg]


def test_exact_settings_are_those_that_change_numbers() -> None:
    exact = TrainingConfig().exact_settings()
    free = {"epochs", "early_stopping_patience", "num_workers", "cache_images", "device"}
    free |= {"resume", "dry_run", "no_mlflow", "experiment_name", "tracking_uri", "data_dir"}
    free |= {"output_dir", "checkpoint_dir", "checkpoint_copy_dir", "runs", "no_promote"}
    free |= {"custom_data_dir", "labels"}  # the list of images tells data apart
    recipe = {"backbone_lr_scale", "warmup_epochs", "min_crop_scale", "label_smoothing"}
    recipe |= {"first_crop", "small_epochs", "train_crop", "test_resize", "test_crop", "split_seed"}
    assert exact.keys() == (FIELDS.keys() | recipe) - free
    assert TrainingConfig(classes=("a", "b")).to_dict()["classes"] == ["a", "b"]


def test_the_constants_of_the_recipe_are_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("backbone_lr_scale", "warmup_epochs", "min_crop_scale", "label_smoothing"):
        assert name in refused([f"--{name}=0.5"], capsys)
        with pytest.raises(ConfigError, match=f"--{name} -1: must be"):
            TrainingConfig(**{name: -1})


def test_sizes_are_the_backbones_unless_they_are_given() -> None:
    for name, row in BACKBONES.items():
        config = TrainingConfig(model_name=name)
        assert config.sizes == sizes_of(name)
        assert config.preprocessing.crop == config.sizes["test_crop"]
        assert config.preprocessing.mean == row.preprocessing["mean"]
    names = ("first_crop", "train_crop", "test_resize", "test_crop")
    assert TrainingConfig().sizes == dict(zip(names, (160, 224, 256, 256), strict=True))
    given = TrainingConfig(first_crop=128, train_crop=160, test_resize=250, test_crop=240)
    assert given.sizes == dict(zip(names, (128, 160, 250, 240), strict=True))
    assert (given.preprocessing.resize, given.preprocessing.crop) == (250, 240)
    assert given.with_sizes({"train_crop": 96}).sizes["train_crop"] == 96
    with pytest.raises(ConfigError, match="--test_crop 0: must be"):
        TrainingConfig(test_crop=0)


@pytest.mark.parametrize(
    ("settings", "sides"),
    [
        ({"epochs": 10}, [160] * 4 + [192] * 4 + [224] * 2),
        ({"epochs": 20}, [160] * 4 + [192] * 4 + [224] * 12),
        ({"epochs": 5}, [160] * 2 + [192] * 2 + [224]),
        ({"epochs": 2}, [160, 224]),
        ({"epochs": 1}, [224]),
        ({"epochs": 4, "cache_views": 2}, [224] * 4),
        ({"epochs": 4, "small_epochs": 0}, [224] * 4),
        ({"epochs": 3, "small_epochs": 2, "first_crop": 150}, [150, 182, 224]),
        ({"epochs": 2, "train_crop": 128}, [128] * 2),
        ({"epochs": 3, "model_name": "efficientnet_lite2"}, [196, 228, 260]),
        ({"epochs": 2, "model_name": "resnet50"}, [224] * 2),
    ],
)
def test_training_crops_grow_in_the_first_four_fifths_or_eight_epochs(
    settings: dict[str, Any], sides: list[int]
) -> None:
    """The smaller ones in as many epochs each; the last epochs see the largest."""
    config = TrainingConfig(**settings)
    assert [config.crop_in(epoch) for epoch in range(config.epochs)] == sides
    assert config.crop_in(1000) == sides[-1]


def test_a_models_record_gives_its_settings_back() -> None:
    config = TrainingConfig(
        classes=("a", "b"), custom_data_dir=Path("dishes"), seed=7, epochs=3, test_crop=240
    )
    assert config_of_record(config.to_dict()) == config
    assert config_of_record({"epochs": 3, "recipe": "gone"}) == TrainingConfig(epochs=3)


def test_differences_are_said_in_words() -> None:
    ours, theirs = (TrainingConfig(seed=s).exact_settings() for s in (1, 2))
    assert (differences(ours, ours)) == []
    assert (differences(ours, theirs)) == ["seed is 1, was 2"]
    assert (differences({}, {"x": 1})) == ["x is None, was 1"]


def test_a_network_that_timm_does_not_have_is_one_line_with_close_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(["--model_name=timm/resnt18"], capsys)
    assert "--model_name timm/resnt18: timm " in line
    assert "has no network 'resnt18'; close: resnet18," in line
    with pytest.raises(ConfigError, match="not one classifier"):
        TrainingConfig(model_name="timm/crossvit_tiny_240.in1k")
    assert TrainingConfig(model_name="timm/resnet18.a1_in1k").preprocessing.crop == 224
