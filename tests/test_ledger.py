"""Ledger and receipts: what is entered comes back, and every edit, gap or false seal is found."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from contextlib import closing

import pytest

from lightning_muter.deletion import ledger as ledger_module
from lightning_muter.deletion import ledger_file, receipts
from lightning_muter.deletion.ledger import Ledger, Switch
from lightning_muter.errors import CorruptFileError, RequestError
from lightning_muter.storage.fingerprint import DigestKey

KEY = DigestKey(bytes(range(32)))


def content(n: int, forgotten=()):
    return {
        "id": f"request {n}",
        "kind": "unlearn",
        "time": f"2030-01-0{n}T00:00:00Z",
        "method": "MUter",
        "scope": "head",
        "forgotten": list(forgotten),
        "users": [KEY.digest_id(f"user {i}") for i in forgotten],
        "n_retained": 100 - n,
        "checkpoint": {"name": "a", "sha256": "c" * 64, "fingerprint_before": str(n - 1), "fingerprint_after": str(n)},
        "snapshot": {"name": "a.snapshot", "sha256": "d" * 64},
        "metrics": {"step_norm": 0.1 * n, "bound": float("inf"), "status": "converged"},
        "warnings": ["a | b"],
        "versions": {"torch": "2"},
    }  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.ledger"
    with Ledger.open(path, create=True) as ledger:
        for n, forgotten in ((1, ()), (2, (3, 17)), (3, (5,))):
            ledger.commit(content(n, forgotten), f"asked {n}", [Switch("a.ckpt", f".stage{n}", "e" * 64)], KEY)
            if n < 3:
                ledger.finish(n)
    return path


def sql(path, *statements):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(*statement) if isinstance(statement, tuple) else connection.execute(statement)


def problems(path, key=KEY):
    with Ledger.open(path) as ledger:
        return ledger.verify(key)


def test_what_was_entered_comes_back(path):
    with Ledger.open(path) as ledger:
        first, second, third = ledger.receipts()
        assert [r["number"] for r in (first, second, third)] == [1, 2, 3] == list(range(1, len(ledger) + 1))
        assert (first["previous"], second["previous"]) == ("0" * 64, first["sha256"])
        assert second["metrics"] == {"step_norm": 0.2, "bound": "inf", "status": "converged"}
        assert ledger.last() == third == ledger.find("request 3")
        assert ledger.find("request 4") is None
        assert ledger.asked("request 2") == "asked 2"
        assert ledger.forgotten() == {3: "request 2", 5: "request 3", 17: "request 2"}
        assert ledger.unfinished() == [(third, [Switch("a.ckpt", ".stage3", "e" * 64)])]
        ledger.finish(3)
        assert ledger.unfinished() == []
        assert ledger.verify(KEY) == []


def test_nothing_is_entered_twice_and_a_refusal_enters_nothing(path):
    with Ledger.open(path) as ledger:
        before = ledger.receipts()
        with pytest.raises(RequestError, match="entered already"):
            ledger.commit(content(3, ()), "x", [], KEY)
        with pytest.raises(RequestError, match="entered already"):
            ledger.commit(content(4, (9, 17)), "x", [], KEY)
        assert ledger.receipts() == before
        assert 9 not in ledger.forgotten()
        assert ledger.commit(content(4, (9,)), "x", [], KEY)["previous"] == before[-1]["sha256"]


def edited(receipt, **changes):
    """A receipt with changes and a fitting hash, but with the old seal."""
    receipt = {**receipt, **changes}
    return {**receipt, "sha256": receipts.content_sha256(receipt)}


def test_an_edited_receipt_is_found_wherever_it_is_edited(path, tmp_path):
    assert problems(path) == []
    with Ledger.open(path) as ledger:
        _, second, third = ledger.receipts()

    def attempt(*statements):
        copy = tmp_path / "copy"
        shutil.copy(path, copy)
        sql(copy, *statements)
        return problems(copy)

    text = receipts.canonical(second).replace(b"0.2", b"0.3")
    assert any(
        "does not match its hash" in p for p in attempt(("UPDATE requests SET receipt = ? WHERE number = 2", (text,)))
    )
    # Rehashed: the next one's link breaks. The whole chain rewritten: the signatures do not fit.
    new = edited(second, method="nothing")
    store = "UPDATE requests SET receipt = ?, sha256 = ?, method = 'nothing' WHERE number = ?"
    found = attempt((store, (receipts.canonical(new), new["sha256"], 2)))
    assert any("receipt 3: the chain is broken" in p for p in found)
    last = edited(third, previous=new["sha256"], method="nothing")
    found = attempt(
        (store, (receipts.canonical(new), new["sha256"], 2)), (store, (receipts.canonical(last), last["sha256"], 3))
    )
    assert [p.split(":")[1] for p in found] == [" its signature is false"] * 2
    assert any("columns" in p for p in attempt("UPDATE requests SET method = 'x' WHERE number = 1"))
    assert any("forgotten rows" in p for p in attempt("DELETE FROM forgotten WHERE position = 3"))
    assert any("users" in p for p in attempt("DELETE FROM users WHERE request = 2"))
    gone = [f"DELETE FROM {table} WHERE request = 2" for table in ("forgotten", "users", "switches")]
    assert any("chain is broken" in p for p in attempt(*gone, "DELETE FROM requests WHERE number = 2"))
    assert any("key" in p for p in problems(path, DigestKey(bytes(32))))
    assert problems(path, None) == []


def test_files_that_are_no_ledger(path, tmp_path):
    with pytest.raises(RequestError, match="muter snapshot"), Ledger.open(tmp_path / "none"):
        pass
    (tmp_path / "text").write_text("not a database" * 100)
    with pytest.raises(CorruptFileError, match="not a readable ledger"), Ledger.open(tmp_path / "text"):
        pass
    (tmp_path / "half").write_bytes(b"")
    assert Ledger.discard_unborn(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    assert not Ledger.discard_unborn(tmp_path / "text")
    sql(tmp_path / "other", "CREATE TABLE t (a)")
    with pytest.raises(CorruptFileError, match="not a ledger"), Ledger.open(tmp_path / "other", create=True):
        pass
    for statement, message in (
        ("PRAGMA user_version = 2", "schema version 2"),
        ("CREATE TRIGGER t AFTER UPDATE ON requests BEGIN DELETE FROM forgotten; END", "altered"),
        ("ALTER TABLE users ADD COLUMN name TEXT", "altered"),
    ):
        shutil.copy(path, tmp_path / "changed")
        sql(tmp_path / "changed", statement)
        with pytest.raises(CorruptFileError, match=message), Ledger.open(tmp_path / "changed"):
            pass


def test_damaged_ledgers_are_errors_or_problems_but_never_tracebacks(path, tmp_path):
    original, draw, found = path.read_bytes(), random.Random(0), 0
    before = path.read_bytes()
    for n in range(200):
        damaged = bytearray(original)
        for _ in range(draw.choice([1, 4, 64])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        if draw.random() < 0.2:
            del damaged[draw.randrange(len(damaged)) :]
        copy = tmp_path / f"copy{n}"
        copy.write_bytes(bytes(damaged))
        try:
            found += bool(problems(copy))
        except (CorruptFileError, RequestError):
            found += 1
        copy.unlink()
    assert found >= 60  # the others hit unused space of the pages
    assert path.read_bytes() == before


def test_a_column_of_another_type_is_an_error(path):
    """A damaged page can hold text where the schema says bytes."""
    with pytest.raises(CorruptFileError, match="not bytes"):
        receipts.parse_receipt("{}", "receipt 1")


def test_receipt_files(path, tmp_path):
    with Ledger.open(path) as ledger:
        receipt = ledger.receipts()[1]
    name = receipts.receipt_name({**receipt, "id": "../ü/" + "x" * 100})
    assert "/" not in name
    assert len(name) < 80
    text = receipts.readable(receipt)
    assert receipts.parse_receipt(text) == receipts.parse_receipt(receipts.canonical(receipt)) == receipt
    shown = receipts.markdown(receipt)
    assert "3, 17" in shown
    assert receipt["sha256"] in shown
    assert r"a \| b" in shown
    for position in range(0, len(text), 7):
        damaged = bytearray(text)
        damaged[position] ^= 1
        try:
            found = receipts.parse_receipt(bytes(damaged))
        except CorruptFileError as error:
            assert "ledger keeps the original" in str(error)  # noqa: PT017
        else:  # white space, or the signature, which is outside of the hash
            false = receipts.seal_problem(found, None, []) or ""
            assert found == receipt or "its signature is false" in false
    with pytest.raises(CorruptFileError, match="not a receipt"):
        receipts.parse_receipt(json.dumps({"id": "x"}).encode())


def sealed_receipt(content, number, previous, key):
    """A receipt as releases before signatures wrote it."""
    receipt = {**content, "metrics": {"bound": "inf"}, "format": receipts.SEALED_FORMAT, "number": number}
    receipt |= {"previous": previous, "key_id": key.key_id}
    digest = receipts.content_sha256(receipt)
    return {**receipt, "sha256": digest, "seal": key.seal(digest.encode())}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A ledger of an earlier release: two sealed receipts, WAL."""
    path = tmp_path / "old.ledger"
    with monkeypatch.context() as patch, Ledger.open(path, create=True) as ledger:
        patch.setattr(ledger_module, "make_receipt", sealed_receipt)
        for n in (1, 2):
            ledger.commit(content(n, (n,)), f"asked {n}", [], KEY)
            ledger.finish(n)
    sql(path, "PRAGMA journal_mode = WAL")
    return path


