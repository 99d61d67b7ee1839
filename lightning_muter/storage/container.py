r"""Container files: named tensors and JSON under a content hash that is checked before anything is parsed.

Layout (all integers little-endian):

    offset  size  content
    0       8     magic `b"\x93MUTER\r\n"`
    8       4     format version: 1, or 2 with a seal
    12      4     zero
    16      8     payload length in bytes; in version 1 the file ends there
    24      32    SHA-256 of the payload
    56      8     zero (so that tensors are aligned)
    64      ...   payload: a safetensors file, whose metadata `lightning_muter` is the JSON text
                    `{"kind": ..., "meta": {...}}` (one entry, for the order of several is not fixed)
    end     24    version 2: id of the key (8) and the seal (16), an HMAC of the first 64 bytes under that key

Reading executes nothing from the file: no pickle, no class names. The hash finds damage, not malice: whoever writes the file
can hash it anew. With the key at hand the seal finds that too; without it the parser trusts nothing: size, depth and names of the
JSON are checked here, shapes and offsets by safetensors, before memory is taken.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError
from lightning_muter.storage.atomic import Writer, atomic_write
from lightning_muter.storage.fingerprint import DigestKey

MAGIC = b"\x93MUTER\r\n"
FORMAT, SEALED = 1, 2
_SEAL_BYTES = 24
_HEAD = struct.Struct("<8sIIQ32sQ")
_MAX_JSON = 64 << 20  # bytes of header (tensor table and meta together); a snapshot's is a few kilobytes
_MAX_DEPTH = 64
_STRING, _BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL), re.compile(rb"[\[\]{}]")
_METADATA = "lightning_muter"
_ADVICE = "Restore the file from a backup, or take a new snapshot of the model with `muter snapshot`."


def container_bytes(
    kind: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], key: DigestKey | None = None
) -> bytes:
    """A container as bytes, sealed where a `key` is given; the same content gives the same bytes."""
    if not kind or not isinstance(kind, str):
        raise ArgumentError("kind", kind, "a non-empty text")
    try:
        text = json.dumps({"kind": kind, "meta": dict(meta)}, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError("meta", type(meta).__name__, f"JSON values with text keys ({error})") from error
    if not _text_keys(meta) or _depth(text.encode()) > _MAX_DEPTH:
        raise ArgumentError("meta", type(meta).__name__, f"text keys, nested at most {_MAX_DEPTH} deep")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_sparse or tensor.is_meta or tensor.is_quantized:
            raise ArgumentError(f"tensors[{name!r}]", tensor, "a dense tensor")
    plain = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    try:
        payload = safetensors.torch.save(plain, metadata={_METADATA: text})
    except Exception as error:
        raise ArgumentError("tensors", sorted(tensors), f"tensors that safetensors can hold ({error})") from error
    try:
        _check_payload(payload)
    except CorruptFileError as error:
        raise ArgumentError("tensors", sorted(tensors), f"what can be read back ({error})") from error
    version = FORMAT if key is None else SEALED
    head = _HEAD.pack(MAGIC, version, 0, len(payload), hashlib.sha256(payload).digest(), 0)
    return head + payload + (b"" if key is None else _seal(head, key))


def _seal(head: bytes, key: DigestKey) -> bytes:
    return bytes.fromhex(key.key_id) + bytes.fromhex(key.seal(b"container\n" + head))


def container_writer(
    kind: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], key: DigestKey | None = None
) -> Writer:
    """The same as a writer for :func:`lightning_muter.storage.atomic.commit_files`."""
    content = container_bytes(kind, meta, tensors, key)
    return lambda file: file.write(content)


def write_container(
    path: str | os.PathLike[str], kind: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str:
    """Write a container atomically.

    Args:
        path: the file; an old one is replaced entirely or, on any failure, left as it was.
        kind: what the container is, e.g. `"snapshot"`; reading asks for the same.
        meta: JSON values (text, numbers, bool, None, lists, dicts with text keys).
        tensors: dense tensors by name; stored from the CPU, contiguous.

    Returns:
        The SHA-256 of the payload, as 64 hexadecimal digits.
    """
    content = container_bytes(kind, meta, tensors)
    atomic_write(path, lambda file: file.write(content))
    return content[24:56].hex()


def read_container(
    path: str | os.PathLike[str], kind: str, key: DigestKey | None = None, *, unsealed: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a container of this kind: `(meta, tensors)`, tensors on the CPU with memory of their own.

    Args:
        key: must have sealed the file; without it seals are not checked.
        unsealed: with a key, take a file without a seal all the same.

    Raises:
        ArgumentError: there is no such file.
        CorruptFileError: it is damaged, of another kind or of an unknown format version, or its seal is false or missing;
            nothing in it was used.
        MismatchError: another key sealed it.
    """
    content = _read(Path(path))
    if key is not None:
        _check_seal(content, key, str(path), unsealed)
    return parse_container(content, kind, str(path))


def _check_seal(content: bytes, key: DigestKey, origin: str, unsealed: bool) -> None:
    head = content[: _HEAD.size]
    if len(head) < _HEAD.size or _HEAD.unpack(head)[1] != SEALED:  # damage is for the parser to tell
        if not unsealed:
            raise CorruptFileError(
                f"{origin}: it has no seal, so anybody who can write to this folder may have made it. {_ADVICE} If a release "
                "from before seals wrote it and you trust the folder: Snapshot.load(path, unsealed=True), and save it again."
            )
    elif len(content) != _HEAD.size + _HEAD.unpack(head)[3] + _SEAL_BYTES:
        return  # cut short or appended to, which the parser tells
    elif (found := content[-_SEAL_BYTES:][:8].hex()) != key.key_id:
        raise MismatchError(
            f"{origin}: sealed with key {found}, the key at hand is {key.key_id}. Restore the key file from a backup."
        )
    elif not hmac.compare_digest(content[-_SEAL_BYTES:], _seal(head, key)):
        raise CorruptFileError(f"{origin}: its seal is false: it was not written with this key. {_ADVICE}")


