"""What a deletion request names, and the rows of the training set that this means."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import register_type

from lightning_muter.errors import ArgumentError, RequestError
from lightning_muter.storage.fingerprint import DigestKey

_MAX_TEXT = 1 << 30
_BLANK = " \t\r"  # around an id; anything else belongs to it, other separators of Unicode included


class Positions(list[int]):
    """Positions on a command line or in a configuration, read as one value: of a ``list[int]`` jsonargparse copies the whole list
    for each of its entries, minutes for ten thousand.
    """


def read_positions(value: Any) -> Positions:
    """Positions from a list, or from its text in JSON.

    Raises:
        ValueError: they are no whole numbers.

    >>> read_positions("[3, 17]"), read_positions([])
    ([3, 17], [])
    """
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(type(position) is int for position in found):
        raise ValueError("expected a list of whole numbers, e.g. [3,17]")
    return Positions(found)


register_type(Positions, list, read_positions)


@dataclass
class ForgetConfig:
    """Whom or what to forget: either `indices`, or `ids` with a table that says which rows belong to whom.

    Args:
        indices: positions in the training dataset, e.g. [3,17].
        ids: a text file with one user id per line. Nothing but a newline ends a line.
        table: a CSV file whose row i holds the id of the user to whom row i of the training dataset belongs, as many rows
            as the dataset has. Without it the datamodule's `sample_ids()` is asked.
        column: the table's column of ids, by its name in the first line. Not given: the first column of a table without
            a heading.
        show_ids: say ids in the dry run's list too, which otherwise names users by their line in `ids`.
    """

    indices: Positions | None = None
    ids: str | None = None
    table: str | None = None
    column: str | None = None
    show_ids: bool = False


@dataclass(frozen=True)
class User:
    """Somebody whose rows are to be forgotten: the id, its line in the file of ids, and the rows. The id is never shown."""

    id: str = field(repr=False)
    line: int
    rows: list[int]


@dataclass(frozen=True)
class Rows:
    """The rows to forget (sorted, each once) and the users that were named (stored only as keyed hashes of their ids)."""

    indices: list[int]
    users: list[User]

    def digests(self, key: DigestKey) -> list[str]:
        """The keyed hashes of the user ids, sorted."""
        return sorted(key.digest_id(user.id) for user in self.users)

    def per_user(self, show_ids: bool = False) -> list[str]:
        """One line per user: how many rows, and which; ids only where they were asked for."""
        lines = []
        for user in self.users:
            shown = ", ".join(map(str, user.rows[:20])) + (", …" if len(user.rows) > 20 else "")
            name = f" ({user.id!r})" if show_ids else ""
            lines.append(f"user in line {user.line}{name}: {len(user.rows)} rows: {shown}")
        return lines


def resolve(forget: ForgetConfig, n_total: int, datamodule: object = None) -> Rows:
    """The rows that a request names.

    Raises:
        ArgumentError: nothing or too much is named, an index is out of range or named twice, an id is unknown, or the
            table does not have one row per sample.
    """
    if (forget.indices is None) == (forget.ids is None):
        raise ArgumentError(
            "forget", "both" if forget.indices else "nothing", "either forget.indices or forget.ids",
            "Pass --forget.indices [3,17], or --forget.ids users.txt with --forget.table ids.csv.",
        )  # fmt: skip
    if forget.indices is not None:
        if forget.table is not None or forget.column is not None:
            raise ArgumentError("forget.table", forget.table or forget.column, "only together with forget.ids")
        return Rows(_checked(forget.indices, n_total), [])
    lines: dict[str, int] = {}
    for number, line in enumerate(_text("forget.ids", forget.ids).split("\n"), start=1):
        if user := line.strip(_BLANK):
            lines.setdefault(user, number)
    if not lines:
        raise ArgumentError("forget.ids", forget.ids, "a file with one user id per line", "It names nobody.")
    rows: dict[str, list[int]] = {user: [] for user in lines}
    for index, owner in enumerate(_owners(forget, n_total, datamodule)):
        if owner in rows:
            rows[owner].append(index)
    if unknown := [line for user, line in lines.items() if not rows[user]]:
        shown = ", ".join(map(str, unknown[:10])) + (", …" if len(unknown) > 10 else "")
        raise ArgumentError(
            "forget.ids", f"{len(unknown)} unknown ids (lines {shown} of the file)", "ids that occur in the table",
            "Nothing was forgotten for anybody. Take them out if they never were in the training set.",
        )  # fmt: skip
    users = [User(user, line, rows[user]) for user, line in lines.items()]
    return Rows(sorted(index for user in users for index in user.rows), users)


def _checked(indices: Sequence[int], n_total: int) -> list[int]:
    if not indices:
        raise ArgumentError("forget.indices", [], "at least one index")
    if outside := [index for index in indices if not 0 <= index < n_total]:
        raise ArgumentError("forget.indices", outside[:10], f"positions 0 to {n_total - 1} of the training dataset")
    if len(set(indices)) != len(indices):
        twice = [index for index, count in sorted(Counter(indices).items()) if count > 1]
        raise ArgumentError("forget.indices", twice[:10], "each index once")
    return sorted(indices)


def _owners(forget: ForgetConfig, n_total: int, datamodule: object) -> list[str]:
    """The user id of every row of the training set."""
    if forget.table is None:
        if not callable(sample_ids := getattr(datamodule, "sample_ids", None)):
            raise ArgumentError(
                "forget.table", None, "a CSV file whose row i holds the user id of sample i",
                "Or give the datamodule a method `sample_ids()` that returns one id per sample.",
            )  # fmt: skip
        owners = [str(owner) for owner in sample_ids()]
        if len(owners) != n_total:
            raise ArgumentError("sample_ids()", f"{len(owners)} ids", f"one for each of the {n_total} samples")
        return owners
    return _column(_table(forget.table), forget.column, n_total)


def _table(path: str) -> list[list[str]]:
    # "\n" alone ends a line for csv too; a lone "\r" inside of a row is an error there
    lines = io.StringIO(_text("forget.table", path), newline="\n")
    try:
        table = list(csv.reader(lines, strict=True))
    except csv.Error as error:
        raise ArgumentError("forget.table", path, f"a CSV file ({error})") from error
    while table and not table[-1]:
        table.pop()
    return table


def _column(table: list[list[str]], name: str | None, n_total: int) -> list[str]:
    """The ids in a table; what it holds is not shown in refusals."""
    column, body = 0, table
    if name is not None:
        heading = table[0] if table else []
        if heading.count(name) != 1:
            raise ArgumentError(
                "forget.column", name, f"a name that occurs once in the table's first line (of {len(heading)} columns)"
            )
        column, body = heading.index(name), table[1:]
    if len(body) != n_total:
        surplus = name is None and len(body) == n_total + 1
        raise ArgumentError(
            "forget.table", f"{len(body)} rows", f"one row for each of the {n_total} samples",
            "Row i must belong to position i of the training dataset."
            + (" If the first line is a heading, say so: --forget.column NAME." if surplus else ""),
        )  # fmt: skip
    for i, row in enumerate(body):
        if len(row) <= column or not row[column].strip(_BLANK):
            raise ArgumentError("forget.table", f"no id in row {i}", "an id in every row")
    return [row[column].strip(_BLANK) for row in body]


def _text(argument: str, path: str | None) -> str:
    try:
        with open(Path(str(path)), encoding="utf-8-sig", newline="") as file:
            return file.read(_MAX_TEXT)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(argument, path, f"a readable UTF-8 text file ({reason})") from error


def asked_digest(kind: str, content: Mapping[str, Any]) -> str:
    """A digest of what a request asks for: the same id with another content is another request."""
    return hashlib.sha256(json.dumps([kind, dict(content)], sort_keys=True).encode()).hexdigest()


def new_request_id(kind: str) -> str:
    """A fresh id, readable and sortable by time."""
    return f"{kind}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


def checked_request_id(request_id: str | None, kind: str) -> str:
    """The given id, or a fresh one; ids are short, printable, and no secrets."""
    if request_id is None:
        return new_request_id(kind)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,99}", request_id):
        raise ArgumentError(
            "request_id", f"{len(request_id)} characters", "1 to 100 letters, digits or _.:@+- beginning with a letter or "
            "digit", "It is stored in clear text: use a ticket number, not a person's name.",
        )  # fmt: skip
    if re.search(r"[^@]@[^@]+\.[A-Za-z]", request_id):
        print("note: --request_id looks like an e-mail address. It is stored in clear text, in receipts that are kept: "
              "use a ticket number.", file=sys.stderr)  # fmt: skip
    return request_id


def refuse_forgotten(indices: Sequence[int], forgotten: Mapping[int, str]) -> None:
    """Insist that none of the rows is forgotten already; says which request did it."""
    again = [index for index in indices if index in forgotten]
    if again:
        by = ", ".join(map(repr, sorted({forgotten[index] for index in again})[:5]))
        count = "all" if len(again) == len(indices) else str(len(again))
        rest = "There is nothing left to do." if count == "all" else "Ask for the others alone."
        raise RequestError(f"{count} of the {len(indices)} rows are forgotten already, by {by}: {again[:20]}. {rest}")
