"""Settings <-> JSON values and named tensors, by the fields they declare: nothing is listed twice, so nothing is lost.

    text, numbers, bool, None, lists, dicts with text keys      themselves
    Tensor                                                      {"$tensor": its name}, the tensor beside it
    dataclass                                                   its fields by name, those with metadata ``stored=False`` left out
    Extensible (Response, ...)                                  {"name", "module", "settings"}

Reading executes nothing that a file names: a class is found among those that were imported, by the name it gave itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from lightning_muter.errors import ArgumentError, MismatchError
from lightning_muter.extension import Extensible, extension_point, parameters_of

_TENSOR = "$tensor"


def stored_fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that files keep."""
    return [f for f in dataclasses.fields(kind) if f.init and f.metadata.get("stored", True)]


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON values; its tensors are added to ``tensors``, named by where they were found in ``name``.

    Raises:
        ArgumentError: something in it cannot be restored from a file that holds no code.
    """

    def inside(items: Mapping[str, Any]) -> dict[str, Any]:
        return {key: encode(item, f"{name}.{key}" if name else key, tensors) for key, item in items.items()}

    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Extensible):
        return _encode_extensible(value, name, inside)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return inside({f.name: getattr(value, f.name) for f in stored_fields(value)})
    if isinstance(value, Mapping) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return inside(value)
    if isinstance(value, (list, tuple)):
        return list(inside({str(i): item for i, item in enumerate(value)}).values())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArgumentError(
        name, type(value).__name__, "text, numbers, lists, dicts, tensors, dataclasses", "Files hold no code."
    )


def _encode_extensible(value: Extensible, name: str, inside: Any) -> dict[str, Any]:
    kind = type(value)
    if "name" not in vars(kind):
        raise ArgumentError(
            name,
            kind.__qualname__,
            "a class with a name of its own",
            f"Give it one: class {kind.__name__}: name = '...'.",
        )
    try:
        settings = value.settings()
    except AttributeError as error:
        raise ArgumentError(
            name, kind.__qualname__, f"a class that keeps the arguments of its constructor as attributes ({error})"
        ) from error
    return {"name": kind.name, "module": kind.__module__, "settings": inside(settings)}


def storable(value: Extensible) -> None:
    """Raise `ArgumentError` unless a file can restore an object of an extension point."""
    tensors: dict[str, Tensor] = {}
    root = extension_point(type(value))
    argument = root.__name__.lower()
    text = encode(value, argument, tensors)
    try:
        decode(root, text, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(
            argument,
            value,
            f"a {root.__name__} that its stored settings make again ({error})",
            "Check its constructor.",
        ) from error


def decode(kind: Any, value: Any, tensors: dict[str, Tensor]) -> Any:
    """What :func:`encode` made ``value`` of, if it is of type ``kind``; its tensors are taken out of ``tensors``.

    Raises:
        ValueError, TypeError, KeyError: it is not; MismatchError: its class was not imported.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _anything(value, tensors)
    if origin in (Union, UnionType):
        return _one_of(arguments, value, tensors)
    if origin is Literal:
        return _expect(value in arguments, kind, value)
    if isinstance(kind, type) and issubclass(kind, Tensor):
        _expect(isinstance(value, dict) and set(value) == {_TENSOR}, kind, value)
        return tensors.pop(value[_TENSOR])
    if isinstance(kind, type) and issubclass(kind, Extensible):
        return _decode_extensible(kind, value, tensors)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return _made(kind, value, {f.name: hints[f.name] for f in stored_fields(kind)}, tensors)
    base = origin or kind
    if base in (dict, Mapping):
        _expect(isinstance(value, dict), kind, value)
        item = arguments[1] if arguments else Any
        return {key: decode(item, entry, tensors) for key, entry in value.items()}
    if base in (list, Sequence, tuple):
        return _sequence(kind, base, arguments, value, tensors)
    allowed = (int, float) if kind is float else (kind,)
    return _expect(type(value) in allowed, kind, value)


def _expect(holds: bool, kind: Any, value: Any) -> Any:
    if not holds:
        raise ValueError(f"{str(value)[:80]!r} is not a {getattr(kind, '__name__', kind)}")
    return value


def _one_of(kinds: Sequence[Any], value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None and NoneType in kinds:
        return None
    problem: Exception = ValueError(f"{str(value)[:80]!r} is none of {kinds}")
    for kind in (k for k in kinds if k is not NoneType):
        at_hand = dict(tensors)
        try:
            found = decode(kind, value, at_hand)
        except (KeyError, TypeError, ValueError) as error:
            problem = error
            continue
        for name in tensors.keys() - at_hand.keys():
            del tensors[name]
        return found
    raise problem


def _sequence(kind: Any, base: Any, arguments: tuple[Any, ...], value: Any, tensors: dict[str, Tensor]) -> Any:
    _expect(isinstance(value, list), kind, value)
    if base is tuple and arguments and arguments[-1] is not Ellipsis:
        return tuple(decode(item, entry, tensors) for item, entry in zip(arguments, value, strict=True))
    made = [decode(arguments[0] if arguments else Any, entry, tensors) for entry in value]
    return tuple(made) if base is tuple else made


def _anything(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return decode(Tensor if set(value) == {_TENSOR} else dict[str, Any], value, tensors)
    return [_anything(entry, tensors) for entry in value] if isinstance(value, list) else value


def _made(kind: Any, value: Any, hints: Mapping[str, Any], tensors: dict[str, Tensor]) -> Any:
    """``kind`` of its arguments; one that the file lacks takes its default, one that is unknown is refused."""
    _expect(isinstance(value, dict), kind, value)
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{kind.__name__} has no {unknown[:3]}")
    return kind(**{key: decode(hints[key], entry, tensors) for key, entry in value.items()})


def _decode_extensible(root: type[Extensible], value: Any, tensors: dict[str, Tensor]) -> Any:
    _expect(isinstance(value, dict) and set(value) == {"name", "module", "settings"}, root, value)
    kind = root.known().get(value["name"])
    if kind is None:
        raise MismatchError(
            f"{root.__name__.lower()}: {str(value['name'])[:80]!r} is not known here; known: "
            f"{', '.join(sorted(root.known()))}. It was defined in {str(value['module'])[:200]!r}: import that module first."
        )
    try:
        hints = get_type_hints(kind.__init__)
    except NameError:  # annotations that are imported for a type checker alone
        hints = {}
    return _made(kind, value["settings"], {name: hints.get(name, Any) for name in parameters_of(kind)}, tensors)
