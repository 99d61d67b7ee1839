"""The door of a fit: no row that was forgotten is trained on again, and no training goes on from before it was forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_muter.deletion.authority import records_in
from lightning_muter.deletion.files import Places
from lightning_muter.errors import MismatchError, MuterError, RequestError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.forgotten.modules import recalled, refuse_forgotten_rows
from lightning_muter.forgotten.rows import Forgotten
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.rows import collate_of
from lightning_muter.snapshot.stored import Stored

Collate = Callable[[list[Any]], Any] | None


def all_records(own: Forgotten, module: nn.Module, folders: Iterable[Path]) -> list[Forgotten]:
    """What callback, module and the models in these folders know, the most telling first."""
    found = [record for record in (own, recalled(module), *records_in(folders)) if record]
    kept: list[Forgotten] = []
    for record in sorted(found, key=lambda r: r.count, reverse=True):
        if not any(other.covers(record) for other in kept):
            kept.append(record)
    return kept


def refuse_forgotten_data(records: Iterable[Forgotten], loader: Any) -> None:
    """Raise `RequestError` where the training data hold what any of these records bars, or where it cannot be told."""
    dataset: Any = getattr(loader, "dataset", None)
    for record in records:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise RequestError(
                f"train_dataloader: {record.count} rows were forgotten, and it cannot be told whether they are among those "
                f"of a {type(dataset).__name__}. Train on a map-style dataset (with __getitem__ and __len__)."
            )
        refuse_forgotten_rows(record, dataset, collate_of(loader))


def forgotten_nearby(folders: Iterable[Path], loader: Any, records: Iterable[Forgotten]) -> str | None:
    """What to say where the training data hold rows that a model of an earlier run forgot, one whose files lie in a folder above
    or in another version's (`version_0/checkpoints` beside `version_1/checkpoints`): its files do not bind this run.
    """
    own = {folder.resolve() for folder in folders}
    above = {parent for folder in own for parent in list(folder.parents)[:2]}
    versions = {path.parent for folder in own for path in _keys_of_versions(folder)}
    known, lines = list(records), []
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None  # nothing can be looked up in it
    for folder in sorted((above | versions) - own):
        try:
            found = records_in([folder])
        except MuterError:  # that run's own commands say what is wrong there
            continue
        for record in found:
            if any(other.covers(record) for other in known):
                continue
            try:
                refuse_forgotten_rows(record, dataset, collate_of(loader))
            except MuterError as error:
                lines.append(f"{folder}: {error}")
            known.append(record)
    if not lines:
        return None
    return (
        "A model of an earlier run was made to forget rows that this fit trains on, or it cannot be told. "
        + " ".join(lines)
    )


def _keys_of_versions(folder: Path) -> list[Path]:
    """Keys in the folders of a logger's other versions."""
    version = next((path for path in (folder, folder.parent) if path.name.startswith("version_")), None)
    if version is None:
        return []
    inside = folder.relative_to(version)
    return [key for other in version.parent.glob("version_*") for key in (other / inside).glob("*.muter.key")]


def refuse_earlier_training(
    ckpt_path: str | Path | None, entries: list[Forgotten], records: Iterable[Forgotten], *, known_before: bool
) -> None:
    """A run may not be resumed from before a deletion: weights and optimiser state still hold what was forgotten.

    Args:
        entries: the lists in the checkpoint that is resumed.
        known_before: the callback knew of rows that the checkpoint's own state does not list.

    Raises:
        RequestError: it is such a checkpoint.
    """
    if ckpt_path is None:
        return
    path = Path(ckpt_path)
    own: list[Forgotten] = []
    if path.name.endswith(".ckpt"):  # the model of this name, whatever key the checkpoint names
        stem = Places.of(path)
        own = records_in([path.parent]) if stem.snapshot.exists() or stem.ledger.exists() else []
    for record in (*records, *own):
        same = [entry for entry in entries if entry.key_id == record.key_id]
        covered = any(entry.covers(record) for entry in same)
        if known_before or ((same or record in own) and not covered):
            raise RequestError(
                f"ckpt_path: {path.name} is from before {record.count} rows were forgotten: its weights and its optimiser's "
                "state still hold them. Resume from a checkpoint that was saved since, or load the weights of "
                "<name>.muter.ckpt with load_from_checkpoint and train on MUterCallback.retained(dataset)."
            )


def retained_of(
    dataset: Dataset[Any], record: Forgotten, snapshot: Stored | None, collate: Collate = None
) -> Subset[Any]:
    """What of a dataset may still be trained on, of the training set or of one that it was made of.

    Raises:
        MismatchError: none of its rows is known: in another form forgotten ones would not be known either.
        RequestError: it cannot be told, for the key is not at hand.
    """
    n = len(dataset)  # type: ignore[arg-type]
    if snapshot is not None and n == snapshot.n_total:
        return snapshot.retained(dataset, collate)
    gone = set(record.located(dataset, collate, "dataset"))
    if record and snapshot is not None and snapshot.key is not None:
        mine = {bytes(row) for row in snapshot.digests[snapshot.retained_positions].numpy()}
        rest = [i for i in range(n) if i not in gone]
        source = SampleSource(dataset, collate=collate, readable=rest)
        if not any(bytes(row) in mine for row in sample_digests(snapshot.key, source, rest).numpy()):
            raise MismatchError(
                f"dataset: none of its {n} rows is known from the training set of {snapshot.n_total}. Pass the training set, "
                "or the dataset that it was a part of, in the form in which it was trained on."
            )
    return Subset(dataset, [i for i in range(n) if i not in gone])
