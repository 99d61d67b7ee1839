"""Images in one NumPy archive (.npz), the form in which small sets of them are passed on."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_muter.errors import ArgumentError
from lightning_muter.study.data.arrays import ArrayDataset
from lightning_muter.study.data.base import SplitDataModule

#: Names of (images, labels) by part: this package's, those of Keras, those of MedMNIST.
_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "private": (("private_x", "private_y"), ("x_train", "y_train"), ("train_images", "train_labels")),
    "public": (("public_x", "public_y"),),
    "test": (("test_x", "test_y"), ("x_test", "y_test"), ("test_images", "test_labels")),
}


class ImageArchiveDataModule(SplitDataModule):
    """Images of an ``.npz`` file, ``(c, h, w)`` in [0, 1] and kept in memory as 8-bit values.

    The file holds uint8 images ``(n, h, w)`` or ``(n, h, w, c)`` and integer labels ``(n,)`` or ``(n, 1)`` under the names
    ``{private,public,test}_{x,y}``, or those of Keras (``x_train``, ...) or MedMNIST (``train_images``, ...). Public and test part
    are optional: without them they are split off by ``public_fraction`` and ``test_fraction``. Archives that would run code when read
    (pickled objects) are refused.

    Args:
        path: the file.
        limit_public: use a seeded stratified subset of the given public part of about this many images.

    Raises:
        ArgumentError: no such file, no archive, or arrays of another kind.
    """

    def __init__(self, *, path: str | Path, limit_public: int | None = None, **split: Any) -> None:
        super().__init__(**split)
        self.path, self.limit_public = Path(path), limit_public
        if not self.path.is_file():
            raise ArgumentError("path", str(path), "an existing .npz file of images and labels")
        self._arrays = self._read()
        if "private" not in self._arrays:
            known = ", ".join("/".join(pair) for pair in _NAMES["private"])
            raise ArgumentError("path", str(path), f"a file with images and labels named {known}", "Rename the arrays.")
        self.num_classes = 1 + max(int(y.max()) for _, y in self._arrays.values())
        if "public" in self._arrays:
            self.public_fraction = 0.0  # given, not split off

    def load(self) -> tuple[ArrayDataset, ArrayDataset | None]:
        return self._part("private"), self._part("test") if "test" in self._arrays else None

    def given_public(self) -> ArrayDataset | None:
        if "public" not in self._arrays:
            return None
        return self.limited(self._part("public"), self.limit_public)

    def _part(self, name: str) -> ArrayDataset:
        x, y = self._arrays[name]
        ids = [f"{name}-{i}" for i in range(len(x))]
        return ArrayDataset(x, y, num_classes=self.num_classes, box=(0.0, 1.0), ids=ids, every_class=name != "test")

    def _read(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                named = {
                    part: (archive[x], archive[y])
                    for part, pairs in _NAMES.items()
                    for x, y in pairs
                    if x in archive.files and y in archive.files
                }
        except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            allowed = "a NumPy archive (.npz) of plain arrays"
            raise ArgumentError("path", str(self.path), allowed, f"Reading it failed: {error}.") from error
        return {part: self._tensors(part, x, y) for part, (x, y) in named.items()}

    def _tensors(self, part: str, x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            kind = f"{part} images of shape {x.shape} and type {x.dtype}"
            raise ArgumentError("path", kind, "uint8 images (n, h, w) or (n, h, w, c)", "Save them as 0 to 255.")
        if not np.issubdtype(y.dtype, np.integer) or y.size != len(x):
            kind = f"{part} labels of shape {y.shape} and type {y.dtype}"
            raise ArgumentError("path", kind, f"integer labels ({len(x)},), one per image")
        images = torch.from_numpy(np.ascontiguousarray(x))
        images = images[:, None] if x.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(y.reshape(-1).astype(np.int64))
