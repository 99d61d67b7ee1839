"""Heads that are no plain nn.Linear: whole networks take them as they are; where a head is asked for, they are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, MUterCallback, ThreatModel, take_snapshot, unlearn
from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.errors import UnsuitableError
from lightning_muter.model.read_step import read_objective

BALL, DECAY = ThreatModel("l2", 0.05), 0.05
WIDTH, CLASSES = 5, 3


class PlainSubclass(nn.Linear):
    pass


class Cosine(nn.Linear):
    """A bias that it does not use, too."""

    def forward(self, x: Tensor) -> Tensor:
        return 5 * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class OneByOne(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None, None]).flatten(1)


class Own(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / 2), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Tempered(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(inputs, outputs), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


class TwoWays(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(torch.tanh(x))


def weight_normed(inputs: int, outputs: int) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(inputs, outputs))


#: What a head's own snapshot says to it; None: it takes it.
HEADS: dict[str, tuple[Callable[[int, int], nn.Module], str | None]] = {
    "linear": (nn.Linear, None),
    "subclass": (PlainSubclass, None),
    "cosine": (Cosine, r"'net.2' .* cannot serve(.|\n)*not W x \+ b"),
    "1x1 convolution": (OneByOne, r"'net.0', is not the head: net.2.conv.weight, net.2.conv.bias behind it"),
    "own": (Own, r"'net.0', is not the head: net.2.weight, net.2.bias behind it"),
    "temperature": (Tempered, None),
    "weight norm": (weight_normed, r"computed from other parameters"),
    "two ways": (TwoWays, r"reads more than the head's output"),
}


class Lit(pl.LightningModule):
    def __init__(self, head: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), head(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, weight_decay=DECAY)


def data(n: int = 40) -> TensorDataset:
    x = torch.rand(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TensorDataset(x, (3 * x[:, :2].mean(1)).long())


def module(name: str) -> Lit:
    torch.manual_seed(3)
    return Lit(HEADS[name][0]).double()


@pytest.mark.parametrize("name", HEADS)
def test_a_whole_network_is_read_as_its_step_is(name: str) -> None:
    lit, rows = module(name), data()
    reading = read_objective(lit, rows, whole=True)
    x, y = rows.tensors
    own = torch.autograd.grad(lit.training_step((x, y), 0), list(lit.parameters()), allow_unused=True)
    read = reading.loss(reading.logits(x), y, reduction="none").mean()
    here = torch.autograd.grad(read, list(lit.parameters()), allow_unused=True)
    for one, other in zip(own, here, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    assert reading.convex


@pytest.mark.filterwarnings("ignore:The weights are not stationary")
@pytest.mark.parametrize("name", [n for n in HEADS if n not in ("linear", "subclass")])
def test_a_fit_and_a_request_of_a_whole_network(name: str) -> None:
    lit, rows = module(name), data()
    muter = MUterCallback(scope="all", verbose=False)
    attack = AdversarialTraining(LossAttack(BALL, None, steps=3))
    trainer = pl.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[attack, muter],
    )  # fmt: skip
    trainer.fit(lit, DataLoader(rows, 20, shuffle=True))
    assert muter.snapshot is not None
    assert set(muter.snapshot.parameters) == {n for n, _ in lit.named_parameters()}
    before = copy.deepcopy(lit.state_dict())
    unlearn(lit, muter.snapshot, [1, 2], rows)
    assert any(not torch.equal(v, before[n]) for n, v in lit.state_dict().items())


def ended(name: str, start: Tensor) -> tuple[Tensor, Tensor]:
    """All weights after polishing and after a request, from these on."""
    lit, rows = module(name), data()
    nn.utils.vector_to_parameters(start.clone(), lit.parameters())
    snapshot = take_snapshot(lit, rows, threat_model=BALL, weight_decay=DECAY, scope="all", polish=10, progress=False)
    polished = nn.utils.parameters_to_vector(lit.parameters()).detach().clone()
    unlearn(lit, snapshot, [7], rows)
    return polished, nn.utils.parameters_to_vector(lit.parameters()).detach()


@pytest.mark.filterwarnings("ignore:The weights are not stationary")
def test_the_same_function_written_in_two_ways_ends_at_the_same_weights() -> None:
    start = nn.utils.parameters_to_vector(module("linear").parameters()).detach()
    one, other = ended("linear", start), ended("1x1 convolution", start)
    assert (one[0] - start).norm() > 0.01
    assert (one[1] - one[0]).norm() > 1e-3
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_a_heads_own_snapshot(name: str) -> None:
    lit, why = module(name), HEADS[name][1]
    if why is None:
        reading = read_objective(lit, data())
        assert reading.head.name.startswith("net.2")
        return
    with pytest.raises(UnsuitableError, match=why) as told:
        take_snapshot(lit, data(), threat_model=BALL, weight_decay=DECAY, progress=False)
    assert name == "two ways" or "scope='all'" in str(told.value)


def test_what_was_read_of_a_whole_network_is_no_head() -> None:
    lit, rows = module("own"), data()
    reading = read_objective(lit, rows, whole=True)
    with pytest.raises(UnsuitableError, match=r"'net\.2', which is no linear head"):
        take_snapshot(lit, rows, threat_model=BALL, weight_decay=DECAY, reading=reading, progress=False)


def test_what_has_no_linear_layer_at_all() -> None:
    class Convolutional(Lit):
        def __init__(self) -> None:
            super().__init__(nn.Linear)
            self.net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), Own(6, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, None])

    lit = Convolutional().double()
    with pytest.raises(UnsuitableError, match=r"calls no nn.Linear.*scope='all'"):
        read_objective(lit, data())
    assert read_objective(lit, data(), whole=True).head.name == "net.3"
