"""The gate: what it lets through, what it holds, and that nothing is written of a request that is held."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_muter import Snapshot, ThreatModel, UnlearnResult, take_snapshot, unlearn
from lightning_muter.deletion.gate import Gate, Verdict, Watch, test_batches
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.errors import ArgumentError, RequestError
from lightning_muter.study.attacks import stacked
from lightning_muter.study.experiment import build_world, methods_of
from lightning_muter.study.hard_requests import Mislabelled
from lightning_muter.study.hydra.resolvers import with_numbers
from lightning_muter.study.methods.muter import Unlearn
from lightning_muter.study.setup.cache import Cache
from tests.configs import composed
from tests.world import DataWithTest, command, plain_checkpoint

test_batches.__test__ = False  # type: ignore[attr-defined]


PLANTED = [50, 51, 52, 53]  # rows with a wrong label


def problem() -> tuple[nn.Sequential, TensorDataset, Snapshot, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 4, generator=generator, dtype=torch.float64) + 2.5 * torch.eye(4, dtype=torch.float64)[y]
    test = [(x[60:], y[60:])]
    y[PLANTED] = (y[PLANTED] + 1) % 3
    train = TensorDataset(x[:60], y[:60])
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3).double())
    snapshot = take_snapshot(net, train, threat_model=ThreatModel("l2", 0.1, None), weight_decay=1e-2, progress=False)
    return net, train, snapshot, test


def request(rows: list[int], gate: Gate, spoil: float = 0.0) -> tuple[Verdict, UnlearnResult]:
    net, train, snapshot, test = problem()
    before, old = copy.deepcopy(net), copy.deepcopy(snapshot)
    result = unlearn(net, snapshot, rows, train, retain=train, progress=False)
    if spoil:
        with torch.no_grad():
            net[1].weight.mul_(-spoil)
    return gate.examine(before, net, old, result, train, test), result


def test_an_ordinary_request_passes_with_its_figures() -> None:
    verdict, result = request([1, 2, 3, 4], Gate(random_requests=3))
    assert not verdict.held
    verdict.require()
    clean = verdict.figures["clean"]
    assert clean["low"] < clean["after"] <= clean["high"]
    assert clean["rows"] == 30
    assert len(verdict.figures["step_of_random_requests"]) == 3
    assert verdict.figures["step"] == result.step_norm


def test_a_destroyed_model_is_held() -> None:
    verdict, _ = request([1, 2, 3, 4], Gate(random_requests=0), spoil=1.0)
    assert any("clean accuracy falls" in reason for reason in verdict.reasons)
    assert any("robust accuracy falls" in reason for reason in verdict.reasons)
    with pytest.raises(RequestError, match="held for a person's decision"):
        verdict.require()


def test_a_request_of_planted_rows_takes_an_unusual_step() -> None:
    verdict, _ = request(PLANTED, Gate(clean_drop=100, robust_drop=100, step_factor=1.2, stationarity=1))
    assert [reason for reason in verdict.reasons if "random requests of 4 rows" in reason]


def test_thresholds_on_solver_stationarity_and_accuracy_hold_too() -> None:
    net, train, snapshot, test = problem()
    result = unlearn(copy.deepcopy(net), copy.deepcopy(snapshot), [1], train, retain=train, progress=False)
    result.solver["status"], result.stationarity_after = "negative curvature", 0.5
    verdict = Gate(random_requests=0, robust_least=101).examine(net, net, snapshot, result, train, test)
    text = "; ".join(verdict.reasons)
    assert "negative curvature" in text
    assert "stationary to 5.0e-01" in text
    assert "at least 101 % is wanted" in text


def test_watching_keeps_the_state_from_before() -> None:
    net, train, snapshot, test = problem()
    assert Watch.of(None, net, snapshot, False) is None
    watch = Watch.of(Gate(clean_least=101, random_requests=0), net, snapshot, False)
    assert watch is not None
    result = unlearn(net, snapshot, [1], train, progress=False)
    with pytest.raises(RequestError):
        watch.judge(net, result, train, test)
    watch.accept = True
    watch.judge(net, result, train, test)
    assert any("accepted by a person" in warning for warning in result.warnings)
    assert result.gate is not None
    assert result.gate["held"]


def test_the_command_writes_nothing_of_a_held_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.world as world

    path = tmp_path / "last.ckpt"
    plain_checkpoint(path)
    command("snapshot", path)
    before = (tmp_path / "last.muter.ckpt").read_bytes()
    with pytest.raises(ArgumentError, match="test or validation rows"):
        command("unlearn", path, forget=[1], gate=Gate())
    monkeypatch.setattr(world, "Data", DataWithTest)
    with pytest.raises(RequestError, match="held"):
        command("unlearn", path, forget=[1], gate=Gate(clean_least=101))
    assert (tmp_path / "last.muter.ckpt").read_bytes() == before
    command("unlearn", path, forget=[1], gate=Gate(clean_least=101), accept_held=True)
    with Ledger.open(tmp_path / "last.muter.ledger") as ledger:
        last = ledger.last()
    assert last is not None
    assert last["metrics"]["gate"]["held"]
    assert any("accepted by a person" in warning for warning in last["warnings"])


@pytest.mark.slow
def test_the_published_formula_on_a_cnn_is_held(tmp_path: Path) -> None:
    """The study's own CNN and 5 % wrong labels: AUC calls that model forgotten, since it is destroyed."""
    methods = "method=[constraint_aware,muter_paper]"
    config = with_numbers(composed("model=cnn", "request=mislabelled", methods, f"cache_dir={tmp_path}", "device=cpu"))
    world = build_world(config, Cache(tmp_path))
    (scenario,) = Mislabelled(0.05).scenarios(world.data, 0)
    rows, test = list(scenario.requests[0]), [stacked(world.test, torch.float64)]
    verdicts = []
    for method in methods_of(config):
        assert isinstance(method, Unlearn)
        state = method.start(world)
        old = copy.deepcopy(state.stored)
        result = unlearn(
            state.model, state.stored, rows, world.data, solver=method.solver, accept="worse", progress=False
        )
        verdicts.append(Gate().examine(world.model, state.model, old, result, world.data, test))
    ours, published = verdicts
    assert not [reason for reason in ours.reasons if "accuracy" in reason]
    assert any("clean accuracy falls" in reason for reason in published.reasons)
    assert any("robust accuracy falls" in reason for reason in published.reasons)
    with pytest.raises(RequestError, match="held"):
        published.require()
