"""Matrix-free total-Hessian products: against dense sums, and finite differences with the inner problem re-solved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import Smoothing
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.objective.network import WideObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.problem.network import parameters_in
from lightning_muter.curvature.response.choose import Unconstrained, as_response
from lightning_muter.errors import ArgumentError
from lightning_muter.model.dataset import SampleSource
from tests.networks import EXACT, data, direction, objective, relu_net, smooth_net


def slope_of_gradient(made: WideObjective, w: Tensor, v: Tensor, h: float = 1e-4) -> Tensor:
    """(grad F(w + h v) - grad F(w - h v)) / 2h, fourth order, the inner problem re-solved at every point."""
    at = {t: made.evaluate(w + t * h * v).gradient for t in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)


@pytest.mark.parametrize(
    "threat",
    [
        ThreatModel("l2", 0.1, None),
        ThreatModel("l2", 0.15, (0.0, 1.0)),
        ThreatModel("linf", 0.05, None),
        ThreatModel("l2", 0.0, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", ["all", ["0.*"]], ids=str)
def test_exact_products_are_the_derivative_of_the_robust_gradient(threat: ThreatModel, scope: str | list[str]) -> None:
    made = objective(smooth_net(), data(), threat, scope, curvature="hessian")
    w = made.problem.read()
    made.accept(made.evaluate(w))
    v = direction(len(w))
    expected = slope_of_gradient(made, w, v)
    found = made.product(w, v)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_response_is_needed_for_that() -> None:
    made = objective(smooth_net(), data(), ThreatModel("l2", 0.1, None), curvature="hessian", response="none")
    w = made.problem.read()
    made.accept(made.evaluate(w))
    v = direction(len(w))
    expected = slope_of_gradient(made, w, v)
    assert (made.product(w, v) - expected).norm() > 1e-3 * expected.norm()


def test_trades_products_are_the_derivative_of_its_gradient() -> None:
    made = objective(smooth_net(), data(), ThreatModel("l2", 0.3, None), curvature="hessian", beta=2.0)
    w = made.problem.read()
    made.accept(made.evaluate(w))
    v = direction(len(w))
    expected = slope_of_gradient(made, w, v)
    assert (made.product(w, v) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("threat", [ThreatModel("l2", 0.03), ThreatModel("linf", 0.02)], ids=str)
@pytest.mark.parametrize("make", [relu_net, smooth_net])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_head_scope_agrees_with_the_dense_sums(make: Any, threat: ThreatModel, curvature: Any) -> None:
    net, dataset = make(6), data(inputs=6)
    weight = torch.linspace(0.5, 1.5, len(dataset), dtype=torch.float64)
    source = SampleSource(dataset, threat=threat, weight=weight, batch_size=4)
    problem = HeadProblem(net, F.cross_entropy, source.examples())
    theta = problem.read_theta()
    smoothing = Smoothing(anchor=theta if threat.norm == "linf" else None)
    decay = torch.full(problem.shape, 0.01, dtype=torch.float64)
    dense = RobustObjective(problem, threat, source, decay, EXACT, smoothing)
    sums, delta = dense.sums(theta, response=as_response("auto", threat))
    matrix = sums.hessian.dense() + 0.01 * len(dataset) * torch.eye(theta.numel(), dtype=torch.float64)  # type: ignore[union-attr]
    made = objective(net, dataset, threat, ["2.*"], weight=weight, curvature=curvature)
    w = made.problem.read()
    first = made.evaluate(w)
    assert first.value == pytest.approx(dense.evaluation(theta, sums, delta).value, rel=1e-10)
    made.accept(first)
    v = direction(len(w))
    turned = torch.cat([v[: 3 * (theta.shape[1] - 1)].reshape(3, -1), v[-3:, None]], 1)  # weight, then bias -> [W | b]
    expected = (matrix @ turned.flatten()).reshape(theta.shape)
    expected = torch.cat([expected[:, :-1].flatten(), expected[:, -1]])
    assert (made.product(w, v) - expected).norm() < 1e-8 * expected.norm()


def test_batches_and_order_change_nothing() -> None:
    threat, dataset = ThreatModel("l2", 0.03), data(inputs=6)
    products = []
    for size in (1, 5, 100):
        made = objective(relu_net(), dataset, threat, batch_size=size)
        w = made.problem.read()
        made.accept(made.evaluate(w))
        products.append(made.product(w, direction(len(w))))
    assert (products[1] - products[0]).norm() < 1e-10 * products[0].norm()
    assert (products[2] - products[0]).norm() < 1e-10 * products[0].norm()


def test_gauss_newton_with_a_response_is_positive_semidefinite_and_symmetric() -> None:
    made = objective(smooth_net(), data(), ThreatModel("l2", 0.2), "all")
    w = made.problem.read()
    made.accept(made.evaluate(w))
    matrix = torch.stack([made.product(w, e) for e in torch.eye(len(w), dtype=w.dtype)])
    assert (matrix - matrix.T).norm() < 1e-10 * matrix.norm()
    assert torch.linalg.eigvalsh(matrix)[0] > 0


def test_many_classes_use_a_low_rank_root() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(6, 200)).double()
    dataset = data(8, 6, 200)
    made = objective(net, dataset, ThreatModel("l2", 0.1, None))
    w = made.problem.read()
    made.accept(made.evaluate(w))
    v = direction(len(w))
    expected = slope_of_gradient(made, w, v)
    assert (made.product(w, v) - expected).norm() < 1e-5 * expected.norm()


def test_published_series_acts_on_inputs() -> None:
    threat = ThreatModel("l2", 0.1, None)
    made = objective(relu_net(), data(inputs=6), threat, response=Unconstrained(3))
    w = made.problem.read()
    made.accept(made.evaluate(w))
    with pytest.raises(ArgumentError, match="space='inputs'"):
        made.product(w, w)
    made.response = Unconstrained(3, space="inputs")
    direct = objective(relu_net(), data(inputs=6), threat, response="none")
    direct.accept(direct.evaluate(w))
    v = direction(len(w))
    assert v @ made.product(w, v) < v @ direct.product(w, v)


def test_scopes_are_patterns_over_trainable_parameters() -> None:
    net = relu_net()
    assert parameters_in(net, "all") == ["0.weight", "0.bias", "2.weight", "2.bias"]
    net[0].bias.requires_grad_(False)
    assert parameters_in(net, ["0.*", "2.bias"]) == ["0.weight", "2.bias"]
    with pytest.raises(ArgumentError, match="scope: got"):
        parameters_in(net, ["0.bias"])
    with pytest.raises(ArgumentError, match=r"0\.weight"):
        parameters_in(net, "encoder.*")
