"""Pre-activation residual networks for 32 x 32 images: PreActResNet-18 and WideResNet-28-10.

Sources: K. He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; S. Zagoruyko, N. Komodakis, "Wide
Residual Networks", BMVC 2016.  With ReLU both are piecewise linear in eval mode (BatchNorm with fixed statistics).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_muter.errors import ArgumentError
from lightning_muter.study.models.base import Activation, Classifier, activation_of


class PreActBlock(nn.Module):
    """``x + conv(act(bn(conv(act(bn(x))))))``; where the shape changes, a 1x1 convolution of the first activation
    replaces the identity.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.act1, self.act2 = act(), act()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return skip + self.conv2(self.act2(self.bn2(self.conv1(active))))


def pre_activation_stack(
    channels: int, stem: int, widths: Sequence[int], blocks: Sequence[int], activation: Activation = "relu"
) -> nn.Sequential:
    """Stem, groups of blocks (each group but the first halves the side), BatchNorm, activation, global average pooling."""
    act = activation_of(activation)
    layers: list[nn.Module] = [nn.Conv2d(channels, stem, 3, padding=1, bias=False)]
    inputs = stem
    for group, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(count):
            layers.append(PreActBlock(inputs, width, 2 if group > 0 and i == 0 else 1, act))
            inputs = width
    layers += [nn.BatchNorm2d(inputs), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    stack = nn.Sequential(*layers)
    for module in stack.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stack


class PreActResNet18(Classifier):
    """PreActResNet-18, features of length ``8 * width`` (512); ``activation`` as of :class:`SmallCNN`."""

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        *,
        width: int = 64,
        activation: Activation = "relu",
        **options: Any,
    ) -> None:
        widths = [width, 2 * width, 4 * width, 8 * width]
        stack = pre_activation_stack(in_shape[0], width, widths, [2, 2, 2, 2], activation)
        super().__init__(stack, widths[-1], num_classes, **options)
        self.save_hyperparameters()


class WideResNet(Classifier):
    """WideResNet-``depth``-``widen``, features of length ``64 * widen`` (640 for 28-10)."""

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        *,
        depth: int = 28,
        widen: int = 10,
        activation: Activation = "relu",
        **options: Any,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ArgumentError("depth", depth, "6 n + 4 with n of at least 1", "E.g. 10, 16, 22, 28.")
        widths = [16 * widen, 32 * widen, 64 * widen]
        stack = pre_activation_stack(in_shape[0], 16, widths, [(depth - 4) // 6] * 3, activation)
        super().__init__(stack, widths[-1], num_classes, **options)
        self.save_hyperparameters()
