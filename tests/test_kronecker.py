"""Kronecker factors: what they estimate, that their inverse is one, and what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.objective import kfac as kronecker
from lightning_muter.curvature.objective.kfac import Kronecker
from lightning_muter.curvature.objective.network import WideObjective
from lightning_muter.solvers.cg import TruncatedCG
from tests.networks import direction, objective


def images(n: int, seed: int = 0, side: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, side, side, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same"), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2, dilation=1, bias=False), nn.GroupNorm(1, 3),
        nn.Flatten(), nn.Linear(12, 3),
    ).double()  # fmt: skip


def at_start(net: nn.Module, dataset: TensorDataset, eps: float = 0.0, **options: object) -> WideObjective:
    made = objective(net, dataset, ThreatModel("l2", eps, None), response="none", **options)
    made.accept(made.evaluate(made.problem.read()))
    return made


def dense(apply: object, size: int) -> torch.Tensor:
    return torch.stack([apply(e) for e in torch.eye(size, dtype=torch.float64)])  # type: ignore[operator]


def test_a_layer_that_sees_one_input_is_estimated_without_bias() -> None:
    """All samples at one point: the factors are independent, and the blocks exact but for the random signs."""
    n = 6000
    x = torch.tensor([0.3, -0.7, 0.5], dtype=torch.float64).expand(n, 3).clone()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4)).double()
    made = at_start(net, TensorDataset(x, torch.arange(n) % 4), batch_size=500)
    w = made.problem.read()
    inverse = dense(Kronecker(made, w).inverse(0.0), len(w))
    exact = dense(lambda v: made.product(w, v), len(w))
    assert (torch.linalg.inv(inverse) - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("side", [1100, 5])
def test_the_inverse_is_that_of_a_definite_matrix(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(kronecker, "_MAX_SIDE", side)  # beyond it diagonals
    made = at_start(convolutions(), images(9))
    w = made.problem.read()
    found = Kronecker(made, w)
    assert found.rest == ["3.weight", "3.bias"]
    matrix = dense(found.inverse(0.5), len(w))
    assert (matrix - matrix.T).norm() < 1e-12 * matrix.norm()
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] > 0
    assert values[-1] <= 1 / (0.5 + 0.01 * 9) + 1e-9
    # the damping is added to the same matrix, whatever it is
    shifted = torch.linalg.inv(dense(found.inverse(1.5), len(w))) - torch.linalg.inv(matrix)
    assert (shifted - torch.eye(len(w), dtype=w.dtype)).abs().max() < 1e-8


def test_it_saves_products_where_inputs_differ_in_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 8, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 8, dtype=torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    made = at_start(net, TensorDataset(x, torch.randint(0, 3, (80,), generator=generator)))
    w, shift = made.problem.read(), 0.003 * 80
    rhs = -made.evaluate(w).gradient
    falls = {}
    for name, inverse in (("plain", None), ("factors", Kronecker(made, w).inverse(shift))):
        _, falls[name] = TruncatedCG(4, 1e-9, 0.0).solve(lambda v: made.product(w, v, shift), rhs, inverse)
    _, best = TruncatedCG(400, 1e-9, 0.0).solve(lambda v: made.product(w, v, shift), rhs)
    assert best - falls["factors"] < 0.5 * (best - falls["plain"])


def test_batches_weights_and_many_classes() -> None:
    dataset = images(12)
    weight = torch.linspace(0.5, 2.0, 12, dtype=torch.float64)
    repeated = TensorDataset(*(t.repeat_interleave(2, 0) for t in dataset.tensors))
    light, heavy = (
        at_start(convolutions(), repeated, weight=torch.ones(24)),
        at_start(convolutions(), dataset, weight=weight),
    )
    for made in (light, heavy):
        found = Kronecker(made, made.problem.read())
        assert all(bool(torch.isfinite(values).all()) for pair in found.factors.values() for values, _ in pair)
    torch.manual_seed(0)
    many = nn.Sequential(nn.Flatten(), nn.Linear(36, 80)).double()
    made = at_start(many, dataset)
    v = direction(made.problem.size)
    assert v @ Kronecker(made, made.problem.read()).inverse(0.1)(v) > 0


def test_it_agrees_with_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    dataset = images(1500)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    made = at_start(net, dataset, batch_size=300)
    theirs = curvlinops.KFACLinearOperator(
        net, nn.CrossEntropyLoss(reduction="sum"), list(net.parameters()), [dataset.tensors],
        fisher_type="type-2", separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    w = made.problem.read()
    size = len(w)
    ours = torch.linalg.inv(dense(Kronecker(made, w).inverse(1e-3), size))
    ours -= (1e-3 + 0.01 * len(dataset)) * torch.eye(size, dtype=w.dtype)
    expected = theirs @ torch.eye(size, dtype=w.dtype)
    assert (ours - expected).norm() < 0.1 * expected.norm()
