"""Responses of the maximisers against finite differences with the inner problem solved anew, in every case there is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.sums import Sums, add_hessian
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.choose import (
    L2Response,
    LinfResponse,
    NoResponse,
    Response,
    Unconstrained,
    as_response,
)
from lightning_muter.errors import ArgumentError
from tests import reference
from tests.cases import NAMES, THREATS, Case, N, case, make


def _hessians(local: LocalPoint, response: Response) -> tuple[Tensor, Counter[str]]:
    """The total Hessian of every sample alone, (n, p, p)."""
    problem, counts, rows = local.problem, Counter[str](), []
    for i in range(len(local.x)):
        at = slice(i, i + 1)
        c = None if local.c is None else local.c[at]
        part = LocalPoint(problem, local.theta, local.threat, local.x[at], local.y[at], local.delta[at], c)
        sums = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=True)
        add_hessian(sums, part, response, "hessian")
        assert sums.hessian is not None
        rows.append(sums.hessian.dense())
        counts += sums.counts
    return torch.stack(rows), counts


def _compare(one: Case, threat: ThreatModel, start: Tensor | None = None) -> Counter[str]:
    problem, theta = one.problem(), reference.theta_of(one)
    c = Smoothing(anchor=theta if threat.norm == "linf" else None).coefficients(problem, threat, one.x, one.y)
    found = InnerSolver(tolerance=1e-8).solve(problem, theta, threat, one.x, one.y, c, start)
    good = found.converged
    if isinstance(one.net[-2], nn.ReLU):  # exact away from the backbone's kinks
        good &= one.net[0](one.x + found.delta).abs().min(1).values > 1e-2
        # on a plateau the maximiser is not unique, and its response is none
        good &= problem.loss_and_input_gradient(theta, one.x + found.delta, one.y)[1].norm(dim=1) > 1e-6
    assert int(good.sum()) * 2 > len(good)
    x, y, delta = one.x[good], one.y[good], found.delta[good]
    lo, hi = threat.bounds(x)
    zero = torch.zeros_like(x)
    on = reference.branch_at(one, theta, x, y, delta, lo, hi, threat.eps, threat.norm, zero if c is None else c[good])
    delta = reference.follow(one, theta.flatten().expand(len(x), -1), x, y, delta, on)
    exact = reference.total_by_differences(one, theta, x, y, delta, on)
    local = LocalPoint(problem, theta, threat, x, y, delta, None if c is None else c[good])
    got, counts = _hessians(local, as_response("auto", threat))
    assert counts["damped"] == counts["not a strict maximum"] == 0
    error = (got - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 1e-6, error
    # and the direct part alone is something else wherever a maximiser moves
    direct, _ = _hessians(local, NoResponse())
    moving = (exact - direct).flatten(1).norm(dim=1) > 1e-4 * exact.flatten(1).norm(dim=1)
    counts["moving"] = int(moving.sum())
    return counts


@pytest.mark.parametrize("key", THREATS)
@pytest.mark.parametrize("name", NAMES)
def test_total_hessian_against_finite_differences(name, key):
    _compare(case(name), THREATS[key])


def test_ball_binds_without_and_with_faces():
    one = case("linear-softmax-bias")
    free, cut = _compare(one, THREATS["l2"]), _compare(one, THREATS["l2-box"])
    assert free["moving"] == len(one.x)
    assert free["on faces"] == 0
    assert 0 < cut["on faces"] < len(one.x)
    assert cut["moving"] > 0
    assert cut["ball slack"] == 0


def test_ball_slack_in_a_vertex_of_the_box():
    one = case("linear-softmax-bias")
    met = _compare(one, ThreatModel("l2", 5.0))
    assert met["vertex"] == len(one.x)
    assert met["moving"] == 0


class Bump(nn.Module):
    """phi_k(x) = -|A (x - a_k)|^2 / 2: losses have strict maxima where the features are smallest or largest."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.at = nn.Parameter(0.5 + 0.15 * torch.randn(2, 4, generator=generator, dtype=torch.float64), False)
        self.scale = nn.Parameter(torch.tensor([1.0, 1.3, 0.8, 1.1], dtype=torch.float64), False)

    def forward(self, x: Tensor) -> Tensor:
        return -((self.scale * (x[:, None] - self.at)) ** 2).sum(2) / 2


def _bump(eps: float, theta: list[list[float]], box: tuple[float, float] | None) -> Counter[str]:
    one = make("smooth", "binary", bias=False)
    net = nn.Sequential(Bump(), nn.Linear(2, 1, bias=False, dtype=torch.float64))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor(theta))
    one.net, one.y = net, torch.zeros_like(one.y)  # label 0: the loss rises with the logit
    return _compare(one, ThreatModel("l2", eps, box))


def test_interior_maximum():
    met = _bump(5.0, [[0.9, 0.4]], None)
    assert met["ball slack"] == N
    assert met["vertex"] == 0
    assert met["moving"] == N


