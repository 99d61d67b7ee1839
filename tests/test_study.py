"""The comparison as a whole: figures of known models, references shared, refusals kept apart, sweeps that survive."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, SolveError
from lightning_muter.study import compare as protocol
from lightning_muter.study import experiment
from lightning_muter.study.attacks import PGD
from lightning_muter.study.data import DigitsDataModule
from lightning_muter.study.hydra.sweeps import FinishedJobs, add_failure, failures, job_key
from lightning_muter.study.methods.base import Competitor, Outcome, State
from lightning_muter.study.methods.retrain import Nothing, RetrainWarm
from lightning_muter.study.models import Classifier, SoftmaxRegression
from lightning_muter.study.report.rows import Row, read_rows
from lightning_muter.study.requests import Fractions, Scenario, Successive
from lightning_muter.study.setup.cache import Cache
from lightning_muter.study.setup.problem import World, head_vector
from tests.configs import composed

ROW = Row("digits", "softmax", "pgd_l2", "", "", eps=0.1)


class Retrainer:
    """One full-batch step; counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Classifier, dataset: Any) -> float:
        self.calls += 1
        x = torch.stack([dataset[i][0] for i in range(len(dataset))]).double()
        y = torch.stack([dataset[i][1] for i in range(len(dataset))])
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.head.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.head.parameters(), grads, strict=True):
                parameter -= 0.5 * grad
        return 1e-9


@pytest.fixture
def world() -> World:
    dm = DigitsDataModule(limit_train=150)
    torch.manual_seed(0)
    model = SoftmaxRegression(dm.in_shape, 10).double()
    threat = ThreatModel("l2", 0.1)
    return World(model, dm.private_dataset, dm.test_dataset, threat, 1e-3, PGD(2), 1, retrainer=Retrainer())


class Oracle(Competitor):
    """Returns the reference itself."""

    default_label = "oracle"

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        model, stationarity, *_ = state.world.retrain(forgotten)
        return Outcome(model, 0.25, head_vector(model), stationarity=stationarity)


class Refuses(Competitor):
    default_label = "refuses"

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        raise SolveError("negative curvature\nin direction 3")


def test_figures_of_known_models(world: World) -> None:
    methods = [Oracle(), Nothing(), Refuses()]
    rows = {
        r.method: r for r in protocol.run(world, methods, Fractions([0.1]).scenarios(world.data, 0), Cache(None), ROW)
    }
    oracle, nothing, refused = rows["oracle"], rows["doing nothing"], rows["refuses"]
    assert (oracle.distance, oracle.clean_gap, oracle.robust_gap) == (0, 0, 0)
    assert (oracle.agreement_test_clean, oracle.kl_retain_robust) == (1, 0)
    assert (oracle.seconds_request, rows["retraining"].distance) == (0.25, 0)
    assert nothing.distance == 1
    assert nothing.kl_test_clean > 0
    expected = float((head_vector(world.model) - head_vector(world.retrain(_forgotten(world))[0])).norm())
    assert nothing.distance_absolute == pytest.approx(expected)
    assert (refused.status, refused.note) == ("refused", "SolveError: negative curvature in direction 3")
    assert math.isnan(refused.distance)
    assert nothing.n_forgotten == len(_forgotten(world))


def test_a_reference_that_is_none_says_so(world: World) -> None:
    world.retrainer = lambda model, dataset: 0.14
    scenarios = Fractions([0.1]).scenarios(world.data, 0)
    with torch.no_grad():
        world.model.head.weight += 1  # the untouched zero head must differ from the model
    first = next(iter(protocol.run(world, [], scenarios, Cache(None), ROW)))
    assert first.status == "reference"
    assert "stationary to 1.4e-01 only" in first.note


def _forgotten(world: World) -> list[int]:
    return Fractions([0.1]).scenarios(world.data, 0)[0].forgotten(0)


def test_references_are_retrained_once_and_shared(world: World, tmp_path: Path) -> None:
    scenarios = Fractions([0.1, 0.2]).scenarios(world.data, 0)
    retrainer = world.retrainer
    assert isinstance(retrainer, Retrainer)
    first = list(protocol.run(world, [Nothing()], scenarios, Cache(tmp_path), ROW))
    assert retrainer.calls == 2
    second = list(protocol.run(world, [Nothing()], scenarios, Cache(tmp_path), ROW))
    assert retrainer.calls == 2
    assert [(r.distance_absolute, r.seconds_retrain) for r in first] == [
        (r.distance_absolute, r.seconds_retrain) for r in second
    ]
    for file in (tmp_path / "reference").iterdir():
        file.write_bytes(file.read_bytes()[:-10])
    list(protocol.run(world, [Nothing()], scenarios, Cache(tmp_path), ROW))
    assert retrainer.calls == 4  # damaged files are made again
    world.threat = ThreatModel("l2", 0.2)
    list(protocol.run(world, [Nothing()], scenarios, Cache(tmp_path), ROW))
    assert retrainer.calls == 6  # another threat model is another reference


