"""Maximisers of the small problems."""

from __future__ import annotations

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from tests import reference
from tests.cases import Case


def solved(one: Case, threat: ThreatModel, **options):
    problem, theta = one.problem(), reference.theta_of(one)
    smoothing = Smoothing(anchor=theta if threat.norm == "linf" else None)
    c = smoothing.coefficients(problem, threat, one.x, one.y)
    return problem, theta, c, InnerSolver(**options).solve(problem, theta, threat, one.x, one.y, c)
