"""What adversarial training raises: the step's own loss by default; the attack library's with maximise="attack", which is said."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, MUterCallback
from lightning_muter.errors import ArgumentError

N, EPS = 24, 0.1
Loss = Callable[[Tensor, Tensor], Tensor]


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


X = draw(N, 1, 4, 4)
STEPS: dict[str, tuple[Loss, int, Tensor]] = {
    "BCE, multi-label": (F.binary_cross_entropy_with_logits, 3, (draw(N, 3) > 0.5).float()),
    "MSE, several": (F.mse_loss, 3, draw(N, 3)),
    "MSE, one": (lambda z, y: F.mse_loss(z[:, 0], y), 1, draw(N)),
    "cross-entropy": (F.cross_entropy, 3, torch.arange(N) % 3),
}


class Net(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss, classes, _ = STEPS[name]
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
        self.met: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.met.append(batch[0].detach())
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0, weight_decay=1e-2)


def attacked(name: str, maximise: Any) -> tuple[Net, MUterCallback, list[str]]:
    net, muter = Net(name), MUterCallback(verbose=False, polish=0)
    pgd = functools.partial(torchattacks.PGD, eps=EPS, alpha=EPS / 2, steps=5, random_start=False)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [AdversarialTraining(pgd, maximise=maximise), muter]
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(net, DataLoader(TensorDataset(X, STEPS[name][2]), N))
    return net, muter, [str(w.message) for w in said]


@pytest.mark.parametrize("name", STEPS)
def test_the_loss_of_the_step_is_raised_from_the_first_batch_on(name: str) -> None:
    """Of a linear model, to its largest value in the box that a signed slope finds."""
    net, muter, _ = attacked(name, "step")
    loss, _, y = STEPS[name]
    assert muter.snapshot is not None
    net.requires_grad_(False)
    before, at = float(loss(net(X), y)), X.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(loss(net(at), y), at)
    corner = (X + EPS * slope.sign()).clamp(0, 1)
    assert float((net.met[-1] - X).abs().max()) <= EPS + 1e-6
    reached = float(loss(net(net.met[-1]), y))
    assert reached >= before + 0.9 * (float(loss(net(corner), y)) - before) > before


@pytest.mark.parametrize("name", ["BCE, multi-label", "MSE, several"])
def test_the_librarys_own_loss_is_raised_where_that_is_asked_for_and_it_is_said(name: str) -> None:
    _, _, said = attacked(name, "attack")
    assert any("Training raises torch.nn.functional.cross_entropy and minimises" in text for text in said)
    assert any("--trainer.callbacks.maximise step" in text for text in said)


def test_where_the_librarys_loss_is_none_it_is_refused() -> None:
    with pytest.raises(ArgumentError, match="one logit"):
        attacked("MSE, one", "attack")


def test_cross_entropy_steps_are_what_the_library_raises() -> None:
    *_, said = attacked("cross-entropy", "attack")
    assert not any("Training raises" in text for text in said)
