"""One list of small problems, crossed by the tests with threat models, responses and solvers. float64 throughout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.model.dataset import SampleSource

D, N = 4, 16


@dataclass
class Case:
    """A model, a loss, and some samples; ``loss_of`` is the loss of one sample's logits, written out by hand."""

    name: str
    net: nn.Sequential
    loss: Any
    loss_of: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    decay: float = 1e-2

    @property
    def head(self) -> nn.Linear:
        head = self.net[-1]
        assert isinstance(head, nn.Linear)
        return head

    @property
    def backbone(self) -> nn.Module:
        return self.net[:-1]

    @property
    def dataset(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    def problem(self) -> HeadProblem:
        return HeadProblem(self.net, self.loss, self.x[:8])

    def objective(self, threat: ThreatModel, *, smoothing: Smoothing | None = None, **source: Any) -> RobustObjective:
        problem = self.problem()
        return RobustObjective(
            problem,
            threat,
            SampleSource(self.dataset, weight=self.weight, threat=threat, **source),
            torch.full(problem.shape, self.decay, dtype=torch.float64),
            InnerSolver(),
            smoothing or Smoothing(temperature=0.0),
        )


def _one_hot(z: Tensor, y: Tensor) -> Tensor:
    return (torch.arange(len(z)) == y).to(z.dtype)


def _softmax(z: Tensor, y: Tensor) -> Tensor:
    return torch.logsumexp(z, 0) - z @ _one_hot(z, y)


def _smoothed(z: Tensor, y: Tensor, s: float = 0.2) -> Tensor:
    target = (1 - s) * _one_hot(z, y) + s / len(z)
    return (target * (torch.logsumexp(z, 0) - z)).sum()


def _binary(z: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-(2 * y - 1) * z[0])


def _square(z: Tensor, y: Tensor) -> Tensor:
    return (z[0] - y) ** 2


def _net(kind: str, k: int, bias: bool, generator: torch.Generator) -> nn.Sequential:
    def linear(a: int, b: int, bias: bool, scale: float) -> nn.Linear:
        layer = nn.Linear(a, b, bias=bias, dtype=torch.float64)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        return layer

    body: list[nn.Module]
    if kind == "linear":
        body, f = [nn.Flatten()], D
    elif kind == "affine":
        body, f = [linear(D, 3, True, 0.7)], 3
    else:
        body, f = [linear(D, 5, True, 0.9), nn.Tanh() if kind == "smooth" else nn.ReLU()], 5
    net = nn.Sequential(*body, linear(f, k, bias, 0.6))
    for p in net[:-1].parameters():
        p.requires_grad_(False)
    return net


def make(
    kind: str, loss: str = "softmax", *, bias: bool = True, weighted: bool = False, n: int = N, seed: int = 0
) -> Case:
    """Backbone ``kind`` (linear, affine, smooth, relu) with a loss (softmax, smoothing, binary, square)."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, kind + loss)) + 7 * bias)
    x = torch.rand(n, D, generator=generator, dtype=torch.float64)
    corner = torch.rand(n, D, generator=generator, dtype=torch.float64)
    x = torch.where(corner < 0.15, 0.0, torch.where(corner > 0.85, 1.0, x))  # pixels like to sit on faces
    k = 3 if loss in ("softmax", "smoothing") else 1
    y: Tensor = torch.randint(0, k if k > 1 else 2, (n,), generator=generator)
    if loss == "binary":
        y = y.double()
    elif loss == "square":
        y = torch.randn(n, generator=generator, dtype=torch.float64)
    functions: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
        "softmax": (F.cross_entropy, _softmax),
        "smoothing": (functools.partial(F.cross_entropy, label_smoothing=0.2), _smoothed),
        "binary": (F.binary_cross_entropy_with_logits, _binary),
        "square": (F.mse_loss, _square),
    }
    name = "-".join([kind, loss] + ["bias"] * bias + ["weighted"] * weighted)
    weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 if weighted else None
    return Case(name, _net(kind, k, bias, generator), *functions[loss], x, y, weight)


#: (backbone, loss, bias, sample weights)
SPECS: list[tuple[str, str, bool, bool]] = [
    ("linear", "softmax", True, False),
    ("linear", "smoothing", False, False),
    ("linear", "binary", True, False),
    ("linear", "square", False, False),
    ("affine", "softmax", False, True),
    ("affine", "square", True, False),
    ("smooth", "softmax", True, False),
    ("smooth", "binary", False, True),
    ("relu", "softmax", False, False),
    ("relu", "binary", True, False),
]
NAMES = ["-".join([k, loss] + ["bias"] * b + ["weighted"] * w) for k, loss, b, w in SPECS]


@functools.cache
def _spec(name: str) -> tuple[str, str, bool, bool]:
    return SPECS[NAMES.index(name)]


def case(name: str, **kwargs: Any) -> Case:
    """A fresh copy of a listed case."""
    kind, loss, bias, weighted = _spec(name)
    return make(kind, loss, bias=bias, weighted=weighted, **kwargs)


THREATS = {
    "l2": ThreatModel("l2", 0.25, None),
    "l2-box": ThreatModel("l2", 0.3),
    "l2-wide": ThreatModel("l2", 0.9),
    "linf": ThreatModel("linf", 0.1, None),
    "linf-box": ThreatModel("linf", 0.15),
}


def several_maxima() -> tuple[nn.Module, TensorDataset, dict[str, Any]]:
    """A smooth network in a wide ball: some samples have several maxima."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    network[0].requires_grad_(False)
    with torch.no_grad():
        network[0].weight.mul_(3)
    x = torch.randn(40, 3).double()
    y = (x @ torch.randn(3, 4).double()).argmax(1)
    return (
        network,
        TensorDataset(x, y),
        {"threat_model": ThreatModel("l2", 0.6, None), "weight_decay": 0.001, "smoothing": Smoothing(temperature=0.05)},
    )


def equal_maxima() -> tuple[nn.Module, TensorDataset, dict[str, Any]]:
    """A linear model at whose minimiser some samples have two equal maxima."""
    one = make("linear", "softmax", n=40, seed=1)
    dataset = TensorDataset(one.x, one.net(one.x).argmax(1))
    return one.net, dataset, {"threat_model": ThreatModel("l2", 0.5, None), "weight_decay": 0.001}
