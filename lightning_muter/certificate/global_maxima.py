"""Maximisers over the whole of B(x) for affine models, with a certified bound of what is missing to the global maximum.

| loss | how |
|---|---|
| cross-entropy in any form, two classes on one logit | the dual problem, by branch and bound (`curvature.branching`) |
| convex in one logit, not smoothed | the loss is largest at one end of the logit's range: exact |
| square of one logit, smoothed | piecewise quadratic in one dual variable: exact |
| else, second derivative bounded | :func:`curvature_gap` (never tight) |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.certificate.branch_and_bound import default_budget, global_maxima
from lightning_muter.certificate.gibbs import as_dual, gibbs_targets
from lightning_muter.curvature.inner.ascent import Rho
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.model.losses import bare

#: Numbers in the rows of the dual problems held at once.
_ROWS = 20_000_000


def why_no_bound(loss: Any) -> str | None:
    """Why the gap of a maximiser cannot be bounded with this loss, or None."""
    if _curvature_cap(loss) is None:
        return f"no bound of the second derivative of {loss!r} is known"
    return None


def line_curvature(problem: HeadProblem, theta: Tensor, x: Tensor, y: Tensor) -> float | None:
    """a such that along any line of logits the loss's third derivative is at most a omega times its second, omega the range of
    the direction: 0 for the square; 1 for log sum exp(z) - <t, z>, where they are the third and the second central moment of
    the direction under the probabilities. None where not known.
    """
    if bare(problem.loss) in (F.mse_loss, nn.MSELoss):
        return 0.0
    return None if gibbs_targets(problem, problem.logits(theta, problem.backbone(x)), y) is None else 1.0


def best_maximisers(
    problem: HeadProblem,
    theta: Tensor,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    c: Tensor | None,
    tolerance: float = 0.0,
    seconds: float = 60.0,
) -> tuple[Tensor, Tensor]:
    """Maximisers (n, D) at least as good as ``delta``, and their certified gaps (n,), in about so many seconds."""
    parts = []
    size = max(1, _ROWS // (max(problem.n_logits, 2) * x.shape[1]))
    for i in torch.arange(len(x), device=x.device).split(size):
        part = None if c is None else c[i]
        parts.append(_best_of(problem, theta, threat, x[i], y[i], delta[i], part, tolerance, seconds * len(i) / len(x)))
    return torch.cat([d for d, _ in parts]), torch.cat([g for _, g in parts])


def _best_of(
    problem: HeadProblem,
    theta: Tensor,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    c: Tensor | None,
    tolerance: float,
    seconds: float,
) -> tuple[Tensor, Tensor]:
    if threat.eps == 0:
        return delta, torch.zeros_like(x[:, 0])
    dual = as_dual(problem, theta, threat, x, y, c)
    if dual is not None:
        best = global_maxima(dual, delta, tolerance=tolerance, budget=default_budget(dual, seconds))
        delta, gap, rough = best.delta, best.gap, best.unsettled
    elif problem.n_logits == 1 and c is None:
        return _worst_end(problem, theta, threat, x, y)
    elif problem.n_logits == 1 and c is not None and bare(problem.loss) in (F.mse_loss, nn.MSELoss):
        return _worst_square(problem, theta, threat, x, y, c)
    else:
        gap, rough = torch.full_like(x[:, 0], torch.inf), torch.ones(len(x), dtype=torch.bool, device=x.device)
    at = rough.nonzero()[:, 0]
    if len(at):
        part = None if c is None else c[at]
        gap[at] = torch.minimum(gap[at], curvature_gap(problem, theta, threat, x[at], y[at], delta[at], part))
    return delta, gap


def _worst_end(problem: HeadProblem, theta: Tensor, threat: ThreatModel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One logit, not smoothed: a convex function of w^T delta is largest at one of its ends."""
    through = problem.backbone.pullback(x, problem.weight(theta).expand(len(x), 1, -1))[:, 0]
    ends = [threat.linear_maximiser(sign * through, x) for sign in (1.0, -1.0)]
    up, down = (problem.losses(problem.logits(theta, problem.backbone(x + d)), y) for d in ends)
    noise = 16 * torch.finfo(x.dtype).eps * (1 + up.abs() + down.abs())
    gap = torch.where((up - down).abs() <= noise, noise, torch.zeros_like(up))
    return torch.where((up > down)[:, None], ends[0], ends[1]), gap


