"""Which samples a study asks to have forgotten: one point, batches, successive requests, a class, a person's records.

A :class:`Setting` draws scenarios from the private part: a label and a sequence of requests (positions in the dataset).
Each prefix of the sequence is compared with retraining on exactly what is left.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lightning_muter.errors import ArgumentError
from lightning_muter.study.data.arrays import ArrayDataset


@dataclass(frozen=True)
class Scenario:
    """``requests[j]`` is forgotten after ``requests[:j]``; ``labels[j]`` names the state after it."""

    labels: tuple[str, ...]
    requests: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for request in self.requests:
            if not request or seen & set(request) or len(set(request)) < len(request):
                raise ArgumentError("requests", request, "positions that are new in each request, at least one")
            seen |= set(request)

    def forgotten(self, step: int) -> list[int]:
        """All positions forgotten after request ``step`` (from 0), sorted."""
        return sorted(i for request in self.requests[: step + 1] for i in request)


class Setting(ABC):
    """Draws scenarios from a dataset; the same seed gives the same positions."""

    def prepare(self, data: ArrayDataset, seed: int) -> ArrayDataset:
        """The private part as it is to be trained on: a setting may put into it what is to be forgotten."""
        return data

    @abstractmethod
    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]: ...


def share(fraction: float, n: int) -> int:
    """Number of samples in a share of ``n``: rounded, at least one, never all."""
    if not 0 < fraction < 1:
        raise ArgumentError("fraction", fraction, "a number between 0 and 1", "0.05 is 5 %.")
    return min(max(1, round(fraction * n)), n - 1)


def percent_label(fraction: float) -> str:
    """A share in words: 0.05 is "5 %"."""
    return f"{100 * fraction:g} %"


class Fractions(Setting):
    """Independent batches of these shares, drawn at random; smaller ones are part of larger ones."""

    def __init__(self, fractions: Sequence[float] = (0.01, 0.05)) -> None:
        self.fractions = list(fractions)

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        order = np.random.default_rng(seed).permutation(len(data)).tolist()
        return [Scenario((percent_label(f),), (tuple(order[: share(f, len(data))]),)) for f in self.fractions]


class OnePoint(Setting):
    """One sample, drawn at random."""

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        order = np.random.default_rng(seed).permutation(len(data)).tolist()
        return [Scenario(("1 point",), ((order[0],),))]


class Successive(Setting):
    """``steps`` requests one after the other, of ``size`` samples or of a share of the data each."""

    def __init__(self, steps: int = 5, size: int | None = None, fraction: float | None = None) -> None:
        if (size is None) == (fraction is None):
            raise ArgumentError(
                "size", size, "a number of samples, or fraction instead", "Give exactly one of the two."
            )
        if steps < 1 or (size is not None and size < 1):
            raise ArgumentError("steps", steps, "at least one request of at least one sample")
        self.steps, self.size, self.fraction = steps, size, fraction

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        each = self.size if self.size is not None else share(self.fraction or 0.0, len(data))
        if each * self.steps >= len(data):
            raise ArgumentError("steps", self.steps, f"requests that leave some of the {len(data)} samples")
        order = np.random.default_rng(seed).permutation(len(data)).tolist()
        requests = tuple(tuple(order[j * each : (j + 1) * each]) for j in range(self.steps))
        unit = f"{each} point{'s' * (each > 1)}" if self.fraction is None else percent_label(self.fraction)
        return [Scenario(tuple(f"{j + 1} x {unit}" for j in range(self.steps)), requests)]


class WholeClass(Setting):
    """Every sample of one class.

    The labels stay as they are: the model keeps its output for the class, as retraining on the rest would.
    """

    def __init__(self, label: int = 0) -> None:
        self.label = label

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        if data.num_classes < 3:
            raise ArgumentError(
                "label", self.label, "a dataset of at least 3 classes", "One class alone cannot be retrained."
            )
        positions = (data.targets == self.label).nonzero().flatten().tolist()
        if not positions:
            raise ArgumentError("label", self.label, f"a class of the private part, 0 to {data.num_classes - 1}")
        return [Scenario((f"class {self.label}",), (tuple(positions),))]


class Records(Setting):
    """The records of one person (or any group), by ids in a file or by a column of a table.

    Args:
        ids_file: text file with one sample id per line (blank lines and lines that start with # are skipped).
        table: CSV file with a header, one line per sample.
        column, value: the lines of ``table`` whose ``column`` equals ``value``.
        id_column: the column of ``table`` that holds the sample id.
        unknown: "refuse" ids that are not in the private part, or "skip" them: what was never trained on needs no
            unlearning (a person's records may have gone to the test part).

    Sample ids are ``dataset.ids``, else the positions.
    """

    def __init__(
        self,
        ids_file: str | Path | None = None,
        *,
        table: str | Path | None = None,
        column: str | None = None,
        value: str | None = None,
        id_column: str = "id",
        unknown: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        if unknown not in ("refuse", "skip"):
            raise ArgumentError("unknown", unknown, "'refuse' or 'skip'")
        if (ids_file is None) == (table is None):
            raise ArgumentError(
                "ids_file", ids_file, "a file of ids, or a table instead", "Give exactly one of the two."
            )
        if table is not None and (column is None or value is None):
            raise ArgumentError("column", column, "a column and a value with table=")
        self.ids_file, self.table, self.column, self.value, self.id_column = ids_file, table, column, value, id_column
        self.unknown = unknown

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        wanted, label = self._ids()
        known = {name: i for i, name in enumerate(data.ids if data.ids is not None else map(str, range(len(data))))}
        unknown = [name for name in wanted if name not in known]
        if self.unknown == "skip" and len(unknown) < len(wanted):
            wanted = [name for name in wanted if name in known]
        elif unknown:
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            example = ", ".join(list(known)[:3])
            raise ArgumentError(
                "ids",
                shown,
                f"ids of the private part, such as {example}",
                f"{len(unknown)} of {len(wanted)} are unknown.",
            )
        if not wanted:
            raise ArgumentError("ids", "none", "at least one id", "The file or the selection is empty.")
        if len(wanted) >= len(known):
            raise ArgumentError("ids", f"all {len(known)} samples", "ids that leave some samples to retrain on")
        return [Scenario((label,), (tuple(known[name] for name in wanted),))]

    def _ids(self) -> tuple[list[str], str]:
        path = Path(self.ids_file if self.ids_file is not None else self.table or "")
        if not path.is_file():
            raise ArgumentError("ids_file" if self.ids_file is not None else "table", str(path), "an existing file")
        text = path.read_text(encoding="utf-8-sig")
        if self.ids_file is not None:
            named = [line.strip() for line in text.splitlines()]
            return list(dict.fromkeys(n for n in named if n and not n.startswith("#"))), path.stem
        reader = csv.DictReader(text.splitlines())
        columns = reader.fieldnames or []
        for name in (self.column, self.id_column):
            if name not in columns:
                raise ArgumentError("column", name, f"a column of {path}: {', '.join(columns)}")
        found = [line[self.id_column] for line in reader if line[self.column or ""] == str(self.value)]
        return list(dict.fromkeys(found)), f"{self.column}={self.value}"


class Several(Setting):
    """The scenarios of several settings, in their order."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.settings = list(settings)

    def prepare(self, data: ArrayDataset, seed: int) -> ArrayDataset:
        for setting in self.settings:
            data = setting.prepare(data, seed)
        return data

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        return [scenario for setting in self.settings for scenario in setting.scenarios(data, seed)]