def test_ball_slack_with_some_coordinates_on_faces():
    """The unconstrained maximum lies outside the box in some coordinates: K = (P_F (-d2l/dx2) P_F)^+."""
    met = _bump(5.0, [[1.6, -0.9]], (0.0, 0.55))
    assert met["ball slack"] == N
    assert met["on faces"] == N
    assert met["vertex"] == 0
    assert met["moving"] == N


def test_ball_binds_on_a_curved_loss():
    met = _bump(0.05, [[0.9, 0.4]], None)
    assert met["ball slack"] == 0
    assert met["moving"] == N


def test_unconstrained_series_is_its_explicit_sum():
    """K = -sum_{j<T} (I - X)^j with X the input Hessian in features, or in inputs, term by term."""
    for name in ("linear-softmax-bias", "affine-softmax-weighted", "relu-softmax"):
        one = case(name)
        problem, theta = one.problem(), reference.theta_of(one)
        threat = THREATS["l2"]
        delta = InnerSolver().solve(problem, theta, threat, one.x, one.y).delta
        exact = reference.derivatives(one, theta, one.x + delta, one.y)
        jacobian = problem.backbone.jacobian(one.x + delta)
        features = torch.linalg.pinv(jacobian)  # unused unless J has full row rank
        local = LocalPoint(problem, theta, threat, one.x, one.y, delta)
        for terms in (1, 3, 7):
            got, _ = _hessians(local, Unconstrained(terms, "inputs"))
            eye = torch.eye(exact.xx.shape[1], dtype=torch.float64)
            series = sum(torch.linalg.matrix_power(eye - exact.xx, j) for j in range(terms))
            expected = exact.ww - exact.wx @ series @ exact.wx.mT
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
            if name.startswith("relu"):
                continue  # more features than inputs: d2l/dphi2 is not told by derivatives in x
            got, _ = _hessians(local, Unconstrained(terms))
            xx = features.mT @ exact.xx @ features
            wx = exact.wx @ features
            eye = torch.eye(xx.shape[1], dtype=torch.float64)
            series = sum(torch.linalg.matrix_power(eye - xx, j) for j in range(terms))
            torch.testing.assert_close(got, exact.ww - wx @ series @ wx.mT, rtol=1e-9, atol=1e-10)


def test_unconstrained_does_not_depend_on_the_radius():
    one = case("linear-softmax-bias")
    problem, theta = one.problem(), reference.theta_of(one)
    delta = InnerSolver().solve(problem, theta, THREATS["l2"], one.x, one.y).delta
    first, second = (
        _hessians(LocalPoint(problem, theta, ThreatModel(norm, eps, None), one.x, one.y, delta), Unconstrained(5))[0]
        for norm, eps in (("l2", 0.25), ("linf", 1e-9))
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", NAMES)
def test_constraint_aware_responses_vanish_with_the_ball(name, norm):
    one = case(name)
    problem, theta = one.problem(), reference.theta_of(one)
    gaps = []
    for eps in (1e-2, 1e-4, 1e-6):
        threat = ThreatModel(norm, eps)
        c = Smoothing(anchor=theta if norm == "linf" else None).coefficients(problem, threat, one.x, one.y)
        delta = InnerSolver().solve(problem, theta, threat, one.x, one.y, c).delta
        total, _ = _hessians(LocalPoint(problem, theta, threat, one.x, one.y, delta, c), as_response("auto", threat))
        none = reference.derivatives(one, theta, one.x, one.y).ww
        gaps.append(float((total - none).norm() / none.norm()))
    assert gaps[2] < 1e-4, gaps
    assert gaps[2] < 0.1 * gaps[1] < 0.05 * gaps[0], gaps


def test_one_logit_linear_l2_is_the_closed_form():
    """phi = softplus(-(y w'x - eps |w|)), y = +-1: its Hessian by autograd."""
    one, eps = case("linear-binary-bias"), 0.4
    problem, theta = one.problem(), reference.theta_of(one)
    threat = ThreatModel("l2", eps, None)
    found = InnerSolver().solve(problem, theta, threat, one.x, one.y)
    sign = 2 * one.y - 1

    def robust(t: Tensor) -> Tensor:
        margin = sign * (one.x @ t[:-1] + t[-1])
        return torch.nn.functional.softplus(-(margin - eps * t[:-1].norm()))

    torch.testing.assert_close(found.value, robust(theta[0]), rtol=1e-12, atol=0)
    exact = torch.func.jacfwd(torch.func.jacrev(robust))(theta[0])
    got, _ = _hessians(LocalPoint(problem, theta, threat, one.x, one.y, found.delta), L2Response())
    torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-9)


