"""The master problem of the cutting-set method: the head on cached features, no backbone.

    G(w) = sum_i w_i T log sum_j q_ij exp(l_ij(w) / T) + n/2 lam |w|^2,      l_ij(w) = l(W phi_ij + b, y_i)

over the cuts phi_ij. With q <- p (the multipliers, `curvature.objective.soft_maximum`) after each step its minimisers tend to that
of sum_i w_i max_j l_ij at any T. Newton's steps are taken by conjugate gradients on products of the exact Hessian

    H v = sum_ij w_i p_ij [ Lambda_ij s + (r_ij <r_ij, s> - r_ij sum_k p_ik <r_ik, s_k>) / T ] phi_ij^T + n lam v,    s = v phi_ij

preconditioned by Kronecker factors; a line search costs no product with features, since logits are linear in the step.
Directions are found in the backbone's own precision, in which the features come; values and gradients in the algebra's.
Nothing here waits for the device: iteration counts are fixed, choices are made by ``torch.where``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_muter.curvature.problem.head import HeadProblem

#: Products per Newton step.
_PRODUCTS = 10
#: Step lengths tried along a Newton direction.
_LENGTHS = (0.0, 0.03, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)

Add = Callable[[Tensor], Tensor]


@dataclass
class Master:
    """Cuts as rows: features (R, f), labels (R,), the sample each belongs to (R,), log q (R,); w_i per sample (n,).

    Attributes:
        penalty: n lam per entry of theta, (K, q).
        add: sums a tensor over the processes that share the samples.
    """

    problem: HeadProblem
    phi: Tensor
    y: Tensor
    sample: Tensor
    log_prior: Tensor
    weight: Tensor
    penalty: Tensor
    temperature: Tensor
    add: Add
    _factors: tuple[Tensor, Tensor, Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.own_rows = self.problem.augment(self.phi)
        self.rows = self.own_rows.to(self.problem.dtype)

    def step(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """theta after one Newton step, and how far G may still be above its minimum there (half the squared decrement)."""
        z = self.rows @ theta.T
        terms = self.problem.terms(z, self.y)
        share, _ = self._shares(terms.loss)
        scale = self.weight[self.sample] * share
        gradient = self.add((scale[:, None] * terms.r).T @ self.rows) + self.penalty * theta
        assert terms.hess is not None
        if self._factors is None:
            self._factors = self._kronecker(scale, terms.hess)
        direction = self._solve(gradient, scale, share, terms.r, terms.hess)
        half_decrement = (gradient * direction).sum() / 2
        return theta - self._length(theta, direction, z) * direction, half_decrement

    def reweigh(self, theta: Tensor) -> None:
        """q <- p at theta."""
        losses = self.problem.losses(self.rows @ theta.T, self.y)
        share, _ = self._shares(losses)
        self.log_prior = share.clamp(min=1e-12).log()

    def value(self, theta: Tensor) -> Tensor:
        """G(theta), a lower bound of sum_i w_i max_j l_ij + penalty."""
        losses = self.problem.losses(self.rows @ theta.T, self.y)
        _, soft = self._shares(losses)
        return self.add((self.weight * soft).sum()) + (self.penalty * theta.square()).sum() / 2

    def _shares(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """p (R,) and the soft maxima (n,)."""
        n = len(self.weight)
        height = losses / self.temperature + self.log_prior
        top = height.new_full((n,), -torch.inf).scatter_reduce(0, self.sample, height, "amax")
        top = torch.where(torch.isfinite(top), top, 0.0)
        mass = (height - top[self.sample]).exp()
        total = mass.new_zeros(n).index_add(0, self.sample, mass)
        soft = self.temperature * (top + total.clamp(min=1e-300).log())
        return mass / total[self.sample], soft

    def _solve(self, gradient: Tensor, scale: Tensor, share: Tensor, r: Tensor, hess: Tensor) -> Tensor:
        """H^-1 gradient by conjugate gradients."""
        rows, n = self.own_rows, len(self.weight)
        scale, share, r, hess = (t.to(rows) for t in (scale, share, r, hess))
        penalty, temperature = self.penalty.to(rows), self.temperature.to(rows)

        def product(v: Tensor) -> Tensor:
            s = rows @ v.T
            slope = (r * s).sum(1)
            mean = slope.new_zeros(n).index_add(0, self.sample, share * slope)
            turned = (hess @ s[:, :, None])[:, :, 0] + r * ((slope - mean[self.sample]) / temperature)[:, None]
            return self.add((scale[:, None] * turned).T @ rows) + penalty * v

        residual = gradient.to(rows)
        x = torch.zeros_like(residual)
        z = self._precondition(residual)
        p, rz = z, (residual * z).sum()
        tiny = torch.finfo(rz.dtype).tiny
        for _ in range(_PRODUCTS):
            hp = product(p)
            alpha = rz / (p * hp).sum().clamp(min=tiny)
            x, residual = x + alpha * p, residual - alpha * hp
            z = self._precondition(residual)
            new = (residual * z).sum()
            p, rz = z + new / rz.clamp(min=tiny) * p, new
        return x.to(gradient)

    def _kronecker(self, scale: Tensor, hess: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvectors and -values of sum w p Lambda / sum w p and of sum w p phi phi^T."""
        outer = self.add((self.rows * scale[:, None]).T @ self.rows)
        mean = self.add((scale[:, None, None] * hess).sum(0)) / self.add(scale.sum()).clamp(min=1e-300)
        values_k, vectors_k = torch.linalg.eigh((mean + mean.T) / 2)
        values_q, vectors_q = torch.linalg.eigh((outer + outer.T) / 2)
        return vectors_k, values_k.clamp(min=0.0), vectors_q, values_q.clamp(min=0.0)

    def _precondition(self, v: Tensor) -> Tensor:
        assert self._factors is not None
        vectors_k, values_k, vectors_q, values_q = (t.to(v) for t in self._factors)
        spread = values_k[:, None] * values_q[None, :] + self.penalty.mean().to(v)
        return vectors_k @ ((vectors_k.T @ v @ vectors_q) / spread) @ vectors_q.T

    def _length(self, theta: Tensor, direction: Tensor, z: Tensor) -> Tensor:
        """The best of a few lengths, by the values of G."""
        moved = self.rows @ direction.T
        lengths = torch.tensor(_LENGTHS, dtype=z.dtype, device=z.device)
        values = torch.stack(
            [
                (self.weight * self._shares(self.problem.losses(z - t * moved, self.y))[1]).sum()
                for t in lengths.unbind()
            ]
        )
        inner, square = (self.penalty * theta * direction).sum(), (self.penalty * direction.square()).sum()
        values = self.add(values) - lengths * inner + lengths.square() * square / 2
        values = torch.where(torch.isfinite(values), values, torch.inf)
        return lengths.gather(0, values.argmin()[None])
