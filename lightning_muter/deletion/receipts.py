r"""Receipts: what one request did, as JSON that is chained by hash to the one before and signed.

A receipt is a JSON object. Its `sha256` is the hash of the canonical JSON text (UTF-8, sorted keys, no white space between
tokens) of everything but `sha256` and `signature`; `previous` is the `sha256` of the receipt before (or 64 zeros). So an
edited, missing or reordered receipt breaks the chain. Who could rewrite the whole chain is caught by `signature`: Ed25519,
under a key derived from the digest key, over

    b"lightning_muter receipt\n" + sha256 (64 hexadecimal digits, ASCII)

whose public half, 64 hexadecimal digits, is `public_key` and lies beside the ledger as `<name>.muter.pub` (PEM).

Receipts of format 1 (read, not written any more) have canonical text with two spaces of indentation and a final newline, and
instead of a signature a `seal`: an HMAC of `sha256` under the digest key, which the key's owner alone can check.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_muter.errors import CorruptFileError
from lightning_muter.storage.container import parse_json
from lightning_muter.storage.fingerprint import DigestKey, versions
from lightning_muter.storage.signing import PublicKey

FORMAT = "lightning_muter receipt 2"
SEALED_FORMAT = "lightning_muter receipt 1"  # before signatures
SIGNED_PREFIX = b"lightning_muter receipt\n"
GENESIS = "0" * 64
_ADVICE = "The ledger keeps the original: delete the file, and the next request writes it anew."
_ENVELOPE = ("sha256", "seal", "signature")  # outside of the hash
_COMMON = {
    "format": str, "number": int, "id": str, "kind": str, "time": str, "method": str, "scope": str, "forgotten": list,
    "users": list, "key_id": str, "n_retained": int, "checkpoint": dict, "snapshot": dict, "metrics": dict,
    "warnings": list, "versions": dict, "previous": str, "sha256": str,
}  # fmt: skip
_REQUIRED = {
    FORMAT: {**_COMMON, "public_key": str, "signature": str},
    SEALED_FORMAT: {**_COMMON, "seal": str},
}


def canonical(receipt: Mapping[str, Any]) -> bytes:
    """The one JSON text of a receipt, or of its content."""
    if receipt.get("format") == SEALED_FORMAT:
        return readable(receipt)
    return json.dumps(receipt, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def readable(receipt: Mapping[str, Any]) -> bytes:
    """The text of a receipt file: the same JSON, indented."""
    return (json.dumps(receipt, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """The value in JSON's own types; numbers that JSON has not become text ("inf", "nan")."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def content_sha256(receipt: Mapping[str, Any]) -> str:
    """SHA-256 of a receipt's content (everything but its hash, seal and signature)."""
    content = {key: value for key, value in receipt.items() if key not in _ENVELOPE}
    return hashlib.sha256(canonical(content)).hexdigest()


def new_content(
    kind: str,
    request_id: str,
    *,
    scope: str,
    n_retained: int,
    fingerprints: tuple[str, str],
    metrics: Mapping[str, Any],
    method: str | None = None,
    forgotten: Sequence[int] = (),
    users: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of a receipt, whatever its kind; `fingerprints` of the weights before and after."""
    before, after = fingerprints
    return {
        "id": request_id,
        "kind": kind,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": method or kind,
        "scope": scope,
        "forgotten": [int(index) for index in forgotten],
        "users": list(users),
        "n_retained": int(n_retained),
        "checkpoint": {"fingerprint_before": before, "fingerprint_after": after},
        "snapshot": {},
        "metrics": dict(metrics),
        "warnings": [str(warning) for warning in warnings],
        "versions": versions(),
    }


def content_of_files(
    kind: str, request_id: str, last: Mapping[str, Any], metrics: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The content of a receipt of what was done to files, after the request whose receipt is `last`: the weights stay."""
    fingerprint = last["checkpoint"]["fingerprint_after"]
    of = {"scope": last["scope"], "n_retained": last["n_retained"], "fingerprints": (fingerprint, fingerprint)}
    return new_content(kind, request_id, metrics=metrics, **(of | more))


def make_receipt(content: Mapping[str, Any], number: int, previous: str, key: DigestKey) -> dict[str, Any]:
    """Complete `content` to a receipt: number, link to the one before, hash, signature."""
    who = {"key_id": key.key_id, "public_key": key.public_key.hex}
    receipt = {**_plain(content), "format": FORMAT, "number": number, "previous": previous, **who}
    digest = content_sha256(receipt)
    return {**receipt, "sha256": digest, "signature": key.sign(SIGNED_PREFIX + digest.encode())}


def seal_problem(receipt: Mapping[str, Any], key: DigestKey | None, trusted: Sequence[PublicKey]) -> str | None:
    """What is wrong with a receipt's signature or seal, as far as it can be checked with what is at hand.

    Args:
        key: the secret key, where it is at hand.
        trusted: public keys that may have signed; none: whatever key the receipt names.
    """
    if receipt["format"] == SEALED_FORMAT:
        if key is None:
            return None
        if receipt["key_id"] != key.key_id:
            return f"sealed with key {receipt['key_id']}, the key here is {key.key_id}"
        return None if receipt["seal"] == key.seal(receipt["sha256"].encode()) else "its seal is false"
    signer = PublicKey(receipt["public_key"])
    if trusted and signer not in trusted:
        return f"signed with key {signer.hex[:16]}…, which is not one of the public keys here"
    if not signer.verifies(receipt["signature"], SIGNED_PREFIX + receipt["sha256"].encode()):
        return "its signature is false: it was not made with the key that it names"
    return None


def parse_receipt(text: bytes, origin: str = "receipt") -> dict[str, Any]:
    """A receipt from untrusted bytes.

    Raises:
        CorruptFileError: it is not JSON, lacks a field, has one of another type, or its content does not match its own
            hash.
    """
    try:
        receipt = parse_json(text)
    except CorruptFileError as error:
        raise CorruptFileError(f"{origin}: {error}. {_ADVICE}") from None
    required = _REQUIRED.get(receipt["format"]) if isinstance(receipt.get("format"), str) else None
    if required is None:
        raise CorruptFileError(f"{origin}: not a receipt of a format known here (check format). {_ADVICE}")
    wrong = sorted(name for name, kind in required.items() if name not in receipt or type(receipt[name]) is not kind)
    if wrong or len(receipt) != len(required):
        wrong += sorted(set(receipt) - set(required))
        raise CorruptFileError(f"{origin}: not a receipt of this format (check {', '.join(wrong)}). {_ADVICE}")
    try:
        intact = content_sha256(receipt) == receipt["sha256"]
    except (ValueError, RecursionError):  # lone surrogates and the like
        intact = False
    if not intact:
        raise CorruptFileError(f"{origin}: its content does not match its hash: damaged or edited. {_ADVICE}")
    return receipt


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
