"""A small convolutional network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_muter.errors import ArgumentError
from lightning_muter.study.models.base import Activation, Classifier, activation_of


class SmallCNN(Classifier):
    """Two 3x3 convolutions (the second halves the side) and a hidden layer, a nonlinearity after each, then the head.

    Args:
        in_shape: (channels, height, width).
        width: channels of the first convolution; the second has twice as many.
        hidden: features given to the head.
        activation: "silu", "gelu", "softplus" or "relu". A smooth one gives the adversary a smooth problem: it trains more robust
            models (Xie et al., Smooth Adversarial Training, 2020), and maxima that can be found exactly and followed. The
            maxima of a ReLU network sit on its kinks.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        *,
        width: int = 16,
        hidden: int = 64,
        activation: Activation = "relu",
        **options: Any,
    ) -> None:
        if len(in_shape) != 3:
            raise ArgumentError("in_shape", tuple(in_shape), "(channels, height, width)", "Tables have no convolution.")
        kind = activation_of(activation)
        convolutions = nn.Sequential(
            nn.Conv2d(in_shape[0], width, 3, padding=1),
            kind(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            kind(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = convolutions(torch.zeros(1, *in_shape)).shape[1]
        super().__init__(nn.Sequential(*convolutions, nn.Linear(flat, hidden), kind()), hidden, num_classes, **options)
        self.save_hyperparameters()
