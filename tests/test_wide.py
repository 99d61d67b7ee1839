"""Unlearning whole networks: against retraining on a strongly convex model, falling objectives, and faults."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, RequestError, SolveError, UnsuitableError
from lightning_muter.scope.network import unlearn_wide
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.solvers.cg import CG, TruncatedCG
from lightning_muter.storage.fingerprint import weight_fingerprint
from tests.networks import data, direction, relu_net

QUIET: dict[str, Any] = {"progress": False, "weight_decay": 0.01}


def softmax() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)).double()


def trained() -> tuple[nn.Module, TensorDataset, ThreatModel]:
    dataset, threat = data(40), ThreatModel("l2", 0.03, None)
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    x = dataset.tensors[0]
    dataset = TensorDataset(x, ((x - x.mean(0)) @ teacher.T).argmax(1))
    model = softmax()
    take_snapshot(model, dataset, threat_model=threat, weight_decay=0.01, progress=False)
    return model, dataset, threat


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_linear_model_reaches_the_retrained_optimum() -> None:
    model, dataset, threat = trained()
    retrained = softmax()
    take_snapshot(
        retrained, Subset(dataset, list(range(4, 40))), threat_model=threat, weight_decay=0.01, progress=False
    )
    apart = (weights(model) - weights(retrained)).norm()
    result = unlearn_wide(model, [0, 1, 2, 3], dataset, threat_model=threat, steps=8, tolerance=1e-8, **QUIET)
    assert (weights(model) - weights(retrained)).norm() < 1e-4 * apart
    assert result.stationarity_after is not None
    assert result.stationarity_after < 1e-3 * result.stationarity_before  # type: ignore[operator]
    assert result.fingerprint_after == weight_fingerprint(model.state_dict())
    assert result.n_retained == 36
    assert result.solver["steps"][0]["accepted"]


def test_a_network_ends_with_a_lower_retained_objective_and_says_how() -> None:
    model, dataset = relu_net(), data(30, 6)
    with pytest.warns(UserWarning, match="last system ended"):
        result = unlearn_wide(
            model,
            [1, 2],
            dataset,
            threat_model=ThreatModel("linf", 0.03),
            cg=TruncatedCG(max_iter=1),
            steps=3,
            **QUIET,
        )
    assert result.refine[-1] < result.stationarity_before  # type: ignore[operator]
    assert all(t["fall"] > 0 for t in result.solver["steps"] if t["accepted"])
    assert result.to_dict()["solver"]["status"] == "capped"


def test_patterns_leave_the_rest_alone_and_say_so() -> None:
    model, dataset = relu_net(), data(30, 6)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="leaves 2 trainable parameters"):
        unlearn_wide(model, [3], dataset, threat_model=ThreatModel("l2", 0.03), scope=["2.*"], steps=1, **QUIET)
    assert torch.equal(model[0].weight, before[0].weight)  # type: ignore[index]
    assert not torch.equal(model[2].weight, before[2].weight)  # type: ignore[index]


def test_trades_is_unlearned() -> None:
    model, dataset = relu_net(), data(30, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = unlearn_wide(
            model, [0], dataset, threat_model=ThreatModel("l2", 0.1), trades_beta=3.0, steps=2, **QUIET
        )
    assert result.refine[-1] < result.stationarity_before  # type: ignore[operator]


def test_a_dry_run_and_a_failure_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dataset, threat = trained()
    before = weight_fingerprint(model.state_dict())
    result = unlearn_wide(model, [5], dataset, threat_model=threat, dry_run=True, **QUIET)
    assert weight_fingerprint(model.state_dict()) == before != result.fingerprint_after
    monkeypatch.setattr("lightning_muter.scope.network.weight_fingerprint", _raises)
    with pytest.raises(OSError, match="planted"):
        unlearn_wide(model, [5], dataset, threat_model=threat, **QUIET)
    assert weight_fingerprint(model.state_dict()) == before


def _raises(_: object) -> str:
    raise OSError("planted")


def test_no_step_that_falls_is_an_error() -> None:
    model, dataset, threat = trained()
    with pytest.raises(SolveError, match="Nothing was changed"):
        unlearn_wide(model, [5], dataset, threat_model=threat, seconds=0.0, **QUIET)


def test_bad_requests_are_refused_by_name() -> None:
    model, dataset, threat = trained()
    with pytest.raises(RequestError, match="forgotten before"):
        unlearn_wide(model, [5], dataset, threat_model=threat, forgotten=[5], **QUIET)
    with pytest.raises(ArgumentError, match="forget"):
        unlearn_wide(model, [40], dataset, threat_model=threat, **QUIET)
    with pytest.raises(ArgumentError, match="trades_beta"):
        unlearn_wide(model, [4], dataset, threat_model=threat, trades_beta=-1.0, **QUIET)
    with pytest.raises(ArgumentError, match="weight_decay"):
        unlearn_wide(model, [4], dataset, threat_model=threat, weight_decay=-1.0, progress=False)

    class FSDPLinear(nn.Linear):
        pass

    with pytest.raises(UnsuitableError, match="ddp"):
        unlearn_wide(nn.Sequential(FSDPLinear(4, 3)).double(), [4], dataset, threat_model=threat, **QUIET)


def test_truncated_cg_agrees_with_cg_and_predicts_the_fall() -> None:
    root = torch.stack([direction(20, seed) for seed in range(20)])
    matrix, rhs = root @ root.T + torch.eye(20, dtype=torch.float64), direction(20, 99)
    found, fall = TruncatedCG(200, 1e-10, 0.0).solve(lambda v: matrix @ v, rhs)
    expected = CG(200).solve(matrix, rhs).value
    assert found.status == "converged"
    assert (found.value - expected).norm() < 1e-8 * expected.norm()
    assert fall == pytest.approx(float(rhs @ expected - expected @ matrix @ expected / 2))


def test_truncated_cg_stops_at_negative_curvature_with_a_descent_direction() -> None:
    matrix, rhs = torch.diag(torch.tensor([1.0, -1.0])), torch.tensor([0.1, 1.0])
    found, _ = TruncatedCG().solve(lambda v: matrix @ v, rhs)
    assert found.status == "negative curvature"
    assert not found.ok
    assert found.value @ rhs > 0
    nothing, _ = TruncatedCG().solve(lambda v: v, torch.zeros(2))
    assert nothing.status == "converged"
