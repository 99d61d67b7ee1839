"""Classes that users extend by subclassing: found by their name, described by the arguments of their constructor."""

from __future__ import annotations

import inspect
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

    @classmethod
    def known(cls) -> dict[str, Any]:
        """The classes below this one that can be made, by name; of two with one name the later one."""
        found: dict[str, Any] = {}
        for kind in cls.__subclasses__():
            found |= kind.known()
            if "name" in vars(kind) and not inspect.isabstract(kind):
                found[kind.name] = kind
        return found

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
        fields = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({fields})"


def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class's constructor by name, ``*args`` and ``**kwargs`` left out."""
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in inspect.signature(kind).parameters.items() if p.kind in fixed}
