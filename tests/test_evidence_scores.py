"""Attacks and laws on scores of known distribution: closed forms, coverage without signal, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from lightning_muter.errors import ArgumentError, MismatchError
from lightning_muter.evidence.attacks import RMIA, Attack, LiRA, LossThreshold
from lightning_muter.evidence.estimate import difference, estimate, weighted_auc
from lightning_muter.evidence.laws import (
    empirical_epsilon,
    forget_quality_epsilon,
    kl_of_margins,
    residual_knowledge,
)
from lightning_muter.evidence.observed import OUT, REMOVED, Observed, draw_roles
from lightning_muter.evidence.roc import auc, auc_interval, clopper_pearson, curve, tpr_at_fpr

ATTACKS = [LossThreshold(), LiRA(), RMIA()]


@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_gaussian_scores_give_the_closed_forms(shift: float) -> None:
    n, generator = 4000, np.random.default_rng(1)
    positives, negatives = generator.normal(shift, 1, n), generator.normal(0, 1, n)
    area = norm.cdf(shift / math.sqrt(2))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)  # Hanley and McNeil, 1982
    error = math.sqrt((area * (1 - area) + (n - 1) * (q1 + q2 - 2 * area**2)) / n**2)
    assert abs(auc(positives, negatives) - area) < 2 * error
    for fpr in (0.01, 0.1):
        cut = norm.isf(fpr)
        tpr = norm.sf(cut - shift)
        slope = norm.pdf(cut - shift) / norm.pdf(cut)  # of the curve: the threshold is estimated too
        error = math.sqrt(tpr * (1 - tpr) / n + slope**2 * fpr * (1 - fpr) / n)
        assert abs(tpr_at_fpr(positives, negatives, fpr) - tpr) < 2 * error
    false, true = curve(positives, negatives)
    assert np.trapezoid(true, false) == pytest.approx(auc(positives, negatives))


def world(seed: int, shift: float = 0.0, points: int = 18, worlds: int = 18) -> Observed:
    """Points of different margins and scatter, worlds that move all margins."""
    g = np.random.default_rng(seed)
    roles = draw_roles(points, worlds, seed)
    common, wide = g.normal(0, 0.5, worlds), 0.5 + g.random((points, 1))
    margins = g.normal(0, 3, (points, 1)) + common + wide * g.normal(0, 1, roles.shape)
    population = g.normal(0, 3, (30, 1)) + common + g.normal(0, 1, (30, worlds))
    return Observed(margins + shift * (roles == REMOVED), roles, population)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_without_a_signal_auc_is_a_half_and_intervals_cover(attack: Attack) -> None:
    found = [estimate(attack, world(seed, points=18, worlds=18), splits=1, draws=30, seed=seed) for seed in range(200)]
    assert abs(np.mean([e.auc for e in found]) - 0.5) < 0.01
    assert 0.92 <= np.mean([e.low <= 0.5 <= e.high for e in found]) <= 0.98


def test_intervals_of_independent_scores_cover() -> None:
    generator = np.random.default_rng(0)
    found = [auc_interval(generator.normal(size=60), generator.normal(size=60), draws=200) for _ in range(200)]
    assert abs(np.mean([value for value, _, _ in found]) - 0.5) < 0.01
    assert 0.92 <= np.mean([low <= 0.5 <= high for _, low, high in found]) <= 0.98


def test_a_per_example_attack_sees_what_one_threshold_does_not() -> None:
    seen = world(0, shift=1.5, points=40, worlds=36)
    weak, strong = estimate(LossThreshold(), seen), estimate(LiRA(), seen)
    assert weak.high < 0.75 < strong.low < strong.auc < strong.high
    gap, low, high = difference(strong, weak)
    assert gap == strong.auc - weak.auc
    assert 0.05 < low < gap < high
    assert estimate(RMIA(), seen).low > 0.55
    assert difference(strong, strong) == (0, 0, 0)


def test_unequal_counts_per_point_do_not_bias_the_attack() -> None:
    means = []
    for seed in range(150):
        seen = world(seed, points=12, worlds=12)
        half = np.arange(12) < 6
        weights = np.ones((1, 12, 12))
        scores = LiRA().scores(seen, half, weights)[0]
        means.append(scores[seen.removed & ~half].mean() - scores[seen.out & ~half].mean())
    assert abs(np.mean(means)) < 2.5 * np.std(means) / math.sqrt(150)


def test_weighted_auc_is_that_of_scikit_learn_ties_included() -> None:
    g = np.random.default_rng(0)
    scores, positive = g.integers(0, 6, (3, 40)).astype(float), g.random(40) < 0.4
    weights = g.integers(0, 3, (3, 40)).astype(float)
    for row, s, w in zip(weighted_auc(scores, positive, weights), scores, weights, strict=True):
        assert row == pytest.approx(roc_auc_score(positive, s, sample_weight=w))


def test_exact_intervals() -> None:
    low, high = clopper_pearson(3, 20, 0.9)
    tails = [
        sum(math.comb(20, k) * p**k * (1 - p) ** (20 - k) for k in ks)
        for p, ks in ((low, range(3, 21)), (high, range(4)))
    ]
    assert tails == pytest.approx([0.05, 0.05])


def test_kl_of_normal_margins() -> None:
    g = np.random.default_rng(0)
    found = kl_of_margins(g.normal(1, 2, (40, 4000)), g.normal(0, 1, (40, 4000)))
    assert np.median(found) == pytest.approx(0.5 * (4 - 1 - math.log(4) + 1), rel=0.05)
    assert np.median(kl_of_margins(g.normal(0, 1, (40, 4000)), g.normal(0, 1, (40, 4000)))) < 1e-3


def test_forget_quality_of_two_coins() -> None:
    # margins 0 or 1; P(1) = .8 unlearned, .4 retrained: the best test says eps = log(.6 / .2)
    u, r = [[1.0] * 8 + [0.0] * 2], [[1.0] * 4 + [0.0] * 6]
    assert forget_quality_epsilon(u, r)[0] == pytest.approx(math.log(3))
    assert forget_quality_epsilon(u, r, delta=0.1)[0] == pytest.approx(math.log(0.5 / 0.2))
    assert forget_quality_epsilon(r, r)[0] == 0


def test_empirical_epsilon_of_a_gaussian_mechanism() -> None:
    g, delta, mu = np.random.default_rng(0), 0.05, 1.5
    cuts = np.linspace(-4, 6, 2000)
    true = max(math.log(max(norm.sf(c - mu) - delta, 1e-300) / norm.sf(c)) for c in cuts)
    value, low = empirical_epsilon(g.normal(mu, 1, 40000), g.normal(0, 1, 40000), delta)
    assert low <= true
    assert value == pytest.approx(true, rel=0.2)
    same = empirical_epsilon(g.normal(0, 1, 2000), g.normal(0, 1, 2000), delta)
    assert same[1] == 0


def test_residual_knowledge_is_a_difference_of_shares() -> None:
    assert residual_knowledge([[1, 1, 0, 1]], [[1, 0, 0, 0]]).tolist() == [0.5]
    with pytest.raises(ArgumentError, match="unlearned"):
        residual_knowledge([[1, 0]], [[1, 0, 1]])


def test_roles_are_thirds() -> None:
    roles = draw_roles(40, 32, 0)
    assert {n for kind in (REMOVED, OUT) for n in (roles == kind).sum(0).tolist()} <= {13, 14}
    assert {n for kind in (REMOVED, OUT) for n in (roles[:, :30] == kind).sum(1).tolist()} == {10}


def test_shadows_of_other_training_are_refused() -> None:
    seen = world(0)
    with pytest.raises(MismatchError, match=r"world 2 was trained as decay=1, world 0 as decay=0"):
        Observed(seen.margins, seen.roles, None, ["decay=0", "decay=0", "decay=1"])
    with pytest.raises(ArgumentError, match="finite"):
        Observed(np.full((3, 5), np.nan), np.zeros((3, 5), int))
    with pytest.raises(ArgumentError, match="four worlds"):
        Observed(np.zeros((3, 3)), np.zeros((3, 3), int))
    with pytest.raises(ArgumentError, match="population"):
        estimate(RMIA(), Observed(seen.margins, seen.roles))