def test_successive_requests_reach_the_method_one_by_one(world: World) -> None:
    seen: list[tuple[int, int]] = []

    class Records(Nothing):
        def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
            seen.append((len(request), len(forgotten)))
            return super().answer(state, request, forgotten)

    rows = list(protocol.run(world, [Records()], Successive(3, size=2).scenarios(world.data, 0), Cache(None), ROW))
    assert seen == [(2, 2), (2, 4), (2, 6)]
    assert [r.n_forgotten for r in rows] == [2, 2, 4, 4, 6, 6]


def test_scenarios_do_not_see_each_other(world: World) -> None:
    """A method's state starts afresh for every scenario, and continues within one."""
    outcomes = []
    for scenarios in ([Scenario(("a",), ((1, 2),)), Scenario(("b",), ((3,),))], [Scenario(("b",), ((3,),))]):
        rows = protocol.run(world, [RetrainWarm()], scenarios, Cache(None), ROW)
        outcomes.append(next(r.distance_absolute for r in rows if r.method.endswith("warm start") and r.setting == "b"))
    assert outcomes[0] == outcomes[1]


def test_a_refusal_ends_the_scenario_for_that_method_only(world: World) -> None:
    class Second(Refuses):
        def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
            if len(forgotten) == 2:
                return Nothing().answer(state, request, forgotten)
            return super().answer(state, request, forgotten)

    rows = list(
        protocol.run(world, [Second(), Nothing()], Successive(3, size=2).scenarios(world.data, 0), Cache(None), ROW)
    )
    assert [r.status for r in rows if r.method == "refuses"] == ["", "refused", "refused"]
    assert len([r for r in rows if r.method == "doing nothing"]) == 3


# -- jobs and sweeps ---------------------------------------------------------------------------------------------------


def test_job_keys_follow_what_changes_figures() -> None:
    key = job_key(composed(), "1")
    assert key == job_key(composed(), "1") == job_key(composed("cache_dir=/elsewhere", "progress=false"), "1")
    others = {job_key(composed(o), "1") for o in ("seed=1", "attack=fgsm", "evaluation.steps=5", "method=[nothing]")}
    assert len(others | {key, job_key(composed(), "2")}) == 6


def test_finished_jobs_and_failures_come_back(tmp_path: Path) -> None:
    jobs = FinishedJobs(tmp_path)
    assert jobs.rows("k") is None
    jobs.keep("k", [ROW])
    (row,) = jobs.rows("k") or []
    assert row.key == ROW.key
    add_failure(tmp_path, "seed=1", "boom,\n'quoted'")
    add_failure(tmp_path, "seed=2", "again")
    assert failures(tmp_path) == [{"job": "seed=1", "error": "boom, 'quoted'"}, {"job": "seed=2", "error": "again"}]


def test_the_progress_bar_counts_what_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_muter.study.hydra.progress import Progress

    with Progress(1) as quiet:
        quiet.begin("in a log")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(2) as progress:
        progress.begin("one")
        assert progress.bar.n == 0
        progress.begin("two")
        assert progress.bar.n == 1
        progress.extend(1)
        progress.begin("three")
    assert (progress.bar.n, progress.bar.total) == (3, 3)
    assert "three" in capsys.readouterr().err


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(experiment.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MUTER_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "lightning_muter.study.experiment", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


SMALL = ("experiment=quick", "dataset.module.limit_train=250", "dataset.module.limit_test=60", "progress=false")


def test_a_sweep_leaves_one_table_a_report_and_the_failed_job_named_and_resumes(tmp_path: Path) -> None:
    sweep = ("-m", *SMALL, "seed=1", "request.label=0,99", "request=whole_class", "hydra.sweep.dir=sweep")
    done = command(tmp_path, *sweep)
    assert done.returncode == 1, done.stderr[-2000:]
    rows = read_rows(tmp_path / "sweep" / "results.csv")
    assert {(r.seed, r.setting) for r in rows} == {(1, "class 0")}
    assert {r.method for r in rows} >= {"retraining", "constraint-aware", "doing nothing"}
    assert [line["job"].count("request.label=99") for line in failures(tmp_path / "sweep")] == [1]
    assert "(1 repetition)" in (tmp_path / "sweep" / "report.md").read_text()
    assert "failed" in done.stdout
    again = command(tmp_path, *sweep[:-1], "hydra.sweep.dir=again")
    assert again.stdout.count("rows are taken over") == 1
    repeated = read_rows(tmp_path / "again" / "results.csv")
    assert [(r.key, r.distance, r.seconds_request) for r in repeated] == [
        (r.key, r.distance, r.seconds_request) for r in rows
    ]


def test_a_wrong_value_is_one_line_of_advice(tmp_path: Path) -> None:
    done = command(tmp_path, *SMALL, "request=records", "request.ids_file=nobody.txt")
    assert done.returncode == 1
    assert "ids_file: got 'nobody.txt'" in done.stderr
    assert "Traceback" not in done.stderr


def test_methods_with_one_label_are_refused(tmp_path: Path) -> None:
    config = composed("method=[nothing,fine_tune]", "method.fine_tune.label='doing nothing'", f"cache_dir={tmp_path}")
    with pytest.raises(ArgumentError, match="different label"):
        experiment.run_job(config, tmp_path)
