"""Figures for a person who decides: each with its value, one line that says what it means, and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_muter.study.report.tables import markdown_table


@dataclass(frozen=True)
class Figure:
    """One line. ``source``: a Markdown link to the file it was read from, or empty."""

    name: str
    value: str
    meaning: str
    source: str = ""


def figures_markdown(figures: Sequence[Figure]) -> str:
    """The lines as a table; empty for none."""
    if not figures:
        return ""
    body = [(f"**{f.name}**", f.value, f.meaning, f.source) for f in figures]
    return markdown_table(("figure", "value", "what it means", "source"), body) + "\n"


def link(text: str, path: str) -> str:
    """A Markdown link to a file beside the page.

    >>> link("receipt 1", "a b.json")
    '[receipt 1](a%20b.json)'
    """
    return f"[{text}]({path.replace(' ', '%20')})"


def points(value: float, signed: bool = False) -> str:
    """A share as per cent, or a difference as points.

    >>> points(0.914), points(-0.4, signed=True)
    ('91.4 %', '-0.4 points')
    """
    return f"{value:+.1f} points" if signed else f"{100 * value:.1f} %"
