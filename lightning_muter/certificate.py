"""A certified distance to the retrained optimum, for linear models with a convex loss and every parameter decayed.

F_R is m-strongly convex, m = min(lambda) |R|. With g the gradient at inexact maximisers whose total gap is at most eta,

    |w - w_R*| <= (|g| + sqrt(|g|^2 + 4 m eta)) / (2 m)

eta is certified, not assumed. Along the segment to any other delta' in B,

    phi(delta') <= phi(delta) + <grad, delta' - delta> + 1/2 (L |delta' - delta|^2) - 1/2 sum c (delta'_j - delta_j)^2

with L an upper bound of the input curvature over all of B. On an L2 sphere the force mu delta turns the linear term into
-mu/2 |delta' - delta|^2: wherever L <= mu the maximum found is the global one.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.curvature.inner import Rho
from lightning_muter.curvature.objective import Evaluation, RobustObjective
from lightning_muter.curvature.problem import HeadProblem
from lightning_muter.threat import ThreatModel


def why_no_certificate(problem: HeadProblem, decay: Tensor) -> str | None:
    """Why no bound can be given, or None."""
    if not problem.backbone.affine:
        return "no certificate: with a nonlinear backbone the global inner maximum is not known"
    if bool((decay <= 0).any()):
        return "no certificate: some parameters of the head have no weight decay, so F is not strongly convex in them"
    if _curvature_cap(problem.loss) is None:
        return f"no certificate: no bound of the second derivative of {problem.loss!r} is known"
    return None


def certified_distance(gradient: Tensor, decay: Tensor, count: int, gap: float) -> float:
    """The bound above; ``gap``: total eta.

    >>> round(certified_distance(torch.tensor([3.0]), torch.tensor([0.5]), 2, 0.0), 6)
    3.0
    """
    m = float(decay.min()) * count
    g = float(gradient.norm())
    return (g + (g * g + 4 * m * max(gap, 0.0)) ** 0.5) / (2 * m)


def certify(objective: RobustObjective, theta: Tensor, evaluation: Evaluation) -> float:
    """The bound at theta, given the objective's evaluation there.

    One logit: the loss is a convex function of w^T delta, so the global maximiser is one of two that are known in closed form
    (unless it is smoothed): the gradient is taken there and nothing is left to the gap.
    """
    problem, threat = objective.problem, objective.threat
    if problem.n_logits == 1 and objective.smoothing.anchor is None and threat.eps > 0:
        exact = replace(objective, delta=_worst_of_two(objective, theta), tick=None)
        sums, delta = exact.sums(theta, settle=False)
        gradient = exact.evaluation(theta, sums, delta).gradient
        return certified_distance(gradient, objective.decay, objective.count, 0.0)
    gap = total_gap(objective, theta, evaluation.delta)
    return certified_distance(evaluation.gradient, objective.decay, objective.count, gap)


def _worst_of_two(objective: RobustObjective, theta: Tensor) -> Tensor:
    problem, threat = objective.problem, objective.threat
    found = []
    for batch in objective.source.batches(objective.positions):
        x = batch.x.to(problem.backbone.exact_dtype)
        through = problem.backbone.pullback(x, problem.weight(theta).expand(len(x), 1, -1))[:, 0]
        ends = [threat.linear_maximiser(sign * through, x) for sign in (1.0, -1.0)]
        up, down = (problem.losses(problem.logits(theta, problem.backbone(x + d)), batch.y) for d in ends)
        found.append(torch.where((up > down)[:, None], ends[0], ends[1]))
    return torch.cat(found)


def total_gap(objective: RobustObjective, theta: Tensor, delta: Tensor) -> float:
    """eta: an upper bound of sum_i w_i (phi_i - value at delta_i), (n, D) maximisers in the order of the objective."""
    total, done = 0.0, 0
    for batch in objective.source.batches(objective.positions):
        n = len(batch.x)
        x = batch.x.to(objective.problem.backbone.exact_dtype)
        c = objective.coefficients(done, x, batch.y)
        gaps = inner_gap(objective.problem, theta, objective.threat, x, batch.y, delta[done : done + n], c)
        total += float((gaps if batch.weight is None else gaps * batch.weight).sum())
        done += n
    return total


def inner_gap(
    problem: HeadProblem, theta: Tensor, threat: ThreatModel, x: Tensor, y: Tensor, delta: Tensor, c: Tensor | None
) -> Tensor:
    """Certified gap of each maximiser, (n,): the smaller of the quadratic bound and of the separate-logits bound."""
    if threat.eps == 0:
        return x.new_zeros(len(x))
    loss, g = problem.loss_and_input_gradient(theta, x + delta, y)
    rho = Rho(threat, x, c)
    force = g + rho.gradient(delta)
    curvature = _curvature_over_ball(problem, theta, threat, x, delta)
    if threat.norm == "l2":
        held = delta.norm(dim=1)
        mu = (force * delta).sum(1).clamp(min=0.0) / held.square().clamp(min=torch.finfo(x.dtype).tiny)
        rest = force - mu[:, None] * delta
        linear = ((threat.linear_maximiser(rest, x) - delta) * rest).sum(1).clamp(min=0.0)
        slack = mu / 2 * (threat.eps**2 - held.square()).clamp(min=0.0)
        quadratic = linear + slack + (curvature - mu).clamp(min=0.0) / 2 * (threat.eps + held).square()
    else:
        lo, hi = threat.bounds(x)
        reach = torch.maximum(hi - delta, delta - lo)
        linear = ((threat.linear_maximiser(force, x) - delta) * force).sum(1).clamp(min=0.0)
        excess = curvature[:, None] - (0 if rho.c is None else rho.c)
        quadratic = linear + (excess.clamp(min=0.0) * reach.square()).sum(1) / 2
    return torch.minimum(quadratic, _separate_logits(problem, theta, threat, x, y, loss, rho, delta))


def _curvature_over_ball(problem: HeadProblem, theta: Tensor, threat: ThreatModel, x: Tensor, delta: Tensor) -> Tensor:
    """L (n,): an upper bound of the largest eigenvalue of d2l/dx2 over B(x).

    W^T Lambda W is unchanged when all rows of W move together (softmax), hence the centred W. For cross-entropy Lambda
    <= diag(p) and 2 max_k p_k (1 - p_k), with the probabilities bounded over B by separate extremes of the logit gaps.
    """
    cap = _curvature_cap(problem.loss)
    assert cap is not None
    weight = problem.weight(theta)
    if _is_softmax(problem.loss):
        weight = weight - weight.mean(0)
    through = problem.backbone.pullback(x[:1], weight[None])[0]  # (K, D)
    top = torch.linalg.matrix_norm(through, 2).square()
    whole = (cap * top).expand(len(x))
    if not _is_softmax(problem.loss):
        return whole
    z = problem.logits(theta, problem.backbone(x))
    k = z.shape[1]
    high = z.new_zeros(len(x), k)  # sum over l of exp(smallest of z_l - z_k)
    low = z.new_zeros(len(x), k)
    for a in range(k):
        for b in range(k):
            if a != b:
                direction = (through[b] - through[a]).expand(len(x), -1).to(x)
                least = z[:, b] - z[:, a] + (threat.linear_maximiser(-direction, x) * direction).sum(1)
                most = z[:, b] - z[:, a] + (threat.linear_maximiser(direction, x) * direction).sum(1)
                high[:, a] += least.exp()
                low[:, a] += most.exp()
    p_high, p_low = 1 / (1 + high), 1 / (1 + low)
    nearest = torch.minimum(torch.maximum(torch.full_like(p_high, 0.5), p_low), p_high)
    spread = 2 * (nearest * (1 - nearest)).amax(1)
    scaled = through[None] * p_high.sqrt()[:, :, None]
    diagonal = torch.linalg.eigvalsh(scaled @ scaled.mT)[:, -1]
    return torch.minimum(torch.minimum(whole, spread * top), diagonal)


def _separate_logits(
    problem: HeadProblem,
    theta: Tensor,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    loss: Tensor,
    rho: Rho,
    delta: Tensor,
) -> Tensor:
    """phi <= loss with every logit gap at its own worst, plus the largest rho; infinite where the loss is not of that kind."""
    inf = torch.full_like(loss, torch.inf)
    most_rho = 0 if rho.c is None else (rho.c * rho.half.square()).sum(1) / 2
    weight = problem.weight(theta)
    z = problem.logits(theta, problem.backbone(x))
    if _is_softmax(problem.loss) and z.shape[1] > 1 and not y.is_floating_point() and not _smoothed(problem.loss):
        through = problem.backbone.pullback(x[:1], weight[None])[0]
        own = through[y]
        total = torch.ones_like(loss)
        for k in range(z.shape[1]):
            direction = (through[k] - own).to(x)
            gap = z[:, k] - z.gather(1, y[:, None])[:, 0]
            gap = gap + (threat.linear_maximiser(direction, x) * direction).sum(1)
            total = total + torch.where(y == k, torch.zeros_like(gap), gap.exp())
        return (total.log() + most_rho - loss - rho.value(delta)).clamp(min=0.0)
    if z.shape[1] == 1:
        through = problem.backbone.pullback(x[:1], weight[None])[0]
        direction = through.expand(len(x), -1).to(x)
        up = z[:, 0] + (threat.linear_maximiser(direction, x) * direction).sum(1)
        down = z[:, 0] + (threat.linear_maximiser(-direction, x) * direction).sum(1)
        # a convex function of one number is largest at an end
        worst = torch.maximum(problem.losses(up[:, None], y), problem.losses(down[:, None], y))
        return (worst + most_rho - loss - rho.value(delta)).clamp(min=0.0)
    return inf


def _bare(loss: Any) -> Any:
    loss = getattr(loss, "module", loss)
    while isinstance(loss, functools.partial):
        loss = loss.func
    return type(loss) if isinstance(loss, nn.Module) else loss


def _is_softmax(loss: Any) -> bool:
    return _bare(loss) in (F.cross_entropy, nn.CrossEntropyLoss)


def _smoothed(loss: Any) -> bool:
    loss = getattr(loss, "module", loss)
    keywords = getattr(loss, "keywords", {})
    smoothing = keywords.get("label_smoothing", getattr(loss, "label_smoothing", 0.0))
    weight = keywords.get("weight", getattr(loss, "weight", None))
    return bool(smoothing) or weight is not None


def _curvature_cap(loss: Any) -> float | None:
    """Largest second derivative of the loss in its logits, where it is known."""
    if _is_softmax(loss):
        inner = getattr(loss, "module", loss)
        weight = getattr(inner, "keywords", {}).get("weight", getattr(inner, "weight", None))
        return 0.5 if weight is None else None
    return {
        F.binary_cross_entropy_with_logits: 0.25,
        nn.BCEWithLogitsLoss: 0.25,
        F.soft_margin_loss: 0.25,
        nn.SoftMarginLoss: 0.25,
        F.mse_loss: 2.0,
        nn.MSELoss: 2.0,
    }.get(_bare(loss))
