"""Functions whose arguments are the fields of a record: what callers and `help` see of them."""

from __future__ import annotations

import inspect
import pydoc

import pytest

from lightning_muter import take_snapshot, take_wide_snapshot, unlearn, unlearn_wide

#: What scripts of before name; none may go.
BOTH = {
    "scope", "threat_model", "attack", "trades_beta", "response", "curvature", "loss", "weight_decay", "optimizers", "smoothing",
    "inner", "sample_weight", "collate", "batch_size", "num_workers", "inputs", "label", "progress",
}  # fmt: skip
TAKE = {"model", "dataset", *BOTH, "polish", "device", "key", "normalization", "reading"}
REMOVE = {
    "model", "forget", "data", *BOTH, "forgotten", "steps", "damping", "cg", "tolerance", "seconds", "shards", "dry_run",
}  # fmt: skip


@pytest.mark.parametrize(("door", "names", "first"), [(take_wide_snapshot, TAKE, 2), (unlearn_wide, REMOVE, 3)])
def test_help_shows_every_argument(door: object, names: set[str], first: int) -> None:
    assert callable(door)
    parameters = inspect.signature(door).parameters
    assert set(parameters) == names
    kinds = [p.kind for p in parameters.values()]
    assert kinds[:first] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * first
    assert set(kinds[first:]) == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters["scope"].default == "all"
    shown = pydoc.plain(pydoc.render_doc(door))
    assert all(f"{name}:" in shown.split("Args:")[0] for name in names)


def test_arguments_come_in_the_order_in_which_they_are_explained() -> None:
    assert list(inspect.signature(take_snapshot).parameters)[:4] == ["model", "dataset", "threat_model", "attack"]
    assert list(inspect.signature(unlearn).parameters)[:6] == [
        "model",
        "snapshot",
        "forget",
        "data",
        "method",
        "solver",
    ]


def test_what_is_no_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"take_wide_snapshot\(\) got an unexpected keyword argument 'polsh'"):
        take_wide_snapshot(None, [], polsh=2)  # type: ignore[call-arg, arg-type]
    with pytest.raises(TypeError, match=r"unlearn_wide\(\) missing a required argument: 'data'"):
        unlearn_wide(None, [3])  # type: ignore[call-arg, arg-type]
