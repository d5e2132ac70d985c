"""What runs beside training: the averaged weights, and the count of images a second."""

import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(WeightAveraging):
    """Exponential moving average of the weights, in their own float32; validated and saved, the raw weights beside it.

    The decay warms up as (1 + step) / (10 + step): with the recipe's 0.99996 from the start, the random initial weights
    would stay in the average for thousands of steps.
    """

    def __init__(self, *, decay: float):
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self._step = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None:
            return False
        self._step = step_idx
        return True

    def _average(self, averaged: Any, current: Any, _: Any) -> None:
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        get_ema_multi_avg_fn(decay)(averaged, current, None)

    # Validation inside training is of the average. After training, the module holds the weights that are asked about.
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            super().on_validation_epoch_end(trainer, pl_module)


class BestAndLast(ModelCheckpoint):
    """checkpoints/last.ckpt, and best.ckpt by validation top-1; of equal ones the later, which on a small set is the better trained."""

    def __init__(self, folder: Path, *, validates: bool):
        best_by = dict(monitor="val/top1", mode="max", save_top_k=1) if validates else dict(save_top_k=0)
        super().__init__(folder, filename="best", **best_by, save_last=True, enable_version_counter=False, auto_insert_metric_name=False)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        if current is not None and self.best_model_score is not None and current == self.best_model_score:
            return True
        return super().check_monitor_top_k(trainer, current)


class Throughput(Callback):
    """Training images a second over all devices: the median over epochs, the first left out where there are others."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._images = _now(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        self._images += len(batch[0])
        if trainer.is_last_batch:  # validation comes before on_train_epoch_end
            self.epochs.append(self._images * trainer.world_size / (_now() - self._start))

    @property
    def images_per_s(self) -> float | None:
        return statistics.median(self.epochs[1:] or self.epochs) if self.epochs else None


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
