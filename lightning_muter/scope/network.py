"""Unlearning any subset of the parameters, a whole network included, with the retained data at hand.

Nothing of the size p x p is stored: Newton steps on the retained objective F_R, from the weights at hand,

    (H_R + mu |R| I) d = -grad F_R(w),      H_R = sum_R D2 phi_i + |R| Lambda_d  by products (`curvature.matrix_free`)

with the maximisers moving along by their response. Levenberg and Marquardt decide (`levenberg`): a step is accepted where the
robust objective, its inner problems solved anew, falls; mu grows where it does not and shrinks where the model predicts well.
"""

from __future__ import annotations

import time
import warnings as warning_module
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.called_with import called_with
from lightning_muter.curvature.objective.network import WideObjective
from lightning_muter.curvature.problem.network import WideProblem
from lightning_muter.errors import ArgumentError
from lightning_muter.forgotten.digests import check_digests
from lightning_muter.forgotten.modules import check_remembered, recalled, remember
from lightning_muter.forgotten.rows import Forgotten, barred_after, barred_of, known_keys, remember_key
from lightning_muter.minimise.levenberg_marquardt import Found, LevenbergMarquardt
from lightning_muter.model.distributed import Shards
from lightning_muter.model.modes import full_precision
from lightning_muter.scope.asked import Search, UnlearnWide
from lightning_muter.scope.network_objective import Training, left_outside
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.retaken import positions_to_leave_out
from lightning_muter.snapshot.snapshot import WideSnapshot
from lightning_muter.solvers.base import Solver
from lightning_muter.solvers.cg import CG, TruncatedCG
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint
from lightning_muter.unlearning.commit import adopter, commit
from lightning_muter.unlearning.positions import checked_positions
from lightning_muter.unlearning.result import UnlearnResult


@ranks_agree
@torch.inference_mode(False)
@full_precision()
@called_with(UnlearnWide)
def unlearn_wide(asked: UnlearnWide) -> UnlearnResult:
    """Remove samples from all parameters in ``scope``; on success the model holds the new weights, else the old ones.

    Args:
        model: any module that gives logits.
        forget: positions in ``data``.
        data: the full training dataset; rows that are forgotten are not read.
        scope: "all" trainable parameters, or patterns over their names (``["layer4.*", "head.*"]``).
        threat_model: norm, eps, box; read off ``attack`` or the module's adversarial training when not given.
        attack: what the model was trained against, where no ``threat_model`` is given.
        trades_beta: the model was trained by TRADES with this beta.
        response: "auto", "none", "unconstrained", "l2", "linf" or a Response.
        curvature: "ggn" (positive semidefinite with the response, the default) or "hessian" (exact).
        loss: of the training, where it is not read off the module.
        weight_decay: as in :func:`lightning_muter.take_snapshot`; 0 is allowed, damping then carries the solve.
        optimizers: those of the training, for ``weight_decay="auto"``.
        forgotten: positions removed before, left out too.
        steps: accepted steps at most.
        damping: mu at the start, per sample.
        cg: the solver of one step, by products with H_R.
        tolerance: on the stationarity |grad F_R| / sqrt(|R| sum |grad phi_i|^2) (the sum estimated once).
        seconds: no new step is begun after this time.
        smoothing: of L-infinity switches.
        inner: how inner maxima are climbed.
        sample_weight: c_i (n,) of the objective; None: 1 each.
        collate: the training loader's ``collate_fn``, where it had one of its own.
        batch_size: samples at a time.
        num_workers: of the loader that reads the dataset.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        shards: this process's share; None asks torch.distributed. Every process gets the same weights.
        dry_run: compute everything, change nothing.
        progress: show a bar on a terminal.

    Returns:
        What was done: ``solver`` holds the last accepted solve's status and ``steps``, one entry per trial; ``refine`` the
        stationarity after each accepted step.

    Raises:
        ArgumentError: an option out of range, or positions that are none of the dataset.
        RequestError: positions that were forgotten before, or nothing would be left.
        UnsuitableError: FSDP, decoupled weight decay.
        SolveError: no trial lowered the objective. After any error the model is as it was.

    >>> from torch.utils.data import TensorDataset
    >>> from lightning_muter import ThreatModel
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    >>> result = unlearn_wide(
    ...     model, [3, 17], rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, steps=10, progress=False)
    >>> result.n_retained, result.stationarity_after < result.stationarity_before
    (28, True)
    """
    began = time.perf_counter()
    search = Search(asked.steps, asked.damping, asked.cg, asked.tolerance, None, asked.progress)
    model, data = asked.model, asked.data
    record = recalled(model)
    before = sorted({*(int(i) for i in asked.forgotten), *positions_to_leave_out(record, data, asked.collate)})
    n_total = len(data)  # type: ignore[arg-type]
    stand_in: Any = SimpleNamespace(n_total=n_total, forgotten=before, absent=[], n_retained=n_total - len(set(before)))
    positions = checked_positions(asked.forget, stand_in)
    gone = {*positions, *before}
    kept = [i for i in range(n_total) if i not in gone]
    objective = asked.objective(model, data, kept, asked.read(model, data, kept), asked.shards)
    if asked.seconds is not None:
        search = replace(search, deadline=began + asked.seconds)
    result, new = _carry_out(objective, asked.scope, positions, len(kept), search)
    _commit(objective.problem, new, result, asked.dry_run, lambda fingerprint: None)
    if not asked.dry_run:
        key = known_keys().get(record.key_id) or DigestKey.generate()
        remember_key(key)
        barred = barred_of(key, data, positions, kept, asked.collate)
        remember(model, Forgotten(n_total, tuple(sorted(gone)), key.key_id, record.barred | barred))
    result.seconds = time.perf_counter() - began
    return result


