"""`muter audit`: in what state a checkpoint and its files are, from the files alone, without changing any.

It needs neither the key nor the right to write: signatures are checked with the public key, the snapshot's seal where the key
is at hand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint, remembers
from lightning_muter.deletion.files import Places, pending_process, receipt_path
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import check_agreement, reading
from lightning_muter.deletion.receipts import canonical
from lightning_muter.deletion.request_flow import load_snapshot
from lightning_muter.errors import ArgumentError, CorruptFileError, MuterError
from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.container import parse_json
from lightning_muter.storage.fingerprint import DigestKey
from lightning_muter.storage.signing import PublicKey, read_public_keys

_PATIENCE = 10.0  # seconds to wait until a request under way is over
T = TypeVar("T")


@dataclass
class Audit:
    """What was found: facts to print, problems (anything that should not be), notes (what to do some time)."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head: str | None = None


def audit(
    places: Places, *, verify: bool = False, expect: str | None = None, public_key: str | os.PathLike[str] | None = None
) -> Audit:
    """Look at everything that belongs to a checkpoint; damage becomes a problem in the list, not an exception.

    Args:
        verify: check the whole chain of receipts, its signatures and the receipt files too.
        expect: a head seen earlier, 64 hexadecimal digits: the chain (checked as with `verify`) must contain it.
        public_key: a copy of the public key that is trusted; by default the one beside the checkpoint.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:  # files and ledger are looked at one after the other: again, if they changed meanwhile
        before, busy = _stamp(places), pending_process(places) is not None
        found = _look(places, verify, expect, public_key)
        if (not busy and _stamp(places) == before) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _stamp(places: Places) -> list[tuple[int, ...] | None]:
    journal = Path(f"{places.ledger}-journal")
    return [_file_stamp(p) for p in (places.checkpoint, places.snapshot, places.ledger, journal, places.pending)]


def _file_stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _look(places: Places, verify: bool, expect: str | None, public_key: str | os.PathLike[str] | None) -> Audit:
    found = Audit()
    fingerprint = _checkpoint(places, found)
    key = _key(places, found)
    snapshot = _snapshot(places, found, fingerprint)
    try:
        trusted = _trusted(places, public_key)
        with reading(places) as ledger:
            if ledger is None:
                found.facts["ledger"] = "none yet; the first request begins it"
                if places.receipts.is_dir() or places.public_key.exists() or expect is not None:
                    found.problems.append(f"{places.ledger}: there is no ledger, but there was one. Restore it.")
                return found
            _ledger(places, found, ledger, fingerprint, snapshot)
            if verify or expect is not None:
                found.problems += ledger.verify(key, trusted)
                found.facts["verified"] = (
                    f"{len(ledger)} receipt{'' if len(ledger) == 1 else 's'}: {_checked(ledger, key, trusted, found)}"
                )
            if verify:
                found.problems += _receipt_files(places, ledger) + _published(places, ledger, key)
            if expect is not None and not ledger.contains(expect):
                found.problems.append(
                    f"--expect: {expect} is not in this ledger's history: it was rolled back or forked"
                )
    except MuterError as error:
        found.problems.append(str(error))
    return found


def audit_command(ckpt_path: str, *, verify: bool, expect: str | None = None, public_key: str | None = None) -> int:
    """Print an audit; 0 when nothing is wrong, 1 otherwise."""
    places = Places.of(ckpt_path)
    if expect is not None:
        expect = expect.strip().lower()
        if len(expect) != 64 or set(expect) - set("0123456789abcdef"):
            raise ArgumentError("expect", expect, "the 64 hexadecimal digits that `muter audit` printed as head")
    found = audit(places, verify=verify, expect=expect, public_key=public_key)
    width = max(map(len, found.facts), default=0)
    for name, value in found.facts.items():
        print(f"{name:<{width}}  {value}")
    if found.head is not None:
        print(f"head {found.head}")
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"PROBLEM: {problem}")
    print(f"{len(found.problems)} problems" if found.problems else "no problems found")
    return 1 if found.problems else 0


def _key(places: Places, found: Audit) -> DigestKey | None:
    """The secret key where it is at hand; an auditor has none."""
    if not places.key.exists() or not os.access(places.key, os.R_OK):
        found.notes.append("the key is not here: the snapshot's seal was not checked, and no request can be made here")
        return None
    return _attempt(found, lambda: DigestKey.load(places.key))


def _trusted(places: Places, public_key: str | os.PathLike[str] | None) -> list[PublicKey]:
    if public_key is not None:
        return read_public_keys(public_key)
    return read_public_keys(places.public_key) if places.public_key.exists() else []


def _checked(ledger: Ledger, key: DigestKey | None, trusted: list[PublicKey], found: Audit) -> str:
    """What a verification covered, in words."""
    last = ledger.last()
    if last is not None and "signature" not in last and key is None:
        found.notes.append("the receipts are from before signatures: without the key their seals cannot be checked")
        return "chain and files checked, seals not"
    if key is None and not trusted:
        found.notes.append("there is no public key here: the signatures are true, but whose they are is not known")
    return "chain, signatures and files checked"


def _published(places: Places, ledger: Ledger, key: DigestKey | None) -> list[str]:
    """Whether the public key file names the keys that signed."""
    used = ledger.public_keys()
    if key is None or not used or not places.public_key.exists() or read_public_keys(places.public_key) == used:
        return []
    return [f"{places.public_key}: not the keys that signed the receipts. Delete it; the next request writes it anew."]


def _attempt(found: Audit, call: Callable[[], T]) -> T | None:
    try:
        return call()
    except MuterError as error:
        found.problems.append(str(error))
    except OSError as error:
        found.problems.append(f"{error.filename}: cannot be read ({error.strerror})")
    return None


def _checkpoint(places: Places, found: Audit) -> str | None:
    checkpoint = _attempt(found, lambda: load_checkpoint(places.checkpoint))
    if checkpoint is None:
        return None
    fingerprint = checkpoint_fingerprint(checkpoint)
    found.facts["checkpoint"] = f"{places.checkpoint}, weights {fingerprint[:16]}…"
    if extra := remembers(checkpoint):
        found.notes.append(f"the checkpoint holds more than weights ({', '.join(extra)}): it may remember samples")
    return fingerprint


def _snapshot(places: Places, found: Audit, fingerprint: str | None) -> Stored | None:
    snapshot = _attempt(found, lambda: load_snapshot(places.snapshot, unsealed=places.ledger.exists()))
    if snapshot is None:
        return None
    found.facts["snapshot"] = f"{places.snapshot}, scope {snapshot.scope}, {snapshot.threat_model}"
    found.facts["rows"] = f"{snapshot.n_total - len(snapshot.absent)} trained on, {len(snapshot.forgotten)} forgotten"
    found.facts["stationarity"] = f"{snapshot.stationarity:.3g} as last measured (0 is a minimum)"
    if fingerprint is not None and snapshot.fingerprint != fingerprint:
        found.problems.append(
            f"the snapshot was taken of weights {snapshot.fingerprint[:16]}…, the checkpoint holds "
            f"{fingerprint[:16]}…: they do not belong together. Restore both from one backup, or take a new snapshot."
        )
    return snapshot


def _ledger(places: Places, found: Audit, ledger: Ledger, fingerprint: str | None, snapshot: Stored | None) -> None:
    kinds = ledger.kinds()
    counts = ", ".join(
        f"{sum(1 for k in kinds.values() if k == kind)} {kind}" for kind in dict.fromkeys(kinds.values())
    )
    found.facts["ledger"] = f"{places.ledger}, {len(kinds)} request{'' if len(kinds) == 1 else 's'} ({counts})"
    last = ledger.last()
    if last is None:
        return
    found.head = ledger.head()
    found.facts["last request"] = f"{last['id']} at {last['time']}"
    _attempt(found, lambda: check_agreement(places, ledger))
    if fingerprint is not None and last["checkpoint"]["fingerprint_after"] != fingerprint:
        found.problems.append("the checkpoint's weights are not those that the last receipt left")
    forgotten = ledger.forgotten()
    if snapshot is not None and not set(forgotten) <= {int(index) for index in snapshot.forgotten}:
        found.problems.append("the ledger names forgotten rows that the snapshot does not know as forgotten")
    if (unlearned := ledger.last("unlearn")) is not None:
        bound = unlearned["metrics"].get("bound")
        bound = f"{bound:.3g}" if isinstance(bound, float) else bound
        found.facts["certificate"] = (
            f"distance to retraining at most {bound} (request {unlearned['id']})"
            if bound is not None
            else "none; the receipt says why"
        )
        cleaned = max((number for number, kind in kinds.items() if kind in ("snapshot", "refresh")), default=0)
        since = sum(1 for number in ledger.forgotten_by().values() if number > cleaned)
        if since:
            found.notes.append(
                f"the snapshot's reference point is from before {since} rows were forgotten and still carries their "
                "influence; `muter refresh` removes it"
            )


def _receipt_files(places: Places, ledger: Ledger) -> list[str]:
    """Compare the receipt files with the ledger's."""
    problems = []
    known = set()
    for number, request_id, text in ledger.texts():
        path = receipt_path(places, {"number": number, "id": request_id})
        known |= {path.name, f"{path.name[:-5]}.md"}
        try:
            if canonical(parse_json(path.read_bytes())) != text:
                problems.append(f"{path}: differs from the ledger's receipt {number}: damaged or edited")
        except FileNotFoundError:
            problems.append(f"{path}: missing; the next request writes it anew from the ledger")
        except (OSError, CorruptFileError, ValueError, RecursionError) as error:
            problems.append(f"{path}: damaged or edited ({error})")
    if places.receipts.is_dir():
        problems += [
            f"{places.receipts / name}: the ledger knows no such receipt"
            for name in sorted(set(os.listdir(places.receipts)) - known)
            if name.endswith((".json", ".md"))
        ]
    return problems