def test_ledgers_from_before_signatures_are_read_and_go_on_signed(old):
    with Ledger.open(old, readonly=True) as ledger:
        assert ledger.last()["seal"]
        assert ledger.verify(KEY) == ledger.verify(None) == []
    assert [p.name for p in old.parent.iterdir() if p.name.startswith("old")] == ["old.ledger"]
    with Ledger.open(old) as ledger:
        ledger.commit(content(3, (3,)), "asked", [], KEY)
        assert ledger.verify(KEY) == ledger.verify(None, [KEY.public_key]) == []
        assert ledger.public_keys() == [KEY.public_key]
        second = ledger.receipts()[1]
    forged = {**second, "seal": "0" * 32}
    sql(old, ("UPDATE requests SET receipt = ? WHERE number = 2", (receipts.canonical(forged),)))
    assert problems(old) == ["receipt 2: its seal is false"]


def test_unsigned_receipts_after_signed_ones_and_other_peoples_signatures_are_found(path, monkeypatch):
    other = DigestKey(bytes(32))
    with Ledger.open(path) as ledger:
        ledger.commit(content(4), "asked", [], other)
        assert ledger.verify(None) == ledger.verify(None, [KEY.public_key, other.public_key]) == []
        assert "not one of the public keys" in ledger.verify(KEY)[0]
        assert "not one of the public keys" in ledger.verify(None, [KEY.public_key])[0]
        assert ledger.verify(other) == []  # vouched for by the newer key: the old one was lost
        monkeypatch.setattr(ledger_module, "make_receipt", sealed_receipt)
        ledger.commit(content(5), "asked", [], KEY)
        assert any("it is not signed" in p for p in ledger.verify(None))


