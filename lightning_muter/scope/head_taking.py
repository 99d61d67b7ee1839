"""How the `Snapshot` of a head is taken: polished, summed, and what is said of it."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.errors import MismatchError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.minimise.budget import Budget, Fit
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.reading import Reading
from lightning_muter.scope.asked import Take
from lightning_muter.snapshot.polishing import AIM, Polish, Polished
from lightning_muter.snapshot.progress import bar
from lightning_muter.snapshot.remarks import warn
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.taken import Taken
from lightning_muter.snapshot.trained import head_decay, trained_threat
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint


def taken(asked: Take, reading: Reading) -> Snapshot:
    """The snapshot that is asked for, of the head that was read; the model's head is polished."""
    began = time.perf_counter()
    model, like = asked.model, asked.like
    curvature = asked.curvature or "hessian"
    threat = trained_threat(model, asked.threat_model, asked.attack)
    parameter = next(model.parameters())
    source = asked.source(asked.dataset, reading, threat, parameter.device)
    problem = HeadProblem(model, reading.loss, source.examples(), reading)
    decay = head_decay(problem, model, asked.weight_decay, asked.optimizers, reading.penalty)
    inner = asked.inner or (like.inner if like is not None else InnerSolver())
    objective = ShardedObjective(problem, threat, source, decay, inner, asked.smoothing or Smoothing.of(problem))
    anchored = _anchor(objective, model, asked.smoothing, like)
    polishing = Polish(
        limit=asked.polish,
        aim=asked.tolerance if asked.tolerance is not None else AIM.get(parameter.dtype, 1e-3),
        budget=Budget((asked.fit or Fit()).allowance(asked.budget)),
        examples=asked.examples,
        given=isinstance(asked.response, Response),
        anchored=anchored,
        own_smoothing=asked.smoothing is None and not anchored,
        progress=asked.progress,
    )
    before = problem.read_theta()
    polished = polishing.run(
        objective, before, as_response(asked.response, threat).resolved(problem.backbone, source.n)
    )
    taken = _take(objective, polished, asked)
    figures = polished.figures(objective, reading.loss, before) | taken.figures(polishing)
    notes = [*reading.notes, *taken.notes(polishing, asked.attack)]
    key = asked.key or (like.key if like is not None else None) or DigestKey.generate()
    digests = _digests(source, key, like)
    warn(notes)
    if asked.polish != 0:
        problem.write_theta(polished.theta)
    return taken.record(
        reading,
        curvature=curvature,
        warnings=notes,
        figures=figures | {"seconds": time.perf_counter() - began},
        fingerprint=weight_fingerprint(model.state_dict()),
        digests=digests,
        key=key,
    )


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


def _digests(source: SampleSource, key: DigestKey, like: Snapshot | None) -> Tensor:
    """Keyed digests of all samples.

    Raises:
        MismatchError: ``like`` is of other rows.
    """
    digests = sample_digests(key, source, range(source.n))
    if like is not None and like.key_id == key.key_id and not torch.equal(digests, like.digests):
        raise MismatchError("like: it was taken of other rows, or in another order. Pass the same dataset.")
    return digests


def _take(objective: ShardedObjective, polished: Polished, asked: Take) -> Taken:
    """The sums at a polished head, at the very maximisers that it was trained on."""
    done, like, curvature = polished.done, asked.like, asked.curvature or "hessian"
    as_found = done.as_found if done is not None else like is not None and like.inner.as_found
    objective.starts_as_found(as_found)
    if objective.delta is None and not objective.reproducible:
        objective.accept(objective.evaluate(polished.theta, explore=True))
    starts = objective.stored_starts()
    with bar(objective, "snapshot", asked.progress):
        if asked.resume is not None:
            sums, final = asked.resume.sums(objective, polished.theta, polished.response, curvature, not as_found)
        else:
            sums, final = objective.sums(
                polished.theta, response=polished.response, curvature=curvature, settle=not as_found
            )
    return Taken(objective, polished, sums, final, starts)
