"""The objective that was read off a step, as a number and a gradient to hold beside the step's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_muter.model.losses import per_sample
from lightning_muter.model.reading import Reading


def of_reading(reading: Reading, batch: Any) -> tuple[Tensor, Tensor]:
    """sum c_i l_i / sum d_i of what was read and the step's own penalty, and its gradient in the head."""
    rows = reading.rows(batch)
    linear = reading.head.linear
    phi = reading.features(rows.x).detach().double()
    weight = linear.weight.detach().double().requires_grad_(True)
    bias = linear.bias.detach().double().requires_grad_(True)
    values = per_sample(reading.loss, phi @ weight.T + bias, rows.y).double()
    total = (values * rows.weight)[rows.weight > 0].sum() / (1 if reading.denominator == "sum" else rows.mass.sum())
    named = dict(reading.module.named_parameters())
    prefix = f"{reading.head.name}." if reading.head.name else ""
    named.update({f"{prefix}weight": weight, f"{prefix}bias": bias})  # type: ignore[dict-item]
    for name, decay in reading.penalty.items():
        total = total + 0.5 * decay * named[name].double().square().sum()
    slopes = torch.autograd.grad(total, [weight, bias])
    return total.detach(), torch.cat([s.flatten() for s in slopes])
