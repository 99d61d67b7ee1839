"""Threat model: the set of perturbations an adversary may choose from, and its projections.

B(x) = { delta : ||delta||_p <= eps,  lo <= x + delta <= hi }          p in {2, infinity}
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muter.adversarial.from_torchattacks import Norm, read_ball
from lightning_muter.errors import ArgumentError


@dataclass(frozen=True)
class ThreatModel:
    """Norm ball of radius ``eps`` around a sample, intersected with the input box (``None``: no box).

    >>> ThreatModel("linf", eps=8 / 255).box
    (0.0, 1.0)
    """

    norm: Norm
    eps: float
    box: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf"):
            raise ArgumentError("norm", self.norm, "'l2' or 'linf'", "Other norms have no response formula here.")
        if not (isinstance(self.eps, (int, float)) and math.isfinite(self.eps) and self.eps >= 0):
            raise ArgumentError(
                "eps", self.eps, "a finite number, 0 or larger", "Pass the radius of the ball, e.g. 8/255."
            )
        object.__setattr__(self, "eps", float(self.eps))
        if self.box is not None:
            lo, hi = (float(b) for b in self.box)
            if not lo < hi:
                raise ArgumentError("box", self.box, "(low, high) with low < high, or None", "Images use (0.0, 1.0).")
            object.__setattr__(self, "box", (lo, hi))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, safe for any file."""
        out = asdict(self)
        out["box"] = list(self.box) if self.box is not None else None
        return out

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> ThreatModel:
        box = state["box"]
        return cls(state["norm"], state["eps"], None if box is None else (box[0], box[1]))

    @classmethod
    def from_attack(cls, attack: Any, box: tuple[float, float] | None = (0.0, 1.0)) -> ThreatModel:
        """The threat model of a torchattacks attack, or of what a factory ``attack(model)`` builds.

        Args:
            attack: FGSM, FFGSM, RFGSM, PGD, PGDL2, TPGD, ... of torchattacks, a class or ``functools.partial`` of one,
                an attack with attributes ``norm`` and ``eps``, a ``LossAttack``, or a ThreatModel (returned as it is).
            box: range of the inputs; torchattacks itself knows (0, 1) only, elsewhere our own maximiser climbs.

        Raises:
            ArgumentError: unknown or ambiguous, targeted, or with normalisation switched on.

        >>> import functools, torchattacks
        >>> ThreatModel.from_attack(functools.partial(torchattacks.PGDL2, eps=0.5))
        ThreatModel(norm='l2', eps=0.5, box=(0.0, 1.0))
        """
        threat = attack if isinstance(attack, cls) else getattr(attack, "threat", None)
        if isinstance(threat, cls):
            return threat
        norm, eps = read_ball(attack)
        return cls(norm, eps, box)

    # -- geometry, all on flattened samples: x, v (n, D) ----------------------------------------------------------

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Elementwise range of delta, (n, D) each: the box as seen from x, cut to [-eps, eps] for both norms."""
        lo, hi = torch.full_like(x, -self.eps), torch.full_like(x, self.eps)
        if self.box is not None:
            # a sample outside the box (checked by the callers) may still sit there by rounding: keep 0 admissible
            lo = torch.maximum(lo, (self.box[0] - x).clamp(max=0.0))
            hi = torch.minimum(hi, (self.box[1] - x).clamp(min=0.0))
        return lo, hi

    def project(self, v: Tensor, x: Tensor) -> Tensor:
        """Euclidean projection of v onto B(x): clip(v / (1 + nu), lo, hi) with the multiplier nu >= 0 of the ball.

        >>> t = ThreatModel("l2", 5.0, None)
        >>> t.project(torch.tensor([[6.0, 8.0]]), torch.zeros(1, 2))
        tensor([[3., 4.]])
        """
        lo, hi = self.bounds(x)
        if self.norm == "linf":
            return torch.minimum(torch.maximum(v, lo), hi)
        return _ball_box(v, lo, hi, self.eps, at_most_one=True)

    def linear_maximiser(self, g: Tensor, x: Tensor) -> Tensor:
        """argmax over B(x) of <g, delta>: the vertex picked by the signs (linf), clip(g / mu, lo, hi) (l2).

        Coordinates where g = 0 stay at 0.
        """
        lo, hi = self.bounds(x)
        if self.norm == "linf":
            return torch.where(g > 0, hi, torch.where(g < 0, lo, torch.zeros_like(g)))
        return _ball_box(g, lo, hi, self.eps, at_most_one=False)


def _ball_box(v: Tensor, lo: Tensor, hi: Tensor, eps: float, *, at_most_one: bool) -> Tensor:
    """clip(t v, lo, hi) with the scalar t per row such that the norm is eps (t <= 1 for a projection).

    From below: with the coordinates that saturate at the present t taken at their bounds, the t that fills the ball is never
    above the solution, so the saturated set only grows and the exact t is reached in finitely many (few) rounds.
    """
    tiny = torch.finfo(v.dtype).tiny
    bound = torch.where(v >= 0, hi, -lo)  # >= 0: room in the direction of v
    mag = v.abs()
    b2, m2 = bound.square(), mag.square()
    t = eps * m2.sum(1, keepdim=True).clamp(min=tiny).rsqrt()
    for _ in range(v.shape[1]):
        free = (t * mag < bound).to(v.dtype)
        room = eps * eps - (b2 * (1 - free)).sum(1, keepdim=True)
        f2 = (m2 * free).sum(1, keepdim=True)
        # nothing left to move: t no longer matters
        new = torch.where(f2 > 0, (room.clamp(min=0.0) / f2.clamp(min=tiny)).sqrt(), t)
        if not bool((new > t * (1 + 4 * torch.finfo(v.dtype).eps)).any()):
            break
        t = torch.maximum(t, new)
    if at_most_one:
        t = t.clamp(max=1.0)
    clipped = torch.minimum(torch.maximum(t * v, lo), hi)
    return torch.where(mag > 0, clipped, torch.zeros_like(v))
