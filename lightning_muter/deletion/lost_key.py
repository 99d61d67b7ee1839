"""The way out of a lost key: a new one, and digests made anew of data that the stored sums recognise."""

from __future__ import annotations

from dataclasses import replace

import lightning as L

from lightning_muter.deletion.files import Places
from lightning_muter.deletion.training_data import TrainingData
from lightning_muter.errors import MismatchError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.forgotten.rows import Barred, Forgotten, barred_of, remember_key
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.losses import Loss
from lightning_muter.scope.base import Retained
from lightning_muter.scope.choose import scope_of
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.fingerprint import DigestKey


def new_key(places: Places) -> DigestKey:
    """A new key in memory, whose file the request's transaction writes; where another key's file lies there, that key."""
    return DigestKey.load(places.key) if places.key.exists() else DigestKey.generate()


def under_new_key(
    places: Places, model: L.LightningModule, data: TrainingData, key: DigestKey, loss: Loss | None, batch_size: int
) -> Stored:
    """The model's snapshot with its digests under another key, made of this data.

    Raises:
        MismatchError: the rows are not those that were trained on: their gradients do not sum up to what is stored.
    """
    old: Stored = Snapshot.read(places.snapshot)  # whatever key lies beside it
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
    old: Stored, model: L.LightningModule, data: TrainingData, kept: list[int], loss: Loss | None, batch_size: int
) -> None:
    """Compare with what was stored: of the head the sum of gradients, beyond it how stationary the weights were."""
    access = Access(loss=loss, collate=data.collate, batch_size=batch_size)
    reading = access.reread(model, old, data.dataset, kept)
    left = Retained(model, old, data.dataset, kept, reading, access)
    error, limit = scope_of(old).difference(left)
    if not error <= limit:
        raise MismatchError(
            f"train_dataloader: its retained rows are not those that were trained on, or lie in another order: what they sum "
            f"up to differs from what is stored by {error:.1e} (allowed: {limit:g}). Pass the same dataset as then."
        )
