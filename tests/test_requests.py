"""Requests: ids and indices become rows, and whatever is ambiguous or wrong is refused by name."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_muter.deletion.requests import (
    ForgetConfig,
    Rows,
    User,
    checked_request_id,
    read_positions,
    refuse_forgotten,
    resolve,
)
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
    expected = Rows([0, 1, 2], [User("bob", 1, [1]), User("ann", 3, [0, 2])])
    assert resolve(ForgetConfig(ids=ids, table=str(folder / "plain.csv")), 4) == expected
    assert resolve(ForgetConfig(ids=ids, table=str(folder / "headed.csv"), column="user"), 4) == expected

    class Data:
        def sample_ids(self):
            return ["ann", "bob", "ann", "cid"]

    assert resolve(ForgetConfig(ids=ids), 4, Data()) == expected
    (folder / "windows.csv").write_bytes(b"user\r\nann\r\nbob\r\nann\r\ncid\r\n")
    assert resolve(ForgetConfig(ids=ids, table=str(folder / "windows.csv"), column="user"), 4) == expected
    assert expected.per_user() == ["user in line 1: 1 rows: 1", "user in line 3: 2 rows: 0, 2"]
    assert expected.per_user(show_ids=True)[0] == "user in line 1 ('bob'): 1 rows: 1"
    assert "bob" not in repr(expected)
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
        ({"ids": "strangers.txt", "table": "plain.csv"}, "forget.ids", r"1 unknown ids \(lines 1 of the file\)"),
        ({"ids": "users.txt", "table": "headed.csv", "column": "name"}, "forget.column", "of 2 columns"),
        ({"ids": "users.txt", "table": "short.csv"}, "forget.table", "2 rows"),
        (
            {"ids": "users.txt", "table": "one.csv"},
            "forget.table",
            "5 rows.*one row for each of the 4.*--forget.column",
        ),
        ({"ids": "users.txt", "table": "surplus.csv"}, "forget.table", "5 rows"),
        ({"ids": "users.txt", "table": "surplus.csv", "column": "x"}, "forget.column", "of 1 columns"),
        ({"ids": "users.txt", "table": "plain.csv", "column": "ann"}, "forget.table", "3 rows"),
        ({"ids": "users.txt", "table": "return.csv"}, "forget.table", "CSV"),
        ({"ids": "users.txt", "table": "holes.csv"}, "forget.table", "row 1"),
        ({"ids": "users.txt", "table": "binary"}, "forget.table", "UTF-8"),
        ({"ids": "users.txt", "table": "quote.csv"}, "forget.table", "CSV"),
    ],
)
def test_what_is_ambiguous_or_wrong_is_refused(folder, config, argument, message):
    (folder / "empty.txt").write_text("\n \n")
    (folder / "strangers.txt").write_text("eve\nann\n")
    (folder / "one.csv").write_text("user\nann\nbob\nann\ncid\n")
    (folder / "surplus.csv").write_text("eve\nann\nbob\nann\ncid\n")
    (folder / "return.csv").write_bytes(b"ann\rbob\nann\ncid\ndan\n")
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
    asked = config.get("column")
    assert not any(re.search(rf"\b{name}\b", str(caught.value)) for name in ("eve", "ann", "bob") if name != asked)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\u00a0"])
def test_nothing_but_a_newline_separates_ids(tmp_path, separator):
    odd = f"ann{separator}bob"
    (tmp_path / "users.txt").write_text(f"{odd}\n", encoding="utf-8")
    (tmp_path / "table.csv").write_text(f"{odd}\nann\nbob\n{separator}ann\n", encoding="utf-8")
    found = resolve(ForgetConfig(ids=str(tmp_path / "users.txt"), table=str(tmp_path / "table.csv")), 4)
    assert found == Rows([0], [User(odd, 1, [0])])
    (tmp_path / "users.txt").write_text("ann\n", encoding="utf-8")
    found = resolve(ForgetConfig(ids=str(tmp_path / "users.txt"), table=str(tmp_path / "table.csv")), 4)
    assert found.indices == [1]


def test_sample_ids_of_another_length_are_refused(folder):
    class Data:
        def sample_ids(self):
            return ["ann"]

    with pytest.raises(ArgumentError, match="each of the 4 samples"):
        resolve(ForgetConfig(ids=str(folder / "users.txt")), 4, Data())


def test_request_ids_and_repeated_rows(capsys):
    assert checked_request_id("ticket-17", "unlearn") == "ticket-17"
    assert checked_request_id(None, "unlearn") != checked_request_id(None, "unlearn")
    for bad in ("", "../x", "a b", "x" * 101, "a\n"):
        with pytest.raises(ArgumentError, match="request_id") as caught:
            checked_request_id(bad, "unlearn")
        assert len(bad) < 2 or bad not in str(caught.value)
    assert capsys.readouterr().err == ""
    assert checked_request_id("ann@example.org", "unlearn") == "ann@example.org"
    assert "looks like an e-mail" in (said := capsys.readouterr().err)
    assert "ann" not in said
    refuse_forgotten([1, 2], {3: "a"})
    with pytest.raises(RequestError, match=r"1 of the 2 rows .* 'a'.*: \[3\]\. Ask for the others"):
        refuse_forgotten([1, 3], {3: "a"})
    with pytest.raises(RequestError, match="nothing left to do"):
        refuse_forgotten([3, 4], {3: "a", 4: "b"})


def test_ten_thousand_positions_are_read_in_about_ten_times_the_calls_of_a_thousand() -> None:
    """Element by element the parser copied the whole list for each of them: a hundred times as long for ten times as many."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--forget", type=ForgetConfig)

    def calls(count: int) -> int:
        text, made = str(list(range(count))), [0]

        def tell(*_: Any) -> None:
            made[0] += 1

        sys.setprofile(tell)
        try:
            found = parser.parse_args(["--forget.indices", text]).forget.indices
        finally:
            sys.setprofile(None)
        assert found == list(range(count))
        return made[0]

    assert calls(10_000) < 15 * calls(1_000)


@pytest.mark.parametrize("given", ["[1, 2.5]", "[true]", "3", "[1, x]"])
def test_positions_that_are_no_whole_numbers_are_refused_where_they_are_read(given: str) -> None:
    with pytest.raises(ValueError, match=r"whole numbers|Expecting value"):
        read_positions(given)
