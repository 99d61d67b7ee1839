"""Images in folders, one folder per class, with a public and a private part (Lacuna-10 and your own)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder

from lightning_muter.errors import ArgumentError
from lightning_muter.study.data.arrays import ArrayDataset
from lightning_muter.study.data.base import SplitDataModule


class ImageFolderDataModule(SplitDataModule):
    """Images under ``root``, resized to ``(3, size, size)`` in [0, 1] and kept in memory as 8-bit values.

    Layouts (a class is a folder of images)::

        root/<class>/*.png                               split by public_fraction / val_fraction / test_fraction
        root/{private,public,test}/<class>/*.png         as given; public and test are optional

    The public part may have classes of its own (Lacuna-100 beside Lacuna-10): ``public_dataset.num_classes`` counts them.
    Sample ids are the paths relative to the private folder, so that a person's pictures can be named.

    Args:
        root: the folder.
        size: side of the square the images are resized to (bilinear).
        grayscale: one channel instead of three.
    """

    def __init__(self, *, root: str | Path, size: int = 32, grayscale: bool = False, **split: Any) -> None:
        super().__init__(**split)
        self.root, self.size, self.grayscale = Path(root), size, grayscale
        if not self.root.is_dir():
            raise ArgumentError("root", str(root), "an existing folder of class folders", self.how_to_get())
        self.given_parts = (self.root / "private").is_dir()
        if self.given_parts and (self.root / "public").is_dir():
            self.public_fraction = 0.0  # given, not split off
        elif self.part == "public" and self.given_parts:
            raise ArgumentError("part", "public", "a folder 'public' beside 'private'")
        base = self.root / "private" if self.given_parts else self.root
        self.classes = self._source(base).classes
        self.num_classes = len(self.classes)

    def how_to_get(self) -> str:
        return "Put the images under root/<class>/, or root/private/<class>/ and root/public/<class>/."

    def _source(self, folder: Path) -> ImageFolder:
        try:
            return ImageFolder(str(folder))
        except FileNotFoundError as error:  # no class folder, or a class folder without an image
            raise ArgumentError("root", str(folder), "class folders that each hold an image", str(error)) from error

    def load(self) -> tuple[ArrayDataset, ArrayDataset | None]:
        if not self.given_parts:
            return self._array(self.root), None
        test = self.root / "test"
        return self._array(self.root / "private"), self._array(test, self.classes) if test.is_dir() else None

    def given_public(self) -> ArrayDataset | None:
        public = self.root / "public"
        return self._array(public) if self.given_parts and public.is_dir() else None

    def _array(self, folder: Path, classes: list[str] | None = None) -> ArrayDataset:
        source = self._source(folder)
        if classes is not None and source.classes != classes:
            raise ArgumentError(
                "root", f"{folder} has the classes {source.classes}", f"the private part's classes {classes}"
            )
        images = np.stack([self._read(Path(path)) for path, _ in source.samples])
        x = torch.from_numpy(images)
        x = x[:, None] if self.grayscale else x.permute(0, 3, 1, 2).contiguous()
        y = torch.as_tensor([label for _, label in source.samples])
        ids = [Path(path).relative_to(folder).as_posix() for path, _ in source.samples]
        return ArrayDataset(x, y, num_classes=len(source.classes), box=(0.0, 1.0), ids=ids)

    def _read(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                converted = image.convert("L" if self.grayscale else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ArgumentError("root", str(path), "a readable image", "Replace or remove that file.") from error
        return np.asarray(converted.resize((self.size, self.size), Image.Resampling.BILINEAR))


class LacunaDataModule(ImageFolderDataModule):
    """Lacuna-10 with Lacuna-100 as the public part: ten, and a hundred other, people of VGGFace2.

    ``root/private/<person>/``, ``root/public/<person>/`` (and optionally ``root/test/<person>/``). VGGFace2 may not be
    redistributed, so nothing is downloaded.

    Source: A. Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020.
    """

    def __init__(self, *, root: str | Path = "data_cache/lacuna10", size: int = 32, **split: Any) -> None:
        super().__init__(root=root, size=size, **split)

    def how_to_get(self) -> str:
        return (
            "Request VGGFace2 from its authors, draw ten people into root/private/<person>/ and a hundred others into "
            "root/public/<person>/."
        )
