"""What is measured: digits through a CNN, random images through a PreActResNet-18, and random features of any size."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.ascent import Maximisers
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.model.dataset import SampleSource
from lightning_muter.study.models import PreActResNet18, SmallCNN


@dataclass
class ShortAscent(InnerSolver):
    """One start, few gradients: on a large network a pass of the default solver takes minutes."""

    max_iter: int = 4
    starts: int = 0
    rivals: int = 0
    tracking: int = 4
    finish: int = 1

    def _far(self, one: Any, delta: Tensor, kinked: bool, alone: bool) -> tuple[Tensor, Tensor]:
        return one.shrinking(delta, 8, 1.0, 0.6)

    def _finish(self, one: Any, delta: Tensor, kinked: bool, far_away: bool) -> Maximisers:
        return one.ascend(delta, self.max_iter, one.tol, self.finish)


@dataclass
class Workload:
    name: str
    model: nn.Module
    dataset: TensorDataset
    threat: ThreatModel
    batch: int = 128

    def epoch(self) -> float:
        """Processor seconds of one adversarial training epoch by PGD-10, on a copy of nothing: it trains the model on."""
        x, y = self.dataset.tensors
        attack = torchattacks.PGDL2(self.model, eps=self.threat.eps, alpha=self.threat.eps / 4, steps=10)
        optimiser = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        began = time.process_time()
        for xb, yb in zip(x.split(self.batch), y.split(self.batch), strict=True):
            moved = attack(xb, yb)
            self.model.train()
            optimiser.zero_grad()
            F.cross_entropy(self.model(moved), yb).backward()
            optimiser.step()
        seconds = time.process_time() - began
        self.model.eval()
        self.model.zero_grad()
        return seconds

    def attacked(self, steps: int) -> Tensor:
        """The samples attacked by PGD."""
        x, y = self.dataset.tensors
        attack = torchattacks.PGDL2(self.model, eps=self.threat.eps, alpha=self.threat.eps / 4, steps=steps)
        return torch.cat([attack(a, b) for a, b in zip(x.split(self.batch), y.split(self.batch), strict=True)])

    def objective(self, inner: InnerSolver) -> ShardedObjective:
        source = SampleSource(self.dataset, threat=self.threat, batch_size=512)
        problem = HeadProblem(self.model, F.cross_entropy, source.examples())
        decay = torch.full(problem.shape, 1e-3, dtype=problem.dtype)
        return ShardedObjective(problem, self.threat, source, decay, inner, Smoothing())


def cnn(epochs: int = 3, count: int = 1797) -> Workload:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images[:count] / 16, dtype=torch.float32)[:, None]
    made = Workload(
        "cnn", SmallCNN((1, 8, 8), 10), TensorDataset(x, torch.tensor(digits.target[:count])), ThreatModel("l2", 0.25)
    )
    for _ in range(epochs):
        made.epoch()
    return made


def resnet(count: int = 128, epochs: int = 0) -> Workload:
    torch.manual_seed(0)
    x, y = torch.rand(count, 3, 32, 32), torch.randint(0, 10, (count,))
    made = Workload("preactresnet18", PreActResNet18((3, 32, 32), 10), TensorDataset(x, y), ThreatModel("l2", 0.5), 16)
    for _ in range(epochs):
        made.epoch()
    made.model.eval()
    return made


def features(n: int, f: int, k: int) -> tuple[TensorDataset, nn.Module]:
    """Random features and a linear head, float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, f, generator=generator, dtype=torch.float64) / f**0.5
    y = torch.randint(0, k, (n,), generator=generator)
    torch.manual_seed(0)
    return TensorDataset(x, y), nn.Sequential(nn.Linear(f, k)).double()


def seconds(function: Callable[[], Any], rounds: int = 3) -> float:
    """Median processor time of a few calls (for what a benchmarked time is divided by)."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return statistics.median(times)


def peak_bytes() -> int:
    """The process's largest resident size so far. (``ru_maxrss`` begins with that of the parent process.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def published_sums(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, terms: int) -> Tensor:
    """The unconstrained sum as published: per-sample second derivatives by autodiff, the series by dense products,
    a dense sum; vectorised over the samples of a batch.
    """
    from torch.func import hessian, vmap

    f, k = x.shape[1], len(bias)

    def loss(joined: Tensor, yi: Tensor) -> Tensor:
        w, b, xi = joined[: f * k].reshape(k, f), joined[f * k : f * k + k], joined[f * k + k :]
        return F.cross_entropy((w @ xi + b)[None], yi[None])

    p = f * k + k
    total = x.new_zeros(p, p)
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        joined = torch.cat([weight.flatten(), bias, xi[0]])
        full = vmap(hessian(loss))(joined[None], yi)[0]
        inner = torch.eye(f, dtype=x.dtype) - full[p:, p:]
        series = torch.eye(f, dtype=x.dtype)
        power = series
        for _ in range(1, terms):
            power = power @ inner
            series = series + power
        total += full[:p, :p] - full[:p, p:] @ series @ full[p:, :p]
    return total
