"""What runs beside training: the averaged weights, and the count of images a second."""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
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

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the module itself moves there only after this hook
        super().setup(trainer, pl_module, stage)

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


class Best(ModelCheckpoint):
    """best.ckpt by validation top-1; of equal ones the later, which on a small set is the better trained.

    continued: the checkpoints folder of the run that this one continues, whose best.ckpt comes along.
    """

    def __init__(self, folder: Path, *, continued: Path | None = None):
        super().__init__(folder, filename="best", monitor="val/top1", mode="max", enable_version_counter=False)
        self.continued = continued

    @staticmethod
    def chosen_in(checkpoint: Path) -> bool:
        """Whether there was a best epoch by the time that a checkpoint of ours was written."""
        states = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["callbacks"].values()
        return any(state.get("best_model_score") is not None for state in states)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        if current is not None and self.best_model_score is not None and current == self.best_model_score:
            return True
        return super().check_monitor_top_k(trainer, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state's own paths are not used: the run may have been moved since."""
        assert self.continued is not None and self.dirpath is not None
        if state_dict["best_model_score"] is None:  # cut off before its first validation
            return
        ours = Path(self.dirpath, "best.ckpt")
        _copy(self.continued / "best.ckpt", ours)
        places = dict(best_model_path=str(ours), kth_best_model_path=str(ours), best_k_models={str(ours): state_dict["best_model_score"]})
        super().load_state_dict({**state_dict, **places, "dirpath": self.dirpath})


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


class Last(ModelCheckpoint):
    """last.ckpt, after every epoch. (Lightning's save_last writes it only where a best one was written too.)"""

    def __init__(self, folder: Path):
        super().__init__(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing of the run that is continued: its file stays where it is."""


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
