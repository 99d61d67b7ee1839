"""Ed25519 signatures, so that whoever holds the public key alone can check what the owner of the secret key wrote.

A public key file (`<name>.muter.pub`) holds one PEM block per key, the oldest first: a lost key is followed by a new one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lightning_muter.errors import CorruptFileError
from lightning_muter.storage.atomic import atomic_write

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----\n?", re.DOTALL)
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class PublicKey:
    """The public half of a signing key: 32 bytes as 64 hexadecimal digits."""

    hex: str

    def pem(self) -> bytes:
        """This key as PEM (SubjectPublicKeyInfo), which `openssl pkey -pubin` and `cryptography` read."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.hex))
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def verifies(self, signature: str, content: bytes) -> bool:
        """Whether `signature` (128 hexadecimal digits) was made over `content` with the secret half."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.hex)).verify(bytes.fromhex(signature), content)
        except (InvalidSignature, ValueError):
            return False
        return True


def sign(seed: bytes, content: bytes) -> str:
    """The Ed25519 signature of `content` under the secret key `seed` (32 bytes), 128 hexadecimal digits."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(seed).sign(content).hex()


def public_half(seed: bytes) -> PublicKey:
    """The public key that belongs to the secret key `seed`.

    >>> public_half(bytes(32)).verifies(sign(bytes(32), b"a"), b"a"), public_half(bytes(32)).verifies("00" * 64, b"a")
    (True, False)
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return PublicKey(Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw().hex())


def read_public_keys(path: str | os.PathLike[str]) -> list[PublicKey]:
    """The keys of a public key file, oldest first.

    Raises:
        CorruptFileError: it cannot be read, or holds anything but Ed25519 public keys in PEM.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    advice = "Restore it from a copy, or delete it: the next request writes it anew."
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES)
        keys = [load_pem_public_key(block) for block in _PEM.findall(text)]
    except OSError as error:
        raise CorruptFileError(f"{path}: cannot be read ({error.strerror}). {advice}") from error
    except Exception as error:  # a third party's parser on untrusted bytes: whatever it raises means the same
        raise CorruptFileError(f"{path}: not a public key ({type(error).__name__}). {advice}") from error
    if not keys or _PEM.sub(b"", text).strip() or not all(isinstance(key, Ed25519PublicKey) for key in keys):
        raise CorruptFileError(f"{path}: not a file of Ed25519 public keys in PEM. {advice}")
    return [PublicKey(key.public_bytes_raw().hex()) for key in keys if isinstance(key, Ed25519PublicKey)]


def write_public_keys(path: Path, keys: list[PublicKey]) -> None:
    """Make `path` hold exactly these keys; nothing is written where it does already."""
    content = b"".join(key.pem() for key in keys)
    if not path.exists() or path.read_bytes() != content:
        atomic_write(path, lambda file: file.write(content))
