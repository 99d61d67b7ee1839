"""Unlearning: request -> forget part -> solve -> step -> (refine) -> evidence -> commit. All of it or nothing."""

from __future__ import annotations

import math
import time
import warnings as warning_module
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.errors import ArgumentError, MismatchError, SolveError
from lightning_muter.forgotten.digests import check_digests
from lightning_muter.forgotten.modules import check_remembered, remember
from lightning_muter.forgotten.rows import Forgotten, barred_after
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.model.losses import Loss
from lightning_muter.model.modes import full_precision
from lightning_muter.model.reading import Reading
from lightning_muter.scope.head_methods import Method, MUter, Request, Step
from lightning_muter.scope.network import unlearn_stored
from lightning_muter.snapshot.given import check_given
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.remarks import outside_head
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot
from lightning_muter.solvers.base import Solver
from lightning_muter.solvers.choose import as_solver
from lightning_muter.unlearning.commit import adopter, commit
from lightning_muter.unlearning.positions import checked_positions
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

#: For how long a certificate is looked for unless somebody asks for more.
CERTIFY_SECONDS = 5.0


@ranks_agree
@torch.inference_mode(False)
@full_precision()
def unlearn(
    model: nn.Module,
    snapshot: Snapshot | WideSnapshot,
    forget: Iterable[int],
    data: Dataset[Any] | None = None,
    *,
    method: Method | None = None,
    solver: str | Solver = "auto",
    retain: Dataset[Any] | None = None,
    refine: int = 0,
    within: float | None = None,
    certify: bool | float = CERTIFY_SECONDS,
    accept: str | None = None,
    dry_run: bool = False,
    loss: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 1024,
    inputs: Any = None,
    label: Any = None,
    shards: Shards | None = None,
    progress: bool = True,
) -> UnlearnResult:
    """Remove samples from a trained model: on success model and snapshot hold the new state, else the old one.

    A `Snapshot` is of the head and needs the rows to forget alone. A `WideSnapshot` (any subset of the parameters) reads the
    retained rows too, from ``retain`` or else ``data``, and takes 1 + ``refine`` Newton-CG steps
    (:func:`lightning_muter.scope.network.unlearn_stored`).

    Args:
        model: with the weights the snapshot belongs to.
        snapshot: of this model; it too holds the state after the request.
        forget: positions in the training dataset.
        data: the training dataset (the rows to forget are read, and a few others to recognise the model's form); None takes
            ``retain``.
        method: default :class:`lightning_muter.scope.head_methods.MUter`.
        solver: "auto", "cholesky", "cg", "neumann", "schur" or a Solver.
        retain: the full training dataset again: allows ``refine``, stationarity and the certificate. Rows forgotten now
            or before are not read.
        refine: accepted steps of L-BFGS on the retained objective in the metric of the total Hessian, which is taken anew
            where the request went too far for the stored one (a whole class).
        within: refine until the certified distance to retraining is below this, else refuse. For
            :func:`lightning_muter.publish`: fix it before you see any request.
        certify: with ``retain``, look for a certificate (linear models): for about so many seconds of a processor beyond a first
            look at every sample, half of them for passes of retraining on from the new weights where that is quick or the bound is
            loose (their end only measures how far these are: :mod:`lightning_muter.unlearning.certified`); True: a minute; False: not
            at all.
        accept: "worse" takes the step even where it raises the robust objective of the retained rows (known with ``retain``), or
            where most of it is owed to a snapshot that could not be made stationary. None refuses it.
        dry_run: compute everything, change nothing.
        loss: of the training, where it is not read off the module; as in :func:`lightning_muter.take_snapshot`.
        collate: the training loader's ``collate_fn``, where it had one of its own.
        batch_size: samples at a time.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        shards: this process's share of the samples; None asks torch.distributed. Every process of the group makes the same
            call and gets the same weights; ``Shards()``: this one works alone.
        progress: show a bar on a terminal.

    Returns:
        What was done, and how near it is: ``print`` it.

    Raises:
        ArgumentError: an option out of range, or positions that are none of the dataset.
        RequestError: positions that were forgotten before, or nothing would be left.
        MismatchError: model, data or loss are not the snapshot's.
        SolveError: the system was not solved, ``within`` was not reached, or the step makes the model worse.
            After any error model and snapshot are as they were.

    >>> from torch.utils.data import TensorDataset
    >>> from lightning_muter import ThreatModel, take_snapshot
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> model = nn.Linear(4, 2)
    >>> snapshot = take_snapshot(model, rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, progress=False)
    >>> result = unlearn(model, snapshot, [3, 17], rows, retain=rows, refine=2, progress=False)
    >>> snapshot.forgotten, result.n_retained, result.bound < 1e-3
    ([3, 17], 28, True)
    """
    data = _training_data(data, retain)
    check_given(model, snapshot, data=data, retain=retain)
    access = Access(loss, collate, batch_size, inputs, label)
    if isinstance(snapshot, WideSnapshot):
        if within is not None:
            raise ArgumentError("within", within, "None beyond the head", "Only linear models have a certificate.")
        return unlearn_stored(
            model, snapshot, forget, data, access=access, retain=retain, refine=refine, method=method, solver=solver,
            dry_run=dry_run, shards=shards, progress=progress,
        )  # fmt: skip
    began = time.perf_counter()
    positions = checked_positions(forget, snapshot)
    _check_refine(refine, retain)
    check_within(within, retain)
    seconds = _seconds(certify)
    check_accept(accept)
    chosen_solver, method = as_solver(solver), _method(method)
    snapshot.check_length(data, "data")
    snapshot.check_model(model)
    check_remembered(model, snapshot)
    gone = set(positions)
    kept = [i for i in snapshot.retained_positions if i not in gone]
    reading = access.reading(model, snapshot, data, sorted([*positions, *kept]))
    check_digests(snapshot, data, positions, "data", collate)
    source = access.source(reading, snapshot, data, sorted([*positions, *kept]))
    retained = None
    if retain is not None:  # forgotten rows are read from `data` alone: in `retain` they may be blank
        snapshot.check_length(retain, "retain")
        check_digests(snapshot, retain, kept, "retain", collate)
        retained = access.source(reading, snapshot, retain, kept)
    problem = _problem(model, snapshot, source, reading)
    request = Request(problem, snapshot, source, positions, chosen_solver, retained, shards or Shards.current())
    now = problem.read_theta()
    step = method.step(request)
    result = _begun(request, step, method, kept, within, dry_run)
    if not refine:  # which would lead away from a bad step
        result.warnings += warnings_of(result.quality)
    after = _downdated(snapshot, step, positions)
    remember_owed(after, result.quality)
    after.barred = barred_after(snapshot, data, positions, collate)
    step.theta = theta = problem.rounded(step.theta)
    if retain is not None:
        theta = with_retained(request, step, kept, now, after, result, refine, seconds, accept, progress)
    else:
        require_trust(snapshot, result.quality, accept)
    if not bool(torch.isfinite(theta).all()):
        raise SolveError("The new weights are not finite. Nothing was changed; take a new snapshot and try again.")
    result.step_norm = float((theta - now).norm())
    result.warnings += _warnings(model, problem, result, retain)
    outside = outside_head(model, problem)
    if outside:  # before anything is changed: a warning may be an error
        warning_module.warn(outside, stacklevel=4)
    commit(
        model, problem.head.linear.parameters(), lambda: problem.write_theta(theta), adopter(snapshot, after), result
    )
    if not dry_run:
        remember(model, Forgotten.of(snapshot))
    result.seconds = time.perf_counter() - began
    return result


