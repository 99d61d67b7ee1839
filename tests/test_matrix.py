"""Precision x backbone x norm x loss x door: a cell unlearns with the step's own objective, and no raw error comes out of any."""

from __future__ import annotations

import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, MUterCallback, ThreatModel, take_snapshot, unlearn
from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.model.read_step import read_batch
from tests.backbones import BACKBONES, LOSSES, PRECISIONS, Net, rows
from tests.forms import of_step
from tests.readings import of_reading

NORMS, DOORS = ("l2", "linf"), ("callback", "functional")
NEAR = {torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-9}
Cell = tuple[str, str, str, str, str]


def _every() -> list[Cell]:
    return list(itertools.product(PRECISIONS, BACKBONES, NORMS, LOSSES, DOORS))


def _quick() -> list[Cell]:
    """Every pair of values of two of the five meets in one cell at least."""
    return [
        (list(PRECISIONS)[(i + j) % 4], backbone, NORMS[(i // 2 + j) % 2], loss, DOORS[(i // 4 + j // 2) % 2])
        for i, backbone in enumerate(BACKBONES)
        for j, loss in enumerate(LOSSES)
    ]


def _unlearned(cell: Cell) -> None:
    precision, backbone, norm, loss, door = cell
    dtype, net = PRECISIONS[precision], Net(backbone, loss)
    x, t = rows()["x"], rows()[net.target]
    data = TensorDataset(x.to(dtype), t.to(dtype) if t.is_floating_point() else t)
    threat = ThreatModel(norm, 0.1 if norm == "l2" else 0.03)
    if door == "callback":
        muter = MUterCallback(polish=3, verbose=False)
        trainer = pl.Trainer(
            max_epochs=1,
            precision=precision,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[AdversarialTraining(attack=threat), muter],
        )
        trainer.fit(net, DataLoader(data, len(data)))
        snapshot = muter.snapshot
        assert snapshot is not None
        result = muter.unlearn(net, [1])
    else:
        net.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            snapshot = take_snapshot(
                net,
                data,
                threat_model=threat,
                weight_decay=0.1,
                polish=3,
                inner=InnerSolver(max_iter=20),
                progress=False,
            )
            result = unlearn(net, snapshot, [1], data, progress=False)
    assert result.solver["status"] in ("converged", "flat", "capped")
    assert 0 < result.step_norm < 10
    assert all(bool(torch.isfinite(p).all()) and p.dtype == dtype for p in net.parameters())
    _is_the_steps(net, snapshot.loss_name, dtype, data)


def _is_the_steps(net: Net, unlearned: str, dtype: torch.dtype, data: TensorDataset) -> None:
    """The loss of the snapshot, at the weights at hand and at moved ones, is the step's in value and gradient."""
    net.eval()
    batch = [torch.stack(column) for column in zip(*(data[i] for i in range(len(data))), strict=True)]
    reading = read_batch(net, batch)
    assert reading.identity == unlearned
    moved = torch.Generator().manual_seed(1)
    for size in (0.0, 0.5):
        with torch.no_grad():
            for p in net.head.parameters():
                p.add_(size * torch.randn(p.shape, generator=moved).to(dtype))
        value, slope = of_step(net, batch)
        read, read_slope = of_reading(reading, batch)
        assert abs(float(value) - float(read)) <= NEAR[dtype] * max(1.0, abs(float(value)))
        assert float((slope - read_slope).norm()) <= NEAR[dtype] * max(float(slope.norm()), 0.1)


quiet = pytest.mark.filterwarnings(
    "ignore:The head is not stationary",
    "ignore:The inner maximiser converged for",
    "ignore:Unlearning, before the fit starts.\n- weaker. Precision",
    "ignore:Unlearning, before the fit starts.\n- weaker. The loss divides by the weights",
    "ignore:The loss divides by the weights",
)


@quiet
@pytest.mark.parametrize("cell", _quick(), ids="-".join)
def test_a_cell_unlearns_the_steps_objective(cell: Cell) -> None:
    _unlearned(cell)


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("cell", _every(), ids="-".join)
def test_every_cell_unlearns_the_steps_objective(cell: Cell) -> None:
    _unlearned(cell)
