"""One list of everything unsuitable: findings, and what is done about them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_muter.errors import UnsuitableError

Level = Literal["error", "skip", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something about model, loss, data, optimiser or trainer that unlearning cares about.

    Attributes:
        level: ``error`` cannot work at all (raised at fit start); ``skip`` lets the fit run, but no snapshot is taken
            and ``unlearn`` raises the same text; ``warning`` works with less meaning; ``note`` is good to know.
        what: what was found.
        advice: the next step.
    """

    level: Level
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.advice}".rstrip()


def enforce(findings: Iterable[Finding]) -> str | None:
    """Raise all errors together, warn of the rest together, and return why no snapshot can be taken (or None).

    Raises:
        UnsuitableError: there is an ``error``; the message lists every one of them.

    >>> enforce([Finding("note", "BatchNorm runs in eval mode.")]) is None
    True
    """
    findings = list(findings)
    errors = [f for f in findings if f.level == "error"]
    if errors:
        raise UnsuitableError("Unlearning will not be possible after this fit:\n" + _listed(errors))
    loud = [f for f in findings if f.level in ("skip", "warning")]
    if loud:
        warnings.warn("Unlearning, before the fit starts:\n" + _listed(loud), UserWarning, stacklevel=2)
    return skip_reason(findings)


def skip_reason(findings: Iterable[Finding]) -> str | None:
    """Why the snapshot is skipped, in the words that ``unlearn`` raises later; None if it is not."""
    skips = [str(f) for f in findings if f.level == "skip"]
    return "No snapshot was taken at the end of the fit: " + " ".join(skips) if skips else None


def _listed(findings: list[Finding]) -> str:
    return "\n".join(f"- {f}" for f in findings)
