"""The best of several heads by the robust objective itself, and the best one that answers the same whatever it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.inner.maximiser import Smoothing
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.minimise.train_on import TrainedOn

#: A head that is better than a constant one by less than this share of the objective has learnt nothing that the adversary leaves.
_NO_BETTER = 1e-3


@dataclass(frozen=True)
class Best:
    """Which head was kept ("polished", "before" or "constant"), and what F is there, before, and at the best constant head.

    Attributes:
        stopped: polish could go no further, short of a stationary head (an end of its budget says nothing).
    """

    theta: Tensor
    kept: str
    value: float
    before: float
    constant: float
    stopped: bool

    @property
    def is_constant(self) -> bool:
        """Whether no head that was found is better than a constant one: F has a kink there, where nothing becomes stationary."""
        return self.stopped and not self.value < self.constant * (1 - _NO_BETTER)

    def to_dict(self) -> dict[str, Any]:
        """For a snapshot's figures."""
        return {
            "kept": self.kept,
            "objective_before": self.before,
            "objective_after": self.value,
            "objective_constant": self.constant,
            "constant": self.is_constant,
        }


def best_head(objective: RobustObjective, before: Tensor, done: TrainedOn, *, constants: bool, anchored: bool) -> Best:
    """The best of the head before a polish and the one after it, by F without smoothing, evaluated anew (cutting sets have done so).

    A polish that converged may be above by what the smoothing adds to F, for that is what it minimised. ``objective`` is left at the
    maximisers of the head that is returned.

    Args:
        constants: polish could take its time: where it did not become stationary, the best constant head is compared too.
        anchored: the smoothing was given and stays.
    """
    fixed, constant = constant_head(objective)
    reached = float(done.figures["objective"])
    if done.as_found:
        at_first, at_last = float(done.figures["objective_before"]), reached
    else:
        exact = unsmoothed(objective)
        at_first = exact.evaluate(before, explore=True).value
        at_last = exact.evaluate(done.theta, explore=True).value
        objective.passes += exact.passes
    stationary = done.status == "converged"
    added = max(reached - at_last, 0.0) if stationary else 0.0
    allowed = at_last - added - rounding_of(objective, at_last)
    stopped = constants and not stationary and done.status != "budget"
    found = Best(done.theta, "polished", at_last, at_first, constant, stopped)
    if at_first < allowed:
        found = replace(found, theta=before, kept="before", value=at_first)
    if found.stopped and constant < min(allowed, found.value):
        found = replace(found, theta=fixed, kept="constant", value=constant)
    if found.kept != "polished":
        move_to(objective, found.theta, anchored=anchored)
        done.as_found = False
    return found


def move_to(objective: RobustObjective, theta: Tensor, *, anchored: bool = False) -> None:
    """Begin anew at another head: smoothing anchored there, unless it is given (nothing is smoothed at a constant one), maximisers
    from scratch.
    """
    if anchored:
        pass
    elif not bool(objective.problem.weight(theta).any()):
        objective.set_smoothing(replace(objective.smoothing, anchor=None))
    elif objective.smoothing.anchor is not None:
        objective.anchor(theta)
    objective.follow(None, contended=False)
    if not objective.reproducible:
        objective.accept(objective.evaluate(theta, explore=True))


def unsmoothed(objective: RobustObjective) -> RobustObjective:
    """F as it is: the largest loss in the ball, no switch smoothed, no maximum mixed with others."""
    plain = Smoothing(strength=0.0, bandwidth=0.0, anchor=None, temperature=0.0)
    linear = objective.problem.backbone.affine
    exact = replace(objective, smoothing=plain, contended=False, passes=0, cooling=1.0, _c={})
    if linear:
        exact.follow(None)
    return exact


def rounding_of(objective: RobustObjective, value: float) -> float:
    """How far two values of F may differ by rounding, and by inner maxima that sit on kinks."""
    backbone = objective.problem.backbone
    if backbone.piecewise_linear and not backbone.affine:
        return 1e-4 * abs(value)
    return (1e-9 if backbone.exact_dtype == torch.float64 else 1e-6) * abs(value)


def constant_head(objective: RobustObjective) -> tuple[Tensor, float]:
    """[0 | b] with the b that minimises sum_i w_i loss(b, y_i) + (n/2) sum lambda b^2, by Newton's method in K dimensions, and F
    there: no perturbation changes what a constant head answers.
    """
    problem = objective.problem
    batches = [(batch.y, batch.weight) for batch in objective.source.batches(objective.own)]
    theta = torch.zeros(problem.shape, dtype=problem.dtype, device=problem.device)
    penalty = objective.count * objective.decay[:, -1] if problem.has_bias else torch.zeros_like(theta[:, -1])

    def at(b: Tensor) -> tuple[float, Tensor, Tensor]:
        k = len(b)
        sums = torch.zeros(1 + k + k * k, dtype=problem.dtype, device=problem.device)
        for y, weight in batches:
            terms = problem.terms(b.expand(len(y), -1), y, weight)
            assert terms.hess is not None
            sums += torch.cat([terms.loss.sum()[None], terms.r.sum(0), terms.hess.sum(0).flatten()])
        sums = objective.added(sums)
        value = sums[0] + (penalty * b.square()).sum() / 2
        return float(value), sums[1 : 1 + k] + penalty * b, sums[1 + k :].reshape(k, k) + penalty.diag()

    b, value = _newton(at, theta[:, -1].clone()) if problem.has_bias else (theta[:, -1], at(theta[:, -1])[0])
    if problem.has_bias:
        theta[:, -1] = b
    return theta, value


def _newton(at: Callable[[Tensor], tuple[float, Tensor, Tensor]], b: Tensor) -> tuple[Tensor, float]:
    value, slope, curvature = at(b)
    for _ in range(30):
        ridge = 1e-9 * float(curvature.diagonal().abs().mean()) + 1e-12
        step = torch.linalg.lstsq(curvature + ridge * torch.eye(len(b)).to(b), -slope[:, None]).solution[:, 0]
        t = 1.0
        while t > 1e-6:
            new = at(b + t * step)
            if new[0] < value:
                break
            t /= 2
        else:
            break
        fall, b = value - new[0], b + t * step
        value, slope, curvature = new
        if fall <= 1e-12 * abs(value):
            break
    return b, value