def test_heads(path):
    with Ledger.open(path) as ledger:
        hashes = [r["sha256"] for r in ledger.receipts()]
        assert ledger.head() == hashes[-1]
        assert all(map(ledger.contains, hashes))
        assert not ledger.contains("0" * 64)


def test_a_ledger_on_a_read_only_disk_can_be_read(path, monkeypatch):
    monkeypatch.setattr(ledger_file.os, "access", lambda *_: False)
    names = sorted(file.name for file in path.parent.iterdir())
    with Ledger.open(path) as ledger:
        assert len(ledger) == 3
        assert ledger.verify(KEY) == []
        assert sorted(file.name for file in path.parent.iterdir()) == names
        with pytest.raises(RequestError, match="readonly"):
            ledger.finish(3)


def test_changes_that_wait_in_the_wal_of_an_earlier_release_are_not_overlooked(old):
    wal = old.with_name(f"{old.name}-wal")
    wal.write_bytes(b"x")
    with pytest.raises(RequestError, match="changes wait"), Ledger.open(old, readonly=True):
        pass


def test_a_copy_is_complete_and_writers_do_not_wait_forever(path, tmp_path, monkeypatch):
    with Ledger.open(path) as ledger:
        ledger.copy_to(tmp_path / "copy")
        expected = ledger.receipts()
    with Ledger.open(tmp_path / "copy") as copy:
        assert copy.receipts() == expected
        assert copy.verify(KEY) == []
    monkeypatch.setattr(ledger_file, "_BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other, Ledger.open(path) as ledger:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RequestError, match="cannot be used"):
            ledger.commit(content(4), "x", [], KEY)
