"""Small whole networks, their data and their objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.curvature.objective.network import WideObjective
from lightning_muter.curvature.problem.network import WideProblem
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.model.dataset import SampleSource

EXACT = InnerSolver(tolerance=1e-12, max_iter=1000)


def smooth_net(inputs: int = 4, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, classes)).double()


def relu_net(inputs: int = 6, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 7), nn.ReLU(), nn.Linear(7, classes)).double()


def data(n: int = 12, inputs: int = 4, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(n, inputs, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return TensorDataset(x, torch.randint(0, classes, (n,), generator=generator))


def objective(
    net: nn.Module,
    dataset: TensorDataset,
    threat: ThreatModel,
    scope: str | list[str] = "all",
    response: str | Response = "auto",
    weight: Tensor | None = None,
    **options: Any,
) -> WideObjective:
    source = SampleSource(dataset, threat=threat, weight=weight, batch_size=options.pop("batch_size", 5))
    beta = options.pop("beta", None)
    problem = WideProblem(net, F.cross_entropy, scope, source.examples(), beta)
    decay = torch.full((problem.size,), 0.01, dtype=torch.float64)
    options.setdefault("inner", EXACT)
    chosen = as_response(response, threat)
    n = len(dataset)
    made = WideObjective(problem, threat, source, decay, chosen, range(n), n, **options)
    if threat.norm == "linf":
        made.anchor = problem.read()
    return made


def direction(size: int, seed: int = 3) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
