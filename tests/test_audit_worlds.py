"""Paired worlds: who is in which, that figures do not depend on interruptions or processes, and what is refused."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, MismatchError, SolveError
from lightning_muter.evidence.attacks import LiRA, LossThreshold
from lightning_muter.evidence.observed import KEPT, OUT, REMOVED
from lightning_muter.study.attacks import PGD
from lightning_muter.study.audit import worlds as audit
from lightning_muter.study.audit.runner import make_worlds
from lightning_muter.study.audit.tables import gather, read_audit, summary
from lightning_muter.study.audit.worlds import BEFORE, Plan, ball_points, make_world, margins, missing
from lightning_muter.study.data import DigitsDataModule
from lightning_muter.study.hard_requests import Mislabelled
from lightning_muter.study.methods.base import Competitor, Outcome, State
from lightning_muter.study.methods.muter import Unlearn
from lightning_muter.study.models import SoftmaxRegression
from lightning_muter.study.report.rows import REFERENCE
from lightning_muter.study.setup.cache import Cache
from lightning_muter.study.setup.problem import World

WORLDS = 6


class Refuses(Competitor):
    default_label = "refuses"

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        raise SolveError("negative curvature")


@pytest.fixture(scope="module")
def plan() -> Plan:
    data = DigitsDataModule(classes=[0, 1, 2], limit_train=120, limit_test=30)
    setting = Mislabelled(0.3)
    private = setting.prepare(data.private_dataset, 0)
    (scenario,) = setting.scenarios(private, 0)
    torch.manual_seed(0)
    model = SoftmaxRegression(data.in_shape, 3).double()
    world = World(model, private, data.test_dataset, ThreatModel("l2", 0.1), 1e-2, PGD(3), 0, {"polish": 12})
    methods = {"one": Unlearn(), "refused": Refuses()}
    return Plan(world, scenario.requests[0], methods, WORLDS, 0, population=10, points=7)


@pytest.fixture(scope="module")
def cache(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    found = Cache(tmp_path_factory.mktemp("cache"))
    make_worlds(plan, found, workers=1)
    return found


def test_in_each_world_a_third_is_kept_removed_and_out(plan: Plan) -> None:
    roles = plan.roles()
    for index in range(WORLDS):
        positions, removed = plan.positions(index)
        at = {
            role: {c for c, r in zip(plan.candidates, roles[:, index], strict=True) if r == role} for role in range(3)
        }
        assert set(removed) == at[REMOVED] <= set(positions)
        assert at[KEPT] <= set(positions)
        assert not at[OUT] & set(positions)
        pool = set(positions) - set(plan.candidates)
        assert len(pool) == round(2 / 3 * (len(plan.world.data) - len(plan.candidates)))
    assert plan.positions(0) != plan.positions(1)


def test_tables_say_who_remembers(plan: Plan, cache: Cache, tmp_path: Path) -> None:
    results = gather(plan, cache, [LossThreshold(), LiRA()], splits=2, draws=20, problem="p")
    rows = {(r.method, r.attack, r.inputs): r for r in results.attacks}
    before, one, again = (rows[m, "loss threshold", "clean"] for m in (BEFORE, "constraint-aware", REFERENCE))
    assert before.auc > 0.8 > 0.7 > again.auc
    assert before.auc > one.auc
    assert again.minus_retraining == again.clean_gap == 0
    assert before.minus_low < before.minus_retraining < before.minus_high
    assert all(0 <= r.auc_low <= r.auc <= r.auc_high <= 1 for r in results.attacks if r.method != "refuses")
    assert math.isnan(rows["refuses", "U-LiRA", "adversarial"].auc)
    assert "negative curvature" in rows["refuses", "U-LiRA", "adversarial"].note
    results.write(tmp_path)
    with (tmp_path / "audit.csv").open() as lines:
        columns = next(csv.reader(lines))
    wanted = ["method", "attack", "inputs", "auc", "auc_low", "auc_high", "tpr_at_fpr_1", "clean", "robust"]
    assert columns[:9] == wanted
    attacks, laws, curves = read_audit(tmp_path)
    assert [r.method for r in attacks] == [r.method for r in results.attacks]
    known = {(row.method, row.measure): row for row in laws if row.inputs != "adversarial"}
    assert known[REFERENCE, "residual knowledge"].mean == 0
    assert known[BEFORE, "residual knowledge"].mean > 0
    assert {c["attack"] for c in curves} == {"loss threshold", "U-LiRA"}
    assert len(summary(results)) == 1 + len(results.attacks)


def test_a_killed_audit_goes_on_to_the_same_figures_in_any_number_of_processes(
    plan: Plan, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Cache(tmp_path)
    real, calls = audit._scored, 0

    def dies(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(audit, "_scored", dies)
    with pytest.raises(KeyboardInterrupt):
        make_world(plan, other, 0)
    assert 0 < len(missing(plan, other, 0)) < 4
    monkeypatch.undo()
    threads = torch.get_num_threads()
    make_worlds(Plan(**{**vars(plan), "worlds": 2}), other, workers=1)
    assert torch.get_num_threads() == threads
    for index in range(2):
        for name in (BEFORE, "one", REFERENCE):
            mine, theirs = (c.get("audit", plan.key(index, name)) for c in (other, cache))
            assert mine is not None
            assert theirs is not None
            assert all(torch.equal(mine[1][k], theirs[1][k]) for k in theirs[1])


@pytest.mark.slow
def test_processes_give_the_same_figures(plan: Plan, cache: Cache, tmp_path: Path) -> None:
    other = Cache(tmp_path)
    make_worlds(Plan(**{**vars(plan), "worlds": 2}), other, workers=2)
    mine, theirs = (c.get("audit", plan.key(1, "one")) for c in (other, cache))
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine[1]["margins_clean"], theirs[1]["margins_clean"])


def test_worlds_are_shared_and_new_settings_are_new_worlds(plan: Plan, cache: Cache) -> None:
    assert not missing(plan, cache, 0)
    more = Plan(**{**vars(plan), "methods": {**plan.methods, "two": Unlearn(refine=1)}})
    assert missing(more, cache, 0) == ["two"]
    assert len(missing(Plan(**{**vars(plan), "pool": 0.5}), cache, 0)) == 4


def test_a_world_that_was_trained_otherwise_is_refused(plan: Plan, cache: Cache, tmp_path: Path) -> None:
    other = Cache(tmp_path)
    for index in range(WORLDS):
        for name in (BEFORE, *plan.methods, REFERENCE):
            meta, tensors = cache.get("audit", plan.key(index, name)) or ({}, {})
            if index == 4:
                meta = {**meta, "trained": plan.trained(0.3)}
            other.put("audit", plan.key(index, name), meta, tensors)
    with pytest.raises(MismatchError, match=r"world 4 was trained as .*3e-01 only"):
        gather(plan, other, [LossThreshold()], splits=2, draws=20, problem="p")
    with pytest.raises(ArgumentError, match=r"audit\.workers"):
        make_worlds(plan, cache, workers=0)


def test_margins_are_log_odds_of_the_label() -> None:
    z = torch.randn(5, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0])
    p = torch.softmax(z, 1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(margins(z, y), torch.log(p / (1 - p)))
    one = torch.randn(5, 1, dtype=torch.float64)  # one logit: of class 1
    torch.testing.assert_close(margins(one, y.clamp(max=1)), torch.where(y.clamp(max=1) > 0, 1, -1) * one[:, 0])


def test_points_lie_in_the_ball() -> None:
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    around = ball_points(x, ThreatModel("l2", 0.2), 50, 0)
    assert around.shape == (3, 50, 1, 2, 2)
    assert float((around - x[:, None]).flatten(2).norm(dim=2).max()) <= 0.2 + 1e-9
    assert float(around.min()) >= 0
    assert float(around.max()) <= 1
    assert torch.equal(around, ball_points(x, ThreatModel("l2", 0.2), 50, 0))
    assert torch.equal(ball_points(x, None, 2, 0)[:, 1], x)


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_to_the_same_file(tmp_path: Path) -> None:
    def started(cache: str, out: str) -> subprocess.Popen[bytes]:
        options = [
            "experiment=quick",
            "request=mislabelled",
            "method=[constraint_aware]",
            "audit=quick",
            "audit.worlds=6",
        ]
        folders = [f"cache_dir={tmp_path / cache}", f"hydra.run.dir={tmp_path / out}", "progress=false"]
        command = [sys.executable, "-m", "lightning_muter.study.experiment", *options, *folders, "audit.workers=2"]
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)

    def made() -> list[Path]:
        return list((tmp_path / "cache" / "audit").glob("*.muter"))

    killed = started("cache", "killed")
    while len(made()) < 3:
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 3 <= len(made()) < 18  # of six worlds, three models each
    assert not (tmp_path / "killed" / "audit.csv").exists()
    for cache, out in (("cache", "resumed"), ("other", "whole")):
        assert started(cache, out).wait() == 0
    for name in ("audit.csv", "audit_laws.csv", "audit_roc.csv"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
