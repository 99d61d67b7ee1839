"""Every public name has a docstring, and so has every public method and property of its own."""

from __future__ import annotations

import inspect

import pytest

import lightning_muter
from lightning_muter import errors

PUBLIC = [getattr(lightning_muter, name) for name in lightning_muter.__all__]
PUBLIC += [value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__]


@pytest.mark.parametrize("value", PUBLIC, ids=lambda value: value.__name__)
def test_a_public_name_is_explained(value: object) -> None:
    assert value.__doc__
    if not inspect.isclass(value):
        assert "Args:" in value.__doc__
        return
    kinds = (property, classmethod, staticmethod)
    own = [
        n
        for n, m in vars(value).items()
        if not n.startswith(("_", "on_")) and (inspect.isfunction(m) or isinstance(m, kinds))
    ]
    assert [n for n in own if not inspect.getdoc(getattr(value, n))] == []
