"""Container files and durable replacement: round trips, every kind of damage, a failure at every system call."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import random
import signal
import stat
import struct
from hashlib import sha256

import pytest
import safetensors.torch
import torch

from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError
from lightning_muter.storage import atomic as files
from lightning_muter.storage import container as storage
from lightning_muter.storage.fingerprint import DigestKey

from .faults import WatchedOs, listing, no_space, run_killed

META = {"a": 1, "b": [1.5, None, True, "ü"], "c": {"d": float("inf")}}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "M": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "digests": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def resign(content: bytes) -> bytes:
    payload = content[64:]
    return content[:16] + struct.pack("<Q", len(payload)) + sha256(payload).digest() + bytes(8) + payload


def with_table(table: object, data: bytes = b"") -> bytes:
    """A container around any tensor table, correctly hashed."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return resign(storage.MAGIC + struct.pack("<II", 1, 0) + bytes(48) + struct.pack("<Q", len(text)) + text + data)


def test_round_trip_and_determinism(tmp_path):
    path = tmp_path / "a.snapshot"
    digest = storage.write_container(path, "snapshot", META, tensors())
    meta, read = storage.read_container(path, "snapshot")
    assert meta == META
    assert same(read, tensors())
    read["M"] += 1  # memory of its own, writable
    assert digest == path.read_bytes()[24:56].hex() == sha256(path.read_bytes()[64:]).hexdigest()
    again = storage.write_container(path, "snapshot", dict(reversed(META.items())), dict(reversed(tensors().items())))
    assert again == digest
    # The documented layout: any safetensors reader gets at the tensors.
    assert same(safetensors.torch.load(path.read_bytes()[64:]), tensors())


def test_views_shared_and_transposed_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"t": base.T, "row": base[1], "same": base}
    storage.write_container(tmp_path / "a", "k", {}, given)
    assert same(storage.read_container(tmp_path / "a", "k")[1], given)


