"""The certified distance to the retrained optimum, measured at the weights and from a nearer point.

At the weights w the gradient and the gaps of the inner maxima are all that a bound has (`certificate.certificate`). Where two maxima
are equal, or the head is near the kink of the norm at 0, the retrained optimum is far nearer than they allow. So some passes of
retraining are run on from w, to a point v that nobody is given, and

    |w - w_R*|  <=  |w - v| + |v - w_R*|  <=  |w - v| + (the bound at v)

which holds wherever v is, and comes near to an equality as v comes near to w_R*.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from lightning_muter.certificate.certificate import bound_at, certify
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.response.choose import Response
from lightning_muter.errors import SolveError
from lightning_muter.minimise.polish import in_metrics, polish
from lightning_muter.minimise.refine import PASSES, TOLERANCE
from lightning_muter.solvers.dense import definite_inverse

#: Over the length of the weights: a bound that may stay as it is.
SMALL = 1e-6
#: How much more stationary the nearer point is to be, from look to look until the bound there is this share of the way.
NEARER, LEFT = (1e-2, 1e-5, 1e-8), 0.1
#: Passes without which it is not begun, and those that the bound there takes.
LEAST, BOUNDING = 3, 2
#: Seconds that the nearer point may take in any case; and over the Newton step, a bound that is not worth more of them.
QUICK, LOOSE = 0.5, 3.0
#: Seconds of a pass: in any case, per sample, per sample and entry of the total Hessian, and of its factors per p^3 (measured, and
#: rounded up).
PASS, EACH, ENTRY, CUBE = 0.03, 1e-4, 8e-10, 2e-11


def certified_from_nearby(
    objective: RobustObjective,
    theta: Tensor,
    evaluation: Evaluation,
    response: Response,
    curvature: Curvature,
    matrix: Tensor,
    seconds: float = 60.0,
) -> float:
    """The smaller of the bound at theta (as the module will hold it) and that by way of a nearer point; the objective stays as it is.

    Args:
        evaluation: at theta.        response, curvature: of the metrics in which the nearer point is looked for.
        matrix: the total Hessian as far as it is known, (K q, K q). Where passes are dear and the bound is no more than ``LOOSE``
            times the Newton step in it, no nearer point is looked for.
        seconds: of a processor, about: half of it for the way there (counted in passes, so that the bound is the same
            everywhere), and half for the search for larger maxima at both points.
    """
    each = _seconds_of_pass(objective, theta)
    passes = min(int(seconds / 2 / each), PASSES)
    if passes < LEAST or not objective.problem.backbone.affine:
        return certify(objective, theta, evaluation, seconds)
    written, bound, own = objective.problem.rounded(theta), math.inf, None
    if LEAST * each > QUICK:
        own = certify(objective, theta, evaluation, seconds / 4)
        newton = float(definite_inverse(matrix)[0](evaluation.gradient.flatten()).norm())
        if own <= LOOSE * newton:
            return own
    # maxima are followed singly until they have to be weighed: quicker, and it ends nearer
    there = replace(objective, contended=False, delta=None, rivals=None, prior=None, passes=0, tick=None, _c={})
    at, metric = theta, in_metrics(response)
    for share in NEARER:
        tolerance, most = max(share * evaluation.stationarity, TOLERANCE), passes - there.passes
        try:
            done = polish(there, at, metric, tolerance=tolerance, max_passes=most, curvature=curvature)
        except SolveError:
            break
        at = done.theta
        way, left = float((written - at).norm()), bound_at(there, at, done.evaluation, seconds / 4)
        before, bound = bound, min(bound, (way + left) * (1 + 1e-9))
        if left <= LEFT * way or bound <= SMALL * float(written.norm()):
            return bound if own is None else min(bound, own)
        there.passes += BOUNDING
        # what is left may be what smoothing costs, which is the same at every point
        if bound > before / 2 or passes - there.passes < LEAST:
            break
    return min(bound, certify(objective, theta, evaluation, seconds / 4) if own is None else own)


def _seconds_of_pass(objective: RobustObjective, theta: Tensor) -> float:
    """About, and the same for every process."""
    p = theta.numel()
    rows = float(objective.largest(theta.new_tensor([float(len(objective.own))])))
    return PASS + rows * (EACH + ENTRY * p**2) + CUBE * p**3
