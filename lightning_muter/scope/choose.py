"""Which scope is meant: by what a caller says, or by what was stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_muter.scope.base import S, Scope
from lightning_muter.scope.head import HeadScope
from lightning_muter.scope.network import NetworkScope

#: Every kind, for what is stored of it.
KINDS: tuple[type[Scope[Any]], ...] = (HeadScope, NetworkScope)


def as_scope(given: str | Sequence[str] | Scope[Any]) -> Scope[Any]:
    """The scope that is asked for.

    Args:
        given: "head"; "all" or patterns over the names of parameters; or a scope.

    >>> as_scope("head"), as_scope(["layer4.*"])
    (HeadScope(), NetworkScope(patterns=['layer4.*']))
    """
    if isinstance(given, Scope):
        return given
    return HeadScope() if given == "head" else NetworkScope(given)


def scope_of(snapshot: S) -> Scope[S]:
    """The scope that a snapshot was taken of."""
    return next(kind.of(snapshot) for kind in KINDS if isinstance(snapshot, kind.record))
