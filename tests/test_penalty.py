"""An L2 penalty that a step adds by itself counts as weight decay, once, at every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_muter import MUterCallback, ThreatModel, refresh, take_wide_snapshot, unlearn
from lightning_muter.model.read_step import read_batch
from lightning_muter.preflight.optimizers import inspect_optimizers
from tests.fits import short_trainer
from tests.forms import ACCEPTED, Form

NO_BALL = ThreatModel("l2", 0.0, None)
N = 12
pytestmark = pytest.mark.filterwarnings("ignore")

OWN = Form(
    lambda m, b: F.cross_entropy(m(b[0]), b[1]) + 0.05 * m.head.weight.pow(2).sum() + 0.02 * m.head.bias.pow(2).sum()
)
DIVIDED = Form(lambda m, b: F.cross_entropy(m(b[0]), b[1]) + m.head.weight.pow(2).sum() / len(b[0]))


def test_it_is_added_to_what_the_optimiser_decays_and_stays_when_statistics_are_taken_again(tmp_path: Path) -> None:
    module, data = OWN.module(0, torch.float64, decay=0.01), OWN.rows(N, 0, torch.float64)
    muter = MUterCallback(threat_model=NO_BALL, verbose=False, budget=None)
    short_trainer(tmp_path, muter, epochs=1).fit(module, DataLoader(data, N))
    snapshot = muter.snapshot
    assert snapshot is not None
    assert torch.allclose(snapshot.decay[:, :-1], torch.full((3, 4), 0.11, dtype=torch.float64))
    assert torch.allclose(snapshot.decay[:, -1], torch.full((3,), 0.05, dtype=torch.float64))
    muter.unlearn(module, [1], retain=data, refine=2)
    again = refresh(module, muter.snapshot, data, progress=False)
    assert torch.equal(torch.as_tensor(again.decay), snapshot.decay)


def test_of_a_network_the_stored_decay_is_the_whole(tmp_path: Path) -> None:
    form = ACCEPTED["half the square of every parameter's norm"]
    module, data = form.module(5, torch.float64, act=nn.Tanh), form.rows(N, 0, torch.float64)
    module.requires_grad_(True)
    snapshot = take_wide_snapshot(module, data, scope="all", threat_model=NO_BALL, weight_decay=0.1, progress=False)
    assert list(snapshot.decay.values()) == pytest.approx([0.12] * 4)
    unlearn(module, snapshot, [1], data, retain=data, progress=False)
    assert refresh(module, snapshot, data, progress=False).decay == snapshot.decay


def test_divided_by_the_rows_of_a_batch_it_is_taken_for_batches_of_training() -> None:
    reading = read_batch(DIVIDED.module(), DIVIDED.batch(N, 0, torch.float32), rows_per_step=20)
    assert reading.penalty == {"head.weight": pytest.approx(0.1)}
    assert any("batches of 20 rows" in note for note in reading.notes)


def test_weights_are_what_they_were_and_graphs_of_before_still_hold() -> None:
    module = OWN.module()
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in module.named_parameters()}
    x = torch.rand(3, 4)
    value = module(x).square().sum()
    read_batch(module, OWN.batch(N, 0, torch.float32))
    value.backward()
    for name, p in module.named_parameters():
        same, place, values = before[name]
        assert p is same
        assert p.data_ptr() == place
        assert torch.equal(p, values)


def test_the_preflight_does_not_miss_a_decay_that_the_step_has() -> None:
    net: Any = nn.Linear(2, 2)
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    assert any("Weight decay is 0" in f.what for f in inspect_optimizers([plain], net, ["weight", "bias"]))
    own = {"weight": 0.1, "bias": 0.1}
    assert inspect_optimizers([plain], net, ["weight", "bias"], penalty=own) == []
