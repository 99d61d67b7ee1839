"""Total-Hessian products and the robust objective for any subset of the parameters, one batch at a time.

    D2 phi v = d2l/dw2 v + d2l/dwdx K d2l/dxdw v,        d2l/dw2 by Gauss-Newton, J^T Lambda J, or exactly

A product is one forward-mode pass over (logits, input gradient), giving J v and s = d2l/dxdw v; then q = K s by the
response; then one reverse pass over  <z(w), Lambda J v> + d/dt l(w, x + t q),  whose gradient in w is
J^T Lambda J v + d2l/dwdx q.
Neither a p x p matrix nor a per-sample parameter Jacobian exists at any time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.ascent import Rho
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.problem.network import Parameters, WidePoint, WideProblem
from lightning_muter.curvature.response.choose import Response
from lightning_muter.curvature.response.operators import Motion
from lightning_muter.curvature.response.sketch import rademacher
from lightning_muter.model.dataset import Samples, SampleSource
from lightning_muter.model.modes import directional
from lightning_muter.solvers.eigen import symmetric_eigenvalues

WideCurvature = Literal["ggn", "hessian"]
#: Sums tensors over processes, in place; the identity for one.
Reduce = Callable[[list[Tensor]], None]

#: Motions K are kept from product to product up to this many bytes; beyond it they are found anew.
_KEEP_BYTES = 1 << 30


@dataclass
class Batch:
    """Samples of one batch at their maximisers."""

    x: Tensor
    y: Tensor
    delta: Tensor
    weight: Tensor | None
    c: Tensor | None
    positions: Tensor | None = None  # in the dataset: what random signs are keyed by


def batch_product(
    problem: WideProblem, w: Parameters, batch: Batch, motion: Motion | None, v: Parameters, curvature: WideCurvature
) -> Parameters:
    """sum_i w_i D2 phi_i v over the batch; ``motion`` None leaves the direct part alone."""
    x, y, delta, loss = batch.x, batch.y, batch.delta, problem.loss

    def total(z: Tensor) -> Tensor:
        values = loss.values(z, y)
        return (values if batch.weight is None else values * batch.weight.to(values)).sum()

    def outputs(p: Parameters, d: Tensor) -> tuple[Tensor, Tensor]:
        z = problem.joint(p, x, d)
        return total(z), z

    with problem.ready():
        force = None
        pull: Tensor | None = None
        direct: Parameters | None = None
        if curvature == "hessian" and motion is None:
            _, direct = directional(lambda p: grad(lambda q: outputs(q, delta)[0])(p), (w,), (v,))
        elif curvature == "hessian":
            slopes = grad(lambda p, d: outputs(p, d)[0], argnums=(0, 1))
            _, (direct, force) = directional(lambda p: slopes(p, delta), (w,), (v,))
        else:
            if motion is None:
                z, turned = directional(lambda p: problem.joint(p, x, delta), (w,), (v,))
            else:
                slope = grad(lambda d, p: outputs(p, d), has_aux=True)
                (_, z), (force, turned) = directional(lambda p: slope(delta, p), (w,), (v,))
            _, pull = directional(grad(total), (z.detach(),), (turned.detach(),))
            pull = pull.detach()
        if motion is None and pull is None:
            assert direct is not None
            return {n: t.detach() for n, t in direct.items()}
        # weights are in the force already
        moved = None if motion is None or force is None else motion.times(force.detach()).to(delta).detach()

        def functional(p: Parameters) -> Tensor:
            if moved is None:
                assert pull is not None
                return (problem.joint(p, x, delta) * pull).sum()

            def raised(d: Tensor) -> tuple[Tensor, Tensor]:
                z = problem.joint(p, x, d)
                return z, loss.values(z, y).sum()

            (z, _), (_, rate) = directional(raised, (delta,), (moved,))
            return rate if pull is None else rate + (z * pull).sum()

        found = grad(functional)(w)
    return {n: t.detach() + direct[n].detach() if direct is not None else t.detach() for n, t in found.items()}


@dataclass
class WideObjective:
    """F(w) = sum_i w_i phi_i(w) + (n/2) sum lambda w^2 over ``positions``, with tracked maximisers.

    Attributes:
        decay: lambda per entry of w, (p,).
        positions: what this process reads; ``count``: sum d_i of all processes, the number of samples where each counts once.
        delta: tracked maximisers in the order of ``positions``.
        anchor: w at which the smoothing of L-infinity switches is evaluated.
        leads: this process shows progress.
    """

    problem: WideProblem
    threat: ThreatModel
    source: SampleSource
    decay: Tensor
    response: Response
    positions: Sequence[int]
    count: float
    curvature: WideCurvature = "ggn"
    inner: InnerSolver = field(default_factory=lambda: InnerSolver(max_iter=50))
    smoothing: Smoothing = field(default_factory=Smoothing)
    delta: Tensor | None = None
    anchor: Tensor | None = None
    reduce: Reduce = lambda tensors: None
    leads: bool = True
    tick: Callable[[int], None] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    scale: float | None = None
    passes: int = 0
    _c: dict[int, Tensor | None] = field(default_factory=dict, repr=False)
    _motions: dict[int, Motion | None] = field(default_factory=dict, repr=False)
    _kept: int = 0

    # -- first order -----------------------------------------------------------------------------------------------

    def evaluate(self, w: Tensor) -> Evaluation:
        """F and its gradient at w, maximisers started from the tracked ones; :meth:`accept` tracks the new ones."""
        parts, problem = problem_parts(self.problem, w), self.problem
        value = torch.zeros((), dtype=problem.dtype, device=problem.device)
        gradient = torch.zeros_like(w)
        squares, settled = value.clone(), value.clone()
        kept = []
        for batch, found in self._batches(parts, settle=True):
            settled += found
            kept.append(batch.delta)
            loss, slope, square = self._first_order(parts, batch)
            value += loss
            gradient += slope
            squares += square
            self._tick(len(batch.x))
        self.passes += 1
        self.reduce([value, gradient, squares, settled])
        value = value + self.count * (self.decay * w.square()).sum() / 2
        gradient = gradient + self.count * self.decay * w
        if self.scale is None:
            self.scale = float((self.count * squares).sqrt())
        delta = torch.cat(kept) if kept else w.new_zeros(0, 0)
        return Evaluation(float(value), gradient, self.scale, delta, float(settled) / max(self.count, 1))

    def _first_order(self, w: Parameters, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of values, its gradient, and (the first time) an unbiased estimate of sum |grad phi_i|^2."""
        problem = self.problem
        leaves = {n: t.detach().requires_grad_(True) for n, t in w.items()}
        with problem.ready():
            values = problem.loss.values(problem.joint(leaves, batch.x, batch.delta), batch.y)
            if batch.weight is not None:
                values = values * batch.weight.to(values)
            parameters = list(leaves.values())  # one that forward does not use has the slope 0
            slopes = torch.autograd.grad(
                values.sum(), parameters, retain_graph=self.scale is None, allow_unused=True, materialize_grads=True
            )
            square = values.new_zeros(())
            if self.scale is None:
                signs = rademacher(self.passes, torch.arange(len(values)), 1)[:, 0].to(values)
                mixed = torch.autograd.grad(
                    (values * signs).sum(), parameters, allow_unused=True, materialize_grads=True
                )
                square = sum((m.square().sum() for m in mixed), square)
        total = values.detach().to(problem.dtype).sum()
        if batch.c is not None:
            rho = Rho(self.threat, batch.x, batch.c).value(batch.delta)
            total = total + (rho if batch.weight is None else rho * batch.weight.to(rho)).sum()
        return total, problem.flatten(dict(zip(leaves, slopes, strict=True))), square.to(problem.dtype)

    def accept(self, evaluation: Evaluation) -> None:
        """Its maximisers are the tracked ones from now on; what depends on them is forgotten."""
        self.delta = evaluation.delta
        self.forget_motions()

    def forget_motions(self) -> None:
        self._motions.clear()
        self._kept = 0

    # -- second order ----------------------------------------------------------------------------------------------

    def product(self, w: Tensor, v: Tensor, damping: float = 0.0) -> Tensor:
        """(sum D2 phi_i + n Lambda_d + damping) v at w and the tracked maximisers; one reduction."""
        parts, direction = problem_parts(self.problem, w), problem_parts(self.problem, v)
        out = torch.zeros_like(v)
        for begin, (batch, _) in enumerate(self._batches(parts, settle=False)):
            motion = self._motion(begin, parts, batch)
            found = batch_product(self.problem, parts, batch, motion, direction, self.curvature)
            out += self.problem.flatten(found)
            self._tick(len(batch.x))
        self.reduce([out])
        return out + (self.count * self.decay + damping) * v

    def _motion(self, index: int, w: Parameters, batch: Batch) -> Motion | None:
        if index in self._motions:
            return self._motions[index]
        target = self.problem.inner_target(w, batch.x, batch.y)
        place: Any = WidePoint(self.problem, w, self.threat, batch.x, target, batch.delta, batch.c)  # type: ignore[arg-type]
        motion = self.response.motion(place, self.counts) if self.threat.eps > 0 else None
        size = 0 if motion is None else motion.numbers * batch.x.element_size()
        if self._kept + size <= _KEEP_BYTES:
            self._motions[index] = motion
            self._kept += size
        return motion

    # -- batches ---------------------------------------------------------------------------------------------------

    def _batches(self, w: Parameters, *, settle: bool) -> Any:
        """Each batch at its maximisers, with how many of them converged."""
        done = 0
        for number, raw in enumerate(self.source.batches(self.positions)):
            x = raw.x.to(self.problem.model_dtype)
            c = self._coefficients(number, x, raw.y)
            start = self._start(raw, x) if self.delta is None else self.delta[done : done + len(x)]
            done += len(x)
            found = 0
            if settle or self.delta is None:
                target = self.problem.inner_target(w, x, raw.y)
                solved = self.inner.solve(self.problem, w, self.threat, x, target, c, start)  # type: ignore[arg-type]
                start, found = solved.delta, int(solved.converged.sum())
            yield Batch(x, raw.y, start, raw.weight, c, raw.positions), found

    def _start(self, raw: Samples, x: Tensor) -> Tensor:
        """0; for TRADES, whose divergence is flat there, a hundredth of the ball in signs keyed by position."""
        if self.problem.loss.beta is None:
            return torch.zeros_like(x)
        return 0.01 * self.threat.eps * rademacher(0, raw.positions, x.shape[1]).to(x)

    def _coefficients(self, number: int, x: Tensor, y: Tensor) -> Tensor | None:
        """c of the smoothed L-infinity problem (`curvature.inner`), from clean samples at the anchor."""
        if self.anchor is None or not self.threat.jumps:
            return None
        if number not in self._c:
            w = problem_parts(self.problem, self.anchor)
            target = self.problem.inner_target(w, x, y)
            root = self.problem.curvature_root(w, x, target)
            top = symmetric_eigenvalues(root.mT @ root)[:, -1:].clamp(min=0.0)
            gradient = self.problem.loss_and_input_gradient(w, x, target)[1]
            lo, hi = self.threat.bounds(x)
            half = ((hi - lo) / 2).clamp(min=1e-3 * self.threat.eps)
            tau = self.smoothing.bandwidth * gradient.abs().mean(1, keepdim=True) / half
            self._c[number] = self.smoothing.strength * top + tau
        return self._c[number]

    def _tick(self, n: int) -> None:
        if self.tick is not None:
            self.tick(n)


def problem_parts(problem: WideProblem, w: Tensor) -> Parameters:
    """The weights that may change, by name, from one flat vector w (p,)."""
    return {n: t.detach() for n, t in problem.split(w).items()}
