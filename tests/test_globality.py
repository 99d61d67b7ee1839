"""The certified gap of a maximiser against brute force, and every bound behind it at random points."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.certificate.branch_and_bound import global_maxima, largest_rise
from lightning_muter.certificate.dual import Dual
from lightning_muter.certificate.gibbs import as_dual
from lightning_muter.certificate.global_maxima import best_maximisers, curvature_gap
from lightning_muter.certificate.simplex import linear_maximum
from lightning_muter.curvature.inner.ascent import Rho
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.problem.head import HeadProblem

LOSSES = {
    "softmax": (F.cross_entropy, 3),
    "two": (F.cross_entropy, 2),
    "smoothing": (functools.partial(F.cross_entropy, label_smoothing=0.2), 3),
    "soft": (F.cross_entropy, 3),
    "binary": (F.binary_cross_entropy_with_logits, 1),
    "margin": (F.soft_margin_loss, 1),
    "square": (F.mse_loss, 1),
    "squares": (F.mse_loss, 2),
}

given_problem = given(
    loss=st.sampled_from(sorted(LOSSES)),
    norm=st.sampled_from(["l2", "linf"]),
    eps=st.floats(0.01, 2.0),
    box=st.booleans(),
    scale=st.floats(0.05, 5.0),
    smoothed=st.booleans(),
    inexact=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
)
relaxed = functools.partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class _World:
    """A few samples of a random linear model with two inputs, and some maximisers, converged or spoilt."""

    def __init__(self, loss, norm, eps, box, scale, smoothed, inexact, seed, n=3, d=2, k=None):
        function, classes = LOSSES[loss]
        k = k or classes
        self.generator = torch.Generator().manual_seed(seed)
        net = nn.Linear(d, k, dtype=torch.float64)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(scale * self.normal(p.shape))
        x = torch.rand(n, d, generator=self.generator, dtype=torch.float64)
        self.x = torch.where(torch.rand(n, d, generator=self.generator, dtype=torch.float64) < 0.2, 0.0, x)
        y = torch.randint(0, max(k, 2), (n,), generator=self.generator)
        if loss == "binary":
            y = y.double()
        elif loss == "margin":
            y = 2 * y.double() - 1
        elif loss.startswith("square"):
            y = self.normal((n,) if k == 1 else (n, k))
        elif loss == "soft":
            y = self.normal((n, k)).softmax(1)
        self.y = y
        self.threat = ThreatModel(norm, eps, (0.0, 1.0) if box else None)
        self.problem = HeadProblem(net, function, self.x)
        self.theta = self.problem.read_theta()
        # torch warns of soft_margin_loss's second derivative under vmap
        anchor = 0.9 * self.theta if smoothed and loss != "margin" else None
        self.c = Smoothing(anchor=anchor).coefficients(self.problem, self.threat, self.x, y)
        found = InnerSolver().solve(self.problem, self.theta, self.threat, self.x, y, self.c)
        self.delta = self.threat.project(found.delta + inexact * eps * self.normal(self.x.shape), self.x)

    def normal(self, shape) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def values(self, i: int, points: Tensor) -> Tensor:
        """Loss plus rho of sample i at points (k, D) of its ball."""
        one = slice(i, i + 1)
        c = None if self.c is None else self.c[one].expand(len(points), -1)
        y = self.y[one].expand(len(points), *self.y.shape[1:])
        loss = self.problem.losses(self.problem.logits(self.theta, self.x[one] + points), y)
        return loss + Rho(self.threat, self.x[one].expand(len(points), -1), c).value(points)

    def grid(self, i: int, n: int = 41) -> Tensor:
        """Points of B(x_i) on a grid over two coordinates, the sphere included."""
        line = torch.linspace(-1, 1, n, dtype=torch.float64)
        angle = torch.linspace(0, 2 * torch.pi, 361, dtype=torch.float64)
        points = torch.cat([torch.cartesian_prod(line, line), torch.stack([angle.cos(), angle.sin()], 1)])
        return self.threat.project(1.5 * self.threat.eps * points, self.x[i].expand(len(points), -1))

    def dual(self) -> Dual | None:
        return as_dual(self.problem, self.theta, self.threat, self.x, self.y, self.c)


@relaxed(max_examples=60)
@given_problem
def test_certified_gap_is_never_below_the_true_gap(**given):
    """From maximisers and from any other point of the ball: nothing on a grid is above what the certificate allows."""
    world = _World(**given)
    delta, gap = best_maximisers(world.problem, world.theta, world.threat, world.x, world.y, world.delta, world.c)
    assert (gap >= 0).all()
    assert torch.allclose(world.threat.project(delta, world.x), delta, rtol=0, atol=1e-12)
    rough = curvature_gap(world.problem, world.theta, world.threat, world.x, world.y, world.delta, world.c)
    for i in range(len(world.x)):
        best, before, now = (
            float(world.values(i, points).max()) for points in (world.grid(i), world.delta[i : i + 1], delta[i : i + 1])
        )
        assert now >= before - 1e-12 * (1 + abs(before))
        assert best - now <= float(gap[i]) + 1e-12 * (1 + abs(best))
        assert best - before <= float(rough[i]) + 1e-12 * (1 + abs(best))


@relaxed(max_examples=40)
@given_problem
def test_the_gap_is_rounding_where_a_dual_form_is_known(**given):
    """Two inputs, up to three classes: the search always ends, whatever maximisers it begins with."""
    world = _World(**given)
    if given["loss"] == "squares":
        return
    delta, gap = best_maximisers(world.problem, world.theta, world.threat, world.x, world.y, world.delta, world.c)
    for i in range(len(world.x)):
        assert float(gap[i]) <= 1e-10 * (1 + float(world.values(i, delta[i : i + 1])))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "smoothing"])
def test_no_start_of_many_beats_the_certified_maximum_in_more_dimensions(loss, norm, box):
    """Six classes, eight inputs: 300 starts of the ascent against the certificate, from deliberately bad maximisers."""
    world = _World(loss, norm, 0.4 if norm == "l2" else 0.15, box, 1.0, norm == "linf", 1.0, 3, n=6, d=8, k=6)
    delta, gap = best_maximisers(world.problem, world.theta, world.threat, world.x, world.y, world.delta, world.c)
    solver = InnerSolver(starts=False)
    for i in range(len(world.x)):
        x = world.x[i].expand(300, -1)
        c = None if world.c is None else world.c[i].expand(300, -1)
        start = world.threat.project(world.threat.eps * world.normal(x.shape), x)
        found = solver.solve(world.problem, world.theta, world.threat, x, world.y[i].expand(300), c, start)
        value = float(world.values(i, delta[i : i + 1]))
        assert float(world.values(i, found.delta).max()) <= value + float(gap[i]) + 1e-12
    assert float(gap.max()) < 1e-9


@relaxed(max_examples=30)
@given_problem
def test_every_bound_holds_at_random_points_of_random_cells(**given):
    world = _World(**given)
    dual = world.dual()
    if dual is None:
        assert given["loss"].startswith("square")
        return
    n, m = dual.z.shape
    low, high = dual.region()

    def g(p: Tensor) -> Tensor:
        return dual.dual(p, dual.peak(dual.direction(p)))[0]

    inside = world.threat.project(world.threat.eps * world.normal(world.x.shape), world.x)
    p = dual.logits(inside).softmax(1)
    assert ((p >= low) & (p <= high)).all()
    assert (dual.primal(inside) <= dual.ceiling() + 1e-12 * (1 + dual.z.abs().amax(1))).all()
    for _ in range(4):
        middle = low + (high - low) * torch.rand(n, m, generator=world.generator, dtype=torch.float64)
        width = (high - low) * torch.rand(n, 1, generator=world.generator, dtype=torch.float64)
        a, b = torch.maximum(middle - width, low), torch.minimum(middle + width, high)
        q = world.normal((n, m)).softmax(1)
        peak = dual.peak(dual.direction(q))
        ranges = dual.push(a, b)
        rise, _ = largest_rise(dual, a, b, q, peak, ranges if dual.separable else None)
        for _ in range(20):
            share = world.normal((n, m)).abs()
            point = a + share * (b - a)  # made to sum to 1 within the cell
            for _ in range(30):
                point = torch.minimum(torch.maximum(point + (1 - point.sum(1, keepdim=True)) / m, a), b)
            ok = (point.sum(1) - 1).abs() < 1e-12
            v = dual.direction(point)
            assert ((v >= ranges[0] - 1e-9) & (v <= ranges[1] + 1e-9))[ok].all()
            assert (g(point) <= g(q) + rise + 1e-9 * (1 + dual.z.abs().amax(1)))[ok].all()


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("kind", ["l2", "linf", "linf-smoothed"])
def test_curvature_of_the_support_function_is_bounded_and_tightly(kind, box):
    """D(v(p) | v(q)) <= 1/2 (p - q)^T M (p - q) on cells of all sizes, and nearly an equality somewhere."""
    norm, _, smoothed = kind.partition("-")
    most, finite = 0.0, 0
    for seed in range(12):
        world = _World("softmax", norm, 0.4, box, 1.0, bool(smoothed), 0.0, seed, n=20, d=5, k=4)
        dual = world.dual()
        assert dual is not None
        n, m = dual.z.shape
        q = world.normal((n, m)).softmax(1)
        peak = dual.peak(dual.direction(q))
        size = 10 ** (-4 * torch.rand(n, 1, generator=world.generator, dtype=torch.float64))
        p = (1 - size) * q + size * world.normal((n, m)).softmax(1)
        low, high = torch.minimum(p, q) * (1 - size / 2), torch.maximum(p, q) * (1 + size / 2)
        matrix = dual.spread(low, high, q, peak, dual.push(low, high) if dual.separable else None)
        v = dual.direction(p)
        top = dual.peak(v)
        divergence = (v * (top - peak)).sum(1) + dual.rho.value(top) - dual.rho.value(peak)
        h = p - q
        known = torch.isfinite(matrix).all(2).all(1)
        bound = (h[:, None] @ torch.where(known[:, None, None], matrix, 0.0) @ h[:, :, None])[:, 0, 0] / 2
        assert (divergence <= bound * (1 + 1e-9) + 1e-14)[known].all()
        assert (divergence <= dual.sway(low, high, q) + 1e-14).all() or dual.separable
        told = known & (divergence > 1e-9)
        finite += int(known.sum())
        most = max([most, *(divergence / bound)[told].tolist()])
    assert finite > 150
    assert most > 0.95


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_narrowing_keeps_the_stationary_points(norm, box):
    """A cell that holds a fixed point of the ascent still holds it afterwards, and is often much smaller."""
    shrunk = []
    for seed in range(8):
        world = _World("softmax", norm, 0.3, box, 1.5, True, 0.0, seed, n=10, d=5, k=4)
        dual = world.dual()
        assert dual is not None
        p, peak = dual.climb(dual.logits(world.delta).softmax(1), 300)
        assert torch.allclose(dual.logits(peak).softmax(1), p, rtol=1e-9, atol=0)
        for share in (1.0, 0.3, 0.03):  # of the way from the fixed point to the ends of the region
            low, high = (p + share * (end - p) for end in dual.region())
            width = (high - low).amax(1)
            for _ in range(4):
                new_low, new_high = dual.narrow(low, high)
                assert ((new_low <= p * (1 + 1e-9)) & (p <= new_high * (1 + 1e-9))).all()
                low, high = torch.maximum(low, new_low), torch.minimum(high, new_high)
            shrunk.append(((high - low).amax(1) / width).median())
    assert float(torch.stack(shrunk).median()) < 0.5


def test_weak_duality_and_strong_duality():
    """G(p) is never above the primal maximum, and equals the primal value where the ascent has converged."""
    world = _World("softmax", "linf", 0.3, True, 1.0, True, 0.0, 5)
    dual = world.dual()
    assert dual is not None
    p, peak = dual.climb(dual.logits(world.delta).softmax(1), 200)
    assert torch.allclose(dual.dual(p, peak)[0], dual.primal(peak), rtol=1e-13)
    for i in range(3):
        assert float(world.values(i, peak[i : i + 1])) == pytest.approx(float(dual.primal(peak)[i]), rel=1e-12)


def test_a_cut_off_search_still_bounds():
    """With one cell per sample and no more, the gap is valid and finite."""
    world = _World("softmax", "l2", 2.0, False, 3.0, False, 1.0, 1, n=20)
    dual = world.dual()
    assert dual is not None
    rough, fine = (global_maxima(dual, world.delta, budget=budget) for budget in (20, 4000))
    assert rough.unsettled.any()
    assert torch.isfinite(rough.gap).all()
    assert not fine.unsettled.any()
    reached = dual.primal(rough.delta)
    assert (dual.primal(fine.delta) - reached <= rough.gap * 50 + 1e-9).all()  # in the dual's own units


def test_linear_maximum_against_all_corners():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        slope, a, b = torch.rand(3, 4, generator=generator, dtype=torch.float64)
        low, high = torch.minimum(a, b) / 4, torch.maximum(a, b)
        if high.sum() < 1:
            continue
        best = -torch.inf
        for k in range(4):
            for mask in range(16):
                p = torch.where(torch.tensor([mask >> j & 1 for j in range(4)], dtype=torch.bool), high, low)
                p[k] = 1 - (p.sum() - p[k])
                if low[k] <= p[k] <= high[k]:
                    best = max(best, float(slope @ p))
        assert float(linear_maximum(slope, low, high)) == pytest.approx(best, abs=1e-12)


def test_losses_without_the_form_are_told_apart():
    """Ignored labels, class weights, logits scaled by the loss: not log sum exp z - <t, z>."""

    def tempered(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(2 * z, y, reduction=reduction)

    x, y = torch.rand(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    net, threat = nn.Linear(3, 3, dtype=torch.float64), ThreatModel("l2", 0.1, None)
    weighted = functools.partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    for loss, known in (
        (F.cross_entropy, True),
        (tempered, False),
        (weighted, False),
        (nn.MultiMarginLoss(reduction="none"), False),
    ):
        function = loss if not isinstance(loss, nn.Module) else lambda z, y, reduction, m=loss: m(z, y)
        problem = HeadProblem(net, function, x)
        assert (as_dual(problem, problem.read_theta(), threat, x, y, None) is not None) == known
