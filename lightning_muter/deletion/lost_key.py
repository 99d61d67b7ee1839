"""The way out of a lost key: a new one, and digests made anew of data that the stored sums recognise."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
import torch

from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.request_flow import AnySnapshot
from lightning_muter.deletion.training_data import TrainingData
from lightning_muter.errors import MismatchError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.forgotten.rows import Barred, Forgotten, barred_of, remember_key
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.model.losses import Loss
from lightning_muter.scope.head_methods import objective_of
from lightning_muter.scope.network_objective import Training
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.storage.fingerprint import DigestKey

#: Of |sum of gradients - stored sum| / sum of |gradients|, by dtype: rounding, far below the share of one row.
_SAME = {torch.float64: 1e-8}
_ELSE = 1e-5


def new_key(places: Places) -> DigestKey:
    """A new key in memory, whose file the request's transaction writes; where another key's file lies there, that key."""
    return DigestKey.load(places.key) if places.key.exists() else DigestKey.generate()


def under_new_key(
    places: Places, model: L.LightningModule, data: TrainingData, key: DigestKey, loss: Loss | None, batch_size: int
) -> AnySnapshot:
    """The model's snapshot with its digests under another key, made of this data.

    Raises:
        MismatchError: the rows are not those that were trained on: their gradients do not sum up to what is stored.
    """
    old: AnySnapshot = Snapshot.read(places.snapshot)  # whatever key lies beside it
    if old.key_id == key.key_id:
        print(f"{places.key.name} is the key of the snapshot: nothing to recover")
        old.key = key
        return old
    old.check_length(data.dataset, "train_dataloader")
    old.check_model(model)
    kept = old.retained_positions
    _check_sums(old, model, data, kept, loss, batch_size)
    remember_key(key)
    source = SampleSource(data.dataset, collate=data.collate, readable=kept)
    digests = old.digests.new_zeros(old.digests.shape)
    digests[kept] = sample_digests(key, source, kept)
    notes = [f"The key {old.key_id} was lost; digests were made anew from the data, under {key.key_id}."]
    readable = [i for i in old.forgotten if _can_be_read(data, i)]
    barred = barred_of(key, data.dataset, readable, kept, data.collate) if readable else Barred()
    unknown = Forgotten.of(old).count - len(readable)
    if unknown > 0:
        notes.append(
            f"{unknown} forgotten rows are not in the data any more: they would be known again by position, not by content."
        )
    return replace(old, digests=digests, key_id=key.key_id, key=key, barred=barred, warnings=[*old.warnings, *notes])


def _can_be_read(data: TrainingData, position: int) -> bool:
    try:
        SampleSource(data.dataset, collate=data.collate, readable=[position])
    except Exception:  # deleted from the disk: whatever the user's dataset raises then
        return False
    return True


def _check_sums(
    old: AnySnapshot, model: L.LightningModule, data: TrainingData, kept: list[int], loss: Loss | None, batch_size: int
) -> None:
    """Compare with what was stored: of the head the sum of gradients, beyond it how stationary the weights were."""
    access = Access(loss, data.collate, batch_size)
    reading = access.reading(model, old, data.dataset, kept)
    if isinstance(old, Snapshot):
        source = access.source(reading, old, data.dataset, kept)
        problem = HeadProblem(model, reading.loss, source.examples(), reading)
        starts = old.base_starts if old.base_starts is not None else old.starts
        objective = objective_of(old, problem, source, kept, starts, Shards())
        sums, _ = objective.sums(old.theta_base.to(problem.device))
        error = float((sums.gradient.cpu() - old.gradient).norm() / sums.gradient_scale.cpu())
        limit = _SAME.get(old.gradient.dtype, _ELSE)
    else:
        wide = Training.of(old, access).objective(model, data.dataset, kept, reading)
        found = wide.evaluate(wide.problem.read()).stationarity
        error, limit = abs(found - old.stationarity) / max(found, old.stationarity, 1e-12), 0.05
    if not error <= limit:
        raise MismatchError(
            f"train_dataloader: its retained rows are not those that were trained on, or lie in another order: what they sum "
            f"up to differs from what is stored by {error:.1e} (allowed: {limit:g}). Pass the same dataset as then."
        )
