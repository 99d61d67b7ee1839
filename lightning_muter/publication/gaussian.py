"""The analytic Gaussian mechanism, and what several releases are worth together.

Two outputs that differ by at most Delta, each with noise N(0, sigma^2 I) of its own, cannot be told apart better than (eps, delta)
if and only if

    Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) <= delta,      mu = Delta / sigma

Source: B. Balle, Y.-X. Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018. Releases of mu_1, mu_2, ... are
together worth one of sqrt(sum mu_i^2), also where a later one depends on the earlier ones (J. Dong, A. Roth, W. Su, "Gaussian
Differential Privacy", 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scipy.optimize import brentq
from scipy.stats import norm

from lightning_muter.errors import ArgumentError


def delta_of(mu: float, eps: float) -> float:
    """The smallest delta for this eps and mu = Delta / sigma; both without a unit."""
    if mu <= 0:
        return 0.0
    first, second = norm.logcdf(mu / 2 - eps / mu), eps + norm.logcdf(-mu / 2 - eps / mu)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def gaussian_sigma(within: float, eps: float, delta: float) -> float:
    """The least sigma that makes outputs within ``within`` of each other (eps, delta)-indistinguishable.

    Args:
        within: Delta, the largest Euclidean distance of the two outputs.
        eps: of the promise, above 0.
        delta: of the promise, between 0 and 1.

    Returns:
        The standard deviation of the noise, in units of ``within``.

    Raises:
        ArgumentError: one of them is out of range.

    Source: B. Balle, Y.-X. Wang, *Improving the Gaussian Mechanism for Differential Privacy*, ICML 2018.

    >>> round(gaussian_sigma(1.0, 1.0, 1e-5), 2)
    3.73
    """
    _check(within, eps, delta)
    high = 1.0
    while delta_of(high, eps) < delta:
        high *= 2
    mu = brentq(lambda m: delta_of(m, eps) - delta, 1e-9 * min(eps, 1.0), high, xtol=1e-15, rtol=1e-13)
    return within / mu * (1 + 1e-9)  # the root is known to a rounding; on this side of it the promise holds


def composed_epsilon(releases: Iterable[tuple[float, float]], delta: float) -> float:
    """What several releases are worth together: eps at ``delta``.

    Args:
        releases: (Delta, sigma) of each, also where a later one depends on the earlier ones.
        delta: of the promise, between 0 and 1.

    Returns:
        eps of all of them together.

    Raises:
        ArgumentError: ``delta`` is out of range.

    Source: J. Dong, A. Roth, W. Su, *Gaussian Differential Privacy*, 2019.

    >>> once = (1.0, gaussian_sigma(1.0, 1.0, 1e-5))
    >>> round(composed_epsilon([once], 1e-5), 6), round(composed_epsilon([once, once], 1e-5), 2)
    (1.0, 1.47)
    """
    mu = math.sqrt(sum((within / sigma) ** 2 for within, sigma in releases))
    if not 0 < delta < 1:
        raise ArgumentError("delta", delta, "a number between 0 and 1")
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while delta_of(mu, high) > delta:
        high *= 2
    return float(brentq(lambda eps: delta_of(mu, eps) - delta, 0.0, high, xtol=1e-12, rtol=1e-12))


def _check(within: float, eps: float, delta: float) -> None:
    if not (math.isfinite(within) and within > 0):
        raise ArgumentError("within", within, "a distance above 0")
    if not (math.isfinite(eps) and eps > 0):
        raise ArgumentError("eps", eps, "a number above 0", "1 is a usual choice.")
    if not 0 < delta < 1:
        raise ArgumentError("delta", delta, "a number between 0 and 1", "Choose it far below 1 / (number of samples).")
