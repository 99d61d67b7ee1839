"""The layout of convolutions, and how many samples a backbone takes at a time, change no figure and no weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_muter.curvature.problem.backbone import Backbone
from lightning_muter.model.head import find_head
from lightning_muter.model.layout import ChannelsLast


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).to(dtype)  # fmt: skip


def backbone(net: nn.Module, x: torch.Tensor) -> Backbone:
    return Backbone(net, find_head(net, x[:1]), x[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_and_products_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(dtype), torch.rand(10, 2, 6, 5, dtype=dtype)
    flat, told = x.reshape(10, -1), {}
    for size in (128, 3):
        monkeypatch.setattr("lightning_muter.curvature.problem.backbone._AT_A_TIME", size)
        phi = backbone(net, x)
        point = flat.clone().requires_grad_(True)
        out = phi(point)
        (slope,) = torch.autograd.grad(out.square().sum(), point)
        told[size] = (
            out.detach(),
            slope,
            phi.jacobian(flat),
            phi.pushforward(flat, torch.ones(10, 60, 1, dtype=torch.float64)),
        )
    close = 1e-5 if dtype == torch.float32 else 1e-12
    for whole, parts in zip(told[128], told[3], strict=True):
        torch.testing.assert_close(whole, parts, rtol=close, atol=close)
    torch.testing.assert_close(phi.once(flat).double(), told[3][0], rtol=close, atol=close)
    torch.testing.assert_close(told[3][0], net[:5].eval()(x).double(), rtol=close, atol=close)


def test_weights_are_as_they_were_also_after_an_error() -> None:
    net = network(torch.float32)
    conv = net[0]
    before, held = conv.weight.detach().clone(), conv.weight.data_ptr()
    layout = ChannelsLast(net)

    def interrupted() -> None:
        with layout(), layout():  # also one inside another
            assert conv.weight.is_contiguous(memory_format=torch.channels_last)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert conv.weight.data_ptr() == held
    assert conv.weight.is_contiguous()
    assert torch.equal(conv.weight, before)


def test_a_change_of_weights_is_met() -> None:
    net = network(torch.float32)
    layout = ChannelsLast(net)
    with layout():
        pass
    with torch.no_grad():
        net[0].weight.mul_(2)
    expected = net[0].weight.detach().clone()
    with layout():
        assert torch.equal(net[0].weight, expected)


def test_double_precision_is_left_alone() -> None:
    net = network(torch.float64)
    with ChannelsLast(net)():
        assert net[0].weight.is_contiguous()
