"""What comes before the head runs beside the trace of a step, unless the loss reads something of it on another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from lightning_muter.model.own_step import OwnStep
from lightning_muter.model.traced import LossGraph, storages, trace
from lightning_muter.model.untraced import Untraced


class Block(nn.Module):
    """A layer that leaves traces: its mean as an attribute, a counter; and labels that are mended in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.aux, self.traced = nn.Linear(4, 3), torch.zeros(()), []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.traced.append(get_proxy_mode() is not None)
        h = torch.tanh(self.linear(x))
        self.aux = h.square().mean()
        self.calls += 1
        if y is not None:
            y.clamp_(min=0)
        return h


class Net(nn.Module):
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.head, self.loss = Block(), nn.Linear(3, 2), loss

    def step(self, batch: Any) -> Tensor:
        return self.loss(self, *batch)


def cross_entropy(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.head(net.block(x)), y)


def with_its_mean(net: Net, x: Tensor, y: Tensor) -> Tensor:
    loss = cross_entropy(net, x, y)
    return loss + net.block.aux


def mended_labels(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.head(net.block(x, y)), y)


def counted(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(net, x, y) / net.block.calls.clamp(max=1)


def penalised(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(net, x, y) + 0.1 * net.block.linear.weight.square().sum()


def read(net: Net, before: nn.Module) -> LossGraph:
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 0])
    own = OwnStep(net, (x, y), net.step, "step")
    batches = [(torch.randn(3 * c, 2), [x.repeat(c, 1), y.repeat(c)]) for c in (2, 3)]
    return trace(
        own.with_output(net.head), (batches[0], batches[1]), torch.float64, storages(net), Untraced(before, net.head)
    )


@pytest.mark.parametrize(
    ("loss", "apart"),
    [(cross_entropy, True), (with_its_mean, False), (mended_labels, False), (counted, False), (penalised, True)],
)
def test_a_graph_is_that_of_a_whole_trace(loss: Callable[..., Tensor], apart: bool) -> None:
    torch.manual_seed(0)
    net = Net(loss)
    quick = read(net, net)
    seen = list(net.block.traced)
    whole = read(net, nn.Identity())  # nothing of the net is known to come before the head
    assert (quick.uses, quick.parameters, quick.first) == (whole.uses, whole.parameters, whole.first)
    z, leaves = torch.randn(5, 2, dtype=torch.float64), [torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])]
    assert torch.equal(quick(z, leaves), whole(z, leaves))
    assert not seen[0]
    assert any(seen) is not apart


def test_an_error_before_the_head_leaves_nothing_behind() -> None:
    def fails(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(net, x[:, :3], y)

    net = Net(fails)
    with pytest.raises(Exception, match="shapes cannot be multiplied"):
        read(net, net)
    assert get_proxy_mode() is None
    torch.testing.assert_close(net.block(torch.ones(2, 4)), net.block(torch.ones(2, 4)))
