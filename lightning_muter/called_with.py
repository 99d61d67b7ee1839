"""Functions of a record of settings that are called with its fields."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Fields = ParamSpec("Fields")
Settings = TypeVar("Settings")
Result = TypeVar("Result")


def bind(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """The arguments by name.

    Raises:
        TypeError: they do not fit, in the words of Python's own refusal, and how it is called.
    """
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        named = "unexpected keyword" in str(error)
        raise TypeError(
            f"{name}() {error}" + ("" if named else f". It is called as {name}({_form(signature)}).")
        ) from None


def _form(signature: inspect.Signature) -> str:
    """What may come by place, then the first of the rest by name."""
    by_name = [n for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
    by_place = [n for n in signature.parameters if n not in by_name]
    return ", ".join([*by_place, *(f"{n}=..." for n in by_name[:2]), *(["..."] if len(by_name) > 2 else [])])


def called_with(
    settings: Callable[Fields, Settings],
) -> Callable[[Callable[[Settings], Result]], Callable[Fields, Result]]:
    """A function of one record of settings, as a function of the record's fields: its signature and its errors are theirs, in the
    order in which its docstring explains them.

    What a caller may say is so written once, in the record, and goes through the code as one value.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Power:
    ...     base: float
    ...     exponent: float = 2.0
    >>> @called_with(Power)
    ... def power(asked: Power) -> float:
    ...     return asked.base**asked.exponent
    >>> power(3.0), power(2.0, exponent=3.0), list(inspect.signature(power).parameters)
    (9.0, 8.0, ['base', 'exponent'])
    """

    def decorate(function: Callable[[Settings], Result]) -> Callable[Fields, Result]:
        explained = re.findall(r"^ {4}(\w+): ", inspect.cleandoc(function.__doc__ or ""), re.MULTILINE)
        place = {name: i for i, name in enumerate(explained)}
        fields = inspect.signature(settings)
        told_first = sorted(
            fields.parameters.values(), key=lambda p: place.get(p.name, -1) if p.kind is p.KEYWORD_ONLY else -1
        )
        said = fields.replace(parameters=told_first)

        @functools.wraps(function)
        def call(*args: Fields.args, **kwargs: Fields.kwargs) -> Result:
            bind(function.__name__, said, args, kwargs)
            return function(settings(*args, **kwargs))

        told: Any = call
        told.__signature__ = said.replace(return_annotation=inspect.signature(function).return_annotation)
        return call

    return decorate
