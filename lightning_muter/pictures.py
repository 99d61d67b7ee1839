"""Pictures of one's own result: how near to a minimum, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

_LINE, _GRID = "#0072B2", "#dddddd"
_SOFT: dict[str, Any] = {"fontsize": 8, "color": "#555555"}


def stationarity_curve(values: Sequence[float], names: Sequence[str], title: str, axis: Any = None) -> Any:
    """Stationarity (0 is a minimum) at each named point of a descent, on a logarithmic scale.

    Args:
        values: at each point.
        names: of the points, one each.
        title: above the picture.
        axis: matplotlib Axes to draw on; None makes a figure.

    Returns:
        the Axes.
    """
    axis = _drawn(range(len(values)), values, title, "stationarity", axis)
    crowded = len(names) > 5 or sum(map(len, names)) > 50
    axis.set_xticks(range(len(values)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axis.set_xlim(-0.6, len(values) - 0.4)
    return axis


def descent_curve(values: Sequence[float], of: str, each: str, title: str, axis: Any = None) -> Any:
    """A measure of a descent over its steps, from 0 on, on a logarithmic scale; first and last value are written beside them.

    Args:
        values: at the beginning and after each step.
        of: what they are.
        each: what a step is, for the axis.
        title: above the picture.
        axis: matplotlib Axes to draw on; None makes a figure.

    Returns:
        the Axes.
    """
    from matplotlib.ticker import MaxNLocator

    axis = _drawn(range(len(values)), values, title, of, axis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(each)
    axis.margins(x=0.08)
    return axis


def _drawn(steps: Sequence[int], values: Sequence[float], title: str, label: str, axis: Any) -> Any:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    if axis is None:
        _, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    size = 5 if len(values) <= 12 else 3
    axis.semilogy(list(steps), [max(v, 1e-16) for v in values], "o-", color=_LINE, markersize=size, linewidth=1.5)
    axis.set(ylabel=label)
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    shown = [max(v, 1e-16) for v in values]
    low, high = math.log10(min(shown)), math.log10(max(shown))
    bottom = math.floor(low - 0.3) if high - low < 1 else low - 0.15 * (high - low)
    top = max(math.ceil(high), bottom + 1) if high - low < 1 else high + 0.15 * (high - low)
    axis.set_ylim(10.0**bottom, 10.0**top)  # with a power of ten in sight, which alone is labelled
    axis.yaxis.set_minor_formatter(NullFormatter())
    for at, above in {0: True, len(values) - 1: False}.items():
        offset = (0, 7 if above else -14)
        axis.annotate(f"{values[at]:.1e}", (at, shown[at]), offset, textcoords="offset points", ha="center", **_SOFT)
    return axis


def log_scale(axes: Any, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers: 0.3, not 3 x 10^-1; between powers of ten where hardly one is in sight."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")

    def between(value: float, _: int) -> str:
        low, high = axis.get_view_interval()
        digit = value / 10.0 ** math.floor(math.log10(value))
        return f"{value:g}" if high < 30 * low and round(digit) in (2, 3, 5) else ""

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(between)
