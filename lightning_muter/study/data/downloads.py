"""Datasets fetched once and kept under ``root``: MNIST, CIFAR-10 (torchvision, MD5-checked), COVTYPE (scikit-learn)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.datasets import fetch_covtype
from torchvision.datasets import CIFAR10, MNIST

from lightning_muter.errors import ArgumentError
from lightning_muter.study.data.arrays import ArrayDataset, regroup
from lightning_muter.study.data.base import SplitDataModule
from lightning_muter.study.data.embedded import standardise

T = TypeVar("T")


def fetched(what: str, root: Path, files: str, fetch: Callable[[], T]) -> T:
    """``fetch()``, with a message that says what to put where when the source cannot be reached or a file is broken."""
    try:
        return fetch()
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError) as error:  # URLError is an OSError
        raise ArgumentError(
            "root",
            str(root),
            f"a folder that holds {what} ({files})",
            f"It is not there or damaged, and fetching it failed: {type(error).__name__}: {error}. "
            "Remove what is damaged, and copy the files there by hand or pass download=True with internet access.",
        ) from error


class _Fetched(SplitDataModule):
    """A dataset kept under ``root``.

    Args:
        root: folder of the files; created when downloading.
        download: fetch what is missing (once; later runs read the files).
    """

    def __init__(self, *, root: str | Path = "data_cache", download: bool = True, **split: Any) -> None:
        super().__init__(**split)
        self.root, self.download = Path(root), download


class MNISTDataModule(_Fetched):
    """MNIST, ``(1, 28, 28)`` in [0, 1]: 60 000 training and 10 000 test images (``root/MNIST/raw/*-ubyte``).

    Args:
        classes: None for the ten digits, else one entry per class as in :class:`DigitsDataModule`.
        pool: average over ``pool x pool`` pixels (2 gives 14 x 14), for smaller problems.

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
    """

    def __init__(self, *, classes: Sequence[int | Sequence[int]] | None = None, pool: int = 1, **options: Any) -> None:
        super().__init__(**options)
        if pool < 1 or 28 % pool:
            raise ArgumentError("pool", pool, "a divisor of 28: 1, 2, 4, 7 or 14")
        self.classes, self.pool = classes, pool
        self.num_classes = 10 if classes is None else len(classes)

    def prepare_data(self) -> None:
        if self.download:
            self._source(train=True)

    def _source(self, *, train: bool) -> MNIST:
        files = "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
        return fetched("MNIST", self.root, files, lambda: MNIST(str(self.root), train=train, download=self.download))

    def load(self) -> tuple[ArrayDataset, ArrayDataset | None]:
        return self._array("train", self._source(train=True)), self._array("test", self._source(train=False))

    def _array(self, name: str, source: MNIST) -> ArrayDataset:
        kept, y = regroup(source.targets.numpy(), self.classes)
        x = source.data[torch.from_numpy(kept)][:, None]
        if self.pool > 1:
            x = torch.nn.functional.avg_pool2d(x.to(torch.float32) / 255, self.pool)
        ids = [f"{name}-{i}" for i in kept]
        return ArrayDataset(x, torch.as_tensor(y), num_classes=self.num_classes, box=(0.0, 1.0), ids=ids)


class BinaryMNISTDataModule(MNISTDataModule):
    """Two digits of MNIST as classes 0 and 1; 1 against 7 as in the paper's linear models."""

    def __init__(self, *, classes: Sequence[int | Sequence[int]] = (1, 7), **options: Any) -> None:
        if len(classes) != 2:
            raise ArgumentError("classes", list(classes), "two entries", "Use MNISTDataModule for more classes.")
        super().__init__(classes=classes, **options)


class CIFAR10DataModule(_Fetched):
    """CIFAR-10, ``(3, 32, 32)`` in [0, 1]: 50 000 training and 10 000 test images (``root/cifar-10-batches-py``).

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    num_classes = 10
    source_class: type[CIFAR10] = CIFAR10

    def prepare_data(self) -> None:
        if self.download:
            self._source(train=True)

    def _source(self, *, train: bool) -> CIFAR10:
        def open_source() -> CIFAR10:
            return self.source_class(str(self.root), train=train, download=self.download)

        return fetched("CIFAR-10", self.root, "cifar-10-batches-py/*", open_source)

    def load(self) -> tuple[ArrayDataset, ArrayDataset | None]:
        parts = []
        for name, train in (("train", True), ("test", False)):
            source = self._source(train=train)
            x = torch.from_numpy(np.ascontiguousarray(source.data)).permute(0, 3, 1, 2).contiguous()
            ids = [f"{name}-{i}" for i in range(len(x))]
            y = torch.as_tensor(source.targets)
            parts.append(ArrayDataset(x, y, num_classes=10, box=(0.0, 1.0), ids=ids))
        return parts[0], parts[1]


class CovtypeBinaryDataModule(_Fetched):
    """Forest cover type, 581 012 rows of 54 features: class 2 (lodgepole pine, class 1 here) against the rest; no box.

    ``limit_train`` keeps a stratified part. Standardised by the training part unless ``scale="unit"``, which maps each
    feature to [0, 1] by its range there (values outside it are cut) and sets the box.

    Source: J. Blackard, "Covertype", UCI, 1998, through ``sklearn.datasets.fetch_covtype`` (SHA-256-checked).
    """

    num_classes = 2
    threat_box = None

    def __init__(self, *, scale: str = "standard", **options: Any) -> None:
        super().__init__(**options)
        if scale not in ("standard", "unit"):
            raise ArgumentError("scale", scale, "'standard' or 'unit'")
        self.scale = scale
        self.threat_box = (0.0, 1.0) if scale == "unit" else None

    def prepare_data(self) -> None:
        if self.download:
            self._fetch()

    def _fetch(self) -> Any:
        def fetch() -> Any:
            return fetch_covtype(data_home=str(self.root), download_if_missing=self.download)

        return fetched("COVTYPE", self.root, "covertype/{samples,targets} of scikit-learn's fetcher", fetch)

    def load(self) -> tuple[ArrayDataset, ArrayDataset | None]:
        bunch = self._fetch()
        x = torch.from_numpy(np.asarray(bunch.data, dtype=np.float32))
        y = torch.from_numpy((np.asarray(bunch.target) == 2).astype(np.int64))
        return ArrayDataset(x, y, num_classes=2, ids=[f"cell-{i}" for i in range(len(x))]), None

    def prepare(self, train: ArrayDataset, rest: Sequence[ArrayDataset]) -> None:
        if self.scale == "standard":
            standardise(train, rest)
            return
        low, high = train.x.amin(0), train.x.amax(0)
        span = torch.where(high > low, high - low, torch.ones_like(low))
        for data in (train, *rest):
            data.x = ((data.x - low) / span).clamp(0.0, 1.0)
            data.box = (0.0, 1.0)
