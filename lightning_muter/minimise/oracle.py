"""The oracle of the cutting-set method: a few steps of ascent for all samples, in the backbone's own precision.

Nothing here waits for the device: the number of steps is fixed, and projections are closed forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.backbone import in_parts
from lightning_muter.model.modes import derivatives


class Ascent(NamedTuple):
    """So many steps, the first of ``length`` eps, each ``shrink`` times the last."""

    steps: int
    length: float
    shrink: float


@dataclass
class _Part:
    at: slice
    x: Tensor
    y: Tensor


class Oracle:
    """Worse perturbations of the samples that an objective evaluates in this process.

    Attributes:
        y: labels.       weight: w_i (n,), in the algebra's dtype.
    """

    def __init__(self, objective: RobustObjective) -> None:
        self.problem, self.threat, self.tick = objective.problem, objective.threat, objective.tick
        problem, device = self.problem, self.problem.device
        self._parts: list[_Part] = []
        weights, done = [torch.zeros(0, dtype=problem.dtype, device=device)], 0
        for batch in objective.source.batches(objective.own):
            ones = torch.ones(len(batch.x), dtype=problem.dtype, device=device)
            weights.append(ones if batch.weight is None else batch.weight.to(ones))
            for x, y in zip(in_parts(batch.x), in_parts(batch.y), strict=True):
                self._parts.append(_Part(slice(done, done + len(x)), x.to(problem.backbone.exact_dtype), y))
                done += len(x)
        self.weight = torch.cat(weights)
        self.y = torch.cat([part.y for part in self._parts]) if self._parts else torch.zeros(0, device=device)

    def at(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """These perturbations (n, D), in units of eps and half precision, and their features."""
        units = (delta.to(self.problem.device, torch.float32) / self.threat.eps).to(torch.float16)
        return units, torch.cat([self._features(part.x, units[part.at]) for part in self._parts])

    def climb(self, theta: Tensor, ascent: Ascent, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Perturbations in units of eps (n, D), their features (n, f) and losses (n,), from ``start`` (None: from 0)."""
        found = [self._climb(theta, part, ascent, None if start is None else start[part.at]) for part in self._parts]
        delta, phi, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
        return delta, phi, loss

    def _climb(self, theta: Tensor, part: _Part, ascent: Ascent, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        problem, threat, x, y = self.problem, self.threat, part.x, part.y
        head, length = theta.to(x), ascent.length * threat.eps
        delta = torch.zeros_like(x) if start is None else self._placed(start, x)
        for _ in range(ascent.steps):
            with derivatives():
                point = (x + delta).requires_grad_(True)
                loss = problem.losses(problem.logits(head, problem.backbone.once(point)), y)
                (slope,) = torch.autograd.grad(loss.sum(), point)
            delta = into(threat, delta + length * threat.ball.direction(slope), x)
            length *= ascent.shrink
            if self.tick is not None:
                self.tick(len(x))
        units = (delta / threat.eps).to(torch.float16)
        phi = self._features(x, units)
        return units, phi, problem.losses(problem.logits(theta, phi.to(theta)), y)

    def _features(self, x: Tensor, units: Tensor) -> Tensor:
        with torch.no_grad():
            return self.problem.backbone.once(x + self._placed(units, x))

    def _placed(self, units: Tensor, x: Tensor) -> Tensor:
        return into(self.threat, units.to(x) * self.threat.eps, x)


def into(threat: ThreatModel, delta: Tensor, x: Tensor) -> Tensor:
    """A point of B(x) near delta."""
    lo, hi = threat.bounds(x)
    return threat.ball.near(delta, lo, hi, threat.eps)
