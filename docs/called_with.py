"""For the reference: functions that are called with the fields of a record (`called_with`) are shown with these as arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_BY_NAME = griffe.ParameterKind.keyword_only


class CalledWith(griffe.Extension):
    """Gives such a function the parameters of its record, a dataclass of this package, in the order of its docstring."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for function in _functions(pkg):
            for decorator in function.decorators:
                name = str(decorator.value)
                if name.startswith("called_with(") and function.parent is not None:
                    record = pkg.modules_collection[function.parent.resolve(name[len("called_with(") : -1])]
                    explained = re.findall(r"^ {4}(\w+): ", function.docstring.value, re.MULTILINE)
                    found = [p for p in record.parameters if p.name != "self"]
                    found.sort(
                        key=lambda p: explained.index(p.name) if p.name in explained and p.kind is _BY_NAME else -1
                    )
                    function.parameters = griffe.Parameters(*found)


def _functions(holder: griffe.Module) -> Iterator[griffe.Function]:
    for member in holder.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Function):
            yield member
        elif isinstance(member, griffe.Module):
            yield from _functions(member)
