"""Cutting sets: they meet the least objective on kinked and smooth backbones, within their budget, without waiting in loops."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_muter import ThreatModel, take_snapshot, unlearn
from lightning_muter.adversarial.examples import LastExamples
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.response.choose import L2Response
from lightning_muter.errors import ArgumentError
from lightning_muter.minimise.budget import Budget, Fit
from lightning_muter.minimise.cuts import CYCLE, CuttingSets
from lightning_muter.minimise.oracle import into
from lightning_muter.minimise.train_on import affordable, cost_of_sums
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.scope.head_methods import objective_of

DECAY = 1e-2


def network(kind: str = "relu") -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    activation = nn.ReLU() if kind == "relu" else nn.SiLU()
    net = nn.Sequential(nn.Linear(6, 12), activation, nn.Linear(12, 3))
    net[0].requires_grad_(False)
    x = torch.rand(40, 6)
    return net, TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))


def objective(
    net: nn.Module, data: TensorDataset, threat: ThreatModel, weight: Tensor | None = None
) -> RobustObjective:
    source = SampleSource(data, threat=threat, weight=weight)
    problem = HeadProblem(net, F.cross_entropy, source.examples())
    return RobustObjective(problem, threat, source, torch.full(problem.shape, DECAY, dtype=torch.float64))


def robust_value(net: nn.Module, data: TensorDataset, threat: ThreatModel, theta: Tensor) -> float:
    """F / n by many plain ascents, with nothing of the package in it but the ball."""
    x, y = data.tensors
    torch.manual_seed(1)
    top = torch.full((len(x),), -torch.inf, dtype=torch.float64)
    for start in range(4):
        delta = into(threat, torch.randn_like(x) * threat.eps * (start > 0), x)
        for step in range(80):
            delta.requires_grad_(True)
            z = net[:-1](x + delta).double() @ theta[:, :-1].T + theta[:, -1]
            loss = F.cross_entropy(z, y, reduction="none")
            (g,) = torch.autograd.grad(loss.sum(), delta)
            top = torch.maximum(top, loss.detach())
            g = g.sign() if threat.norm == "linf" else g / g.norm(dim=1, keepdim=True).clamp(min=1e-12)
            delta = into(threat, delta.detach() + 0.25 * 0.95**step * threat.eps * g, x)
    return float(top.mean() + DECAY / 2 * theta.square().sum())


@pytest.mark.parametrize(("kind", "norm", "eps"), [("relu", "linf", 0.05), ("silu", "l2", 0.1)])
def test_cuts_meet_the_objective_from_both_sides(kind, norm, eps):
    net, data = network(kind)
    threat = ThreatModel(norm, eps)
    one = objective(net, data, threat)
    found = CuttingSets(one, Budget()).run(one.problem.read_theta(), tolerance=1e-3, max_passes=80)
    assert found.status == "converged"
    assert found.gap <= 1e-3
    true = robust_value(net, data, threat, found.theta)
    assert found.bound / 40 <= true  # a lower bound of the least F is one of F anywhere
    assert true == pytest.approx(found.value / 40, rel=3e-3)
    assert found.after < 0.02 * found.before
    # no other head nearby is better than the bound allows
    for step in (0.02, 0.1):
        other = found.theta + step * torch.randn(found.theta.shape, dtype=torch.float64)
        assert robust_value(net, data, threat, other) >= found.bound / 40


def test_weights_of_samples_count():
    net, data = network()
    threat = ThreatModel("linf", 0.05)
    weight = torch.ones(40)
    weight[:20] = 0
    half = objective(net, data, threat, weight)
    half.decay /= 2  # n counts all rows
    alone = objective(net, TensorDataset(*(t[20:] for t in data.tensors)), threat)
    ends = [
        CuttingSets(o, Budget()).run(o.problem.read_theta(), tolerance=1e-4, max_passes=80).theta for o in (half, alone)
    ]
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < 0.02


def test_a_budget_is_kept_and_said():
    net, data = network()
    budget = Budget(12.0)
    one = objective(net, data, ThreatModel("linf", 0.05))
    found = CuttingSets(one, budget, torch.zeros(40, 6)).run(one.problem.read_theta(), tolerance=1e-9)
    assert found.status == "budget"
    assert budget.spent <= 12


def test_what_a_budget_means():
    assert Fit(10, 11).allowance("auto") == pytest.approx(31.35)
    assert Fit(100, 8).allowance("auto") == pytest.approx(76)
    assert Fit(10, 11).allowance(0.2) == pytest.approx(20.9)
    for wrong in (0, -1.0, "all", True):
        with pytest.raises(ArgumentError, match="budget"):
            Fit().allowance(wrong)


def test_no_step_waits_for_the_device(monkeypatch):
    """Numbers read off tensors per pass: some, but none per batch, step of ascent, Newton step or product."""
    net, data = network()
    counts = []
    for steps, chunk in ((1, 64), (4, 4)):
        reads = [0]
        one = objective(net, data, ThreatModel("l2", 0.1))
        monkeypatch.setattr("lightning_muter.curvature.problem.backbone._AT_A_TIME", chunk)
        monkeypatch.setattr("lightning_muter.minimise.cuts.NEWTON", steps)
        sets = CuttingSets(one, Budget(), torch.zeros(40, 6))
        start = one.problem.read_theta()
        with monkeypatch.context() as patch:
            for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
                plain = getattr(Tensor, name)

                def counted(self, *args, _plain=plain, _reads=reads):
                    _reads[0] += 1
                    return _plain(self, *args)

                patch.setattr(Tensor, name, counted)
            sets.run(start, tolerance=0.0, max_passes=2 * CYCLE)
        counts.append(reads[0])
    assert counts[0] == counts[1]
    assert counts[0] <= 4 * 2 * CYCLE


@pytest.mark.filterwarnings("ignore:The head is not stationary")  # forty rows, three epochs' worth
def test_a_snapshot_is_taken_at_the_points_that_the_head_was_trained_on():
    net, data = network()
    options = {"threat_model": ThreatModel("linf", 0.05), "weight_decay": DECAY, "progress": False}
    snapshot = take_snapshot(net, data, budget="auto", **options)
    assert snapshot.inner.as_found
    polish = snapshot.figures["polish"]
    assert polish["status"] in ("converged", "noise floor", "budget")
    assert polish["gradients"] <= Fit().allowance("auto")
    again = take_snapshot(net, data, polish=0, like=snapshot, **options)
    # up to the head's rounding to its own precision
    assert torch.allclose(again.hessian.blocks, snapshot.hessian.blocks, rtol=1e-4, atol=1e-4)
    # a row is subtracted as it was added: of all but one removed, the sums of that one are left
    problem = HeadProblem(net, F.cross_entropy, data.tensors[0])
    one = objective_of(snapshot, problem, SampleSource(data), [7], snapshot.starts, Shards())
    alone, _ = one.sums(snapshot.theta_ref, response=snapshot.response, settle=False)
    unlearn(net, snapshot, [i for i in range(40) if i != 7], data, progress=False)
    assert torch.allclose(snapshot.hessian.blocks, alone.hessian.blocks, atol=1e-4)  # float32 in other batches


def test_examples_are_found_by_content():
    torch.manual_seed(0)
    x, kept = torch.rand(6, 2, 3), LastExamples()
    moved = x + 0.01 * torch.randn_like(x)
    kept.add(x[:4], x[:4])
    kept.next_epoch()
    kept.add(x[[2, 0, 3]], moved[[2, 0, 3]])
    delta, known = kept.of(x.flatten(1).double()[:5])
    assert known.tolist() == [True, True, True, True, False]
    assert torch.allclose(delta[[0, 2, 3]].float(), (moved - x).flatten(1)[[0, 2, 3]], atol=1e-4)
    assert not bool(delta[1].any())
    assert not bool(delta[4].any())
    kept.next_epoch()
    kept.next_epoch()
    assert not bool(kept.of(x)[1].any())


def test_refining_goes_on_from_the_stored_points_and_is_never_worse():
    net, data = network()
    threat = ThreatModel("linf", 0.05)
    snapshot = take_snapshot(net, data, threat_model=threat, weight_decay=DECAY, progress=False)
    assert snapshot.inner.as_found
    kept = TensorDataset(*(t[8:] for t in data.tensors))
    ends = {}
    for refine in (0, 2):
        model, stored = copy.deepcopy(net), copy.deepcopy(snapshot)
        unlearn(model, stored, range(8), data, retain=data, refine=refine, progress=False)
        head = torch.cat([model[-1].weight, model[-1].bias[:, None]], 1).detach().double()
        ends[refine] = robust_value(net, kept, threat, head)
        if refine:  # what is stored goes on: another request finds its own rows there
            unlearn(model, stored, [9, 20], data, progress=False)
    assert ends[2] <= ends[0] + 1e-3 * abs(ends[0])


def test_a_budget_takes_the_cheaper_form_of_a_response():
    net, data = network("silu")
    one = objective(net, data, ThreatModel("l2", 0.1))
    exact = L2Response(sketch=0)
    assert affordable(exact, one, Budget()) is exact
    assert affordable(exact, one, Budget(1000.0)) is exact
    cheap = affordable(exact, one, Budget(24.0))
    assert isinstance(cheap, L2Response)
    assert cheap.max_exact == 0
    assert cost_of_sums(one, cheap) < cost_of_sums(one, exact)
    assert exact.max_exact > 0


def test_a_budget_pays_the_statistics_of_a_head_that_stays_as_it_is():
    net, data = network("silu")
    options = {"threat_model": ThreatModel("l2", 0.1), "weight_decay": DECAY, "progress": False, "polish": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not stationary
        free, short = (take_snapshot(net, data, budget=budget, **options) for budget in (None, 0.5))
        given = take_snapshot(net, data, budget=0.5, response=L2Response(sketch=0), **options)
    assert short.response.max_exact == 0 < free.response.max_exact
    assert given.response.max_exact == free.response.max_exact
