"""Receipts: what one request did, as JSON that is chained by hash to the one before and sealed with the digest key.

A receipt is a JSON object. Its `sha256` is the hash of the canonical JSON text (sorted keys, two spaces of indentation,
UTF-8, a final newline) of everything but `sha256` and `seal`; `previous` is the `sha256` of the receipt before (or 64
zeros). So an edited, missing or reordered receipt breaks the chain. Who could rewrite the whole chain is caught
by `seal`, an HMAC of `sha256` under the key that also made the sample digests: nobody makes it without the key file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_muter.errors import CorruptFileError
from lightning_muter.storage.container import parse_json
from lightning_muter.storage.fingerprint import DigestKey

FORMAT = "lightning_muter receipt 1"
GENESIS = "0" * 64
_MAX_BYTES = 64 << 20
_ADVICE = "The ledger keeps the original: delete the file, and the next request writes it anew."
_REQUIRED = {
    "format": str, "number": int, "id": str, "kind": str, "time": str, "method": str, "scope": str, "forgotten": list,
    "users": list, "key_id": str, "n_retained": int, "checkpoint": dict, "snapshot": dict, "metrics": dict,
    "warnings": list, "versions": dict, "previous": str, "sha256": str, "seal": str,
}  # fmt: skip


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one JSON text of a receipt's content; numbers that JSON has not become text ("inf", "nan")."""
    text = json.dumps(_plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def content_sha256(receipt: Mapping[str, Any]) -> str:
    """SHA-256 of a receipt's content (everything but `sha256` and `seal`)."""
    content = {key: value for key, value in receipt.items() if key not in ("sha256", "seal")}
    return hashlib.sha256(canonical(content)).hexdigest()


def make_receipt(content: Mapping[str, Any], number: int, previous: str, key: DigestKey) -> dict[str, Any]:
    """Complete `content` to a receipt: number, link to the one before, hash, seal."""
    receipt = {**_plain(content), "format": FORMAT, "number": number, "previous": previous, "key_id": key.key_id}
    digest = content_sha256(receipt)
    return {**receipt, "sha256": digest, "seal": key.seal(digest.encode())}


def parse_receipt(text: bytes, origin: str = "receipt") -> dict[str, Any]:
    """A receipt from untrusted bytes.

    Raises:
        CorruptFileError: it is not JSON, lacks a field, has one of another type, is not in canonical form, or its
            content does not match its own hash.
    """
    try:
        receipt = parse_json(text)
    except CorruptFileError as error:
        raise CorruptFileError(f"{origin}: {error}. {_ADVICE}") from None
    wrong = sorted(
        name for name, kind in _REQUIRED.items() if name not in receipt or type(receipt[name]) is not kind
    ) + sorted(set(receipt) - set(_REQUIRED))
    if wrong or receipt["format"] != FORMAT:
        raise CorruptFileError(
            f"{origin}: not a receipt of this format (check {', '.join(wrong) or 'format'}). {_ADVICE}"
        )
    try:
        intact = content_sha256(receipt) == receipt["sha256"] and canonical(receipt) == text
    except (ValueError, RecursionError):  # lone surrogates and the like
        intact = False
    if not intact:
        raise CorruptFileError(f"{origin}: its content does not match its hash: damaged or edited. {_ADVICE}")
    return receipt


def read_receipt(path: Path) -> dict[str, Any]:
    """As :func:`parse_receipt`, from a file."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES)
    except OSError as error:
        raise CorruptFileError(f"{path}: cannot be read ({error.strerror}). {_ADVICE}") from error
    return parse_receipt(text, str(path))


def receipt_name(receipt: Mapping[str, Any]) -> str:
    """The file name of a receipt, without its ending: its number and what of its id suits a file name."""
    return f"{receipt['number']:06d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', receipt['id'])[:60]}"


def markdown(receipt: Mapping[str, Any]) -> str:
    """A receipt for people."""
    checkpoint, snapshot = receipt["checkpoint"], receipt["snapshot"]
    forgotten = receipt["forgotten"]
    shown = ", ".join(map(str, forgotten[:50])) + (f", … ({len(forgotten)} in all)" if len(forgotten) > 50 else "")
    rows = {
        "Request": f"`{receipt['id']}` ({receipt['kind']})",
        "Time": receipt["time"],
        "Method": f"{receipt['method']}, scope {receipt['scope']}",
        "Rows forgotten": shown or "none",
        "Users (keyed hashes)": str(len(receipt["users"])),
        "Rows retained": str(receipt["n_retained"]),
        "Weights before": f"`{checkpoint.get('fingerprint_before')}`",
        "Weights after": f"`{checkpoint.get('fingerprint_after')}`",
        "Checkpoint": f"`{checkpoint.get('name')}`, SHA-256 `{checkpoint.get('sha256')}`",
        "Snapshot": f"`{snapshot.get('name')}`, SHA-256 `{snapshot.get('sha256')}`",
        **{name.replace("_", " ").capitalize(): _cell(value) for name, value in sorted(receipt["metrics"].items())},
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(receipt["versions"].items())),
        "Receipt before": f"`{receipt['previous']}`",
        "This receipt": f"`{receipt['sha256']}`",
    }
    lines = [f"# Receipt {receipt['number']}: {receipt['kind']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    if receipt["warnings"]:
        lines += ["", "What to know:", "", *(f"- {_cell(warning)}" for warning in receipt["warnings"])]
    lines += ["", "The JSON file of the same name is the receipt; this page only shows it.", ""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return " ".join(text.replace("|", "\\|").split())
