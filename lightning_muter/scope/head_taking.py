"""How the `Snapshot` of a head is taken: polished, summed, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.curvature.hessian.sums import Sums
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.errors import UnsuitableError
from lightning_muter.minimise.budget import Budget, Fit
from lightning_muter.minimise.corners import least_subgradient
from lightning_muter.model.reading import Reading
from lightning_muter.model.weight_decay import no_decay_text
from lightning_muter.scope.asked import Take
from lightning_muter.snapshot.polishing import Polished, polished
from lightning_muter.snapshot.progress import bar
from lightning_muter.snapshot.remarks import constant_note, head_notes, warn
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.storage.fingerprint import weight_fingerprint


def taken(asked: Take, reading: Reading) -> Snapshot:
    """The snapshot that is asked for, of the head that was read; the model's head is polished."""
    began = time.perf_counter()
    model, like = asked.model, asked.like
    threat = asked.threat(model)
    source = asked.rows(reading, threat, asked.dataset)
    problem = HeadProblem(model, reading.loss, source.examples(), reading)
    decay = _decay(asked, problem, reading.penalty)
    inner = asked.inner or (like.inner if like is not None else InnerSolver())
    objective = ShardedObjective(problem, threat, source, decay, inner, asked.smoothing or Smoothing.of(problem))
    anchored = _anchor(objective, model, asked.smoothing, like)
    budget, before = Budget((asked.fit or Fit()).allowance(asked.budget)), problem.read_theta()
    found = polished(objective, asked, anchored, budget)
    sums, maximisers, starts = _sums(objective, found, asked)
    reached = objective.evaluation(found.theta, sums, maximisers)
    if not bool(torch.isfinite(found.theta).all()) or not bool(torch.isfinite(reached.gradient).all()):
        raise UnsuitableError("The objective is not finite at the model's weights. Check the weights and the loss.")
    figures = found.figures(objective, reading.loss, before)
    figures |= _figures(objective, reached, sums, _sharp(objective, found.theta, maximisers, budget))
    notes = [*reading.notes, *head_notes(problem, reached, sums, found.aim, asked.polish != 0, asked.attack)]
    if found.best is not None and found.best.is_constant:
        notes.append(constant_note(found.best, threat))
    identity = asked.identity(source, reading)
    warn(notes)
    if asked.polish != 0:
        problem.write_theta(found.theta)
    anchor = objective.smoothing.anchor
    assert sums.hessian is not None
    return Snapshot(
        **identity,
        theta_ref=found.theta.cpu(),
        theta_base=found.theta.cpu().clone(),
        gradient=sums.gradient.cpu(),
        hessian=replace(sums.hessian, blocks=sums.hessian.blocks.cpu()),
        decay=objective.decay.cpu(),
        response=found.response,
        curvature=asked.curvature or "hessian",
        head_name=problem.head.name,
        smoothing=replace(objective.smoothing, anchor=None if anchor is None else anchor.cpu()),
        inner=objective.inner,
        fingerprint=weight_fingerprint(model.state_dict()),
        stationarity=figures["stationarity"],
        starts=starts,
        warnings=notes,
        figures=figures | {"seconds": time.perf_counter() - began},
    )


def _decay(asked: Take, problem: HeadProblem, penalty: Mapping[str, float]) -> Tensor:
    """lambda per entry of theta, (K, q).

    Raises:
        UnsuitableError: 0 for the head's weights, decoupled, or of an unknown kind.
    """
    prefix = f"{problem.head.name}." if problem.head.name else ""
    names = [f"{prefix}weight"] + ([f"{prefix}bias"] if problem.has_bias else [])
    values = asked.decay_by_name(asked.model, names, penalty)
    decay = torch.zeros(problem.shape, dtype=problem.dtype, device=problem.device)
    decay[:, : problem.backbone.width] = values[names[0]]
    if problem.has_bias:
        decay[:, -1] = values[names[1]]
    if float(decay[0, 0]) == 0.0:
        raise UnsuitableError(no_decay_text([names[0]]))
    return decay


def _sharp(objective: ShardedObjective, theta: Tensor, maximisers: Tensor, budget: Budget) -> float | None:
    """Stationarity with nothing smoothed; of a network it costs an ascent: where a budget counts, the smoothed one stands alone."""
    if not objective.problem.backbone.affine and budget.limit is not None:
        return None
    return least_subgradient(objective, theta, maximisers)


def _figures(objective: ShardedObjective, reached: Evaluation, sums: Sums, sharp: float | None) -> dict[str, Any]:
    return {
        "stationarity": max(reached.stationarity, sharp or 0.0),
        "stationarity_smoothed": reached.stationarity,
        "stationarity_unsmoothed": sharp,
        "objective": reached.value,
        "passes": objective.passes,
        "counts": {k: int(v) for k, v in sums.counts.items() if v},
    }


def _anchor(objective: ShardedObjective, model: nn.Module, smoothing: Smoothing | None, like: Snapshot | None) -> bool:
    """Say at which head switches are smoothed; whether that was given."""
    if like is not None:
        like.check_model(model)
        objective.set_smoothing(like.smoothing)
        if like.starts is not None:
            objective.restore(like.starts)
        return True
    if smoothing is not None and smoothing.anchor is not None:
        return True
    objective.anchor(objective.problem.read_theta())
    return False


def _sums(objective: ShardedObjective, found: Polished, asked: Take) -> tuple[Sums, Tensor, Tensor | None]:
    """The sums at a polished head, at the very maximisers that it was trained on; these; and where a file lets them start from."""
    done, like, curvature = found.done, asked.like, asked.curvature or "hessian"
    as_found = done.as_found if done is not None else like is not None and like.inner.as_found
    objective.starts_as_found(as_found)
    if objective.delta is None and not objective.reproducible:
        objective.accept(objective.evaluate(found.theta, explore=True))
    starts = objective.stored_starts()
    how: dict[str, Any] = {"response": found.response, "curvature": curvature, "settle": not as_found}
    with bar(objective, "snapshot", asked.progress):
        if asked.resume is not None:
            return *asked.resume.sums(objective, found.theta, **how), starts
        return *objective.sums(found.theta, **how), starts
