"""Who is who: fingerprints of weights, keyed digests of samples and user ids, versions of what computed a result."""

from __future__ import annotations

import hashlib
import hmac
import importlib.metadata
import json
import os
import platform
import secrets
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError
from lightning_muter.storage import signing
from lightning_muter.storage.atomic import create_once
from lightning_muter.storage.signing import PublicKey

KEY_BYTES, DIGEST_BYTES = 32, 16
_PACKAGES = ("lightning-muter", "torch", "lightning", "torchattacks", "safetensors", "numpy")


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw little-endian bytes of a tensor in row-major order, the same from every device and memory layout."""
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    # Hosts are little-endian wherever torch runs; a 0-d tensor needs a dimension to be viewed as bytes.
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _describe(tensor: Tensor) -> bytes:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}".encode()


def weight_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (sorted), dtypes, shapes and raw bytes of a state dict: 64 hexadecimal digits.

    Equal exactly when every tensor is bitwise equal; device, memory layout and order of the entries do not matter.

    >>> a = weight_fingerprint({"w": torch.zeros(2), "b": torch.ones(1)})
    >>> a == weight_fingerprint({"b": torch.ones(1), "w": torch.zeros(2)})
    True
    >>> a == weight_fingerprint({"w": torch.zeros(2)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"weights[{name!r}]", type(tensor).__name__, "a tensor", "Pass `module.state_dict()`.")
        for part in (name.encode(), _describe(tensor), tensor_bytes(tensor)):
            digest.update(struct.pack("<Q", len(part)))
            digest.update(part)
    return digest.hexdigest()


class DigestKey:
    """A secret of 32 bytes under which samples and user ids are hashed (HMAC-SHA256, the first 16 bytes).

    Unkeyed hashes of samples would let anybody who holds a sample, or can guess a user id, find out that it was in
    the training set. With the key kept apart (its file has mode 0600) the digests say nothing; without it nothing can
    be compared any more. Samples, user ids, seals and the Ed25519 signing key are derived in separate domains.
    """

    def __init__(self, secret: bytes) -> None:
        if not isinstance(secret, bytes) or len(secret) != KEY_BYTES:
            raise ArgumentError("secret", type(secret).__name__, f"{KEY_BYTES} bytes")
        self._secret = secret

    def __repr__(self) -> str:  # the secret must not get into logs
        return f"DigestKey(key_id={self.key_id!r})"

    @classmethod
    def generate(cls) -> DigestKey:
        """A new random key, in memory only."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DigestKey:
        """Read a key file.

        Raises:
            ArgumentError: there is no such file.
            CorruptFileError: it is not a plain file of 32 bytes, or others than its owner may read it.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            advice = (
                "Restore the key file: without it samples cannot be recognised. If it is lost for good: "
                "`muter refresh --recover_key true`."
            )
            raise ArgumentError("key", str(path), "an existing key file", advice) from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size != KEY_BYTES:
                raise CorruptFileError(
                    f"{path}: not a key file ({status.st_size} bytes, not {KEY_BYTES}). Restore it from a backup."
                )
            if os.name == "posix" and status.st_mode & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise CorruptFileError(f"{path}: others may read this key (mode {mode:04o}). Run `chmod 600 {path}`.")
            return cls(file.read())

    def write(self, file: BinaryIO) -> None:
        """Write this key to an open file; whoever opened it saw to it that nobody else may read it."""
        file.write(self._secret)

    def keep(self, path: str | os.PathLike[str]) -> None:
        """Write this key to a file (mode 0600) unless the same one is there already; never over another one.

        Raises:
            MismatchError: the file holds another key.
        """
        path = Path(path)
        if not path.exists():
            _write_secret(path, self._secret)
        if self.load(path).key_id != self.key_id:
            raise MismatchError(
                f"{path}: it holds another key than this snapshot's ({self.key_id}). Save under another name, or pass "
                "key=DigestKey.load(...) when the snapshot is taken."
            )

    @property
    def key_id(self) -> str:
        """A public name of the key, to tell two keys apart; it does not reveal the key."""
        return self._hmac(b"key", b"")[:8].hex()

    def digest(self, x: Tensor, y: object) -> bytes:
        """The keyed digest of one sample, 16 bytes: dtype, shape, bytes of `x` and of `y` (tensor, number or text)."""
        if not isinstance(y, Tensor):
            return self._hmac(b"sample", _describe(x), tensor_bytes(x), b"plain", json.dumps(y).encode())
        return self._hmac(b"sample", _describe(x), tensor_bytes(x), _describe(y), tensor_bytes(y))

    def digest_id(self, user_id: str) -> str:
        """The keyed digest of a user id, 32 hexadecimal digits."""
        return self._hmac(b"user", user_id.encode())[:DIGEST_BYTES].hex()

    def seal(self, content: bytes) -> str:
        """A keyed hash of `content`, 32 hexadecimal digits: only who has the key can make or check it."""
        return self._hmac(b"seal", content).hex()

    def sign(self, content: bytes) -> str:
        """An Ed25519 signature, 128 hexadecimal digits: only who has the key can make it, anybody can check it."""
        return signing.sign(self._full_hmac(b"sign"), content)

    @property
    def public_key(self) -> PublicKey:
        """What checks the signatures of this key; it does not reveal the key."""
        return signing.public_half(self._full_hmac(b"sign"))

    def _hmac(self, domain: bytes, *parts: bytes) -> bytes:
        return self._full_hmac(domain, *parts)[:DIGEST_BYTES]

    def _full_hmac(self, domain: bytes, *parts: bytes) -> bytes:
        mac = hmac.new(self._secret, digestmod="sha256")
        for part in (domain, *parts):
            mac.update(struct.pack("<Q", len(part)))
            mac.update(part)
        return mac.digest()


def _write_secret(path: Path, secret: bytes) -> None:
    try:
        create_once(path, lambda file: file.write(secret), mode=0o600)
    except FileNotFoundError:
        raise ArgumentError("key", str(path), "a file in an existing folder", f"Create {path.parent} first.") from None


def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
