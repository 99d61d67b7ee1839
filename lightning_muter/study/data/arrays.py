"""Array-backed datasets that refuse what would be trained on silently, and the seeded stratified split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_muter.errors import ArgumentError

Item = tuple[Tensor, Tensor]


class ArrayDataset(Dataset[Item]):
    """Map-style dataset over tensors; ``dataset[i]`` is ``(x_i, y_i)`` with ``y_i`` an int64 scalar.

    Args:
        x: ``(n, ...)`` inputs; uint8 images are served as ``x / 255``, so that a large set stays small in memory.
        y: ``(n,)`` integer labels.
        num_classes: labels must lie in ``0 .. num_classes - 1`` and each class must have a sample.
        box: range that every input value must lie in, or None.
        ids: one name per sample (default: none).

    Raises:
        ArgumentError: wrong sizes, NaN or Inf, values outside the box, a label outside the classes, an empty class.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        num_classes: int,
        box: tuple[float, float] | None = None,
        ids: Sequence[str] | None = None,
        every_class: bool = True,
    ) -> None:
        if len(x) != len(y) or (ids is not None and len(ids) != len(x)):
            raise ArgumentError("y", f"{len(y)} labels for {len(x)} inputs", "one label (and one id) per input")
        check_inputs(x, box)
        check_labels(y, num_classes, every_class=every_class)
        if ids is not None and len(set(ids)) != len(ids):
            raise ArgumentError("ids", "repeated ids", "a different id for every sample", "One row per sample.")
        self.x, self.targets, self.num_classes, self.box = x, y.to(torch.int64), num_classes, box
        self.ids = None if ids is None else list(ids)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Item:
        x = self.x[index]
        if x.dtype == torch.uint8:
            x = x.to(torch.float32) / 255
        return x, self.targets[index]

    def take(self, positions: Sequence[int] | Tensor | np.ndarray, *, every_class: bool = True) -> ArrayDataset:
        """The samples at these positions as a dataset of its own (positions start at 0 again)."""
        at = torch.as_tensor(np.asarray(positions), dtype=torch.int64)
        ids = None if self.ids is None else [self.ids[i] for i in at.tolist()]
        return ArrayDataset(
            self.x[at], self.targets[at], num_classes=self.num_classes, box=self.box, ids=ids, every_class=every_class
        )


def check_inputs(x: Tensor, box: tuple[float, float] | None) -> None:
    """Raise if an input is not finite or leaves the box (uint8 counts as [0, 255] / 255)."""
    if x.dtype == torch.uint8:
        if box is not None and not (box[0] <= 0 and box[1] >= 1):
            raise ArgumentError("box", box, "a box that holds [0, 1] for 8-bit images")
        return
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x.reshape(len(x), -1)).all(1)).nonzero()[0])
        raise ArgumentError("x", f"NaN or Inf in sample {bad}", "finite inputs", "Remove or repair that sample.")
    if box is not None and x.numel():
        low, high = float(x.min()), float(x.max())
        if low < box[0] or high > box[1]:
            raise ArgumentError(
                "x",
                f"values from {low:g} to {high:g}",
                f"inputs in the box [{box[0]:g}, {box[1]:g}]",
                "Scale the images (e.g. divide by 255) and put any normalisation inside the model.",
            )


def check_labels(y: Tensor, num_classes: int, *, every_class: bool = True) -> None:
    """Raise if a label is no class index, or (``every_class``) if a class has no sample."""
    if y.ndim != 1 or y.is_floating_point():
        raise ArgumentError("y", f"shape {tuple(y.shape)}, {y.dtype}", "a vector of integer class indices")
    if len(y) == 0:
        raise ArgumentError("y", "no samples", "at least one sample per class")
    wrong = ((y < 0) | (y >= num_classes)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ArgumentError(
            "y",
            f"label {int(y[at])} at sample {at}",
            f"a class index from 0 to {num_classes - 1}",
            "Relabel the data or raise num_classes.",
        )
    if every_class:
        counts = torch.bincount(y.to(torch.int64), minlength=num_classes)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise ArgumentError(
                "y",
                f"no sample of class {empty}",
                "at least one sample per class",
                "Add samples, or relabel without the class.",
            )


def regroup(y: np.ndarray, classes: Sequence[int | Sequence[int]] | None) -> tuple[np.ndarray, np.ndarray]:
    """Keep and relabel: entry ``j`` of ``classes`` (one label or several) becomes class ``j``; None keeps everything.

    Returns:
        positions of the kept samples and their new labels.

    >>> regroup(np.array([1, 7, 3, 1]), [1, 7])
    (array([0, 1, 3]), array([0, 1, 0]))
    """
    if classes is None:
        return np.arange(len(y)), y
    new = np.full(len(y), -1, dtype=np.int64)
    seen: set[int] = set()
    for j, group in enumerate(classes):
        members = {int(group)} if isinstance(group, int) else {int(g) for g in group}
        if seen & members:
            raise ArgumentError("classes", list(classes), "each label in one class only")
        seen |= members
        new[np.isin(y, sorted(members))] = j
    kept = np.flatnonzero(new >= 0)
    return kept, new[kept]


def stratified_split(y: np.ndarray, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Disjoint sorted positions per part, each class divided in the given fractions (their sum at most 1).

    The cut points are those of the cumulated fractions, so that no sample is lost to rounding; the order within a class
    is drawn once from ``seed``.

    >>> [len(part) for part in stratified_split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), [0.5, 0.5], seed=0)]
    [4, 4]
    """
    if not len(fractions) or min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        raise ArgumentError("fractions", list(fractions), "numbers of at least 0 with a sum of at most 1")
    rng = np.random.default_rng(seed)
    cuts = np.concatenate([[0.0], np.cumsum(fractions)])
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        edges = np.rint(cuts * len(members)).astype(int)
        for part, start, stop in zip(parts, edges[:-1], edges[1:], strict=True):
            part.append(members[start:stop])
    return [np.sort(np.concatenate(part)) for part in parts]
