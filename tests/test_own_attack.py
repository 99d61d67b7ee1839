"""An attack written into the step: the loss of its last forward is what is read; a step that uses several outputs is refused."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_muter import ThreatModel, take_snapshot, unlearn
from lightning_muter.errors import UnsuitableError
from lightning_muter.model.read_step import read_batch


class Attacks(L.LightningModule):
    def __init__(self, both: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.both = nn.Linear(4, 3), both

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        delta = torch.zeros_like(x)
        for _ in range(3):
            delta.requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(self(x + delta), y), delta)
            delta = (delta + 0.1 * slope.sign()).clamp(-0.1, 0.1).detach()
        loss = 2 * F.cross_entropy(self(x + delta), y)
        return loss + F.cross_entropy(self(x), y) if self.both else loss


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(20, 4, generator=g), torch.arange(20) % 3)


def test_the_loss_of_the_last_forward_is_read_and_unlearned() -> None:
    module = Attacks()
    reading = read_batch(module, data()[:])
    assert (reading.identity, reading.uniform, reading.head.name) == ("torch.nn.functional.cross_entropy", 2.0, "head")
    snapshot = take_snapshot(
        module, data(), threat_model=ThreatModel("linf", 0.1, None), weight_decay=0.1, progress=False
    )
    assert snapshot.figures["stationarity_smoothed"] < 1e-3
    assert set(snapshot.sample_weight.tolist()) == {2.0}
    unlearn(module, snapshot, [1, 2], data(), progress=False)
    assert snapshot.forgotten == [1, 2]


def test_a_loss_of_two_outputs_is_refused() -> None:
    with pytest.raises(UnsuitableError, match="called 5 times"):
        read_batch(Attacks(both=True), data()[:])
