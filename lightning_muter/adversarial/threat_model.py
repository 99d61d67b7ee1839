"""Threat model: the set of perturbations an adversary may choose from, and its projections.

B(x) = { delta : ||delta|| <= eps,  lo <= x + delta <= hi }

A norm is one subclass of :class:`Ball`; nothing else knows its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_muter.adversarial.from_torchattacks import read_ball
from lightning_muter.adversarial.scalars import as_number
from lightning_muter.errors import ArgumentError
from lightning_muter.extension import Extensible


class Ball(Extensible, ABC):
    """The ball of one norm, cut by the box; ``ThreatModel(norm=...)`` finds it by ``name``.

    Tensors hold one flattened sample per row (n, D); lo, hi (n, D): range of every coordinate of delta, [-eps, eps] cut to the
    box. A ball of your own has a ``name`` and the four abstract methods.

    Attributes:
        response: name of the :class:`lightning_muter.Response` that knows how its maximisers move; "none": not known.
        separable: it is the product of the ranges lo to hi: maximisers jump between its corners unless they are smoothed.
        euclidean: it is the Euclidean ball of radius eps.

    >>> sorted(Ball.known())[:2], Ball.named("linf")().separable
    (['l2', 'linf'], True)
    """

    response: ClassVar[str] = "none"
    separable: ClassVar[bool] = False
    euclidean: ClassVar[bool] = False

    @abstractmethod
    def project(self, v: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        """The point (n, D) of B, radius ``eps`` and range ``lo`` to ``hi``, nearest to v (n, D), each row for itself."""

    def near(self, v: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        """A point of B (``lo``, ``hi``, ``eps``) near v, in a closed form that never waits for the device; v itself if it is in B."""
        return self.project(v, lo, hi, eps)

    @abstractmethod
    def linear_maximiser(self, g: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        """The delta (n, D) of B (``lo``, ``hi``, ``eps``) with the largest <g, delta>; coordinates where g = 0 stay at 0."""

    @abstractmethod
    def direction(self, g: Tensor) -> Tensor:
        """The step (n, D) of length 1 in this norm along which a loss with gradient g (n, D) rises most."""

    @abstractmethod
    def sample(self, like: Tensor, eps: float) -> Tensor:
        """A random point of the ball of radius ``eps`` for every row of ``like``, (n, D) (global random generator)."""

    def length(self, v: Tensor) -> Tensor:
        """How far a step v goes, to be compared with eps, (n, 1)."""
        return v.norm(dim=1, keepdim=True)


class L2Ball(Ball):
    """||delta||_2 <= eps."""

    name = "l2"
    response = "l2"
    euclidean = True

    def project(self, v: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        """clip(v / (1 + nu), lo, hi) with the multiplier nu >= 0 of the ball."""
        return _ball_box(v, lo, hi, eps, at_most_one=True)

    def near(self, v: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        """Into the ball, then into the box (which holds 0)."""
        inside = v * (eps / v.norm(dim=1, keepdim=True).clamp(min=eps))
        return torch.minimum(torch.maximum(inside, lo), hi)

    def linear_maximiser(self, g: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        """clip(g / mu, lo, hi)."""
        return _ball_box(g, lo, hi, eps, at_most_one=False)

    def direction(self, g: Tensor) -> Tensor:
        """The gradient over its length g / ||g||, 0 where it is 0."""
        # scaled first: squares of very large or very small slopes leave the range of float32
        largest = g.abs().amax(1, keepdim=True)
        scaled = torch.where(largest > 0, g / largest, g)
        return torch.where(largest > 0, scaled / scaled.norm(dim=1, keepdim=True), scaled)

    def sample(self, like: Tensor, eps: float) -> Tensor:
        """Any direction alike, the radius uniform up to eps."""
        direction = torch.randn_like(like)
        radius = torch.rand(len(like), 1, dtype=like.dtype, device=like.device) * eps
        return direction / direction.norm(dim=1, keepdim=True) * radius


class LinfBall(Ball):
    """max_j |delta_j| <= eps."""

    name = "linf"
    response = "linf"
    separable = True

    def project(self, v: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        """The nearest point: every coordinate clipped for itself, clip(v, lo, hi)."""
        return torch.minimum(torch.maximum(v, lo), hi)

    def linear_maximiser(self, g: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        """The vertex picked by the signs."""
        return torch.where(g > 0, hi, torch.where(g < 0, lo, torch.zeros_like(g)))

    def direction(self, g: Tensor) -> Tensor:
        """Its signs."""
        return g.sign()

    def sample(self, like: Tensor, eps: float) -> Tensor:
        """Uniform over the cube."""
        return (2 * torch.rand_like(like) - 1) * eps

    def length(self, v: Tensor) -> Tensor:
        """The mean of the coordinates' steps: one that turns over does not stand for all."""
        return v.abs().mean(1, keepdim=True)


