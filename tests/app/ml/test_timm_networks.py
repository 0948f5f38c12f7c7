"""timm's networks by name: how they are found, cut, run as inference, pretrained and rebuilt.
Nothing is downloaded; the weights are random."""

import copy
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from tests.support.released import release_model
from torch import nn

from app.ml.artifacts import DamagedArtifactError, SaveError, read_record
from app.ml.model import (
    BACKBONES,
    WeightsError,
    backbone,
    build_model,
    describe_split,
    head_linear,
    inference_copy,
    load_pretrained,
    split_model,
)
from app.ml.predictor import import_onnxruntime, load_model_for_inference
from app.ml.preprocessing import PreprocessConfig
from training.release import export
from training.release.export import onnx_bytes

CPU = torch.device("cpu")
# The smallest of each family, with the number of its layers: the stem and the blocks.
FAMILIES = {
    "test_resnet": 5,
    "test_efficientnet": 6,
    "mobilenetv3_small_050": 13,
    "test_convnext": 10,
    "regnetx_002": 14,
    "test_vit": 7,
    "swin_tiny_patch4_window7_224": 13,
}
NO_CHAIN = "timm/densenet121"  # a block takes what all those before it have given
LARGE = ("swin_tiny_patch4_window7_224",)


def names(families: Any = FAMILIES) -> list[Any]:
    return [
        pytest.param(f"timm/{name}", marks=[pytest.mark.slow] if name in LARGE else [], id=name)
        for name in families
    ]


every_family = pytest.mark.parametrize("name", names())


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network takes any size; nothing here depends on it."""
    for name in (*FAMILIES, NO_CHAIN.removeprefix("timm/")):
        if not timm.get_pretrained_cfg(name).fixed_input_size:
            monkeypatch.setitem(backbone(f"timm/{name}").preprocessing, "crop", 64)


def lived_in(name: str, num_classes: int = 4, seed: int = 0) -> nn.Module:
    """A network in which every layer does something, and no batch-norm is the identity."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.uniform_(0.5, 1.5)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 1.5)
        head_linear(model, name).weight.normal_(std=0.1)
    return model.eval()


def pictures(name: str, number: int = 2) -> torch.Tensor:
    size = backbone(name).preprocessing["crop"]
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(number))


