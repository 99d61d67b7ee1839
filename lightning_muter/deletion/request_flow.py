"""What a request checks before it begins, what its receipt says, and how it is committed and shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L

from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, checkpoint_writer, load_checkpoint, renewed
from lightning_muter.deletion.files import Places, receipt_path
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.receipts import new_content
from lightning_muter.deletion.transactions import commit_request
from lightning_muter.deletion.verified import check_ledger
from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError, MuterError, RequestError
from lightning_muter.forgotten.modules import ENTRY
from lightning_muter.forgotten.rows import Forgotten
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.atomic import Writer
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint
from lightning_muter.unlearning.result import UnlearnResult


def insist_on_snapshot(places: Places) -> None:
    """Raise `RequestError` where a checkpoint or its snapshot is missing."""
    if not places.checkpoint.exists() or not places.snapshot.exists():
        missing = places.checkpoint if not places.checkpoint.exists() else places.snapshot
        raise RequestError(
            f"{missing}: there is no such file, so it is not known how {places.stem} was trained. Run "
            "`muter snapshot --ckpt_path …` with the same configuration first (MUterCallback does it after fit)."
        )


def load_snapshot(path: Path, key: DigestKey | None = None, *, unsealed: bool = True) -> Stored:
    """A snapshot from an untrusted file whose container is sound but whose content may be anything.

    Args:
        unsealed: take one from before seals, which the ledger must vouch for.

    Raises:
        CorruptFileError: it is damaged or altered.
    """
    try:
        snapshot: Stored = Snapshot.load(path, key, unsealed=unsealed)
        if not isinstance(snapshot.fingerprint, str) or not all(0 <= i < snapshot.n_total for i in snapshot.forgotten):
            raise ValueError("its rows are not rows of its dataset")
        f"{snapshot.scope} {snapshot.threat_model} {float(snapshot.stationarity)}"
    except MuterError:
        raise
    except Exception as error:  # whatever an altered content leads to means the same
        raise CorruptFileError(
            f"{path}: not a usable snapshot ({type(error).__name__}: {error}). Restore it from a backup, or take a new "
            "one with `muter snapshot`."
        ) from error
    return snapshot


def known_key(places: Places, ledger: Ledger | None) -> DigestKey:
    """The key of the digests, once the ledger (if there is one) is known to be what its owner wrote.

    Raises:
        MismatchError: it is not the one that sealed the ledger's receipts; CorruptFileError: they were changed or forged.
    """
    key = DigestKey.load(places.key)
    last = ledger.last() if ledger is not None else None
    if last is not None and last["key_id"] != key.key_id:
        raise MismatchError(
            f"{places.key}: this is key {key.key_id}, but receipt {last['number']} was sealed with key "
            f"{last['key_id']}. Restore the key file from a backup, or, if that key is lost for good, delete this file and run "
            "`muter refresh --recover_key true`."
        )
    if ledger is not None:
        check_ledger(places, ledger, key)
    return key


def vouched(ledger: Ledger | None) -> bool:
    """Whether the snapshot at hand is the one that a ledger, verified by now, names by its hash."""
    return ledger is not None and len(ledger) > 0


@contextlib.contextmanager
def snapshot_key(places: Places, ledger: Ledger, find: Callable[[], DigestKey | None]) -> Iterator[DigestKey]:
    """The key of the digests: the one there is, else the one that `find` finds, else a new one; what was not there before
    goes again when the snapshot fails.
    """
    if places.key.exists() or len(ledger):
        yield known_key(places, ledger)  # a ledger without its key says how to go on
        return
    key = find() or DigestKey.generate()
    key.keep(places.key)
    try:
        yield key
    except BaseException:
        if not len(ledger):
            places.key.unlink(missing_ok=True)
        raise


def forgotten_rows(snapshot: Stored, ledger: Ledger | None) -> dict[int, str]:
    """The rows that snapshot or ledger say are forgotten; that both agree has been checked by their hashes."""
    known = ledger.forgotten() if ledger is not None else {}
    return {**dict.fromkeys(map(int, snapshot.forgotten), "a request before the ledger began"), **known}


def entry_of(snapshot: Stored) -> dict[str, Any]:
    """What a checkpoint says of its lineage: the key, and what was forgotten."""
    return replace(Forgotten.of(snapshot), n_total=snapshot.n_total, key_id=snapshot.key_id).to_dict()


def repeated(places: Places, ledger: Ledger, request_id: str, asked: str) -> bool:
    """Whether this very request was carried out before (its receipt is shown); another one under its id is refused."""
    receipt = ledger.find(request_id)
    if receipt is None:
        return False
    if ledger.asked(request_id) != asked:
        raise ArgumentError(
            "request_id", request_id, "an id that was not used for another request",
            f"It is request {receipt['number']} of {receipt['time']}, which asked for something else.",
        )  # fmt: skip
    print(f"request {request_id!r} was carried out before, at {receipt['time']}; nothing more to do")
    print(f"receipt: {receipt_path(places, receipt)}")
    return True


_TOLD_ELSEWHERE = {"method", "scope", "forgotten", "n_retained", "fingerprint_before", "fingerprint_after", "warnings"}


def receipt_content(
    kind: str,
    request_id: str,
    snapshot: Stored,
    before: str,
    model: L.LightningModule,
    result: UnlearnResult | None = None,
    users: Sequence[str] = (),
) -> dict[str, Any]:
    """The receipt's content."""
    told = result.to_dict() if result is not None else {}
    metrics = {name: value for name, value in told.items() if name not in _TOLD_ELSEWHERE}
    if result is None:
        metrics = {**snapshot.figures, "stationarity": snapshot.stationarity}
    after = told.get("fingerprint_after", weight_fingerprint(model.state_dict()))
    return new_content(
        kind,
        request_id,
        method=str(told.get("method", kind)),
        scope=str(told.get("scope", snapshot.scope)),
        forgotten=told.get("forgotten", []),
        users=users,
        n_retained=snapshot.n_retained,
        fingerprints=(before, after),
        metrics=metrics,
        warnings=told.get("warnings", snapshot.warnings),
    )


