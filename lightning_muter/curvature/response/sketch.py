"""Counter-based randomness and the choice between exact Grams and sketches of them.

A sketched term must be subtracted as it was added, whatever the batch or the process it is found in: its random signs
are a function of (key, position of the sample, coordinate) alone, by a hash of counters (SplitMix64), never of a
generator's state.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lightning_muter.curvature.problem.backbone import Backbone

_log = logging.getLogger(__name__)

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def rademacher(key: int, positions: Tensor, count: int) -> Tensor:
    """Signs (n, count) in int8, a function of ``key``, the position and the column alone; on the positions' device.

    >>> both = rademacher(7, torch.tensor([3, 5]), 6)
    >>> torch.equal(both[1:], rademacher(7, torch.tensor([5]), 6))
    True
    """
    positions = positions.to(torch.int64)
    words = torch.arange((count + 31) // 32, device=positions.device)
    state = _mix(_mix(positions + _mix(positions.new_full((1,), key)))[:, None] + words)
    bits = (state[:, :, None] >> torch.arange(32, device=positions.device)) & 1
    return (2 * bits.reshape(len(positions), -1)[:, :count] - 1).to(torch.int8)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 wraps around as it should, shifts are made logical."""
    z = z + _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


#: Random directions per sample at most, and at least.
_MOST, _LEAST = 8, 4
#: Samples x directions that are aimed at: the step then differs from the exact one by 2 to 3 %.
_ENOUGH = 16_384
#: Passes up to which J itself is taken where the samples are few.
_EXACT_PASSES = 128


def choose_directions(asked: int | None, backbone: Backbone, count: int | None = None) -> int:
    """How many random directions sketch G = J K J^T; 0: exactly, from J, by one pass per feature or input.

    Args:
        asked: the response's ``sketch``; None chooses.
        count: the number of samples; the error of their sum falls with samples x directions. None: few.
    """
    if backbone.affine:
        return 0  # J is one matrix, known
    if asked is not None:
        return asked
    directions = _MOST if count is None else min(_MOST, max(_LEAST, -(-_ENOUGH // count)))
    few = count is None or count * _MOST < _ENOUGH // 2
    passes = min(backbone.width, backbone.inputs)
    chosen = 0 if passes <= directions or (few and passes <= _EXACT_PASSES) else directions
    _log.debug(
        "J K J^T %s: %d passes over the backbone exactly, %d with %d random directions per sample",
        "sketched" if chosen else "exact",
        passes,
        directions,
        directions,
    )
    return chosen