@torch.inference_mode(False)
@full_precision()
def unlearn_stored(
    model: nn.Module,
    snapshot: WideSnapshot,
    forget: Iterable[int],
    data: Dataset[Any],
    *,
    access: Access,
    retain: Dataset[Any] | None = None,
    refine: int = 0,
    method: object = None,
    solver: str | Solver | TruncatedCG = "auto",
    dry_run: bool = False,
    shards: Shards | None = None,
    progress: bool = True,
) -> UnlearnResult:
    """What :func:`lightning_muter.unlearn` does for a `WideSnapshot`: one accepted Newton-CG step and ``refine`` more.

    Args:
        data, retain: the full training dataset; retained rows are read from ``retain`` where it is given.
        solver: "auto", "cg", a `CG` or a `TruncatedCG`: systems are known by their products alone.

    Raises:
        ArgumentError: a method or solver that needs stored sums. The others as in :func:`unlearn_wide`.
        MismatchError: weights, data, scope or loss are not the snapshot's.
    """
    began = time.perf_counter()
    positions = checked_positions(forget, snapshot)
    if not (isinstance(refine, int) and not isinstance(refine, bool) and refine >= 0):
        raise ArgumentError("refine", refine, "a whole number, 0 or larger")
    if method is not None:
        raise ArgumentError(
            "method", method, "None beyond the head", "Methods solve with stored sums; take a snapshot of scope='head'."
        )
    read = retain if retain is not None else data
    snapshot.check_length(data, "data")
    snapshot.check_length(read, "retain")
    snapshot.check_model(model)
    check_remembered(model, snapshot)
    snapshot.check_parameters(model)
    gone = set(positions)
    kept = [i for i in snapshot.retained_positions if i not in gone]
    reading = access.reading(model, snapshot, data, sorted([*positions, *kept]))
    check_digests(snapshot, data, positions, "data", access.collate)
    check_digests(snapshot, read, kept, "data" if retain is None else "retain", access.collate)
    objective = Training.of(snapshot, access).objective(model, read, kept, reading, shards)
    search = Search(1 + refine, cg=_as_cg(solver), progress=progress)
    result, new = _carry_out(objective, snapshot.scope, positions, len(kept), search)
    after = snapshot.without(positions)
    after.barred = barred_after(snapshot, data, positions, access.collate)
    assert result.stationarity_after is not None
    after.stationarity = result.stationarity_after

    _commit(objective.problem, new, result, dry_run, adopter(snapshot, after))
    if not dry_run:
        remember(model, Forgotten.of(snapshot))
    result.seconds = time.perf_counter() - began
    return result


def _carry_out(
    objective: WideObjective, scope: str | Sequence[str], positions: list[int], n_retained: int, search: Search
) -> tuple[UnlearnResult, Tensor]:
    """What the search finds on the retained objective, and the weights it proposes; nothing is changed yet."""
    problem = objective.problem
    w = problem.read()
    title = "unlearn" if search.progress and objective.leads else None
    descent = LevenbergMarquardt(objective, search.cg or TruncatedCG(), search.damping, search.deadline, title)
    found = descent.run(w, search.steps, search.tolerance)
    result = UnlearnResult(
        method="newton-cg",
        response=objective.response.name,
        scope=scope if isinstance(scope, str) else ", ".join(scope),
        forgotten=positions,
        n_retained=n_retained,
        step_norm=float((found.w - w).norm()),
        solver=found.solver | {"steps": found.trials, "counts": {k: v for k, v in objective.counts.items() if v}},
        stationarity_before=found.first.stationarity,
        stationarity_after=found.last.stationarity,
        fingerprint_before=weight_fingerprint(problem.module.state_dict()),
        refine=found.history,
    )
    result.quality = {
        "objective_before": found.first.value,
        "objective_after": found.last.value,
        "maximisers_converged": found.last.converged,
    }
    result.warnings += _notes(problem, found)
    return result, found.w


def _as_cg(solver: str | Solver | TruncatedCG) -> TruncatedCG:
    if isinstance(solver, TruncatedCG):
        return solver
    if isinstance(solver, CG):
        return TruncatedCG(max_iter=solver.max_iter, tolerance=solver.tolerance)
    if solver in ("auto", "cg"):
        return TruncatedCG()
    raise ArgumentError(
        "solver", solver, "'auto', 'cg', CG or TruncatedCG beyond the head", "The others need the matrix itself."
    )


def _notes(problem: WideProblem, found: Found) -> list[str]:
    notes = []
    left = left_outside(problem.module, problem.names)
    if left is not None:
        notes.append(left)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in problem.module.modules()):
        notes.append(
            "Running statistics of batch normalisation are constants here: they keep an average over the forgotten "
            "samples. Recompute them on retained data, or use normalisation without running statistics."
        )
    if found.solver["status"] not in ("converged", "flat"):
        notes.append(
            f"The last system ended with status {found.solver['status']!r} (relative residual "
            f"{found.solver['residual']:.1e}); its step lowered the retained objective and was accepted."
        )
    return notes


def _commit(
    problem: WideProblem, new: Tensor, result: UnlearnResult, dry_run: bool, adopt: Callable[[str], None]
) -> None:
    result.dry_run = dry_run
    for note in result.warnings:  # before anything is changed: a warning may be an error
        warning_module.warn(note, stacklevel=3)
    named = dict(problem.module.named_parameters())
    commit(problem.module, [named[n] for n in problem.names], lambda: problem.write(new), adopt, result)