@pytest.mark.parametrize(
    ("meta", "given", "argument"),
    [
        ({"a": {1}}, {}, "meta"),
        ({1: "a"}, {}, "meta"),
        ({"a": {2: 3}}, {}, "meta"),
        ({}, {"x": [1]}, "tensors['x']"),
        ({}, {"x": torch.eye(2).to_sparse()}, "tensors['x']"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_the_file_is_touched(tmp_path, meta, given, argument):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ArgumentError) as caught:
        storage.write_container(tmp_path / "a", "k", meta, given)
    assert caught.value.argument == argument
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_every_single_bit_flip_and_every_truncation_is_found():
    content = storage.container_bytes("k", {"a": 1}, {"x": torch.arange(3.0)})
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptFileError, match="muter snapshot"):
                storage.parse_container(bytes(damaged), "k")
    for length in range(len(content)):
        with pytest.raises(CorruptFileError):
            storage.parse_container(content[:length], "k")
    with pytest.raises(CorruptFileError, match="appended"):
        storage.parse_container(content + b"\0", "k")


def test_resigned_mutations_never_end_in_another_exception():
    """Past the hash, the parser itself has to hold: anything but CorruptFileError or a well-formed result fails."""
    content, draw = storage.container_bytes("k", META, tensors()), random.Random(0)
    head = struct.unpack_from("<Q", content, 64)[0]
    refused = 0
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 8])):
            damaged[64 + draw.randrange(draw.choice([8, 8 + head, len(content) - 64]))] = draw.randrange(256)
        if draw.random() < 0.2:
            del damaged[64 + draw.randrange(len(content) - 64) :]
        try:
            storage.parse_container(resign(bytes(damaged)), "k")
        except CorruptFileError:
            refused += 1
    assert refused > 300  # the rest changed tensor bytes only, which a new hash makes valid


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EXTRA = {"lightning_muter": '{"kind": "k", "meta": {}}'}
HOSTILE = {
    "giant tensor": (
        {"__metadata__": EXTRA, "x": {**ENTRY, "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        bytes(8),
    ),
    "shape product overflows": ({"__metadata__": EXTRA, "x": {**ENTRY, "shape": [1 << 32, 1 << 32]}}, bytes(8)),
    "overlap": ({"__metadata__": EXTRA, "x": ENTRY, "y": ENTRY}, bytes(8)),
    "gap": ({"__metadata__": EXTRA, "x": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)),
    "negative": ({"__metadata__": EXTRA, "x": {**ENTRY, "shape": [-2], "data_offsets": [8, 0]}}, bytes(8)),
    "true is no size": ({"__metadata__": EXTRA, "x": {**ENTRY, "shape": [True, 2]}}, bytes(8)),
    "unknown dtype": ({"__metadata__": EXTRA, "x": {**ENTRY, "dtype": "O"}}, bytes(8)),
    "many dimensions": ({"__metadata__": EXTRA, "x": {**ENTRY, "shape": [2] + [1] * 99}}, bytes(8)),
    "unused bytes": ({"__metadata__": EXTRA, "x": ENTRY}, bytes(9)),
    "no metadata": ({"x": ENTRY}, bytes(8)),
    "metadata is a list": ({"__metadata__": ["lightning_muter"], "x": ENTRY}, bytes(8)),
    "metadata is an object": ({"__metadata__": {"lightning_muter": {}}, "x": ENTRY}, bytes(8)),
    "metadata is not JSON": ({"__metadata__": {"lightning_muter": "]"}}, b""),
    "meta is a list": ({"__metadata__": {"lightning_muter": '{"kind": "k", "meta": []}'}}, b""),
    "deep metadata": ({"__metadata__": {"lightning_muter": '{"a":' * 100_000}}, b""),
    "huge integer": ({"__metadata__": {"lightning_muter": '{"kind":' + "9" * 10_000 + "}"}}, b""),
    "deep table": (b"[" * 500_000, b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "key twice": (b'{"x": 1, "x": 2}', b""),
    "table is a pickle": (pickle.dumps(print), b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_containers_with_a_valid_hash(name, monkeypatch):
    table, data = HOSTILE[name]
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    with pytest.raises(CorruptFileError, match="muter snapshot"):
        storage.parse_container(with_table(table, data), "k")


def test_a_sealed_container_opens_for_its_key_alone(tmp_path):
    path, key = tmp_path / "a", DigestKey(bytes(32))
    content = storage.container_bytes("k", META, tensors(), key)
    path.write_bytes(content)
    assert same(storage.read_container(path, "k", key)[1], tensors())
    assert same(storage.read_container(path, "k")[1], tensors())  # whoever has no key checks the hash alone
    with pytest.raises(MismatchError, match="sealed with key"):
        storage.read_container(path, "k", DigestKey(bytes(range(32))))
    other = storage.container_bytes("k", META, {"a": torch.ones(2)})
    poisoned = bytearray(other + content[-24:])  # another content, its hash made to fit, the old seal
    poisoned[8] = 2
    path.write_bytes(bytes(poisoned))
    assert same(storage.read_container(path, "k")[1], {"a": torch.ones(2)})
    with pytest.raises(CorruptFileError, match="its seal is false"):
        storage.read_container(path, "k", key)
    for cut in (content[:-1], content[:80], content + b"x"):
        path.write_bytes(cut)
        with pytest.raises(CorruptFileError, match="cut short"):
            storage.read_container(path, "k", key)
    path.write_bytes(other)
    with pytest.raises(CorruptFileError, match="it has no seal"):
        storage.read_container(path, "k", key)
    assert same(storage.read_container(path, "k", key, unsealed=True)[1], {"a": torch.ones(2)})


def test_other_kinds_versions_and_files_are_named(tmp_path):
    path = tmp_path / "a"
    storage.write_container(path, "key", {}, {})
    with pytest.raises(CorruptFileError, match="'key', not a 'snapshot'"):
        storage.read_container(path, "snapshot")
    content = path.read_bytes()
    path.write_bytes(content[:8] + struct.pack("<I", 3) + content[12:])
    with pytest.raises(CorruptFileError, match="version 3, this release reads up to 2"):
        storage.read_container(path, "key")
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CorruptFileError, match="not a file of lightning_muter"):
        storage.read_container(path, "key")
    with pytest.raises(ArgumentError, match="existing file"):
        storage.read_container(tmp_path / "nothing", "key")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptFileError, match="plain file"):
        storage.read_container(tmp_path / "pipe", "key")


# --- durable replacement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["a", "abc"])
def test_a_failure_at_any_call_undoes_everything(tmp_path, monkeypatch, names):
    old = {"a": b"old a", "b": b"old b"}
    new = old | {name: b"new " + name.encode() for name in names}
    writers = {tmp_path / name: (lambda file, name=name: file.write(b"new " + name.encode())) for name in names}
    outcomes = []
    for n in range(1, 200):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in old.items():
            (tmp_path / name).write_bytes(content)
        with monkeypatch.context() as patch:
            fail = WatchedOs(n, no_space)
            patch.setattr(files, "os", fail)
            try:
                files.commit_files(writers)
                outcomes.append("done")
            except OSError:
                outcomes.append("refused")
        if fail.count < n:
            break
        files.recover_folder(tmp_path)  # tidying up after the commit may be what failed; it is finished here
        assert listing(tmp_path) == (new if outcomes[-1] == "done" else old), (n, outcomes[-1])
    assert outcomes[0] == "refused"
    assert outcomes[-1] == "done"
    assert outcomes.count("refused") >= 15
    assert listing(tmp_path) == new


def test_writers_that_fail_or_are_interrupted_leave_nothing(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(tmp_path / "a", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.commit_files({tmp_path / "a": lambda file: file.write(b"x"), tmp_path / "b": interrupted})
    assert listing(tmp_path) == {"a": b"old"}


def kill_at(n, work):
    """Run `work` in a forked process that SIGKILLs itself at the n-th file-system call; True when it got that far."""

    def killed():
        files.os = WatchedOs(n, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        work()

    return run_killed(killed)


def test_a_kill_at_any_call_is_recovered(tmp_path):
    old = {"a": b"old a", "b": b"old b"}
    new = {"a": b"new a", "b": b"new b", "c": b"new c"}
    writers = {tmp_path / name: (lambda file, name=name: file.write(b"new " + name.encode())) for name in "abc"}
    outcomes = []
    for n in range(1, 200):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in old.items():
            (tmp_path / name).write_bytes(content)
        if not kill_at(n, lambda: files.commit_files(writers)):
            break
        files.recover_folder(tmp_path)
        outcomes.append(listing(tmp_path))
        assert outcomes[-1] in (old, new), n
        assert files.recover_folder(tmp_path) == []
    assert outcomes.count(old) >= 15
    assert outcomes.count(new) >= 1
    assert outcomes == sorted(outcomes, key=lambda found: found == new)  # old up to one instant, new from there on


def test_recovery_does_not_disturb_a_live_writer(tmp_path):
    seen = []

    def slow(file):
        file.write(b"new")
        seen.append(files.recover_folder(tmp_path))

    (tmp_path / "a").write_bytes(b"old")
    files.atomic_write(tmp_path / "a", slow)
    files.commit_files({tmp_path / "a": slow, tmp_path / "b": slow})
    assert seen == [[], [], []]
    assert listing(tmp_path) == {"a": b"new", "b": b"new"}


def test_a_planted_journal_reaches_nothing_outside(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "victim").write_bytes(b"precious")
    name = "." + "x" + "." + "0" * 16
    entries = [{"target": "../victim", "new": f"{name}.muter-new", "old": None}]
    (tmp_path / "inside" / ".x.muter-journal").write_bytes(b"S" + json.dumps(entries).encode())
    entries = [{"target": "a", "new": "../victim", "old": None}]
    (tmp_path / "inside" / ".y.muter-journal").write_bytes(b"W" + json.dumps(entries).encode())
    (tmp_path / "inside" / ".z.muter-journal").write_bytes(b"S" + b"[" * 100_000)
    files.recover_folder(tmp_path / "inside")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_modes_and_links_are_kept(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    os.chmod(tmp_path / "real", 0o640)
    (tmp_path / "link").symlink_to("real")
    files.atomic_write(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    with pytest.raises(ArgumentError, match="different files in one folder"):
        files.commit_files({tmp_path / "link": print, tmp_path / "real": print})
    with pytest.raises(ArgumentError, match="existing folder"):
        files.atomic_write(tmp_path / "no" / "a", print)


def test_without_hard_links_old_bytes_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"old")

    def broken(file):
        raise builtins.ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        files.commit_files({tmp_path / "a": lambda file: file.write(b"new"), tmp_path / "b": broken})
    assert listing(tmp_path) == {"a": b"old"}
    files.commit_files({tmp_path / "a": lambda file: file.write(b"new"), tmp_path / "b": lambda file: file.write(b"n")})
    assert listing(tmp_path) == {"a": b"new", "b": b"n"}
