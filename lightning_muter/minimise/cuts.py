"""Training a head on by cutting sets: for a fixed backbone, of any kind, the robust objective is a maximum of convex functions.

    F(w) = sum_i w_i max_{d in B(x_i)} l(W phi(x_i + d) + b, y_i) + n/2 lam |w|^2   >=   the same over any d_ij that were found

Each pass asks an *oracle* for a worse perturbation of every sample under w (a few steps of ascent from the worst that is known, every
fourth pass from scratch) and gives its features to the *master* (:mod:`lightning_muter.minimise.master`), whose minimiser is
the next w. Cuts model the kinks of F, on which line searches stall (Mutapcic and Boyd, Cutting-set methods for robust convex
optimization with pessimizing oracles, 2009). Ascents from the worst point alone stay at the maxima that are known; now and then from
scratch is needed, and enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.head import HeadProblem, derivatives
from lightning_muter.minimise.budget import FORWARD, Budget
from lightning_muter.minimise.master import Master

#: Cuts kept per sample.
KEEP = 6
#: Steps, first length in units of eps and shrinkage of an ascent from the worst cut; and of one from scratch.
WARM, FAR = (2, 0.1, 0.8), (8, 0.25, 0.85)
#: Of four passes one is from scratch.
CYCLE = 4
#: Temperature of the master's soft maximum, over the mean loss.
TEMPERATURE = 0.02
#: Newton steps of the master per pass.
NEWTON = 3
MARGIN = 1e9
#: log q of a cut that was just found.
_FRESH = math.log(0.1)
#: Images at a time where a cache, not a device, sets the pace.
_CHUNK = 128


@dataclass
class Cuts:
    """Up to ``KEEP`` perturbations of each of n samples and their features.

    Attributes:
        delta: (J, n, D) in half precision, in units of eps, as a snapshot stores them.
        phi: (J, n, f) in the backbone's dtype.
        log_prior: log q (J, n), -inf where there is no cut yet.
    """

    delta: Tensor
    phi: Tensor
    log_prior: Tensor
    y: Tensor
    weight: Tensor

    def losses(self, problem: HeadProblem, theta: Tensor) -> Tensor:
        """l_ij (J, n), -inf where there is no cut."""
        out = [problem.losses(problem.logits(theta, phi.to(theta)), self.y) for phi in self.phi]
        return torch.stack(out).masked_fill(torch.isinf(self.log_prior), -torch.inf)

    def put(self, losses: Tensor, delta: Tensor, phi: Tensor) -> None:
        """Keep a new cut of every sample in place of the one that matters least."""
        empty = torch.isinf(self.log_prior)
        rank = torch.where(empty, -torch.inf, losses + 1e3 * (self.log_prior > math.log(1e-3)))
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
        places, prior: worst points (m, n, D) in units of eps, and their weights (m, n).
    """

    theta: Tensor
    value: float
    bound: float
    status: str
    passes: int
    places: Tensor
    prior: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gap(self) -> float:
        return max(self.value - self.bound, 0.0) / max(abs(self.value), 1e-300)


