"""AUC of an attack with an interval that allows for other worlds and other points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from lightning_muter.evidence.attacks import Attack
from lightning_muter.evidence.observed import Flags, Floats, Observed
from lightning_muter.evidence.roc import auc, curve, tpr_at_fpr

CONFIDENCE = 0.95
_GRID = np.linspace(0.0, 1.0, 201)


@dataclass(frozen=True)
class Estimate:
    """What an attack achieves.

    Attributes:
        auc, low, high: of telling removed from never seen; the 95 % interval.
        tpr_at_fpr_1, tpr_at_fpr_10: true positives at 1 % and 10 % false ones.
        draws: AUC under three kinds of resampling, (3, draws): worlds, points, single entries.
        fpr, tpr: the curve.
    """

    auc: float
    low: float
    high: float
    tpr_at_fpr_1: float
    tpr_at_fpr_10: float
    draws: Floats
    fpr: Floats
    tpr: Floats


def estimate(attack: Attack, seen: Observed, *, splits: int = 4, draws: int = 100, seed: int = 0) -> Estimate:
    """Attack every removed and every out entry of ``seen``.

    An attack that learns from worlds learns from one half and is tested on the other, both ways, for some random ``splits``;
    the AUC is taken within each tested half, where all scores come from one fit, and averaged.

    The interval resamples worlds and points with replacement, the attack fitted anew each time; worlds three at a time where
    :func:`~lightning_muter.evidence.observed.draw_roles` has dealt the roles, so that they stay balanced. The two variances are
    added, and that of resampling single entries, which both contain, is taken off (resampling both at once is too wide: A.
    Owen, "The pigeonhole bootstrap", 2007); the sum counts at least as much as the mean of the two. The same ``seed`` gives
    the same splits and draws for any method: see :func:`difference`.

    >>> from lightning_muter.evidence.attacks import LiRA
    >>> from lightning_muter.evidence.observed import REMOVED, draw_roles
    >>> roles = draw_roles(points=12, worlds=18, seed=0)
    >>> noise = np.random.default_rng(0).normal(size=roles.shape)
    >>> remembered = estimate(LiRA(), Observed(noise + 3 * (roles == REMOVED), roles))
    >>> retrained = estimate(LiRA(), Observed(noise, roles))
    >>> retrained.low < 0.5 < retrained.high < remembered.low
    True
    >>> gap, low, high = difference(remembered, retrained)
    >>> low > 0.2
    True
    """
    points, worlds = seen.margins.shape
    generator = np.random.default_rng(seed)
    halves = list(_halves(worlds, splits, generator)) if attack.twofold else [np.ones(worlds, bool)]
    whole = np.ones((1, points, worlds))
    parts = [_test(attack, seen, learn, whole) for learn in halves]
    value = float(np.mean([auc(positives, negatives) for positives, negatives in parts]))
    resampled = np.stack([_resampled(attack, seen, halves, w) for w in _weights(seen.roles, draws, generator)])
    low, high = _interval(value, resampled)
    one, ten = (float(np.mean([tpr_at_fpr(*part, rate) for part in parts])) for rate in (0.01, 0.10))
    mean_curve = np.mean([np.interp(_GRID, *curve(*part)) for part in parts], axis=0)
    return Estimate(value, low, high, one, ten, resampled, _GRID, mean_curve)


def difference(one: Estimate, other: Estimate) -> tuple[float, float, float]:
    """AUC of one minus the other's on the same worlds and draws, with its 95 % interval: paired, so that what both have in common
    cancels.
    """
    value = one.auc - other.auc
    half = norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt(_variance(one.draws - other.draws))
    return value, float(value - half), float(value + half)


def _interval(value: float, draws: Floats) -> tuple[float, float]:
    """Normal on the scale of log(a / (1 - a)), so that it stays between 0 and 1."""
    a = min(max(value, 1e-3), 1 - 1e-3)
    half = norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt(_variance(draws)) / (a * (1 - a))
    low, high = expit(logit(a) - half), expit(logit(a) + half)
    return float(min(low, value)), float(max(high, value))


def _variance(draws: Floats) -> float:
    worlds, points, entries = draws.var(axis=1, ddof=1)
    return float(max(worlds + points - entries, (worlds + points) / 2))


def _halves(worlds: int, splits: int, generator: np.random.Generator) -> Iterator[Flags]:
    for _ in range(splits):
        half = np.zeros(worlds, bool)
        half[generator.permutation(worlds)[: worlds // 2]] = True
        yield half
        yield ~half


def _weights(roles: NDArray[np.int64], draws: int, generator: np.random.Generator) -> Iterator[Floats]:
    points, worlds = roles.shape
    shape = (draws, points, worlds)
    together = np.arange(worlds) // 3 if _balanced(roles) else np.arange(worlds)
    groups = int(together[-1]) + 1
    of_worlds = generator.multinomial(groups, np.full(groups, 1 / groups), size=draws)[:, together]
    of_points = generator.multinomial(points, np.full(points, 1 / points), size=draws)
    yield np.broadcast_to(of_worlds[:, None, :].astype(np.float64), shape)
    yield np.broadcast_to(of_points[:, :, None].astype(np.float64), shape)
    yield generator.poisson(1.0, shape).astype(np.float64)


def _balanced(roles: NDArray[np.int64]) -> bool:
    whole = roles.shape[1] // 3 * 3
    threes = np.sort(roles[:, :whole].reshape(len(roles), -1, 3), axis=2)
    return whole > 6 and bool((threes == np.arange(3)).all())


def _tested(attack: Attack, learn: Flags) -> Flags:
    return ~learn if attack.twofold else np.ones_like(learn)


def _test(attack: Attack, seen: Observed, learn: Flags, weights: Floats) -> tuple[Floats, Floats]:
    """Scores of the removed and of the out entries in the tested worlds."""
    scores, tested = attack.scores(seen, learn, weights)[0], _tested(attack, learn)
    return scores[seen.removed & tested], scores[seen.out & tested]


def _resampled(attack: Attack, seen: Observed, halves: list[Flags], weights: Floats) -> Floats:
    """Mean AUC over the halves, per draw."""
    total = np.zeros(len(weights))
    for learn in halves:
        scores = attack.scores(seen, learn, weights)
        use = (seen.removed | seen.out) & _tested(attack, learn)
        total += weighted_auc(scores[:, use], seen.removed[use], weights[:, use])
    return total / len(halves)


def weighted_auc(scores: Floats, positive: Flags, weights: Floats) -> Floats:
    """AUC per row where entries count with weights, equal scores half. scores: (rows, n), or (1, n) for all; weights: (rows, n);
    positive: (n,).
    """
    order = np.argsort(scores, axis=1, kind="stable")
    s, p = np.take_along_axis(scores, order, 1), positive[order]
    w = np.take_along_axis(weights, np.broadcast_to(order, weights.shape), 1)
    below = np.cumsum(np.where(p, 0.0, w), axis=1)  # weight of negatives up to here, in order
    n = s.shape[1]
    fresh = np.concatenate([np.ones((len(s), 1), bool), s[:, 1:] != s[:, :-1]], axis=1)
    first = np.maximum.accumulate(np.where(fresh, np.arange(n), 0), axis=1)
    ends = np.concatenate([fresh[:, 1:], np.ones((len(s), 1), bool)], axis=1)
    last = np.minimum.accumulate(np.where(ends, np.arange(n), n - 1)[:, ::-1], axis=1)[:, ::-1]

    def upto(index: NDArray[np.int64]) -> Floats:
        return np.take_along_axis(below, np.broadcast_to(index, below.shape), 1)

    halfway = (np.where(first > 0, upto(np.maximum(first - 1, 0)), 0.0) + upto(last)) / 2
    hits, pairs = (np.where(p, w, 0.0) * halfway).sum(1), np.where(p, w, 0.0).sum(1) * below[:, -1]
    return np.where(pairs > 0, hits / np.where(pairs > 0, pairs, 1.0), 0.5)
