"""The published closed forms against dense autograd, and against each other where they must agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError
from lightning_muter.model.losses import per_sample
from lightning_muter.study.attacks import PGD
from lightning_muter.study.data import ArrayDataset
from lightning_muter.study.methods.newton_influence_fisher import ClosedForm
from lightning_muter.study.models import Classifier, LogisticRegression, SoftmaxRegression
from lightning_muter.study.setup.problem import World, head_vector

FORGET = [0, 7, 19]
DECAY = 0.05


def make_world(threat: ThreatModel | None = None, *, one_logit: bool = False) -> World:
    generator = torch.Generator().manual_seed(0)
    classes = 2 if one_logit else 3
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    data = ArrayDataset(x, torch.arange(40) % classes, num_classes=classes)
    torch.manual_seed(0)
    model: Classifier = LogisticRegression((4,)) if one_logit else SoftmaxRegression((4,), 3)
    return World(model.double(), data, data, threat, DECAY, PGD(1), 0)


def objective(world: World, points: Tensor, positions: list[int]) -> Any:
    """sum of the losses at fixed inputs as a function of the head [W | b], flattened row by row."""
    shape = (world.model.head.out_features, points.shape[1] + 1)
    y = world.data.targets[positions]

    def value(theta: Tensor) -> Tensor:
        w = theta.reshape(shape)
        z = points[positions] @ w[:, :-1].T + w[:, -1]
        return per_sample(world.loss, z, y).sum()

    return value


def theta_of(world: World) -> Tensor:
    head = world.model.head
    return torch.cat([head.weight.detach(), head.bias.detach()[:, None]], 1).reshape(-1)


def by_hand(world: World, points: Tensor, method: ClosedForm) -> Tensor:
    theta, n = theta_of(world), len(world.data)
    retained = world.retained(FORGET)
    counted = retained if method.remaining else list(range(n))
    if method.curvature == "fisher":
        rows = [torch.func.grad(objective(world, points, [i]))(theta) for i in counted]
        matrix = torch.stack(rows).T @ torch.stack(rows)
    else:
        matrix = torch.func.hessian(objective(world, points, counted))(theta)
    matrix = matrix + len(counted) * DECAY * torch.eye(len(theta), dtype=theta.dtype)
    right = torch.func.grad(objective(world, points, FORGET))(theta) + len(FORGET) * DECAY * theta
    return theta + torch.linalg.solve(matrix, right)


VARIANTS = [{}, {"remaining": False}, {"curvature": "fisher"}]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("one_logit", [False, True])
def test_clean_points_match_dense_autograd(variant: dict[str, Any], one_logit: bool) -> None:
    world = make_world(ThreatModel("l2", 0.3, None), one_logit=one_logit)
    method = ClosedForm("clean", **variant)
    outcome = method.forget(method.start(world), FORGET, FORGET)
    head = outcome.model.head
    got = torch.cat([head.weight.detach(), head.bias.detach()[:, None]], 1).reshape(-1)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(got, by_hand(world, world.data.x, method), rtol=1e-9, atol=1e-11)
    assert outcome.residual < 1e-10


def test_adversarial_points_are_the_maximisers() -> None:
    """One logit, linear: the maximiser is x - s eps w / |w|, in closed form."""
    threat = ThreatModel("l2", 0.3, None)
    world = make_world(threat, one_logit=True)
    method = ClosedForm("adversarial")
    outcome = method.forget(method.start(world), FORGET, FORGET)
    w = world.model.head.weight[0].detach()
    sign = 2.0 * world.data.targets[:, None] - 1
    expected = by_hand(world, world.data.x - sign * threat.eps * w / w.norm(), method)
    head = outcome.model.head
    got = torch.cat([head.weight.detach(), head.bias.detach()[:, None]], 1).reshape(-1)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_attack_delta_variants_are_the_plain_ones(variant: dict[str, Any]) -> None:
    world = make_world(None)
    heads = []
    for points in ("clean", "adversarial"):
        method = ClosedForm(points, **variant)  # type: ignore[arg-type]
        heads.append(method.forget(method.start(world), FORGET, FORGET).parameters)
    assert torch.equal(heads[0], heads[1])


def test_two_requests_equal_their_union() -> None:
    world = make_world(ThreatModel("linf", 0.1, None))
    method = ClosedForm("adversarial")
    state = method.start(world)
    method.forget(state, FORGET[:2], FORGET[:2])
    successive = method.forget(state, FORGET[2:], FORGET).parameters
    at_once = method.forget(method.start(world), FORGET, FORGET).parameters
    torch.testing.assert_close(successive, at_once, rtol=0, atol=1e-12)


def test_newton_on_a_quadratic_objective_is_exact_retraining() -> None:
    """Ridge with clean points: the minimiser of what is left, from the minimiser of everything, in one step."""
    from lightning_muter.study.models import RidgeClassifier

    world = make_world(one_logit=True)
    model = RidgeClassifier((4,)).double()
    world.model = model
    theta = torch.zeros(5, dtype=torch.float64)

    def minimiser(positions: list[int]) -> Tensor:
        value = objective(world, world.data.x, positions)
        matrix = torch.func.hessian(value)(theta) + len(positions) * DECAY * torch.eye(5, dtype=torch.float64)
        return torch.linalg.solve(matrix, -torch.func.grad(value)(theta))

    full = minimiser(list(range(40)))
    with torch.no_grad():
        model.head.weight.copy_(full[None, :4])
        model.head.bias.copy_(full[4:])
    method = ClosedForm()
    outcome = method.forget(method.start(world), FORGET, FORGET)
    assert outcome.parameters is not None
    torch.testing.assert_close(outcome.parameters, minimiser(world.retained(FORGET)), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(head_vector(world.model), outcome.parameters, atol=1e-4)


def test_unknown_points_are_refused() -> None:
    with pytest.raises(ArgumentError, match="points"):
        ClosedForm("noisy")  # type: ignore[arg-type]