class CuttingSets:
    """The method on one objective.

    Args:
        objective: nonlinear backbone; its smoothing is not used.
        budget: gradients per sample are counted and limited in it.
        first: perturbations (n, D) of this process's samples known beforehand, e.g. the last epoch's adversarial examples.
    """

    def __init__(self, objective: RobustObjective, budget: Budget, first: Tensor | None = None) -> None:
        self.objective, self.budget, self.first = objective, budget, first
        self.problem, self.threat = objective.problem, objective.threat
        self.batches = [_Part(at, x, y) for at, x, y in self._read()]
        self.n = len(objective.own)

    def _read(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        done = 0
        weights: list[Tensor] = []
        size = _CHUNK if self.problem.device.type == "cpu" else 1 << 30
        for batch in self.objective.source.batches(self.objective.own):
            ones = torch.ones(len(batch.x), dtype=self.problem.dtype, device=self.problem.device)
            weights.append(ones if batch.weight is None else batch.weight.to(ones))
            for x, y in zip(batch.x.split(size), batch.y.split(size), strict=True):
                yield slice(done, done + len(x)), x.to(self.problem.backbone.exact_dtype), y
                done += len(x)
        self.weight = torch.cat(weights) if weights else torch.zeros(0, dtype=self.problem.dtype)

    def run(
        self,
        theta: Tensor,
        *,
        tolerance: float,
        max_passes: int = 10_000,
        on_pass: Callable[[int, float, float], None] | None = None,
    ) -> Polished:
        """Minimise from theta until the gap is at most ``tolerance`` after a look from scratch."""
        problem, objective = self.problem, self.objective
        penalty = objective.count * objective.decay
        cuts = self._first_cut(theta)
        history: list[dict[str, Any]] = []
        best: tuple[Tensor, Tensor] | None = None  # theta, worst losses seen there
        bound, status, k = -math.inf, "capped", 0

        def total(values: Tensor, at: Tensor) -> Tensor:
            return objective.added((self.weight * values).sum()) + (penalty * at.square()).sum() / 2

        while k < max_passes:
            far = k % CYCLE == CYCLE - 1
            steps = (FAR if far else WARM)[0]
            if not self.budget.affords(steps + FORWARD):
                status = "budget"
                break
            losses = cuts.losses(problem, theta)
            known, worst = losses.max(0)
            found, phi, height = self._oracle(theta, cuts, worst, far)
            self.budget.spend(steps + FORWARD)
            now = torch.maximum(known, height)
            if best is not None:
                seen = torch.maximum(best[1], problem.losses(problem.logits(best[0], phi.to(theta)), cuts.y))
                best = best[0], seen
            figures = [total(now, theta), total(known, theta)]
            if best is not None:
                figures.append(total(best[1], best[0]))
            value, followed, *old = torch.stack(figures).tolist()
            if not old or value < old[0]:
                best, reached = (theta, now), value
            else:
                reached = old[0]
            history.append({"spent": self.budget.spent, "value": value, "bound": bound, "reached": reached, "far": far})
            if on_pass is not None:
                on_pass(k, reached, bound)
            k += 1
            if reached - bound <= tolerance * abs(reached) and far:
                status = "converged"
                break
            cuts.put(losses, found, phi)
            theta, bound = self._master(theta, cuts, penalty, total)
        assert best is not None
        return Polished(best[0], reached, bound, status, k, *self._worst(best[0], cuts), history)

    def _master(self, theta: Tensor, cuts: Cuts, penalty: Tensor, total: Any) -> tuple[Tensor, float]:
        losses = cuts.losses(self.problem, theta)
        top = losses.amax(0)
        temperature = TEMPERATURE * total(top, theta) / self.objective.count
        height = losses / temperature + cuts.log_prior
        share = torch.softmax(height, 0)
        live = (share > 1e-4) | (losses > top - MARGIN)
        which, sample = live.nonzero(as_tuple=True)
        master = Master(
            self.problem, cuts.phi[which, sample], cuts.y[sample], sample, cuts.log_prior[which, sample], self.weight,
            penalty, temperature, self.objective.added,
        )  # fmt: skip
        for _ in range(NEWTON):
            theta, rest = master.step(theta)
        bound = master.value(theta) - rest
        master.reweigh(theta)
        cuts.log_prior[which, sample] = master.log_prior
        return theta, float(bound)

    def _first_cut(self, theta: Tensor) -> Cuts:
        problem, n = self.problem, self.n
        dtype, device = problem.backbone.exact_dtype, problem.device
        inputs = problem.backbone.inputs
        y = torch.cat([part.y for part in self.batches])
        cuts = Cuts(
            torch.zeros(KEEP, n, inputs, dtype=torch.float16, device=device),
            torch.zeros(KEEP, n, problem.backbone.width, dtype=dtype, device=device),
            torch.full((KEEP, n), -torch.inf, dtype=problem.dtype, device=device),
            y,
            self.weight,
        )
        cuts.log_prior[0] = 0.0
        if self.first is None:
            delta, phi, _ = self._oracle(theta, cuts, None, True)
            self.budget.spend(FAR[0] + FORWARD)
        else:
            delta = (self.first.to(device, dtype) / self.threat.eps).to(torch.float16)
            phi = torch.cat([self._features(part.x, delta[part.at]) for part in self.batches])
            self.budget.spend(FORWARD)
        cuts.delta[0], cuts.phi[0] = delta, phi
        return cuts

    def _features(self, x: Tensor, units: Tensor) -> Tensor:
        with torch.no_grad():
            return self.problem.backbone._forward(x + self._placed(units, x))

    def _placed(self, units: Tensor, x: Tensor) -> Tensor:
        return into(self.threat, units.to(x) * self.threat.eps, x)

    def _oracle(self, theta: Tensor, cuts: Cuts, worst: Tensor | None, far: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Worse perturbations of all samples (in units of eps), their features and losses."""
        steps, length, shrink = FAR if far else WARM
        found = []
        for part in self.batches:
            at = torch.arange(part.at.start, part.at.stop, device=self.problem.device)
            start = cuts.delta[worst[part.at], at] if worst is not None and not far else torch.zeros_like(cuts.delta[0, part.at])
            found.append(self._climb(theta, part, start, steps, length, shrink))
        delta, phi, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
        return delta, phi, loss

    def _climb(
        self, theta: Tensor, part: _Part, start: Tensor, steps: int, length: float, shrink: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem, x, y = self.problem, part.x, part.y
        head = theta.to(x)
        delta = self._placed(start, x)
        for _ in range(steps):
            with derivatives():
                point = (x + delta).requires_grad_(True)
                loss = problem.losses(problem.logits(head, problem.backbone._forward(point)), y)
                (slope,) = torch.autograd.grad(loss.sum(), point)
            delta = into(self.threat, delta + length * self.threat.eps * uphill(self.threat, slope), x)
            length *= shrink
        units = (delta / self.threat.eps).to(torch.float16)
        phi = self._features(x, units)
        return units, phi, problem.losses(problem.logits(theta, phi.to(theta)), y)

    def _worst(self, theta: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor]:
        """The worst points at theta, the worst first, and their weights."""
        losses = cuts.losses(self.problem, theta)
        order = losses.argsort(0, descending=True)
        at = torch.arange(losses.shape[1], device=losses.device)
        share = torch.softmax(losses / (TEMPERATURE * losses.amax(0).mean()) + cuts.log_prior, 0)
        return cuts.delta[order, at], share.gather(0, order)


@dataclass
class _Part:
    at: slice
    x: Tensor
    y: Tensor


def uphill(threat: ThreatModel, slope: Tensor) -> Tensor:
    """The steepest direction of unit length: signs (linf), the normalised gradient (l2)."""
    if threat.norm == "linf":
        return slope.sign()
    return slope / slope.norm(dim=1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)


def into(threat: ThreatModel, delta: Tensor, x: Tensor) -> Tensor:
    """A point of B(x) near delta: into the ball, then into the box, without waiting for the device."""
    lo, hi = threat.bounds(x)
    if threat.norm == "l2":
        delta = delta * (threat.eps / delta.norm(dim=1, keepdim=True).clamp(min=threat.eps))
    return torch.minimum(torch.maximum(delta, lo), hi)
