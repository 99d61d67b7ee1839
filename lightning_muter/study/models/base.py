"""What every model of the study shares: normalisation inside, a backbone, a linear head whose output is the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter.errors import ArgumentError
from lightning_muter.study.metrics import Accuracy

Criterion = Callable[..., Tensor]
Activation = Literal["silu", "gelu", "softplus", "relu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus, "relu": nn.ReLU,
}  # fmt: skip


def activation_of(name: Activation) -> type[nn.Module]:
    """The layer of this name."""
    if name not in _ACTIVATIONS:
        raise ArgumentError("activation", name, " or ".join(map(repr, _ACTIVATIONS)))
    return _ACTIVATIONS[name]


class Normalise(nn.Module):
    """``(x - mean) / std`` per channel, as part of the model: attacks and boxes then live in the data's own units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean) or min(std) <= 0:
            raise ArgumentError(
                "std", list(std), "one number above 0 per channel, as many as mean", "E.g. mean=[0.5], std=[0.5]."
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("std", torch.tensor(std, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.ndim - 2)
        return (x - self.mean.view(shape)) / self.std.view(shape)


class Classifier(L.LightningModule):
    """``head(backbone(normalise(x)))`` with training, validation and test steps, SGD and coupled weight decay.

    The objective is ``mean loss + (weight_decay / 2) ||w||^2`` over all trainable parameters, biases included: strongly
    convex in the head, so that its minimiser is unique and distances to it can be certified.

    Args:
        backbone: inputs to features ``(n, f)``.
        features: f.
        num_classes: number of logits; ``one_logit`` models have one.
        criterion: ``loss(logits, y, reduction=...)``; cross-entropy by default.
        lr, momentum, weight_decay: of SGD.
        milestones: epochs at which the learning rate is divided by 10.
        mean, std: per-channel normalisation of the inputs inside the model (None: none).
    """

    criterion: Criterion

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        num_classes: int,
        *,
        one_logit: bool = False,
        criterion: Criterion | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-3,
        milestones: Sequence[int] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ArgumentError("num_classes", num_classes, "at least 2")
        if one_logit and num_classes != 2:
            raise ArgumentError(
                "num_classes", num_classes, "2 for a one-logit model", "Use SoftmaxRegression for more classes."
            )
        if (mean is None) != (std is None):
            raise ArgumentError("std", std, "given together with mean, or neither")
        self.lr, self.momentum, self.weight_decay, self.milestones = lr, momentum, weight_decay, tuple(milestones)
        self.num_classes = num_classes
        self.normalise = nn.Identity() if mean is None or std is None else Normalise(mean, std)
        self.backbone = backbone
        self.head = nn.Linear(features, 1 if one_logit else num_classes)
        self.criterion = criterion if criterion is not None else F.cross_entropy
        self.val_accuracy, self.test_accuracy = Accuracy(), Accuracy()

    def features(self, x: Tensor) -> Tensor:
        """Backbone features, ``(n, f)``."""
        return self.backbone(self.normalise(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def freeze_backbone(self) -> None:
        """Leave the head as the only trainable part; the backbone stays in eval mode from now on (BatchNorm fixed)."""
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    @torch.no_grad()
    def reset_head(self) -> None:
        """Weights and bias of the head to 0: the start of every training that is compared."""
        for parameter in self.head.parameters():
            parameter.zero_()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, batch: Any, name: str, metric: Accuracy) -> None:
        x, y = batch
        logits = self(x)
        metric(logits, y)
        self.log(f"{name}_loss", self.criterion(logits, y), on_step=False, on_epoch=True)
        self.log(f"{name}_acc", metric, on_step=False, on_epoch=True, prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if not self.milestones:
            return optimiser
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(self.milestones), gamma=0.1)
        return {"optimizer": optimiser, "lr_scheduler": schedule}
