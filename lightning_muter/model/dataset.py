"""The training set as the statistics read it: by position, in order, through the dataset's own collate function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.model.batches import split_batch
from lightning_muter.model.leaves import flatten
from lightning_muter.model.reading import Reading

#: Datasets up to this many bytes are read once and kept on the device.
_CACHE_BYTES = 1 << 30


@dataclass
class Samples:
    """Some samples: positions (n,), inputs (n, D) flattened, labels, weights c (n,) or None (each 1), and d (n,) while it is asked
    for.
    """

    positions: Tensor
    x: Tensor
    y: Tensor
    weight: Tensor | None
    mass: Tensor | None = None


def insist_on_positions(dataset: object) -> None:
    """Refuse what has no rows by position.

    Raises:
        UnsuitableError: a loader, a data module, an iterable dataset.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UnsuitableError(
            f"{type(dataset).__name__} cannot be read by position, so nothing in it can be named for forgetting. "
            "Of a DataLoader pass its dataset, loader.dataset. "
            "Wrap anything else in a map-style dataset (with __getitem__ and __len__)."
        )


class SampleSource:
    """Reads samples of a map-style dataset by position.

    Args:
        dataset: map-style; an item is (x, y, ...) or a dict, as in training.
        collate: the training loader's ``collate_fn``.
        weight: optional weights w_i (n,) of the objective sum_i w_i phi_i.
        threat: inputs outside its box are refused.
        readable: positions that may be read (forgotten rows may be gone from the disk); all by default.
        reading: what the module's own step says of a batch: where input and label are, c_i and d_i of its rows.

    Raises:
        UnsuitableError: an iterable dataset.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 1024,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        weight: Tensor | None = None,
        threat: ThreatModel | None = None,
        readable: Sequence[int] | None = None,
        reading: Reading | None = None,
    ) -> None:
        insist_on_positions(dataset)
        self.dataset, self.collate = dataset, collate
        self.batch_size, self.num_workers, self.device = batch_size, num_workers, torch.device(device)
        self.threat = threat
        self.n: int = len(dataset)  # type: ignore[arg-type]
        if self.n == 0:
            raise ArgumentError("dataset", "an empty dataset", "at least one sample")
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.float64).reshape(-1)
            if len(weight) != self.n or not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
                raise ArgumentError("sample_weight", tuple(weight.shape), f"{self.n} finite weights, 0 or larger")
        settled = None if reading is None else reading.settled
        self.weight = weight if settled is None else settled.weight
        self.mass = None if settled is None else settled.mass
        self.reading, self._asks = reading, reading is not None and settled is None
        self._readable: Sequence[int] = range(self.n) if readable is None else list(readable)
        first = self._raw(self._readable[:1])
        self.input_shape = tuple(first[0].shape[1:])
        bytes_needed = self.n * first[0].element_size() * first[0][0].numel()
        self._cacheable = bytes_needed <= _CACHE_BYTES
        self._cache: tuple[Tensor, Tensor] | None = None
        self._row = torch.full((self.n,), -1)  # of a position in the cache

    def total(self, positions: Sequence[int]) -> float:
        """sum d_i, what weight decay is multiplied by: the number of samples where each counts once."""
        if self.mass is None:
            return float(len(positions))
        return float(self.mass[torch.as_tensor(positions, dtype=torch.int64)].sum())

    def settle(self) -> SampleSource:
        """Ask the reading for c_i and d_i of every readable row, once; None stays where all are 1."""
        if self._asks:
            own = self.weight
            c, d = (torch.zeros(self.n, dtype=torch.float64) for _ in range(2))
            parts = []
            for batch in self._load(list(self._readable)):
                assert batch.weight is not None
                assert batch.mass is not None
                c[batch.positions], d[batch.positions] = batch.weight.double().cpu(), batch.mass.double().cpu()
                if self._cacheable:
                    parts.append(batch)
            if self._cacheable:
                self._keep(parts, self._readable)
            at = torch.as_tensor(self._readable, dtype=torch.int64)
            if own is not None or bool((c[at] != 1).any()):
                self.weight = c
            if bool((d[at] != 1).any()):
                self.mass = d
            self._asks = False
        return self

    def _collated(self, positions: Sequence[int]) -> Any:
        collate = self.collate or torch.utils.data.default_collate
        return collate([self.dataset[int(i)] for i in positions])

    def _raw(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._split(self._collated(positions))

    def _split(self, batch: Any) -> tuple[Tensor, Tensor]:
        if self.reading is None:
            return _content(batch)
        return self.reading.split(self.reading.prepared(batch))[:2]

    def examples(self, count: int = 8) -> Tensor:
        """Up to ``count`` inputs spread over the dataset, as the model takes them."""
        last = len(self._readable) - 1
        spread = torch.linspace(0, last, min(count, last + 1)).long().tolist()
        return self._raw([self._readable[i] for i in spread])[0]

    def raw_samples(self, positions: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(position, x, y) one by one, exactly as the dataset gives them (for digests), whatever a model makes of them."""
        for begin in range(0, len(positions), self.batch_size):
            part = positions[begin : begin + self.batch_size]
            x, y = _content(self._collated(part))
            for row, position in enumerate(part):
                yield position, x[row], y[row]

    def batches(self, positions: Sequence[int] | None = None) -> Iterator[Samples]:
        """Batches in the order of ``positions`` (all samples by default), on the device."""
        wanted = list(range(self.n)) if positions is None else [int(i) for i in positions]
        if self._cacheable and len(wanted) > int((self._row >= 0).sum()):  # the largest set asked for is kept
            self._keep(list(self._load(wanted)), wanted)
        if self._cache is None or bool((self._row[torch.tensor(wanted, dtype=torch.int64)] < 0).any()):
            yield from self._load(wanted)
            return
        for begin in range(0, len(wanted), self.batch_size):
            at = torch.tensor(wanted[begin : begin + self.batch_size])
            row = self._row[at].to(self.device)
            yield self._samples(at, self._cache[0][row], self._cache[1][row])

    def _keep(self, parts: list[Samples], wanted: Sequence[int]) -> None:
        self._cache = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
        self._row.fill_(-1)
        self._row[torch.as_tensor(wanted, dtype=torch.int64)] = torch.arange(len(wanted))

    def _load(self, positions: list[int]) -> Iterator[Samples]:
        loader: DataLoader[Any] = DataLoader(
            Subset(self.dataset, positions),
            batch_size=self.batch_size,
            shuffle=False,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
        done = 0
        for batch in loader:
            x, y = self._split(batch)
            at = torch.tensor(positions[done : done + len(x)])
            done += len(x)
            flat = x.detach().reshape(len(x), -1).to(self.device)
            self._check(flat, y, at)
            samples = self._samples(at, flat, y.to(self.device))
            if self._asks:
                assert self.reading is not None
                found = self.reading.rows(batch)
                own = samples.weight
                samples.weight = found.weight.to(self.device) if own is None else own * found.weight.to(self.device)
                samples.mass = found.mass
            yield samples

    def _samples(self, at: Tensor, x: Tensor, y: Tensor) -> Samples:
        weight = None if self.weight is None else self.weight[at].to(self.device)
        return Samples(at, x, y, weight)

    def _check(self, x: Tensor, y: Tensor, at: Tensor) -> None:
        bad = ~torch.isfinite(x).all(1).cpu()
        if y.is_floating_point():
            bad |= ~torch.isfinite(y.reshape(len(y), -1)).all(1).cpu()
        if bool(bad.any()):
            raise ArgumentError(
                "dataset", f"NaN or infinity in sample {int(at[bad][0])}", "finite inputs and labels", "Clean the data."
            )
        if self.threat is not None and self.threat.box is not None:
            lo, hi = self.threat.box
            slack = 1e-5 * (hi - lo)
            out = ((x < lo - slack) | (x > hi + slack)).any(1).cpu()
            if bool(out.any()):
                row = x[out.to(x.device)][0]
                raise ArgumentError(
                    "threat_model.box",
                    (lo, hi),
                    f"a box that holds the inputs; sample {int(at[out][0])} spans [{row.min():.4g}, {row.max():.4g}]",
                    "Pass threat_model=ThreatModel(norm, eps, box=None) or the true box (box of the values the model sees).",
                )


def _content(batch: Any) -> tuple[Tensor, Tensor]:
    """Input and label of a batch for digests; where a batch does not say which they are, its first floating tensor and the rest."""
    try:
        return split_batch(batch)[:2]
    except ArgumentError:
        leaves = [v for v in flatten(batch)[1] if isinstance(v, Tensor) and v.dim() > 0]
        n = len(leaves[0]) if leaves else 0
        found = [v for v in leaves if len(v) == n]
        first = next((v for v in found if v.is_floating_point()), None)
        if first is None:
            raise
        rest = [v.reshape(n, -1).to(torch.float64) for v in found if v is not first]
        return first, torch.cat(rest, 1) if rest else torch.zeros(n)
