"""The certificate is never below the true distance, whatever the inner maximiser reached; and not uselessly far above."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.certificate import certified_distance, certify, inner_gap, total_gap, why_no_certificate
from lightning_muter.curvature.descent import polish
from lightning_muter.curvature.inner import InnerSolver, Rho, Smoothing
from lightning_muter.curvature.problem import HeadProblem
from lightning_muter.curvature.response import as_response
from lightning_muter.threat import ThreatModel
from tests.cases import Case, case, make
from tests.test_unlearning import forget_from, snapshot_of


def _grid(threat: ThreatModel, x: Tensor, n: int = 41) -> Tensor:
    """Points of B(x) on a grid over two coordinates, the sphere included."""
    line = torch.linspace(-1, 1, n, dtype=torch.float64)
    square = torch.cartesian_prod(line, line)
    angle = torch.linspace(0, 2 * torch.pi, 361, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    return threat.project(1.5 * threat.eps * torch.cat([square, circle]), x.expand(n * n + 361, -1))


LOSSES = {
    "softmax": (F.cross_entropy, 3),
    "smoothing": (functools.partial(F.cross_entropy, label_smoothing=0.2), 3),
    "binary": (F.binary_cross_entropy_with_logits, 1),
    "square": (F.mse_loss, 1),
}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    loss=st.sampled_from(sorted(LOSSES)),
    norm=st.sampled_from(["l2", "linf"]),
    eps=st.floats(0.01, 2.0),
    box=st.booleans(),
    scale=st.floats(0.05, 5.0),
    smoothed=st.booleans(),
    inexact=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
)
def test_certified_gap_is_never_below_the_true_gap(loss, norm, eps, box, scale, smoothed, inexact, seed):
    """At maximisers, and at any other point of the ball."""
    function, k = LOSSES[loss]
    generator = torch.Generator().manual_seed(seed)
    net = nn.Linear(2, k, dtype=torch.float64)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.rand(3, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(0, max(k, 2), (3,), generator=generator)
    if k == 1:
        y = y.double() if loss == "binary" else torch.randn(3, generator=generator, dtype=torch.float64)
    threat = ThreatModel(norm, eps, (0.0, 1.0) if box else None)
    problem = HeadProblem(net, function, x)
    theta = problem.read_theta()
    c = Smoothing(anchor=0.9 * theta if smoothed else None).coefficients(problem, threat, x, y)
    found = InnerSolver().solve(problem, theta, threat, x, y, c)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    delta = threat.project(found.delta + inexact * eps * noise, x)
    bound = inner_gap(problem, theta, threat, x, y, delta, c)
    value = problem.loss_and_input_gradient(theta, x + delta, y)[0] + Rho(threat, x, c).value(delta)
    assert (bound >= 0).all()
    for i in range(3):
        at = slice(i, i + 1)
        points = _grid(threat, x[at])
        n = len(points)
        rho = Rho(threat, x[at].expand(n, -1), None if c is None else c[at].expand(n, -1))
        best = problem.loss_and_input_gradient(theta, x[at] + points, y[at].expand(n))[0] + rho.value(points)
        assert float(best.max() - value[i]) <= float(bound[i]) + 1e-9


def _optimum(one: Case, threat: ThreatModel, smoothing: Smoothing, start: Tensor) -> tuple[Tensor, float]:
    """The minimiser as well as it can be found, and its own certificate (how far it may be off)."""
    objective = one.objective(threat, smoothing=smoothing)
    done = polish(objective, start, as_response("auto", threat), tolerance=1e-12, max_passes=400, anchored=True)
    objective.restart()
    sums, delta = objective.sums(done.theta)
    now = objective.evaluation(done.theta, sums, delta)
    gap = total_gap(objective, done.theta, delta)
    return done.theta, certified_distance(now.gradient, objective.decay, objective.count, gap)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["linear", "affine"]),
    loss=st.sampled_from(["softmax", "binary", "square"]),
    norm=st.sampled_from(["l2", "linf"]),
    eps=st.floats(0.02, 0.3),
    away=st.floats(0.0, 0.5),
    iterations=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_bound_is_never_below_the_distance(kind, loss, norm, eps, away, iterations, seed):
    """Also where the inner solver stops after a step or two: the gap pays for it."""
    one = make(kind, loss, bias=False, n=12, seed=seed)
    one.decay = 0.05
    threat = ThreatModel(norm, eps, None)
    problem = one.problem()
    start = problem.read_theta()
    smoothing = Smoothing(anchor=start if norm == "linf" else None)
    best, slack = _optimum(one, threat, smoothing, start)
    objective = one.objective(threat, smoothing=smoothing)
    objective.inner = InnerSolver(max_iter=iterations, starts=False)
    generator = torch.Generator().manual_seed(seed)
    theta = best + away * torch.randn(best.shape, generator=generator, dtype=torch.float64)
    sums, delta = objective.sums(theta)
    now = objective.evaluation(theta, sums, delta)
    distance = float((theta - best).norm())
    by_gap = certified_distance(now.gradient, objective.decay, objective.count, total_gap(objective, theta, delta))
    assert distance <= by_gap + slack + 1e-9
    assert distance <= certify(objective, theta, now) + slack + 1e-9  # as a request takes it


def test_the_naive_bound_would_lie_and_this_one_does_not():
    """At the minimiser of the objective with bad maximisers the gradient is 0; the distance is not."""
    one = case("linear-binary-bias")
    threat = ThreatModel("l2", 0.3, None)
    objective = one.objective(threat)
    best, _ = _optimum(one, threat, Smoothing(), one.problem().read_theta())
    objective.inner = InnerSolver(max_iter=1, starts=False)
    objective.delta = torch.zeros_like(one.x)
    frozen = one.objective(ThreatModel("l2", 0.0))
    clean = polish(frozen, best, as_response("auto", ThreatModel("l2", 0.0)), tolerance=1e-12).theta
    sums, delta = objective.sums(clean, settle=False)
    now = objective.evaluation(clean, sums, delta)
    distance = float((clean - best).norm())
    assert certified_distance(now.gradient, objective.decay, objective.count, 0.0) < 0.01 * distance
    assert (
        certified_distance(now.gradient, objective.decay, objective.count, total_gap(objective, clean, delta))
        > distance
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["linear-softmax-bias", "affine-softmax-weighted", "linear-binary-bias"])
def test_bound_of_a_request_holds_and_is_not_useless(name, norm):
    """After refinement: above the distance to the retained optimum, and within a factor of 100 where that is measurable."""
    one = case(name)
    one.decay = 0.05
    if "binary" in name:  # labels that can be told: else no weights at all are best, at a kink of the norm
        one.y = (one.x[:, 0] > 0.5).double()
    threat = ThreatModel(norm, 0.05, None)
    snapshot = snapshot_of(one, threat)
    forget = [3, 8]
    other = copy.deepcopy(one)
    kept = [i for i in range(len(one.x)) if i not in forget]
    other.x, other.y = one.x[kept], one.y[kept]
    other.weight = None if one.weight is None else one.weight[kept]
    best, slack = _optimum(other, threat, snapshot.smoothing, snapshot.theta_ref)
    result = forget_from(one, snapshot, forget, retain=one.dataset, refine=1)
    assert result.bound is not None
    theta = one.problem().read_theta()
    distance = float((theta - best).norm())
    assert result.bound >= distance - slack - 1e-9
    if distance > 1e-3:
        assert result.bound <= 100 * distance


def test_where_no_bound_is_known_none_is_given_with_the_reason():
    x = torch.rand(8, 4, dtype=torch.float64)

    def why(net: nn.Module, loss: object = F.cross_entropy, decay: float = 0.1) -> str | None:
        problem = HeadProblem(net.double(), loss, x)
        return why_no_certificate(problem, torch.full(problem.shape, decay, dtype=torch.float64))

    assert why(nn.Linear(4, 3)) is None
    assert "nonlinear" in str(why(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
    assert "weight decay" in str(why(nn.Linear(4, 3), decay=0.0))
    assert "second derivative" in str(why(nn.Linear(4, 3), lambda z, y, reduction: z.exp().sum(1)))
    one = case("smooth-softmax-bias")
    snapshot = snapshot_of(one, ThreatModel("l2", 0.05), tolerance=0.05)
    result = forget_from(one, snapshot, [1], retain=one.dataset)
    assert result.bound is None
    assert any(w.startswith("no certificate") for w in result.warnings)


def test_the_formula():
    """(|g| + sqrt(|g|^2 + 4 m eta)) / (2 m), m = min(lambda) n: the root of m d^2 - |g| d - eta."""
    g, decay = torch.tensor([0.6, 0.8], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
    d = certified_distance(g, decay, 10, 0.3)
    assert 2.0 * d * d - 1.0 * d - 0.3 == pytest.approx(0.0, abs=1e-12)
    assert certified_distance(g, decay, 10, 0.0) == pytest.approx(0.5)
