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
from lightning_muter.curvature.problem.backbone import Backbone

#: Of the mean loss: losses that close are tied. Numbers of the flips that are looked at, the closest first.
TIED, NUMBERS = 1e-4, 4_000_000
#: Steps of the search for the flips' weights; it ends where so many of them bring less than a hundredth.
STEPS, PATIENCE = 200, 20
#: Per row of a network, each a forward pass.
FLIPS = 4


@dataclass
class _Flips:
    """Of a batch: corners' gradients r phi~^T as factors, times the weights; and flips, what each moves:

        r' phi'~^T - r phi~^T = (r' - r) phi~^T + r' (phi'~ - phi~)^T

    Attributes:
        r, phi: (n, K), (n, q).          gain: of the flips' losses (F,).        row: the sample of each (F,).
        turned: r' - r (F, K).           flipped: r' (F, K).
        moved: phi'~ - phi~ (F, q); of an affine backbone the coordinate j (F,) and the length s (F,) of  s J e_j.
    """

    r: Tensor
    phi: Tensor
    gain: Tensor
    row: Tensor
    turned: Tensor
    flipped: Tensor
    moved: Tensor | tuple[Tensor, Tensor, Backbone]

    def tied(self, tie: float) -> _Flips:
        """Those whose losses are that near to the corner's."""
        at = self.gain.abs() <= tie
        moved = self.moved
        moved = moved[at] if isinstance(moved, Tensor) else (moved[0][at], moved[1][at], moved[2])
        return _Flips(self.r, self.phi, self.gain[at], self.row[at], self.turned[at], self.flipped[at], moved)

    def sum(self, weights: Tensor) -> Tensor:
        """sum_f w_f (r' phi'~^T - r phi~^T): (K, q)."""
        turned = torch.zeros_like(self.r).index_add(0, self.row, weights[:, None] * self.turned)
        there, flipped = turned.T @ self.phi, weights[:, None] * self.flipped
        if isinstance(self.moved, Tensor):
            return there + flipped.T @ self.moved
        coordinate, length, backbone = self.moved
        sides = flipped.new_zeros(backbone.inputs, flipped.shape[1])
        sides.index_add_(0, coordinate, length[:, None] * flipped)
        there[:, : backbone.width] += sides.T if backbone.matrix is None else (backbone.matrix @ sides).T
        return there

    def along(self, g: Tensor) -> Tensor:
        """<g, r' phi'~^T - r phi~^T> of each flip (F,)."""
        here = (self.turned * (self.phi @ g.T)[self.row]).sum(1)
        if isinstance(self.moved, Tensor):
            return here + ((self.flipped @ g) * self.moved).sum(1)
        coordinate, length, backbone = self.moved
        sides = g[:, : backbone.width]
        sides = sides if backbone.matrix is None else sides @ backbone.matrix
        return here + length * (self.flipped * sides.T[coordinate]).sum(1)


def least_subgradient(objective: RobustObjective, theta: Tensor, delta: Tensor) -> float | None:
    """|grad F| / sum |grad phi_i| of the unsmoothed objective at theta; None where maximisers do not jump.

    Args:
        delta: the smoothed maximisers at theta (n, D), which are followed to their corners.
    """
    problem, threat = objective.problem, objective.threat
    if not threat.jumps:
        return None
    parts: list[_Flips] = []
    done, total, count = 0, 0.0, 0.0
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


def _part(objective: RobustObjective, theta: Tensor, x: Tensor, y: Tensor, delta: Tensor, weight: Tensor) -> _Flips:
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
    affine = problem.backbone.affine
    most = NUMBERS // x.shape[1] if affine else min(NUMBERS // x.shape[1], FLIPS * len(x))
    order = cost.flatten().argsort()[: max(1, most)]
    i, j = order // x.shape[1], order % x.shape[1]
    other = delta[i].clone()
    k = torch.arange(len(i), device=i.device)
    length = low[i, j] + high[i, j] - 2 * other[k, j]
    other[k, j] += length
    value, flipped, there = at(x[i] + other, y[i], weight[i])
    moved = (j, length.to(flipped), problem.backbone) if affine else there - phi[i]
    return _Flips(r, phi, value - loss[i], i, flipped - r[i], flipped, moved)


def _nearest_to_zero(gradient: Tensor, parts: list[_Flips], tie: float, objective: RobustObjective) -> Tensor:
    """By accelerated projected gradients (Beck and Teboulle, SIAM J. Imaging Sci. 2, 2009)."""
    flips = [part.tied(tie) for part in parts]
    weights = [gradient.new_zeros(len(f.row)) for f in flips]

    def moved(weights: list[Tensor]) -> Tensor:
        return objective.added(sum((f.sum(w) for f, w in zip(flips, weights, strict=True)), torch.zeros_like(gradient)))

    def norm(weights: list[Tensor]) -> Tensor:
        squares = sum((w.square().sum() for w in weights), gradient.new_zeros(()))
        return objective.added(squares[None]).sqrt().clamp(min=1e-300)

    some = objective.added(gradient.new_tensor([float(sum(map(len, weights)))]))
    if not float(some):
        return gradient
    probe = [f.along(gradient + 1e-300) for f in flips]
    for _ in range(20):  # the largest eigenvalue, for the length of the steps
        size = norm(probe)
        there = moved([w / size for w in probe])
        probe = [f.along(there) for f in flips]
    step = 1 / (1.1 * norm(probe))
    ahead, t, best, goal = weights, 1.0, gradient, float(gradient.norm())
    for count in range(1, STEPS + 1):
        there = gradient + moved(ahead)
        new = [(w - step * f.along(there)).clamp(0, 1) for w, f in zip(ahead, flips, strict=True)]
        t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        ahead = [n + (before - 1) / t * (n - w) for n, w in zip(new, weights, strict=True)]
        weights = new
        now = gradient + moved(weights)
        best = now if float(now.norm()) < float(best.norm()) else best
        if count % PATIENCE == 0:
            if float(best.norm()) > 0.99 * goal:
                break
            goal = float(best.norm())
    return best
