"""How far smoothed switches leave the minimiser of a linear model from the robust one, and what requests make of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_muter import ThreatModel, take_snapshot, unlearn
from lightning_muter.curvature.inner.maximiser import Smoothing
from tests.fits import cancer
from tests.robust_minimum import ONE_LOGIT, robust_minimum

pytestmark = pytest.mark.benchmark
FORGET, DECAY = [3, 17, 40], 1e-2


def _weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("start", ["strong", "default"])
@pytest.mark.parametrize("eps", [0.02, 0.05])
@pytest.mark.parametrize("name", ONE_LOGIT)
def test_j_smoothing_in_removals(benchmark: Any, name: str, eps: float, start: str) -> None:
    """Ratio: distance of the polished head to the robust minimiser, over how far the removal moves that."""
    loss, of = ONE_LOGIT[name]
    table, labels = cancer()
    x, sign = table[:120].double(), 2.0 * labels[:120] - 1
    data = TensorDataset(x, (sign + 1) / 2 if name == "BCE" else sign)
    kept = [i for i in range(len(x)) if i not in FORGET]
    wanted, whole = (robust_minimum(x[i], sign[i], eps, DECAY, of) for i in (kept, range(len(x))))
    removal = float((wanted - whole).norm())
    net = nn.Sequential(nn.Linear(30, 1), nn.Flatten(0)).double()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    options: dict[str, Any] = {"loss": loss, "progress": False}
    smoothing = Smoothing(strength=1.25) if start == "strong" else None
    taken: list[Any] = []

    def run() -> None:
        threat = ThreatModel("linf", eps, None)
        taken.append(take_snapshot(net, data, threat_model=threat, weight_decay=DECAY, smoothing=smoothing, **options))

    benchmark.pedantic(run, rounds=1)
    found = {"passes": taken[0].figures["polish"]["passes"]}
    for refine in (0, 2):
        mine, stored = copy.deepcopy(net), copy.deepcopy(taken[0])
        result = unlearn(
            mine, stored, FORGET, data, retain=data, refine=refine, certify=True, accept="worse", **options
        )
        distance = float((_weights(mine) - wanted).norm())
        found |= {f"refine={refine}": distance / removal, f"bound/distance {refine}": result.bound / distance}
    benchmark.extra_info |= {"ratio": float((_weights(net) - whole).norm()) / removal, "aim": "-"} | found
