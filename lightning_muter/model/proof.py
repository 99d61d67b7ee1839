"""Proving what was read off a step: the way to its head is a function of the input alone, and the loss is the step's own."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import HeadCall
from lightning_muter.model.loss_identity import in_words, loss_identity
from lightning_muter.model.losses import per_sample
from lightning_muter.model.own_step import WAY_OUT, OwnStep
from lightning_muter.model.reading import Reading, algebra
from lightning_muter.model.rowwise import Probe

#: Relative difference between what was read and the function itself, by the precision of the module.
_EQUAL = {torch.float64: 1e-9, torch.float32: 1e-5}


def look_at_features(own: OwnStep, reading: Reading, call: HeadCall, at: int) -> None:
    """Whether phi is a function of the input alone, and whether ``module(x)`` is it."""
    x, whole = own.leaves[at], Probe(own.leaves, len(call.output))
    phi = call.inputs.detach()
    near = 1e-6 if own.dtype == torch.float64 else 1e-2 if own.dtype in (torch.float16, torch.bfloat16) else 1e-4
    scale = float(phi.abs().max()) + 1e-30

    def differs(other: Tensor) -> bool:
        return other.shape != phi.shape or bool(((other - phi).abs() > near * scale).any())

    with torch.no_grad():
        reading.direct = False
        torch.manual_seed(1)
        if differs(reading.features(x)):
            raise UnsuitableError(
                "The head's input is another one at every run (noise, augmentation or dropout written into it): a "
                "sample that was trained on cannot be found again. Augment once, in the data set."
            )
        if whole.n > 1:
            turned = torch.roll(torch.arange(whole.n), 1)
            moved = whole.rows(turned)
            moved.leaves[at] = x
            reading.example = own.rebuild(moved.leaves)
            other = reading.features(x)
            reading.example = own.rebuild(own.leaves)
            if differs(other):
                raise UnsuitableError(
                    "The head's input depends on other entries of the batch than the input that is perturbed. Put them into one "
                    "tensor with it."
                )
        try:
            reading.direct = True
            reading.direct = not differs(reading.features(x))
        except Exception:
            reading.direct = False
        if reading.direct and reading.known is not None:
            reading.plain = _is_plain(reading, x, whole)


def _is_plain(reading: Reading, x: Tensor, whole: Probe) -> bool:
    """Whether cross-entropy of what forward returns is the loss that was read."""
    if loss_identity(reading.loss) != loss_identity(torch.nn.functional.cross_entropy):
        return False
    out = reading.module(x)
    y = reading.labels(whole)
    if not isinstance(out, Tensor) or out.dim() != 2 or y.is_floating_point():
        return False
    z = reading.logits(x)
    if out.shape != z.shape:
        return False
    apart = torch.nn.functional.cross_entropy(out, y, reduction="none") - torch.nn.functional.cross_entropy(
        z, y, reduction="none"
    )
    return bool((apart.abs() < 1e-3 * (1 + z.abs().max())).all())


def verify(own: OwnStep, reading: Reading, call: HeadCall, precision: torch.dtype) -> None:
    """Value and gradient in the head, of the step and of what was read, on two batches, at the weights and at moved ones."""
    near = max(_EQUAL.get(d, 2e-2) for d in (own.dtype, precision))
    head, whole = call.head, Probe(own.leaves, len(call.output))
    for probe in (whole, *own.probes(whole.n)):
        for moved in (0.0, 0.3) if probe is not whole else (0.0, 0.3, 4.0):
            generator = torch.Generator().manual_seed(7)
            phi = reading.features(probe.leaves[reading.layout.input]).detach()
            z = head.logits(phi).detach()
            noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
            z = (z + moved * noise).requires_grad_(True)
            with own.answering(head.layer, z):
                there = own.ran(probe.leaves)
            (slope,) = torch.autograd.grad(there, z)
            there = there.detach()
            here, like = objective_at(reading, probe, z.detach().to(algebra(z.device)))
            # a loss that is nearly 0 is the difference of large numbers: told to their rounding, no better
            rounding = 8 * torch.finfo(z.dtype).eps * (1 + float(z.detach().abs().max()))
            value = abs(float(there) - float(here)) - rounding
            gradient = float((slope.to(like) - like).abs().max()) - rounding / probe.n
            size = float(slope.abs().max())
            if not (value <= near * max(abs(float(there)), 1e-3) and gradient <= 10 * near * size + 1e-12):
                gradient = max(gradient, 0.0) / (size + 1e-30)
                raise UnsuitableError(
                    f"The loss that was read off {own.what} ({in_words(reading.identity)}) differs from the step itself: value "
                    f"{float(here):.6g} instead of {float(there):.6g}, gradient off by {gradient:.1e} of its size. {WAY_OUT}"
                )


def objective_at(reading: Reading, probe: Probe, z: Tensor) -> tuple[Tensor, Tensor]:
    """sum c_i l_i / sum d_i at z, and its gradient."""
    if reading.uniform is None:
        y, weight, mass = reading.weighed(probe)
    else:
        y, mass = reading.labels(probe), torch.ones_like(z[:, 0])
        weight = reading.uniform * mass
    point = z.clone().requires_grad_(True)
    values = per_sample(reading.loss, point, y).to(z.dtype)
    values = torch.where(weight > 0, values, torch.zeros_like(values))
    total = (values * weight.to(z)).sum() / (1.0 if reading.denominator == "sum" else mass.to(z).sum())
    (slope,) = torch.autograd.grad(total, point)
    return total.detach(), slope
