"""Modules as people write them: they know nothing of this package, and are not made to fit it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytorch_lightning as other
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F


class HydraMNIST(L.LightningModule):
    """A template's module: network, optimizer and scheduler handed in as parts; metrics for every stage."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any, compile: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.val_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.train_loss, self.val_loss = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
        self.val_acc_best = torchmetrics.MaxMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


class Backbone(nn.Module):
    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.l1 = nn.Linear(36, hidden)
        self.l2 = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = torch.relu(self.l1(x))
        return torch.relu(self.l2(x))


class BackboneClassifier(L.LightningModule):
    """Logits behind a ReLU, Adam without decay."""

    def __init__(self, backbone: nn.Module | None = None, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = Backbone() if backbone is None else backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        y_hat = self(x)
        loss = F.cross_entropy(y_hat, y)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


class LitMNIST(L.LightningModule):
    """log_softmax in forward, nll_loss in the step."""

    def __init__(self, hidden_size: int = 8) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(36, hidden_size), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden_size, 3)
        )
        self.val_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.model(x), dim=1)

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.nll_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class LitResnet(L.LightningModule):
    """A residual network with BatchNorm and in-place ReLU, log_softmax + nll, SGD with momentum and OneCycle."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stem(x)
        residual = self.block(out)
        residual += out
        return F.log_softmax(self.fc(F.relu(residual, inplace=True).mean((2, 3))), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.nll_loss(logits, y)
        self.log("train_loss", loss)
        return loss

    def evaluate(self, batch: Any, stage: str) -> None:
        x, y = batch
        self.log(f"{stage}_loss", F.nll_loss(self(x), y), prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, epochs=self.trainer.max_epochs, steps_per_epoch=2
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Tabular(L.LightningModule):
    """Batches are dicts of continuous and categorical columns; the step returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.ModuleList([nn.Embedding(3, 2), nn.Embedding(2, 2)])
        self.normalise = nn.BatchNorm1d(6)
        self.layers = nn.Sequential(nn.Linear(10, 8), nn.LeakyReLU())
        self.head = nn.Linear(8, 1)
        self.loss = nn.MSELoss()

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        categories = [e(x["categorical"][:, i]) for i, e in enumerate(self.embedding)]
        features = torch.cat([self.normalise(x["continuous"]), *categories], dim=1)
        return {"logits": self.head(self.layers(features)), "backbone_features": features}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        loss = self.loss(self(batch)["logits"], batch["target"])
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Medical(other.LightningModule):
    """pytorch_lightning; several findings, sigmoid at the end of forward, BCELoss."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )
        self.classifier = nn.Sequential(nn.Linear(4, 2), nn.Sigmoid())
        self.criterion = nn.BCELoss()
        self.outputs: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, findings = batch["image"], batch["findings"].float()
        probabilities = self(images)
        loss = self.criterion(probabilities, findings)
        self.outputs.append((probabilities.detach().cpu().numpy(), loss.item()))
        self.log("train_bce", loss, batch_size=images.shape[0])
        return loss

    def on_train_epoch_end(self) -> None:
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class MeanVariance(L.LightningModule):
    """Mean and log-variance of a Gaussian from one layer; optimizer as a factory; keys named by attributes."""

    input_key, target_key = "input", "target"

    def __init__(self, optimizer: Any = torch.optim.Adam) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = optimizer
        self.train_metrics = torchmetrics.MetricCollection(
            {"RMSE": torchmetrics.MeanSquaredError(squared=False)}, prefix="train"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        out = self.forward(batch[self.input_key])
        mean, log_variance = out[:, :1], out[:, 1:].clamp(-6, 6)
        loss = (0.5 * (log_variance + (batch[self.target_key] - mean) ** 2 / log_variance.exp())).mean()
        self.log("train_loss", loss, batch_size=len(out))
        self.train_metrics(mean, batch[self.target_key])
        return loss

    def configure_optimizers(self) -> Any:
        return {"optimizer": self.optimizer(self.parameters())}


class Regularised(other.LightningModule):
    """Logistic regression with strengths of regularisation as arguments; the step returns a dict."""

    def __init__(self, l1_strength: float = 0.0, l2_strength: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(36, 3)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(x.size(0), -1))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        loss = self.criterion(self(x), y)
        if self.hparams.l1_strength > 0:
            loss += self.hparams.l1_strength * sum(p.abs().sum() for p in self.parameters())
        if self.hparams.l2_strength > 0:
            loss += self.hparams.l2_strength * sum(p.pow(2).sum() for p in self.parameters())
        self.log_dict({"loss": loss})
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class LinearProbe(other.LightningModule):
    """A linear layer on a backbone that runs without gradients and that no optimizer is given."""

    def __init__(self, model: nn.Module, feature_dim: int = 4) -> None:
        super().__init__()
        self.model = model
        self.classification_head = nn.Linear(feature_dim, 3)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.model(images).flatten(start_dim=1)
        return self.classification_head(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.classification_head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0)


class Normalised(L.LightningModule):
    """A focal loss whose weights are divided by their sum over the batch, under the usual name ``criterion``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        self.criterion = self.focal

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    @staticmethod
    def focal(z: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(z, y, reduction="none")
        weights = (1 - (-losses).exp()) ** 2
        return (weights * losses).sum() / weights.sum().clamp(min=1e-6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.criterion(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.criterion(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
