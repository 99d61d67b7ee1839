"""Dense oracles: every derivative by torch.func on one sample, the inner problem by Newton's method on its KKT system,
the total Hessian by finite differences of the gradient with the inner problem solved anew. Nothing of the package's
formulas is used here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

from tests.cases import Case

Scalar = Callable[[Tensor, Tensor, Tensor], Tensor]


def sample_loss(case: Case) -> Scalar:
    """l(theta, x, y) of one sample; theta flattened row by row from [W | b], x flattened."""
    backbone, head = case.backbone, case.head
    k, f, shape = head.out_features, head.in_features, case.x.shape[1:]

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        matrix = theta.reshape(k, -1)
        phi = backbone(x.reshape(1, *shape))[0]
        z = matrix[:, :f] @ phi
        if head.bias is not None:
            z = z + matrix[:, -1]
        return case.loss_of(z, y)

    return loss


def theta_of(case: Case) -> Tensor:
    head = case.head
    parts = [head.weight.detach()] + ([] if head.bias is None else [head.bias.detach()[:, None]])
    return torch.cat(parts, 1)


@dataclass
class Derivatives:
    """Of the loss of every sample at (theta, x): w (n, p), x (n, D), ww (n, p, p), wx (n, p, D), xx (n, D, D)."""

    loss: Tensor
    w: Tensor
    x: Tensor
    ww: Tensor
    wx: Tensor
    xx: Tensor


def derivatives(case: Case, theta: Tensor, x: Tensor, y: Tensor) -> Derivatives:
    loss = sample_loss(case)
    flat = theta.flatten()
    over = {"in_dims": (None, 0, 0)}
    return Derivatives(
        vmap(loss, **over)(flat, x, y),
        vmap(grad(loss, 0), **over)(flat, x, y),
        vmap(grad(loss, 1), **over)(flat, x, y),
        vmap(hessian(loss, 0), **over)(flat, x, y),
        vmap(jacfwd(grad(loss, 0), 1), **over)(flat, x, y),
        vmap(hessian(loss, 1), **over)(flat, x, y),
    )


@dataclass
class Branch:
    """Which constraints hold at a maximiser: with them fixed it is the root of a smooth system.

    free (n, D), bound (n, D) where not free, binds (n,): the L2 ball, c and mid (n, D): -c/2 (delta - mid)^2 is added.
    """

    free: Tensor
    bound: Tensor
    binds: Tensor
    c: Tensor
    mid: Tensor
    eps: float


def branch_at(
    case: Case,
    theta: Tensor,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    lo: Tensor,
    hi: Tensor,
    eps: float,
    norm: str,
    c: Tensor,
) -> Branch:
    """The constraints that hold at ``delta``: a face where the force points outward, the ball where it is full."""
    mid = (lo + hi) / 2
    g = vmap(grad(sample_loss(case), 1), in_dims=(None, 0, 0))(theta.flatten(), x + delta, y) - c * (delta - mid)
    at_lo, at_hi = delta - lo < 1e-7, hi - delta < 1e-7
    inside = ~(at_lo | at_hi)
    binds = (delta.norm(dim=1) > eps * (1 - 1e-7)) if norm == "l2" else torch.zeros(len(x), dtype=torch.bool)
    mu = (g * delta * inside).sum(1) / (delta.square() * inside).sum(1).clamp(min=1e-300)
    force = g - torch.where(binds, mu, torch.zeros_like(mu))[:, None] * delta
    fixed = (at_lo & (force < -1e-8)) | (at_hi & (force > 1e-8))
    return Branch(~fixed, torch.where(at_lo, lo, hi), binds & (~fixed).any(1), c, mid, eps)


def follow(case: Case, theta: Tensor, x: Tensor, y: Tensor, delta: Tensor, on: Branch, steps: int = 10) -> Tensor:
    """The maximiser on this branch, by Newton's method on (delta, mu); theta (n, p), one per row."""
    loss = sample_loss(case)

    def inner(theta: Tensor, d: Tensor, x: Tensor, y: Tensor, c: Tensor, mid: Tensor) -> Tensor:
        return loss(theta, x + d, y) - (c * (d - mid) ** 2).sum() / 2

    rest = (x, y, on.c, on.mid)
    first = vmap(grad(inner, 1))(theta, delta, *rest)
    part = delta * on.free
    mu = torch.where(on.binds, (first * part).sum(1) / part.square().sum(1).clamp(min=1e-300), first.new_zeros(len(x)))
    delta = torch.where(on.free, delta, on.bound)
    n, d = delta.shape
    for _ in range(steps):
        g = vmap(grad(inner, 1))(theta, delta, *rest)
        h = vmap(hessian(inner, 1))(theta, delta, *rest)
        system = delta.new_zeros(n, d + 1, d + 1)
        right = delta.new_zeros(n, d + 1)
        eye = torch.eye(d, dtype=delta.dtype)
        system[:, :d, :d] = torch.where(on.free[:, :, None], h - mu[:, None, None] * eye, eye)
        system[:, :d, d] = torch.where(on.free, -delta, 0.0)
        system[:, d, :d] = torch.where(on.binds[:, None], delta, 0.0)
        system[:, d, d] = torch.where(on.binds, 0.0, 1.0)
        right[:, :d] = torch.where(on.free, g - mu[:, None] * delta, delta - on.bound)
        right[:, d] = torch.where(on.binds, (delta.square().sum(1) - on.eps**2) / 2, mu)
        step = torch.linalg.solve(system, right)
        delta, mu = delta - step[:, :d], mu - step[:, d]
    return delta


def total_by_differences(
    case: Case, theta: Tensor, x: Tensor, y: Tensor, delta: Tensor, on: Branch, h: float = 1e-4
) -> Tensor:
    """D2 phi_i (n, p, p): fourth-order central differences of d phi_i / dw = d l / dw at the maximisers solved anew."""
    flat = theta.flatten()
    p, n = len(flat), len(x)
    loss = sample_loss(case)
    total = flat.new_zeros(n, p, p)
    for times, factor in ((1, 8.0), (2, -1.0)):
        for sign in (1, -1):
            moved = flat + sign * times * h * torch.eye(p, dtype=flat.dtype)  # (p, p): one direction per row
            rows = moved[None].expand(n, p, p).reshape(n * p, p)

            def each(t: Tensor) -> Tensor:
                return t.repeat_interleave(p, 0)

            there = Branch(each(on.free), each(on.bound), each(on.binds), each(on.c), each(on.mid), on.eps)
            found = follow(case, rows, each(x), each(y), each(delta), there)
            gradient = vmap(grad(loss, 0))(rows, each(x) + found, each(y))
            total += sign * factor * gradient.reshape(n, p, p).mT / (12 * h)
    return total