def test_weakly_active_faces_are_counted():
    """A sample on a face with no force on that coordinate is neither on nor off it."""
    one = case("linear-softmax-bias")
    with torch.no_grad():
        one.head.weight[:, 0] = one.head.weight[0, 0]  # no logit gap depends on coordinate 0
    one.x[:, 0] = 0.0
    one.x[:, 1:] = one.x[:, 1:].clamp(0.2, 0.8)
    problem, theta = one.problem(), reference.theta_of(one)
    threat = ThreatModel("l2", 0.1)
    delta = InnerSolver().solve(problem, theta, threat, one.x, one.y).delta
    counts = Counter[str]()
    mask, _, _ = L2Response().free(LocalPoint(problem, theta, threat, one.x, one.y, delta), counts)
    assert mask.all()
    assert counts["on faces"] == 0


def test_a_ball_too_large_for_a_strict_maximum_is_damped_and_counted():
    """d2l/dx2 above mu across the sphere: a saddle. Its eigenvalue is lifted, and said so; the matrix stays finite."""
    one = case("linear-softmax-bias")
    problem, theta = one.problem(), 6 * reference.theta_of(one)
    threat = ThreatModel("l2", 2.0, None)
    delta = torch.zeros_like(one.x)
    delta[:, 0] = 2.0  # on the sphere, and no maximum
    got, counts = _hessians(LocalPoint(problem, theta, threat, one.x, one.y, delta), L2Response())
    assert counts["not a strict maximum"] > 0
    assert counts["damped"] >= counts["not a strict maximum"]
    assert torch.isfinite(got).all()


# -- L-infinity: averages of the true switch --------------------------------------------------------------------------


def test_averaged_switch_of_true_vertex_maximisers():
    """Finite step, many samples: differences of the gradient at the true best vertices against the smoothed Hessian."""
    one = make("linear", "softmax", bias=False, n=30_000, seed=3)
    one.y = torch.zeros_like(one.y)
    # the two wrong classes pull every coordinate opposite ways: each switches at another ratio of their probabilities
    theta = torch.tensor([[0.0, 0, 0, 0], [2, -1, 1.5, -0.5], [-1, 2, -0.5, 1.5]], dtype=torch.float64)
    threat, problem = ThreatModel("linf", 0.02, None), one.problem()
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * one.x.shape[1]) * threat.eps
    # densities without atoms: the faces of the unit cube are not special here
    x = torch.rand(one.x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def gradient(t: Tensor) -> Tensor:
        best = torch.full((len(x),), -torch.inf, dtype=torch.float64)
        r = torch.zeros(len(x), t.shape[0], dtype=torch.float64)
        at = torch.zeros_like(x)
        for d in corners:
            z = (x + d) @ t.T
            loss = torch.nn.functional.cross_entropy(z, one.y, reduction="none")
            better = loss > best
            best = torch.where(better, loss, best)
            at = torch.where(better[:, None], x + d, at)
            r = torch.where(better[:, None], z.softmax(1) - torch.nn.functional.one_hot(one.y, t.shape[0]), r)
        return r.T @ at / len(x)

    v = torch.randn(theta.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    v, h = v / v.norm() * theta.norm(), 0.02
    truth = (gradient(theta + h * v) - gradient(theta - h * v)) / (2 * h)

    def quotient(smoothing: Smoothing, response: Response) -> Tensor:
        c = smoothing.coefficients(problem, threat, x, one.y)
        delta = InnerSolver().solve(problem, theta, threat, x, one.y, c).delta
        sums = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=True)
        add_hessian(sums, LocalPoint(problem, theta, threat, x, one.y, delta, c), response, "hessian")
        assert sums.hessian is not None
        return (sums.hessian.dense() @ v.flatten()).reshape(v.shape) / len(x)

    def error(smoothing: Smoothing, response: Response) -> float:
        return float((quotient(smoothing, response) - truth).norm() / truth.norm())

    errors = [error(Smoothing(0.5, tau, theta), LinfResponse()) for tau in (1.0, 0.3, 0.03)]
    assert errors[2] < min(0.004, 0.5 * errors[1], 0.5 * errors[0]), errors
    assert error(Smoothing(anchor=theta), LinfResponse()) < 0.03  # the default
    assert error(Smoothing(), NoResponse()) > 0.1  # the pointwise Hessian misses the switches


@pytest.mark.parametrize(
    ("response", "norm", "named"),
    [("l2", "linf", "response"), ("linf", "l2", "response"), ("newton", "l2", "response")],
)
def test_wrong_responses_are_refused(response, norm, named):
    with pytest.raises(ArgumentError, match=named):
        as_response(response, ThreatModel(norm, 0.1))


def test_automatic_response_and_its_arguments():
    assert isinstance(as_response("auto", THREATS["l2"]), L2Response)
    assert isinstance(as_response("auto", THREATS["linf"]), LinfResponse)
    assert isinstance(as_response("l2", ThreatModel("l2", 0.0)), NoResponse)
    for make_bad in (lambda: Unconstrained(0), lambda: Unconstrained(3, "pixels"), lambda: L2Response(damping=1.5)):
        with pytest.raises(ArgumentError, match="allowed"):
            make_bad()
