"""One row per method and request: what the study writes, how rows are stored at once and read back from any folder.

A row of ``results.csv`` is one :class:`Row`. Distances are relative (see ``metrics``), accuracies are shares, gaps are
points (unlearned minus retrained), times are seconds; an empty cell means "not measured".
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, TypeVar

from lightning_muter.errors import CorruptFileError
from lightning_muter.storage.atomic import atomic_write, create_once

T = TypeVar("T")
NAN = math.nan
FILE = "results.csv"
PARTS = ("forget", "retain", "test")
REFERENCE = "retraining"  # the method's name in the rows of the reference itself
NOTHING = "doing nothing"  # the method that keeps the model as it is
#: Methods that are retraining too, from another start: their distance is the noise floor.
FLOORS = ("retraining, random start", "retraining, warm start")


@dataclass
class Row:
    """One method after one request, compared with retraining on exactly the retained samples."""

    dataset: str
    model: str
    attack: str
    setting: str  # the kind of request, e.g. "5 %", "class 3", "3 of 5 x 1 %"
    method: str
    eps: float = NAN
    seed: int = 0
    forget_seed: int = 0
    n_total: int = 0
    n_forgotten: int = 0
    percent: float = NAN
    distance: float = NAN
    bound: float = NAN  # certified absolute distance to the minimiser on the retained data (the reference has its own)
    distance_absolute: float = NAN
    clean_acc: float = NAN
    robust_acc: float = NAN
    clean_gap: float = NAN
    robust_gap: float = NAN
    status: str = ""
    residual: float = NAN
    stationarity: float = NAN
    seconds_snapshot: float = NAN
    seconds_request: float = NAN
    seconds_retrain: float = NAN
    state_bytes: float = NAN
    forget_clean_acc: float = NAN
    forget_robust_acc: float = NAN
    agreement_forget_clean: float = NAN
    agreement_forget_robust: float = NAN
    agreement_retain_clean: float = NAN
    agreement_retain_robust: float = NAN
    agreement_test_clean: float = NAN
    agreement_test_robust: float = NAN
    kl_forget_clean: float = NAN
    kl_forget_robust: float = NAN
    kl_retain_clean: float = NAN
    kl_retain_robust: float = NAN
    kl_test_clean: float = NAN
    kl_test_robust: float = NAN
    job: str = ""
    note: str = ""

    @property
    def speedup(self) -> float:
        """Retraining time over request time."""
        return self.seconds_retrain / self.seconds_request if self.seconds_request > 0 else NAN

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a row the same measurement as another."""
        named = (self.dataset, self.model, self.attack, self.eps, self.seed, self.forget_seed)
        return (*named, self.setting, self.n_forgotten, self.method)

    @property
    def problem(self) -> tuple[str, str, str]:
        """Dataset, model and attack with its radius: rows of one problem may be averaged over seeds."""
        return self.dataset, self.model, attack_name(self)


COLUMNS = [f.name for f in fields(Row)]
_TYPES: dict[str, Callable[[str], Any]] = {
    f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(Row)
}


def attack_name(row: Row) -> str:
    """The attack with its radius, where it has one."""
    return row.attack if math.isnan(row.eps) or row.eps == 0 else f"{row.attack} eps={row.eps:.3g}"


def to_csv(rows: Iterable[Row], *, header: bool = True) -> str:
    """Rows as CSV text, one line each."""
    return csv_text(COLUMNS, map(asdict, rows), header=header)


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, Any]], *, header: bool = True) -> str:
    """CSV text; what was not measured is an empty cell, numbers have six significant digits."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    for line in lines:
        writer.writerow({name: _cell(value) for name, value in line.items()})
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def from_csv(text: str, *, origin: str = "results.csv") -> list[Row]:
    """Rows of a table; unknown columns are ignored, so that newer files stay readable.

    Raises:
        CorruptFileError: a needed column is missing or a cell is not of its type.
    """
    reader = csv.DictReader(io.StringIO(text))
    required = [f.name for f in fields(Row) if f.name in ("dataset", "model", "attack", "setting", "method")]
    missing = [name for name in required if name not in (reader.fieldnames or [])]
    if missing:
        raise CorruptFileError(f"{origin} has no column {missing}. It is no table of muter-experiment.")
    rows = []
    for number, cells in enumerate(reader, start=2):
        try:
            known = {k: v for k, v in cells.items() if k in _TYPES and v is not None}
            values = {k: _TYPES[k](v) for k, v in known.items() if v or _TYPES[k] is str}
            rows.append(Row(**values))
        except (TypeError, ValueError) as error:
            raise CorruptFileError(f"{origin}, line {number}: {error}. Remove or repair the line.") from error
    return rows


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a table in one write, so that several processes may share it; a new one comes with its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        create_once(path, lambda file: file.write(to_csv([]).encode()))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, to_csv(rows, header=False).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(to_csv(rows).encode()))


def read_rows(folder: Path) -> list[Row]:
    """Rows of every ``results.csv`` in or below a folder (or of one file), each measurement once: the last one read.

    Raises:
        FileNotFoundError: no table there.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob(FILE))
    if not files:
        raise FileNotFoundError(
            f"No {FILE} in {folder} or below. Run muter-experiment first, or name its output folder."
        )
    found: dict[tuple[Any, ...], Row] = {}
    for file in files:
        for row in from_csv(file.read_text(encoding="utf-8"), origin=str(file)):
            found[row.key] = row
    return list(found.values())


# -- summaries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation, median and extremes of the measured values (NaN left out) of one cell."""

    values: tuple[float, ...] = field(repr=False)

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return mean(self.values) if self.values else NAN

    @property
    def std(self) -> float:
        return stdev(self.values) if self.n > 1 else 0.0 if self.values else NAN

    @property
    def median(self) -> float:
        return median(self.values) if self.values else NAN

    @property
    def max(self) -> float:
        return max(self.values) if self.values else NAN

    @property
    def min(self) -> float:
        return min(self.values) if self.values else NAN


def summarise(rows: Iterable[Row], value: str) -> Summary:
    """Summary of one column (or of ``speedup``) over rows.

    >>> rows = [Row("d", "m", "a", "s", "x", distance=v) for v in (1.0, 3.0, math.nan)]
    >>> summarise(rows, "distance").median
    2.0
    """
    found = (float(getattr(row, value)) for row in rows)
    return Summary(tuple(v for v in found if not math.isnan(v)))


def group(rows: Iterable[T], by: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Rows by a key, keys in the order of their first appearance."""
    out: dict[Any, list[T]] = {}
    for row in rows:
        out.setdefault(by(row), []).append(row)
    return out
