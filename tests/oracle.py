"""How stationary a head is in a user's own step: his loss, his rows, perturbations found by an ascent that knows no other."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from lightning_muter.model.leaves import flatten

STARTS, STEPS, TIED = 5, 300, 1e-4
KEPT = (58, 59, 298, 299)  # of a zigzag about a kink, both sides


class OwnStep:
    """A module's step on all rows at once (in eval mode and without logs from now on), as a function of the inputs of one batch."""

    def __init__(self, module: Any, batch: Any, head: Any = None) -> None:
        self.module = module.eval()
        module.log = module.log_dict = lambda *args, **kwargs: None
        self.head = module.head if head is None else head
        self.batch, self.takes_index = batch, module.training_step.__code__.co_argcount > 2

    def inputs(self, width: tuple[int, ...]) -> int:
        """Which leaf has rows of this shape."""
        found = [
            i
            for i, v in enumerate(flatten(self.batch)[1])
            if isinstance(v, Tensor) and v.is_floating_point() and tuple(v.shape[1:]) == width
        ]
        return found[0]

    def __call__(self, at: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, with a graph to x; the head's output z and its input, as they were met."""
        met: list[tuple[Tensor, Tensor]] = []

        def keep(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            met.append((out, args[0]))
            return out.clone()  # a step may work in place on it

        _, leaves, rebuild = flatten(copy.deepcopy(self.batch))
        leaves[at] = x.clone()  # a step may work in place
        handle = self.head.register_forward_hook(keep)
        out = self.module.training_step(rebuild(leaves), *([0] if self.takes_index else []))
        handle.remove()
        return ((out["loss"] if isinstance(out, dict) else out).reshape(()), *met[0])


def _ball(g: Tensor, norm: str, eps: float) -> Tensor:
    """The point of the ball where <g, .> is largest, row by row."""
    flat = g.flatten(1)
    if norm == "linf":
        return (eps * flat.sign()).reshape(g.shape)
    return (eps * flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)).reshape(g.shape)


def _projected(delta: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "linf":
        return delta.clamp(-eps, eps)
    flat = delta.flatten(1)
    return (flat * (eps / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)).reshape(delta.shape)


def _ascents(own: OwnStep, at: int, x: Tensor, norm: str, eps: float) -> list[Tensor]:
    """Local maxima of every row's loss over its ball, from the middle and from random points."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for start in range(STARTS if eps > 0 else 1):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        delta = _ball(noise, norm, eps) if start else torch.zeros_like(x)
        for step in range(STEPS if eps > 0 else 0):
            there = (x + delta).requires_grad_(True)
            (slope,) = torch.autograd.grad(own(at, there)[0], there)
            if step < 60:  # where the loss is convex in x this climbs at every step
                delta = _ball(slope, norm, eps)
            else:  # at kinks it circles, and ever shorter steps come to rest
                delta = _projected(delta + _ball(slope, "l2", eps * 0.95 ** (step - 60)), norm, eps)
            if step in KEPT:
                found.append(delta)
        if eps == 0:
            found.append(delta)
    return found


def _by_row(own: OwnStep, at: int, x: Tensor) -> Tensor:
    """(n, P): each row's part of the loss's gradient in the head, slope of z times the head's input."""
    loss, z, phi = own(at, x)
    (slope,) = torch.autograd.grad(loss, z)
    parts = [(slope[:, :, None] * phi.detach()[:, None, :]).flatten(1)]
    if own.head.bias is not None:
        parts.append(slope)
    return torch.cat(parts, 1).double()


def _gains(own: OwnStep, at: int, x: Tensor, found: list[Tensor]) -> Tensor:
    """(m, n): what the loss gains where row i takes candidate m in place of the first; -inf where that was seen before."""
    values = torch.full((len(found), len(x)), -torch.inf, dtype=torch.float64)
    values[0] = 0
    with torch.no_grad():
        base = float(own(at, x + found[0])[0])
        for s, i in itertools.product(range(1, len(found)), range(len(x))):
            if all(float((found[s][i] - seen[i]).abs().max()) > 1e-9 for seen in found[:s]):
                other = x + found[0]
                other[i] = x[i] + found[s][i]
                values[s, i] = float(own(at, other)[0]) - base
    return values


def _best(found: list[Tensor], values: Tensor) -> Tensor:
    return torch.stack([found[s][i] for i, s in enumerate(values.argmax(0).tolist())])


def at_the_worst(
    module: Any,
    batch: Any,
    *,
    decay: float,
    norm: str = "l2",
    eps: float = 0.0,
    head: Any = None,
    width: tuple[int, ...] = (4,),
) -> tuple[float, float]:
    """|grad F| and sum_i |grad phi_i| in the head at the worst perturbations of every row.

    Where maxima of a row are tied, their mixture with the smallest gradient counts (the subgradient nearest to 0).

    Args:
        batch: all rows, as the step receives them.
        decay: lambda of the penalty lambda / 2 |w|^2 beside the step's loss.
    """
    own = OwnStep(module, batch, head)
    at = own.inputs(width)
    x = flatten(batch)[1][at].detach()
    found = _ascents(own, at, x, norm, eps)
    base = float(own(at, x + found[0])[0].detach())
    values = _gains(own, at, x, found)
    if norm == "linf" and eps > 0:  # coordinates whose slope is nearly 0 are at either end, or in between
        corners = itertools.product((eps, -eps), repeat=x[0].numel())
        found += [torch.tensor(c).to(x).reshape(x[:1].shape).expand_as(x).clone() for c in corners]
        values = _gains(own, at, x, found)
    slopes = torch.stack([_by_row(own, at, x + delta) for delta in found])
    scale = float(_by_row(own, at, x + _best(found, values)).norm(dim=1).sum())
    tied = values >= values.max(0).values - TIED * abs(base) / len(x)
    columns = [(i, slopes[s, i]) for s, i in tied.nonzero().tolist()]
    theta = torch.cat([p.detach().flatten() for p in own.head.parameters()]).double()
    rest = decay * theta + _beside_the_rows(own, at, x + found[0])
    return _smallest(torch.stack([g for _, g in columns]), torch.tensor([i for i, _ in columns]), rest), scale


def _beside_the_rows(own: OwnStep, at: int, x: Tensor) -> Tensor:
    """The gradient in the head that reaches it on another way than by its output: of a penalty in the step."""
    own.head.requires_grad_(True)
    slopes = torch.autograd.grad(own(at, x)[0], list(own.head.parameters()))
    return torch.cat([s.flatten() for s in slopes]).double() - _by_row(own, at, x).sum(0)


def _smallest(slopes: Tensor, rows: Tensor, rest: Tensor) -> float:
    """min |sum q_j slopes_j + rest| over q >= 0 that sum to one in every row."""
    n = int(rows.max()) + 1
    if len(rows) == n:
        return float((slopes.sum(0) + rest).norm())
    size = float(slopes.norm(dim=1).max())
    sums = torch.nn.functional.one_hot(rows, n).double().T
    a = torch.cat([slopes.T / size, 1e3 * sums]).numpy()
    b = torch.cat([-rest / size, torch.full((n,), 1e3, dtype=torch.float64)]).numpy()
    q = torch.from_numpy(scipy.optimize.nnls(a, b, maxiter=50 * a.shape[1])[0].astype(np.float64))
    q = q / (sums.T @ (sums @ q)).clamp(min=1e-12)
    return float((q @ slopes + rest).norm())
