"""Every accepted way to write a loss, fitted: the head is stationary in the user's own step, and requests land at his minimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_muter import MUterCallback, ThreatModel, take_snapshot, unlearn
from tests.fits import short_trainer
from tests.forms import ACCEPTED, Form, of_step

N, FORGET = 40, [3, 17]
#: No minimum where the gradient vanishes: kinks at the optimum, or not convex.
KINKS = {"L1", "multi-margin", "two weighted losses of one kind"}
SMOOTH = [name for name, form in ACCEPTED.items() if form.convex and name not in KINKS]
QUICK = SMOOTH[::4]
quiet = pytest.mark.filterwarnings(
    "ignore:Unlearning, before the fit", "ignore:The loss", "ignore:Head scope", "ignore:The step"
)


def slope(form: Form, module: Any, rows: list[int]) -> tuple[float, Tensor]:
    """|grad| of the user's objective on these rows over their mean gradient's size (as stationarity is), and the gradient."""
    data = form.rows(N, 0, torch.float64)
    collate = form.collate or torch.utils.data.default_collate
    moved = module._apply_batch_transfer_handler(module._on_before_batch_transfer(collate([data[i] for i in rows])))
    _, total = of_step(module, moved)
    theta = torch.cat([p.detach().flatten() for p in module.head.parameters()])
    batches = len(rows) if form.denominator == "sum" else 1
    return float((total + batches * module.decay * theta).norm()), total


@quiet
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in SMOOTH])
def test_the_polished_head_is_stationary_in_the_users_step(name: str, tmp_path: Path) -> None:
    form = ACCEPTED[name]
    module = form.module(dtype=torch.float64, lr=0.02)
    data = form.rows(N, 0, torch.float64)
    threat = ThreatModel("l2", 0.0, None)
    if SMOOTH.index(name) % 2 == 0:
        muter = MUterCallback(threat_model=threat, verbose=False)
        loader: Any = DataLoader(data, 1 if form.denominator == "sum" else N, collate_fn=form.collate)
        short_trainer(tmp_path, muter, epochs=1).fit(module, loader)
        snapshot = muter.snapshot
        assert snapshot is not None
    else:
        snapshot = take_snapshot(
            module, data, threat_model=threat, weight_decay=module.decay, collate=form.collate, progress=False
        )
    every = list(range(N))
    first = max(1.0, float(slope(form, form.module(dtype=torch.float64), every)[1].norm()))
    assert slope(form, module, every)[0] <= 10 * max(snapshot.stationarity, 1e-9) * first * N
    unlearn(module, snapshot, FORGET, data, retain=data, refine=8, collate=form.collate, progress=False)
    kept = [i for i in every if i not in FORGET]
    assert slope(form, module, kept)[0] <= 1e-5 * first * N
