"""Every accepted way to write a loss, fitted: the head is stationary in the user's own step, and requests land at his minimiser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muter import MUterCallback, take_snapshot, unlearn
from lightning_muter.adversarial.threat_model import ThreatModel
from tests.fits import short_trainer
from tests.forms import ACCEPTED, Form
from tests.oracle import at_the_worst

N, FORGET = 40, [3, 17]
#: No minimum where the gradient vanishes: kinks at the optimum, or not convex.
KINKS = {"L1", "multi-margin", "two weighted losses of one kind"}
SMOOTH = [name for name, form in ACCEPTED.items() if form.convex and name not in KINKS]
#: Where more is left than is reported: maxima of a network that are equal are mixed at a temperature, which counts those a thousandth
#: apart; and a step that clamps its inputs has kinks in the ball.
LEFT = {
    ("MSE, one", "Tanh, L2"): 2e-4,
    ("MSE, one, labels (n, 1)", "Tanh, L2"): 2e-4,
    ("squeeze", "Tanh, L2"): 2e-4,
    ("clamped, squared inputs", "linear, L2"): 1e-5,
    ("clamped, squared inputs", "Tanh, L2"): 1e-5,
    ("clamped, squared inputs", "ReLU, L2"): 2e-5,
    ("clamped, squared inputs", "ReLU, Linf"): 1e-4,
}
quiet = pytest.mark.filterwarnings(
    "ignore:Unlearning, before the fit",
    "ignore:The loss",
    "ignore:Head scope",
    "ignore:The step",
    "ignore:The head is not",
    "ignore:The inner maximiser",
    "ignore:The robust optimum is a constant",
)


class Setting(NamedTuple):
    """Model and ball; the least subgradient is at most ten times the reported one, which is told to ``floor`` at best."""

    hidden: int
    act: type[nn.Module]
    threat: ThreatModel
    floor: float


def _ball(norm: Any, eps: float) -> ThreatModel:
    return ThreatModel(norm, eps, None)


SETTINGS = {
    "linear, no ball": Setting(0, nn.ReLU, _ball("l2", 0.0), 1e-8),
    "linear, L2": Setting(0, nn.ReLU, _ball("l2", 0.05), 1e-7),
    "ReLU, no ball": Setting(5, nn.ReLU, _ball("l2", 0.0), 1e-8),
    "Tanh, L2": Setting(5, nn.Tanh, _ball("l2", 0.05), 1e-7),
    "linear, Linf": Setting(0, nn.ReLU, _ball("linf", 0.05), 1e-6),
    "ReLU, L2": Setting(5, nn.ReLU, _ball("l2", 0.05), 1e-7),
    "ReLU, Linf": Setting(5, nn.ReLU, _ball("linf", 0.05), 1e-6),
    "Tanh, Linf": Setting(5, nn.Tanh, _ball("linf", 0.05), 1e-6),
}


def _all(form: Form, module: Any, rows: list[int]) -> Any:
    """These rows as the step receives them."""
    data = form.rows(N, 0, torch.float64)
    collate = form.collate or torch.utils.data.default_collate
    return module._apply_batch_transfer_handler(module._on_before_batch_transfer(collate([data[i] for i in rows])))


def _worst(
    form: Form, module: Any, rows: list[int], threat: ThreatModel, starts: Tensor | None = None
) -> tuple[float, float]:
    """The least subgradient of the user's objective on these rows, and sum |grad phi_i|."""
    decay = module.decay * (len(rows) if form.denominator == "sum" else 1)
    # a few ascents do not find what many found: the judge climbs from there too
    also = None if starts is None else starts[:, :, :-1].transpose(0, 1)
    return at_the_worst(module, _all(form, module, rows), decay=decay, norm=threat.norm, eps=threat.eps, also=also)


