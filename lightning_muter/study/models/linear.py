"""Linear models: the head is the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_muter.study.models.base import Classifier
from lightning_muter.study.models.criteria import LogisticLoss, SquaredLoss


class SoftmaxRegression(Classifier):
    """``z = W x + b``, cross-entropy over ``num_classes`` classes."""

    def __init__(self, in_shape: Sequence[int], num_classes: int, **options: Any) -> None:
        super().__init__(nn.Flatten(), math.prod(in_shape), num_classes, **options)
        self.save_hyperparameters()


class LogisticRegression(Classifier):
    """One logit ``z = w.x + b``, loss ``log(1 + exp(-s z))``; two classes, targets 0/1 or -1/+1."""

    def __init__(self, in_shape: Sequence[int], num_classes: int = 2, **options: Any) -> None:
        super().__init__(
            nn.Flatten(), math.prod(in_shape), num_classes, one_logit=True, criterion=LogisticLoss(), **options
        )
        self.save_hyperparameters()


class RidgeClassifier(Classifier):
    """One logit, loss ``(z - s)^2 / 2`` with the sign s of the target; two classes, targets 0/1 or -1/+1."""

    def __init__(self, in_shape: Sequence[int], num_classes: int = 2, *, lr: float = 0.01, **options: Any) -> None:
        super().__init__(
            nn.Flatten(), math.prod(in_shape), num_classes, one_logit=True, criterion=SquaredLoss(), lr=lr, **options
        )
        self.save_hyperparameters()
