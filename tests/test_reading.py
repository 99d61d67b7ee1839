"""The loss read off a training step: equal to it on other rows at other weights, without a trace; or refused by name."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.read_step import read_batch
from lightning_muter.model.reading import Reading
from tests.forms import ACCEPTED, REFUSED, Form, Meter, of_step
from tests.readings import of_reading

NEAR = {torch.float32: 1e-5, torch.float64: 1e-9}


def plain(value: Any) -> Any:
    """A copy in which objects are what they hold."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return plain(vars(value)) if isinstance(value, Meter) else copy.deepcopy(value)


def traces(module: Any) -> Any:
    """Whatever reading must not change."""
    attributes = [
        {
            k: copy.deepcopy(v)
            for k, v in vars(m).items()
            if k not in ("_parameters", "_buffers", "_modules", "_trainer")
        }
        for m in module.modules()
    ]
    return {
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "buffers": {k: v.clone() for k, v in module.named_buffers()},
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "attributes": attributes,
        "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and (one == other or repr(one).split(" at 0x")[0] == repr(other).split(" at 0x")[0])


def read(form: Form, dtype: torch.dtype = torch.float32, hidden: int = 0, n: int = 12) -> tuple[Any, Reading]:
    module = form.module(hidden, dtype).train()
    for p in module.head.parameters():
        p.grad = torch.ones_like(p)
    before = traces(module)
    reading = read_batch(module, form.batch(n, 0, dtype))
    after = traces(module)
    for name in before:
        assert same(before[name], after[name]), name
    return module, reading


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_step(name: str) -> None:
    form = ACCEPTED[name]
    hidden, dtype = (5, torch.float64) if len(name) % 2 else (0, torch.float32)
    module, reading = read(form, dtype, hidden)
    assert (reading.convex, reading.denominator) == (form.convex, form.denominator)
    with torch.random.fork_rng():
        for n, seed, moved in ((12, 0, 0.0), (12, 0, 0.5), (5, 1, 0.5), (9, 2, 2.0)):
            torch.manual_seed(seed)
            with torch.no_grad():
                for p in module.head.parameters():
                    p.add_(moved * torch.randn_like(p))
            batch = form.batch(n, seed, dtype)
            step = of_step(module, reading.prepared(batch))
            read_off = of_reading(reading, batch)
            off = float((step[1] - read_off[1]).norm() / step[1].norm().clamp(min=1e-12))
            near = max(NEAR[dtype], NEAR[step[0].dtype])
            assert off <= near, (n, moved, off)
            assert abs(float(step[0] - read_off[0])) <= near * max(1.0, abs(float(step[0])))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_step(name: str) -> None:
    form = REFUSED[name]
    module = form.module(5 if name in ("a loss on features",) else 0)
    before = traces(module)
    with pytest.raises(UnsuitableError, match=form.refused):
        read_batch(module, form.batch(12))
    after = traces(module)
    for kind in before:
        assert same(before[kind], after[kind]), kind
