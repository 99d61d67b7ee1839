"""Two processes that do not make the same call: each says so, and nothing changes in either."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import Subset, TensorDataset

from lightning_muter import ThreatModel, refresh, take_snapshot, take_wide_snapshot, unlearn, unlearn_wide
from lightning_muter.errors import ArgumentError, MismatchError
from lightning_muter.model.distributed import Shards
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint

N = 12
OPTIONS: dict[str, Any] = {"threat_model": ThreatModel("l2", 0.1, None), "weight_decay": 0.1, "progress": False}


def data(order: list[int] | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 2, generator=generator).double(), torch.arange(N) % 3
    rows = order or list(range(N))
    return TensorDataset(x[rows], y[rows])


def model(shift: float = 0.0) -> torch.nn.Sequential:
    made = torch.nn.Sequential(torch.nn.Linear(2, 3)).double()
    torch.nn.init.zeros_(made[0].weight)
    torch.nn.init.constant_(made[0].bias, shift)
    return made


SWAPPED = [1, 0, *range(2, N)]
OTHER = [0] * N
#: What only the second process does otherwise, and what the message must name.
WAYS: dict[str, tuple[Callable[[int], object], str]] = {
    "weights": (lambda r: take_snapshot(model(r), data(), **OPTIONS), "weights"),
    "order": (
        lambda r: take_snapshot(model(), data(SWAPPED if r else None), **OPTIONS),
        "order of the rows of dataset",
    ),
    "rows": (lambda r: take_snapshot(model(), data(OTHER if r else None), **OPTIONS), "rows of dataset"),
    "number": (lambda r: take_snapshot(model(), Subset(data(), range(N - r)), **OPTIONS), "numbers of rows"),
    "options": (lambda r: take_snapshot(model(), data(), **OPTIONS, polish=r), "polish"),
    "threat model": (
        lambda r: take_snapshot(model(), data(), **(OPTIONS | {"threat_model": ThreatModel("l2", 0.1 + r, None)})),
        "threat_model",
    ),
    "every parameter": (lambda r: take_wide_snapshot(model(), data(SWAPPED if r else None), **OPTIONS), "order"),
    "wide request": (lambda r: unlearn_wide(model(), [r], data(), **OPTIONS), "request"),
    "request": (lambda r: request(forget=[3 + r]), "request"),
    "retained rows": (lambda r: request(retain=data(SWAPPED if r else None)), "order of the rows of retain"),
    "forgotten rows": (lambda r: request(of=data(OTHER if r else None)), "rows of data"),
    "steps": (lambda r: request(retain=data(), refine=r), "refine"),
    "refresh": (lambda r: refresh(*taken(), data(SWAPPED if r else None), progress=False), "order of the rows of data"),
}


def taken() -> tuple[Any, Any]:
    made = model()
    return made, take_snapshot(made, data(), **OPTIONS)


def request(of: Any = None, forget: Any = (3,), **options: Any) -> None:
    made, snapshot = taken()
    before = weight_fingerprint(made.state_dict())
    try:
        unlearn(made, snapshot, forget, of or data(), progress=False, **options)
    finally:
        assert weight_fingerprint(made.state_dict()) == before
        assert snapshot.forgotten == []


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    said = {}
    for name, (call, _) in WAYS.items():
        try:
            call(rank)
            said[name] = "silent"
        except MismatchError as error:
            said[name] = str(error)
    made, snapshot = taken()
    with pytest.raises(ArgumentError, match="forget"):  # the same mistake in both is said in both
        unlearn(made, snapshot, [N], data(), progress=False)
    unlearn(made, snapshot, iter([3]), data(), progress=False)
    said["key"] = snapshot.key_id
    try:
        with Shards.current().together():
            if rank:
                raise ValueError("only here")
    except (ValueError, MismatchError) as error:
        said["together"] = f"{type(error).__name__}: {error}"
    torch.save(said, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # see test_distributed: without the interpreter's finalisation


def test_processes_agree_or_nothing_happens(tmp_path: Path) -> None:
    mp.start_processes(_process, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (_, text) in WAYS.items():
        for said in both:
            assert text in said[name], (name, said[name])
    assert both[0]["key"] == both[1]["key"]  # one key for all
    assert both[0]["together"].startswith("MismatchError: process 1 of 2 refused")
    assert both[1]["together"] == "ValueError: only here"


def test_one_process_agrees_with_itself() -> None:
    shards = Shards()
    shards.agree({"rows": "a"})
    with pytest.raises(ValueError, match="mine"), shards.together():
        raise ValueError("mine")
    key = DigestKey.generate()
    assert take_snapshot(model(), data(), **OPTIONS, key=key).key_id == key.key_id
