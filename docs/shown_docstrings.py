"""Docstrings as the site shows them: doctests as examples, names of Sphinx roles as code."""

from __future__ import annotations

import re

try:
    from griffe import Extension
except ImportError:  # the site is built with the extra `docs`
    Extension = object


def shown(text: str) -> str:
    """A docstring with what readers of the source know in the words of the site's parser."""
    text = re.sub(r":(?:class|func|meth|mod|attr):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"^Example::$", "**Example**", text, flags=re.MULTILINE)
    text = re.sub(
        r"^\S.*$", lambda line: re.sub(r"(?<=\w)\*(?=[\s,.:/|)]|$)", r"\\*", line[0]), text, flags=re.MULTILINE
    )  # delta*
    parts = re.split(r"\n\n(?=>>> )", text, maxsplit=1)
    if len(parts) == 1:
        return text
    before, doctest = parts
    after = ""
    if found := re.search(r"\n\n(?!>>> )", doctest):  # text goes on behind the example
        doctest, after = doctest[: found.start()], doctest[found.start() :]
    lines = "\n".join(f"    {line}" if line else "" for line in doctest.splitlines())
    return f"{before}{after}\n\nExamples:\n{lines}"


class ShownDocstrings(Extension):  # type: ignore[misc, valid-type]
    """Applied by mkdocstrings to every object that a page names."""

    def on_instance(self, *, obj: object, **_: object) -> None:
        """Rewrite the docstring before it is parsed."""
        docstring = getattr(obj, "docstring", None)
        if docstring is not None:
            docstring.value = shown(docstring.value)
