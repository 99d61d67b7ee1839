"""Models of the study: LightningModules ``head(backbone(normalise(x)))`` whose ``head`` is the last linear layer."""

from lightning_muter.study.models.base import Classifier, Normalise
from lightning_muter.study.models.cnn import SmallCNN
from lightning_muter.study.models.criteria import LogisticLoss, SquaredLoss
from lightning_muter.study.models.linear import LogisticRegression, RidgeClassifier, SoftmaxRegression
from lightning_muter.study.models.pretrained import PretrainedBackbone
from lightning_muter.study.models.resnet import PreActResNet18, WideResNet

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
