"""Whether somebody watches: bars are drawn on terminals and in notebooks, and are quiet in logs."""

from __future__ import annotations

import sys


def watched(show: bool = True) -> bool:
    """Whether a bar that was asked for is drawn.

    >>> watched(False)
    False
    """
    return show and (sys.stderr.isatty() or "ipykernel" in sys.modules)
