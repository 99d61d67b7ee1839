"""Sums of total Hessians: dense oracles of every direct part, additivity, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.sums import BlockSymmetric, Sums
from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.response.choose import as_response
from lightning_muter.model.dataset import SampleSource
from tests import reference
from tests.cases import NAMES, THREATS, Case, case, make
from tests.maxima import solved


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _sums(one: Case, key: str, response: str = "auto", *, positions=None, batch_size: int = 1024, **kwargs) -> Sums:
    threat = THREATS[key]
    objective = one.objective(threat, batch_size=batch_size)
    theta = reference.theta_of(one)
    objective.anchor(theta)
    objective.positions = positions
    return objective.sums(theta, response=as_response(response, threat), **kwargs)[0]


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("name", NAMES)
def test_direct_sums_against_dense_derivatives(name, curvature):
    one = case(name)
    problem, theta, _, found = solved(one, THREATS["l2-box"])
    exact = reference.derivatives(one, theta, one.x + found.delta, one.y)
    weight = torch.ones(len(one.x), dtype=torch.float64) if one.weight is None else one.weight
    each = torch.einsum("na,nb->nab", exact.w, exact.w) if curvature == "fisher" else exact.ww
    got = _sums(one, "l2-box", "none", curvature=curvature)
    assert got.hessian is not None
    assert _relative(got.hessian.dense(), (weight[:, None, None] * each).sum(0)) < 1e-7
    assert _relative(got.gradient.flatten(), weight @ exact.w) < 1e-8
    assert abs(float(got.value) - float(weight @ exact.loss)) < 1e-9
    assert abs(float(got.gradient_scale) - float(weight @ exact.w.norm(dim=1))) < 1e-7
    assert problem.shape == theta.shape


@pytest.mark.parametrize("key", THREATS)
@pytest.mark.parametrize(
    "name", ["linear-softmax-bias", "affine-softmax-weighted", "smooth-softmax-bias", "relu-softmax"]
)
def test_parts_add_up_in_any_order_and_batch(name, key):
    """M(D) - M(U) = M(R), g likewise, to 1e-10 relative."""
    one = case(name)
    n = len(one.x)
    forget, kept = [3, 0, 11], [i for i in range(n) if i not in (3, 0, 11)]
    whole = _sums(one, key)
    gone = _sums(one, key, positions=forget, batch_size=2)
    left = _sums(one, key, positions=list(reversed(kept)), batch_size=5)
    assert whole.hessian is not None
    assert gone.hessian is not None
    assert left.hessian is not None
    assert _relative(whole.hessian.minus(gone.hessian).dense(), left.hessian.dense()) < 1e-10
    assert _relative(whole.gradient - gone.gradient, left.gradient) < 1e-10
    assert whole.count == gone.count + left.count == n


def test_chunks_of_the_workspace_change_nothing(monkeypatch):
    one = case("affine-softmax-weighted")
    whole = _sums(one, "l2")
    monkeypatch.setattr("lightning_muter.curvature.hessian.sums._WORKSPACE", 200)
    parts = _sums(one, "l2")
    assert whole.hessian is not None
    assert parts.hessian is not None
    assert _relative(parts.hessian.dense(), whole.hessian.dense()) < 1e-14
    assert whole.counts == parts.counts


def test_weights_count_samples():
    """A sample of weight 2 is a sample that is there twice; of weight 0, one that is not."""
    one = make("linear", "softmax", n=8)
    weights = torch.tensor([1, 2, 0, 1, 1, 3, 1, 0], dtype=torch.float64)
    one.weight = weights
    weighted = _sums(one, "l2-box")
    one.weight = None
    at = torch.arange(8).repeat_interleave(weights.long())
    one.x, one.y = one.x[at], one.y[at]
    repeated = _sums(one, "l2-box")
    assert weighted.hessian is not None
    assert repeated.hessian is not None
    assert _relative(weighted.hessian.dense(), repeated.hessian.dense()) < 1e-12
    assert _relative(weighted.gradient, repeated.gradient) < 1e-12


def test_blocks_hold_a_symmetric_matrix():
    generator = torch.Generator().manual_seed(0)
    k, q = 3, 2
    full = torch.randn(k * q, k * q, generator=generator, dtype=torch.float64)
    full = full + full.T
    blocks = BlockSymmetric.zeros(k, q, torch.float64)
    for p, (a, b) in enumerate(blocks.pairs.T.tolist()):
        blocks.blocks[p] = full[a * q : (a + 1) * q, b * q : (b + 1) * q]
    assert torch.equal(blocks.dense(), full)
    copy = blocks.clone()
    copy.blocks += 1
    assert torch.equal(blocks.dense(), full)
    assert blocks.size == k * q


@pytest.mark.parametrize("n", [200, 4000])
def test_sums_accumulated_in_single_precision_err_by_rounding_alone(monkeypatch, n):
    """Devices without float64 sum in float32: the error is measured here, not to grow with the number of samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 12, generator=generator, dtype=torch.float64).float()
    y = torch.randint(0, 4, (n,), generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 4))
    threat = ThreatModel("l2", 0.05, None)
    sums = {}
    for dtype in (torch.float64, torch.float32):
        monkeypatch.setattr(
            "lightning_muter.curvature.problem.backbone.algebra_dtype", lambda device, dtype=dtype: dtype
        )
        source = SampleSource(TensorDataset(x, y), batch_size=64)
        problem = HeadProblem(model, torch.nn.functional.cross_entropy, source.examples())
        decay = torch.zeros(problem.shape, dtype=dtype)
        objective = RobustObjective(problem, threat, source, decay, InnerSolver(starts=False))
        sums[dtype], _ = objective.sums(problem.read_theta(), response=as_response("auto", threat))
    exact, rounded = (sums[d].hessian.dense().double() for d in (torch.float64, torch.float32))
    assert 0 < (rounded - exact).norm() < 1e-6 * exact.norm()  # 1e-7 and 2e-7 measured
    slope = sums[torch.float64].gradient
    assert (sums[torch.float32].gradient.double() - slope).norm() < 1e-6 * slope.norm()
