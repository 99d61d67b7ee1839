"""Training a head on by cutting sets: for a fixed backbone, of any kind, the robust objective is a maximum of convex functions.

    F(w) = sum_i w_i max_{d in B(x_i)} l(W phi(x_i + d) + b, y_i) + n/2 lam |w|^2   >=   the same over any d_ij that were found

Each pass asks an *oracle* for a worse perturbation of every sample under w (a few steps of ascent from the worst that is known, every
fourth pass from scratch) and gives its features to the *master* (`minimise.master`), whose minimiser is the next w. Cuts model
the kinks of F, on which line searches stall (Mutapcic and Boyd, Cutting-set methods for robust convex optimization with
pessimizing oracles, 2009). Ascents from the worst point alone stay at the maxima that are known; now and then from scratch is
needed, and enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.minimise.budget import FORWARD, Budget
from lightning_muter.minimise.master import Master
from lightning_muter.minimise.oracle import Ascent, Oracle

#: Cuts kept per sample.
KEEP = 6
#: An ascent from the worst cut; and one from scratch.
WARM, FAR = Ascent(2, 0.5, 0.6), Ascent(5, 0.5, 0.7)
#: Of four passes one is from scratch.
CYCLE = 4
#: Temperature of the master's soft maximum, over the mean loss.
TEMPERATURE = 0.1
#: Newton steps of the master per pass.
NEWTON = 2
#: log q of a cut that was just found, and of the least one that is protected.
_FRESH, _PROTECTED = math.log(0.1), math.log(1e-3)

#: What is told after each pass: its number, and the relative gap.
OnPass = Callable[[int, float], None]


@dataclass
class Cuts:
    """Up to ``KEEP`` perturbations of each of n samples and their features.

    Attributes:
        delta: (J, n, D) in half precision, in units of eps, as a snapshot stores them.
        phi: (J, n, f) in the backbone's dtype.
        log_prior: log q (J, n), -inf where there is no cut yet.
        y: labels.
    """

    delta: Tensor
    phi: Tensor
    log_prior: Tensor
    y: Tensor

    @classmethod
    def beginning(cls, delta: Tensor, phi: Tensor, y: Tensor, dtype: torch.dtype) -> Cuts:
        """With one cut of each sample."""
        none = torch.full((KEEP, len(delta)), -torch.inf, dtype=dtype, device=delta.device)
        cuts = cls(delta.new_zeros(KEEP, *delta.shape), phi.new_zeros(KEEP, *phi.shape), none, y)
        cuts.delta[0], cuts.phi[0], cuts.log_prior[0] = delta, phi, 0.0
        return cuts

    def put(self, losses: Tensor, delta: Tensor, phi: Tensor) -> None:
        """Keep a new cut of every sample in place of the one that matters least: unused, or of no weight and the smallest loss."""
        rank = torch.where(self.log_prior > _PROTECTED, losses + losses.abs().max() * 2 + 1, losses)
        slot = rank.argmin(0)
        at = torch.arange(len(slot), device=slot.device)
        self.delta[slot, at], self.phi[slot, at], self.log_prior[slot, at] = delta, phi, _FRESH
        self.log_prior = torch.log_softmax(self.log_prior, 0)


@dataclass
class Polished:
    """Where the cutting sets ended.

    Attributes:
        theta: the best head found.      value: F there, by the oracle.      bound: a lower bound of min F, by the cuts.
        status: "converged" (the gap is below the tolerance), "noise floor" (what an ascent from scratch finds beyond the known
            maxima is as large as what there is to gain), "budget" or "capped".
        before, after: stationarity at the start and at the end, the cuts being weighed.
        places, prior: the worst points (m, n, D) in units of eps, and their weights (m, n).
        history: of every pass, the gradients spent, F at its weights, the best F and the bound so far.
    """

    theta: Tensor
    value: float
    bound: float
    status: str
    passes: int
    before: float
    after: float
    places: Tensor
    prior: Tensor
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """(F - bound) / F."""
        return max(self.value - self.bound, 0.0) / max(abs(self.value), 1e-300)


@dataclass
class _Best:
    """The best head so far, and the largest losses of each sample seen there."""

    theta: Tensor
    losses: Tensor


class CuttingSets:
    """The method on one objective.

    Args:
        objective: of a nonlinear backbone; its smoothing is not used.
        budget: gradients per sample are counted and limited in it.
        first: perturbations (n, D) or (m, n, D) of this process's samples known beforehand, e.g. the last epoch's adversarial
            examples, or the local maxima that a snapshot stores.
    """

    def __init__(self, objective: RobustObjective, budget: Budget, first: Tensor | None = None) -> None:
        self.objective, self.budget, self.first = objective, budget, first
        self.problem = objective.problem
        self.oracle = Oracle(objective)
        self.penalty = objective.total * objective.decay

    def run(
        self, theta: Tensor, *, tolerance: float, max_passes: int = 10_000, on_pass: OnPass | None = None
    ) -> Polished:
        """Minimise from theta until the gap is at most ``tolerance`` after a look from scratch, or nothing more can be told."""
        cuts = self._first_cut(theta)
        before = self._stationarity(theta, cuts)
        best: _Best | None = None
        bound, reached, status = -math.inf, math.inf, "capped"
        history: list[dict[str, float]] = []
        while len(history) < max_passes:
            far = len(history) % CYCLE == CYCLE - 1
            ascent = FAR if far else WARM
            if not self.budget.affords(ascent.steps + FORWARD):
                status = "budget"
                break
            losses = self._losses(theta, cuts)
            known, worst = losses.max(0)
            start = None if far else cuts.delta[worst, torch.arange(len(worst), device=worst.device)]
            delta, phi, height = self.oracle.climb(theta, ascent, start)
            self.budget.spend(ascent.steps + FORWARD)
            now = torch.maximum(known, height)
            if best is not None:
                best.losses = torch.maximum(best.losses, self._loss(best.theta, phi, cuts.y))
            candidates = [(theta, now)] if best is None else [(theta, now), (best.theta, best.losses)]
            values = torch.stack([self._total(at, losses) for at, losses in candidates]).tolist()
            if best is None or values[0] < values[1]:
                best = _Best(theta, now)
            reached = min(values)
            history.append({"spent": self.budget.spent, "value": values[0], "best": reached, "bound": bound})
            gap = (reached - bound) / max(abs(reached), 1e-300)
            if on_pass is not None:
                on_pass(len(history), gap)
            if far and gap <= tolerance:
                status = "converged"
                break
            if far and _stuck(history):
                status = "noise floor"
                break
            cuts.put(losses, delta, phi)
            theta, bound = self._master(theta, cuts, NEWTON)
        theta = theta if best is None else best.theta
        places, prior = self._worst(theta, cuts)
        after = self._stationarity(theta, cuts)
        return Polished(theta, reached, bound, status, len(history), before, after, places, prior, history)

    def _first_cut(self, theta: Tensor) -> Cuts:
        if self.first is None:
            delta, phi, _ = self.oracle.climb(theta, FAR, None)
            self.budget.spend(FAR.steps + FORWARD)
        else:
            known = self.first[None] if self.first.dim() == 2 else self.first[:KEEP]
            delta, phi = self.oracle.at(known[0])
            self.budget.spend(FORWARD * len(known))
        cuts = Cuts.beginning(delta, phi, self.oracle.y, self.problem.dtype)
        for more in () if self.first is None else known[1:]:
            cuts.put(self._losses(theta, cuts), *self.oracle.at(more))
        return cuts

    def _master(self, theta: Tensor, cuts: Cuts, steps: int) -> tuple[Tensor, float]:
        """The next weights, and a lower bound of the least F."""
        losses = self._losses(theta, cuts)
        temperature = TEMPERATURE * self._total(theta, losses.amax(0)) / self.objective.count
        which, sample = torch.isfinite(losses).nonzero(as_tuple=True)
        master = Master(
            self.problem, cuts.phi[which, sample], cuts.y[sample], sample, cuts.log_prior[which, sample],
            self.oracle.weight, self.penalty, temperature, self.objective.added,
        )  # fmt: skip
        rest = theta.new_zeros(())
        for _ in range(steps):
            theta, rest = master.step(theta)
        bound = master.value(theta) - rest
        master.reweigh(theta)
        cuts.log_prior[which, sample] = master.log_prior
        return theta, float(bound)

    def _loss(self, theta: Tensor, phi: Tensor, y: Tensor) -> Tensor:
        return self.problem.losses(self.problem.logits(theta, phi.to(theta)), y)

    def _losses(self, theta: Tensor, cuts: Cuts) -> Tensor:
        """l_ij (J, n), -inf where there is no cut."""
        losses = torch.stack([self._loss(theta, phi, cuts.y) for phi in cuts.phi])
        return losses.masked_fill(torch.isinf(cuts.log_prior), -torch.inf)

    def _total(self, theta: Tensor, losses: Tensor) -> Tensor:
        """sum_i w_i losses_i + penalty."""
        weighed = self.objective.added((self.oracle.weight * losses).sum())
        return weighed + (self.penalty * theta.square()).sum() / 2

    def _shares(self, losses: Tensor, cuts: Cuts) -> Tensor:
        scale = self.objective.added(torch.stack([losses.amax(0).sum(), losses.new_tensor(float(losses.shape[1]))]))
        temperature = TEMPERATURE * scale[0] / scale[1].clamp(min=1)
        return torch.softmax(losses / temperature.clamp(min=1e-300) + cuts.log_prior, 0)

    def _stationarity(self, theta: Tensor, cuts: Cuts) -> float:
        """|grad F| / sum |grad phi_i| of the weighed cuts."""
        share = self._shares(self._losses(theta, cuts), cuts)
        gradient, scale = torch.zeros_like(theta), theta.new_zeros(())
        for phi, p in zip(cuts.phi, share, strict=True):
            rows = self.problem.augment(phi.to(theta))
            r = self.problem.terms(rows @ theta.T, cuts.y, curvature=False).r
            weighed = (self.oracle.weight * p)[:, None] * r
            gradient, scale = gradient + weighed.T @ rows, scale + (weighed.norm(dim=1) * rows.norm(dim=1)).sum()
        both = self.objective.added(torch.cat([gradient.flatten(), scale[None]]))
        gradient = both[:-1].reshape(theta.shape) + self.penalty * theta
        return float(gradient.norm() / both[-1].clamp(min=1e-300))

    def _worst(self, theta: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor]:
        """The worst points at theta, the worst first, and their weights."""
        losses = self._losses(theta, cuts)
        order = losses.argsort(0, descending=True)
        at = torch.arange(losses.shape[1], device=losses.device)
        return cuts.delta[order, at], self._shares(losses, cuts).gather(0, order)


def _stuck(history: list[dict[str, Any]]) -> bool:
    """Whether the bound has risen by less over the last two cycles than F still jumps from look to look."""
    if len(history) < 3 * CYCLE:
        return False
    recent = history[-2 * CYCLE :]
    values = [h["value"] for h in recent]
    jumps = max(values) - min(values)
    return bool(
        recent[-1]["bound"] - recent[0]["bound"] < 0.1 * jumps and recent[-1]["best"] >= recent[0]["best"] - 0.1 * jumps
    )
