"""Classes that users extend by subclassing: found by their name, described by the arguments of their constructor."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

from lightning_muter.errors import ArgumentError


class Extensible:
    """Base of an extension point. A subclass that gives itself a ``name`` is found by it, in settings and in files.

    Its state is the arguments of its constructor, each kept as an attribute of the same name.

    >>> class Shape(Extensible): pass
    >>> class Square(Shape):
    ...     name = "square"
    ...     def __init__(self, side: float = 1.0) -> None: self.side = side
    >>> Shape.named("square")(2.0)
    Square(side=2.0)
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name, root = vars(cls).get("name"), extension_point(cls)
        for other in _below(root) if name is not None else ():
            # one class that is imported again is no other class
            if other is not cls and vars(other).get("name") == name and other.__qualname__ != cls.__qualname__:
                raise ArgumentError(
                    "name",
                    name,
                    f"a name that no other {root.__name__} has ({other.__module__}.{other.__qualname__} has it)",
                    f"Files name a {root.__name__} by it: choose another.",
                )

    @classmethod
    def known(cls) -> dict[str, Any]:
        """The classes below this one that can be made, by name."""
        return {kind.name: kind for kind in _below(cls) if "name" in vars(kind) and not inspect.isabstract(kind)}

    @classmethod
    def named(cls, name: str) -> Any:
        """The class of this name.

        Raises:
            ArgumentError: there is none.
        """
        known, what = cls.known(), cls.__name__
        if name not in known:
            allowed = f"{', '.join(map(repr, sorted(known)))} or the name of a {what} of your own"
            raise ArgumentError(what.lower(), name, allowed, f"Import the module of your {what} first.")
        return known[name]

    def settings(self) -> dict[str, Any]:
        """The arguments that make an equal object.

        Raises:
            AttributeError: one of them is not kept.
        """
        return {name: getattr(self, name) for name in parameters_of(type(self))}

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"


def extension_point(kind: type[Extensible]) -> type[Extensible]:
    """The extension point that a class belongs to."""
    return next(k for k in kind.__mro__ if Extensible in k.__bases__)


def _below(kind: type[Extensible]) -> Iterator[type[Extensible]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class's constructor by name, ``*args`` and ``**kwargs`` left out."""
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in inspect.signature(kind).parameters.items() if p.kind in fixed}
