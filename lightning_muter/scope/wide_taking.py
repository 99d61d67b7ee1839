"""How a `WideSnapshot` is taken: digests, the objective, and how stationary the weights are in it."""

from __future__ import annotations

import time
import warnings as warning_module
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.called_with import called_with
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.network import WideObjective
from lightning_muter.errors import UnsuitableError
from lightning_muter.forgotten.digests import check_digests, sample_digests
from lightning_muter.minimise.levenberg_marquardt import LevenbergMarquardt
from lightning_muter.model.modes import full_precision
from lightning_muter.model.reading import Reading
from lightning_muter.scope.asked import DAMPING, TakeWide
from lightning_muter.scope.network_objective import Training, left_outside
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.retaken import leaves_out_forgotten
from lightning_muter.snapshot.snapshot import WideSnapshot
from lightning_muter.solvers.cg import TruncatedCG
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint

#: Stationarity above which a snapshot says that the weights are not a minimum.
_STATIONARY = 1e-2


@ranks_agree
@leaves_out_forgotten
@torch.inference_mode(False)
@full_precision()
@called_with(TakeWide)
def take_wide_snapshot(asked: TakeWide) -> WideSnapshot:
    """What a later request on the parameters in ``scope`` needs to know; one pass over ``dataset``, nothing of size p x p.

    As :func:`lightning_muter.take_snapshot` with this scope.

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
    >>> from lightning_muter import ThreatModel
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    >>> snapshot = take_wide_snapshot(
    ...     model, rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, polish=20, progress=False)
    >>> snapshot.parameters
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    return wide_snapshot(asked)


def wide_snapshot(asked: TakeWide) -> WideSnapshot:
    """The same behind either door."""
    began = time.perf_counter()
    model, dataset, steps = asked.model, asked.dataset, asked.steps
    if asked.device is not None:
        model.to(asked.device)
    reading = asked.reading
    if reading is None:
        reading = asked.read(model, dataset, normalization=asked.normalization)
    every = range(len(dataset))  # type: ignore[arg-type]
    objective = asked.objective(model, dataset, every, reading)
    problem = objective.problem
    w, first, now = _polished(objective, steps, asked.progress)
    notes = _notes(model, problem.names, reading, now)
    for note in notes:  # before anything is changed: a warning may be an error
        warning_module.warn(note, stacklevel=8)
    key = asked.key or DigestKey.generate()
    digests = sample_digests(key, objective.source, every)
    problem.write(w)
    return WideSnapshot(
        patterns=[asked.scope] if isinstance(asked.scope, str) else list(asked.scope),
        parameters=list(problem.names),
        decay=asked.decay_by_name(model, problem.names, reading.penalty),
        n_total=objective.source.n,
        forgotten=[],
        threat_model=objective.threat,
        response=objective.response,
        curvature=asked.curvature,
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
        trades_beta=asked.trades_beta,
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
def refresh_wide(model: nn.Module, snapshot: WideSnapshot, data: Dataset[Any], access: Access) -> WideSnapshot:
    """The same objective at the current weights, measured on the retained samples; the old snapshot is left as it is."""
    snapshot.check_length(data, "data")
    snapshot.check_parameters(model)
    kept = snapshot.retained_positions
    reading = access.reading(model, snapshot, data, kept)
    check_digests(snapshot, data, kept, "data", access.collate)
    objective = Training.of(snapshot, access).objective(model, data, kept, reading)
    now = objective.evaluate(objective.problem.read())
    return replace(
        snapshot,
        forgotten=list(snapshot.forgotten),
        fingerprint=weight_fingerprint(model.state_dict()),
        stationarity=now.stationarity,
        figures={"objective": now.value, "converged": now.converged},
    )
