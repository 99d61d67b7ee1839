"""Findings about the training data: what unlearning reads by index must be what was trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_muter.errors import ArgumentError
from lightning_muter.model.leaves import flatten
from lightning_muter.model.rows import collate_of, takes_whole_batches
from lightning_muter.preflight.findings import Finding

_READS, _ROWS = 3, 8


def inspect_loaders(loaders: list[Any]) -> list[Finding]:
    """Findings about the training data loaders (the flattened list) and the one dataset behind them."""
    if not loaders:
        return [Finding("error", "There is no training data loader.", "Pass train_dataloaders or a datamodule.")]
    if len(loaders) > 1:
        return [
            Finding(
                "error",
                f"{len(loaders)} training data loaders: `forget` is a position in one dataset.",
                "Train on one loader over a torch.utils.data.ConcatDataset.",
            )
        ]
    loader = loaders[0]
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or dataset is None:
        return [
            Finding(
                "error",
                f"The training loader is a {type(loader).__name__}, whose samples cannot be read by index.",
                "Use a torch.utils.data.DataLoader over a map-style dataset.",
            )
        ]
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return [
            Finding(
                "error",
                f"{type(dataset).__name__} is no map-style dataset (__getitem__, __len__): no index.",
                "Write it as torch.utils.data.Dataset.",
            )
        ]
    return [*_inspect_order(loader), *_inspect_samples(loader)]


def _inspect_order(loader: DataLoader[Any]) -> list[Finding]:
    """Whether every sample counts once: F weighs each sample of the dataset once."""
    out = []
    n: int = len(loader.dataset)  # type: ignore[arg-type]
    advice = "The snapshot is of those that are, each once; pass weights through the loss (batch of (x, y, weight))."
    sampler = loader.sampler
    if isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    if type(loader.batch_sampler) not in (BatchSampler, type(None)) and not hasattr(loader.batch_sampler, "_sampler"):
        out.append(
            Finding(
                "warning",
                f"{type(loader.batch_sampler).__name__} decides which samples are seen, and how often.",
                advice,
            )
        )
    elif isinstance(sampler, RandomSampler):
        if sampler.replacement or (sampler._num_samples or n) != n:
            out.append(Finding("warning", "RandomSampler draws with replacement or not the whole dataset.", advice))
    elif isinstance(sampler, DistributedSampler):
        if n % sampler.num_replicas:
            out.append(
                Finding("warning", f"{n} samples over {sampler.num_replicas} processes: some are seen twice.", advice)
            )
    elif isinstance(sampler, SubsetRandomSampler):
        if (reached := len({int(i) for i in sampler.indices})) < n:
            text = f"The sampler reaches {reached} of {n} samples: the snapshot is of these, and the others cannot be forgotten."
            out.append(Finding("note", text))
    elif not isinstance(sampler, SequentialSampler):
        text = f"{type(sampler).__name__} decides which samples are seen, and how often."
        out.append(Finding("warning", text, advice))
    size = loader.batch_size or 1
    if loader.drop_last and n % size:
        out.append(
            Finding(
                "warning",
                f"drop_last leaves out {n % size} of {n} samples in every epoch.",
                "Set drop_last=False: unlearning weighs every sample once.",
            )
        )
    return out


def _inspect_samples(loader: DataLoader[Any]) -> list[Finding]:
    """Read a few samples more than once, as they reach the model; the random state is left as it was."""
    n: int = len(loader.dataset)  # type: ignore[arg-type]
    if n == 0:
        return [Finding("error", "The training dataset is empty.", "")]
    rows = sorted({round(i * (n - 1) / max(1, _ROWS - 1)) for i in range(_ROWS)})
    try:
        with same_randomness_afterwards():
            reads = [[_collate(loader, [loader.dataset[i]]) for i in rows] for _ in range(_READS)]
            together = _collate(loader, [loader.dataset[i] for i in rows])
            if takes_whole_batches(loader):
                together = loader.collate_fn(loader.dataset[rows])
        kept = [[_tensors(b) for b in read] for read in reads]
        whole = _tensors(together)
        apart = [torch.cat(part) if _stackable(part) else None for part in zip(*kept[0], strict=True)]
    except ArgumentError as e:
        return [Finding("error", str(e))]
    except Exception as e:
        return [Finding("error", f"Reading and collating the first samples failed: {e!r}.", "Training would fail too.")]
    out = []
    if any(not _same(kept[0][i], other[i]) for other in kept[1:] for i in range(len(rows))):
        out.append(
            Finding(
                "error",
                "Reading one index twice gives different samples (random augmentation): a sample that was trained on "
                "cannot be found again.",
                "Augment once, in advance, into a longer dataset, or train the head on samples without augmentation.",
            )
        )
    elif not _same(whole, apart):
        out.append(
            Finding(
                "error",
                "collate_fn mixes samples or depends on the batch (MixUp, padding, normalisation over the batch).",
                "Collate sample by sample, so that a sample stays what it is in any batch.",
            )
        )
    if any(not bool(torch.isfinite(part).all()) for part in whole if part.is_floating_point()):
        out.append(Finding("error", "NaN or infinite numbers in the training data.", "Clean the data."))
    return out


def _tensors(batch: Any) -> list[Tensor]:
    return [v for v in flatten(batch)[1] if isinstance(v, Tensor)]


def _stackable(part: tuple[Tensor, ...]) -> bool:
    return all(t.dim() > 0 and t.shape[1:] == part[0].shape[1:] for t in part)


def _collate(loader: DataLoader[Any], samples: list[Any]) -> Any:
    return collate_of(loader)(samples)


def _same(a: list[Tensor], b: Sequence[Tensor | None]) -> bool:
    """Tensor by tensor; None stands for what cannot be compared."""
    pairs = [(p, q) for p, q in zip(a, b, strict=True) if q is not None]
    return all(p.shape == q.shape and torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in pairs)


@contextmanager
def same_randomness_afterwards() -> Iterator[None]:
    """Python, NumPy and torch draw on afterwards as if nothing had been drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - datasets may draw from the global one
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
