"""Batch-norm folded while training: the gradients stay what they are."""

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from tests.support import standin
from torch import Tensor, nn

from app.ml.model import TrainedPart, build_model, split_model
from training.compute.fixed_norm import ReLU6, foldable, folded_batch_norm

FROZEN = 16  # layers: a block or two is trained


@pytest.fixture(params=["mobilenet_v2", "efficientnet_lite0", "efficientnet_b0", standin.NAME])
def trained(request: pytest.FixtureRequest) -> TrainedPart:
    """As training has it, in double precision; batch-norm's numbers are those of no fresh one.

    The stand-in's convolutions have a bias.
    """
    torch.manual_seed(0)
    frozen = 0 if request.param == standin.NAME else FROZEN
    with standin.registered():
        part = split_model(build_model(request.param, 3), request.param, frozen)[1]
    part = part.double().train()
    for norm in norms(part):
        norm.eval()
        for values in (norm.weight.data, norm.running_var):
            values.uniform_(0.5, 1.5)
        for values in (norm.bias.data, norm.running_mean):
            values.uniform_(-1, 1)
    return part


def norms(module: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in module.modules() if isinstance(m, nn.BatchNorm2d))


def gradients(part: TrainedPart) -> list[Tensor]:
    channels = next(m for m in part.modules() if isinstance(m, nn.Conv2d)).in_channels
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(4, channels, 5, 5, generator=generator, dtype=torch.float64)
    loss = nn.functional.cross_entropy(part(features), torch.tensor([0, 1, 2, 0]))
    return [loss, *torch.autograd.grad(loss, list(part.parameters()))]


def test_losses_and_gradients_are_those_of_the_plain_layers(trained: TrainedPart) -> None:
    before = copy.deepcopy(trained.state_dict())
    expected = gradients(trained)
    with folded_batch_norm(trained, wanted=True):
        assert len(list(foldable(trained))) == 0, "all of them are folded"
        torch.testing.assert_close(gradients(trained), expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())
    assert len(list(foldable(trained))) >= 4
    with folded_batch_norm(trained, wanted=False):
        assert all(map(torch.equal, gradients(trained), expected))


def test_a_convolution_with_a_forward_pass_of_its_own_keeps_its_batch_norm(
    trained: TrainedPart,
) -> None:
    """As those have whose gradients are computed in float32."""
    expected = gradients(trained)
    conv, norm = next(foldable(trained))
    setattr(conv, "forward", functools.partial(nn.Conv2d.forward, conv))  # noqa: B010
    with folded_batch_norm(trained, wanted=True):
        assert "forward" not in vars(norm)
        torch.testing.assert_close(gradients(trained), expected, rtol=1e-9, atol=1e-12)
    assert "forward" in vars(conv)


def test_relu6_is_exactly_that_of_pytorch() -> None:
    values = torch.tensor([-1.0, 0, 1e-9, 3, 6 - 1e-6, 6, 7], requires_grad=True)
    weights = torch.arange(1.0, 8)
    ours, theirs = (
        torch.autograd.grad((weights * relu6(values * 1)).sum(), values)[0]
        for relu6 in (ReLU6.apply, nn.functional.relu6)
    )
    assert torch.equal(ours, theirs) and ours.count_nonzero() == 3
    assert torch.equal(ReLU6.apply(values * 1), nn.functional.relu6(values))
