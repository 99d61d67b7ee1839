"""Ratios, each measured in one run; nothing here is asserted about time (run by ``python -m tests.benchmarks``)."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.network import Batch, WideObjective, batch_product, problem_parts
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.problem.network import WideProblem
from lightning_muter.curvature.response.choose import L2Response, NoResponse, Unconstrained, as_response
from lightning_muter.minimise.descent import descend
from lightning_muter.minimise.polish import polish
from lightning_muter.model.dataset import SampleSource
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.solvers.dense import definite_inverse
from lightning_muter.unlearning.unlearn import unlearn
from tests.benchmarks import workloads
from tests.benchmarks.workloads import Workload

pytestmark = pytest.mark.benchmark
#: Images of the large network (fewer by MUTER_BENCHMARK_IMAGES where there is little time).
IMAGES = int(os.environ.get("MUTER_BENCHMARK_IMAGES", "128"))
WORKLOADS: dict[str, Callable[[], Workload]] = {
    "cnn": workloads.cnn,
    "preactresnet18": lambda: workloads.resnet(IMAGES),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_snapshot_per_epoch(benchmark: Any, name: str) -> None:
    """What a snapshot takes beside the inner maximisation, / one PGD-10 training epoch, in all and part by part; and the
    maximisation itself, in PGD-20 attacks on the same samples: tracked (a fit's polish, or the attack, has been there), as short
    as the attack and by default; and from scratch, where every class is tried as a start (the CNN alone).
    """
    work = WORKLOADS[name]()
    rounds = 3 if name == "cnn" else 1
    epoch, attack = (workloads.seconds(run, rounds) for run in (work.epoch, lambda: work.attacked(20)))
    short = InnerSolver(tolerance=1e-3, max_iter=4, tracking=10, finish=1)
    objective = work.objective(short)
    theta = objective.problem.read_theta()
    response = as_response("auto", work.threat).resolved(objective.problem.backbone, len(work.dataset))
    figures: dict[str, float] = {}

    def maximise(what: str, solver: InnerSolver) -> None:
        objective.inner, gradients = solver, 0
        plain = objective.problem.loss_and_input_gradient

        def counted(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal gradients
            gradients += len(x)
            return plain(theta, x, y)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objective.problem, "loss_and_input_gradient", counted)
            began = time.process_time()
            sums, objective.delta = objective.sums(theta)
            figures[f"maximisation {what} / PGD-20"] = (time.process_time() - began) / attack
        figures[f"gradients {what}"] = gradients / sums.counts["samples"]
        figures[f"converged {what}"] = sums.counts["maximisers converged"] / sums.counts["samples"]

    if name == "cnn":
        maximise("from scratch", short)
    else:
        objective.delta = (work.attacked(20) - work.dataset.tensors[0]).flatten(1)
    maximise("tracked", short)
    if name == "cnn":
        maximise("tracked, default", InnerSolver(tolerance=1e-3))
    for what, part in {"features, gradient": None, "direct": NoResponse()}.items():
        figures[f"{what} / epoch"] = (
            workloads.seconds(lambda part=part: objective.sums(theta, response=part, settle=False), rounds) / epoch
        )
    figures["directions"] = float(getattr(response, "sketch", 0) or 0)
    if name == "cnn":
        exact = workloads.seconds(lambda: objective.sums(theta, response=L2Response(sketch=0), settle=False), 1)
        figures["exact J / epoch"] = exact / epoch
    benchmark.pedantic(lambda: objective.sums(theta, response=response, settle=False), rounds=rounds)
    rest = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "ratio": rest / epoch,
        "aim": "<= 1",
        "epoch": epoch,
    } | figures


def test_a_step_of_sketched_sums(benchmark: Any) -> None:
    """How far the step of sketched sums ends from the step of exact ones, / its length: 1, 5 and 20 % removed at random."""
    work = workloads.cnn()
    options = {"threat_model": work.threat, "weight_decay": 1e-3, "progress": False}
    exact = take_snapshot(work.model, work.dataset, response=L2Response(sketch=0), **options)
    sketched = take_snapshot(work.model, work.dataset, polish=0, like=exact, **options)

    def step(snapshot: Snapshot, forget: list[int]) -> Tensor:
        model, kept = copy.deepcopy(work.model), copy.deepcopy(snapshot)
        unlearn(model, kept, forget, work.dataset, progress=False)
        return HeadProblem(model, F.cross_entropy, work.dataset.tensors[0][:4]).read_theta() - snapshot.theta_ref

    n = len(work.dataset)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    apart: dict[str, float] = {}

    def run() -> None:
        for percent in (1, 5, 20):
            forget = order[: n * percent // 100]
            wanted = step(exact, forget)
            apart[f"{percent} %"] = float((step(sketched, forget) - wanted).norm() / wanted.norm())

    benchmark.pedantic(run, rounds=1)
    directions = getattr(sketched.response, "sketch", 0)
    benchmark.extra_info |= {"ratio": max(apart.values()), "aim": "-", "directions": directions} | apart


@pytest.mark.parametrize("name", WORKLOADS)
def test_b_request_per_retraining(benchmark: Any, name: str) -> None:
    """A request for 1 % / retraining to the stationarity it reaches: cold, and warm (from the weights at hand and their
    maximisers, in the metric of the stored curvature: as fast as retraining can be made).
    """
    work = WORKLOADS[name]()
    data, n = work.dataset, len(work.dataset)
    # a pass over the large network is dear, so all sides take short ones there
    inner = InnerSolver(tolerance=1e-3, max_iter=20) if name == "cnn" else workloads.ShortAscent(tolerance=1e-3)
    options = {"threat_model": work.threat, "weight_decay": 1e-2, "inner": inner, "progress": False}
    snapshot = take_snapshot(work.model, data, polish=30 if name == "cnn" else 2, **options)
    forget = list(range(0, n, 100))
    kept = [i for i in range(n) if i not in set(forget)]
    reached = unlearn(work.model, snapshot, forget, data, retain=data, dry_run=True, progress=False)
    aim = reached.stationarity_after
    assert aim is not None

    def objective() -> ShardedObjective:
        made = work.objective(inner)
        return ShardedObjective(made.problem, work.threat, made.source, snapshot.decay, inner, positions=kept)

    def warm() -> float:
        retained = objective()
        if snapshot.starts is not None:
            retained.restore(snapshot.starts[kept])
        began = time.process_time()
        matrix = snapshot.hessian.dense()
        matrix.diagonal().add_(len(kept) * snapshot.decay.flatten())
        metric, _ = definite_inverse(matrix)
        descend(retained, snapshot.theta_ref, metric, max_steps=20, tolerance=aim)
        return time.process_time() - began

    def cold() -> float:
        retained = objective()
        took: list[float] = []
        began = time.process_time()

        def on_step(step: int, now: Evaluation) -> None:
            if now.stationarity <= aim and not took:  # polish would look again whether it stays there
                took.append(time.process_time() - began)
                cold_reached.append(now.stationarity)

        start = torch.zeros_like(snapshot.theta_ref)
        polish(retained, start, snapshot.response, tolerance=aim, max_passes=60, on_step=on_step)
        return took[0]

    cold_reached: list[float] = []
    seconds = {"warm": warm(), "cold": cold()}
    benchmark.pedantic(
        lambda: unlearn(work.model, snapshot, forget, data, dry_run=True, progress=False), rounds=3, warmup_rounds=1
    )
    request = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "ratio": seconds["warm"] / request,
        "aim": ">= 10",
        "cold / request (aim 100)": seconds["cold"] / request,
        "stationarity": aim,
        "before": reached.stationarity_before,
        "snapshot": snapshot.stationarity,
        "cold reached": cold_reached[0],
    }


def test_c_unconstrained_per_published(benchmark: Any) -> None:
    """The published sum by per-sample second derivatives and T = 100 dense products / ours; 640 features, 10 classes."""
    data, model = workloads.features(256, 640, 10)
    x, y = data.tensors
    published = 0.0
    done = 0
    weight, bias = (p.detach() for p in model.parameters())
    while published < 20.0 and done < 4:
        began = time.process_time()
        workloads.published_sums(x[done : done + 1], y[done : done + 1], weight, bias, 100)
        published += time.process_time() - began
        done += 1
    work = Workload("features", model, data, ThreatModel("l2", 0.0, None))
    objective = work.objective(InnerSolver(max_iter=1))
    theta = objective.problem.read_theta()
    benchmark.pedantic(lambda: objective.sums(theta, response=Unconstrained(100)), rounds=3)
    ours = benchmark.stats.stats.median / len(x)
    benchmark.extra_info |= {
        "ratio": published / done / ours,
        "aim": ">= 1000",
        "published per sample": published / done,
    }


@pytest.mark.parametrize("response", [NoResponse(), Unconstrained(3)], ids=["direct", "unconstrained"])
def test_d_dense_sums_per_gemm(benchmark: Any, response: Any) -> None:
    """Arithmetic of the direct part's products per second of the dense sums, / the machine's own rate for products of these
    sizes. (The unconstrained part works in K dimensions and has next to none of its own.)
    """
    n, f, k = 1000, 640, 10
    data, model = workloads.features(n, f, k)
    phi = torch.rand(n, f + 1, dtype=torch.float64)
    gemm = 2 * n * (f + 1) ** 2 / workloads.seconds(lambda: phi.T @ phi, 20)
    objective = Workload("features", model, data, ThreatModel("l2", 0.0, None)).objective(InnerSolver(max_iter=1))
    theta = objective.problem.read_theta()
    benchmark.pedantic(lambda: objective.sums(theta, response=response), rounds=3, warmup_rounds=1)
    useful = k * (k + 1) / 2 * 2 * n * (f + 1) ** 2
    benchmark.extra_info |= {
        "ratio": useful / benchmark.stats.stats.median / gemm,
        "aim": ">= 0.5",
        "gemm GFlop/s": gemm / 1e9,
    }


@pytest.mark.parametrize("name", WORKLOADS)
def test_e_product_per_gauss_newton(benchmark: Any, name: str) -> None:
    """A total-Hessian product with all parameters / curvlinops' Gauss-Newton product on the same batch."""
    curvlinops = pytest.importorskip("curvlinops")
    work = WORKLOADS[name]()
    x, y = (t[:32] for t in work.dataset.tensors)
    problem = WideProblem(work.model, F.cross_entropy, "all", x)
    flat, w = x.flatten(1), problem.read()
    parts, v = problem_parts(problem, w), torch.randn_like(w)
    noise = torch.randn_like(flat)
    batch = Batch(flat, y, 0.1 * noise / noise.norm(dim=1, keepdim=True), None, None)
    objective = WideObjective(
        problem, work.threat, SampleSource(work.dataset), w * 0, as_response("auto", work.threat), [], 0
    )
    motion = objective._motion(0, parts, batch)
    direction = problem_parts(problem, v)
    moved = (flat + batch.delta).reshape(x.shape)
    operator = curvlinops.GGNLinearOperator(
        work.model,
        torch.nn.CrossEntropyLoss(reduction="sum"),
        list(work.model.parameters()),
        [(moved, y)],
        check_deterministic=False,
    )
    flat_v = v.to(problem.model_dtype)
    theirs = workloads.seconds(lambda: operator @ flat_v, 5)
    benchmark.pedantic(
        lambda: batch_product(problem, parts, batch, motion, direction, "ggn"), rounds=5, warmup_rounds=1
    )
    benchmark.extra_info |= {"ratio": benchmark.stats.stats.median / theirs, "aim": "<= 4", "curvlinops": theirs}


_MEMORY = """
from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.curvature.response.choose import Unconstrained
from lightning_muter.adversarial.threat_model import ThreatModel
from tests.benchmarks.workloads import Workload, features, peak_bytes
def sums(n, f):
    data, model = features(n, f, 10)
    objective = Workload("features", model, data, ThreatModel("l2", 0.0, None)).objective(InnerSolver(max_iter=1))
    return objective.sums(objective.problem.read_theta(), response=Unconstrained(3))[0].hessian.blocks
sums(10, 10)  # what libraries take once
before = peak_bytes()
matrix = sums(600, 1280).numel() * 8
print((peak_bytes() - before) / matrix, matrix / 2**20)
"""


def test_f_memory_per_matrix(benchmark: Any) -> None:
    """Peak memory of the dense sums over the stored, packed matrix; 1280 features, 10 classes; in a process of its own."""
    found: list[str] = []

    def run() -> None:
        found.append(subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True).stdout)

    benchmark.pedantic(run, rounds=1)
    ratio, matrix = (float(v) for v in found[0].split())
    benchmark.extra_info |= {"ratio": ratio, "aim": "<= 1.5", "matrix MiB": matrix}


