"""F(theta) = sum_i w_i phi_i(theta) + (n/2) sum lambda theta^2 over some positions of a dataset, its gradient and total Hessian.

With a nonlinear backbone the inner problem has many local maxima, and maximisers found from scratch would make F jump as
theta moves. They are *tracked*: every evaluation starts from the maximisers of the last accepted point, which makes F
continuous along a descent (and cheap). Linear models forget them before statistics are taken (:meth:`restart`): there the
maximisers found from scratch are reproducible from sample and theta alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_muter.curvature.direct import Curvature
from lightning_muter.curvature.inner import InnerSolver, Rho, Smoothing
from lightning_muter.curvature.problem import HeadProblem
from lightning_muter.curvature.response import LocalPoint, Response
from lightning_muter.curvature.samples import SampleSource
from lightning_muter.curvature.total import Sums, add_gradient, add_hessian
from lightning_muter.threat import ThreatModel

Tick = Callable[[int], None]


@dataclass
class Evaluation:
    """F, its gradient, sum |d phi_i|, the maximisers found (n, D) and the fraction that converged."""

    value: float
    gradient: Tensor
    scale: float
    delta: Tensor
    converged: float

    @property
    def stationarity(self) -> float:
        """|grad F| / sum_i |grad phi_i|."""
        return float(self.gradient.norm()) / max(self.scale, 1e-300)


@dataclass
class RobustObjective:
    """The objective over ``positions`` (all of the source by default).

    Attributes:
        decay: lambda per entry of theta, (K, q).
        delta: tracked maximisers (len(positions), D), in the order of ``positions``.
    """

    problem: HeadProblem
    threat: ThreatModel
    source: SampleSource
    decay: Tensor
    inner: InnerSolver = field(default_factory=InnerSolver)
    smoothing: Smoothing = field(default_factory=Smoothing)
    positions: Sequence[int] | None = None
    delta: Tensor | None = None
    tick: Tick | None = None
    passes: int = 0
    _c: dict[tuple[int, int], Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        return self.source.n if self.positions is None else len(self.positions)

    @property
    def reproducible(self) -> bool:
        """Maximisers from scratch depend on sample and theta alone."""
        return self.problem.backbone.affine

    def restart(self) -> None:
        """Forget the tracked maximisers of a linear model."""
        if self.reproducible:
            self.delta = None

    def set_smoothing(self, smoothing: Smoothing) -> None:
        self.smoothing = smoothing
        self._c.clear()

    def sums(
        self,
        theta: Tensor,
        *,
        response: Response | None = None,
        curvature: Curvature = "hessian",
        settle: bool = True,
        explore: bool = False,
        first_order: bool = True,
    ) -> tuple[Sums, Tensor]:
        """One pass: first-order sums and, with a ``response``, total Hessians at theta; and the maximisers.

        Args:
            settle: run the inner solver (else the tracked maximisers are taken as they are).
            explore: also solve from scratch, and take the better of the two.
        """
        problem = self.problem
        sums = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=response is not None)
        kept: list[Tensor] = []
        done = 0
        for batch in self.source.batches(self.positions):
            n = len(batch.x)
            x = batch.x.to(problem.backbone.exact_dtype)
            start = None if self.delta is None else self.delta[done : done + n]
            c = self.coefficients(done, x, batch.y)
            delta = self._maximise(theta, x, batch.y, c, start, settle, explore, sums.counts)
            local = LocalPoint(problem, theta, self.threat, x, batch.y, delta, c, batch.positions)
            if first_order:
                extra = None if c is None else Rho(self.threat, x, c).value(delta)
                add_gradient(sums, local, batch.weight, extra)
            if response is not None:
                add_hessian(sums, local, response, curvature, batch.weight)
            kept.append(delta)
            done += n
            if self.tick is not None:
                self.tick(n)
        self.passes += 1
        return sums, torch.cat(kept)

    def _maximise(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        c: Tensor | None,
        start: Tensor | None,
        settle: bool,
        explore: bool,
        counts: Counter[str],
    ) -> Tensor:
        if not settle and start is not None:
            return self.threat.project(start.to(x), x)
        found = self.inner.solve(self.problem, theta, self.threat, x, y, c, start)
        if explore and start is not None:
            anew = self.inner.solve(self.problem, theta, self.threat, x, y, c)
            found = found.better(anew)
        counts["samples"] += len(x)
        counts["maximisers converged"] += int(found.converged.sum())
        return found.delta

    def coefficients(self, begin: int, x: Tensor, y: Tensor) -> Tensor | None:
        """c of these samples; a function of the anchor alone, kept because every pass needs it."""
        key = (begin, len(x))
        if key not in self._c:
            self._c[key] = self.smoothing.coefficients(self.problem, self.threat, x, y)
        return self._c[key]

    def anchor(self, theta: Tensor) -> None:
        """Evaluate the smoothing at theta from now on (L-infinity; an all-zero head has nothing to smooth)."""
        if self.threat.norm == "linf" and self.threat.eps > 0 and bool(self.problem.weight(theta).any()):
            self.set_smoothing(replace(self.smoothing, anchor=theta.clone()))

    def smoothing_moves(self, theta: Tensor) -> bool:
        """Whether theta has left the anchor by more than a hundredth."""
        if self.threat.norm != "linf" or self.threat.eps == 0:
            return False
        anchor = self.smoothing.anchor
        return anchor is None or bool((theta - anchor).norm() > 1e-2 * theta.norm())

    def evaluate(self, theta: Tensor) -> Evaluation:
        """F and its gradient at theta, from the tracked maximisers; :meth:`accept` makes its maximisers the tracked ones."""
        return self.evaluation(theta, *self.sums(theta))

    def evaluation(self, theta: Tensor, sums: Sums, delta: Tensor) -> Evaluation:
        """The penalised objective from sums at theta."""
        penalty = self.count * self.decay
        value = sums.value + (penalty * theta.square()).sum() / 2
        total = max(sums.counts["samples"], 1)
        return Evaluation(
            float(value),
            sums.gradient + penalty * theta,
            float(sums.gradient_scale),
            delta,
            sums.counts["maximisers converged"] / total,
        )

    def accept(self, evaluation: Evaluation) -> None:
        self.delta = evaluation.delta
