"""Requests: ids and indices become rows, and whatever is ambiguous or wrong is refused by name."""

from __future__ import annotations

import pytest

from lightning_muter.deletion.requests import ForgetConfig, Rows, checked_request_id, refuse_forgotten, resolve
from lightning_muter.errors import ArgumentError, RequestError
from lightning_muter.storage.fingerprint import DigestKey


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "users.txt").write_text("bob\n\nann\nbob\n")
    (tmp_path / "plain.csv").write_text("ann\nbob\nann\ncid\n")
    (tmp_path / "headed.csv").write_text("\ufeffrow,user\n0,ann\n1,bob\n2, ann\n3,cid\n\n", encoding="utf-8")
    return tmp_path


def test_rows_of_users(folder):
    ids = str(folder / "users.txt")
    expected = Rows([0, 1, 2], ["bob", "ann"])
    assert resolve(ForgetConfig(ids=ids, table=str(folder / "plain.csv")), 4) == expected
    assert resolve(ForgetConfig(ids=ids, table=str(folder / "headed.csv"), column="user"), 4) == expected

    class Data:
        def sample_ids(self):
            return ["ann", "bob", "ann", "cid"]

    assert resolve(ForgetConfig(ids=ids), 4, Data()) == expected
    (folder / "one.csv").write_text("user\nann\nbob\nann\ncid\n")  # one line more than samples: the first is a heading
    assert resolve(ForgetConfig(ids=ids, table=str(folder / "one.csv")), 4) == expected
    assert resolve(ForgetConfig(indices=[3, 0]), 4) == Rows([0, 3], [])
    digests = expected.digests(DigestKey(bytes(32)))
    assert len(digests) == 2
    assert "bob" not in str(digests)


@pytest.mark.parametrize(
    ("config", "argument", "message"),
    [
        ({}, "forget", "either"),
        ({"indices": [1], "ids": "users.txt"}, "forget", "either"),
        ({"indices": []}, "forget.indices", "at least one"),
        ({"indices": [0, 4]}, "forget.indices", "0 to 3"),
        ({"indices": [-1]}, "forget.indices", "0 to 3"),
        ({"indices": [1, 2, 1]}, "forget.indices", "once"),
        ({"indices": [1], "table": "plain.csv"}, "forget.table", "together"),
        ({"ids": "none.txt", "table": "plain.csv"}, "forget.ids", "No such file"),
        ({"ids": "empty.txt", "table": "plain.csv"}, "forget.ids", "nobody"),
        ({"ids": "users.txt"}, "forget.table", "sample_ids"),
        ({"ids": "strangers.txt", "table": "plain.csv"}, "forget.ids", "'eve'"),
        ({"ids": "users.txt", "table": "headed.csv", "column": "name"}, "forget.column", "'row', 'user'"),
        ({"ids": "users.txt", "table": "short.csv"}, "forget.table", "2 rows"),
        ({"ids": "users.txt", "table": "holes.csv"}, "forget.table", "row 1"),
        ({"ids": "users.txt", "table": "binary"}, "forget.table", "UTF-8"),
        ({"ids": "users.txt", "table": "quote.csv"}, "forget.table", "CSV"),
    ],
)
def test_what_is_ambiguous_or_wrong_is_refused(folder, config, argument, message):
    (folder / "empty.txt").write_text("\n \n")
    (folder / "strangers.txt").write_text("eve\nann\n")
    (folder / "short.csv").write_text("ann\nbob\n")
    (folder / "holes.csv").write_text("ann\n \nann\ncid\n")
    (folder / "binary").write_bytes(b"\xff\xfe")
    (folder / "quote.csv").write_text('ann\n"bob\nann\ncid')
    for name in ("ids", "table"):
        if name in config:
            config = {**config, name: str(folder / config[name])}
    with pytest.raises(ArgumentError, match=message) as caught:
        resolve(ForgetConfig(**config), 4)
    assert caught.value.argument == argument


def test_sample_ids_of_another_length_are_refused(folder):
    class Data:
        def sample_ids(self):
            return ["ann"]

    with pytest.raises(ArgumentError, match="each of the 4 samples"):
        resolve(ForgetConfig(ids=str(folder / "users.txt")), 4, Data())


def test_request_ids_and_repeated_rows():
    assert checked_request_id("ticket-17", "unlearn") == "ticket-17"
    assert checked_request_id(None, "unlearn") != checked_request_id(None, "unlearn")
    for bad in ("", "../x", "a b", "x" * 101, "a\n"):
        with pytest.raises(ArgumentError, match="request_id"):
            checked_request_id(bad, "unlearn")
    refuse_forgotten([1, 2], {3: "a"})
    with pytest.raises(RequestError, match=r"1 of the 2 rows .* 'a'.*: \[3\]\. Ask for the others"):
        refuse_forgotten([1, 3], {3: "a"})
    with pytest.raises(RequestError, match="nothing left to do"):
        refuse_forgotten([3, 4], {3: "a", 4: "b"})
