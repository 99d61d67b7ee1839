"""Sketches of G = J K J^T: unbiased, keyed by position alone, and exact where that is cheaper."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.backbone import Backbone
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.boundary import first_order
from lightning_muter.curvature.response.choose import L2Response, LinfResponse
from lightning_muter.curvature.response.operators import LowRankMotion
from lightning_muter.curvature.response.sketch import choose_directions, rademacher
from lightning_muter.errors import ArgumentError
from lightning_muter.model.dataset import SampleSource
from tests.networks import EXACT, data, relu_net


@pytest.mark.parametrize("width", [1, 31, 32, 33, 100])
def test_signs_depend_on_key_position_and_column_alone(width: int) -> None:
    positions = torch.tensor([5, 0, 123456789, 7])
    signs = rademacher(3, positions, width)
    assert signs.shape == (4, width)
    assert set(signs.unique().tolist()) <= {-1, 1}
    assert torch.equal(rademacher(3, positions.flip(0), width).flip(0), signs)
    assert torch.equal(rademacher(3, positions, 100)[:, :width], signs)


def test_signs_are_balanced_and_independent() -> None:
    signs = rademacher(1, torch.arange(2000), 64).double()
    assert signs.mean(0).abs().max() < 5 / 2000**0.5
    assert signs.mean(1).abs().max() < 5 / 64**0.5
    products = signs.T @ signs / 2000 - torch.eye(64)
    assert products.abs().max() < 5.5 / 2000**0.5
    assert (signs * rademacher(2, torch.arange(2000), 64)).mean().abs() < 5 / (2000 * 64) ** 0.5


def head_sums(positions: list[int] | None = None, batch_size: int = 100) -> RobustObjective:
    threat, dataset = ThreatModel("l2", 0.03, None), data(20, 6)
    source = SampleSource(dataset, threat=threat, batch_size=batch_size)
    problem = HeadProblem(relu_net(), F.cross_entropy, source.examples())
    return RobustObjective(problem, threat, source, torch.zeros(problem.shape), EXACT, positions=positions)


def hessian(objective: RobustObjective, sketch: int | None) -> torch.Tensor:
    theta = objective.problem.read_theta()
    sums, _ = objective.sums(theta, response=L2Response(sketch=sketch))
    assert sums.hessian is not None
    return sums.hessian.dense()


def test_many_directions_tend_to_the_exact_sum() -> None:
    exact = hessian(head_sums(), 0)
    errors = [float((hessian(head_sums(), m) - exact).norm() / exact.norm()) for m in (4, 64, 1024)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_a_sketched_sample_is_subtracted_as_it_was_added() -> None:
    whole, gone, kept = ([0, 3, 9, 15], [3, 15], [0, 9])
    parts = [hessian(head_sums(p, batch_size=3), 4) for p in (whole, gone, kept)]
    assert (parts[0] - parts[1] - parts[2]).norm() < 1e-10 * parts[0].norm()


def test_linf_sketches_are_unbiased_too() -> None:
    threat, dataset = ThreatModel("linf", 0.05), data(20, 6)
    source = SampleSource(dataset, threat=threat)
    problem = HeadProblem(relu_net(), F.cross_entropy, source.examples())
    batch = next(iter(source.batches()))
    lo, hi = threat.bounds(batch.x)
    middle = 0.3 * (lo + hi)  # strictly inside
    c = torch.full_like(batch.x, 5.0)
    local = LocalPoint(problem, problem.read_theta(), threat, batch.x, batch.y, middle, c, batch.positions)
    eye = torch.eye(problem.backbone.width, dtype=torch.float64).expand(len(batch.x), -1, -1)
    found = [LinfResponse(sketch=m).gram(local, Counter()) for m in (0, 20000)]
    exact, sketched = (g.times(eye) for g in found if g is not None)
    assert (exact - sketched).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("eps", "first"), [(0.01, True), (0.5, False)])
def test_small_input_curvature_is_taken_to_first_order(eps: float, first: bool) -> None:
    """Without the passes for its root: the mean over many directions is G up to the square of what is small."""
    threat, dataset = ThreatModel("l2", eps, None), data(20, 6)
    source = SampleSource(dataset, threat=threat)
    problem = HeadProblem(relu_net(), F.cross_entropy, source.examples())
    theta = 6 * problem.read_theta()
    batch = next(iter(source.batches()))
    delta = EXACT.solve(problem, theta, threat, batch.x, batch.y).delta
    eye = torch.eye(problem.backbone.width, dtype=torch.float64).expand(len(delta), -1, -1)
    found = []
    for sketch in (0, 1500):
        local = LocalPoint(problem, theta, threat, batch.x, batch.y, delta, None, batch.positions)
        if sketch:
            local.differentiate()
        counts = Counter[str]()
        gram = L2Response(sketch=sketch).gram(local, counts)
        assert gram is not None
        found.append(gram.times(eye))
    taken = counts["first order in the input curvature"]
    assert (taken == len(delta)) if first else (0 < taken < len(delta))
    assert (found[0] - found[1]).norm() < 0.1 * found[0].norm()


def test_the_first_order_is_there() -> None:
    """G = G_0 + G_0 X G_0 + ...: what is added to the plain sketch is right, up to second order."""
    threat, dataset = ThreatModel("l2", 0.08, None), data(20, 6)
    source = SampleSource(dataset, threat=threat)
    problem = HeadProblem(relu_net(), F.cross_entropy, source.examples())
    theta = 3 * problem.read_theta()
    batch = next(iter(source.batches()))
    delta = EXACT.solve(problem, theta, threat, batch.x, batch.y).delta
    local = LocalPoint(problem, theta, threat, batch.x, batch.y, delta, None, batch.positions)
    mask, a, normal = L2Response().free(local, Counter())
    motion = L2Response().motion(local, Counter())
    assert isinstance(motion, LowRankMotion)
    exact = motion.conjugated(local.jacobian)
    bare = LowRankMotion(motion.scale, 0 * motion.side, motion.normal)
    risen = torch.zeros_like(exact)
    for key in range(300):
        omega = rademacher(key, batch.positions, 6 * 32).reshape(len(delta), 6, 32)
        columns = bare.sketched(problem.backbone, local.at, omega.double())
        risen += (first_order(local, mask, a, normal, omega) - columns @ columns.mT) / 300
    expected = exact - bare.conjugated(local.jacobian)
    assert (risen - expected).norm() < 0.25 * expected.norm()


def test_the_cheaper_way_is_taken_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def backbone_of(net: nn.Module, inputs: int) -> Backbone:
        source = SampleSource(data(8, inputs))
        return HeadProblem(net.double(), F.cross_entropy, source.examples()).backbone

    narrow = backbone_of(relu_net(), 6)
    hidden = backbone_of(nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)), 30)
    wide = backbone_of(nn.Sequential(nn.Linear(150, 200), nn.ReLU(), nn.Linear(200, 3)), 150)
    linear = backbone_of(nn.Sequential(nn.Linear(6, 3)), 6)
    with caplog.at_level(logging.DEBUG, logger="lightning_muter"):
        assert choose_directions(None, narrow) == 0
        assert choose_directions(None, narrow, 10**6) > 0
        assert choose_directions(None, hidden) == choose_directions(None, hidden, 500) == 0
        assert choose_directions(None, hidden, 2000) > choose_directions(None, hidden, 10**6) > 0
        assert choose_directions(None, wide, 10) > 0
    assert "150 passes over the backbone exactly" in caplog.text
    assert choose_directions(0, wide) == 0
    assert choose_directions(5, linear) == choose_directions(None, linear, 10**6) == 0
    with pytest.raises(ArgumentError, match="sketch"):
        L2Response(sketch=-1)
    fixed = L2Response().resolved(hidden, 2000)
    assert isinstance(fixed, L2Response)
    assert fixed.sketch == choose_directions(None, hidden, 2000)
    kept = L2Response(sketch=3)
    assert kept.resolved(hidden, 2000) is kept


class _Cube(torch.autograd.Function):
    """x^3 without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * slope


class Cube(nn.Module):
    failing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.failing:
            raise RuntimeError("planted: out of memory")
        return _Cube.apply(x)


def test_layers_without_forward_mode_take_reverse_passes_and_other_errors_are_told() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), Cube(), nn.Linear(5, 3)).double()
    x = data(8, 6).tensors[0]
    backbone = HeadProblem(net, F.cross_entropy, x).backbone
    tangents = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inner = net[0](x)
    expected = 3 * inner.detach()[:, :, None] ** 2 * (net[0].weight.detach() @ tangents)
    assert (backbone.pushforward(x, tangents) - expected).norm() < 1e-12 * expected.norm()
    net[1].failing = True
    with pytest.raises(RuntimeError, match="planted"):
        backbone.pushforward(x, tangents)
