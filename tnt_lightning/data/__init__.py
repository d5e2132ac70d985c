"""Data sets as LightningDataModules; they know nothing of models."""

from tnt_lightning.data.datasets import Digits, ImageNet
from tnt_lightning.data.module import ImageDataModule

__all__ = ["Digits", "ImageDataModule", "ImageNet"]
