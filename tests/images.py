"""Folders of images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def write_images(folder: Path, classes: list[str], n: int = 8) -> None:
    for j, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20, 10), (40 * j, 10 * i, 255)).save(folder / name / f"{i}.png")
