"""The last linear layer: sums at its weights are stored, and a request reads the rows to forget alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import Subset

from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.errors import ArgumentError, MismatchError, SolveError
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.model.reading import Reading
from lightning_muter.model.weight_decay import WholeDecay
from lightning_muter.scope.asked import Take
from lightning_muter.scope.base import Extent, Proposal, Removal, Retained, Scope
from lightning_muter.scope.head_methods import Method, MUter, Request, Step, objective_of
from lightning_muter.scope.head_taking import taken
from lightning_muter.scope.network import NetworkScope
from lightning_muter.snapshot.remarks import outside_head
from lightning_muter.snapshot.retaken import leaving_out_forgotten, spread
from lightning_muter.snapshot.size import parameter_names, without_matrix
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.stored import Stored
from lightning_muter.solvers.choose import as_solver
from lightning_muter.unlearning.quality import (
    check_accept,
    quality_of,
    remember_owed,
    require_trust,
    warnings_of,
)
from lightning_muter.unlearning.result import UnlearnResult
from lightning_muter.unlearning.with_retained import with_retained
from lightning_muter.unlearning.within import check_within

if TYPE_CHECKING:
    from lightning_muter.unlearning.unlearn import Unlearn

#: Of |sum of gradients - stored sum| / sum of |gradients|, by dtype: rounding, far below the share of one row.
_SAME = {torch.float64: 1e-8}
_ELSE = 1e-5


@dataclass(frozen=True)
class HeadScope(Scope[Snapshot]):
    """The head, as it is found in a model."""

    record = Snapshot
    useless = ("trades_beta",)
    refusal = ("None for a head", "TRADES is a scope of its own: 'all' or patterns.")
    polishing = (15, "passes")

    @classmethod
    def of(cls, snapshot: Snapshot) -> HeadScope:
        return cls()

    def extent(self, module: nn.Module, reading: Reading | None, cap: int) -> Extent | None:
        if reading is None:
            return None
        head = reading.linear_head
        return Extent(parameter_names(head), without_matrix(head, cap) is not None, head)

    def take(self, asked: Take) -> Stored:
        """Of a head whose sums are larger than is allowed, its parameters are taken as a scope by name."""
        self.check_useful(asked)
        self.passes(asked.polish)
        reading = asked.read_all()
        if (large := without_matrix(reading.linear_head, asked.size_cap)) is None:
            return taken(asked, reading)
        reading = replace(reading, notes=[*reading.notes, large])
        asked = replace(asked, reading=reading, budget=None, fit=None, examples=None, tolerance=None, resume=None)
        return NetworkScope(parameter_names(reading.linear_head)).take(asked)

    def refresh(self, left: Retained[Snapshot], polish: str | int, progress: bool) -> Snapshot:
        """Polished and summed anew, with the same objective."""
        snapshot, access = left.snapshot, left.access
        asked = Take(
            left.model,
            Subset(left.data, left.kept),
            threat_model=snapshot.threat_model,
            response=snapshot.response,
            curvature=snapshot.curvature,
            reading=left.reading.of_rows(left.kept),
            weight_decay=_by_name(snapshot, left.model),
            polish=polish,
            inner=snapshot.inner,
            smoothing=replace(snapshot.smoothing, anchor=None),
            collate=access.collate,
            batch_size=access.batch_size,
            key=snapshot.key,
            progress=progress,
        )
        part: Snapshot = leaving_out_forgotten(self.take, asked)
        part.barred = snapshot.barred
        spread(part, snapshot.n_total, snapshot.forgotten, snapshot.absent)
        return part

    def difference(self, left: Retained[Snapshot]) -> tuple[float, float]:
        """Of the sum of gradients."""
        snapshot = left.snapshot
        source = left.access.source(left.reading, snapshot.threat_model, left.data, left.kept)
        problem = HeadProblem(left.model, left.reading.loss, source.examples(), left.reading)
        starts = snapshot.base_starts if snapshot.base_starts is not None else snapshot.starts
        objective = objective_of(snapshot, problem, source, left.kept, starts, Shards())
        sums, _ = objective.sums(snapshot.theta_base.to(problem.device))
        error = float((sums.gradient.cpu() - snapshot.gradient).norm() / sums.gradient_scale.cpu())
        return error, _SAME.get(snapshot.gradient.dtype, _ELSE)

    def check(self, asked: Unlearn) -> None:
        """Retained rows are read where they are given."""
        if asked.refine and asked.retain is None:
            raise ArgumentError("refine", asked.refine, "0 without retained data", "Pass retain=train_dataset as well.")
        check_within(asked.within, asked.retain)
        check_accept(asked.accept)
        _ = asked.seconds, as_solver(asked.solver), _method(asked.method)

    def propose(self, removal: Removal[Snapshot]) -> Proposal:
        """One step of the method, from stored sums; then what the retained rows allow, where they are given."""
        snapshot, asked, retain = removal.snapshot, removal.access, removal.access.retain
        source_of = partial(asked.source, removal.reading, snapshot.threat_model)
        source = source_of(removal.data, sorted([*removal.positions, *removal.kept]))
        # forgotten rows are read from `data` alone: in `retain` they may be blank
        retained = None if retain is None else source_of(retain, removal.kept)
        problem = _problem(removal.model, snapshot, source, removal.reading)
        solver, shards = as_solver(asked.solver), asked.shards or Shards.current()
        request = Request(problem, snapshot, source, removal.positions, solver, retained, shards)
        now = problem.read_theta()
        method = _method(asked.method)
        step = method.step(request)
        result = _begun(request, step, method, removal)
        if not asked.refine:  # which would lead away from a bad step
            result.warnings += warnings_of(result.quality)
        after = _downdated(snapshot, step, removal.positions)
        remember_owed(after, result.quality)
        step.theta = theta = problem.rounded(step.theta)
        if retain is not None:
            theta = with_retained(request, step, removal, now, after, result)
        else:
            require_trust(snapshot, result.quality, asked.accept)
        if not bool(torch.isfinite(theta).all()):
            raise SolveError("The new weights are not finite. Nothing was changed; take a new snapshot and try again.")
        result.step_norm = float((theta - now).norm())
        outside = outside_head(problem)
        result.warnings += _warnings(outside, result, retain)
        write = partial(problem.write_theta, theta)
        return Proposal(result, after, problem.head.linear.parameters(), write, said=outside)


def _by_name(snapshot: Snapshot, model: nn.Module) -> WholeDecay:
    """The decay of a snapshot by parameter name (one number per parameter, as optimisers have it)."""
    head = dict(model.named_modules())[snapshot.head_name]
    assert isinstance(head, nn.Linear)
    prefix = f"{snapshot.head_name}." if snapshot.head_name else ""
    found = WholeDecay({f"{prefix}weight": float(snapshot.decay[0, 0])})
    if head.bias is not None:
        found[f"{prefix}bias"] = float(snapshot.decay[0, -1])
    return found


def _problem(model: nn.Module, snapshot: Snapshot, source: SampleSource, reading: Reading) -> HeadProblem:
    """The model as a function of its head.

    Raises:
        MismatchError: the model's head is another one than the snapshot's.
    """
    problem = HeadProblem(model, reading.loss, source.examples(), reading)
    if problem.head.name != snapshot.head_name or tuple(snapshot.theta_ref.shape) != problem.shape:
        raise MismatchError(
            f"model: its head is {problem.head.name!r} {problem.shape}, the snapshot's {snapshot.head_name!r} "
            f"{tuple(snapshot.theta_ref.shape)}. Take a new snapshot."
        )
    return problem


def _begun(request: Request, step: Step, method: Method, removal: Removal[Snapshot]) -> UnlearnResult:
    """The result of a request as far as the step alone tells it."""
    snapshot = request.snapshot
    return UnlearnResult(
        method=method.name,
        response=snapshot.response.name,
        scope=snapshot.scope,
        forgotten=request.forget,
        n_retained=len(removal.kept),
        step_norm=0.0,
        solver=step.solution.to_dict(),
        fingerprint_before=snapshot.fingerprint,
        dry_run=removal.access.dry_run,
        within=removal.access.within,
        quality=quality_of(request, step),
        parameters=parameter_names(request.problem.head),
    )


def _method(given: object) -> Method:
    if given is None:
        return MUter()
    if not isinstance(given, Method):
        advice = "MUter() is the default; how its system is solved is solver=."
        raise ArgumentError("method", given, "a lightning_muter.Method", advice)
    return given


def _downdated(snapshot: Snapshot, step: Step, positions: list[int]) -> Snapshot:
    """The snapshot after the request (statistics minus the forgotten terms), sharing nothing that changes."""
    return snapshot.without(
        positions, hessian=replace(step.hessian, blocks=step.hessian.blocks.cpu()), gradient=step.gradient.cpu()
    )


def _warnings(outside: list[str], result: UnlearnResult, retain: object) -> list[str]:
    carried = (
        "The snapshot's reference weights and statistics still carry the forgotten samples' influence until refresh."
    )
    notes = [*outside, carried]
    if retain is None:
        notes.append("no certificate: it needs the retained data (retain=train_dataset)")
    if result.solver["status"] != "converged":
        notes.append(f"The system ended with status {result.solver['status']!r}, accepted on request.")
    return notes
