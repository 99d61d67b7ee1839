"""Unlearning: request -> forget part -> solve -> step -> (refine) -> evidence -> commit. All of it or nothing."""

from __future__ import annotations

import time
import warnings as warning_module
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.certificate.certificate import certify, why_no_certificate
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.errors import ArgumentError, MismatchError, RequestError, SolveError
from lightning_muter.minimise.refine import refined
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.model.losses import Loss, resolve_loss
from lightning_muter.scope.head_methods import Method, MUter, Request, Step, check_requirements
from lightning_muter.snapshot.snapshot import WIDE_BATCH, Snapshot, Stored, WideSnapshot, loss_name
from lightning_muter.snapshot.take import bar, check_digests, outside_head
from lightning_muter.solvers.choose import Solver, as_solver
from lightning_muter.storage.fingerprint import weight_fingerprint


@dataclass
class UnlearnResult:
    """What a request did.

    Attributes:
        forgotten: positions removed by this request.         n_retained: samples left.
        step_norm: |w_u - w|.        solver: status, residual, iterations.
        stationarity_before, stationarity_after: of the retained objective at w and w_u (with ``retain``).
        bound: certified distance of w_u to the retrained optimum, or None (``warnings`` says why).
        refine: stationarity after each refine step.
    """

    method: str
    response: str
    scope: str
    forgotten: list[int]
    n_retained: int
    step_norm: float
    solver: dict[str, Any]
    stationarity_before: float | None = None
    stationarity_after: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    fingerprint_before: str = ""
    fingerprint_after: str = ""
    dry_run: bool = False
    refine: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


