"""One descent to a stationary head, in a given metric: L-BFGS, or across the kinks between local maxima.

The initial inverse Hessian of every iteration is H^-1 (factored once), so the first step is the Newton step and the
later ones learn what H has missed. The line search asks for the weak Wolfe conditions by bisection, which also copes
with the kinks of a maximum (Lewis and Overton, 2013), on the true robust objective with the inner problem solved anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.head import RobustObjective

#: By how much the temperature falls at a time, and at most.
COOLING, COOLEST = 4.0, 1e-2
#: On the gap between maxima of weight: nothing is left to gain.
EQUAL = 1e-7

Metric = Callable[[Tensor], Tensor]
#: A step and the change of the gradient along it.
Pair = tuple[Tensor, Tensor]


@dataclass
class Descent:
    """Where a descent ended: theta, its evaluation, status, accepted steps, and the stationarity after each."""

    theta: Tensor
    evaluation: Evaluation
    status: str  # "converged", "capped", "stalled"
    steps: int
    history: list[float] = field(default_factory=list)


def descend(
    objective: RobustObjective,
    theta: Tensor,
    metric: Metric,
    *,
    max_steps: int,
    tolerance: float,
    memory: int = 30,
    first: Evaluation | None = None,
    learnt: list[Pair] | None = None,
    on_step: Callable[[int, Evaluation], None] | None = None,
) -> Descent:
    """Minimise from theta until |grad F| / sum |grad phi_i| <= tolerance, ``max_steps`` accepted steps, or a stall.

    ``learnt``: what an earlier descent in this metric learnt of the curvature; it is added to.
    """
    shape = theta.shape
    now = first or objective.evaluate(theta)
    objective.accept(now)
    pairs = [] if learnt is None else learnt
    history = [now.stationarity]
    steps, status, settled, noise = 0, "capped", 0, 0.0
    while steps < max_steps:
        if now.stationarity <= tolerance:
            status = "converged"
            break
        direction = -_two_loop(now.gradient.flatten(), pairs, metric)
        slope = float(direction @ now.gradient.flatten())
        if slope >= 0:
            pairs.clear()
            direction = -metric(now.gradient.flatten())
            slope = float(direction @ now.gradient.flatten())
            if slope >= 0:
                status = "stalled"
                break
        found = _weak_wolfe(objective, theta, now, direction.reshape(shape), slope, noise)
        if found is None:
            if not objective.reproducible and settled < 3:
                # the inner maxima here were still rising: compare like with like
                settled += 1
                again = objective.evaluate(theta)
                objective.accept(again)
                noise, now = abs(again.value - now.value), again
                if noise > 1e-7 * abs(now.value):
                    continue
            if pairs:
                pairs.clear()
                continue
            status = "stalled"
            break
        t, new = found
        s = t * direction
        y = (new.gradient - now.gradient).flatten()
        if float(s @ y) > 1e-14 * float(s.norm() * y.norm()):
            pairs.append((s, y))
            del pairs[:-memory]
        theta, now = theta + s.reshape(shape), new
        objective.accept(now)
        steps, settled, noise = steps + 1, 0, noise / 4
        history.append(now.stationarity)
        if on_step is not None:
            on_step(steps, now)
    else:
        status = "converged" if now.stationarity <= tolerance else "capped"
    return Descent(theta, now, status, steps, history)


def descend_contested(
    objective: RobustObjective,
    theta: Tensor,
    smooth: Metric,
    *,
    max_steps: int,
    tolerance: float,
    first: Evaluation,
    on_step: Callable[[int, Evaluation], None] | None = None,
) -> Descent:
    """As :func:`descend`, where several local maxima are nearly equal: each step minimises a model that holds the kinks between
    them as they are (`curvature.contest.Kinks`) beside the curvature of the rest, and weighs the maxima anew; for a linear model at
    a lower temperature where their values do not become equal fast enough (a multiplier moves by their difference over T).

    Args:
        smooth: H^-1 of the total Hessian without the kinks' share.
    """
    now, linear = objective.weigh(first), objective.problem.backbone.affine
    history, steps, status = [now.stationarity], 0, "capped"
    while True:
        if left_of(objective, now) <= tolerance:
            status = "converged"
        if status == "converged" or steps == max_steps:
            break
        gradient, kinks = now.gradient.flatten(), now.kinks
        if kinks is None:
            direction = -smooth(gradient)
        else:
            direction = kinks.step(gradient - kinks.gradient(kinks.shares()), smooth)
        slope = float(direction @ gradient)
        found = None if slope >= 0 else _weak_wolfe(objective, theta, now, direction.reshape(theta.shape), slope, 0.0)
        if found is None:
            status = "stalled"
            break
        t, new = found
        theta = theta + t * direction.reshape(theta.shape)
        if linear and new.gap > max(0.5 * now.gap, EQUAL):
            objective.cool(1 / COOLING, COOLEST)
        now = objective.weigh(new)
        steps += 1
        history.append(now.stationarity)
        if on_step is not None:
            on_step(steps, now)
    return Descent(theta, now, status, steps, history)


def left_of(objective: RobustObjective, now: Evaluation) -> float:
    """What is left to do. A network's maxima come and go on the way, so that their values are no measure."""
    return now.unsettled if objective.problem.backbone.affine else now.stationarity


def _two_loop(gradient: Tensor, pairs: list[Pair], metric: Metric) -> Tensor:
    q = gradient.clone()
    alphas = []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        q = q - alpha * y
        alphas.append(alpha)
    q = metric(q)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + (alpha - (y @ q) / (s @ y)) * s
    return q


def _weak_wolfe(
    objective: RobustObjective, theta: Tensor, now: Evaluation, direction: Tensor, slope: float, noise: float
) -> tuple[float, Evaluation] | None:
    """Bisection for F(t) <= F + 1e-4 t slope and slope(t) >= 0.9 slope; near the end, where differences of F are rounding,
    the slopes alone decide (Hager and Zhang's approximate condition).
    """
    low, high, t = 0.0, float("inf"), 1.0
    noise = max(noise, 1e-12 * abs(now.value))
    trials = 25 if objective.reproducible else 8
    best: tuple[float, Evaluation] | None = None
    for _ in range(trials):
        new = objective.evaluate(theta + t * direction)
        new_slope = float((new.gradient * direction).sum())
        enough = new.value <= now.value + 1e-4 * t * slope + (0.0 if objective.reproducible else noise)
        flat = new.value <= now.value + noise and abs(new_slope) <= 0.9 * abs(slope)
        if not torch.isfinite(new.gradient).all() or not (enough or flat):
            high = t
        elif new_slope < 0.9 * slope:
            low, best = t, (t, new)
        else:
            return t, new
        t = (low + high) / 2 if high < float("inf") else 2 * low
        if high - low <= 1e-10 * max(1.0, low):
            break
    return best


def jumped(followed: float, afresh: float) -> bool:
    """Whether F at the largest maxima lies above F at those that were followed on the way: two are equal in between."""
    return afresh > followed + 1e-6 * abs(followed)
