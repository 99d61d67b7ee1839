"""The inner maximiser: feasible, stationary, never below where it started, the same in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.ascent import Rho
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.inner.newton import Newton
from lightning_muter.curvature.problem.head import HeadProblem
from tests import reference
from tests.cases import NAMES, THREATS, case
from tests.maxima import solved

PAIRS = [(name, threat) for name in NAMES for threat in THREATS]


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_maximisers_are_feasible_and_better_than_what_random_search_finds(name, key):
    one, threat = case(name), THREATS[key]
    problem, theta, c, found = solved(one, threat)
    lo, hi = threat.bounds(one.x)
    assert ((found.delta >= lo - 1e-12) & (found.delta <= hi + 1e-12)).all()
    if threat.norm == "l2":
        assert (found.delta.norm(dim=1) <= threat.eps * (1 + 1e-12)).all()
    rho = Rho(threat, one.x, c)
    loss, _ = problem.loss_and_input_gradient(theta, one.x + found.delta, one.y)
    torch.testing.assert_close(found.value, loss + rho.value(found.delta), rtol=1e-12, atol=1e-13)
    generator = torch.Generator().manual_seed(0)
    near = wide = torch.full_like(found.value, -torch.inf)
    for _ in range(20):
        noise = torch.randn(one.x.shape, generator=generator, dtype=torch.float64)
        for scale in (1e-3, 1.0):
            start = found.delta if scale < 1 else torch.zeros_like(noise)
            other = threat.project(start + scale * threat.eps * noise, one.x)
            value = problem.loss_and_input_gradient(theta, one.x + other, one.y)[0] + rho.value(other)
            near, wide = (torch.maximum(near, value), wide) if scale < 1 else (near, torch.maximum(wide, value))
    assert (near <= found.value + (5e-3 if name.startswith("relu") else 1e-12)).all()  # a local maximum; kinks are hard
    if not name.startswith(("smooth", "relu")):  # several local maxima are possible there
        assert (wide <= found.value + 1e-12).all()


@pytest.mark.parametrize(("name", "key"), [p for p in PAIRS if not p[0].startswith("relu")])
def test_maximisers_solve_the_optimality_conditions(name, key):
    """Newton's method on the conditions of the constraints that hold does not move them."""
    one, threat = case(name), THREATS[key]
    _, theta, c, found = solved(one, threat)
    assert found.converged.all()
    lo, hi = threat.bounds(one.x)
    zero = torch.zeros_like(one.x)
    on = reference.branch_at(
        one, theta, one.x, one.y, found.delta, lo, hi, threat.eps, threat.norm, zero if c is None else c
    )
    flat = theta.flatten().expand(len(one.x), -1)
    exact = reference.follow(one, flat, one.x, one.y, found.delta, on)
    assert (exact - found.delta).norm(dim=1).max() < 1e-7 * threat.eps


@pytest.mark.parametrize("key", ["l2-box", "linf-box"])
@pytest.mark.parametrize("name", ["linear-softmax-bias", "smooth-softmax-bias", "relu-softmax"])
def test_result_does_not_depend_on_the_other_samples_in_the_batch(name, key):
    one, threat = case(name), THREATS[key]
    problem, theta, c, together = solved(one, threat)
    for i in range(len(one.x)):
        at = slice(i, i + 1)
        alone = InnerSolver().solve(problem, theta, threat, one.x[at], one.y[at], None if c is None else c[at])
        assert (alone.delta - together.delta[at]).norm() < 1e-8 * threat.eps
        assert abs(float(alone.value - together.value[i])) < 1e-13


@pytest.mark.parametrize("key", THREATS)
@pytest.mark.parametrize("name", NAMES)
def test_tracked_maximisers_never_fall(name, key):
    one, threat = case(name), THREATS[key]
    problem, theta, c, _ = solved(one, threat)
    generator = torch.Generator().manual_seed(1)
    start = threat.project(torch.randn(one.x.shape, generator=generator, dtype=torch.float64), one.x)
    before = problem.loss_and_input_gradient(theta, one.x + start, one.y)[0] + Rho(threat, one.x, c).value(start)
    found = InnerSolver(max_iter=4).solve(problem, theta, threat, one.x, one.y, c, start)
    assert (found.value >= before - 1e-12).all()


