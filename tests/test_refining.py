"""Refinement: the stored metric where it holds, a fresh one where a whole class went."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import Smoothing
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.unlearning import with_retained as unlearning
from lightning_muter.unlearning.unlearn import unlearn

CLASS = 3
BASE: dict[str, Any] = {"threat_model": ThreatModel("l2", 0.25), "weight_decay": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def world() -> tuple[nn.Linear, Snapshot, TensorDataset, Tensor]:
    """Softmax regression on 200 digits, stationary; and their labels."""
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(np.ascontiguousarray(x[:200] / 16.0)), torch.from_numpy(y[:200]))
    torch.manual_seed(0)
    net = nn.Linear(64, 10, dtype=torch.float64)
    return net, take_snapshot(net, data, **BASE), data, data.tensors[1]


def theta_of(net: nn.Linear) -> Tensor:
    return torch.cat([net.weight, net.bias[:, None]], 1).detach().clone()


def after(world: Any, forget: list[int], **options: Any) -> tuple[Tensor, Any]:
    net, snapshot, data, _ = world
    mine, taken = copy.deepcopy(net), copy.deepcopy(snapshot)
    result = unlearn(mine, taken, forget, data, retain=data, progress=False, **options)
    return theta_of(mine), result


def retrained(world: Any, forget: list[int]) -> Tensor:
    net, _, data, _ = world
    fresh = copy.deepcopy(net)
    nn.init.zeros_(fresh.weight)
    nn.init.zeros_(fresh.bias)
    take_snapshot(fresh, Subset(data, [i for i in range(len(data)) if i not in set(forget)]), tolerance=1e-8, **BASE)
    return theta_of(fresh)


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each pass that took a total Hessian went over."""
    taken: list[int] = []
    original = RobustObjective.sums

    def counted(self: RobustObjective, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("response") is not None:
            taken.append(self.count)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RobustObjective, "sums", counted)
    monkeypatch.setattr(unlearning, "certified_from_nearby", lambda *_, **__: None)  # it takes some of its own
    return taken


def test_a_whole_class_is_refined_in_a_fresh_metric(world: Any, hessians: list[int]) -> None:
    forget = (world[3] == CLASS).nonzero().flatten().tolist()
    end = retrained(world, forget)
    scale = float((end - theta_of(world[0])).norm())
    hessians.clear()
    distances, left = {}, len(world[2]) - len(forget)
    for steps in (0, 2, 6, 10):
        theta, result = after(world, forget, refine=steps)
        distances[steps] = float((theta - end).norm()) / scale
        assert len(result.refine) == steps or result.stationarity_after < 1e-9
    assert distances[0] > 0.3, distances  # no small change
    assert distances[2] < 0.5 * distances[0], distances
    assert distances[6] < 0.03, distances
    assert distances[10] < 1e-4, distances
    # one Hessian of the forgotten per request, one of what is left per two steps
    assert hessians.count(left) <= (2 + 6 + 10) // 2
    assert hessians.count(left) >= 4


def test_a_small_removal_needs_no_other_metric(world: Any, hessians: list[int]) -> None:
    _, result = after(world, [0, 50, 100], refine=3)
    assert hessians == [3]
    assert len(result.refine) == 3
    assert result.refine[-1] < 1e-2 * result.stationarity_before


def test_steps_are_counted_over_all_metrics(world: Any) -> None:
    forget = (world[3] == CLASS).nonzero().flatten().tolist()
    two, short = after(world, forget, refine=2)
    three, long = after(world, forget, refine=3)
    assert len(short.refine) == 2
    assert len(long.refine) == 3
    assert long.refine[:2] == short.refine
    assert not torch.equal(two, three)


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.225, None), ThreatModel("l2", 0.3, None)], ids=["linf", "l2"])
def test_steps_come_nearer_where_followed_maxima_are_not_the_largest(threat: ThreatModel) -> None:
    """Iris in wide balls: from scratch and followed along, the largest maxima of some flowers are not the same ones."""
    x, y = load_iris(return_X_y=True)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    data = TensorDataset(torch.from_numpy((x - x.mean(0)) / x.std(0))[order], torch.from_numpy(y)[order])
    options: dict[str, Any] = {"threat_model": threat, "weight_decay": 1e-3, "progress": False}
    net, again = nn.Linear(4, 3, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
    for parameter in (*net.parameters(), *again.parameters()):
        nn.init.zeros_(parameter)
    snapshot = take_snapshot(net, data, smoothing=Smoothing(strength=1.25), **options)
    forget = list(range(0, 150, 20))
    kept = [i for i in range(150) if i not in forget]
    smoothing = snapshot.smoothing if threat.norm == "linf" else None
    retrained = take_snapshot(again, Subset(data, kept), smoothing=smoothing, **options)
    assert max(s.figures["stationarity_smoothed"] for s in (snapshot, retrained)) < 1e-6
    wanted, distances = theta_of(again), []
    whole = float((theta_of(net) - wanted).norm())
    for refine in (0, 2, 5):
        head, stored = copy.deepcopy(net), copy.deepcopy(snapshot)
        unlearn(head, stored, forget, data, retain=data, refine=refine, progress=False)
        distances.append(float((theta_of(head) - wanted).norm()) / whole)
    assert distances[0] < 0.3
    assert distances[1] < 0.2 * distances[0]
    assert distances[2] < 2e-3
