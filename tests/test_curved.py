"""This package's methods in the study: where published forms must agree with them, and what a row gets."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_muter.curvature.response.choose import Unconstrained
from lightning_muter.solvers.dense import Schur
from lightning_muter.study import compare as protocol
from lightning_muter.study.methods.muter import Unlearn
from lightning_muter.study.methods.newton_influence_fisher import ClosedForm
from lightning_muter.study.report.rows import Row
from lightning_muter.study.requests import Scenario
from lightning_muter.study.setup.cache import Cache
from lightning_muter.study.setup.problem import head_vector
from tests.worlds import FORGET, answer, distance, reference, world_of


@pytest.mark.parametrize("one_logit", [False, True])
def test_without_an_attack_every_second_order_method_is_newton(one_logit: bool) -> None:
    world = world_of("none", 0.0, one_logit)
    newton = answer(world, ClosedForm()).parameters
    assert newton is not None
    for method in (Unlearn(), Unlearn("none"), ClosedForm("adversarial")):
        torch.testing.assert_close(answer(world, method).parameters, newton, rtol=0, atol=1e-4 * float(newton.norm()))
    assert distance(world, answer(world, Unlearn())) < 0.1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_small_radii_tend_to_newton(norm: str) -> None:
    """The step of the constraint-aware response against Newton-delta's: their difference shrinks with the radius."""
    differences = []
    for eps in (1e-2, 1e-4):
        world = world_of(norm, eps)
        aware, newton = answer(world, Unlearn()).parameters, answer(world, ClosedForm("adversarial")).parameters
        assert aware is not None
        assert newton is not None
        differences.append(float((aware - newton).norm() / (newton - head_vector(world.model)).norm()))
    assert differences[1] < 0.05
    assert differences[1] < differences[0]


def test_the_constraint_aware_method_is_closer_than_every_published_one() -> None:
    world = world_of("l2", 0.25)
    aware = distance(world, answer(world, Unlearn()))
    refined = distance(world, answer(world, Unlearn(refine=2)))
    published = [
        ClosedForm("clean"),
        ClosedForm("adversarial"),
        ClosedForm("clean", remaining=False),
        ClosedForm("adversarial", curvature="fisher"),
        Unlearn("none"),
        Unlearn(Unconstrained(3), solver=Schur(accept_indefinite=True)),
    ]
    assert refined < aware < 0.2
    assert aware < min(distance(world, answer(world, method)) for method in published)


def test_a_row_gets_status_residual_bytes_and_a_certificate_that_holds() -> None:
    world = world_of("l2", 0.25)
    method = Unlearn(refine=2)
    state = method.start(world)
    outcome = method.forget(state, FORGET, FORGET)
    assert outcome.status == "converged"
    assert outcome.residual < 1e-6
    assert state.bytes > 8 * (640 * 640) / 2
    assert outcome.stationarity < 1e-2
    assert outcome.parameters is not None
    truth = float((outcome.parameters - reference(world)).norm())
    assert math.isfinite(outcome.bound)
    assert outcome.bound >= truth * (1 - 1e-3)  # the reference itself is stationary to 1e-6 only


def test_successive_requests_equal_one() -> None:
    world = world_of("l2", 0.25)
    method = Unlearn()
    state = method.start(world)
    method.forget(state, FORGET[:2], FORGET[:2])
    successive = method.forget(state, FORGET[2:], FORGET).parameters
    assert successive is not None
    torch.testing.assert_close(successive, answer(world, method).parameters, rtol=1e-9, atol=1e-10)
    assert state.model is not world.model


@pytest.mark.parametrize("eps", [0.25, 0.6])
def test_refined_and_retrained_heads_are_as_far_apart_as_their_bounds_allow(eps: float) -> None:
    """Retraining ends near the minimiser, not at it: a refined head may be nearer, and the reference has a bound as well."""
    world = world_of("l2", eps)
    share = Scenario(("some",), (tuple(FORGET),))
    methods = [Unlearn(certify=True), Unlearn(refine=4)]
    first, plain, refined = protocol.run(
        world, methods, [share], Cache(None), Row("digits", "softmax", "pgd_l2", "", "")
    )
    assert first.bound < 0.1 * plain.distance_absolute
    for row in (plain, refined):
        assert row.distance_absolute <= row.bound + first.bound