def _training_data(data: Dataset[Any] | None, retain: Dataset[Any] | None) -> Dataset[Any]:
    found = retain if data is None else data
    if found is None:
        advice = "The rows to forget are read from it: unlearn(model, snapshot, forget, train_dataset)."
        raise ArgumentError("data", None, "the training dataset", advice)
    return found


def _method(given: object) -> Method:
    if given is None:
        return MUter()
    if not isinstance(given, Method):
        raise ArgumentError(
            "method", given, "a lightning_muter.Method", "MUter() is the default; how its system is solved is solver=."
        )
    return given


def _check_refine(refine: int, retain: object) -> None:
    if not (isinstance(refine, int) and not isinstance(refine, bool) and refine >= 0):
        raise ArgumentError("refine", refine, "a whole number, 0 or larger")
    if refine and retain is None:
        raise ArgumentError("refine", refine, "0 without retained data", "Pass retain=train_dataset as well.")


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


def _begun(
    request: Request, step: Step, method: Method, kept: list[int], within: float | None, dry_run: bool
) -> UnlearnResult:
    """The result of a request as far as the step alone tells it."""
    snapshot, linear = request.snapshot, request.problem.head.linear
    return UnlearnResult(
        method=method.name,
        response=snapshot.response.name,
        scope=snapshot.scope,
        forgotten=request.forget,
        n_retained=len(kept),
        step_norm=0.0,
        solver=step.solution.to_dict(),
        fingerprint_before=snapshot.fingerprint,
        dry_run=dry_run,
        within=within,
        quality=quality_of(request, step),
        parameters=[f"{snapshot.head_name}.{name}".lstrip(".") for name, _ in linear.named_parameters()],
    )


def _seconds(certify: bool | float) -> float | None:
    """How long a certificate may be looked for; None: not at all."""
    if isinstance(certify, bool):
        return 60.0 if certify else None
    if not (isinstance(certify, (int, float)) and 0 < certify < math.inf):
        raise ArgumentError("certify", certify, "True, False or a number of seconds above 0")
    return float(certify)


def _downdated(snapshot: Snapshot, step: Step, positions: list[int]) -> Snapshot:
    """The snapshot after the request (statistics minus the forgotten terms), sharing nothing that changes."""
    return snapshot.without(
        positions, hessian=replace(step.hessian, blocks=step.hessian.blocks.cpu()), gradient=step.gradient.cpu()
    )


def _warnings(model: nn.Module, problem: HeadProblem, result: UnlearnResult, retain: object) -> list[str]:
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
