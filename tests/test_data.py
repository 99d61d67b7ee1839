"""DataModules: disjoint seeded parts, true file formats written here in small, and refusals by name."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, MNIST

from lightning_muter.errors import ArgumentError
from lightning_muter.study import data as d
from lightning_muter.study.data.arrays import regroup
from tests.images import write_images

# -- arrays ------------------------------------------------------------------------------------------------------------


def test_split_is_disjoint_complete_stratified_and_seeded() -> None:
    y = np.random.default_rng(0).integers(0, 3, 300)
    parts = d.stratified_split(y, [0.2, 0.5, 0.3], seed=4)
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))
    for part, share in zip(parts, [0.2, 0.5, 0.3], strict=True):
        for label in range(3):
            assert abs((y[part] == label).sum() - share * (y == label).sum()) <= 1
    again, other = d.stratified_split(y, [0.2, 0.5, 0.3], seed=4), d.stratified_split(y, [0.2, 0.5, 0.3], seed=5)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 2]), "label 2 at sample 1"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "label -1 at sample 1"),
        (torch.zeros(2, 3), torch.tensor([0, 0]), r"no sample of class \[1\]"),
        (torch.full((2, 3), 1.01), torch.tensor([0, 1]), "in the box"),
        (torch.tensor([[0.0], [float("nan")]]), torch.tensor([0, 1]), "sample 1"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 1]), "3 labels for 2 inputs"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "integer class indices"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "no samples"),
    ],
)
def test_bad_arrays_are_refused_by_name(x: torch.Tensor, y: torch.Tensor, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        d.ArrayDataset(x, y, num_classes=2, box=(0.0, 1.0))


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(ArgumentError, match="repeated ids"):
        d.ArrayDataset(torch.zeros(2, 1), torch.tensor([0, 1]), num_classes=2, ids=["a", "a"])


def test_regroup_merges_drops_and_refuses_overlap() -> None:
    kept, y = regroup(np.array([0, 1, 2, 3, 4]), [[0, 2], 3])
    assert kept.tolist() == [0, 2, 3]
    assert y.tolist() == [0, 0, 1]
    with pytest.raises(ArgumentError, match="one class only"):
        regroup(np.array([0, 1]), [[0, 1], 1])


# -- embedded ----------------------------------------------------------------------------------------------------------


def test_digits_parts_are_disjoint_and_in_the_box() -> None:
    dm = d.DigitsDataModule(seed=1)
    names = [set(part.ids) for part in (dm.public_dataset, dm.private_dataset, dm.val_dataset, dm.test_dataset)]
    assert sum(map(len, names)) == len(set.union(*names)) == 1797
    assert dm.in_shape == (1, 8, 8)
    assert dm.num_classes == 10
    x, y = dm.private_dataset[0]
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    batch, _ = next(iter(dm.train_dataloader()))
    assert batch.shape == (64, 1, 8, 8)
    assert dm.sample_ids() == dm.private_dataset.ids
    everything = d.DigitsDataModule(seed=1, part="all")
    assert len(everything.train_dataset) == len(dm.public_dataset) + len(dm.private_dataset)


def test_digits_as_two_classes() -> None:
    dm = d.DigitsDataModule(classes=[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]])
    whole = d.DigitsDataModule()
    assert dm.num_classes == 2
    by_id = dict(zip(whole.private_dataset.ids, whole.private_dataset.targets.tolist(), strict=True))
    for name, y in zip(dm.private_dataset.ids, dm.private_dataset.targets.tolist(), strict=True):
        assert name not in by_id or by_id[name] % 2 == y


def test_breast_cancer_is_standardised_by_the_training_part_alone() -> None:
    dm = d.BreastCancerDataModule(public_fraction=0.3)
    x = torch.cat([dm.public_dataset.x, dm.private_dataset.x]).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(30, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, unbiased=False), torch.ones(30, dtype=torch.float64), atol=1e-5, rtol=0)
    assert dm.test_dataset.x.mean(0).abs().max() > 1e-3
    assert dm.threat_box is None
    assert dm.in_shape == (30,)


def test_a_missing_part_and_impossible_shares_are_refused() -> None:
    with pytest.raises(ArgumentError, match="public_fraction"):
        _ = d.BreastCancerDataModule().public_dataset
    with pytest.raises(ArgumentError, match="val_fraction"):
        d.DigitsDataModule(public_fraction=0.95, val_fraction=0.1)
    with pytest.raises(ArgumentError, match="part"):
        d.DigitsDataModule(part="secret")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="limit"):
        _ = d.DigitsDataModule(limit_train=5).private_dataset


# -- MNIST -------------------------------------------------------------------------------------------------------------


def write_idx(folder: Path, *, gz: bool = False, n: int = 60, label: int | None = None) -> None:
    """The four idx-ubyte files: big-endian header (0x00000800 + dimensions, sizes), then bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        if label is not None:
            labels[0] = label
        files = {
            f"{name}-images-idx3-ubyte": struct.pack(">IIII", 0x803, n, 28, 28) + images.tobytes(),
            f"{name}-labels-idx1-ubyte": struct.pack(">II", 0x801, n) + labels.tobytes(),
        }
        for file, raw in files.items():
            (folder / (file + ".gz" * gz)).write_bytes(gzip.compress(raw, mtime=0) if gz else raw)


