"""Unlearning methods on stored statistics: from a request to new weights. Extend by subclassing :class:`Method`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_muter.curvature.hessian.sums import BlockSymmetric
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.extension import Extensible
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.solvers.base import Border, Solution, Solver
from lightning_muter.solvers.eigen import symmetric_eigh


@dataclass
class Request:
    """One deletion request: what is to be forgotten, and everything a method may look at. Nothing in it may be changed.

    Attributes:
        problem: the model as a function of its head, theta = [W | b] (K, q).
        snapshot: the sums, weights and settings before the request.
        source: holds the samples to forget.
        forget: their positions in the training dataset.
        solver: what the user chose for H_R delta = g.
        retained: the other samples, where retained data was given.
        shards: this process's share of either.

    Example::

        class Cautious(Method):
            name = "cautious"

            def step(self, request: Request) -> Step:
                step, now = MUter().step(request), request.problem.read_theta()
                return dataclasses.replace(step, theta=now + 0.5 * (step.theta - now))
    """

    problem: HeadProblem
    snapshot: Snapshot
    source: SampleSource
    forget: list[int]
    solver: Solver
    retained: SampleSource | None = None
    shards: Shards = field(default_factory=Shards.current)

    @property
    def n_retained(self) -> int:
        """Samples that will be left."""
        return self.snapshot.n_retained - len(self.forget)

    @property
    def total(self) -> float:
        """Sum of d_i over the samples that will be left: |R| where each counts once."""
        return self.snapshot.total - self.source.total(self.forget)

    def objective(
        self, positions: list[int], starts: Tensor | None, source: SampleSource | None = None
    ) -> ShardedObjective:
        """The robust objective sum phi_i over some positions.

        Args:
            positions: in the training dataset.
            starts: of the maximisers of all positions, as the snapshot has them; None climbs from scratch.
            source: what they are read from; None: the rows to forget.
        """
        return objective_of(self.snapshot, self.problem, source or self.source, positions, starts, self.shards)


def objective_of(
    snapshot: Snapshot,
    problem: HeadProblem,
    source: SampleSource,
    positions: list[int],
    starts: Tensor | None,
    shards: Shards,
) -> ShardedObjective:
    """The robust objective of a snapshot over some positions; ``starts``: of the maximisers of all positions."""
    smoothing = snapshot.smoothing
    if smoothing.anchor is not None:
        smoothing = replace(smoothing, anchor=smoothing.anchor.to(problem.device))
    objective = ShardedObjective(
        problem,
        snapshot.threat_model,
        source,
        snapshot.decay.to(problem.device),
        snapshot.inner,
        smoothing,
        positions,
        shards=shards,
    )
    if starts is not None:
        objective.restore(starts[torch.tensor(positions, dtype=torch.int64)])
    return objective


@dataclass
class Step:
    """What a method proposes: new weights, the solve behind them, and the downdated statistics.

    Attributes:
        theta: the new head [W | b], (K, q).
        solution: of the system, with status and residual.
        hessian: M of the retained samples.
        gradient: g of the retained samples at the snapshot's theta_base, (K, q).
        matrix: H_R = M_R + |R| Lambda_d, dense (K q, K q); refine steps in its metric.

    Example::

        step = MUter().step(request)
        step.solution.status  # "converged"
    """

    theta: Tensor
    solution: Solution
    hessian: BlockSymmetric
    gradient: Tensor
    matrix: Tensor


class Method(Extensible, ABC):
    """From a request to a :class:`Step`; results and receipts name it by its ``name``.

    A method of your own has a ``name``, keeps the arguments of its constructor as attributes, and writes nothing to the model.

    >>> Method.named("muter")()
    MUter()
    """

    @abstractmethod
    def step(self, request: Request) -> Step:
        """The step of one request; nothing of it is written to the model.

        Args:
            request: what is to be forgotten, and all that may be looked at.

        Raises:
            SolveError: the system was not solved.
        """


class MUter(Method):
    """One Newton step for the retained objective in the total Hessian, from stored sums and the forgotten samples alone.

        w_u = w - H_R^-1 grad F_R(w),   H_R = M - M_U + |R| Lambda_d,   grad F_R = g - g_U + |R| Lambda_d w

    M is the snapshot's: with its ``unconstrained`` response this is the published method (Liu et al., ICCV 2023), with
    "none" ordinary second-order unlearning, with "l2" and "linf" the constraint-aware one. Shapes: w and g (K, q), M and H_R
    (K q, K q); U the forgotten, R the retained samples.

    Example::

        result = unlearn(model, snapshot, [3, 17], train_set, method=MUter())  # the default
    """

    name = "muter"

    def step(self, request: Request) -> Step:
        """Subtract the forgotten terms, solve, step.

        Args:
            request: what is to be forgotten.

        Raises:
            SolveError: the system was not solved.
        """
        snapshot, device = request.snapshot, request.problem.device
        reference, base = snapshot.theta_ref.to(device), snapshot.theta_base.to(device)
        objective = request.objective(request.forget, snapshot.starts)
        settle = not snapshot.inner.as_found
        sums, delta = objective.sums(reference, response=snapshot.response, curvature=snapshot.curvature, settle=settle)
        assert sums.hessian is not None
        gone = sums.gradient
        if not torch.equal(reference, base):
            gone = request.objective(request.forget, snapshot.base_starts).sums(base, settle=settle)[0].gradient
        hessian = replace(snapshot.hessian, blocks=snapshot.hessian.blocks.to(device)).minus(sums.hessian, reuse=True)
        gradient = snapshot.gradient.to(device) - gone
        penalty = request.total * snapshot.decay.to(device)
        matrix = hessian.dense()
        matrix.diagonal().add_(penalty.flatten())
        rhs = (gradient + penalty * base).flatten()
        border = None
        system = matrix
        if request.solver.bordered:
            border = self._border(request, reference, request.shards.gather_rows(delta, len(request.forget)))
            if border is not None:
                system = matrix + (border.u * border.gamma) @ border.u.T
        solution = request.solver.solve(system, rhs, border).require(request.solver)
        return Step(base - solution.value.reshape(base.shape), solution, hessian, gradient, matrix)

    def _border(self, request: Request, theta: Tensor, delta: Tensor) -> Border | None:
        """Indirect part of the last forgotten sample, -U diag(gamma) U^T in M_R: it enters as what is still to be removed."""
        snapshot, problem = request.snapshot, request.problem
        if snapshot.response.name == "none":
            return None
        objective = request.objective(request.forget, snapshot.starts)
        batch = next(iter(request.source.batches(request.forget[-1:])))
        x = batch.x.to(problem.backbone.exact_dtype)
        c = objective.smoothing.coefficients(problem, snapshot.threat_model, x, batch.y)
        local = LocalPoint(problem, theta, snapshot.threat_model, x, batch.y, delta[-1:], c, batch.positions)
        gram = snapshot.response.gram(local, Counter())
        if gram is None:
            return None
        f = problem.backbone.width
        eye = torch.eye(f, dtype=problem.dtype, device=problem.device)
        values, vectors = symmetric_eigh(gram.times(eye[None])[0])
        keep = values.abs() > 1e-12 * values.abs().max()
        values, vectors = values[keep], vectors[:, keep]
        if batch.weight is not None:
            values = values * float(batch.weight[0])
        r, hess, phi = local.terms.r[0], local.hess[0], problem.augment(local.phi)[0]
        moved = torch.zeros(phi.shape[0], vectors.shape[1], dtype=phi.dtype, device=phi.device)
        moved[:f] = vectors
        u = r[:, None, None] * moved + (hess @ local.weight @ vectors)[:, None, :] * phi[:, None]
        return Border(u.reshape(-1, vectors.shape[1]), values)
