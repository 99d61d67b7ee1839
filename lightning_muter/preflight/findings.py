"""One list of everything unsuitable: findings, and what is done about them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_muter.errors import UnsuitableError

Level = Literal["error", "skip", "warning", "note"]
TITLES: dict[Level, str] = {"error": "blocks", "skip": "no snapshot", "warning": "weaker", "note": "note"}
_STYLES = {"error": "bold red", "skip": "red", "warning": "yellow", "note": "dim"}


@dataclass(frozen=True)
class Finding:
    """Something about model, loss, data, optimiser or trainer that unlearning cares about.

    Attributes:
        level: ``error`` cannot work at all (raised at fit start); ``skip`` lets the fit run, but no snapshot is taken
            and ``unlearn`` raises the same text; ``warning`` works with less meaning; ``note`` is good to know.
        what: what was found.
        advice: the next step, in Python.     cli: the same on the command line, where there is one.
    """

    level: Level
    what: str
    advice: str = ""
    cli: str = ""

    @property
    def title(self) -> str:
        """The level as people read it: blocks, no snapshot, weaker, note."""
        return TITLES[self.level]

    def __str__(self) -> str:
        fix = f"{self.what} {self.advice}".rstrip()
        return f"{fix} Command line: {self.cli}" if self.cli else fix


def enforce(findings: Iterable[Finding], show: bool = False) -> str | None:
    """Raise all errors together, warn of the rest together, and return why no snapshot can be taken (or None).

    Args:
        show: on a terminal everything is said in a table instead of a warning.

    Raises:
        UnsuitableError: there is an ``error``; the message lists every one of them.

    >>> enforce([Finding("note", "BatchNorm runs in eval mode.")]) is None
    True
    """
    findings = list(findings)
    seen = show and _shown(findings)
    errors = [f for f in findings if f.level == "error"]
    if errors:
        raise UnsuitableError("Unlearning will not be possible after this fit:\n" + _listed(errors))
    loud = [f for f in findings if f.level in ("skip", "warning")]
    if loud and not seen:
        warnings.warn("Unlearning, before the fit starts:\n" + _listed(loud), UserWarning, stacklevel=2)
    return skip_reason(findings)


def skip_reason(findings: Iterable[Finding]) -> str | None:
    """Why the snapshot is skipped, in the words that ``unlearn`` raises later; None if it is not."""
    skips = [str(f) for f in findings if f.level == "skip"]
    return "No snapshot was taken at the end of the fit: " + " ".join(skips) if skips else None


def as_table(findings: Iterable[Finding]) -> Table:
    """The list as a table for people, the gravest first."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for column in ("level", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in sorted(findings, key=lambda f: list(TITLES).index(f.level)):
        fix = finding.advice + (f"\n{finding.cli}" if finding.cli else "")
        table.add_row(*(Text(part) for part in (finding.title, finding.what, fix)), style=_STYLES[finding.level])
    return table


def _shown(findings: list[Finding]) -> bool:
    """Print the table where somebody sits before a terminal; whether it was."""
    console = Console(stderr=True)
    if not console.is_terminal or not findings:
        return False
    console.print("MUter, before the fit starts:", as_table(findings))
    return True


def _listed(findings: list[Finding]) -> str:
    return "\n".join(f"- {f.title}: {f}" for f in findings)
