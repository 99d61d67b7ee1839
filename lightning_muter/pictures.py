"""Pictures of one's own result: how near to a minimum, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def stationarity_curve(values: Sequence[float], names: Sequence[str], title: str, axis: Any = None) -> Any:
    """Stationarity (0 is a minimum) at each point of a descent, on a logarithmic scale.

    Args:
        axis: matplotlib Axes to draw on; None makes a figure.

    Returns:
        the Axes.
    """
    import matplotlib.pyplot as plt

    if axis is None:
        _, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    axis.semilogy(range(len(values)), [max(v, 1e-16) for v in values], "o-", color="#0072B2")
    axis.set_xticks(range(len(values)), names, rotation=30 if len(values) > 5 else 0)
    axis.set(ylabel="stationarity", title=title)
    axis.grid(color="#dddddd", linewidth=0.6)
    return axis
