"""`muter audit`: in what state a checkpoint and its files are, from the files alone, without changing any."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint, remembers
from lightning_muter.deletion.files import Places, receipt_path
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import check_agreement, reading
from lightning_muter.deletion.receipts import read_receipt
from lightning_muter.deletion.request_flow import load_snapshot
from lightning_muter.errors import MuterError
from lightning_muter.snapshot.snapshot import Stored
from lightning_muter.storage.fingerprint import DigestKey


@dataclass
class Audit:
    """What was found: facts to print, problems (anything that should not be), notes (what to do some time)."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def audit(places: Places, *, verify: bool = False) -> Audit:
    """Look at everything that belongs to a checkpoint; damage becomes a problem in the list, not an exception."""
    found = Audit()
    fingerprint = _checkpoint(places, found)
    snapshot = _snapshot(places, found, fingerprint)
    key = _attempt(found, lambda: DigestKey.load(places.key))
    try:
        with reading(places) as ledger:
            if ledger is None:
                found.facts["ledger"] = "none yet; the first request begins it"
                return found
            _ledger(places, found, ledger, fingerprint, snapshot)
            if verify:
                found.problems += ledger.verify(key)
                found.problems += _receipt_files(places, ledger)
                sealed = "chain, seals and files checked" if key is not None else "chain and files checked, seals not"
                found.facts["verified"] = f"{len(ledger)} receipts: {sealed}"
    except MuterError as error:
        found.problems.append(str(error))
    return found


def audit_command(ckpt_path: str, *, verify: bool) -> int:
    """Print an audit; 0 when nothing is wrong, 1 otherwise."""
    places = Places.of(ckpt_path)
    found = audit(places, verify=verify)
    width = max(map(len, found.facts), default=0)
    for name, value in found.facts.items():
        print(f"{name:<{width}}  {value}")
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"PROBLEM: {problem}")
    print(f"{len(found.problems)} problems" if found.problems else "no problems found")
    return 1 if found.problems else 0


def _attempt(found: Audit, call: Any) -> Any:
    try:
        return call()
    except MuterError as error:
        found.problems.append(str(error))
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
    snapshot = _attempt(found, lambda: load_snapshot(places.snapshot))
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
    receipts = ledger.receipts()
    kinds = [receipt["kind"] for receipt in receipts]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    found.facts["ledger"] = f"{places.ledger}, {len(receipts)} requests ({counts})"
    if not receipts:
        return
    last = receipts[-1]
    found.facts["last request"] = f"{last['id']} at {last['time']}"
    _attempt(found, lambda: check_agreement(places, ledger))
    if fingerprint is not None and last["checkpoint"]["fingerprint_after"] != fingerprint:
        found.problems.append("the checkpoint's weights are not those that the last receipt left")
    forgotten = ledger.forgotten()
    if snapshot is not None and not set(forgotten) <= {int(index) for index in snapshot.forgotten}:
        found.problems.append("the ledger names forgotten rows that the snapshot does not know as forgotten")
    unlearned = [receipt for receipt in receipts if receipt["kind"] == "unlearn"]
    if unlearned:
        metrics = unlearned[-1]["metrics"]
        bound = metrics.get("bound")
        bound = f"{bound:.3g}" if isinstance(bound, float) else bound
        found.facts["certificate"] = (
            f"distance to retraining at most {bound} (request {unlearned[-1]['id']})"
            if bound is not None
            else "none; the receipt says why"
        )
        cleaned = max((i for i, kind in enumerate(kinds) if kind in ("snapshot", "refresh")), default=-1)
        since = sum(len(receipt["forgotten"]) for receipt in receipts[cleaned + 1 :])
        if since:
            found.notes.append(
                f"the snapshot's reference point is from before {since} rows were forgotten and still carries their "
                "influence; `muter refresh` removes it"
            )


def _receipt_files(places: Places, ledger: Ledger) -> list[str]:
    """Compare the receipt files with the ledger's."""
    problems = []
    known = set()
    for receipt in ledger.receipts():
        path = receipt_path(places, receipt)
        known |= {path.name, f"{path.stem}.md"}
        if not path.exists():
            problems.append(f"{path}: missing; the next request writes it anew from the ledger")
            continue
        try:
            if json.dumps(read_receipt(path), sort_keys=True) != json.dumps(receipt, sort_keys=True):
                problems.append(f"{path}: differs from the ledger's receipt {receipt['number']}: edited")
        except MuterError as error:
            problems.append(str(error))
    if places.receipts.is_dir():
        problems += [
            f"{path}: the ledger knows no such receipt"
            for path in sorted(places.receipts.iterdir())
            if path.suffix in (".json", ".md") and path.name not in known
        ]
    return problems
