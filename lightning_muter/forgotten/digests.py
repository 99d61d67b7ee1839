"""Keyed digests of samples: whether rows are, byte for byte, those that were trained on; whether content comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_muter.errors import MismatchError
from lightning_muter.model.dataset import SampleSource
from lightning_muter.storage.fingerprint import DigestKey

if TYPE_CHECKING:
    from lightning_muter.snapshot.stored import Stored

Collate = Callable[[list[Any]], Any] | None


def sample_digests(key: DigestKey, samples: SampleSource, positions: Sequence[int]) -> Tensor:
    """Keyed digests (n, 16) uint8 of ``positions``: of dtype, shape and bytes of input and label."""
    return _stacked(key.digest(x, y) for _, x, y in samples.raw_samples(positions))


def content_digests(
    key: DigestKey, dataset: Dataset[Any], positions: Sequence[int], collate: Collate = None
) -> list[bytes]:
    """Keyed digests of what samples hold, 16 bytes each: the same in float64 and float32, flat or as an image, and for a
    label of any integer or floating type.
    """
    samples = SampleSource(dataset, collate=collate, readable=positions) if positions else None
    found = samples.raw_samples(positions) if samples is not None else ()
    return [key.digest(_plain(x, torch.float32), _plain(y, torch.float64)) for _, x, y in found]


def _plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().reshape(-1).to(dtype) + 0.0  # -0 becomes 0


def _stacked(digests: Iterator[bytes]) -> Tensor:
    rows = [torch.frombuffer(bytearray(digest), dtype=torch.uint8) for digest in digests]
    return torch.stack(rows) if rows else torch.zeros(0, 16, dtype=torch.uint8)


def check_digests(
    snapshot: Stored,
    data: Dataset[Any],
    positions: Sequence[int],
    argument: str,
    collate: Collate = None,
) -> None:
    """Raise unless these samples are, byte for byte, the ones the snapshot was taken of.

    Raises:
        MismatchError: other content, or the key is not at hand.
    """
    if snapshot.key is None:
        raise MismatchError(
            f"{argument}: the samples cannot be compared with those that were trained on, for the key "
            f"{snapshot.key_id} of their digests is not at hand. Keep the .key file beside the snapshot, or load with "
            "Snapshot.load(path, key=DigestKey.load(...)). Lost for good: `muter refresh --recover_key true`."
        )
    source = SampleSource(data, collate=collate, threat=None, readable=positions)
    found = sample_digests(snapshot.key, source, positions)
    wrong = (found != snapshot.digests[torch.tensor(list(positions), dtype=torch.int64)]).any(1).nonzero()[:, 0]
    if len(wrong):
        first = [positions[int(i)] for i in wrong[:5]]
        raise MismatchError(
            f"{argument}: {len(wrong)} of {len(positions)} samples are not what was trained on, e.g. positions {first}. "
            "Pass the same dataset in the same order, without random augmentation."
        )
