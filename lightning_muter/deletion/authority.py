"""Who was forgotten: the one answer of a model's ledger, snapshot and checkpoints, asked at every door.

Where they contradict one another nothing goes on: which of them is right only a backup can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import reading, weights_before_removals
from lightning_muter.deletion.request_flow import load_snapshot
from lightning_muter.errors import MismatchError, MuterError, RequestError
from lightning_muter.forgotten.digests import check_digests, sample_digests
from lightning_muter.forgotten.modules import entries_of, recorded_in, refuse_forgotten_rows
from lightning_muter.forgotten.rows import Forgotten, known_keys, remember_key
from lightning_muter.model.dataset import SampleSource
from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.atomic import file_sha256
from lightning_muter.storage.fingerprint import DigestKey

Collate = Callable[[list[Any]], Any] | None
_BACKUP = "Restore checkpoint, snapshot, ledger and key from one backup."


def record_of(places: Places, ledger: Ledger | None) -> tuple[Forgotten, Stored | None]:
    """What a model's own files say was forgotten, and its snapshot if it has one.

    Raises:
        MismatchError: they contradict one another.
    """
    snapshot = load_snapshot(places.snapshot) if places.snapshot.exists() else None
    listed = Forgotten()
    if places.checkpoint.exists():
        listed = recorded_in(load_checkpoint(places.checkpoint), str(places.checkpoint))
    gone = sorted(ledger.forgotten()) if ledger is not None else []
    last = ledger.last() if ledger is not None else None
    if snapshot is None:
        if last is None or not gone:
            return listed, None
        return listed | Forgotten(last["n_retained"] + len(gone), tuple(gone), last["key_id"]), None
    known = Forgotten.of(snapshot)
    wrong = None
    if last is not None and last["snapshot"].get("sha256") not in ("", None, file_sha256(places.snapshot)):
        wrong = f"is not the file that receipt {last['number']} of the ledger left"
    elif not set(gone) <= set(map(int, snapshot.forgotten)):
        wrong = f"does not list all of the {len(gone)} rows that the ledger says are forgotten"
    elif not known.covers(listed):
        wrong = f"does not list all of the {listed.count} rows that {places.checkpoint.name} says are forgotten"
    if wrong is not None:
        raise MismatchError(f"{places.snapshot}: it {wrong}. {_BACKUP}")
    return known | listed, snapshot


def current(path: Path, checkpoint: dict[str, Any], record: Forgotten, ledgers: Iterable[Ledger | None]) -> Forgotten:
    """What is known once a checkpoint is named too; one from before a deletion must not become current again.

    Raises:
        RequestError: a ledger knows its weights as those from before a removal, or it lists fewer forgotten rows.
    """
    fingerprint = checkpoint_fingerprint(checkpoint)
    for ledger in ledgers:
        request = weights_before_removals(ledger).get(fingerprint) if ledger is not None else None
        if request is not None:
            raise RequestError(
                f"{path}: these are the weights from before request {request!r}, which removed rows. Name the current "
                "checkpoint (<name>.muter.ckpt), or one trained on the retained rows."
            )
    if older(checkpoint, record):
        raise RequestError(
            f"{path}: it is from before rows were forgotten: of {record.count} it does not list all. Name the current "
            "checkpoint (<name>.muter.ckpt), or one trained on the retained rows."
        )
    return record | recorded_in(checkpoint, str(path))


def older(checkpoint: dict[str, Any], record: Forgotten) -> bool:
    """Whether a checkpoint proves, by the key it names, to be of this model but from before these rows were forgotten."""
    own = [entry for entry in entries_of(checkpoint) if entry.key_id and entry.key_id == record.key_id]
    known = Forgotten()
    for entry in own:
        known = known | entry
    return bool(own) and bool(record) and not known.covers(record)


def records_in(folders: Iterable[Path]) -> list[Forgotten]:
    """What the models in these folders were made to forget; their keys are at hand from now on.

    Raises:
        MuterError: files of one model contradict one another, or cannot be read.
    """
    found = []
    for folder in dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()):
        for path in sorted(folder.glob("*.muter.key")):
            try:
                remember_key(DigestKey.load(path))
            except MuterError:  # without it the rows below cannot be told, which is said there
                continue
        stems = {path.name.split(".muter.")[0] for path in folder.glob("*.muter.*") if path.is_file()}
        for stem in sorted(stems):
            places = Places(folder, stem)
            with reading(places) as ledger:
                found.append(record_of(places, ledger)[0])
    return [record for record in found if record]


def key_of(record: Forgotten, *places: Places) -> DigestKey:
    """The key under which these rows are known.

    Raises:
        RequestError: it is not at hand.
    """
    for path in (place.key for place in places):
        if path.exists():
            remember_key(DigestKey.load(path))
    key = known_keys().get(record.key_id)
    if key is None:
        raise RequestError(
            f"{places[0].key}: {record.count} rows were forgotten, known by digests under key {record.key_id}, which is not "
            "here; without it they would not be known again. Copy the key file here. If it is lost for good: "
            "`muter refresh --recover_key true` on the model that has the snapshot."
        )
    return key


def refuse_other_rows(record: Forgotten, snapshot: Stored | None, dataset: Dataset[Any], collate: Collate) -> None:
    """Insist that a training set is the one that rows were forgotten from, or, of another length, a successor of it: it holds
    none of them, and some that were retained, as they were (in another form nothing would be known again).

    Raises:
        RequestError: it is not, or it cannot be told; MismatchError: it has the length, but retained rows are others.
    """
    if not record:
        return
    if len(dataset) == record.n_total:  # type: ignore[arg-type]
        if snapshot is not None:
            check_digests(snapshot, dataset, snapshot.retained_positions, "train_dataloader", collate)
        return
    refuse_forgotten_rows(record, dataset, collate)
    n = len(dataset)  # type: ignore[arg-type]
    known = False
    if snapshot is not None and snapshot.key is not None:
        source = SampleSource(dataset, collate=collate)
        mine = {bytes(row) for row in snapshot.digests[snapshot.retained_positions].numpy()}
        known = any(bytes(row) in mine for row in sample_digests(snapshot.key, source, range(n)).numpy())
    if not known:
        raise RequestError(
            f"train_dataloader: none of its {n} rows is known from the training set of {record.n_total}, of which "
            f"{record.count} were forgotten: in another form they would not be known again. Pass the training set as it was "
            "(forgotten rows included, they are left out), or what is retained of it."
        )
