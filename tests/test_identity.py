"""Fingerprints and keyed digests: equal exactly for equal content, and the key never leaves its file."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import stat
import struct

import pytest
import torch

from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError
from lightning_muter.storage import fingerprint as identity
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint

KEY = DigestKey(bytes(range(32)))


def test_fingerprint_is_the_documented_hash():
    weights = {"b": torch.tensor([1.0, -2.0], dtype=torch.float64), "a": torch.tensor(7, dtype=torch.int32)}
    expected = hashlib.sha256()
    for part in (b"a", b"int32[]", struct.pack("<i", 7), b"b", b"float64[2]", struct.pack("<dd", 1.0, -2.0)):
        expected.update(struct.pack("<Q", len(part)) + part)
    assert weight_fingerprint(weights) == expected.hexdigest()


def test_fingerprint_ignores_layout_and_sees_everything_else():
    base = torch.arange(6.0).reshape(2, 3)
    reference = weight_fingerprint({"w": base})
    assert weight_fingerprint({"w": base.T.contiguous().T}) == reference
    assert weight_fingerprint({"w": torch.nn.Parameter(base.clone())}) == reference
    nudged = base.clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    minus_zero = base.clone()
    minus_zero[0, 0] = -0.0
    different = [
        {"w": nudged},
        {"w": minus_zero},
        {"w": base.reshape(3, 2)},
        {"w": base.double()},
        {"v": base},
        {"w": base, "v": torch.empty(0)},
        {"w": base.to(torch.bfloat16)},
    ]
    prints = {weight_fingerprint(weights) for weights in different}
    assert len(prints) == len(different)
    assert reference not in prints
    with pytest.raises(ArgumentError, match="state_dict"):
        weight_fingerprint({"w": [1.0]})  # type: ignore[dict-item]


def test_digest_is_hmac_and_tells_samples_apart():
    x = torch.arange(4.0)
    mac = hmac.new(bytes(range(32)), digestmod="sha256")
    for part in (b"sample", b"float32[4]", struct.pack("<4f", 0, 1, 2, 3), b"plain", b"1"):
        mac.update(struct.pack("<Q", len(part)) + part)
    assert KEY.digest(x, 1) == mac.digest()[:16]
    others = [
        KEY.digest(x, 2),
        KEY.digest(x, torch.tensor(1)),
        KEY.digest(x, torch.tensor(1.0)),
        KEY.digest(x, "1"),
        KEY.digest(x.reshape(2, 2), 1),
        KEY.digest(x.double(), 1),
        DigestKey(bytes(32)).digest(x, 1),
    ]
    assert len({KEY.digest(x, 1), *others}) == 8
    assert KEY.digest_id("7") != KEY.digest_id("8")
    assert KEY.digest_id("7") != DigestKey(bytes(32)).digest_id("7")


def kept_at(path):
    """The key in this file, a new one where there is none."""
    with contextlib.suppress(MismatchError):  # another process was first
        DigestKey.generate().keep(path)
    return DigestKey.load(path)


def test_key_file_is_private_created_once_and_checked(tmp_path):
    path = tmp_path / "a.key"
    key = kept_at(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() != bytes(32)
    assert kept_at(path).key_id == key.key_id == DigestKey.load(path).key_id
    assert os.listdir(tmp_path) == ["a.key"]
    assert path.read_bytes().hex() not in repr(key)
    assert key.key_id != DigestKey.generate().key_id
    os.chmod(path, 0o644)
    with pytest.raises(CorruptFileError, match="chmod 600"):
        DigestKey.load(path)
    os.chmod(path, 0o600)
    path.write_bytes(b"short")
    with pytest.raises(CorruptFileError, match="5 bytes, not 32"):
        kept_at(path)
    assert path.read_bytes() == b"short"  # never overwritten
    with pytest.raises(ArgumentError, match="--recover_key true"):
        DigestKey.load(tmp_path / "lost.key")
    with pytest.raises(ArgumentError, match="existing folder"):
        kept_at(tmp_path / "no" / "a.key")


def test_two_processes_that_create_a_key_agree(tmp_path):
    readers = []
    for _ in range(6):
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, kept_at(tmp_path / "a.key").key_id.encode())
            os._exit(0)
        os.close(write)
        readers.append(read)
    ids = set()
    for read in readers:
        with os.fdopen(read) as file:
            ids.add(file.read())
        os.wait()
    assert ids == {DigestKey.load(tmp_path / "a.key").key_id}


def test_versions_name_this_package_and_torch():
    found = identity.versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"].startswith(torch.__version__)
    assert {"lightning-muter", "python", "lightning"} <= found.keys()
    assert all(isinstance(value, str) for value in found.values())
