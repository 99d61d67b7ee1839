"""Datasets of the study as LightningDataModules: inputs in [0, 1] (tables: standardised), public and private parts."""

from lightning_muter.study.data.archives import ImageArchiveDataModule
from lightning_muter.study.data.arrays import ArrayDataset, stratified_split
from lightning_muter.study.data.base import SplitDataModule
from lightning_muter.study.data.downloads import (
    BinaryMNISTDataModule,
    CIFAR10DataModule,
    CovtypeBinaryDataModule,
    MNISTDataModule,
)
from lightning_muter.study.data.embedded import BreastCancerDataModule, DigitsDataModule
from lightning_muter.study.data.folders import ImageFolderDataModule, LacunaDataModule

__all__ = [
    "ArrayDataset",
    "BinaryMNISTDataModule",
    "BreastCancerDataModule",
    "CIFAR10DataModule",
    "CovtypeBinaryDataModule",
    "DigitsDataModule",
    "ImageArchiveDataModule",
    "ImageFolderDataModule",
    "LacunaDataModule",
    "MNISTDataModule",
    "SplitDataModule",
    "stratified_split",
]
