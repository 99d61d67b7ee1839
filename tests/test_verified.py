"""Before every request the ledger and the snapshot must be what the key's owner wrote, and a long ledger costs no more."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from contextlib import closing

import pytest
import torch

from lightning_muter.deletion import receipts
from lightning_muter.deletion.audit import audit
from lightning_muter.deletion.chain import columns
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.errors import CorruptFileError, MismatchError
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.stored import KIND
from lightning_muter.storage.atomic import file_sha256
from lightning_muter.storage.container import container_bytes, read_container
from lightning_muter.storage.fingerprint import DigestKey

from .world import command, plain_checkpoint, unlearned


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    unlearned(folder, [3])
    return folder


@pytest.fixture
def places(made, tmp_path):
    shutil.copytree(made, tmp_path / "work")
    return Places.of(tmp_path / "work" / "last.ckpt")


def forget(places, row):
    command("unlearn", places.checkpoint, forget=[row])


def refused(places, message, error=CorruptFileError):
    """The next request is refused and changes nothing."""
    before = {p.name: p.read_bytes() for p in places.folder.iterdir() if p.is_file() and p != places.lock}
    with pytest.raises(error, match=message):
        forget(places, 7)
    assert before == {p.name: p.read_bytes() for p in places.folder.iterdir() if p.is_file() and p != places.lock}


def sql(places, statement, values=()):
    with closing(sqlite3.connect(places.ledger, isolation_level=None)) as connection:
        connection.execute(statement, values)


def poison(places, *, sealed=None):
    """Another gradient in the snapshot, its hash made to fit."""
    meta, tensors = read_container(places.snapshot, KIND)
    name = next(name for name in tensors if name.endswith("gradient"))
    tensors[name] = tensors[name] + 1
    places.snapshot.write_bytes(container_bytes(KIND, meta, tensors, sealed))


def forge_tail(places, resealed):
    """The last receipt rewritten to fit the files at hand."""
    with Ledger.open(places.ledger) as ledger:
        last = ledger.last()
    for name, path in (("checkpoint", places.checkpoint), ("snapshot", places.snapshot)):
        last[name] = {**last[name], "sha256": file_sha256(path)}
    last["sha256"] = receipts.content_sha256(last)
    if resealed:
        other = DigestKey(bytes(32))
        last["signature"] = other.sign(receipts.SIGNED_PREFIX + last["sha256"].encode())
    values = (receipts.canonical(last), last["sha256"], last["number"])
    sql(places, "UPDATE requests SET receipt = ?, sha256 = ? WHERE number = ?", values)


@pytest.mark.parametrize("resealed", [False, True])
def test_a_poisoned_snapshot_with_a_forged_tail_is_refused(places, resealed):
    poison(places)
    refused(places, "left", MismatchError)  # receipt 2 left another file
    forge_tail(places, resealed)
    refused(places, "signature is false")
    shutil.copy(places.ledger, places.folder / "kept")
    places.ledger.unlink()  # and with no ledger at all
    refused(places, "it has no seal")
    poison(places, sealed=DigestKey(bytes(32)))
    refused(places, "sealed with key", MismatchError)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE requests SET kind = 'refresh' WHERE number = 1", "receipt 1: the ledger's columns"),
        ("DELETE FROM forgotten", "forgotten rows"),
        ("UPDATE requests SET sha256 = 'x' WHERE number = 2", "receipt 2"),
    ],
)
def test_a_ledger_that_somebody_wrote_to_is_verified_anew(places, statement, message):
    forget(places, 5)  # remembered now
    sql(places, statement)
    refused(places, message)
    assert any(message in problem for problem in audit(places, verify=True).problems)


def test_what_was_verified_is_remembered_until_somebody_touches_the_ledger(places, monkeypatch):
    calls = []
    real = Ledger.verify
    monkeypatch.setattr(Ledger, "verify", lambda self, *args: calls.append(1) or real(self, *args))
    forget(places, 5)
    assert len(calls) == 1  # a copy: other inode, other times
    forget(places, 6)
    assert len(calls) == 1
    note = places.verified.read_bytes()
    os.utime(places.ledger)
    forget(places, 7)
    assert len(calls) == 2
    places.verified.write_bytes(note.replace(b'"head": "', b'"head": "0'))
    forget(places, 8)
    assert len(calls) == 3


def test_the_callbacks_files_need_a_seal_too_and_old_ones_a_ledger_or_trust(tmp_path):
    plain_checkpoint(tmp_path / "a.ckpt")
    places = Places.of(tmp_path / "a.ckpt")
    command("snapshot", places.checkpoint.with_name("a.ckpt"))
    key, kept = DigestKey.load(places.key), places.snapshot.read_bytes()
    places.ledger.unlink()  # as after a fit with the callback
    poison(places)
    refused(places, "no seal")
    with pytest.raises(CorruptFileError, match="unsealed=True"):
        Snapshot.load(places.snapshot)
    places.snapshot.write_bytes(kept)
    forget(places, 3)
    # A file from before seals that the ledger names is good enough; it is sealed from then on.
    meta, tensors = read_container(places.snapshot, KIND)
    places.snapshot.write_bytes(container_bytes(KIND, meta, tensors))
    assert Snapshot.load(places.snapshot, unsealed=True).forgotten == [3]
    with Ledger.open(places.ledger) as ledger:
        last = ledger.last()
    last["snapshot"]["sha256"] = file_sha256(places.snapshot)
    last["sha256"] = receipts.content_sha256(last)
    last["signature"] = key.sign(receipts.SIGNED_PREFIX + last["sha256"].encode())
    sql(places, "UPDATE requests SET receipt = ?, sha256 = ?", (receipts.canonical(last), last["sha256"]))
    forget(places, 5)
    assert Snapshot.load(places.snapshot, key).forgotten == [3, 5]


def grown(places, count):
    """The ledger and the receipt files of `count` requests, as quickly as they can be made."""
    key = DigestKey.load(places.key)
    with Ledger.open(places.ledger) as ledger:
        connection = ledger._connection
        connection.execute("PRAGMA synchronous = OFF")
        last = ledger.last()
        connection.execute("BEGIN")
        for number in range(len(ledger) + 1, count + 1):
            content = {**last, "id": f"grown-{number}", "forgotten": [], "kind": "purge"}
            receipt = receipts.make_receipt(
                {k: v for k, v in content.items() if k not in ("sha256", "signature")}, number, last["sha256"], key
            )
            row = columns(receipt)
            connection.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, 'done', 'x', ?, ?, ?, ?, ?, ?)", (*row[:6], *row[6:])
            )
            name = receipts.receipt_name(receipt)
            (places.receipts / f"{name}.json").write_bytes(receipts.readable(receipt))
            (places.receipts / f"{name}.md").write_text("")
            last = receipt
        connection.execute("COMMIT")


def cpu_of_requests(places, rows):
    """The least CPU seconds of these requests, without start-up (the command as a call)."""
    times = []
    for row in rows:
        start = time.process_time()
        forget(places, row)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_last_request_of_a_long_ledger_costs_what_the_first_did(places, count):
    torch.set_num_threads(1)
    forget(places, 4)
    first = cpu_of_requests(places, [5, 6, 7, 8])
    grown(places, count)
    forget(places, 9)  # verifies all, and remembers it
    late = cpu_of_requests(places, [10, 11, 12, 13])
    start = time.process_time()
    found = audit(places, verify=True)
    seconds = time.process_time() - start
    print(f"{count} entries: a request {first:.4f} s -> {late:.4f} s of CPU; audit --verify {seconds:.2f} s")
    assert found.problems == []
    assert late <= 1.5 * first
    assert seconds <= 5 * count / 10_000 + 1
