"""A small convolutional network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_muter.errors import ArgumentError
from lightning_muter.models.base import Classifier


class SmallCNN(Classifier):
    """Two 3x3 convolutions (the second halves the side) and a hidden layer, ReLU after each, then the head.

    Args:
        in_shape: (channels, height, width).
        width: channels of the first convolution; the second has twice as many.
        hidden: features given to the head.
    """

    def __init__(
        self, in_shape: Sequence[int], num_classes: int, *, width: int = 16, hidden: int = 64, **options: Any
    ) -> None:
        if len(in_shape) != 3:
            raise ArgumentError("in_shape", tuple(in_shape), "(channels, height, width)", "Tables have no convolution.")
        convolutions = nn.Sequential(
            nn.Conv2d(in_shape[0], width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = convolutions(torch.zeros(1, *in_shape)).shape[1]
        super().__init__(
            nn.Sequential(*convolutions, nn.Linear(flat, hidden), nn.ReLU()), hidden, num_classes, **options
        )
        self.save_hyperparameters()
