"""How a `WideSnapshot` is taken: digests, the objective, and how stationary the weights are in it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.network import WideObjective
from lightning_muter.curvature.problem.network import WideProblem
from lightning_muter.errors import UnsuitableError
from lightning_muter.minimise.levenberg_marquardt import LevenbergMarquardt
from lightning_muter.model.reading import Reading
from lightning_muter.scope.asked import DAMPING, Take
from lightning_muter.snapshot.remarks import left_outside, warn
from lightning_muter.snapshot.snapshot import WideSnapshot
from lightning_muter.solvers.cg import TruncatedCG
from lightning_muter.storage.fingerprint import weight_fingerprint

#: Stationarity above which a snapshot says that the weights are not a minimum.
_STATIONARY = 1e-2


def taken(asked: Take, steps: int) -> WideSnapshot:
    """The snapshot that is asked for, of a scope by name; the model is polished by so many Newton-CG steps."""
    began = time.perf_counter()
    model, dataset, reading = asked.model, asked.dataset, asked.read_all(whole=True)
    objective = asked.objective(model, dataset, range(len(dataset)), reading)  # type: ignore[arg-type]
    problem = objective.problem
    w, first, now = _polished(objective, steps, asked.progress)
    notes = _notes(problem, reading, now)
    warn(notes)
    identity = asked.identity(objective.source, reading)
    problem.write(w)
    return WideSnapshot(
        **identity,
        patterns=[asked.scope] if isinstance(asked.scope, str) else list(asked.scope),
        parameters=list(problem.names),
        decay=asked.decay_by_name(model, problem.names, reading.penalty),
        response=objective.response,
        curvature=asked.direct,
        inner=objective.inner,
        smoothing=objective.smoothing,
        fingerprint=weight_fingerprint(model.state_dict()),
        stationarity=now.stationarity,
        trades_beta=asked.trades_beta,
        warnings=notes,
        figures={
            "passes": objective.passes,
            "objective": now.value,
            "stationarity_before": first.stationarity,
            "converged": now.converged,
            "seconds": time.perf_counter() - began,
        },
    )


def _polished(objective: WideObjective, steps: int, progress: bool) -> tuple[Tensor, Evaluation, Evaluation]:
    """Weights after so many steps, and the objective at the weights before and at these.

    Raises:
        UnsuitableError: it is not finite there.
    """
    w = objective.problem.read()
    first = now = objective.evaluate(w)
    if steps:
        title = "polish" if progress and objective.leads else None
        found = LevenbergMarquardt(objective, TruncatedCG(), DAMPING, title=title).run(w, steps, 1e-6)
        w, now = found.w, found.last
    if not bool(torch.isfinite(now.gradient).all()):
        raise UnsuitableError("The objective is not finite at the model's weights. Check the weights and the loss.")
    return w, first, now


def _notes(problem: WideProblem, reading: Reading, now: Evaluation) -> list[str]:
    notes = [*reading.notes, *left_outside(problem.module, problem.parameters())]
    if now.stationarity > _STATIONARY:
        notes.append(
            f"The weights are not stationary: |grad F| / sqrt(n sum |grad phi_i|^2) = {now.stationarity:.1e}. A request also "
            "goes on minimising; train longer, or pass polish=<steps>, to see the removal alone."
        )
    return notes