def parse_container(content: bytes, kind: str, origin: str = "container") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As :func:`read_container`, from bytes; `origin` names them in messages."""
    try:
        payload = _payload(content)
        found, meta = _check_payload(payload)
        if found != kind:
            raise CorruptFileError(f"it holds a {found[:80]!r}, not a {kind!r}")
        tensors = safetensors.torch.load(payload)  # refuses a table that does not fill the payload exactly
        if any(tensor.dim() > _MAX_DEPTH // 2 for tensor in tensors.values()):
            raise CorruptFileError("a tensor of too many dimensions")
        return meta, tensors
    except CorruptFileError as error:
        raise CorruptFileError(f"{origin}: {error}. {_ADVICE}") from None
    except Exception as error:  # a third party's parser on untrusted bytes: whatever it raises means the same
        raise CorruptFileError(
            f"{origin}: its tensors cannot be read ({type(error).__name__}: {error}). {_ADVICE}"
        ) from error


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_open_plain) as file:
            return _read_plain(file, path)
    except FileNotFoundError:
        raise ArgumentError("path", str(path), "an existing file") from None


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not make us wait


def _read_plain(file: BinaryIO, path: Path) -> bytes:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise CorruptFileError(f"{path}: not a plain file. {_ADVICE}")
    # The head first: a file of another kind, however large, is not read into memory.
    head = file.read(_HEAD.size)
    if head[: len(MAGIC)] != MAGIC:
        raise CorruptFileError(f"{path}: not a file of lightning_muter (its first bytes differ). {_ADVICE}")
    return head + file.read()


def _payload(content: bytes) -> bytes:
    """The payload, once version, length and hash are right."""
    if len(content) < _HEAD.size:
        raise CorruptFileError(f"cut short ({len(content)} bytes)")
    magic, version, zero, length, digest, zeros = _HEAD.unpack_from(content)
    if magic != MAGIC:
        raise CorruptFileError("not a file of lightning_muter (its first bytes differ)")
    if version > SEALED:
        raise CorruptFileError(
            f"format version {version}, this release reads up to {SEALED}: a newer release wrote it, or it is damaged"
        )
    if not version or zero or zeros:
        raise CorruptFileError(f"damaged head (format version {version})")
    payload = content[_HEAD.size : -_SEAL_BYTES] if version == SEALED else content[_HEAD.size :]
    if length != len(payload):
        raise CorruptFileError(f"{len(payload)} bytes of content where {length} were written: cut short or appended to")
    if hashlib.sha256(payload).digest() != digest:
        raise CorruptFileError("the content does not match its hash: damaged or altered")
    return payload


def _check_payload(payload: bytes) -> tuple[str, dict[str, Any]]:
    """Check what safetensors does not: the size of its table, and what is ours in it; returns kind and meta."""
    if len(payload) < 8:
        raise CorruptFileError("no tensor table")
    (size,) = struct.unpack_from("<Q", payload)
    if size > min(_MAX_JSON, len(payload) - 8):
        raise CorruptFileError(f"a tensor table of {size} bytes")
    table = parse_json(payload[8 : 8 + size])
    extra = table.pop("__metadata__", None)
    if not isinstance(extra, dict) or set(extra) != {_METADATA} or not isinstance(extra[_METADATA], str):
        raise CorruptFileError("no metadata of lightning_muter")
    inner = parse_json(extra[_METADATA].encode())
    if set(inner) != {"kind", "meta"} or not isinstance(inner["kind"], str) or not isinstance(inner["meta"], dict):
        raise CorruptFileError("no kind and meta")
    return inner["kind"], inner["meta"]


def parse_json(text: Any) -> dict[str, Any]:
    """A JSON object from untrusted bytes: bounded size and depth, UTF-8, no key twice.

    >>> parse_json(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
        ...
    lightning_muter.errors.CorruptFileError: JSON names 'a' twice
    """
    if not isinstance(text, bytes):  # a column of a database may hold anything
        raise CorruptFileError(f"JSON as {type(text).__name__}, not bytes")
    if len(text) > _MAX_JSON:
        raise CorruptFileError(f"JSON of {len(text)} bytes, more than {_MAX_JSON}")
    if _depth(text) > _MAX_DEPTH:
        raise CorruptFileError(f"JSON nested more than {_MAX_DEPTH} deep")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"not JSON ({str(error)[:120]})") from None
    if not isinstance(value, dict):
        raise CorruptFileError("not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CorruptFileError(f"JSON names {key[:80]!r} twice")
        result[key] = value
    return result


def _depth(text: bytes) -> int:
    """How deep objects and lists are nested, without recursion; an upper bound where there are few of them."""
    if (brackets := text.count(b"[") + text.count(b"{")) <= _MAX_DEPTH:
        return brackets
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", text)):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _text_keys(value: object) -> bool:
    """Whether every object in a JSON value has text keys (`json` would turn others into text silently)."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _text_keys(item) for key, item in value.items())
    return not isinstance(value, (list, tuple)) or all(_text_keys(item) for item in value)
