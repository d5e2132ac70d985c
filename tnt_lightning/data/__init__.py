"""Data sets as LightningDataModules; they know nothing of models."""

from tnt_lightning.data.datasets import CIFAR10, CIFAR100, Digits, Flowers102, ImageFolder, ImageNet, INaturalist, OxfordPets
from tnt_lightning.data.module import ImageDataModule
from tnt_lightning.data.stream import ImageNetStream

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "Flowers102",
    "INaturalist",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "ImageNetStream",
    "OxfordPets",
]
