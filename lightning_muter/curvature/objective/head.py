"""F(theta) = sum_i w_i phi_i(theta) + (n/2) sum lambda theta^2 over some positions of a dataset, its gradient and total Hessian.

With a nonlinear backbone the inner problem has many local maxima; maximisers from scratch would make F jump as theta moves. They are
*tracked*: every evaluation starts from those of the last accepted point and their rivals, which makes F continuous along a descent.
Linear models forget them before statistics are taken (:meth:`restart`), until two of them are equal (:meth:`contend`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.hessian.sums import Sums, add_gradient, add_hessian
from lightning_muter.curvature.inner.ascent import Maximisers, Rho
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.inner.tracked import Tracked
from lightning_muter.curvature.objective.base import Evaluation, Met
from lightning_muter.curvature.objective.soft_maximum import Contest, Kinks
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.choose import NoResponse, Response
from lightning_muter.model.dataset import SampleSource

Tick = Callable[[int], None]

#: Local maxima that weigh less than this everywhere are not kept with a snapshot.
_STORED = 1e-3


@dataclass
class RobustObjective:
    """The objective over ``positions`` (all of the source by default).

    Attributes:
        decay: lambda per entry of theta, (K, q).
        delta: tracked maximisers (len(own), D), in the order of ``own``.
        rivals, prior: further local maxima (m, n, D) and the weights of all, (1 + m, n): see `curvature.contest`.
        contended: a linear model's maxima are tracked and weighed too.
        cooling: of the temperature while multipliers settle (:func:`lightning_muter.minimise.descent.descend_contested`).
        met: the local maxima of the last pass.
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
    rivals: Tensor | None = None
    prior: Tensor | None = None
    contended: bool = False
    cooling: float = 1.0
    _c: dict[tuple[int, int], Tensor | None] = field(default_factory=dict, repr=False)
    met: Met = field(default_factory=Met, repr=False)

    @property
    def everything(self) -> Sequence[int]:
        return range(self.source.n) if self.positions is None else self.positions

    @property
    def own(self) -> Sequence[int]:
        """The positions that are evaluated here; where several processes share them (`sharded`), not all."""
        return self.everything

    @property
    def count(self) -> int:
        return len(self.everything)

    @property
    def total(self) -> float:
        """sum d_i: what weight decay is multiplied by, the number of samples where each counts once."""
        return self.source.total(self.everything)

    def added(self, values: Tensor) -> Tensor:
        """The sum over all processes that share the positions."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all processes that share the positions."""
        return values

    def places_of(self, kinks: Kinks) -> tuple[Tensor, Tensor]:
        """Which contested samples are among ``own``, and where."""
        return torch.arange(len(kinks.rows), device=kinks.rows.device), kinks.rows

    def part(self, at: slice) -> RobustObjective:
        """The objective of some of ``own`` alone, from the tracked maximisers."""
        tracked = self.tracked.at(at) if self.tracked is not None else None
        part = RobustObjective(
            self.problem, self.threat, self.source, self.decay, self.inner, self.smoothing, self.own[at], tick=self.tick,
            contended=self.contended,
        )  # fmt: skip
        part.follow(tracked)
        return part

    @property
    def tracked(self) -> Tracked | None:
        """The local maxima that the next pass starts from."""
        return None if self.delta is None else Tracked(self.delta, self.rivals, self.prior)

    def follow(self, tracked: Tracked | None, *, contended: bool | None = None, passes: int = 0) -> None:
        """Start from these, which took so many passes to find; ``contended``: of a linear model, whether they are weighed."""
        self.passes += passes
        self.contended = self.contended if contended is None else contended
        if tracked is None:
            self.delta = self.rivals = self.prior = None
        else:
            self.delta, self.rivals, self.prior = tracked.delta, tracked.rivals, tracked.prior

    @property
    def reproducible(self) -> bool:
        """Maximisers from scratch depend on sample and theta alone."""
        return self.problem.backbone.affine and not self.contended

    @property
    def temperature(self) -> float:
        """Of the soft maximum over local maxima. A linear model that is not contended takes the largest, which is a function of
        theta alone; on the kinks of a piecewise-linear network maxima cannot be told apart.
        """
        affine = self.problem.backbone.affine
        alone = not self.contended if affine else self.problem.backbone.piecewise_linear
        return 0.0 if alone else self.smoothing.temperature * self.cooling

    def contend(self) -> bool:
        """Track and weigh the local maxima of a linear model from now on; False where this is so already or can change nothing."""
        several = self.problem.backbone.affine and self.inner.starts > 0
        if self.contended or not several or not self.smoothing.temperature or self.problem.n_logits == 2:
            return False
        self.contended = True
        return True

    def cool(self, factor: float | None, least: float = 0.0) -> None:
        """Weigh local maxima at a lower temperature from now on; None: at the first one again."""
        self.cooling = 1.0 if factor is None else max(self.cooling * factor, least)

    def largest_alone(self) -> None:
        """Track the largest maximum of each sample alone from now on."""
        self.inner = replace(self.inner, rivals=0)

    def restart(self) -> None:
        """Forget the tracked maximisers of a linear model."""
        if self.reproducible:
            self.follow(None)

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
            explore: also solve from scratch, and take the best.
        """
        problem = self.problem
        sums = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=response is not None)
        kept: list[Tensor] = []
        met: list[Met] = []
        done = 0
        for batch in self.source.batches(self.own):
            n = len(batch.x)
            x = batch.x.to(problem.backbone.exact_dtype)
            c = self.coefficients(done, x, batch.y)
            found = self._maximise(theta, x, batch.y, c, slice(done, done + n), settle, explore, sums.counts)
            contest = Contest.of(found, self.temperature)
            for which, rows, delta, share, frozen in contest.points():
                part = None if c is None else c[rows]
                positions = batch.positions[rows.cpu()] if isinstance(rows, Tensor) else batch.positions
                local = LocalPoint(problem, theta, self.threat, x[rows], batch.y[rows], delta[rows], part, positions)
                weight = batch.weight if batch.weight is None else batch.weight[rows]
                if share is not None:
                    weight = share if weight is None else share * weight
                if response is not None and response.uses_gradient:  # before anything asks for the features alone
                    local.differentiate()
                if first_order:
                    extra = None if local.c is None else Rho(self.threat, local.x, local.c).value(local.delta)
                    add_gradient(sums, local, weight, extra)
                if response is not None:
                    # a fixed point does not answer the weights
                    add_hessian(sums, local, NoResponse() if frozen else response, curvature, weight)
                contest.saw(which, rows, local)
            kinks = contest.close(sums, batch.weight)
            kept.append(found.delta)
            met.append(Met(found.rivals, found.prior, contest.share, [] if kinks is None else [(done, kinks)]))
            done += n
            if self.tick is not None:
                self.tick(n)
        self.passes += 1
        self.met = Met.joined(met)
        empty = torch.zeros(0, math.prod(self.source.input_shape), dtype=problem.dtype, device=problem.device)
        return sums, torch.cat(kept) if kept else empty

    def _maximise(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        c: Tensor | None,
        rows: slice,
        settle: bool,
        explore: bool,
        counts: Counter[str],
    ) -> Maximisers:
        tracked = self.tracked.at(rows) if self.tracked is not None else None
        if not settle and tracked is not None:
            return self._as_they_are(theta, x, y, tracked)
        start, rivals, prior = (None, None, None) if tracked is None else (tracked.delta, tracked.rivals, tracked.prior)
        warm = 100 * self.temperature / self.cooling
        found = self.inner.solve(self.problem, theta, self.threat, x, y, c, start, rivals, prior, explore, warm)
        counts["samples"] += len(x)
        counts["maximisers converged"] += int(found.converged.sum())
        return found

    def _as_they_are(self, theta: Tensor, x: Tensor, y: Tensor, tracked: Tracked) -> Maximisers:
        rivals, prior = tracked.rivals, tracked.prior
        delta = self.threat.project(tracked.delta.to(x), x)
        zero = torch.zeros_like(x[:, 0])
        if rivals is None or prior is None or not self.temperature:
            return Maximisers(delta, zero, zero, 0, 0.0)
        losses = [self.problem.loss_and_input_gradient(theta, x + d, y)[0] for d in (delta, *rivals.to(x))]
        heights = torch.stack(losses).masked_fill(prior == 0, -math.inf)
        return Maximisers(delta, heights[0], zero, 0, 0.0, rivals.to(x), heights[1:], prior)

    def coefficients(self, begin: int, x: Tensor, y: Tensor) -> Tensor | None:
        """c of these samples; a function of the anchor alone, kept because every pass needs it."""
        key = (begin, len(x))
        if key not in self._c:
            self._c[key] = self.smoothing.coefficients(self.problem, self.threat, x, y)
        return self._c[key]

    def anchor(self, theta: Tensor) -> None:
        """Evaluate the smoothing at theta from now on (L-infinity; an all-zero head has nothing to smooth)."""
        if self.threat.jumps and bool(self.problem.weight(theta).any()):
            self.set_smoothing(replace(self.smoothing, anchor=theta.clone()))

    def off_anchor(self, theta: Tensor) -> float:
        """How far theta has left the anchor of the smoothing, relative to its size."""
        if not self.threat.jumps:
            return 0.0
        anchor = self.smoothing.anchor
        return math.inf if anchor is None else float((theta - anchor).norm() / theta.norm().clamp(min=1e-300))

    def smoothing_moves(self, theta: Tensor) -> bool:
        """Whether theta has left the anchor by more than a hundredth."""
        return self.off_anchor(theta) > 1e-2

    def evaluate(self, theta: Tensor, *, explore: bool = False) -> Evaluation:
        """F and its gradient at theta, from the tracked maximisers; :meth:`accept` makes its maximisers the tracked ones.

        ``explore``: also from scratch. A contended linear model is always explored, which is cheap there.
        """
        explore = explore or self.problem.backbone.affine
        return self.evaluation(theta, *self.sums(theta, explore=explore and not self.reproducible))

    def as_tracked(self, theta: Tensor) -> Evaluation:
        """F and its gradient at theta, the tracked maximisers taken as they are."""
        return self.evaluation(theta, *self.sums(theta, settle=False))

    def afresh(self, theta: Tensor) -> Evaluation:
        """F and its gradient at the largest maxima of a linear model, whichever were followed on the way there."""
        self.restart()
        return self.evaluate(theta)

    def evaluation(self, theta: Tensor, sums: Sums, delta: Tensor) -> Evaluation:
        """The penalised objective from sums at theta."""
        penalty = self.total * self.decay
        value = sums.value + (penalty * theta.square()).sum() / 2
        total = max(sums.counts["samples"], 1)
        met, converged = self.met, sums.counts["maximisers converged"] / total
        return Evaluation(
            float(value), sums.gradient + penalty * theta, float(sums.gradient_scale), delta, converged, met.rivals, met.prior,
            met.share, Kinks.joined(met.kinks), sums.counts["contested"] > 0,
        )  # fmt: skip

    def accept(self, evaluation: Evaluation) -> None:
        """Track these maximisers from now on."""
        self.delta, self.rivals, self.prior = evaluation.delta, evaluation.rivals, evaluation.prior

    def weigh(self, evaluation: Evaluation) -> Evaluation:
        """Weigh local maxima by the shares they had here, q <- p; the evaluation under the new weights."""
        self.accept(evaluation)
        if evaluation.share is not None:
            self.prior = evaluation.share
        return evaluation.reweighed(self.temperature, self.places_of)

    def stored_starts(self) -> Tensor | None:
        """Where the maximisers start from now on, to be kept with a snapshot: (n, 1 + m, D + 1) in half precision, for each local
        maximum its position in units of eps and its weight; None where scratch will do.

        The objective is left tracking the rounded points, so that its next sums are those anybody can repeat from the file.
        """
        tracked = self.tracked
        if (self.reproducible and self.prior is None) or self.threat.eps == 0 or tracked is None:
            self.follow(None)
            return None
        keep = self.largest(tracked.heaviest(1 + self.inner.rivals)) > _STORED  # the same for every process
        keep[0] = True
        stored = tracked.rows(self.threat.eps, keep)
        self._track(stored)
        return stored

    def restore(self, stored: Tensor) -> None:
        """Track what :meth:`stored_starts` gave."""
        self._track(stored)

    def _track(self, stored: Tensor) -> None:
        backbone = self.problem.backbone
        places = Tracked.of_rows(stored, self.threat.eps, self.problem.device, backbone.exact_dtype)
        self.follow(places, contended=backbone.affine)
