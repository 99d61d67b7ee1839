"""Which losses are log sum exp(z) - <t, z>: those have the dual problem of :mod:`lightning_muter.certificate.dual`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.certificate.dual import Dual
from lightning_muter.curvature.problem.head import HeadProblem


def as_dual(
    problem: HeadProblem, theta: Tensor, threat: ThreatModel, x: Tensor, y: Tensor, c: Tensor | None
) -> Dual | None:
    """The dual problem of these samples, or ``None`` for a loss that is not known to have this form."""
    z = problem.logits(theta, problem.backbone(x))
    target = gibbs_targets(problem, z, y)
    if target is None:
        return None
    hard = bool(((target == 0) | (target == 1)).all())
    through = problem.backbone.pullback(x[:1], problem.weight(theta)[None])[0]  # (K, D)
    if problem.n_logits == 1:
        z, through = _two(z), torch.cat([torch.zeros_like(through), through])
    k = z.shape[1]
    if hard and c is None:
        own = target.argmax(1)
        wrong = torch.arange(k - 1, device=x.device)[None] + (
            torch.arange(k - 1, device=x.device)[None] >= own[:, None]
        )
        rows = through[wrong] - through[own][:, None]
        return Dual(threat, x, z.gather(1, wrong) - z.gather(1, own[:, None]), rows, None, True)
    rows = through[None] - (target @ through)[:, None]
    return Dual(threat, x, z - (target * z).sum(1, keepdim=True), rows, c, False)


def gibbs_targets(problem: HeadProblem, z: Tensor, y: Tensor) -> Tensor | None:
    """t (n, K) with loss = log sum exp(z) - <t, z> ((n, 2), logits (0, z), for one logit), or ``None``.

    Guessed from the labels and checked against the loss itself at a few logits of every sample.
    """
    target = _targets(problem, y)
    if target is None:
        return None
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 5.0):
        there = z + scale * torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        both = _two(there) if problem.n_logits == 1 else there
        said, form = problem.losses(there, y), both.logsumexp(1) - (both * target).sum(1)
        if bool(((said - form).abs() > 1e3 * torch.finfo(z.dtype).eps * (1 + both.abs().amax(1))).any()):
            return None
    return target


def _two(z: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(z), z], 1)


def _targets(problem: HeadProblem, y: Tensor) -> Tensor | None:
    k = problem.n_logits
    if k == 1:
        label = y.reshape(-1, 1).to(problem.dtype)
        if bool((label < 0).any()):
            label = (1 + label) / 2  # -1 and 1
        target = torch.cat([1 - label, label], 1)
    elif y.dim() == 1 and not y.is_floating_point():
        if bool((y < 0).any() | (y >= k).any()):
            return None
        inner = getattr(problem.loss, "module", problem.loss)
        share = float(getattr(inner, "keywords", {}).get("label_smoothing", getattr(inner, "label_smoothing", 0.0)))
        target = (1 - share) * F.one_hot(y.long(), k).to(problem.dtype) + share / k
    elif y.shape == (len(y), k):
        target = y.to(problem.dtype)
    else:
        return None
    if bool((target < 0).any()) or bool(((target.sum(1) - 1).abs() > 8 * torch.finfo(target.dtype).eps * k).any()):
        return None
    return target
