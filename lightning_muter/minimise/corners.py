"""How stationary a head is in L-infinity with nothing smoothed: maximisers sit at corners of the box.

Where corners are tied (a loss within a ten-thousandth of the mean loss), every mixture of them gives a subgradient; the one nearest
to 0 counts:

    min over beta in [0, 1] of | G + sum_ij beta_ij (grad l_i(corner with j flipped) - grad l_i(corner)) | / sum_i |grad l_i|

Coordinates flip independently of one another, which is right to first order in the flips. Of a network the corners are those that its
smoothed maximisers lead to; maxima elsewhere are not looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.curvature.objective.head import RobustObjective

#: Of the mean loss: losses that close are tied. Numbers of the flips that are looked at, the closest first; steps of the search for
#: their weights.
TIED, NUMBERS, STEPS = 1e-4, 4_000_000, 200
#: Per row of a network, each a forward pass.
FLIPS = 4


@dataclass
class _Part:
    """Of a batch: corners' gradients r phi~^T as factors, times the weights; flips with their gains and both factors."""

    r: Tensor
    phi: Tensor
    gain: Tensor
    flipped: tuple[Tensor, Tensor]
    straight: tuple[Tensor, Tensor]


def least_subgradient(objective: RobustObjective, theta: Tensor, delta: Tensor) -> float | None:
    """|grad F| / sum |grad phi_i| of the unsmoothed objective at theta; None where maximisers do not jump.

    Args:
        delta: the smoothed maximisers at theta (n, D), which are followed to their corners.
    """
    problem, threat = objective.problem, objective.threat
    if not threat.jumps:
        return None
    parts, done, total, count = [], 0, 0.0, 0.0
    for batch in objective.source.batches(objective.own):
        x, rows = batch.x.to(problem.backbone.exact_dtype), slice(done, done + len(batch.x))
        weight = torch.ones(len(x), dtype=x.dtype, device=x.device) if batch.weight is None else batch.weight.to(x)
        corner = InnerSolver(starts=0, rivals=0).solve(problem, theta, threat, x, batch.y, start=delta[rows])
        total, count = total + float((weight * corner.value).sum()), count + len(x)
        parts.append(_part(objective, theta, x, batch.y, corner.delta, weight))
        done += len(x)
    mean = objective.added(torch.tensor([total, count], dtype=torch.float64))
    tie = TIED * abs(float(mean[0])) / max(float(mean[1]), 1.0)
    gradient = sum((p.r.T @ p.phi for p in parts), torch.zeros_like(theta))
    scale = sum(float((p.r.norm(dim=1) * p.phi.norm(dim=1)).sum()) for p in parts)
    sums = objective.added(torch.cat([gradient.flatten(), gradient.new_tensor([scale])]))
    gradient = sums[:-1].reshape(theta.shape) + objective.total * objective.decay * theta
    return float(_nearest_to_zero(gradient, parts, tie, objective).norm() / sums[-1].clamp(min=1e-300))


def _part(objective: RobustObjective, theta: Tensor, x: Tensor, y: Tensor, delta: Tensor, weight: Tensor) -> _Part:
    problem, threat = objective.problem, objective.threat

    def at(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phi = problem.backbone(x).detach()
        terms = problem.terms(problem.logits(theta, phi), y, weight, curvature=False)
        return terms.loss, terms.r, problem.augment(phi)

    loss, r, phi = at(x + delta, y, weight)
    _, slope = problem.loss_and_input_gradient(theta, x + delta, y)
    low, high = threat.bounds(x)
    # what a flip would cost to first order: those of little slope alone are looked at
    cost = slope.abs() * (high - low) * weight[:, None]
    most = NUMBERS // x.shape[1] if problem.backbone.affine else min(NUMBERS // x.shape[1], FLIPS * len(x))
    order = cost.flatten().argsort()[: max(1, most)]
    i, j = order // x.shape[1], order % x.shape[1]
    other = delta[i].clone()
    k = torch.arange(len(i), device=i.device)
    other[k, j] = low[i, j] + high[i, j] - other[k, j]
    value, flipped_r, flipped_phi = at(x[i] + other, y[i], weight[i])
    return _Part(r, phi, value - loss[i], (flipped_r, flipped_phi), (r[i], phi[i]))


def _nearest_to_zero(gradient: Tensor, parts: list[_Part], tie: float, objective: RobustObjective) -> Tensor:
    """By accelerated projected gradients (Beck and Teboulle, SIAM J. Imaging Sci. 2, 2009)."""
    flips = []
    for p in parts:
        tied = p.gain.abs() <= tie
        flips.append(tuple(part[tied] for part in (*p.flipped, *p.straight)))
    weights = [gradient.new_zeros(len(f[0])) for f in flips]

    def moved(weights: list[Tensor]) -> Tensor:
        here = torch.zeros_like(gradient)
        for w, (r, phi, r0, phi0) in zip(weights, flips, strict=True):
            here += (w[:, None] * r).T @ phi - (w[:, None] * r0).T @ phi0
        return objective.added(here)

    def slopes(g: Tensor) -> list[Tensor]:
        return [((r @ g) * phi).sum(1) - ((r0 @ g) * phi0).sum(1) for r, phi, r0, phi0 in flips]

    some = objective.added(gradient.new_tensor([float(sum(map(len, weights)))]))
    if not float(some):
        return gradient
    probe = slopes(gradient + 1e-300)
    for _ in range(20):  # the largest eigenvalue, for the length of the steps
        size = objective.added(sum((w.square().sum() for w in probe), gradient.new_zeros(()))[None]).sqrt()
        probe = slopes(moved([w / size.clamp(min=1e-300) for w in probe]))
    most = (
        objective.added(sum((w.square().sum() for w in probe), gradient.new_zeros(()))[None]).sqrt().clamp(min=1e-300)
    )
    ahead, t, best = weights, 1.0, gradient
    for _ in range(STEPS):
        new = [(w - s / (1.1 * most)).clamp(0, 1) for w, s in zip(ahead, slopes(gradient + moved(ahead)), strict=True)]
        t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        ahead = [n + (before - 1) / t * (n - w) for n, w in zip(new, weights, strict=True)]
        weights = new
        now = gradient + moved(weights)
        best = now if float(now.norm()) < float(best.norm()) else best
    return best
