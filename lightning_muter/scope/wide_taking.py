"""How a `WideSnapshot` is taken: digests, the objective, and how stationary the weights are in it."""

from __future__ import annotations

import time
import warnings as warning_module
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.network import WideCurvature, WideObjective
from lightning_muter.curvature.response.choose import Response
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.forgotten.digests import check_digests, sample_digests
from lightning_muter.minimise.levenberg_marquardt import LevenbergMarquardt
from lightning_muter.model.losses import Loss
from lightning_muter.model.modes import full_precision
from lightning_muter.model.read_step import read_objective
from lightning_muter.model.reading import Reading
from lightning_muter.scope.network import DAMPING
from lightning_muter.scope.network_objective import Rows, Training, left_outside, stored_objective
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.reread import read_stored
from lightning_muter.snapshot.retaken import leaves_out_forgotten
from lightning_muter.snapshot.snapshot import WIDE_BATCH, WideSnapshot
from lightning_muter.snapshot.trained import Decay, trained_threat
from lightning_muter.solvers.cg import TruncatedCG
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint

#: Stationarity above which a snapshot says that the weights are not a minimum.
_STATIONARY = 1e-2


@ranks_agree
@leaves_out_forgotten
@torch.inference_mode(False)
@full_precision()
def take_wide_snapshot(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    scope: str | Sequence[str] = "all",
    threat_model: ThreatModel | None = None,
    attack: Any = None,
    trades_beta: float | None = None,
    response: str | Response = "auto",
    curvature: WideCurvature = "ggn",
    loss: Loss | None = None,
    weight_decay: Decay = "auto",
    optimizers: Iterable[Any] | None = None,
    polish: str | int = "auto",
    smoothing: Smoothing | None = None,
    inner: InnerSolver | None = None,
    sample_weight: Tensor | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = WIDE_BATCH,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    key: DigestKey | None = None,
    inputs: Any = None,
    label: Any = None,
    normalization: Any = None,
    reading: Reading | None = None,
    progress: bool = True,
) -> WideSnapshot:
    """What a later request on the parameters in ``scope`` needs to know; one pass over ``dataset``, nothing of size p x p.

    Args:
        model: any module that gives logits; FSDP is refused.
        dataset: the full training dataset (map-style); positions to forget are counted in it.
        scope: "all" trainable parameters, or patterns over their names.
        threat_model: norm, eps, box; read off ``attack`` or the module's adversarial training when not given.
        attack: what the model was trained against, where no ``threat_model`` is given.
        trades_beta: the model was trained by TRADES with this beta.
        response: "auto", "none", "unconstrained", "l2", "linf" or a Response.
        curvature: "ggn" or "hessian".
        loss: as in :func:`lightning_muter.take_snapshot`.
        weight_decay: as there.
        optimizers: as there.
        polish: accepted Newton-CG steps towards a stationary point before; "auto" and 0 leave the weights as they are.
        smoothing: of L-infinity switches.
        inner: how inner maxima are climbed.
        sample_weight: c_i (n,) of the objective; None: 1 each.
        collate: the training loader's ``collate_fn``, where it had one of its own.
        batch_size: samples at a time.
        num_workers: of the loader that reads the dataset.
        device: where the model goes before; None leaves it.
        key: of the samples' digests; a new one when not given.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        normalization: (mean, std) where the dataset gives normalised inputs.
        reading: what :func:`lightning_muter.model.read_step.read_objective` gave, if it was read before.
        progress: show a bar on a terminal.

    Returns:
        The snapshot, for :func:`lightning_muter.unlearn`.

    Raises:
        ArgumentError: an option out of range, or no threat model.
        UnsuitableError: FSDP, decoupled weight decay, or an objective that is not finite.

    >>> from torch.utils.data import TensorDataset
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    >>> snapshot = take_wide_snapshot(
    ...     model, rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, polish=20, progress=False)
    >>> snapshot.parameters
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    began = time.perf_counter()
    if polish != "auto" and not (isinstance(polish, int) and polish >= 0):
        raise ArgumentError("polish", polish, "'auto', 0 or a number of steps")
    if device is not None:
        model.to(device)
    if reading is None:
        reading = read_objective(
            model, dataset, loss=loss, collate=collate, inputs=inputs, label=label, normalization=normalization
        )
    training = Training(
        scope,
        trained_threat(model, threat_model, attack),
        response,
        curvature,
        weight_decay,
        trades_beta,
        optimizers,
        smoothing,
        inner,
    )
    every = range(len(dataset))  # type: ignore[arg-type]
    rows = Rows(dataset, every, reading, collate, batch_size, num_workers, sample_weight)
    objective = training.objective(model, rows)
    problem = objective.problem
    w, first, now = _polished(objective, 0 if polish == "auto" else int(polish), progress)
    notes = _notes(model, problem.names, reading, now)
    for note in notes:  # before anything is changed: a warning may be an error
        warning_module.warn(note, stacklevel=5)
    key = key or DigestKey.generate()
    digests = sample_digests(key, objective.source, every)
    problem.write(w)
    return WideSnapshot(
        patterns=[scope] if isinstance(scope, str) else list(scope),
        parameters=list(problem.names),
        decay=training.decay_by_name(model, problem.names, reading.penalty),
        n_total=objective.source.n,
        forgotten=[],
        threat_model=objective.threat,
        response=objective.response,
        curvature=curvature,
        loss_name=reading.identity,
        mass=objective.source.mass,
        normalization=reading.normalization,
        input_shape=objective.source.input_shape,
        inner=objective.inner,
        smoothing=objective.smoothing,
        digests=digests,
        key_id=key.key_id,
        fingerprint=weight_fingerprint(model.state_dict()),
        stationarity=now.stationarity,
        trades_beta=trades_beta,
        sample_weight=objective.source.weight,
        warnings=notes,
        figures=_figures(objective, first, now) | {"seconds": time.perf_counter() - began},
        key=key,
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


def _figures(objective: WideObjective, first: Evaluation, now: Evaluation) -> dict[str, Any]:
    return {
        "passes": objective.passes,
        "objective": now.value,
        "stationarity_before": first.stationarity,
        "converged": now.converged,
    }


def _notes(model: nn.Module, names: list[str], reading: Reading, now: Evaluation) -> list[str]:
    notes = list(reading.notes)
    outside = left_outside(model, names)
    if outside is not None:
        notes.append(outside)
    if now.stationarity > _STATIONARY:
        notes.append(
            f"The weights are not stationary: |grad F| / sqrt(n sum |grad phi_i|^2) = {now.stationarity:.1e}. A request also "
            "goes on minimising; train longer, or pass polish=<steps>, to see the removal alone."
        )
    return notes


@torch.inference_mode(False)
@full_precision()
def refresh_wide(
    model: nn.Module,
    snapshot: WideSnapshot,
    data: Dataset[Any],
    *,
    loss: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = WIDE_BATCH,
    inputs: Any = None,
    label: Any = None,
) -> WideSnapshot:
    """The same objective at the current weights, measured on the retained samples; the old snapshot is left as it is."""
    snapshot.check_length(data, "data")
    snapshot.check_parameters(model)
    kept = snapshot.retained_positions
    reading = read_stored(model, snapshot, data, kept, loss=loss, collate=collate, inputs=inputs, label=label)
    check_digests(snapshot, data, kept, "data", collate)
    objective = stored_objective(model, snapshot, Rows(data, kept, reading, collate, batch_size))
    now = objective.evaluate(objective.problem.read())
    return replace(
        snapshot,
        forgotten=list(snapshot.forgotten),
        fingerprint=weight_fingerprint(model.state_dict()),
        stationarity=now.stationarity,
        figures={"objective": now.value, "converged": now.converged},
    )
