"""Evaluation: inside the threat model, never weaker than the input itself, reproducible, leaving no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError
from lightning_muter.study.attacks import PGD, AutoAttack, stacked
from lightning_muter.study.data import DigitsDataModule
from lightning_muter.study.models import LogisticRegression, SmallCNN


@pytest.fixture
def cnn() -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN((1, 8, 8), 10, width=4, hidden=16).double()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return stacked(DigitsDataModule().test_dataset, torch.float64, list(range(40)))


@pytest.mark.parametrize("threat", [ThreatModel("l2", 0.5), ThreatModel("linf", 0.1)])
@pytest.mark.parametrize("restarts", [1, 3])
def test_found_points_are_admissible_and_hurt(cnn, batch, threat: ThreatModel, restarts: int) -> None:
    x, y = batch
    before, modes = torch.get_rng_state(), [m.training for m in cnn.modules()]
    found = PGD(10, restarts).adversarial(cnn, x, y, threat)
    delta = (found - x).flatten(1)
    size = delta.norm(dim=1) if threat.norm == "l2" else delta.abs().amax(1)
    assert float(size.max()) <= threat.eps * (1 + 1e-9)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    loss = [F.cross_entropy(PGD(1).logits(cnn, z), y, reduction="none") for z in (x, found)]
    assert (loss[1] >= loss[0]).all()
    assert loss[1].mean() > loss[0].mean() + 0.01
    torch.testing.assert_close(PGD(10, restarts).adversarial(cnn, x, y, threat), found, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in cnn.modules()] == modes
    assert all(p.grad is None for p in cnn.parameters())


def test_batches_change_nothing(cnn, batch) -> None:
    x, y = batch
    threat = ThreatModel("l2", 0.5)
    torch.testing.assert_close(
        PGD(5, batch_size=7).adversarial(cnn, x, y, threat), PGD(5).adversarial(cnn, x, y, threat)
    )
    torch.testing.assert_close(PGD(1, batch_size=7).logits(cnn, x), PGD(1).logits(cnn, x))


def test_more_starts_are_never_weaker(cnn, batch) -> None:
    x, y = batch
    threat = ThreatModel("linf", 0.2)
    losses = [
        F.cross_entropy(cnn.eval()(PGD(5, restarts).adversarial(cnn, x, y, threat)), y, reduction="none")
        for restarts in (1, 4)
    ]
    assert (losses[1] >= losses[0] - 1e-12).all()


def test_one_logit_linear_model_is_attacked_exactly() -> None:
    """The maximiser of a linear logistic loss is x - s eps w / ||w||, in closed form."""
    torch.manual_seed(0)
    model = LogisticRegression((6,)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    found = PGD(20).adversarial(model, x, y, ThreatModel("l2", 0.3, None), model.criterion)
    w = model.head.weight[0]
    sign = (2 * y - 1)[:, None]
    torch.testing.assert_close(found, x - sign * 0.3 * w / w.norm(), atol=1e-6, rtol=0)


def test_without_a_threat_nothing_moves(cnn, batch) -> None:
    x, y = batch
    assert PGD().adversarial(cnn, x, y, None) is x
    assert PGD().adversarial(cnn, x, y, ThreatModel("l2", 0.0)) is x


def test_autoattack_is_stronger_than_clean_and_refuses_tables(cnn, batch) -> None:
    x, y = batch[0][:6].float(), batch[1][:6]
    model = cnn.float()
    found = AutoAttack().adversarial(model, x, y, ThreatModel("linf", 0.3))
    assert (found - x).abs().max() <= 0.3 + 1e-6
    with pytest.raises(ArgumentError, match="pgd50"):
        AutoAttack().adversarial(model, x[:, 0], y, ThreatModel("linf", 0.3))
    with pytest.raises(ArgumentError, match="restarts"):
        PGD(5, 0)
