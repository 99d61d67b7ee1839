"""Telling two sets of scores apart: area under the curve, true positives at few false ones, and exact intervals of rates."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, bootstrap, rankdata
from sklearn.metrics import roc_auc_score, roc_curve

from lightning_muter.errors import ArgumentError
from lightning_muter.evidence.observed import Flags, Floats


def _together(positives: ArrayLike, negatives: ArrayLike) -> tuple[Floats, Flags]:
    found = [np.asarray(s, np.float64).reshape(-1) for s in (positives, negatives)]
    if not all(len(s) for s in found):
        raise ArgumentError("scores", [len(s) for s in found], "at least one positive and one negative score")
    scores = np.concatenate(found)
    return scores, np.arange(len(scores)) < len(found[0])


def auc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """P(positive > negative) + P(equal) / 2.

    >>> auc([2.0, 3.0], [1.0, 2.0])
    0.875
    """
    scores, label = _together(positives, negatives)
    return float(roc_auc_score(label, scores))


def auc_interval(
    positives: ArrayLike, negatives: ArrayLike, *, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """AUC of independent scores, with the bootstrap interval over both sets. Scores of many worlds or of the same points are not
    independent: :func:`lightning_muter.evidence.estimate.estimate` is for them.

    >>> value, low, high = auc_interval(np.arange(50) + 10.0, np.arange(50))
    >>> bool(0.5 < low < value < high < 1)
    True
    """
    _together(positives, negatives)
    a, b = (np.asarray(v, np.float64).reshape(-1) for v in (positives, negatives))

    def areas(x: Floats, y: Floats, axis: int = -1) -> Floats:
        both = rankdata(
            np.concatenate([x, y], axis=-1), axis=-1
        )  # Mann and Whitney's statistic, over all draws at once
        n, m = x.shape[-1], y.shape[-1]
        return (both[..., :n].sum(-1) - n * (n + 1) / 2) / (n * m)

    found = bootstrap(
        (a, b), areas, n_resamples=draws, confidence_level=confidence, method="percentile", vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return auc(a, b), float(found.low), float(found.high)


def curve(positives: ArrayLike, negatives: ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rates at every threshold, both rising from 0 to 1."""
    scores, label = _together(positives, negatives)
    fpr, tpr, _ = roc_curve(label, scores, drop_intermediate=False)
    return fpr, tpr


def tpr_at_fpr(positives: ArrayLike, negatives: ArrayLike, fpr: float = 0.01) -> float:
    """The largest true positive rate with a false positive rate of at most ``fpr``.

    >>> tpr_at_fpr([3.0, 1.0], [2.0, 0.0], 0.0)
    0.5
    """
    if not 0 <= fpr <= 1:
        raise ArgumentError("fpr", fpr, "a rate from 0 to 1")
    false, true = curve(positives, negatives)
    return float(true[false <= fpr + 1e-12].max())


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate: it covers with at least this confidence.

    >>> low, high = clopper_pearson(0, 10)
    >>> low, round(high, 4)
    (0.0, 0.3085)
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ArgumentError("hits", f"{hits} of {trials}", "0 to as many as trials, of which there is at least one")
    found = binomtest(int(hits), int(trials)).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)
