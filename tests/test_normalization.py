"""Inputs that come normalised: the same training, snapshot and request as with the normalisation inside the model."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, LossAttack, MUterCallback, ThreatModel
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.model.normalization import Normalization, normalization_in

MEAN, STD = (0.4, 0.6), (0.2, 0.3)
OF = Normalization.of((MEAN, STD))


class Net(L.LightningModule):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = inside
        self.head = nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((OF.to_model(x) if self.inside else x).flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)


def images(normalised: bool) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(24, 2, 2, 2, generator=g, dtype=torch.float64)
    return TensorDataset(OF.to_model(x) if normalised else x, torch.arange(24) % 3)


def fitted(inside: bool) -> tuple[Net, MUterCallback]:
    net, muter = Net(inside), MUterCallback(verbose=False)
    attack = LossAttack(ThreatModel("linf", 8 / 255), steps=3, random_start=False)
    training = AdversarialTraining(attack, normalization=None if inside else (MEAN, STD))
    trainer = L.Trainer(
        max_epochs=3, callbacks=[training, muter], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, DataLoader(images(not inside), 8))
    return net, muter


def test_training_snapshot_and_request_do_not_depend_on_where_inputs_are_normalised() -> None:
    (one, first), (two, second) = fitted(inside=True), fitted(inside=False)
    torch.testing.assert_close(one.head.weight, two.head.weight, rtol=1e-8, atol=1e-10)
    assert second.snapshot.normalization == OF
    for net, muter in ((one, first), (two, second)):
        muter.unlearn(net, [1, 5])
    torch.testing.assert_close(one.head.weight, two.head.weight, rtol=1e-8, atol=1e-10)


def test_inputs_outside_the_box_are_refused_with_the_normalisation_that_was_found() -> None:
    data = images(normalised=True)
    data.transform = SimpleNamespace(transforms=[SimpleNamespace(mean=MEAN, std=STD)])  # as torchvision's Compose
    assert normalization_in(torch.utils.data.Subset(data, [0, 1])) == (MEAN, STD)
    training = AdversarialTraining(ThreatModel("linf", 8 / 255))
    trainer = L.Trainer(callbacks=[training, MUterCallback(verbose=False)], accelerator="cpu", logger=False, barebones=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1)  # fmt: skip
    with pytest.raises(UnsuitableError, match=r"pass normalization=\(\(0\.4, 0\.6\), \(0\.2, 0\.3\)\)"):
        trainer.fit(Net(inside=False), DataLoader(data, 8))


@pytest.mark.parametrize("given", [(0.5,), (0.5, 0.0), ("a", 1.0), ((0.1, 0.2), (1.0, 1.0, 1.0))])
def test_what_is_no_mean_and_deviation_is_refused(given: object) -> None:
    with pytest.raises(ArgumentError, match="normalization"):
        Normalization.of(given)
