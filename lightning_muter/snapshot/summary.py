"""A snapshot in words: what it is of, which objective, what polish changed. For people, at the end of a fit and as `repr`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot


def decay_text(snapshot: Snapshot | WideSnapshot) -> str:
    """lambda of the parameters in scope, one number where it is one.

    A head whose bias is not decayed: "0.01 (bias 0)".
    """
    decay = snapshot.decay
    if isinstance(decay, Tensor):
        weight, last = float(decay[0, 0]), float(decay[0, -1])
        return f"{weight:g}" if weight == last else f"{weight:g} (bias {last:g})"
    assert isinstance(decay, Mapping)
    least, most = min(decay.values()), max(decay.values())
    return f"{most:g}" if least == most else f"{least:g} to {most:g}"