def _worst_square(
    problem: HeadProblem, theta: Tensor, threat: ThreatModel, x: Tensor, y: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """(u + <a, delta>)^2 + rho, u = z - y: the maximum over t of  t u - t^2 / 4 + sigma(t a).

    sigma(t a) = t <a, m> + sum_j of (t a_j)^2 / 2c_j + c_j h_j^2 / 2 while |t a_j| <= c_j h_j and |t a_j| h_j beyond: quadratic
    between the switches, which are sorted; in every piece the maximum is an end or where the slope is 0.
    """
    a = problem.backbone.pullback(x, problem.weight(theta).expand(len(x), 1, -1))[:, 0]
    u = (problem.logits(theta, problem.backbone(x))[:, 0] - y.reshape(-1).to(x))[:, None]
    lo, hi = threat.bounds(x)
    mid, half = (lo + hi) / 2, (hi - lo) / 2
    tiny = torch.finfo(x.dtype).tiny
    switch, order = (c * half / a.abs().clamp(min=tiny)).clamp(max=1e100).sort(1)
    bent = (a.square() / (2 * c.clamp(min=tiny))).gather(1, order)
    flat = (c * half.square() / 2).gather(1, order)
    steep = (a.abs() * half).gather(1, order)

    def pieces(v: Tensor) -> Tensor:  # after i switches: 0, v_1, v_1 + v_2, ...
        return torch.cat([torch.zeros_like(v[:, :1]), v.cumsum(1)], 1)

    square = pieces(bent)[:, -1:] - pieces(bent) - 0.25
    slope = pieces(steep)
    constant = pieces(flat)[:, -1:] - pieces(flat)
    begin = torch.cat([torch.zeros_like(u), switch], 1)
    end = torch.cat([switch, torch.full_like(u, 1e100)], 1)
    best = torch.full_like(u[:, 0], -torch.inf)
    delta = torch.zeros_like(x)
    for sign in (1.0, -1.0):
        first = sign * (u + (a * mid).sum(1, keepdim=True)) + slope
        top = torch.where(square < 0, first / (-2 * square).clamp(min=tiny), end)
        top = torch.minimum(torch.maximum(top, begin), end)
        # beyond the largest switch that exists the square alone decides
        t = torch.cat([top, begin], 1).clamp(max=1e50)
        value = constant.repeat(1, 2) + t * (first.repeat(1, 2) + t * square.repeat(1, 2))
        value, at = value.max(1)
        v = sign * t.gather(1, at[:, None]) * a
        here = threat.project(mid + v / c.clamp(min=tiny), x)
        delta = torch.where((value > best)[:, None], here, delta)
        best = torch.maximum(best, value)
    reached = (u[:, 0] + (a * delta).sum(1)).square() + Rho(threat, x, c).value(delta)
    noise = 64 * torch.finfo(x.dtype).eps * (1 + best.abs() + u[:, 0].square())
    return delta, (best - reached).clamp(min=0.0) + noise


def curvature_gap(
    problem: HeadProblem, theta: Tensor, threat: ThreatModel, x: Tensor, y: Tensor, delta: Tensor, c: Tensor | None
) -> Tensor:
    """Certified gap (n,) of any delta by a bound of the input curvature over B, for losses without a dual form.

    Along the segment to any other delta' in B,

        phi(delta') <= phi(delta) + <grad, delta' - delta> + 1/2 (L |delta' - delta|^2) - 1/2 sum c (delta'_j - delta_j)^2

    On an L2 sphere the force mu delta turns the linear term into -mu/2 |delta' - delta|^2: wherever L <= mu the maximum found
    is the global one.
    """
    if threat.eps == 0:
        return x.new_zeros(len(x))
    g = problem.loss_and_input_gradient(theta, x + delta, y)[1]
    rho = Rho(threat, x, c)
    force = g + rho.gradient(delta)
    cap = _curvature_cap(problem.loss)
    assert cap is not None
    through = problem.backbone.pullback(x[:1], problem.weight(theta)[None])[0]
    curvature = cap * torch.linalg.matrix_norm(through, 2).square()
    if threat.ball.euclidean:
        held = delta.norm(dim=1)
        mu = (force * delta).sum(1).clamp(min=0.0) / held.square().clamp(min=torch.finfo(x.dtype).tiny)
        rest = force - mu[:, None] * delta
        linear = ((threat.linear_maximiser(rest, x) - delta) * rest).sum(1).clamp(min=0.0)
        slack = mu / 2 * (threat.eps**2 - held.square()).clamp(min=0.0)
        return linear + slack + (curvature - mu).clamp(min=0.0) / 2 * (threat.eps + held).square()
    lo, hi = threat.bounds(x)
    reach = torch.maximum(hi - delta, delta - lo)
    linear = ((threat.linear_maximiser(force, x) - delta) * force).sum(1).clamp(min=0.0)
    excess = curvature - (torch.zeros_like(delta) if rho.c is None else rho.c)
    return linear + (excess.clamp(min=0.0) * reach.square()).sum(1) / 2


def _curvature_cap(loss: Any) -> float | None:
    """Largest second derivative of the loss in its logits, where it is known."""
    inner = getattr(loss, "module", loss)
    for name in ("weight", "pos_weight"):
        if getattr(inner, "keywords", {}).get(name, getattr(inner, name, None)) is not None:
            return None
    return {
        F.cross_entropy: 0.5,
        nn.CrossEntropyLoss: 0.5,
        F.binary_cross_entropy_with_logits: 0.25,
        nn.BCEWithLogitsLoss: 0.25,
        F.soft_margin_loss: 0.25,
        nn.SoftMarginLoss: 0.25,
        F.mse_loss: 2.0,
        nn.MSELoss: 2.0,
    }.get(bare(loss))
