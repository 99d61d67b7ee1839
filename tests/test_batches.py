"""Batches of every structure are taken apart and put together again unchanged but for the inputs."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch

from lightning_muter.errors import ArgumentError
from lightning_muter.model.batches import split_batch

X, Y, W = torch.linspace(0, 1, 12).reshape(4, 3), torch.arange(4), torch.tensor([0.5, 1.0, 0.2, 0.7])
Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, W),
        [Y, X, Y, W],
        Pair(X, Y),
        ("name", X, None, Y),
        {"x": X, "y": Y},
        {"image": X, "label": Y, "weight": W, "id": ["a", "b", "c", "d"]},
        OrderedDict(inputs=X, targets=Y),
        UserDict(Image=X, Target=Y),
        {"data": X, "labels": W},
    ],
    ids=[
        "pair",
        "list",
        "triple",
        "weights around",
        "named",
        "text and none",
        "dict",
        "dict of more",
        "ordered",
        "user",
        "labels only",
    ],
)
def test_only_the_inputs_change(batch) -> None:
    x, y, rebuild = split_batch(batch)
    assert x is X
    assert y is Y or y is W
    new = rebuild(X + 1)
    assert type(new) is type(batch)
    keys = list(batch) if hasattr(batch, "keys") else range(len(batch))
    assert len(new) == len(batch)
    for k in keys:
        if batch[k] is X:
            assert torch.equal(new[k], X + 1)
        else:
            assert new[k] is batch[k]
    assert split_batch(batch)[0] is X  # the batch itself was not touched


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (X, "a tuple or list"),
        ((X,), "No tensor follows"),
        ((Y, X), "No tensor follows"),
        ((torch.zeros(4, 3, dtype=torch.uint8), Y), "x / 255"),
        ({"x": torch.zeros(4, 3, dtype=torch.uint8), "y": Y}, "x / 255"),
        ({"x": X}, "0 of the keys y, label"),
        ({"x": X, "image": X, "y": Y}, "2 of the keys x, image"),
        ({"x": X, "y": 3}, "'y': int"),
        ((X, Y[:2]), "first sizes must agree"),
        ((X, torch.tensor(1)), "first sizes must agree"),
        (((X, X), Y), "a tuple or list"),
        ("text", "a tuple or list"),
    ],
)
def test_other_forms_are_refused_with_their_structure(batch, words) -> None:
    with pytest.raises(ArgumentError) as caught:
        split_batch(batch)
    assert words in str(caught.value)
    assert "tensor([" not in str(caught.value)