def commit(
    places: Places,
    ledger: Ledger,
    content: dict[str, Any],
    checkpoint: Mapping[str, Any],
    model: L.LightningModule,
    snapshot: Stored,
    asked: str,
    key: DigestKey,
) -> dict[str, Any]:
    """Checkpoint, snapshot and ledger in one transaction."""
    new, left_out = renewed(checkpoint, model.state_dict())
    if left_out:
        content["warnings"].append(
            f"left out of the new checkpoint, for they may remember samples: {', '.join(left_out)}"
        )
    expected = weight_fingerprint(new["state_dict"])
    new[ENTRY] = entry_of(snapshot)
    if Forgotten.of(snapshot):
        # a fit that resumes from here with the callback refuses data that still holds these rows
        new["callbacks"] = {}  # Lightning shows a checkpoint to callbacks only where it has this entry
    content["checkpoint"]["fingerprint_after"] = expected

    def check(stages: Mapping[Path, Path]) -> None:
        if checkpoint_fingerprint(load_checkpoint(stages[places.checkpoint])) != expected:
            raise MismatchError(
                f"{stages[places.checkpoint]}: what was written cannot be read back; nothing was changed."
            )
        load_snapshot(stages[places.snapshot], key)

    writers: dict[Path, Writer] = {
        places.checkpoint: checkpoint_writer(new),
        places.snapshot: snapshot.writer(),
    }
    if not places.key.exists():  # a lost one's successor comes into force together with what it seals
        writers[places.key] = key.write
    return commit_request(places, ledger, content, writers, asked=asked, key=key, check=check)


def report(places: Places, receipt: Mapping[str, Any], source: Places) -> None:
    """Print what a request did, and where its files lie."""
    kind, metrics = receipt["kind"], receipt["metrics"]
    if kind == "unlearn":
        print(f"forgotten: {len(receipt['forgotten'])} rows; {receipt['n_retained']} are retained")
    for name in ("step_norm", "stationarity", "stationarity_before", "stationarity_after", "bound", "seconds"):
        if metrics.get(name) is not None:
            print(f"{name}: {metrics[name]:.4g}" if isinstance(metrics[name], float) else f"{name}: {metrics[name]}")
    for warning in receipt["warnings"]:
        print(f"note: {warning}")
    print(f"checkpoint: {places.checkpoint}")
    print(f"receipt: {receipt_path(places, receipt)}")
    print(f"head {receipt['sha256']}")
    if kind == "unlearn":
        print(f"older files may still hold what was removed: muter purge --ckpt_path {places.checkpoint}")


def report_dry_run(places: Places, content: Mapping[str, Any]) -> None:
    """Print what a request would do."""
    print(
        f"dry run: nothing was written; {len(content['forgotten'])} rows would be forgotten: {content['forgotten'][:9]}"
    )
    print(f"would replace: {places.checkpoint}, {places.snapshot}")
    print(f"would enter request {content['id']!r} in {places.ledger}")
    for name, value in sorted(content["metrics"].items()):
        print(f"{name}: {value}")
    for warning in content["warnings"]:
        print(f"note: {warning}")