def _cells() -> list[Any]:
    every = [(name, setting) for name in SMOOTH for setting in SETTINGS]
    few = list(SETTINGS)[:5]  # balls around ReLU, and boxes around networks, take many ascents to judge
    quick = {(name, few[i // 3 % len(few)]) for i, name in enumerate(SMOOTH) if i % 3 == 0}
    quick |= {("cross-entropy", setting) for setting in SETTINGS}
    return [pytest.param(*cell, marks=[] if cell in quick else [pytest.mark.slow]) for cell in every]


@quiet
@pytest.mark.parametrize(("name", "setting"), _cells())
def test_the_polished_head_is_stationary_in_the_users_step(name: str, setting: str, tmp_path: Path) -> None:
    form, (hidden, act, threat, floor) = ACCEPTED[name], SETTINGS[setting]
    module = form.module(hidden, torch.float64, lr=0.02, act=act)
    data = form.rows(N, 0, torch.float64)
    if SMOOTH.index(name) % 4 == 0:
        muter = MUterCallback(threat_model=threat, verbose=False, budget=None)
        loader: Any = DataLoader(data, 1 if form.denominator == "sum" else N, collate_fn=form.collate)
        short_trainer(tmp_path, muter, epochs=1).fit(module, loader)
        assert muter.snapshot is not None
        snapshot = muter.snapshot
    else:
        snapshot = take_snapshot(
            module, data, threat_model=threat, weight_decay=module.decay, collate=form.collate, progress=False
        )
    slope, scale = _worst(form, module, list(range(N)), threat, snapshot.starts)
    assert slope <= 10 * max(snapshot.stationarity, LEFT.get((name, setting), floor)) * scale, (
        slope / scale,
        snapshot.stationarity,
    )


@quiet
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SMOOTH[::4] else [pytest.mark.slow]) for n in SMOOTH]
)
def test_a_refined_request_ends_at_the_minimiser_of_the_users_step_on_the_retained_rows(name: str) -> None:
    form, threat = ACCEPTED[name], _ball("l2", 0.0)
    module, data = form.module(0, torch.float64), form.rows(N, 0, torch.float64)
    snapshot = take_snapshot(
        module, data, threat_model=threat, weight_decay=module.decay, collate=form.collate, progress=False
    )
    unlearn(module, snapshot, FORGET, data, retain=data, refine=8, collate=form.collate, progress=False)
    slope, scale = _worst(form, module, [i for i in range(N) if i not in FORGET], threat)
    assert slope <= 1e-6 * scale


def _head(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.head.parameters()]).double()


@quiet
@pytest.mark.parametrize("case", [pytest.param(i, marks=[] if i % 12 == 0 else [pytest.mark.slow]) for i in range(100)])
def test_a_certificate_is_never_below_the_distance_to_the_users_minimiser(case: int) -> None:
    """His minimiser is not known exactly: it is at most its own least subgradient / lambda away from where refinement ended."""
    drawn = torch.Generator().manual_seed(case)
    name = SMOOTH[int(torch.randint(len(SMOOTH), (), generator=drawn))]
    form, eps = ACCEPTED[name], [0.0, 0.02, 0.1][case % 3]
    forget = torch.randperm(N, generator=drawn)[: int(torch.randint(1, 7, (), generator=drawn))].tolist()
    module, threat = form.module(0, torch.float64), _ball("l2", eps)
    data, rest = form.rows(N, 0, torch.float64), [i for i in range(N) if i not in forget]
    snapshot = take_snapshot(
        module, data, threat_model=threat, weight_decay=module.decay, collate=form.collate, progress=False
    )
    result = unlearn(
        module,
        snapshot,
        forget,
        data,
        retain=data,
        certify=True,
        accept="worse",
        collate=form.collate,
        progress=False,
    )
    after = _head(module)
    retained = torch.utils.data.Subset(data, rest)
    reference = take_snapshot(
        module, retained, threat_model=threat, weight_decay=module.decay, collate=form.collate, progress=False
    )
    slope, _ = _worst(form, module, rest, threat, reference.starts)
    decay = module.decay * (len(rest) if form.denominator == "sum" else 1)
    distance = float((after - _head(module)).norm())
    assert math.isfinite(distance)
    if result.bound is None:  # nothing is claimed of an input that the step squares
        assert any("certificate" in w for w in result.warnings)
    else:
        assert slope / decay <= max(1e-5, 0.2 * distance), "the reference is no reference"
        assert result.bound >= distance - slope / decay
