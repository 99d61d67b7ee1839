"""Several local maxima: the soft maximum's derivatives, steps across kinks, and what is kept of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.anderson import Anderson
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.objective.soft_maximum import Kinks
from lightning_muter.curvature.response.choose import as_response
from lightning_muter.minimise.descent import descend_contested
from lightning_muter.minimise.polish import polish
from lightning_muter.solvers.dense import definite_inverse
from tests.cases import case, make

WIDE = ThreatModel("l2", 0.9, None)


def contested(temperature: float = 0.3) -> tuple[RobustObjective, Tensor]:
    """A smooth network, right on clean samples, and a ball so wide that many of them have several maxima."""
    one = make("smooth", "softmax", n=24, seed=3, weighted=True)
    one = replace(one, y=one.net(one.x).argmax(1))
    objective = one.objective(WIDE, smoothing=Smoothing(temperature=temperature))
    objective.inner = InnerSolver(tolerance=1e-11, max_iter=2000)
    theta = 2 * one.problem().read_theta()
    first = objective.evaluate(theta, explore=True)
    assert first.kinks is not None
    assert len(first.kinks.rows) >= 3
    objective.accept(first)
    return objective, theta


def test_gradient_and_hessian_are_the_derivatives_of_the_soft_maximum():
    objective, theta = contested()
    sums, delta = objective.sums(theta, response=as_response("l2", WIDE))
    assert sums.hessian is not None
    at = objective.evaluation(theta, sums, delta)
    v = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = v / v.norm()
    h = 1e-5

    def side(t: float) -> tuple[float, Tensor]:
        found = objective.evaluate(theta + t * v)
        return found.value, found.gradient

    (up, g_up), (down, g_down) = side(h), side(-h)
    assert (up - down) / (2 * h) == pytest.approx(float((at.gradient * v).sum()), rel=1e-7)
    penalty = objective.count * objective.decay * v
    got = (sums.hessian.dense() @ v.flatten()).reshape(v.shape) + penalty
    wanted = (g_up - g_down) / (2 * h)
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_weights_are_renewed_without_another_pass():
    objective, theta = contested()
    at = objective.evaluate(theta)
    passes = objective.passes
    renewed = objective.weigh(at)
    assert objective.passes == passes
    again = objective.evaluate(theta)
    assert renewed.value == pytest.approx(again.value, rel=1e-10)
    torch.testing.assert_close(renewed.gradient, again.gradient, rtol=0, atol=1e-8 * float(again.gradient.norm()))
    # the soft maximum rises towards the largest, and stays below it
    assert at.kinks is not None
    assert at.value <= renewed.value + 1e-12
    assert renewed.kinks is not None
    largest = (renewed.kinks.weight * renewed.kinks.values.amax(1)).sum()
    assert float(renewed.kinks.total()) <= float(largest) + 1e-12


@pytest.mark.parametrize("temperature", [1.0, 0.05, 1e-3])
def test_a_step_across_kinks_minimises_its_model(temperature):
    generator = torch.Generator().manual_seed(1)
    c, j, p = 6, 3, 8
    values = torch.randn(c, j, generator=generator, dtype=torch.float64) * 0.3
    values[0, 2] = values[3, 1] = -math.inf
    gradients = torch.randn(c, j, p, generator=generator, dtype=torch.float64)
    kinks = Kinks(
        values,
        gradients,
        torch.full((c, j), 1 / 3, dtype=torch.float64),
        torch.rand(c, generator=generator, dtype=torch.float64) + 0.5,
        torch.arange(c),
        temperature,
    )
    root = torch.randn(p, p, generator=generator, dtype=torch.float64)
    hess = root @ root.T + torch.eye(p, dtype=torch.float64)
    rest = torch.randn(p, generator=generator, dtype=torch.float64)
    d = kinks.step(rest, lambda v: torch.linalg.solve(hess, v))
    moved = (gradients @ d).masked_fill(~torch.isfinite(values), 0.0)
    left = rest + hess @ d + kinks.gradient(kinks.shares(moved))
    assert left.norm() < 1e-6 * rest.norm()

    def model(step: Tensor) -> float:
        shift = (gradients @ step).masked_fill(~torch.isfinite(values), 0.0)
        return float(rest @ step + step @ hess @ step / 2 + kinks.total(shift))

    for _ in range(5):
        other = d + 0.1 * torch.randn(p, generator=generator, dtype=torch.float64)
        assert model(other) > model(d)


def test_the_adversary_ends_indifferent():
    """At the minimiser of the largest maximum two are equal: no single gradient vanishes there, but the weighted one does."""
    one = make("smooth", "softmax", n=24, seed=3)
    one = replace(one, y=one.net(one.x).argmax(1))
    threat = ThreatModel("l2", 0.4, None)
    ends = {}
    for temperature, scale in ((0.0, 1.0), (0.05, 1.0), (0.05, 0.0)):
        objective = one.objective(threat, smoothing=Smoothing(temperature=temperature))
        objective.inner = InnerSolver(max_iter=500)
        start = scale * one.problem().read_theta()
        ends[temperature, scale] = polish(objective, start, as_response("l2", threat), tolerance=1e-5, max_passes=80)
    hard, soft, other = ends.values()
    assert hard.evaluation.stationarity > 1e-4  # it stalls at the kink
    assert soft.status == other.status == "converged"
    kinks = soft.evaluation.kinks
    assert kinks is not None
    shares = kinks.shares()
    tied = shares > 0.02
    assert (tied.sum(1) > 1).any()
    gap = torch.where(tied, kinks.values, -math.inf).amax(1) - torch.where(tied, kinks.values, math.inf).amin(1)
    assert float(gap.max()) < 1e-3
    # the largest maximum is convex in the head: one end from any start, and the kinked descent is near it
    assert (soft.theta - other.theta).norm() < 1e-3 * soft.theta.norm()
    assert (hard.theta - soft.theta).norm() < 0.1 * soft.theta.norm()


def test_a_contested_descent_steps_across_the_kinks():
    objective, theta = contested(temperature=0.05)
    sums, delta = objective.sums(theta, response=as_response("l2", WIDE), explore=True)
    first = objective.evaluation(theta, sums, delta)
    assert sums.hessian is not None
    assert first.kinks is not None
    matrix = sums.hessian.dense()
    matrix -= first.kinks.stiffness()
    matrix.diagonal().add_((objective.count * objective.decay).flatten())
    smooth, _ = definite_inverse(matrix)
    seen: list[float] = []
    found = descend_contested(
        objective, theta, smooth, max_steps=4, tolerance=1e-9, first=first, on_step=lambda _, e: seen.append(e.value)
    )
    assert found.steps == len(seen) == len(found.history) - 1 >= 3
    assert found.evaluation.value < first.value - 0.05 * abs(first.value)


def test_what_is_stored_brings_the_same_sums_back():
    objective, theta = contested(temperature=0.05)
    objective.weigh(objective.evaluate(theta))
    stored = objective.stored_starts()
    assert stored is not None
    assert stored.dtype == torch.float16
    assert stored.shape[1] > 1
    before, _ = objective.sums(theta, response=as_response("l2", WIDE))
    objective.restore(stored)
    after, _ = objective.sums(theta, response=as_response("l2", WIDE))
    assert before.hessian is not None
    assert after.hessian is not None
    torch.testing.assert_close(before.gradient, after.gradient, rtol=0, atol=0)
    torch.testing.assert_close(before.hessian.blocks, after.hessian.blocks, rtol=0, atol=0)
    # in parts as in one: a forgotten sample is subtracted as it was added
    parts = []
    for rows in (range(10), range(10, 24)):
        part, _ = contested(temperature=0.05)
        part.positions = list(rows)
        part.restore(stored[list(rows)])
        parts.append(part.sums(theta, response=as_response("l2", WIDE))[0])
    total = parts[0].hessian.blocks + parts[1].hessian.blocks  # type: ignore[union-attr]
    assert (total - before.hessian.blocks).abs().max() < 1e-10 * before.hessian.blocks.abs().max()


def test_a_linear_model_takes_the_largest_maximum():
    one = case("linear-softmax-bias")
    objective = one.objective(WIDE, smoothing=Smoothing(temperature=0.5))
    at = objective.evaluate(one.problem().read_theta())
    assert at.kinks is None
    assert at.share is None


def test_anderson_ends_a_linear_iteration_in_as_many_steps_as_dimensions():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 3, 3, generator=generator, dtype=torch.float64)
    matrix = 0.95 * matrix / torch.linalg.matrix_norm(matrix, 2)[:, None, None]
    b = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - matrix, b)
    rows, point = torch.arange(7), torch.zeros(7, 3, dtype=torch.float64)
    memory = Anderson(point)
    for _ in range(5):
        image = (matrix @ point[:, :, None])[:, :, 0] + b
        point, mixed = memory.mix(rows, point, image)
    assert mixed.all()
    assert (point - exact).norm() < 1e-6 * exact.norm()
    memory.forget(rows[:2])
    image = (matrix @ point[:, :, None])[:, :, 0] + b
    _, mixed = memory.mix(rows, point, image)
    assert mixed.tolist() == [False] * 2 + [True] * 5
