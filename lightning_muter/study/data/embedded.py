"""Datasets that scikit-learn carries: no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_digits

from lightning_muter.study.data.arrays import ArrayDataset, regroup
from lightning_muter.study.data.base import SplitDataModule


class DigitsDataModule(SplitDataModule):
    """scikit-learn's 1797 handwritten digits, ``(1, 8, 8)`` in [0, 1].

    Args:
        classes: None for the ten digits; else one entry per class, a digit or a list of digits, e.g.
            ``[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]`` for even against odd.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """

    def __init__(
        self,
        *,
        classes: Sequence[int | Sequence[int]] | None = None,
        public_fraction: float = 0.4,
        **split: Any,
    ) -> None:
        super().__init__(public_fraction=public_fraction, **split)
        self.classes = classes
        self.num_classes = 10 if classes is None else len(classes)

    def load(self) -> tuple[ArrayDataset, ArrayDataset | None]:
        bunch = load_digits()
        kept, y = regroup(bunch.target, self.classes)
        x = torch.from_numpy(bunch.images[kept]).to(torch.float32)[:, None] / 16
        ids = [f"digit-{i}" for i in kept]
        data = ArrayDataset(x, torch.from_numpy(y), num_classes=self.num_classes, box=(0.0, 1.0), ids=ids)
        return data, None


class BreastCancerDataModule(SplitDataModule):
    """scikit-learn's breast cancer table: 569 samples of 30 features, 2 classes; ``(n, 30)``, no input box.

    The features are standardised by mean and standard deviation of the training part (public and private).

    Source: W. Wolberg et al., "Breast Cancer Wisconsin (Diagnostic)", UCI, 1993.
    """

    threat_box = None
    num_classes = 2

    def load(self) -> tuple[ArrayDataset, ArrayDataset | None]:
        bunch = load_breast_cancer()
        x = torch.from_numpy(bunch.data).to(torch.float32)
        ids = [f"patient-{i}" for i in range(len(x))]
        return ArrayDataset(x, torch.from_numpy(bunch.target), num_classes=2, ids=ids), None

    def prepare(self, train: ArrayDataset, rest: Sequence[ArrayDataset]) -> None:
        standardise(train, rest)


def standardise(train: ArrayDataset, rest: Sequence[ArrayDataset]) -> None:
    """``(x - mean) / std`` per feature with the figures of ``train``; a constant feature becomes 0."""
    x = train.x.double()
    mean, std = x.mean(0), x.std(0, unbiased=False)
    std = torch.where(std > 0, std, torch.ones_like(std))
    for data in (train, *rest):
        data.x = ((data.x.double() - mean) / std).to(data.x.dtype)
