"""The door of a fit: no row that was forgotten is trained on again, and no training goes on from before it was forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_muter.deletion.authority import records_in
from lightning_muter.deletion.files import Places
from lightning_muter.errors import MismatchError, MuterError, RequestError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.forgotten.modules import ENTRY, entries_of, recalled, refuse_forgotten_rows, remember
from lightning_muter.forgotten.rows import Forgotten, known_keys
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.rows import collate_of
from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.fingerprint import DigestKey

Collate = Callable[[list[Any]], Any] | None


@dataclass
class Door:
    """What one callback knows of forgotten rows, from fit to fit, and what it refuses by it.

    Attributes:
        record: rows once forgotten, kept over later fits.
        key: of the digests to come; its id goes into every checkpoint of the run, and tells whose it is.
    """

    record: Forgotten = field(default_factory=Forgotten)
    key: DigestKey | None = None
    _resumed: list[Forgotten] = field(default_factory=list)  # the lists in the checkpoint that a run is resumed from
    _stale: bool = False  # ... which does not list all that is known here
    _looked_at: Any = None  # the dataset that was searched for forgotten rows

    def opens(self, trainer: Any, module: nn.Module, folders: Sequence[Path], own: DigestKey | None) -> None:
        """Before a fit: what was forgotten, as callback, module and the folders know it, and the key, ``own`` where there is one.

        Raises:
            RequestError: the fit would train on forgotten rows, or goes on from before they were forgotten.
        """
        records = all_records(self.record, module, folders)
        refuse_earlier_training(trainer.ckpt_path, self._resumed, records, known_before=self._stale)
        refuse_forgotten_data(records, trainer.train_dataloader)
        if trainer.is_global_zero and (doubt := forgotten_nearby(folders, trainer.train_dataloader, records)):
            rank_zero_warn(doubt)
        self._looked_at = getattr(trainer.train_dataloader, "dataset", None)
        for record in records:
            remember(module, record)
        self.record = recalled(module)
        known = known_keys().get(self.record.key_id) if self.record else None
        self.key = known or own or DigestKey.generate()
        self._resumed, self._stale = [], False

    def looks_at(self, loader: Any) -> None:
        """Search data that were loaded again."""
        if self.record and getattr(loader, "dataset", None) is not self._looked_at:
            refuse_forgotten_data([self.record], loader)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return (self.record if self.key is None else replace(self.record, key_id=self.key.key_id)).to_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; what is known to be forgotten only grows."""
        loaded = Forgotten.from_dict(state)
        self._stale = bool(self.record) and not loaded.covers(self.record)
        self.record |= loaded

    def checkpoint(self, checkpoint: dict[str, Any], *, fits: bool) -> None:
        """Look at a checkpoint that is loaded, to fit from (``fits``) or for something else.

        Raises:
            RequestError: a fit cannot be resumed from it.
        """
        self._resumed = entries_of(checkpoint, "ckpt_path")
        listed = Forgotten.from_dict(checkpoint[ENTRY]) if ENTRY in checkpoint else Forgotten()
        self.record |= listed
        if listed and fits:
            raise RequestError(
                f"ckpt_path: the checkpoint is the result of a deletion request ({listed.count} forgotten rows) and "
                "holds no optimiser state to resume. Load its weights with load_from_checkpoint and train on "
                "Snapshot.load(<name>.muter.snapshot).retained(dataset)."
            )


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
