"""Any image classifier of timm by name: what `app.ml.model` needs to know of one.

Every network of timm runs in two steps, `forward_features` and `forward_head`, and its
`group_matcher` says which parameters make up its stem and each of its blocks. That is enough to cut
one; whether its blocks really run one after the other, nothing in between, is tried out.
"""

import copy
import difflib
import logging
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

BODY, HEAD = "forward_features", "forward_head"  # the two steps, of which the first has the layers
HUB_LOGGERS = ("huggingface_hub", "httpx", "httpx2")

logger = logging.getLogger(__name__)


def import_timm() -> Any:
    """Import timm, which takes a second, with the usage reports of its hub switched off."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import timm

    return timm


def find_config(name: str) -> Any:
    """Return timm's description of a network and its pretrained weights, by ARCHITECTURE[.TAG].

    Raises:
        ValueError: there is no such name, with close ones listed, or the network is not one that
            gives logits for square RGB pictures from one classifier.
    """
    timm = import_timm()
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        names = [*timm.list_models(), *timm.list_models(pretrained=True)]
        close = ", ".join(difflib.get_close_matches(name, names)) or "none; timm.list_models()"
        raise ValueError(f"timm {timm.__version__} has no network {name!r}; close: {close}") from (
            error
        )
    channels, height, width = config.input_size
    if not isinstance(config.classifier, str) or channels != 3 or height != width:
        raise ValueError(
            f"timm's {name} has not one classifier for square RGB pictures; choose another network"
        )
    return config


def preprocessing_of(config: Any) -> dict[str, Any]:
    """Return the fields of PreprocessConfig that the pretrained weights were evaluated with."""
    data = import_timm().data.resolve_data_config(pretrained_cfg=config.to_dict())
    crop = data["input_size"][-1]
    return {
        "resize": int(crop / data["crop_pct"]),  # rounded down, as timm does
        "crop": crop,
        "interpolation": data["interpolation"],
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
    }


def build(name: str, head: str, num_classes: int) -> nn.Module:
    """Build the network without weights; needs no connection.

    Raises:
        ValueError: its classifier is not an nn.Linear, or nothing says what its layers are.
    """
    timm = import_timm()
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, drop_rate=0.0)
    if not isinstance(model.get_submodule(head), nn.Linear) or not hasattr(model, "group_matcher"):
        raise ValueError(
            f"timm's {name} cannot be cut: it needs one nn.Linear as its classifier and a list of "
            "its blocks; choose another network"
        )
    # The only noise inside is the head's dropout, which is dealt out by image: see `model.py`.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    return model


def pretrained_state(name: str) -> dict[str, Tensor]:
    """Load the published state_dict: out of the hub's cache, or from the hub.

    Raises:
        OSError: it is neither in the cache nor can it be downloaded.
    """
    for library in HUB_LOGGERS:  # a dozen lines about retries would hide the one that counts
        logging.getLogger(library).setLevel(logging.ERROR)
    logger.info("loading the weights of timm's %s from the hub, or from its cache", name)
    try:
        return dict(import_timm().create_model(name, pretrained=True).state_dict())
    except Exception as error:  # each of the libraries below has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(reason) from error


# Layers ---------------------------------------------------------------------------------------


class Step(nn.Module):
    """One of a network's two steps; the modules that are not part of it are left out of it."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = getattr(self.network, self.method)(images)
        return result


def layers(model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Return the stem and the blocks, by timm's own grouping; see `Backbone`.

    The stem is whatever comes before the first block: `forward_features` without the blocks.
    """
    parts = _parts(model, head)
    stem = Step(without(model, {name for part in parts[1:] for name in part}), BODY)
    blocks = [_block(model, names) for names in parts[1:-1]]
    return [("stem", stem), *((f"block {i}", block) for i, block in enumerate(blocks, start=1))]


def pool(model: nn.Module, head: str) -> nn.Module:
    """Return what stands between the last block and the classifier."""
    parts = _parts(model, head)
    return Step(without(model, {head, *(name for part in parts[:-1] for name in part)}), HEAD)


def whole(model: nn.Module, head: str) -> nn.Module:
    """Return everything up to the classifier, in one piece."""
    return without(model, {head})


def without(module: nn.Module, names: set[str], prefix: str = "") -> nn.Module:
    """Return a copy that shares all tensors and lacks the named modules and parameters.

    An empty nn.Sequential stands in for a module: it can be called and iterated over.
    """
    part = copy.copy(module)
    part._parameters = {
        name: None if prefix + name in names else parameter
        for name, parameter in module._parameters.items()
    }
    part._modules = {}
    for name, child in module._modules.items():
        path = prefix + name
        if path in names:
            part._modules[name] = nn.Sequential()
        elif child is not None and any(other.startswith(f"{path}.") for other in names):
            part._modules[name] = without(child, names, f"{path}.")
        else:
            part._modules[name] = child
    return part


def _parts(model: nn.Module, head: str) -> list[list[str]]:
    """List the names of the largest modules, and of parameters beside them, that belong to the
    stem, to each block and, last, to the head."""
    numbers = _numbers(model, head)
    last = max(numbers.values())
    parts: list[list[str]] = [[] for _ in range(last + 1)]
    number, is_behind = 0, False
    for name, inside in _largest(model, numbers):
        is_behind = is_behind or name == "global_pool"  # as timm calls what the head begins with
        # Activations have no parameters and go with what comes before.
        number = last if is_behind else number if inside is None else inside
        parts[number].append(name)
    return parts


def _numbers(model: nn.Module, head: str) -> dict[int, int]:
    """Number the parameters, by id: 0 in the stem, then by block, the largest in the head."""
    from timm.models import group_parameters

    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
    groups = list(group_parameters(model, matcher, reverse=False).values())
    parameters = dict(model.named_parameters())
    # What no group matches comes last; where the classifier is matched, it alone is the head.
    if f"{head}.weight" not in groups[-1]:
        groups.append([])
    numbers = {id(parameters[name]): i for i, group in enumerate(groups) for name in group}
    for parameter in model.get_submodule(head).parameters():
        numbers[id(parameter)] = len(groups) - 1
    return numbers


def _largest(
    module: nn.Module, numbers: dict[int, int], prefix: str = ""
) -> Iterator[tuple[str, int | None]]:
    """Yield the largest modules whose parameters have one number, and parameters beside them."""
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, numbers[id(parameter)]
    for name, child in module.named_children():
        inside = {numbers[id(parameter)] for parameter in child.parameters()}
        if len(inside) > 1:
            yield from _largest(child, numbers, f"{prefix}{name}.")
        else:
            yield prefix + name, min(inside, default=None)


def _block(model: nn.Module, names: list[str]) -> nn.Sequential:
    """Put a layer's modules in a row; its other parameters come along, to be frozen with it."""
    block = nn.Sequential()
    for name in names:
        parent, _, last = name.rpartition(".")
        child = getattr(model.get_submodule(parent), last)
        if isinstance(child, nn.Parameter):
            block.register_parameter(name.replace(".", "_"), child)
        else:
            block.append(child)
    return block