@torch.inference_mode(False)
def unlearn(
    model: nn.Module,
    snapshot: Snapshot | WideSnapshot,
    forget: Iterable[int],
    data: Dataset[Any],
    *,
    method: Method | None = None,
    solver: str | Solver = "auto",
    retain: Dataset[Any] | None = None,
    refine: int = 0,
    dry_run: bool = False,
    loss: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 1024,
    shards: Shards | None = None,
    progress: bool = True,
) -> UnlearnResult:
    """Remove samples from a trained model: on success model and snapshot hold the new state, else the old one.

    A `Snapshot` is of the head and needs the rows to forget alone. A `WideSnapshot` (any subset of the parameters) reads the
    retained rows too, from ``retain`` or else ``data``, and takes 1 + ``refine`` Newton-CG steps
    (:func:`lightning_muter.scope.network.unlearn_stored`).

    Args:
        model: with the weights the snapshot belongs to.
        forget: positions in the training dataset.
        data: the training dataset (the rows to forget are read, and a few others to recognise the model's form).
        method: default :class:`lightning_muter.scope.head_methods.MUter`.
        solver: "auto", "cholesky", "cg", "neumann", "schur" or a Solver.
        retain: the full training dataset again: allows ``refine``, stationarity and the certificate. Rows forgotten now
            or before are not read.
        refine: accepted steps of L-BFGS on the retained objective in the metric of the total Hessian, which is taken anew
            where the request went too far for the stored one (a whole class).
        dry_run: compute everything, change nothing.
        shards: this process's share of the samples; None asks torch.distributed. Every process of the group makes the same
            call and gets the same weights; ``Shards()``: this one works alone.

    Raises:
        ArgumentError, RequestError: bad positions; MismatchError: model, data or loss are not the snapshot's;
        SolveError: the system was not solved. Model and snapshot are as they were.
    """
    if isinstance(snapshot, WideSnapshot):
        from lightning_muter.scope.network import unlearn_stored

        return unlearn_stored(
            model, snapshot, forget, data, retain=retain, refine=refine, method=method, solver=solver, dry_run=dry_run,
            loss=loss, collate=collate, batch_size=min(batch_size, WIDE_BATCH), shards=shards, progress=progress,
        )  # fmt: skip
    began = time.perf_counter()
    positions = checked_positions(forget, snapshot)
    if not (isinstance(refine, int) and not isinstance(refine, bool) and refine >= 0):
        raise ArgumentError("refine", refine, "a whole number, 0 or larger")
    if refine and retain is None:
        raise ArgumentError("refine", refine, "0 without retained data", "Pass retain=train_dataset as well.")
    chosen_solver, method = as_solver(solver), method or MUter()
    check_requirements(method, snapshot)
    snapshot.check_length(data, "data")
    snapshot.check_model(model)
    loss = resolve_loss(loss, model)
    if loss_name(loss) != snapshot.loss_name:
        raise MismatchError(
            f"loss: got {loss_name(loss)}, the snapshot was taken with {snapshot.loss_name}. Pass that loss, or take a new "
            "snapshot."
        )
    check_digests(snapshot, data, positions, "data", collate)
    kept = [i for i in snapshot.retained_positions if i not in set(positions)]
    if retain is not None:
        snapshot.check_length(retain, "retain")
        check_digests(snapshot, retain, kept, "retain", collate)
    device = next(model.parameters()).device

    def source_of(dataset: Dataset[Any], readable: list[int]) -> SampleSource:
        return SampleSource(
            dataset,
            collate=collate,
            batch_size=batch_size,
            device=device,
            weight=snapshot.sample_weight,
            threat=snapshot.threat_model,
            readable=readable,
        )

    source = source_of(data, sorted([*positions, *kept]))
    # forgotten rows are read from `data` alone: in `retain` they may be blank
    retained = None if retain is None else source_of(retain, kept)
    problem = HeadProblem(model, loss, source.examples())
    if problem.head.name != snapshot.head_name or tuple(snapshot.theta_ref.shape) != problem.shape:
        raise MismatchError(
            f"model: its head is {problem.head.name!r} {problem.shape}, the snapshot's {snapshot.head_name!r} "
            f"{tuple(snapshot.theta_ref.shape)}. Take a new snapshot."
        )
    request = Request(problem, snapshot, source, positions, chosen_solver, retained, shards or Shards.current())
    now = problem.read_theta()
    step = method.step(request)
    result = UnlearnResult(
        method=method.name,
        response=snapshot.response.name,
        scope=snapshot.scope,
        forgotten=positions,
        n_retained=len(kept),
        step_norm=0.0,
        solver=step.solution.to_dict(),
        fingerprint_before=snapshot.fingerprint,
        dry_run=dry_run,
    )
    after = _downdated(snapshot, step, positions)
    theta = step.theta
    if retain is not None:
        theta = _with_retained(request, step, kept, now, after, result, refine, progress)
    if not bool(torch.isfinite(theta).all()):
        raise SolveError("The new weights are not finite. Nothing was changed; take a new snapshot and try again.")
    result.step_norm = float((theta - now).norm())
    result.warnings += _warnings(model, problem, snapshot, result, retain)
    outside = outside_head(model, problem)
    if outside:  # before anything is changed: a warning may be an error
        warning_module.warn(outside, stacklevel=3)
    _commit(model, problem, snapshot, after, theta, result, dry_run)
    result.seconds = time.perf_counter() - began
    return result


def checked_positions(forget: Iterable[int], snapshot: Stored) -> list[int]:
    """Positions to forget, as a list.

    Raises:
        ArgumentError: empty, not whole numbers, out of range or twice.
        RequestError: already forgotten, or nothing would be left.
    """
    if isinstance(forget, (str, bytes)) or not isinstance(forget, Iterable) or getattr(forget, "ndim", 1) != 1:
        raise ArgumentError("forget", forget, "positions in the training dataset, e.g. [3, 17]")
    values = forget.tolist() if isinstance(forget, Tensor) else list(forget)
    positions = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ArgumentError("forget", value, "whole numbers", "Pass positions in the training dataset.")
        positions.append(value.__index__())
    if not positions:
        raise ArgumentError("forget", positions, "at least one position", "Pass positions in the training dataset.")
    out = [i for i in positions if not 0 <= i < snapshot.n_total]
    if out:
        raise ArgumentError(
            "forget", out[:5], f"positions from 0 to {snapshot.n_total - 1}", "Negative ones do not count."
        )
    if len(set(positions)) != len(positions):
        twice = sorted({i for i in positions if positions.count(i) > 1})[:5]
        raise ArgumentError("forget", twice, "each position once", "Remove the duplicates.")
    again = sorted(set(positions) & set(snapshot.forgotten))
    if again:
        raise RequestError(
            f"forget: positions {again[:5]} were forgotten before; allowed: positions not yet forgotten. Leave them out; "
            "nothing remains to be done for them."
        )
    if len(positions) >= snapshot.n_retained:
        raise RequestError(
            f"forget: all {snapshot.n_retained} samples that are left; allowed: fewer. Delete the model instead."
        )
    return positions