@pytest.mark.parametrize("what", ["n", "f", "K"])
def test_g_growth(benchmark: Any, what: str) -> None:
    """Seconds at twice the size / at the size (2 is linear); the direct and unconstrained sums."""
    sizes = {"n": 1000, "f": 200, "K": 8}

    def run(factor: int) -> Callable[[], Any]:
        used = sizes | {what: sizes[what] * factor}
        data, model = workloads.features(used["n"], used["f"], used["K"])
        objective = Workload("features", model, data, ThreatModel("l2", 0.0, None)).objective(InnerSolver(max_iter=1))
        theta = objective.problem.read_theta()
        return lambda: objective.sums(theta, response=Unconstrained(3))

    once = workloads.seconds(run(1), 5)
    benchmark.pedantic(run(2), rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {
        "ratio": benchmark.stats.stats.median / once,
        "aim": {"n": "2", "f": "4", "K": "4"}[what],
    }


def test_g_growth_with_the_forget_set(benchmark: Any) -> None:
    """A request for 2k samples / for k."""
    data, model = workloads.features(2000, 200, 10)
    snapshot = take_snapshot(
        model, data, threat_model=ThreatModel("l2", 0.01, None), weight_decay=0.01, polish=0, progress=False
    )
    few = workloads.seconds(lambda: unlearn(model, snapshot, range(200), data, dry_run=True, progress=False))
    benchmark.pedantic(lambda: unlearn(model, snapshot, range(400), data, dry_run=True, progress=False), rounds=3)
    benchmark.extra_info |= {"ratio": benchmark.stats.stats.median / few, "aim": "<= 2"}
