"""The common case without a trace: a step whose loss is the mean over the rows of a known one, told by a few replays.

Gradients of the step in the head's output z at random points are compared with  c/n dl(z_i, y_i)/dz_i  of each closed form. What is
recognised so is traced later all the same, when the rows of the data set are asked one by one (`Reading.rows`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_muter.model.known_losses import Known, candidates
from lightning_muter.model.losses import per_sample
from lightning_muter.model.rowwise import Probe, points

#: Logits of two sizes, so that losses that differ far from 0 alone (Huber's) are told apart.
_SCALES = (1.0, 4.0)

Step = Callable[..., Tensor]


def plain_mean_of(
    step: Step, probes: list[Probe], uses: list[int], k: int, dtype: torch.dtype
) -> tuple[Known, float] | None:
    """The closed form and the constant c of which ``step(z, *leaves)`` is c times the mean over rows, or None.

    Args:
        uses: leaves that may be labels.     dtype: of z, the module's own.
    """
    near = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype)
    if near is None:  # too few digits to tell
        return None
    looks = []
    for seed, probe in enumerate(probes):
        for scale in _SCALES:
            z = (scale * points(probe.n, k, dtype, probe_device(probe), 31 + seed)).requires_grad_(True)
            value = step(z, *probe.leaves)
            (slope,) = torch.autograd.grad(value, z, allow_unused=True, materialize_grads=True)
            looks.append((probe, z.detach(), float(value.detach()), slope))
    every = torch.ones(probes[0].n, dtype=torch.bool)
    for loss, label in candidates(probes[0], uses, k, every):
        known = Known(loss, label, k)
        try:
            told = _scale(known, looks, near)
        except (RuntimeError, ValueError, IndexError):  # labels of another form
            continue
        if told is not None:
            return known, told
    return None


def probe_device(probe: Probe) -> torch.device:
    """Where the tensors of a batch lie."""
    return next(v.device for v in probe.leaves if isinstance(v, Tensor))


def _scale(known: Known, looks: list[tuple[Probe, Tensor, float, Tensor]], near: float) -> float | None:
    """c, or None."""
    scale: float | None = None
    for probe, z, value, slope in looks:
        point = z.clone().requires_grad_(True)
        mean = per_sample(known.loss, point, known.label(probe.leaves)).mean()
        (like,) = torch.autograd.grad(mean, point)
        found = float((slope * like).sum() / like.square().sum().clamp(min=1e-30))
        scale = found if scale is None else scale
        size = float(slope.abs().max()) + 1e-30
        if not (found > 0 and abs(found - scale) <= 10 * near * scale):
            return None
        if float((slope - scale * like).abs().max()) > 10 * near * size:
            return None
        if abs(value - scale * float(mean.detach())) > 2 * near * max(abs(value), 1e-3):
            return None
    assert scale is not None
    return round(scale, 4) if abs(scale - round(scale, 4)) < 10 * near else scale
