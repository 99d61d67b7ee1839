"""Every public name says what it computes, every argument, what comes back, with an example; so do its public methods.

Public is what the pages of the documentation's reference list: the names of `lightning_muter`, errors, extension points.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import lightning_muter

from .readme import ROOT

PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
PATHS = [path for page in PAGES for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]
#: Of Lightning, which says what comes in.
HOOKS = ("setup", "teardown", "state_dict", "load_state_dict")
#: A section's entry: "name: text", indented by eight spaces (four below its title) or more in a method.
ENTRY = re.compile(r"^ {4}(\w+): \S", re.MULTILINE)


def _value(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def section(text: str, *titles: str) -> str:
    """The lines below a title, up to the next line that is not indented."""
    found = re.search(rf"^(?:{'|'.join(titles)}):\n((?: {{4}}.*\n?|\n)+)", text, re.MULTILINE)
    return found[1] if found else ""


def unexplained(function: Callable[..., Any], text: str) -> list[str]:
    """Arguments without an entry."""
    skipped = ("self", "cls", "args")
    names = [name for name in inspect.signature(function).parameters if name not in skipped]
    return sorted(set(names) - set(ENTRY.findall(section(text, "Args", "Attributes"))))


def members(kind: type) -> dict[str, Any]:
    """Public methods and properties that a class of this package defines, those of private bases included."""
    found: dict[str, Any] = {}
    for base in reversed([b for b in kind.__mro__ if b.__module__.startswith("lightning_muter")]):
        found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    kinds = (property, classmethod, staticmethod)
    return {n: v for n, v in found.items() if inspect.isfunction(v) or isinstance(v, kinds) or hasattr(v, "func")}


def test_the_check_sees_what_is_missing() -> None:
    def known(a: int, b: int) -> int:
        """Sum.

        Args:
            a: one.

        Returns:
            b: not of this section.
        """
        return a + b

    assert unexplained(known, inspect.getdoc(known) or "") == ["b"]


def test_the_reference_has_every_public_name() -> None:
    names = {path.rsplit(".", 1)[1] for path in PATHS}
    assert set(lightning_muter.__all__) - names == set()
    assert len(PATHS) == len(set(PATHS))


@pytest.mark.parametrize("path", PATHS)
def test_a_public_name_is_explained(path: str) -> None:
    value = _value(path)
    text = inspect.cleandoc(value.__doc__ or "")
    assert text.split("\n\n")[0].endswith((".", ":")), "a first sentence"
    assert ">>> " in text or "Example::" in text, "an example"
    if not inspect.isclass(value):
        assert unexplained(value, text) == []
        assert section(text, "Returns"), "what comes back"
        assert section(text, "Raises"), "which errors"
    elif dataclasses.is_dataclass(value):
        bases = "\n".join(
            inspect.cleandoc(base.__doc__ or "") for base in value.__mro__ if dataclasses.is_dataclass(base)
        )
        known = {n for part in re.split(r"(?=^Attributes:|^Args:)", bases, flags=re.MULTILINE)
                 for n in ENTRY.findall(section(part, "Args", "Attributes"))}  # fmt: skip
        assert {f.name for f in dataclasses.fields(value) if f.repr} - known == set()
    elif value.__init__ is not object.__init__ and not issubclass(value, Exception):
        assert unexplained(value, text) == []


@pytest.mark.parametrize("path", [path for path in PATHS if inspect.isclass(_value(path))])
def test_its_methods_are_explained(path: str) -> None:
    kind = _value(path)
    for name, member in members(kind).items():
        text = inspect.getdoc(getattr(kind, name, None)) or ""
        if isinstance(member, property) or hasattr(member, "func"):
            text = inspect.getdoc(member) or text
        assert text, f"{path}.{name}"
        if inspect.isfunction(member) and name not in HOOKS and not name.startswith("on_"):
            said = set(re.findall(r"\w+", text))  # an entry of its own, or a word of the sentence
            missing = [n for n in inspect.signature(member).parameters if n != "self" and n not in said]
            assert missing == [], f"{path}.{name}"