@dataclass(frozen=True)
class ThreatModel:
    """Norm ball of radius ``eps`` around a sample, cut by the input box: B(x) = {delta : ||delta|| <= eps, lo <= x + delta <= hi}.

    Args:
        norm: "l2", "linf" or the name of a :class:`Ball` of your own.
        eps: the radius, in the units of the inputs: a number, a NumPy or torch scalar, or text such as "8/255";
            0 is standard training.
        box: (low, high) of every input, None where inputs have no range (tables).

    Raises:
        ArgumentError: an unknown norm, a radius that is negative or no number, a box that is none.

    >>> ThreatModel("linf", eps=8 / 255).box
    (0.0, 1.0)
    """

    norm: str
    eps: float
    box: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in Ball.known():
            known = ", ".join(map(repr, sorted(Ball.known())))
            alike = get_close_matches(str(self.norm).lower(), Ball.known(), n=1, cutoff=0.8)
            advice = f"Write {alike[0]!r}. " if alike else ""
            advice += "Other norms: subclass lightning_muter.adversarial.threat_model.Ball and import it first."
            raise ArgumentError("norm", self.norm, known, advice)
        eps = as_number(self.eps)
        if eps is None or not (math.isfinite(eps) and eps >= 0):
            raise ArgumentError(
                "eps", self.eps, "a finite number, 0 or larger", "Pass the radius of the ball, e.g. 8/255."
            )
        object.__setattr__(self, "eps", eps)
        if self.box is not None:
            ends = [as_number(b) for b in self.box]
            lo, hi = ends if len(ends) == 2 else (None, None)
            if lo is None or hi is None or not lo < hi:
                raise ArgumentError("box", self.box, "(low, high) with low < high, or None", "Images use (0.0, 1.0).")
            object.__setattr__(self, "box", (lo, hi))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, strings and lists, safe for any file; :meth:`from_dict` reads them."""
        out = asdict(self)
        out["box"] = list(self.box) if self.box is not None else None
        return out

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> ThreatModel:
        """The threat model with this `norm`, `eps` and `box`, as files hold it.

        Args:
            state: what :meth:`to_dict` gave.

        >>> ThreatModel.from_dict({"norm": "l2", "eps": 0.5, "box": [0.0, 1.0]})
        ThreatModel(norm='l2', eps=0.5, box=(0.0, 1.0))
        """
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

    @cached_property
    def ball(self) -> Ball:
        """The set of perturbations, by the name of its norm."""
        made: Ball = Ball.named(self.norm)()
        return made

    @property
    def jumps(self) -> bool:
        """Whether maximisers jump between corners, so that the objective has kinks unless it is smoothed."""
        return self.ball.separable and self.eps > 0

    def doubt(self) -> str | None:
        """What to say of a radius that looks as if it were meant on another scale than the inputs', or None.

        >>> ThreatModel("linf", 8).doubt()
        'eps=8 for inputs in [0, 1]: the adversary may turn any input into any other. If 256 levels were meant: eps=8/255.'
        """
        width = math.inf if self.box is None else self.box[1] - self.box[0]
        if self.eps < width or not (self.ball.separable or (self.eps >= 4 * width and self.eps == int(self.eps))):
            return None
        assert self.box is not None
        what = "any input into any other" if self.ball.separable else "inputs into very different ones"
        hint = f" If 256 levels were meant: eps={self.eps:g}/255." if self.box == (0.0, 1.0) else ""
        ends = f"[{self.box[0]:g}, {self.box[1]:g}]"
        return f"eps={self.eps:g} for inputs in {ends}: the adversary may turn {what}.{hint}"

    # -- geometry, all on flattened samples: x, v (n, D) ----------------------------------------------------------

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Elementwise range of delta, (n, D) each: the box as seen from x, cut to [-eps, eps].

        Args:
            x: samples (n, D), one flattened per row.

        >>> [bound.tolist() for bound in ThreatModel("linf", 0.5).bounds(torch.tensor([[0.0, 0.75]]))]
        [[[0.0, -0.5]], [[0.5, 0.25]]]
        """
        lo, hi = torch.full_like(x, -self.eps), torch.full_like(x, self.eps)
        if self.box is not None:
            # a sample outside the box (checked by the callers) may still sit there by rounding: keep 0 admissible
            lo = torch.maximum(lo, (self.box[0] - x).clamp(max=0.0))
            hi = torch.minimum(hi, (self.box[1] - x).clamp(min=0.0))
        return lo, hi

    def project(self, v: Tensor, x: Tensor) -> Tensor:
        """Euclidean projection of v onto B(x), (n, D).

        Args:
            v: perturbations (n, D).
            x: samples (n, D) that they belong to.

        >>> t = ThreatModel("l2", 5.0, None)
        >>> t.project(torch.tensor([[6.0, 8.0]]), torch.zeros(1, 2))
        tensor([[3., 4.]])
        """
        return self.ball.project(v, *self.bounds(x), self.eps)

    def linear_maximiser(self, g: Tensor, x: Tensor) -> Tensor:
        """The delta in B(x) with the largest <g, delta>, (n, D); coordinates where g = 0 stay at 0.

        Args:
            g: directions (n, D), of a gradient in the inputs, say.
            x: samples (n, D).

        >>> ThreatModel("linf", 0.5).linear_maximiser(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.75, 0.75]]))
        tensor([[ 0.2500, -0.5000]])
        """
        return self.ball.linear_maximiser(g, *self.bounds(x), self.eps)


# Command lines and configuration files may give a fraction as text; once there, it is a float.
ThreatModel.__annotations__["eps"] = ThreatModel.__init__.__annotations__["eps"] = "float | str"


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
