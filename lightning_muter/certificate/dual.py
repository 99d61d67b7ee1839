"""The inner maximum of an affine model as a maximum over probabilities (Gibbs' variational principle, Toland's duality).

With logits z + B delta (B: rows b_k, (m, D)) and the log of a sum of exponentials,

    max over delta in B(x) of  log sum_k exp(z_k + <b_k, delta>) + rho(delta)  =  max over p in the simplex of  G(p),
    G(p) = <p, z> + H(p) + sigma(v),      v = sum_k p_k b_k,      sigma(v) = max over delta in B(x) of <v, delta> + rho(delta)

H, the entropy, is concave and sigma, a support function, is convex. Around any q, exactly,

    G(p) = G(q) + <grad G(q), p - q> - KL(p | q) + D(v | v_q),      D: the Bregman divergence of sigma,

    KL(p | q) >= 1/2 sum_k (p_k - q_k)^2 / d_k,   d_k = (p_k + 2 q_k) / 3                      (Bernstein's inequality)
    D(v | v_q) <= 1/2 (p - q)^T M (p - q)          for all p of a cell, M from :meth:`Dual.spread`

so that wherever M <= diag(1/d) on the tangent of the simplex, nothing in the cell is above the tangent of G at q.

Losses that have this form:

- cross-entropy, targets t (one-hot, smoothed, or given): b_k = W_k J - t W J, z likewise: all K classes;
- the same without rho, one-hot: the loss is log(1 + exp s), and s = log sum over the *wrong* classes of exp(z_k - z_y) has the
  same maximisers. There v is a mean of the W_k J - W_y J and stays away from 0, where sigma is curved most;
- two classes on one logit: cross-entropy of the logits (0, z).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.certificate.simplex import centre, linear_maximum, odds_range
from lightning_muter.curvature.inner.ascent import Rho

#: Up to this many classes, arrays of their number cubed are formed per cell.
CUBED = 24


@dataclass
class Dual:
    """G of some samples.

    Attributes:
        z: (n, m) logits at delta = 0;     rows: b_k, (n, m, D).
        odds: the loss is log(1 + exp(max G)) instead of max G itself.
    """

    threat: ThreatModel
    x: Tensor
    z: Tensor
    rows: Tensor
    c: Tensor | None
    odds: bool

    def __post_init__(self) -> None:
        self.lo, self.hi = self.threat.bounds(self.x)
        self.mid, self.half = (self.lo + self.hi) / 2, (self.hi - self.lo) / 2
        self.rho = Rho(self.threat, self.x, self.c)

    def take(self, index: Tensor) -> Dual:
        c = None if self.c is None else self.c[index]
        return Dual(self.threat, self.x[index], self.z[index], self.rows[index], c, self.odds)

    # -- values ----------------------------------------------------------------------------------------------------

    def direction(self, p: Tensor) -> Tensor:
        """v (n, D)."""
        return (p[:, None] @ self.rows)[:, 0]

    def logits(self, delta: Tensor) -> Tensor:
        return self.z + (self.rows @ delta[:, :, None])[:, :, 0]

    def peak(self, v: Tensor) -> Tensor:
        """The delta at which sigma(v) is attained: the gradient of sigma."""
        if self.c is None:
            return self.threat.linear_maximiser(v, self.x)
        return self.threat.project(self.mid + v / self.c.clamp(min=torch.finfo(v.dtype).tiny), self.x)

    def primal(self, delta: Tensor) -> Tensor:
        """log sum exp (z + B delta) + rho(delta): never above max G."""
        return self.logits(delta).logsumexp(1) + self.rho.value(delta)

    def dual(self, p: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """G(p) and its gradient (up to a constant), delta = peak(v(p))."""
        slope = self.logits(delta) - p.clamp(min=torch.finfo(p.dtype).tiny).log()
        return (p * slope).sum(1) + self.rho.value(delta), slope

    def climb(self, p: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """p and its peak after ``steps`` rounds p <- softmax(z + B peak(v(p))), each of which raises the primal value."""
        delta = self.peak(self.direction(p))
        for _ in range(steps):
            p = self.logits(delta).softmax(1)
            delta = self.peak(self.direction(p))
        return p, delta

    def loss_gap(self, value: Tensor, gap: Tensor) -> Tensor:
        """What a gap of G above ``value`` means for the loss."""
        return torch.log1p(value.sigmoid() * gap.expm1()) if self.odds else gap

    def ceiling(self) -> Tensor:
        """G <= log sum exp(z_k + sigma(b_k)): sigma is convex, hence below its interpolation between the corners."""
        most = self.z.clone()
        for k in range(self.z.shape[1]):
            v = self.rows[:, k]
            delta = self.peak(v)
            most[:, k] += (v * delta).sum(1) + self.rho.value(delta)
        return most.logsumexp(1)

    def sway(self, low: Tensor, high: Tensor, q: Tensor) -> Tensor:
        """2 eps times a bound of |v(p) - v(q)| over the cell, never below D for an L2 ball."""
        reach = torch.maximum(high - q, q - low).clamp(min=0.0)
        apart = (self.rows - self.direction(q)[:, None]).norm(dim=2)
        return 2 * self.threat.eps * (reach * apart).sum(1)

    # -- ranges ----------------------------------------------------------------------------------------------------

    def region(self) -> tuple[Tensor, Tensor]:
        """Bounds (n, m) of softmax(z + B delta) over B(x), from the largest value of every z_k - z_l on its own."""
        most = self.z[:, :, None] - self.z[:, None, :]
        for k in range(self.z.shape[1]):
            apart = self.rows[:, k, None] - self.rows
            boxed = (apart * self.mid[:, None]).sum(2) + (apart.abs() * self.half[:, None]).sum(2)
            if self.threat.ball.euclidean:
                boxed = torch.minimum(boxed, self.threat.eps * apart.norm(dim=2))
            most[:, k] += boxed
        return odds_range(most)

    def push(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Range (n, D) of v over the cell low <= p <= high."""
        columns = self.rows.mT
        low, high = low[:, None], high[:, None]
        return -linear_maximum(-columns, low, high), linear_maximum(columns, low, high)

    def narrow(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of p at the maxima of G in this cell: there p = softmax(z + B peak(v(p)))."""
        gaps = self._separable_gaps(low, high) if self.separable else self._ball_gaps(low, high)
        return odds_range(gaps)

    def _separable_gaps(self, low: Tensor, high: Tensor) -> Tensor:
        least, most = (self.peak(v) for v in self.push(low, high))
        middle, reach = (least + most) / 2, (most - least) / 2
        gaps = self.logits(middle)
        gaps = gaps[:, :, None] - gaps[:, None, :]
        for k in range(gaps.shape[1]):
            gaps[:, k] += ((self.rows[:, k, None] - self.rows).abs() * reach[:, None]).sum(2)
        return gaps

    def _ball_gaps(self, low: Tensor, high: Tensor) -> Tensor:
        """Largest z_k - z_l at peak(v), v of the cell, L2 (where peak(v) = peak(t v) for t > 0).

        Let q be the centre and scale v so that x = v - v_q has no component along peak(v_q): linear in p, and 0 at q. The
        Jacobian of peak is between 0 and I / mu, mu the least multiplier of the ball on the way, so that for any e

            <e, peak(v) - peak(v_q)> <= (<e, x> + |e| |x|) / (2 mu)
        """
        tiny = torch.finfo(low.dtype).tiny
        q = centre(low, high)
        v = self.direction(q)
        delta = self.peak(v)
        weight = (self.rows @ delta[:, :, None])[:, :, 0] / self.threat.eps**2
        at_q = (weight * q).sum(1, keepdim=True)
        least = -linear_maximum(-weight, low, high)
        known = (least > 0) & (at_q[:, 0] > 0)
        moved = self.rows - (weight / at_q.clamp(min=tiny))[:, :, None] * v[:, None]
        if self.threat.box is None:
            mu = least
        else:
            v_low, v_high = self.push(low, high)
            share = torch.stack([least, linear_maximum(weight, low, high)], 1) / at_q.clamp(min=tiny)
            scaled = v[:, None] * share[:, :, None]
            v_low, v_high = torch.minimum(v_low, scaled.amin(1)), torch.maximum(v_high, scaled.amax(1))
            smallest = torch.where(v_low > 0, v_low, torch.where(v_high < 0, v_high, torch.zeros_like(v)))
            there = self.peak(smallest)
            free = ((there > self.lo) & (there < self.hi)).to(v)
            held = (there * free).norm(dim=1)
            mu = torch.where(held > 0, (smallest * free).norm(dim=1) / held.clamp(min=tiny), torch.zeros_like(held))
        known &= mu > 0
        reach = torch.maximum(high - q, q - low).clamp(min=0.0)
        squares = (moved @ moved.mT).abs()
        length = (reach[:, None] @ squares @ reach[:, :, None])[:, 0, 0].sqrt()
        apart = torch.cdist(self.rows, self.rows, compute_mode="donot_use_mm_for_euclid_dist")
        product = apart * length[:, None, None]
        along = product
        if self.z.shape[1] <= CUBED:
            inner = self.rows @ moved.mT
            exact = linear_maximum(inner[:, :, None] - inner[:, None], low[:, None, None], high[:, None, None])
            along = torch.minimum(along, exact)
        z = self.logits(delta)
        gaps = z[:, :, None] - z[:, None] + (along + product) / (2 * mu.clamp(min=tiny))[:, None, None]
        return torch.where(known[:, None, None], gaps, torch.full_like(gaps, torch.inf))

    @property
    def separable(self) -> bool:
        return self.threat.ball.separable

    # -- curvature of sigma ----------------------------------------------------------------------------------------

    def spread(
        self, low: Tensor, high: Tensor, q: Tensor, delta: Tensor, ranges: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """M (n, m, m) with D(v(p) | v(q)) <= 1/2 (p - q)^T M (p - q) for all p of the cell; inf where there is none.

        ``delta``: peak(v(q)); ``ranges``: of v over the cell, for a separable sigma.
        """
        if self.separable:
            assert ranges is not None
            return self._weighed(self._chord(self.direction(q), *ranges))
        saturated = (delta <= self.lo) | (delta >= self.hi)
        free = (delta * ~saturated).square().sum(1)
        out = self._ball(low, high, q, delta, saturated, free)
        slack = free == 0
        if bool(slack.any()):  # the ball does not bind: the box alone holds delta, and sigma <= that of the box
            part = self.take(slack.nonzero()[:, 0])
            out[slack] = part._weighed(part._chord(part.direction(q[slack]), *part.push(low[slack], high[slack])))
        return out

    def _weighed(self, kappa: Tensor) -> Tensor:
        return (self.rows * kappa[:, None]) @ self.rows.mT

    def _chord(self, v: Tensor, v_low: Tensor, v_high: Tensor) -> Tensor:
        """sup over w in the range of 2 D(w | v) / (w - v)^2 per coordinate, for sigma(w) = max w d + c/2 (h^2 - d^2), |d| <= h.

        sigma is w^2 / 2c within |w| <= c h and linear outside. From |v| <= c h the supremum is 1/c; from v > c h it grows as w
        falls, up to h/v at w = -v.
        """
        tiny = torch.finfo(v.dtype).tiny
        c = torch.zeros_like(v) if self.c is None else self.c
        switch = c * self.half
        size = v.abs()
        least = torch.maximum(torch.where(v >= 0, v_low, -v_high), -size)
        run = (size - least).clamp(min=tiny)
        bent = ((switch - least) / run).square() / c.clamp(min=tiny)
        beyond = -4 * least * self.half / run.square()
        outside = torch.where(least >= switch, torch.zeros_like(v), torch.where(least >= -switch, bent, beyond))
        kappa = torch.where(size <= switch, 1 / c.clamp(min=tiny), outside)
        still = (v_high <= v_low) & (v_low == v)
        return torch.where(still, torch.zeros_like(v), kappa.clamp(max=1e100))

    def _ball(self, low: Tensor, high: Tensor, q: Tensor, delta: Tensor, saturated: Tensor, free: Tensor) -> Tensor:
        """M for an L2 ball that binds, with or without the box.

        For any w, sigma(v) <= eps |v - w| + max over the box of <w, delta>, with equality for the part w of v that the box
        holds. Let a(p) be the multiplier read off the free coordinates. Where a box face stays active over the whole cell
        w_j = v_j - a delta_j, else w_j stays what it is at q; then v - w = a delta + e with e linear in p - q, and

            D <= eps |a delta + e| - <delta, a delta + e>  <=  eps^2 |e|^2 / (2 <delta, a delta + e>)
        """
        eps2 = self.threat.eps**2
        known = free.clamp(min=torch.finfo(q.dtype).tiny)
        coef = (self.rows @ (delta * ~saturated)[:, :, None])[:, :, 0] / known[:, None]  # a(p) = <coef, p>
        moved = self.rows - coef[:, :, None] * delta[:, None]
        if bool(saturated.any()):
            columns, least, most = moved.mT, low[:, None], high[:, None]
            held = (delta >= self.hi) & (-linear_maximum(-columns, least, most) >= 0)
            held |= (delta <= self.lo) & (linear_maximum(columns, least, most) <= 0)
            loose = saturated & ~held
            moved = moved * ~held[:, None]
            part = delta * loose
            at_q = self.direction(q) - (coef * q).sum(1, keepdim=True) * delta
            weight = coef * (eps2 - part.square().sum(1))[:, None] + (self.rows @ part[:, :, None])[:, :, 0]
            offset = (part * at_q).sum(1)
        else:
            weight, offset = coef * eps2, coef.new_zeros(len(coef))
        along = -linear_maximum(-weight, low, high) - offset  # least <delta, a delta + e> over the cell
        matrix = eps2 * moved @ moved.mT / along.clamp(min=torch.finfo(q.dtype).tiny)[:, None, None]
        return torch.where((along > 0)[:, None, None], matrix, torch.full_like(matrix, torch.inf))
