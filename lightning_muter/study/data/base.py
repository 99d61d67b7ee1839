"""The DataModule that every dataset here is: public, private, validation and test parts of its samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from lightning_muter.errors import ArgumentError
from lightning_muter.study.data.arrays import ArrayDataset, stratified_split

Part = Literal["private", "public", "all"]


class SplitDataModule(L.LightningDataModule):
    """Public / private / validation / test parts, stratified and seeded.

    The *private* part holds what users may ask to have forgotten; the *public* part, disjoint from it, is what a
    backbone may be trained on and keep. ``part`` says which of them ``train_dataloader`` serves ("all": both).

    Args:
        part: "private", "public" or "all".
        batch_size: of every loader.
        seed: of the split (not of the shuffling, which follows the trainer's).
        public_fraction: share of the training samples that is public, 0 for none.
        val_fraction: share of the training samples held out for validation.
        test_fraction: share of all samples for testing, where the source has no test set of its own.
        limit_train, limit_test: use a seeded stratified subset of about this many samples.
        num_workers: of the loaders.

    Subclasses implement :meth:`load`, which returns the training set and the source's test set or None.
    """

    num_classes: int
    threat_box: tuple[float, float] | None = (0.0, 1.0)

    def __init__(
        self,
        *,
        part: Part = "private",
        batch_size: int = 64,
        seed: int = 0,
        public_fraction: float = 0.0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        limit_train: int | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if part not in ("private", "public", "all"):
            raise ArgumentError("part", part, "'private', 'public' or 'all'")
        shares = {"public_fraction": public_fraction, "val_fraction": val_fraction, "test_fraction": test_fraction}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ArgumentError(name, value, "a number from 0 to below 1")
        if public_fraction + val_fraction >= 1:
            allowed = "a number that with val_fraction stays below 1"
            raise ArgumentError("public_fraction", public_fraction, allowed, "Some samples must be left to be private.")
        self.part: Part = part
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.public_fraction, self.val_fraction, self.test_fraction = public_fraction, val_fraction, test_fraction
        self.limit_train, self.limit_test = limit_train, limit_test
        self._parts: dict[str, ArrayDataset] | None = None

    # -- what a subclass provides --------------------------------------------------------------------------------------

    @abstractmethod
    def load(self) -> tuple[ArrayDataset, ArrayDataset | None]:
        """Training set, and the source's test set (None: ``test_fraction`` of the training set becomes one)."""

    def given_public(self) -> ArrayDataset | None:
        """Hook of sources that have a public part of their own, which may have other classes."""
        return None

    def prepare(self, train: ArrayDataset, rest: Sequence[ArrayDataset]) -> None:
        """Hook to fit something on the training part alone (standardisation); changes the datasets in place."""

    # -- parts ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if self._parts is not None:
            return
        train, test = self.load()
        train = self.limited(train, self.limit_train)
        test = None if test is None else self.limited(test, self.limit_test)
        share = self.test_fraction if test is None else 0.0
        rest = 1.0 - share
        fractions = [share, rest * self.val_fraction, rest * self.public_fraction]
        fractions.append(1.0 - sum(fractions))
        at_test, at_val, at_public, at_private = stratified_split(train.targets.numpy(), fractions, self.seed)
        parts = {
            "test": train.take(at_test, every_class=False) if test is None else test,
            "val": train.take(at_val, every_class=False) if len(at_val) else None,
            "public": train.take(at_public) if len(at_public) else None,
            "private": train.take(at_private),
            "all": train.take(np.sort(np.concatenate([at_public, at_private]))) if len(at_public) else None,
        }
        present = {name: part for name, part in parts.items() if part is not None}
        fitted = present.get("all", present["private"])
        public = self.given_public()
        if public is not None:
            if self.part == "all":
                raise ArgumentError("part", "all", "'private' or 'public' where the public part is given")
            present["public"] = public
        self.prepare(fitted, [part for part in present.values() if part is not fitted])
        self._parts = present

    def limited(self, data: ArrayDataset, limit: int | None) -> ArrayDataset:
        """A seeded stratified subset of about ``limit`` samples; all where it is None or larger."""
        if limit is None or limit >= len(data):
            return data
        if limit < data.num_classes:
            raise ArgumentError("limit", limit, f"at least one sample per class ({data.num_classes})")
        (kept,) = stratified_split(data.targets.numpy(), [limit / len(data)], self.seed)
        return data.take(kept)

    def _get(self, name: str) -> ArrayDataset:
        self.setup()
        assert self._parts is not None
        if name not in self._parts and name == "all":
            name = "private"
        if name not in self._parts:
            raise ArgumentError(
                f"{name}_fraction", 0, "a share above 0", f"This DataModule was built without a {name} part."
            )
        return self._parts[name]

    @property
    def has_public(self) -> bool:
        """Whether there is a public part."""
        self.setup()
        return self._parts is not None and "public" in self._parts

    @property
    def public_dataset(self) -> ArrayDataset:
        return self._get("public")

    @property
    def private_dataset(self) -> ArrayDataset:
        return self._get("private")

    @property
    def train_dataset(self) -> ArrayDataset:
        """What ``train_dataloader`` serves; positions to forget count in it."""
        return self._get(self.part)

    @property
    def val_dataset(self) -> ArrayDataset:
        return self._get("val")

    @property
    def test_dataset(self) -> ArrayDataset:
        return self._get("test")

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train_dataset.x.shape[1:])

    def sample_ids(self) -> list[str]:
        """Name of every sample of ``train_dataset``, by position; requests may use them instead of positions."""
        ids = self.train_dataset.ids
        return [str(i) for i in range(len(self.train_dataset))] if ids is None else list(ids)

    # -- loaders -------------------------------------------------------------------------------------------------------

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader(self.val_dataset) if self.val_fraction > 0 else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.test_dataset)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()
