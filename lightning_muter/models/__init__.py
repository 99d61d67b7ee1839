"""Models of the study: LightningModules ``head(backbone(normalise(x)))`` whose ``head`` is the last linear layer."""

from lightning_muter.models.base import Classifier, Normalise
from lightning_muter.models.cnn import SmallCNN
from lightning_muter.models.linear import LogisticRegression, RidgeClassifier, SoftmaxRegression
from lightning_muter.models.losses import LogisticLoss, SquaredLoss
from lightning_muter.models.pretrained import PretrainedBackbone
from lightning_muter.models.resnet import PreActResNet18, WideResNet

__all__ = [
    "Classifier",
    "LogisticLoss",
    "LogisticRegression",
    "Normalise",
    "PreActResNet18",
    "PretrainedBackbone",
    "RidgeClassifier",
    "SmallCNN",
    "SoftmaxRegression",
    "SquaredLoss",
    "WideResNet",
]