def _downdated(snapshot: Snapshot, step: Step, positions: list[int]) -> Snapshot:
    """The snapshot after the request (statistics minus the forgotten terms), sharing nothing that changes."""
    gone = torch.tensor(positions, dtype=torch.int64)

    def blanked(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        rows = rows.clone()
        rows[gone] = 0
        return rows

    digests = blanked(snapshot.digests)
    assert digests is not None
    return replace(
        snapshot,
        hessian=replace(step.hessian, blocks=step.hessian.blocks.cpu()),
        gradient=step.gradient.cpu(),
        forgotten=[*snapshot.forgotten, *positions],
        digests=digests,
        starts=blanked(snapshot.starts),
        base_starts=blanked(snapshot.base_starts),
    )


def _with_retained(
    request: Request,
    step: Step,
    kept: list[int],
    now: Tensor,
    after: Snapshot,
    result: UnlearnResult,
    refine: int,
    progress: bool,
) -> Tensor:
    """Stationarity before and after, refine steps, and the certificate; updates ``after`` and ``result``."""
    snapshot, theta = request.snapshot, step.theta
    starts = snapshot.base_starts if snapshot.base_starts is not None else snapshot.starts
    objective = request.objective(kept, starts, request.retained)
    with bar(objective, "refine" if refine else "certify", progress) as on_step:
        at_now = objective.evaluate(now)
        objective.accept(at_now)
        result.stationarity_before = at_now.stationarity
        evaluation = objective.evaluate(theta, explore=bool(refine))
        if refine:
            found = refined(
                objective,
                theta,
                step.matrix,
                snapshot.response,
                snapshot.curvature,
                before=at_now,
                first=evaluation,
                steps=refine,
                on_step=on_step,
            )
            theta, evaluation = found.theta, found.evaluation
            result.refine = found.history[1:]
            # from now on gradients count from here; curvature stays at theta_ref
            base_starts = objective.stored_starts()
            sums, delta = objective.sums(theta)
            evaluation = objective.evaluation(theta, sums, delta)
            after.theta_base, after.gradient = theta.cpu(), sums.gradient.cpu()
            if base_starts is not None:
                full = torch.zeros(snapshot.n_total, *base_starts.shape[1:], dtype=base_starts.dtype)
                full[torch.tensor(kept)] = base_starts
                after.base_starts = full
        result.stationarity_after = evaluation.stationarity
        after.stationarity = evaluation.stationarity
        why = why_no_certificate(request.problem, objective.decay)
        if why is None:
            result.bound = certify(objective, theta, evaluation)
        else:
            result.warnings.append(why)
    return theta


def _warnings(
    model: nn.Module, problem: HeadProblem, snapshot: Snapshot, result: UnlearnResult, retain: object
) -> list[str]:
    notes = []
    outside = outside_head(model, problem)
    if outside:
        notes.append(outside)
    notes.append(
        "The snapshot's reference weights and statistics still carry the forgotten samples' influence until refresh."
    )
    if retain is None:
        notes.append("no certificate: it needs the retained data (retain=train_dataset)")
    if result.solver["status"] != "converged":
        notes.append(f"The system ended with status {result.solver['status']!r}, accepted on request.")
    return notes


def _commit(
    model: nn.Module,
    problem: HeadProblem,
    snapshot: Snapshot,
    after: Snapshot,
    theta: Tensor,
    result: UnlearnResult,
    dry_run: bool,
) -> None:
    """Write the weights, take the fingerprint, switch the snapshot; on any failure (or a dry run) the weights go back."""
    linear = problem.head.linear
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    done = False
    try:
        problem.write_theta(theta)
        result.fingerprint_after = after.fingerprint = weight_fingerprint(model.state_dict())
        if not dry_run:
            snapshot.adopt(after)
            done = True
    finally:
        if not done:
            with torch.no_grad():
                for name, p in linear.named_parameters():
                    p.copy_(before[name])
