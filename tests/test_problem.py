"""Head, logits' derivatives and backbone products against dense derivatives of one sample at a time."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_muter.curvature.problem.head import HeadProblem
from tests import reference
from tests.cases import NAMES, D, case


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_curvature_against_autograd_of_one_sample(name):
    one = case(name)
    problem, theta = one.problem(), reference.theta_of(one)
    assert torch.equal(problem.read_theta(), theta)
    exact = reference.derivatives(one, theta, one.x, one.y)
    loss, slope = problem.loss_and_input_gradient(theta, one.x, one.y)
    torch.testing.assert_close(loss, exact.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope, exact.x, rtol=1e-11, atol=1e-13)
    phi = problem.backbone(one.x)
    terms = problem.terms(problem.logits(theta, phi), one.y, one.weight)
    scale = torch.ones(len(one.x), dtype=torch.float64) if one.weight is None else one.weight
    torch.testing.assert_close(terms.loss, scale * exact.loss, rtol=1e-12, atol=1e-14)
    augmented = problem.augment(phi)
    w = (terms.r[:, :, None] * augmented[:, None]).flatten(1)
    torch.testing.assert_close(w, scale[:, None] * exact.w, rtol=1e-11, atol=1e-13)
    ww = torch.einsum("nkl,na,nb->nkalb", terms.hess, augmented, augmented).reshape(exact.ww.shape)
    torch.testing.assert_close(ww, scale[:, None, None] * exact.ww, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_and_input_curvature_against_autograd_of_one_sample(name):
    """The structured d2l/dwdx = r J (W-rows) + (Lambda W J) phi: order of theta and the bias entry included."""
    one = case(name)
    problem, theta = one.problem(), reference.theta_of(one)
    exact = reference.derivatives(one, theta, one.x, one.y)
    phi = problem.backbone(one.x)
    terms = problem.terms(problem.logits(theta, phi), one.y)
    jacobian = problem.backbone.jacobian(one.x)
    bordered = torch.cat([jacobian, torch.zeros(len(one.x), int(problem.has_bias), D, dtype=torch.float64)], 1)
    left = torch.einsum("nk,naj->nkaj", terms.r, bordered)
    right = torch.einsum("nkl,lb,nbj,na->nkaj", terms.hess, problem.weight(theta), jacobian, problem.augment(phi))
    torch.testing.assert_close((left + right).flatten(1, 2), exact.wx, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(problem.input_hessian(theta, one.x, one.y), exact.xx, rtol=1e-10, atol=1e-12)
    root = problem.curvature_root(theta, one.x, terms.hess)
    assert problem.backbone.piecewise_linear == (not name.startswith("smooth"))
    if problem.backbone.piecewise_linear:
        torch.testing.assert_close(root @ root.mT, exact.xx, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["linear-softmax-bias", "affine-square-bias", "smooth-softmax-bias", "relu-softmax"])
def test_pushforward_and_pullback_are_products_with_the_jacobian(name):
    one = case(name)
    problem = one.problem()
    jacobian = torch.stack([torch.func.jacrev(lambda x: one.backbone(x[None])[0])(x) for x in one.x])
    generator = torch.Generator().manual_seed(0)
    tangents = torch.randn(len(one.x), D, 3, generator=generator, dtype=torch.float64)
    covectors = torch.randn(len(one.x), 2, jacobian.shape[1], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(problem.backbone.jacobian(one.x).contiguous(), jacobian, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        problem.backbone.pushforward(one.x, tangents), jacobian @ tangents, rtol=1e-11, atol=1e-13
    )
    torch.testing.assert_close(
        problem.backbone.pullback(one.x, covectors), covectors @ jacobian, rtol=1e-11, atol=1e-13
    )


def test_theta_is_written_as_it_is_read_and_rounded_to_the_modules_dtype():
    net = nn.Sequential(nn.Flatten(), nn.Linear(D, 3))
    problem = HeadProblem(net, F.cross_entropy, torch.rand(5, D))
    theta = torch.randn(3, D + 1, dtype=torch.float64)
    problem.write_theta(theta)
    assert torch.equal(problem.read_theta(), theta.float().double())
    assert torch.equal(net[1].bias.detach(), theta[:, -1].float())


def test_backbones_are_recognised_for_what_they_are():
    torch.manual_seed(0)
    x = torch.rand(8, D, dtype=torch.float64)

    def of(*layers: nn.Module) -> HeadProblem:
        net = nn.Sequential(*layers).double()
        return HeadProblem(net, F.cross_entropy, x)

    assert of(nn.Linear(D, 2)).backbone.identity
    affine = of(nn.Linear(D, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).backbone
    assert affine.affine
    assert not affine.identity
    # a ReLU that is open on all of the data is still no affine map
    ajar = nn.Linear(D, 3)
    with torch.no_grad():
        ajar.bias.fill_(2.0)
    kinked = of(ajar, nn.ReLU(), nn.Linear(3, 2)).backbone
    assert kinked.piecewise_linear
    assert not kinked.affine
    for curved in (nn.Softplus(), nn.Tanh(), nn.GELU()):
        assert not of(nn.Linear(D, 3), curved, nn.Linear(3, 2)).backbone.piecewise_linear
    # dropout is switched off, not taken for a kink
    assert of(nn.Dropout(0.5), nn.Linear(D, 2)).backbone.affine


@pytest.mark.parametrize("training", [True, False])
def test_nothing_in_the_model_changes(training):
    one = case("smooth-softmax-bias")
    one.net.train(training)
    before = {k: v.clone() for k, v in one.net.state_dict().items()}
    with torch.no_grad():
        problem = one.problem()
        problem.input_hessian(problem.read_theta(), one.x, one.y)
    assert one.net.training is training
    assert all(torch.equal(v, before[k]) for k, v in one.net.state_dict().items())
    assert all(p.grad is None for p in one.net.parameters())


@pytest.mark.parametrize("ignored", [-100, 0])
def test_the_closed_curvature_of_cross_entropy_is_autodiffs(ignored):
    loss = functools.partial(F.cross_entropy, ignore_index=ignored)
    problem = HeadProblem(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double(), loss, torch.randn(2, 4))
    z = torch.tensor([[0.3, -1.0, 2.0], [40.0, -40.0, 0.0], [500.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    y = torch.tensor([1, 1, 2, ignored])

    def of_one(zi, yi):
        return (zi * 0).sum() if yi == ignored else F.cross_entropy(zi[None], yi[None])

    exact = torch.stack([torch.func.hessian(of_one)(zi, yi) for zi, yi in zip(z, y, strict=True)])
    torch.testing.assert_close(problem.terms(z, y).hess, exact, rtol=1e-12, atol=1e-14)
