"""Polish and refine: stationary where that is possible, monotone where it is not, invariant where it must be."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import Smoothing
from lightning_muter.curvature.response.choose import as_response
from lightning_muter.minimise.descent import descend
from lightning_muter.minimise.polish import polish
from lightning_muter.solvers.dense import definite_inverse
from tests.cases import THREATS, case, make


@pytest.mark.parametrize("key", ["l2", "linf"])
@pytest.mark.parametrize(
    "name", ["linear-softmax-bias", "linear-smoothing", "affine-softmax-weighted", "affine-square-bias"]
)
def test_polish_ends_where_the_gradient_vanishes(name, key):
    one, threat = case(name), ThreatModel(THREATS[key].norm, 0.05, None)
    objective = one.objective(threat)
    start = one.problem().read_theta()
    done = polish(objective, start, as_response("auto", threat), tolerance=1e-8, max_passes=300)
    assert done.status == "converged"
    assert done.evaluation.stationarity <= 1e-8
    objective.restart()
    assert objective.evaluate(done.theta).stationarity < 1e-6  # and again from scratch
    # a minimum: nothing nearby is lower
    value = objective.evaluate(done.theta).value
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-1):
        step = scale * torch.randn(start.shape, generator=generator, dtype=torch.float64)
        assert objective.evaluate(done.theta + step).value > value


def test_polish_is_unique_from_any_start():
    """The objective is strongly convex: two starts, one end."""
    one, threat = case("linear-softmax-bias"), THREATS["l2"]
    ends = []
    for seed in (0, 1):
        start = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        objective = one.objective(threat)
        ends.append(polish(objective, start, as_response("auto", threat), tolerance=1e-9, max_passes=300).theta)
    assert (ends[0] - ends[1]).norm() < 1e-5 * ends[0].norm()


def test_values_never_rise_along_a_descent():
    one, threat = case("relu-softmax"), THREATS["l2-box"]
    objective = one.objective(threat)
    theta = one.problem().read_theta()
    sums, objective.delta = objective.sums(theta, response=as_response("auto", threat))
    assert sums.hessian is not None
    metric, _ = definite_inverse(sums.hessian.dense() + 0.1 * torch.eye(theta.numel(), dtype=torch.float64))
    first = objective.evaluation(theta, sums, objective.delta)
    seen = [first.value]
    found = descend(
        objective, theta, metric, max_steps=8, tolerance=1e-9, first=first, on_step=lambda _, e: seen.append(e.value)
    )
    assert len(seen) > 2
    assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(seen))
    assert len(found.history) == found.steps + 1


def test_first_step_on_a_quadratic_is_newton():
    one, threat = make("affine", "square"), ThreatModel("l2", 0.0)
    objective = one.objective(threat)
    theta = one.problem().read_theta()
    sums, objective.delta = objective.sums(theta, response=as_response("none", threat))
    assert sums.hessian is not None
    matrix = sums.hessian.dense() + len(one.x) * one.decay * torch.eye(theta.numel(), dtype=torch.float64)
    metric, shift = definite_inverse(matrix)
    found = descend(objective, theta, metric, max_steps=5, tolerance=1e-10)
    assert shift == 0
    assert (found.status, found.steps) == ("converged", 1)


def test_gradient_is_the_derivative_of_the_value():
    """Of the smoothed objective as of the plain one, the inner problem solved anew on both sides."""
    for name, key in (
        ("linear-softmax-bias", "l2-box"),
        ("affine-softmax-weighted", "linf-box"),
        ("smooth-binary-weighted", "l2"),
    ):
        one, threat = case(name), THREATS[key]
        theta = one.problem().read_theta()
        objective = one.objective(
            threat, smoothing=Smoothing(anchor=theta if threat.norm == "linf" else None, temperature=0.0)
        )
        gradient = objective.evaluate(theta).gradient
        v = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def value(t: float, objective=objective, theta: Tensor = theta, v: Tensor = v) -> float:
            return objective.evaluate(theta + t * v).value

        h = 1e-4
        slope = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
        assert slope == pytest.approx(float((gradient * v).sum()), rel=1e-6), name


def test_the_anchor_of_the_smoothing_follows_and_then_stays():
    one, threat = case("linear-softmax-bias"), THREATS["linf"]
    objective = one.objective(threat)
    start = one.problem().read_theta()
    objective.anchor(start)
    done = polish(objective, start, as_response("auto", threat), tolerance=1e-7, max_passes=300)
    anchor = objective.smoothing.anchor
    assert anchor is not None
    assert (anchor - done.theta).norm() <= 1e-2 * done.theta.norm()
    fixed = one.objective(threat, smoothing=copy.copy(objective.smoothing))
    polish(fixed, start, as_response("auto", threat), tolerance=1e-7, max_passes=60, anchored=True)
    assert fixed.smoothing.anchor is anchor
