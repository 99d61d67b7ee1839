"""Which rows a request names: checked before anything is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from lightning_muter.errors import ArgumentError, RequestError
from lightning_muter.snapshot.stored import Stored


def checked_positions(forget: Iterable[int], snapshot: Stored) -> list[int]:
    """Positions to forget, as a list.

    Raises:
        ArgumentError: empty, not whole numbers, out of range or twice.
        RequestError: already forgotten, or nothing would be left.
    """
    if isinstance(forget, (str, bytes)) or not isinstance(forget, Iterable) or getattr(forget, "ndim", 1) != 1:
        raise ArgumentError("forget", forget, "positions in the training dataset, e.g. [3, 17]")
    values = forget.tolist() if isinstance(forget, Tensor) else list(forget)
    positions = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ArgumentError(
                "forget", value, "whole numbers",
                "Pass positions in the training dataset; those of a mask are mask.nonzero().flatten().tolist().",
            )  # fmt: skip
        positions.append(value.__index__())
    if not positions:
        raise ArgumentError("forget", positions, "at least one position", "Pass positions in the training dataset.")
    out = [i for i in positions if not 0 <= i < snapshot.n_total]
    if out:
        raise ArgumentError(
            "forget", out[:5], f"positions from 0 to {snapshot.n_total - 1}", "Negative ones do not count."
        )
    if len(set(positions)) != len(positions):
        twice = sorted(i for i, count in Counter(positions).items() if count > 1)[:5]
        raise ArgumentError("forget", twice, "each position once", "Remove the duplicates.")
    again = sorted(set(positions) & set(snapshot.forgotten))
    if again:
        raise RequestError(
            f"forget: positions {again[:5]} were forgotten before; allowed: positions not yet forgotten. Leave them out; "
            "nothing remains to be done for them."
        )
    never = sorted(set(positions) & set(snapshot.absent))
    if never:
        raise RequestError(
            f"forget: positions {never[:5]} were never trained on (the training loader's sampler did not reach them); "
            f"allowed: the {snapshot.n_retained} positions that were. Leave them out; there is nothing to forget."
        )
    if len(positions) >= snapshot.n_retained:
        raise RequestError(
            f"forget: all {snapshot.n_retained} samples that are left; allowed: fewer. Delete the model instead."
        )
    return positions
