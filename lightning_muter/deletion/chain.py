"""Whether the entries of a ledger are what their owner signed, in order, none missing and none changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_muter.deletion.receipts import GENESIS, SEALED_FORMAT, canonical, parse_receipt, seal_problem
from lightning_muter.errors import CorruptFileError
from lightning_muter.storage.fingerprint import DigestKey
from lightning_muter.storage.signing import PublicKey

#: Value of a snapshot receipt's metric "counting": its training set is another one than before.
ANEW = "anew"


@dataclass(frozen=True)
class Entry:
    """A row of the ledger as :func:`columns` orders it, and the digests of the users that it names."""

    row: tuple[Any, ...]
    users: set[str]


def columns(receipt: Mapping[str, Any]) -> tuple[Any, ...]:
    """A receipt as the ledger's columns that repeat it, the text of the receipt and its hash."""
    return *repeated(receipt), canonical(receipt), receipt["sha256"]


def repeated(receipt: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a receipt the ledger holds in columns of its own."""
    return (
        *(receipt[name] for name in ("number", "id", "kind", "time", "method", "scope")),
        receipt["checkpoint"].get("fingerprint_before"),
        receipt["checkpoint"].get("fingerprint_after"),
        json.dumps(receipt["metrics"], sort_keys=True),
        json.dumps(receipt["versions"], sort_keys=True),
    )


def counts_anew(receipt: Mapping[str, Any]) -> bool:
    """Whether positions count in another training set from this receipt on."""
    return receipt["kind"] == "snapshot" and receipt["metrics"].get("counting") == ANEW


def chain_problems(
    entries: Sequence[Entry], forgotten: Mapping[int, str], key: DigestKey | None, trusted: Sequence[PublicKey]
) -> list[str]:
    """Everything that is wrong with these entries, one line each; none when all is well.

    Every signature must be true for the key that its receipt names. Whose keys those are is asked of the last receipt
    alone: it is chained to all the others, so who signed it vouches for them, those under a key lost since included.
    With the secret `key` at hand it must be that one; else one of the `trusted`, if there are any.
    """
    problems, previous, signed = [], GENESIS, False
    expected_forgotten: dict[int, str] = {}
    trusted = trusted if key is None else [key.public_key]
    key_id = key.key_id if key is not None else None
    receipt: dict[str, Any] | None = None
    for expected, entry in enumerate(entries, start=1):
        number = entry.row[0]
        try:
            receipt = parse_receipt(entry.row[10], f"receipt {number}")
        except CorruptFileError as error:
            problems.append(str(error))
            previous, receipt = entry.row[11], None
            continue
        found = [] if receipt["previous"] == previous and receipt["number"] == expected == number else [_BROKEN]
        if entry.row[:10] != repeated(receipt) or entry.row[11] != receipt["sha256"]:
            found.append("the ledger's columns and the receipt differ")
        if entry.users != set(receipt["users"]):
            found.append("the ledger's users and the receipt's differ")
        if signed and receipt["format"] == SEALED_FORMAT:
            found.append("it is not signed, but those before it are")
        signed = signed or receipt["format"] != SEALED_FORMAT
        last = expected == len(entries)
        own_key = key if last or receipt["key_id"] == key_id else None
        if problem := seal_problem(receipt, own_key, trusted if last else ()):
            found.append(problem)
        problems += [f"receipt {number}: {line}" for line in found]
        previous = receipt["sha256"]
        if counts_anew(receipt):
            expected_forgotten.clear()
        expected_forgotten.update(dict.fromkeys(receipt["forgotten"], receipt["id"]))
    if receipt is not None and trusted and not signed and key is None:
        problems.append("there is a public key, but no receipt is signed: it was signed ones that were replaced")
    if expected_forgotten != forgotten:
        problems.append("the ledger's forgotten rows and the receipts' differ")
    return problems


_BROKEN = "the chain is broken here: one before it was changed or removed"
