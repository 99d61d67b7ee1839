"""How far the law of a method's outputs is from retraining's: per sample, over worlds.

Two laws estimated from few worlds are never quite equal. The floor is what retraining scores against itself, one half of the worlds
against the other; a method that is as good as retraining does not leave it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from lightning_muter.errors import ArgumentError
from lightning_muter.evidence.observed import Floats
from lightning_muter.evidence.roc import clopper_pearson


def kl_of_margins(unlearned: ArrayLike, retrained: ArrayLike) -> Floats:
    """KLoM per sample: KL(unlearned || retrained) in nats between the normal laws fitted to its margins, (samples,):

        1/2 (v / v_r - 1 - log(v / v_r) + (mu - mu_r)^2 / v_r)

    mu, v: mean and variance over the unlearned worlds; mu_r, v_r: over the retrained ones.

    Args:
        unlearned, retrained: (samples, worlds); the numbers of worlds may differ, NaN leaves a world out.

    Source: K. Georgiev et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", 2024 (there with histograms,
    which need hundreds of worlds).

    >>> kl_of_margins([[0.0, 2.0]], [[0.0, 2.0]]).tolist()
    [0.0]
    """
    u, r = _pair(unlearned, retrained)
    mean, variance = np.nanmean(u, 1) - np.nanmean(r, 1), np.nanvar(u, 1, ddof=1)
    other = np.nanvar(r, 1, ddof=1)
    least = 1e-3 * float(np.median(other)) + 1e-12
    variance, other = np.maximum(variance, least), np.maximum(other, least)
    return 0.5 * (variance / other - 1 - np.log(variance / other) + mean**2 / other)


def forget_quality_epsilon(unlearned: ArrayLike, retrained: ArrayLike, delta: float = 0.0) -> Floats:
    """Per sample the largest epsilon that a threshold on its margin (either way) shows, (samples,):

        eps = max over thresholds of  log((1 - delta - FPR) / FNR),  log((1 - delta - FNR) / FPR)

    Thresholds with an empty error are left out, unless the two laws do not overlap at all: then it is infinite.

    Args:
        unlearned, retrained: (samples, worlds); the numbers of worlds may differ, NaN leaves a world out.

    Source: the NeurIPS 2023 Machine Unlearning competition (E. Triantafillou et al., "Are we making progress in unlearning?").

    >>> forget_quality_epsilon([[0.0, 1.0]], [[2.0, 3.0]]).tolist()
    [inf]
    """
    if not 0 <= delta < 1:
        raise ArgumentError("delta", delta, "a number from 0 to below 1")
    u, r = _pair(unlearned, retrained)
    return np.array([_epsilon(a[~np.isnan(a)], b[~np.isnan(b)], delta) for a, b in zip(u, r, strict=True)])


def _epsilon(one: Floats, other: Floats, delta: float) -> float:
    best = 0.0
    cuts = np.unique(np.concatenate([one, other]))
    for a, b in ((one, other), (-one, -other)):
        edges = cuts if a is one else -cuts
        fnr, fpr = (a[:, None] < edges).mean(0), (b[:, None] >= edges).mean(0)
        if bool(((fnr == 0) & (fpr == 0)).any()):
            return math.inf
        inner = (fnr > 0) & (fpr > 0)
        for miss, false in ((fnr[inner], fpr[inner]), (fpr[inner], fnr[inner])):
            power = np.maximum(1 - delta - false, 1e-300) / miss
            best = max(best, float(np.log(power).max(initial=0.0)))
    return best if best > 1e-12 else 0.0  # of equal rates: rounding


def empirical_epsilon(
    released: ArrayLike, reference: ArrayLike, delta: float, confidence: float = 0.95
) -> tuple[float, float]:
    """What two samples of one statistic show of (epsilon, delta)-indistinguishability: an estimate and a lower bound.

        eps = max over thresholds of  log((1 - delta - FPR) / FNR),  log((1 - delta - FNR) / FPR)

    One half of either sample chooses the threshold (and the way), the other half counts; the bound uses Clopper-Pearson limits of
    both error rates, each at half of what ``confidence`` leaves. A small delta leaves no power: errors of that size are not met.

    Args:
        released: values of the statistic under one mechanism, reference: under the other, (n,) each, n at least 4.

    Returns:
        the estimate and the lower bound, neither below 0.

    >>> g = np.random.default_rng(0)
    >>> released, reference = g.normal(1, 1, 20000), g.normal(0, 1, 20000)  # mu = 1: eps is 1.57 at delta = 0.05
    >>> value, low = empirical_epsilon(released, reference, delta=0.05)
    >>> bool(0 < low < value < 2)
    True

    Source: P. Kairouz et al., "The Composition Theorem for Differential Privacy", 2015 (the region of error rates); M. Jagielski
    et al., "Auditing Differentially Private Machine Learning", NeurIPS 2020.
    """
    a, b = (np.asarray(v, np.float64).reshape(-1) for v in (released, reference))
    if min(len(a), len(b)) < 4:
        raise ArgumentError("released", (len(a), len(b)), "at least four values each")
    a1, a2, b1, b2 = a[::2], a[1::2], b[::2], b[1::2]
    cuts = np.quantile(np.concatenate([a1, b1]), np.linspace(0, 1, 401))
    least = 1 / min(len(a1), len(b1))
    best, chosen = -math.inf, (cuts[0], False, False)
    for flip in (False, True):
        for cut in cuts:
            miss, false = _errors(a1, b1, cut, flip)
            for swap, (p, q) in enumerate(((miss, false), (false, miss))):
                found = math.log(max(1 - delta - q, 1e-300) / max(p, 5 * least))
                if found > best:
                    best, chosen = found, (cut, flip, bool(swap))
    cut, flip, swapped = chosen
    miss, false = _errors(a2, b2, cut, flip)
    p, q = (false, miss) if swapped else (miss, false)
    n_p, n_q = (len(b2), len(a2)) if swapped else (len(a2), len(b2))
    value = math.log(max(1 - delta - q, 1e-300) / max(p, 1 / n_p))
    # two-sided intervals: either upper limit is exceeded half as often as `confidence` leaves
    p_high = clopper_pearson(round(p * n_p), n_p, confidence)[1]
    q_high = clopper_pearson(round(q * n_q), n_q, confidence)[1]
    low = math.log(max(1 - delta - q_high, 1e-300) / p_high)
    return max(value, 0.0), max(low, 0.0)


def _errors(a: Floats, b: Floats, cut: float, flip: bool) -> tuple[float, float]:
    """Shares of ``a`` not called ``a``, and of ``b`` called ``a``."""
    hit_a, hit_b = (a < cut, b < cut) if flip else (a >= cut, b >= cut)
    return float(1 - hit_a.mean()), float(hit_b.mean())


def residual_knowledge(unlearned: ArrayLike, retrained: ArrayLike) -> Floats:
    """Per removed sample the share of points around it that get its training label from the unlearned model minus the share
    from the retrained one, (samples,): above 0 where the model still knows the neighbourhood of what it should have forgotten.

    Args:
        unlearned, retrained: (samples, points) of bool: whether the prediction is the training label, on the same points.

    Source: "Residual knowledge", arXiv 2601.22359.

    >>> residual_knowledge([[True, True]], [[True, False]]).tolist()
    [0.5]
    """
    u, r = (np.asarray(v, bool).astype(np.float64) for v in (unlearned, retrained))
    if u.shape != r.shape or u.ndim != 2:
        raise ArgumentError("unlearned", u.shape, f"(samples, points) as retrained {r.shape}")
    return u.mean(1) - r.mean(1)


def _pair(one: ArrayLike, other: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise ArgumentError("unlearned", a.shape, f"(samples, worlds) for the same samples as retrained {b.shape}")
    return a, b