def assert_nearly(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0  # a network that answers nothing would agree with itself
    scale = float(expected.abs().max())
    torch.testing.assert_close(given, expected, atol=1e-4 * scale, rtol=0)


# Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnt18", r"no network 'resnt18'; close: resnet18,"),
        ("resnet18.imagenet22k", r"no network 'resnet18.imagenet22k'; close: resnet18"),
        ("../weights", "no network"),
        ("", "no network"),
        ("crossvit_tiny_240.in1k", "not one classifier.*choose another"),
        ("vit_base_patch16_sapiens2.fb", "not one classifier for square RGB.*choose another"),
    ],
)
def test_a_name_that_cannot_be_used_is_one_line_that_helps(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        backbone(f"timm/{name}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["dla46_c.in1k", "csatv2.r512_in1k"])
def test_a_network_that_cannot_be_cut_is_refused_when_it_is_built(name: str) -> None:
    """Its classifier is a convolution, or timm does not say what its blocks are."""
    with pytest.raises(ValueError, match=r"one nn\.Linear as its classifier"):
        build_model(f"timm/{name}", 3)


@pytest.mark.parametrize(
    "name",
    ["convnext_tiny.in12k_ft_in1k", "resnet18.a1_in1k", "test_vit", "deit3_small_patch16_384"],
)
def test_pictures_are_prepared_as_timm_does_it(name: str) -> None:
    config = PreprocessConfig(**backbone(f"timm/{name}").preprocessing)
    recipe = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    resize, crop, _, normalize = timm.data.create_transform(**recipe).transforms
    assert resize.size == config.resize
    assert tuple(crop.size) == (config.crop, config.crop)
    assert resize.interpolation.value == config.interpolation
    assert tuple(normalize.mean.tolist()) == pytest.approx(config.mean)
    assert tuple(normalize.std.tolist()) == pytest.approx(config.std)


# Layers ---------------------------------------------------------------------------------------


@every_family
def test_stem_blocks_pool_and_head_hold_each_parameter_once(name: str) -> None:
    model, row = build_model(name, 3), backbone(name)
    layers = row.layers(model)
    assert len(layers) == FAMILIES[name.removeprefix("timm/")]
    assert [label for label, _ in layers][:2] == ["stem", "block 1"]
    parts = [*(layer for _, layer in layers), row.pool(model), head_linear(model, name)]
    held = [id(parameter) for part in parts for parameter in part.parameters()]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


@every_family
def test_the_frozen_part_runs_as_inference_and_both_parts_are_the_whole(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model, images = lived_in(name), pictures(name)
    num_layers = FAMILIES[name.removeprefix("timm/")]
    with torch.no_grad():
        whole = model(images)
        for freeze in (0, 1, num_layers // 2, num_layers):
            frozen, trained = split_model(model, name, freeze)
            frozen_parameters = sum(p.numel() for p in frozen.parameters())
            assert (frozen_parameters > 0) == (freeze > 0)
            assert all(p.requires_grad for p in trained.parameters())
            runner = inference_copy(frozen, CPU, torch.float32, images.shape[-1])
            # The last of a stem of three convolutions, in a ResNet, is all that may be left.
            assert sum(isinstance(m, nn.BatchNorm2d) for m in runner.modules()) <= 1
            assert_nearly(trained.eval()(runner(images)), whole)
    assert f"{num_layers} of {num_layers} layers frozen" in describe_split(model, name, num_layers)
    assert not caplog.messages


@pytest.mark.slow
def test_a_network_that_is_no_chain_runs_whole_with_its_layers_frozen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    model = lived_in(NO_CHAIN)
    expected = model(images := torch.rand(2, 3, 64, 64)).detach()
    frozen, trained = split_model(model, NO_CHAIN, 10)
    (line,) = caplog.messages
    assert "timm/densenet121 do not run one after the other" in line
    assert not list(frozen.parameters())
    assert_nearly(trained.eval()(images).detach(), expected)
    layers = [layer for _, layer in backbone(NO_CHAIN).layers(model)]
    before = copy.deepcopy([layer.state_dict() for layer in layers])
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    trained.train()
    nn.functional.cross_entropy(trained(images), torch.tensor([0, 1])).backward()
    optimizer.step()
    for number, (layer, old) in enumerate(zip(layers, before, strict=True)):
        new = layer.state_dict()
        assert all(torch.equal(new[key], old[key]) for key in old) == (number < 10)


def test_all_of_a_network_that_is_no_chain_can_be_frozen_as_inference() -> None:
    """There is nothing behind it but the head, if the pool has no parameters."""
    name = "timm/cait_xxs24_224"
    model = build_model(name, 3)
    frozen, trained = split_model(model, name, len(backbone(name).layers(model)))
    assert not len(trained.layers)
    with torch.no_grad():
        images = pictures(name, 1)
        assert_nearly(trained(frozen.eval()(images)), model.eval()(images))


@every_family
def test_there_is_no_noise_inside(name: str) -> None:
    """The head's dropout is dealt out by image; any other would make a resumed run another."""
    model, images = build_model(name, 3).train(), pictures(name)
    torch.manual_seed(1)
    first = model(images)
    assert torch.equal(model(images), first)


# Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_weights_fills_everything_but_the_head(suffix: str, tmp_path: Path) -> None:
    name, path = "timm/test_convnext", tmp_path / f"weights{suffix}"
    source = lived_in(name, 9).state_dict()
    torch.save(source, path) if suffix == ".pth" else save_file(source, path)
    model = build_model(name, 3)
    assert load_pretrained(model, name, str(path)) == f"weights of {path}, with a new head"
    for key, value in model.state_dict().items():
        assert torch.equal(value, source[key]) == (not key.startswith("head.fc"))


def test_a_damaged_safetensors_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(WeightsError, match="not a readable state_dict") as raised:
        load_pretrained(build_model("timm/test_vit", 3), "timm/test_vit", str(path))
    assert "\n" not in str(raised.value)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, which itself cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_weights_come_out_of_the_cache_of_the_hub(hub_cache: Path) -> None:
    repository, commit = hub_cache / "models--timm--test_vit.r160_in1k", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    source = lived_in("timm/test_vit", 1000).state_dict()
    save_file(source, snapshot / "model.safetensors")
    model = build_model("timm/test_vit", 3)
    line = load_pretrained(model, "timm/test_vit", "imagenet")
    assert line == "timm's weights, with a new head"
    for key, value in model.state_dict().items():
        assert torch.equal(value, source[key]) == (not key.startswith("head."))


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("name", ["timm/test_vit.r160_in1k", "timm/resnet14t"])
def test_weights_that_cannot_be_had_are_one_line_with_the_ways_out(name: str) -> None:
    """No network and an empty cache, or a network without published weights."""
    with pytest.raises(WeightsError, match=f"weights of {name}.*--weights PATH.*none") as raised:
        load_pretrained(build_model(name, 3), name, "imagenet")
    assert "\n" not in str(raised.value)


# Released -------------------------------------------------------------------------------------


@every_family
def test_the_onnx_form_answers_as_the_network(name: str) -> None:
    model, images = lived_in(name), pictures(name, 3)
    form = onnx_bytes(model, name, images.shape[-1])
    session = import_onnxruntime().InferenceSession(form, providers=["CPUExecutionProvider"])
    logits, pooled = session.run(None, {"images": images.numpy()})
    assert pooled.shape == (3, head_linear(model, name).in_features)
    with torch.no_grad():
        assert_nearly(torch.from_numpy(logits), model(images))
        expected = head_linear(model, name)(torch.from_numpy(pooled))
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/test_vit.r160_in1k", NO_CHAIN])
def test_a_release_is_loaded_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lived_in(name, 3)
    release_model(tmp_path, ["dal", "dosa", "idli"], name, model=model)
    monkeypatch.setattr("socket.socket", None)
    predictor = load_model_for_inference(tmp_path, runtime="torch")
    assert read_record(tmp_path).model_name == name
    images = (pictures(name) * 255).byte()
    with torch.no_grad():
        mean, std = (
            torch.tensor(v).view(3, 1, 1)
            for v in (predictor.record.preprocessing.mean, predictor.record.preprocessing.std)
        )
        assert_nearly(predictor.logits(images), model((images / 255 - mean) / std))


def test_the_weights_load_into_timms_own_network(tmp_path: Path) -> None:
    """Also behind the cut: freezing and splitting must leave no trace in the names."""
    model = lived_in("timm/test_convnext", 3)
    split_model(model, "timm/test_convnext", 4)
    release_model(tmp_path, ["dal", "dosa", "idli"], "timm/test_convnext", model=model)
    plain = timm.create_model("test_convnext", num_classes=3).eval()
    plain.load_state_dict(torch.load(tmp_path / "food_model_v1.pth"), strict=True)
    with torch.no_grad():
        images = pictures("timm/test_convnext")
        assert torch.equal(plain(images), model(images))


def test_a_release_of_a_network_that_timm_has_no_more_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release_model(tmp_path, ["dal", "dosa", "idli"], "timm/test_vit")
    monkeypatch.setattr(timm, "get_pretrained_cfg", gone)
    backbone.__globals__["timm_backbone"].cache_clear()
    with pytest.raises(
        DamagedArtifactError, match=r"cannot be built.*was made with timm"
    ) as raised:
        load_model_for_inference(tmp_path, runtime="torch")
    assert "\n" not in str(raised.value)


def gone(*_: object, **__: object) -> None:
    raise RuntimeError("Invalid pretrained tag")


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cannot be traced", "answers otherwise"])
def test_a_network_without_a_right_onnx_form_is_released_without_it(
    harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tracer makes of networks that nobody tried is not known before the training."""
    name, model = "timm/test_vit", lived_in("timm/test_vit")
    config = PreprocessConfig(**backbone(name).preprocessing)
    pixels = (pictures(name, 5) * 255).byte()
    real, other = export.onnx_bytes, lived_in(name, seed=1)

    def harmed(_model: nn.Module, *values: Any) -> bytes:
        if harm == "cannot be traced":
            raise RuntimeError("unsupported operator")
        return real(other, *values)

    forms, missing = export.export_forms(export.Source(model, name, config, pixels))
    assert {"torch", "onnx"} <= forms.keys() and "onnx" not in missing
    monkeypatch.setattr(export, "onnx_bytes", harmed)
    forms, missing = export.export_forms(export.Source(model, name, config, pixels))
    assert "torch" in forms and "onnx" not in forms
    assert ("unsupported operator" in missing["onnx"]) == (harm == "cannot be traced")
    if harm == "cannot be traced":
        monkeypatch.setitem(BACKBONES, name, backbone(name))  # as one whose form is known
        with pytest.raises(SaveError, match="could not be written for onnx"):
            export.export_forms(export.Source(model, name, config, pixels))