def test_mnist_from_idx_files(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST/raw")
    dm = d.MNISTDataModule(root=tmp_path, download=False, val_fraction=0.0)
    dm.prepare_data()
    assert len(dm.private_dataset) == len(dm.test_dataset) == 60
    first = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)[0]
    x, y = dm.private_dataset[0]
    torch.testing.assert_close(x[0], torch.from_numpy(first).float() / 255)
    assert int(y) == 0
    pooled = d.MNISTDataModule(root=tmp_path, download=False, val_fraction=0.0, pool=2)
    assert pooled.in_shape == (1, 14, 14)
    torch.testing.assert_close(pooled.private_dataset[0][0].mean(), x.mean())


def test_mnist_extracts_checksummed_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST/raw"
    write_idx(raw, gz=True)
    sums = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in sorted(raw.iterdir())]
    monkeypatch.setattr(MNIST, "resources", sums)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert len(d.MNISTDataModule(root=tmp_path, val_fraction=0.0).private_dataset) == 60
    for file in raw.glob("*-ubyte"):
        file.unlink()
    damaged = raw / sums[0][0]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(ArgumentError, match=r"Copy|copy the files"):
        _ = d.MNISTDataModule(root=tmp_path).private_dataset


def test_binary_mnist_keeps_two_digits(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST/raw")
    dm = d.BinaryMNISTDataModule(root=tmp_path, download=False, val_fraction=0.0)
    assert dm.num_classes == 2
    assert len(dm.private_dataset) == 12
    assert dm.private_dataset.targets.tolist() == [0, 1] * 6
    with pytest.raises(ArgumentError, match="two entries"):
        d.BinaryMNISTDataModule(root=tmp_path, classes=(1, 2, 3))


def test_mnist_label_outside_the_classes_and_truncated_file(tmp_path: Path) -> None:
    write_idx(tmp_path / "a/MNIST/raw", label=11)
    with pytest.raises(ArgumentError, match="label 11 at sample 0"):
        _ = d.MNISTDataModule(root=tmp_path / "a", download=False).private_dataset
    write_idx(tmp_path / "b/MNIST/raw")
    broken = tmp_path / "b/MNIST/raw/train-images-idx3-ubyte"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(ArgumentError, match="damaged"):
        _ = d.MNISTDataModule(root=tmp_path / "b", download=False).private_dataset


@pytest.mark.parametrize("module", [d.MNISTDataModule, d.CIFAR10DataModule, d.CovtypeBinaryDataModule])
def test_absent_files_say_what_to_put_where(tmp_path: Path, module: type) -> None:
    with pytest.raises(ArgumentError, match=r"(?s)root.*a folder that holds .*copy the files"):
        _ = module(root=tmp_path, download=False).private_dataset


# -- CIFAR-10, COVTYPE -------------------------------------------------------------------------------------------------


def write_cifar(folder: Path, per_batch: int = 20) -> dict[str, str]:
    """Python-pickle batches: dict of 'data' (n, 3072) uint8, channel-major, and 'labels'; and the meta file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {
            "data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(per_batch)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_cifar_from_pickles_with_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    sums = write_cifar(folder)
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    dm = d.CIFAR10DataModule(root=tmp_path, download=False, val_fraction=0.0)
    assert dm.in_shape == (3, 32, 32)
    assert len(dm.private_dataset) == 100
    raw = pickle.loads((folder / "data_batch_1").read_bytes())["data"][3].reshape(3, 32, 32)
    torch.testing.assert_close(dm.private_dataset[3][0], torch.from_numpy(raw).float() / 255)
    (folder / "data_batch_2").write_bytes(b"tampered")
    with pytest.raises(ArgumentError, match="CIFAR-10"):
        _ = d.CIFAR10DataModule(root=tmp_path, download=False).private_dataset


def test_covtype_from_the_fetchers_cache(tmp_path: Path) -> None:
    folder = tmp_path / "covertype"
    folder.mkdir()
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(200, 54)), rng.integers(1, 8, 200).astype(np.int32)
    x[:, 7] = 3.0
    joblib.dump(x, folder / "samples_py3", compress=9)
    joblib.dump(y, folder / "targets_py3", compress=9)
    dm = d.CovtypeBinaryDataModule(root=tmp_path, download=False, limit_train=120)
    assert dm.num_classes == 2
    assert dm.in_shape == (54,)
    assert (dm.private_dataset.x[:, 7] == 0).all()
    for name, label in zip(dm.private_dataset.ids, dm.private_dataset.targets.tolist(), strict=True):
        assert (y[int(name.removeprefix("cell-"))] == 2) == bool(label)
    unit = d.CovtypeBinaryDataModule(root=tmp_path, download=False, scale="unit")
    assert unit.threat_box == (0.0, 1.0)
    assert 0 <= float(unit.test_dataset.x.min()) <= float(unit.test_dataset.x.max()) <= 1


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folder_split_keeps_colours_and_names(tmp_path: Path) -> None:
    write_images(tmp_path, ["ann", "bob"], n=10)
    dm = d.ImageFolderDataModule(root=tmp_path, size=6, public_fraction=0.5, val_fraction=0.0)
    assert dm.in_shape == (3, 6, 6)
    assert dm.num_classes == 2
    assert not set(dm.private_dataset.ids) & set(dm.public_dataset.ids)
    for position, name in enumerate(dm.sample_ids()):
        who, number = name.removesuffix(".png").split("/")
        x, y = dm.private_dataset[position]
        assert int(y) == ["ann", "bob"].index(who)
        expected = torch.tensor([40 * int(y), 10 * int(number), 255]) / 255
        torch.testing.assert_close(x, expected[:, None, None].expand(3, 6, 6))


def test_lacuna_layout_has_other_people_in_public(tmp_path: Path) -> None:
    write_images(tmp_path / "private", ["p0", "p1"])
    write_images(tmp_path / "public", ["q0", "q1", "q2"], n=4)
    write_images(tmp_path / "test", ["p0", "p1"], n=3)
    dm = d.LacunaDataModule(root=tmp_path, size=8, val_fraction=0.0)
    assert (dm.num_classes, dm.public_dataset.num_classes) == (2, 3)
    assert (len(dm.private_dataset), len(dm.public_dataset), len(dm.test_dataset)) == (16, 12, 6)
    assert len(d.LacunaDataModule(root=tmp_path, part="public", val_fraction=0.0).train_dataset) == 12


def test_folder_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="VGGFace2"):
        d.LacunaDataModule(root=tmp_path / "none")
    (tmp_path / "empty/ann").mkdir(parents=True)
    with pytest.raises(ArgumentError, match="each hold an image"):
        d.ImageFolderDataModule(root=tmp_path / "empty")
    write_images(tmp_path / "bad", ["ann", "bob"], n=2)
    (tmp_path / "bad/ann/broken.png").write_bytes(b"no image")
    with pytest.raises(ArgumentError, match=r"broken\.png"):
        _ = d.ImageFolderDataModule(root=tmp_path / "bad").private_dataset
    write_images(tmp_path / "other/private", ["p0"], n=9)
    write_images(tmp_path / "other/test", ["p9"])
    with pytest.raises(ArgumentError, match="private part's classes"):
        _ = d.ImageFolderDataModule(root=tmp_path / "other").private_dataset
