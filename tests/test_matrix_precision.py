"""Layers without rules of their own, whole networks in every precision: they unlearn, or are refused by name."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, MUterCallback, ThreatModel, take_snapshot, unlearn
from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.errors import UnsuitableError
from lightning_muter.model.modes import working_dtype
from lightning_muter.unlearning.result import UnlearnResult
from tests.backbones import OTHERS, PRECISIONS, Net, rows

NORMS = {"l2": ThreatModel("l2", 0.1), "linf": ThreatModel("linf", 0.03)}
quiet = pytest.mark.filterwarnings(
    "ignore:The head is not stationary",
    "ignore:The weights are not stationary",
    "ignore:The inner maximiser converged for",
    "ignore:Unlearning, before the fit starts.\n- weaker. Precision",
)


def _data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    return TensorDataset(rows()["x"].to(dtype), rows()["y"])


def _finite(net: nn.Module, result: UnlearnResult, dtype: torch.dtype) -> None:
    assert result.solver["status"] in ("converged", "flat", "capped")
    assert all(bool(torch.isfinite(p).all()) and p.dtype == dtype for p in net.parameters())


@quiet
@pytest.mark.parametrize(("backbone", "norm"), [(b, list(NORMS)[i % 2]) for i, b in enumerate(OTHERS)])
def test_functions_without_rules_of_their_own(backbone: str, norm: str) -> None:
    net, data = Net(backbone), _data()
    snapshot = take_snapshot(
        net,
        data,
        threat_model=NORMS[norm],
        weight_decay=0.1,
        polish=3,
        inner=InnerSolver(max_iter=20),
        progress=False,
    )
    result = unlearn(net, snapshot, [1], data, progress=False)
    _finite(net, result, torch.float32)
    assert 0 < result.step_norm < 10


def _whole_network(precision: str, backbone: str, norm: str) -> tuple[Net, MUterCallback]:
    net, muter = Net(backbone, scope="all"), MUterCallback(scope="all", polish=1, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AdversarialTraining(attack=NORMS[norm]), muter],
    )
    trainer.fit(net, DataLoader(_data(PRECISIONS[precision]), 12))
    return net, muter


WIDE = dict(zip(PRECISIONS, ["attention", "encoder", "Hardsigmoid", "LayerNorm"], strict=True))


@quiet
@pytest.mark.parametrize(("precision", "norm"), [(p, list(NORMS)[i % 2]) for i, p in enumerate(PRECISIONS)], ids=str)
def test_a_whole_network_unlearns(precision: str, norm: str) -> None:
    net, muter = _whole_network(precision, WIDE[precision], norm)
    _finite(net, muter.unlearn(net, [1]), PRECISIONS[precision])


def test_no_second_derivative_is_refused_by_name_beyond_the_head() -> None:
    with pytest.raises(UnsuitableError, match="differentiable once only"):
        _whole_network("64-true", "once", "l2")


def test_sixteen_bits_are_run_in_thirty_two() -> None:
    given = (torch.float16, torch.bfloat16, torch.float64)
    assert [working_dtype(t) for t in given] == [torch.float32, torch.float32, torch.float64]


def test_a_forward_that_insists_on_its_dtype_is_refused_by_name() -> None:
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.bfloat16())

    with pytest.raises(UnsuitableError, match=r"in torch.bfloat16 and cannot be run in torch.float32"):
        take_snapshot(Insists().bfloat16(), _data(), threat_model=NORMS["l2"], weight_decay=0.1)
