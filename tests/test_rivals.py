"""Which local maxima are kept beside the best one, and equal maxima of linear models."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_muter import Snapshot, ThreatModel, take_snapshot, unlearn
from lightning_muter.certificate.certificate import certify
from lightning_muter.curvature.inner.local_maxima import Several, ranked
from lightning_muter.curvature.inner.maximiser import Smoothing
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.response.choose import as_response
from lightning_muter.minimise.polish import polish
from tests.cases import Case, make

THREAT = ThreatModel("l2", 0.5, None)


def points(*rows: tuple[float, float]) -> Tensor:
    """Places of one sample, (len(rows), 1, 2)."""
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def heights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_the_best_comes_first_and_what_is_elsewhere_follows():
    deltas = points((1, 0), (0, 1), (0.01, 1), (-1, 0))
    places, values = ranked(deltas, heights(1.0, 3.0, 2.9, 2.0), rivals=2)
    torch.testing.assert_close(places, points((0, 1), (-1, 0), (1, 0)))
    torch.testing.assert_close(values, heights(3.0, 2.0, 1.0))
    # equal up to rounding: the earlier one stays
    places, _ = ranked(deltas, heights(1.0, 1.0 + 1e-12, 0.0, 0.0), rivals=0)
    torch.testing.assert_close(places, points((1, 0)))


def test_maxima_that_move_keep_their_weights():
    several = Several(points((0, 1), (1, 0), (0, 0)), heights(3.0, 2.0, -math.inf))
    before, ends = points((0.9, 0.1), (0.1, 0.9)), points((1, 0), (0, 1))
    several.inherit(before, ends, heights(0.3, 0.7), 1.0, lambda rows, d: d.new_full((len(rows),), 1.0))
    several.settle(fresh=True)
    torch.testing.assert_close(several.weights, heights(0.7, 0.3, 0.0))
    assert not several.frozen.any()


def test_a_maximum_that_vanishes_stays_where_it_was():
    several = Several(points((0, 1), (0, 1), (0, 0)), heights(3.0, 3.0, -math.inf))
    several.merge()
    assert several.heights[1, 0] == -math.inf
    before, ends = points((0.02, 1), (1, 0)), points((0, 1), (0, 1))
    several.inherit(before, ends, heights(0.6, 0.4), 1.0, lambda rows, d: d.new_full((len(rows),), 2.5))
    several.settle(fresh=False)
    assert several.frozen[:, 0].sum() == 1
    j = int(several.frozen[:, 0].nonzero()[0, 0])
    torch.testing.assert_close(several.places[j], torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert several.heights[j, 0] == 2.5
    torch.testing.assert_close(several.weights[j], torch.tensor([0.4], dtype=torch.float64))
    torch.testing.assert_close(several.weights[0], torch.tensor([0.6], dtype=torch.float64))
    # one that is far below is not worth a place
    low = Several(points((0, 1), (0, 0)), heights(3.0, -math.inf))
    low.inherit(before, ends, heights(0.6, 0.4), 0.1, lambda rows, d: d.new_full((len(rows),), 2.5))
    assert not low.frozen.any()


def tied() -> Case:
    """A linear model at whose minimiser some samples have two equal maxima."""
    one = make("linear", "softmax", n=40, seed=1)
    return replace(one, y=one.net(one.x).argmax(1))


def minimised(one: Case, scale: float, temperature: float = 0.005) -> tuple[RobustObjective, Tensor, float]:
    objective = one.objective(THREAT, smoothing=Smoothing(temperature=temperature))
    start = scale * one.problem().read_theta()
    done = polish(objective, start, as_response("l2", THREAT), tolerance=1e-6, max_passes=120)
    return objective, done.theta, done.evaluation.stationarity


def test_a_linear_model_with_equal_maxima_is_left_stationary():
    one = tied()
    _, plain, stalled = minimised(one, 1.0, temperature=0.0)
    assert stalled > 1e-3  # a single maximum has no stationary point there
    objective, theta, reached = minimised(one, 1.0)
    assert objective.contended
    assert not objective.reproducible
    assert reached < 1e-5
    at = objective.evaluate(theta)
    assert at.kinks is not None
    assert ((at.kinks.shares() > 0.02).sum(1) > 1).any()
    # the largest maximum is convex in the weights: one end from any start
    _, other, _ = minimised(one, 0.3)
    assert (theta - other).norm() < 5e-3 * theta.norm()
    largest = one.objective(THREAT)  # without weights, from scratch
    assert largest.evaluate(theta).value < largest.evaluate(plain).value


def test_the_certificate_holds_where_maxima_are_equal():
    one = tied()
    objective, theta, _ = minimised(one, 1.0)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1):
        step = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        there = theta + size * theta.norm() * step / step.norm()
        bound = certify(objective, there, objective.evaluate(there, explore=True))
        # theta is the minimiser up to its own stationarity
        assert bound >= 0.99 * float((there - theta).norm())


def test_weighed_maxima_are_stored_and_found_again(tmp_path):
    one = tied()
    options = {"weight_decay": one.decay, "progress": False, "threat_model": THREAT, "loss": one.loss}
    snapshot = take_snapshot(one.net, one.dataset, **options)
    assert snapshot.starts is not None
    assert snapshot.starts.shape[1] > 1
    snapshot.save(tmp_path / "a.muter")
    again = Snapshot.load(tmp_path / "a.muter")
    ends = []
    nets = [copy.deepcopy(one.net) for _ in range(2)]  # one that was made to forget takes no older snapshot
    for net, kept, batch in ((nets[0], snapshot, 1024), (nets[1], again, 7)):
        unlearn(net, kept, [0, 5], one.dataset, retain=one.dataset, refine=3, progress=False, batch_size=batch)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert (ends[0] - ends[1]).norm() < 1e-6 * ends[0].norm()