def test_interior_maximum_is_found_and_found_again():
    """The gradient vanishes there: convergence is told by what it was on the way."""
    generator = torch.Generator().manual_seed(0)

    class Hill(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -((x - 0.5) ** 2).sum(1, keepdim=True)

    net = nn.Sequential(Hill(), nn.Linear(1, 1, dtype=torch.float64))
    with torch.no_grad():
        net[1].weight.fill_(1.3)
    x, y = torch.rand(9, 3, generator=generator, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    problem = HeadProblem(net, F.binary_cross_entropy_with_logits, x)
    threat, theta = ThreatModel("l2", 4.0, None), problem.read_theta()
    found = InnerSolver().solve(problem, theta, threat, x, y)
    assert found.converged.all()
    torch.testing.assert_close(x + found.delta, torch.full_like(x, 0.5), rtol=0, atol=1e-8)
    again = InnerSolver().solve(problem, theta, threat, x, y, start=found.delta)
    assert again.converged.all()
    assert again.iterations <= 8


def test_nothing_moves_at_radius_zero():
    one = case("linear-softmax-bias")
    problem, theta = one.problem(), reference.theta_of(one)
    for norm in ("l2", "linf"):
        found = InnerSolver().solve(problem, theta, ThreatModel(norm, 0.0), one.x, one.y)
        assert not found.delta.any()
        assert found.converged.all()


@pytest.mark.parametrize("eps", [0.1, 0.7])
def test_one_logit_maximiser_is_the_known_one(eps):
    one = case("linear-binary-bias")
    threat = ThreatModel("l2", eps, None)
    _, theta, _, found = solved(one, threat)
    w = theta[0, :-1]
    expected = -eps * (2 * one.y - 1)[:, None] * w / w.norm()
    torch.testing.assert_close(found.delta, expected, rtol=0, atol=1e-9)


def test_smoothed_objective_lies_between_the_robust_loss_and_its_bound():
    """phi <= phi_smooth <= phi + max rho, and rho vanishes at the vertices."""
    one, threat = case("linear-softmax-bias"), THREATS["linf-box"]
    _, theta, c, found = solved(one, threat)
    assert c is not None
    lo, hi = threat.bounds(one.x)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * one.x.shape[1])
    loss = reference.sample_loss(one)
    for i in range(len(one.x)):
        at = lo[i] + corners * (hi[i] - lo[i])
        values = torch.stack([loss(theta.flatten(), one.x[i] + d, one.y[i]) for d in at])
        rho = Rho(threat, one.x[i : i + 1].expand(len(at), -1), c[i : i + 1].expand(len(at), -1))
        assert rho.value(at).abs().max() < 1e-14
        largest = float((c[i] * ((hi - lo)[i] / 2) ** 2).sum() / 2)
        assert values.max() - 1e-12 <= found.value[i] <= values.max() + largest + 1e-12


def test_a_hopeless_backbone_is_reported_as_not_converged():
    torch.manual_seed(0)

    class Saw(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sin(400 * x) / 3

    net = nn.Sequential(Saw(), nn.Linear(3, 2)).double()
    x, y = torch.rand(6, 3, dtype=torch.float64), torch.tensor([0, 1] * 3)
    problem = HeadProblem(net, F.cross_entropy, x)
    found = InnerSolver(max_iter=3).solve(problem, problem.read_theta(), ThreatModel("l2", 0.5, None), x, y)
    assert not found.converged.all()
    assert found.iterations == 3


def test_newton_ends_where_plain_steps_end_in_a_fraction_of_them(monkeypatch):
    """Nine classes, smoothing that barely keeps the inner problem concave: plain steps crawl."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 30, generator=generator, dtype=torch.float64)
    y = torch.randint(9, (60,), generator=generator)
    net = nn.Linear(30, 9).double()
    with torch.no_grad():
        net.weight.copy_(0.3 * torch.randn(9, 30, generator=generator, dtype=torch.float64))
    problem, threat = HeadProblem(net, F.cross_entropy, x), ThreatModel("linf", 0.1, (0.0, 1.0))
    theta = problem.read_theta()
    c = Smoothing(strength=1.0, bandwidth=0.01, anchor=theta).coefficients(problem, threat, x, y)
    fast = InnerSolver(max_iter=30).solve(problem, theta, threat, x, y, c)
    monkeypatch.setattr(Newton, "serves", staticmethod(lambda problem, c: False))
    plain = InnerSolver(max_iter=3000).solve(problem, theta, threat, x, y, c)
    assert plain.converged.all()
    assert fast.converged.all()
    assert plain.iterations > 4 * fast.iterations
    assert (
        fast.value >= plain.value - 1e-9
    ).double().mean() > 0.9  # each a maximum; where there are two, now and then another
