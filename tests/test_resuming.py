"""Snapshots that go on after an interruption: the same numbers, and refusals of what does not belong together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError
from lightning_muter.snapshot.resume import Resumable
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.storage.fingerprint import DigestKey
from tests.cases import several_maxima
from tests.networks import data, relu_net


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class Cut(TensorDataset):
    """Fails at one row, once the allowed reads are used up: a process that dies in the middle."""

    def __init__(self, *tensors: Tensor, row: int = -1, reads: int = 0) -> None:
        super().__init__(*tensors)
        self.row, self.reads = row, reads

    def __getitem__(self, index: int) -> Any:
        if index == self.row:
            if self.reads == 0:
                raise KeyboardInterrupt
            self.reads -= 1
        return super().__getitem__(index)


def take(dataset: Any, resume: Resumable | None = None, **options: Any) -> Snapshot:
    options = {"threat_model": ThreatModel("l2", 0.05), "weight_decay": 0.01, "batch_size": 4, "polish": 0} | options
    # larger than memory: rows are read again in every pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_muter.model.dataset._CACHE_BYTES", 0)
        return take_snapshot(relu_net(), dataset, resume=resume, key=DigestKey(bytes(32)), progress=False, **options)


def interrupted(path: Path) -> TensorDataset:
    """A dataset whose snapshot was broken off at row 17 of 21 in the last pass."""
    tensors = data(21, 6).tensors
    with pytest.raises(KeyboardInterrupt):
        take(Cut(*tensors, row=17, reads=_reads_before_the_last_pass(tensors)), Resumable(path, 5))
    return TensorDataset(*tensors)


def _reads_before_the_last_pass(tensors: tuple[Tensor, ...]) -> int:
    counting = Cut(*tensors, row=17, reads=1000)
    take(counting)
    return 1000 - counting.reads - 2  # the sums read the row once, the digests once more


def test_local_maxima_are_weighed_in_parts_as_in_one_pass(tmp_path: Path) -> None:
    network, dataset, options = several_maxima()
    options |= {"batch_size": 6, "progress": False}
    options["like"] = take_snapshot(network, dataset, polish=15, **options)
    expected = take_snapshot(network, dataset, polish=0, **options)
    found = take_snapshot(network, dataset, polish=0, resume=Resumable(tmp_path / "partial", 12), **options)
    assert expected.figures["counts"]["contested"] > 1
    assert found.figures["counts"] == expected.figures["counts"]
    torch.testing.assert_close(found.hessian.blocks, expected.hessian.blocks, rtol=1e-12, atol=1e-12)


def test_an_interrupted_snapshot_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    dataset = interrupted(path)
    assert path.exists()
    untouched = Cut(*dataset.tensors, row=3, reads=1000)
    found = take(untouched, Resumable(path, 5))
    expected = take(dataset)
    assert not path.exists()
    for name in ("gradient", "theta_ref", "digests", "starts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)) or torch.allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-14
        ), name
    blocks = expected.hessian.blocks
    assert (found.hessian.blocks - blocks).norm() < 1e-12 * blocks.norm()
    assert found.figures["counts"] == expected.figures["counts"]
    assert found.stationarity == pytest.approx(expected.stationarity, rel=1e-12)


def test_uninterrupted_it_changes_nothing(tmp_path: Path) -> None:
    dataset = data(21, 6)
    found, expected = take(dataset, Resumable(tmp_path / "partial", 8)), take(dataset)
    assert (found.hessian.blocks - expected.hessian.blocks).norm() < 1e-12 * expected.hessian.blocks.norm()
    assert list(tmp_path.iterdir()) == []


def test_partial_sums_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    dataset = interrupted(path)
    kept = path.read_bytes()
    moved = TensorDataset(dataset.tensors[0].clone(), dataset.tensors[1])
    moved.tensors[0][2] += 1e-9
    with pytest.raises(MismatchError, match="not those at hand"):
        take(moved, Resumable(path, 5))
    for options in ({"response": "none"}, {"batch_size": 3}, {"threat_model": ThreatModel("l2", 0.06)}, {"polish": 2}):
        with pytest.raises(MismatchError, match="another computation"):
            take(dataset, Resumable(path, 5), **options)
    assert path.read_bytes() == kept
    path.write_bytes(kept[:-9] + b"\0" * 9)
    with pytest.raises(CorruptFileError):
        take(dataset, Resumable(path, 5))
    with pytest.raises(ArgumentError, match="every"):
        Resumable(path, 0)
