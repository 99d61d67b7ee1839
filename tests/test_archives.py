"""Images in one NumPy archive: names, parts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_muter.errors import ArgumentError
from lightning_muter.study.data import ImageArchiveDataModule


def images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int, classes: int = 3) -> np.ndarray:
    return np.arange(count) % classes


def written(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "images.npz", **arrays)
    return path / "images.npz"


def test_given_parts_stay_as_they_are(tmp_path: Path) -> None:
    x = {part: images(n, 5, 4, 3, seed=n) for part, n in (("private", 30), ("public", 60), ("test", 9))}
    path = written(tmp_path, **{f"{p}_x": v for p, v in x.items()}, **{f"{p}_y": labels(len(v)) for p, v in x.items()})
    data = ImageArchiveDataModule(path=path, val_fraction=0.0, public_fraction=0.4, limit_public=30)
    assert data.in_shape == (3, 5, 4)
    assert (data.num_classes, len(data.private_dataset), len(data.public_dataset), len(data.test_dataset)) == (
        3,
        30,
        30,
        9,
    )
    for name, (value, label) in zip(data.sample_ids(), data.train_dataset, strict=True):
        at = int(name.removeprefix("private-"))
        torch.testing.assert_close(value, torch.tensor(x["private"][at]).permute(2, 0, 1) / 255)
        assert int(label) == at % 3
    assert torch.bincount(data.public_dataset.targets).tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")],
)
def test_names_of_keras_and_medmnist(tmp_path: Path, names: tuple[str, ...]) -> None:
    xs, ys, xt, yt = names
    path = written(
        tmp_path, **{xs: images(40, 6, 6), ys: labels(40)[:, None], xt: images(8, 6, 6), yt: labels(8)[:, None]}
    )
    data = ImageArchiveDataModule(path=path, val_fraction=0.1, public_fraction=0.5)
    assert data.in_shape == (1, 6, 6)
    assert len(data.test_dataset) == 8
    assert not set(data.private_dataset.ids) & set(data.public_dataset.ids)
    assert len(data.private_dataset) + len(data.public_dataset) + len(data.val_dataset) == 40


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"existing \.npz"):
        ImageArchiveDataModule(path=tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ArgumentError, match="plain arrays"):
        ImageArchiveDataModule(path=tmp_path / "text.npz")
    with pytest.raises(ArgumentError, match="train_images"):
        ImageArchiveDataModule(path=written(tmp_path, pictures=images(3, 2, 2), y=labels(3)))
    with pytest.raises(ArgumentError, match="float64"):
        ImageArchiveDataModule(path=written(tmp_path, private_x=np.zeros((3, 2, 2)), private_y=labels(3)))
    with pytest.raises(ArgumentError, match="one per image"):
        ImageArchiveDataModule(path=written(tmp_path, private_x=images(3, 2, 2), private_y=labels(4)))
    ran = tmp_path / "ran"
    evil = np.array([Evil(ran), Evil(ran), Evil(ran)], dtype=object)
    with pytest.raises(ArgumentError, match="plain arrays"):
        ImageArchiveDataModule(path=written(tmp_path, private_x=evil, private_y=labels(3)))
    assert not ran.exists()
