"""Every field of every stored setting survives save and load; files of version 1 still load and serve a request."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_muter import Snapshot, ThreatModel, WideSnapshot, take_snapshot, take_wide_snapshot, unlearn
from lightning_muter.curvature.hessian.sums import BlockSymmetric
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.response.choose import Response
from lightning_muter.errors import CorruptFileError
from lightning_muter.extension import Extensible, parameters_of
from lightning_muter.snapshot.codec import decode, encode

pytestmark = pytest.mark.filterwarnings(
    "ignore:(The head is not stationary|The weights are not stationary|The last system ended|Head scope leaves)"
)
FORMAT_1 = Path(__file__).parent / "data" / "format_1"
#: Arguments that are checked when the object is made, by name; all others are drawn from their type.
ALLOWED = {
    "norm": st.sampled_from(["l2", "linf"]),
    "eps": st.floats(0, 9),
    "box": st.none() | st.just((-2.5, 1.0)),
    "damping": st.floats(0.01, 0.99),
    "sketch": st.none() | st.integers(0, 9),
    "directions": st.none() | st.integers(1, 9),
    "terms": st.integers(1, 99),
    "space": st.sampled_from(["features", "inputs"]),
}
st.register_type_strategy(Tensor, st.lists(st.floats(-9, 9), max_size=3).map(torch.tensor))


def drawn(name: str, hint: Any) -> st.SearchStrategy[Any]:
    if name in ALLOWED:
        return ALLOWED[name]
    if hint is float:
        return st.floats(allow_nan=False)
    return st.sampled_from(hint.__args__) if get_origin(hint) is Literal else st.from_type(hint)


def made(kind: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind.__init__)
    return st.builds(kind, **{name: drawn(name, hints[name]) for name in parameters_of(kind)})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Extensible):
        return type(a) is type(b) and same(a.settings(), b.settings())
    if dataclasses.is_dataclass(a):
        fields = dataclasses.fields(a)
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    return type(a) is type(b) and (a == b or (a != a and b != b))


@pytest.mark.parametrize("kind", [ThreatModel, InnerSolver, Smoothing, BlockSymmetric, *Response.known().values()])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_field_of_a_setting_survives(kind, data):
    value = data.draw(made(kind))
    tensors: dict[str, Tensor] = {}
    text = encode(value, "here", tensors)
    found = decode(Response if isinstance(value, Response) else kind, text, tensors)
    assert same(value, found)
    assert not tensors


def points(n: int = 12) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.rand(n, 3, dtype=torch.float64), torch.arange(n) % 2)


INNER = InnerSolver(tolerance=1e-6, max_iter=20, starts=1, rivals=1, tracking=2, finish=1)
OPTIONS: dict[str, Any] = {
    "threat_model": ThreatModel("linf", 0.05),
    "weight_decay": 0.05,
    "sample_weight": torch.linspace(1, 2, 12, dtype=torch.float64),
    "inner": INNER,
    "smoothing": Smoothing(1.1, 0.04, None, 0.02),
    "progress": False,
}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def of_the_head(model: nn.Sequential, data: Any) -> Snapshot:
    model[0].requires_grad_(False)
    return take_snapshot(model, data, polish=3, **OPTIONS)


def of_the_network(model: nn.Sequential, data: Any) -> WideSnapshot:
    return take_wide_snapshot(model, data, polish=2, trades_beta=2.0, **OPTIONS)


@pytest.mark.parametrize("take", [of_the_head, of_the_network])
def test_the_same_request_in_memory_and_reloaded_gives_the_same_bits(take, tmp_path):
    model, data = network(), points()
    snapshot = take(model, data)
    for forget in ([3, 7], [5]):  # a second request: after the first, more is stored
        snapshot.save(tmp_path / "a.muter.snapshot")
        loaded, other = Snapshot.load(tmp_path / "a.muter.snapshot"), copy.deepcopy(model)
        for f in dataclasses.fields(snapshot):
            assert same(getattr(snapshot, f.name), getattr(loaded, f.name)) or f.name == "key", f.name
        assert loaded.inner == INNER
        for net, stored in ((model, snapshot), (other, loaded)):
            unlearn(net, stored, forget, data, retain=data, refine=1, progress=False)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_field_that_an_older_file_lacks_takes_its_default(tmp_path):
    model, data = network(), points()
    fields, tensors = of_the_head(model, data).encoded()
    for name in ("figures", "sample_weight"):
        del fields[name]
    del tensors["sample_weight"]
    found = decode(Snapshot, fields, tensors)
    assert (found.figures, found.sample_weight) == ({}, None)


@pytest.mark.parametrize(("name", "kind"), [("head", Snapshot), ("network", WideSnapshot)])
def test_files_of_version_1_serve_a_request(name, kind, tmp_path):
    """Made at commit a6d73ef (0.1.0) after a first request, with the weights before and after a second one."""
    for suffix in ("snapshot", "key"):
        (tmp_path / f"a.muter.{suffix}").write_bytes((FORMAT_1 / f"{name}.muter.{suffix}").read_bytes())
        (tmp_path / f"a.muter.{suffix}").chmod(0o600)
    held = load_file(FORMAT_1 / f"{name}.safetensors")
    head = nn.Sequential(nn.Linear(3, 2))
    model = (head if name == "head" else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).double()
    before, after = ({k: held[f"{when}.{k}"] for k in model.state_dict()} for when in ("before", "after"))
    model.load_state_dict(before)
    with pytest.raises(CorruptFileError, match=r"no seal.*unsealed=True"):
        Snapshot.load(tmp_path / "a.muter.snapshot")
    snapshot = Snapshot.load(tmp_path / "a.muter.snapshot", unsealed=True)
    assert type(snapshot) is kind
    assert snapshot.forgotten == [5]
    data = TensorDataset(held["x"], held["y"])
    unlearn(model, snapshot, [2, 9], data, retain=data, refine=2, progress=False)
    moved = max(float((after[k] - before[k]).norm()) for k in before)
    assert max(float((w - after[k]).norm()) for k, w in model.state_dict().items()) < 0.02 * moved
    snapshot.save(tmp_path / "b.muter.snapshot")
    assert Snapshot.load(tmp_path / "b.muter.snapshot").forgotten == [5, 2, 9]
