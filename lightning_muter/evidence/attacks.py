"""Membership attacks on removals: does a margin tell "removed by this method" from "never seen"?

Scores are larger where an attack believes in "removed". A perfect removal leaves every attack at an AUC of 1/2, as retraining
does but for noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from lightning_muter.errors import ArgumentError
from lightning_muter.evidence.observed import Flags, Floats, Observed


class Attack(ABC):
    """From margins to scores.

    Attributes:
        name: in tables.      twofold: whether it learns from worlds, so that it must be tested on others.
    """

    name: ClassVar[str]
    twofold: ClassVar[bool] = True

    @abstractmethod
    def scores(self, seen: Observed, learn: Flags, weights: Floats) -> Floats:
        """Scores (draws, points, worlds), or (1, points, worlds) where the draws do not matter.

        Args:
            learn: (worlds,), the worlds whose roles may be looked at.
            weights: (draws, points, worlds), how often an entry counts in each draw of a bootstrap.
        """


class LossThreshold(Attack):
    """One threshold on the loss for all points: ``-loss = log sigmoid(m)``. Weak: it flatters, and is here to show that.

    Source: S. Yeom et al., "Privacy Risk in Machine Learning", CSF 2018.
    """

    name, twofold = "loss threshold", False

    def scores(self, seen: Observed, learn: Flags, weights: Floats) -> Floats:
        return -np.logaddexp(0.0, -seen.margins)[None]


class LiRA(Attack):
    """Per-example likelihood ratio (U-LiRA): normal densities of the point's margins where it was removed and where it was out, of
    a common variance v, fitted to half of the worlds:

        score = (mu_removed - mu_out) (m - c) / v

    c is the mean of both kinds together, which is halfway between the two where they are equally many (the likelihood ratio
    itself); where they are not, halfway would lean towards the rarer kind, even without any signal.

    Sources: N. Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022; J. Hayes et al., "Inexact
    Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy", SaTML 2025.
    """

    name = "U-LiRA"
    floor = 0.05  # of the median variance: with a few worlds per point a variance may come out far too small

    def scores(self, seen: Observed, learn: Flags, weights: Floats) -> Floats:
        m = seen.margins
        a, b = (weights * (kind & learn) for kind in (seen.removed, seen.out))
        n_a, n_b = a.sum(2), b.sum(2)
        known = (n_a > 0) & (n_b > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mu_a, mu_b = (a * m).sum(2) / n_a, (b * m).sum(2) / n_b
            centre = ((a + b) * m).sum(2) / (n_a + n_b)
        mu_a, mu_b, centre = (np.where(known, value, 0.0) for value in (mu_a, mu_b, centre))
        squares = (a * (m - mu_a[..., None]) ** 2 + b * (m - mu_b[..., None]) ** 2).sum(2)
        variance = squares / np.maximum(n_a + n_b - 2, 1)
        variance = np.maximum(variance, self.floor * np.median(variance, axis=1, keepdims=True)) + 1e-12
        return ((mu_a - mu_b) / variance)[..., None] * (m - centre[..., None])


class RMIA(Attack):
    """Share of the population whose likelihood ratio is below the point's (online, with references of both kinds):

        score = mean_z [ LR(x) >= gamma LR(z) ],   LR(x) = p(x | w) / (p_removed(x) + p_out(x)) * 2,   LR(z) = p(z | w) / p(z)

    p(. | w): probability of the label in the world under attack; p_removed, p_out, p(z): means over the reference worlds.

    Source: S. Zarifzadeh et al., "Low-Cost High-Power Membership Inference Attacks", ICML 2024.
    """

    name = "RMIA"

    def __init__(self, gamma: float = 1.0) -> None:
        if not gamma > 0:
            raise ArgumentError("gamma", gamma, "a number above 0")
        self.gamma = gamma

    def scores(self, seen: Observed, learn: Flags, weights: Floats) -> Floats:
        if seen.population is None:
            raise ArgumentError(
                "population", None, "margins of samples that no world was trained on", "RMIA compares with them."
            )
        p, z = (_log_sigmoid(m) for m in (seen.margins, seen.population))
        means = [_log_mean(p, kind & learn) for kind in (seen.removed, seen.out)]
        both = np.logaddexp(*means) - np.log(2)
        ratio = p - np.where(np.isfinite(both), both, _log_mean(p, np.broadcast_to(learn, p.shape)))[:, None]
        others = np.sort(z - _log_mean(z, np.broadcast_to(learn, z.shape))[:, None], axis=0) + np.log(self.gamma)
        found = [np.searchsorted(others[:, w], ratio[:, w], side="right") for w in range(p.shape[1])]
        share = np.stack(found, 1) / len(z)
        # within one share the larger ratio first: shares are coarse, and ties would count half
        return (share + 1e-9 * np.tanh(ratio))[None]


def _log_sigmoid(m: Floats) -> Floats:
    return -np.logaddexp(0.0, -m)


def _log_mean(logs: Floats, where: Flags) -> Floats:
    """Log of the mean of exp(logs) over the chosen columns, per row; -inf for none."""
    with np.errstate(divide="ignore"):
        weight = np.log(where.astype(np.float64))
        return np.logaddexp.reduce(logs + weight, axis=1) - np.log(np.maximum(where.sum(1), 1))
