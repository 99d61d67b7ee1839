"""What a caller says of a training whose parameters in ``scope`` are to be changed, of taking its snapshot, of a request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_muter.errors import MismatchError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.minimise.budget import Fit
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.model.reading import Reading
from lightning_muter.scope.network_objective import Training
from lightning_muter.snapshot.polishing import Examples
from lightning_muter.snapshot.resume import Resumable
from lightning_muter.snapshot.size import DEFAULT_CAP
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.solvers.cg import TruncatedCG
from lightning_muter.storage.fingerprint import DigestKey

#: mu at the start, per sample.
DAMPING = 1e-2


@dataclass(frozen=True, eq=False)
class TakeWide(Training):
    """What :func:`lightning_muter.take_wide_snapshot` is asked for."""

    model: nn.Module
    dataset: Dataset[Any]
    _: KW_ONLY
    polish: str | int = "auto"
    device: torch.device | str | None = None
    key: DigestKey | None = None
    normalization: Any = None
    reading: Reading | None = None

    def read_all(self) -> Reading:
        """What the model's step minimises, on the device where it is to be."""
        if self.device is not None:
            self.model.to(self.device)
        if self.reading is not None:
            return self.reading
        return self.read(self.model, self.dataset, normalization=self.normalization)


@dataclass(frozen=True, eq=False)
class Take(TakeWide):
    """What :func:`lightning_muter.take_snapshot` is asked for."""

    _: KW_ONLY
    scope: Any = "head"  # or "all", patterns, a `scope.base.Scope`
    batch_size: int = 1024
    budget: float | str | None = None
    fit: Fit | None = None
    examples: Examples | None = None
    tolerance: float | None = None
    size_cap: int = DEFAULT_CAP
    like: Snapshot | None = None
    resume: Resumable | None = None

    def identity(self, source: SampleSource, reading: Reading) -> dict[str, Any]:
        """What every kind of snapshot holds of the rows, their loss and the adversary.

        Raises:
            MismatchError: ``like`` is of other rows.
        """
        like = self.like
        key = self.key or (like.key if like is not None else None) or DigestKey.generate()
        digests = sample_digests(key, source, range(source.n))
        if like is not None and like.key_id == key.key_id and not torch.equal(digests, like.digests):
            raise MismatchError("like: it was taken of other rows, or in another order. Pass the same dataset.")
        return {
            "n_total": source.n,
            "forgotten": [],
            "threat_model": source.threat,
            "loss_name": reading.identity,
            "mass": source.mass,
            "normalization": reading.normalization,
            "input_shape": source.input_shape,
            "digests": digests,
            "key_id": key.key_id,
            "key": key,
            "sample_weight": source.weight,
        }


@dataclass(frozen=True, eq=False)
class UnlearnWide(Training):
    """What :func:`lightning_muter.unlearn_wide` is asked for."""

    model: nn.Module
    forget: Iterable[int]
    data: Dataset[Any]
    _: KW_ONLY
    forgotten: Iterable[int] = ()
    steps: int = 5
    damping: float = DAMPING
    cg: TruncatedCG | None = None
    tolerance: float = 1e-6
    seconds: float | None = None
    shards: Shards | None = None
    dry_run: bool = False
