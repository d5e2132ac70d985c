"""What runs beside training: averaged weights, checkpoints and the way on from them, the watch over the loss, images a second."""

import json
import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from tnt_lightning import ranks, runs, sharding
from tnt_lightning.checkpoints import Origin, Position, read
from tnt_lightning.curves import Curves
from tnt_lightning.errors import UserError
from tnt_lightning.sharding import Sharded
from tnt_lightning.signals import Signals, name

RESCALED = 40  # steps in a row without a finite gradient in float16: from its first scale to none at all are 16


class EMA(WeightAveraging):
    """Exponential moving average of the weights, in their own float32; validated and saved, the raw weights beside it.

    The decay warms up as (1 + step) / (10 + step): with the recipe's 0.99996 from the start, the initial weights would stay in the
    average for thousands of steps; in a short fine-tuning, to its end. With the warm-up alone an average is of about the last tenth of
    the steps until then.

    decay: a number, or "auto", which `suit` replaces
    """

    SHARE = 15  # of the paper's 375,300 steps its decay of 0.99996 spans 25,000: a fifteenth

    def __init__(self, *, decay: float | Literal["auto"]):
        super().__init__()
        self.decay = decay
        self._groups: list[tuple[Any, Any]] | None = None  # tensors of the average and those that they follow, of one kind each
        self._swapped = False

    def suit(self, steps: int) -> str | None:
        """Fit "auto" to a training of so many steps: its average spans the share of them that the paper's pre-training has.

        A line for the user, where it was fitted, or where a number is so high that its warm-up does not end.
        """
        fitting = max(0.0, 1 - self.SHARE / steps)
        if self.decay == "auto":
            self.decay = fitting
            return f"the average spans {steps / self.SHARE:,.0f} of {steps:,} steps: recipe.ema_decay=auto is {self.decay:.6g}"
        if self._warm_up(steps) < self.decay < 1:
            return (
                f"recipe.ema_decay={self.decay:g} spans {1 / (1 - self.decay):,.0f} steps, of which there are {steps:,}: its warm-up does "
                f"not end, and the average is of about the last {steps / 10:,.0f}; recipe.ema_decay=auto spans {steps / self.SHARE:,.0f}"
            )
        return None

    @staticmethod
    def _warm_up(step: int) -> float:
        return (1 + step) / (10 + step)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # The module itself moves there only after this hook; a sharded one may not fit.
        self._device = torch.device("cpu") if isinstance(trainer.strategy, Sharded) else trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, Sharded):
            average: Any = self._average_model
            trainer.strategy.shard(average.module)
            average.to(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Lightning's own asks the device twice a step how many there were, and looks every tensor up anew."""
        if trainer.global_step <= self._latest_update_step:  # within an accumulation
            return
        step, self._latest_update_step = trainer.global_step - 1, trainer.global_step
        average: Any = self._average_model
        if self._groups is None:
            if not average.n_averaged:  # the first is a copy
                average.update_parameters(pl_module)
                return
            pairs = [[tensor.detach() for tensor in (*module.parameters(), *module.buffers())] for module in (average.module, pl_module)]
            self._groups = [(ours, theirs) for (ours, theirs), _ in _group_tensors_by_device_and_dtype(pairs).values()]
        assert self.decay != "auto", "suit() comes first"
        average_into = get_ema_multi_avg_fn(min(self.decay, self._warm_up(step)))
        for ours, theirs in self._groups:
            average_into(ours, theirs, None)
        average.n_averaged += 1

    # Validation inside training is of the average. After training, the module holds the weights that are asked about.
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            super().on_validation_epoch_start(trainer, pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.give_back(pl_module)

    def give_back(self, pl_module: L.LightningModule) -> None:
        """The raw weights to the module, where a validation has them out."""
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if isinstance(trainer.strategy, Sharded) and self._average_model is not None:
            checkpoint["state_dict"] = sharding.whole(self._average_model.module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if isinstance(trainer.strategy, Sharded) and self._average_model is not None:
            sharding.load(self._average_model.module, checkpoint["state_dict"])
            sharding.load(pl_module, checkpoint["current_model_state"])
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        else:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class Checkpoints(Checkpoint):
    """last.ckpt after every epoch, every so many steps and when a signal ends the run; best.ckpt, a copy of it, after the validation
    with the best top-1 so far: of equal ones the later, which on a small set is the better trained.

    every_n_steps: optimizer steps between checkpoints in the middle of an epoch; None for none
    signals: stops training between two steps, on all ranks at the same one; curves: whose rows a checkpoint counts
    origin: what training goes on from, in this run or in another; timeout_s: to wait for the other ranks

    A checkpoint is written between two optimizer steps, and a run that goes on from it is seated there: Lightning's own counters after
    a restart are off by one in several of these places, and redo or leave out a validation.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_n_steps: int | None = None,
        signals: Signals | None = None,
        curves: Curves | None = None,
        origin: Origin | None = None,
        timeout_s: float = 1800,
    ):
        self.folder, self.every_n_steps, self.origin = folder, every_n_steps, origin
        self.signals, self.curves, self.timeout_s = signals or Signals(), curves, timeout_s
        self.best_top1: float | None = None
        self.best_step: int | None = None
        self.start = origin.position if origin else Position()
        self._began = time.monotonic()
        self._saved = self.start.step if origin else None  # the step of the last checkpoint
        self._is_best = False
        self._ending: int | None = None  # the signal that all ranks have agreed on

    # ---- where training goes on

    def state_dict(self) -> dict[str, Any]:
        return {"best_top1": self.best_top1, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_top1, self.best_step = state_dict["best_top1"], state_dict["best_step"]
        assert self.origin is not None
        self._bring_best(self.origin.file, speaks=getattr(rank_zero_only, "rank", 0) == 0)

    def _bring_best(self, source: Path, *, speaks: bool) -> None:
        """The best.ckpt that the state speaks of, whose file may be older (cut off before it was copied), newer, elsewhere or gone."""
        if self.best_step is None:
            return
        beside, ours = source.with_name("best.ckpt"), self.folder / "best.ckpt"
        try:
            found: Path | None = beside
            if Position.of(read(beside)).step != self.best_step:
                found = None
        except UserError:
            found = None
        if found is None and self.start.step == self.best_step:
            found = source
        if found is None:
            if speaks:
                print(f"note   {beside} is not the one of step {self.best_step}: the best is chosen anew, from the next validation on")
            self.best_top1 = self.best_step = None
        elif speaks and found != ours:
            runs.copy(found, ours)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's handlers talk to the other ranks from within a signal, and let a SIGTERM end in exit code 0, without a checkpoint.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if stage == "fit" and self.origin is not None:  # a sharded optimizer asks for the loader before the checkpoint is read
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            data.begin = self.start.epoch, first_batch(self.start, trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("together")  # whoever is late until here is not lost
        self._agreed = Agreement(trainer.world_size, self.timeout_s)
        # Lightning's asks the device on every step, and hears the first rank alone.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if self.origin is not None:
            _seat(trainer, self.start, first_batch(self.start, trainer))
        self.signals.phase = "training"

    # ---- where checkpoints are written

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._ending = self._ending or self._agreed(self.signals.came or 0) or None
        if batch_idx % trainer.accumulate_grad_batches:  # gradients are not saved
            return
        step = trainer.global_step
        due = self.every_n_steps is not None and batch_idx and step != self._saved and step % self.every_n_steps == 0
        if due or self._ending:
            self._save(trainer, pl_module, epoch=trainer.current_epoch, batch=batch_idx)
        if self._ending:
            self._end(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":  # one rank may have a batch more than another
            self._validated_by_all = self._agreed.least(int(sum(trainer.num_val_batches)))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn != "fit" or batch_idx >= self._validated_by_all:
            return
        self._ending = self._ending or self._agreed(self.signals.came or 0) or None
        if self._ending:  # the raw weights go back to their place, and the validation is to be done again
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EMA):
                    callback.give_back(pl_module)
            self._save(trainer, pl_module, epoch=trainer.current_epoch, batch=trainer.fit_loop.batch_idx + 1, validating=True)
            self._end(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        top1 = trainer.callback_metrics.get("val/top1")
        if trainer.state.fn != "fit" or top1 is None:
            return
        if self.best_top1 is None or float(top1) >= self.best_top1:
            self.best_top1, self.best_step, self._is_best = float(top1), trainer.global_step, True
        done = trainer.fit_loop.batch_idx + 1
        if self._is_best and done < trainer.num_training_batches:  # at an epoch's end, with the checkpoint of that
            self._save(trainer, pl_module, epoch=trainer.current_epoch, batch=done)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = trainer.fit_loop.batch_idx + 1
        if done < trainer.num_training_batches:  # trainer.max_steps ends it in the middle
            self._save(trainer, pl_module, epoch=trainer.current_epoch, batch=done)
        else:
            self._save(trainer, pl_module, epoch=trainer.current_epoch + 1, batch=0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.phase = "after"

    def _save(self, trainer: L.Trainer, module: L.LightningModule, *, epoch: int, batch: int, validating: bool = False) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Finite):
                callback.settle(trainer)
        if not trainer.strategy.reduce_boolean_decision(not _any_nonfinite(list(module.parameters()))):
            raise UserError(
                f"the weights are no longer finite at step {trainer.global_step}; the checkpoints are from before; lower optimizer.lr"
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.here = Position(
            epoch=epoch,
            batch=batch,
            images=batch * data.device_batch * trainer.world_size,
            step=trainer.global_step,
            validating=validating,
            world=trainer.world_size,
            accumulation=trainer.accumulate_grad_batches,
            num_workers=data.num_workers,
            train_images=len(data.parts.train.labels),
            rows=self.curves.rows if self.curves else 0,
            seconds=self.seconds,
        )
        if self.curves:
            self.curves.sync()
        trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)
        if self._is_best:
            if trainer.is_global_zero:
                runs.copy(self.folder / "last.ckpt", self.folder / "best.ckpt")
            trainer.strategy.barrier("best.ckpt")  # every rank may read it next
        self._saved, self._is_best = trainer.global_step, False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.here.put_into(checkpoint)

    @property
    def seconds(self) -> float:
        """Of training until now, that of the parts before included."""
        return self.start.seconds + time.monotonic() - self._began

    def _end(self, trainer: L.Trainer) -> None:
        assert self._ending is not None
        ranks.ending = True
        if trainer.is_global_zero:
            self.signals.came = self.signals.came or self._ending
            print(f"\nstopped by {name(self._ending)} at {self.here}; {self.folder / 'last.ckpt'} holds it", flush=True)
            self.signals.hand_back()
        raise SystemExit(128 + self._ending)


class Agreement:
    """The highest number that any rank has to say, the same on all ranks one call later: it travels while the next step is computed,
    and no device is waited for. With one rank, at once."""

    def __init__(self, world: int, timeout_s: float):
        self._group: Any = ranks.beside(timeout_s) if world > 1 else None
        self._said: tuple[Tensor, Any] | None = None

    def __call__(self, number: int) -> int:
        if self._group is None:
            return number
        heard = 0
        if self._said is not None:
            said, work = self._said
            work.wait()
            heard = int(said)
        said = torch.tensor([number])
        self._said = said, torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        return heard

    def least(self, number: int) -> int:
        """The lowest number of all ranks, now."""
        if self._group is not None:
            said = torch.tensor([number])
            torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group=self._group)
            number = int(said)
        return number


def first_batch(start: Position, trainer: L.Trainer) -> int:
    """Batches of the epoch that are done, in batches of this trainer, whose ranks and accumulation may be others; whole steps of them."""
    if (start.world, start.accumulation) == (trainer.world_size, trainer.accumulate_grad_batches):
        return start.batch
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return start.images // data.batch_size * trainer.accumulate_grad_batches


def _seat(trainer: L.Trainer, start: Position, batch: int) -> None:
    """Put Lightning's loops where a checkpoint stands, before `batch` of an epoch, whatever they made of the state that they loaded."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    batches = int(trainer.num_training_batches)
    for counts, done in (
        (fit.epoch_progress.total, start.epoch),
        (fit.epoch_progress.current, start.epoch),
        (loop.batch_progress.total, start.epoch * batches + batch),
        (loop.batch_progress.current, batch),
    ):
        counts.load_state_dict(dict.fromkeys(("ready", "started", "processed", "completed"), done))
    loop.batch_progress.is_last_batch = batch == batches
    loop.val_loop.batch_progress.reset()
    fit._restarting, loop._restarting, loop.val_loop._restarting = False, bool(batch), False
    fit._restart_stage = fit_loop.RestartStage.NONE
    # In an epoch's middle the loop adds one to the steps that its loggers count, unless it stands "on last", where a validation follows.
    on, at = training_epoch_loop.RestartStage, evaluation_loop.RestartStage
    loop._restart_stage = on.RESTARTED_ON_LAST if start.validating else on.NONE
    loop.val_loop._restart_stage = at.RESTARTED_MID_EVALUATION if start.validating else at.NONE
    loop._batches_that_stepped = start.step - bool(batch)


class Finite(Callback):
    """Watches loss and gradient. Where either is infinite or not a number, training stops, or goes on without the step. No such step is
    in a checkpoint.

    policy: "stop", or "skip" for at most in_a_row steps one after the other
    run: the directory whose nonfinite.jsonl gets a line for each such step, with all of the batch's images
    lag: steps after which the device is asked; None: 0 on the CPU, where training stops before the step, and 2 on a GPU, which so never
        waits for the answer. A fused optimizer leaves the step out by itself, and float16's scaler does. Any other (LAMB; AdamW where
        gradients are clipped under mixed precision) takes it and up to two more, on weights that nobody saves or validates, before
        training stops; to skip steps, that one is asked at once.
    """

    def __init__(self, run: Path, *, policy: str = "stop", in_a_row: int = 10, lag: int | None = None):
        self.run, self.policy, self.in_a_row, self.lag = run, policy, in_a_row, lag
        self.skipped = self._row = self._rescaled = 0
        self._loss: Tensor | None = None  # of the batches since the last step
        self._pending: deque[tuple[Tensor, Any, dict[str, Any]]] = deque()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "row": self._row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._row = state_dict["skipped"], state_dict["row"]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        assert self._loss is not None
        loss, self._loss = self._loss, None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        bad, gradient = ~loss.isfinite(), _any_nonfinite([p.grad for p in parameters])
        # float16's scaler makes infinite gradients on its way to a fitting scale, and leaves those steps out itself.
        bad = torch.maximum(bad.float(), 0.5 * gradient.float()) if scaled else (bad | gradient).float()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        fused = bool(optimizer.defaults.get("fused")) and not isinstance(trainer.strategy, Sharded)
        lag = self.lag if self.lag is not None else 2 if bad.is_cuda and (fused or scaled or self.policy == "stop") else 0
        if lag and fused and not scaled:
            optimizer.found_inf = bad  # torch's fused steps do nothing where it is 1
        here = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": trainer.fit_loop.batch_idx,
            "lr": optimizer.param_groups[-1]["lr"],
            "loss": loss,
        }
        self._pending.append((*_on_its_way(bad), here))
        if self.settle(trainer, lag) and not lag:
            for parameter in parameters:
                parameter.grad = None  # every optimizer leaves out what has no gradient

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.settle(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.settle(trainer)

    def settle(self, trainer: L.Trainer, lag: int = 0) -> bool:
        """Ask about all steps but the last `lag`; whether the last one asked about was bad."""
        last = False
        while len(self._pending) > lag:
            value, arrived, here = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            last = bool(value == 1)
            self._row = self._row + 1 if last else 0
            self._rescaled = self._rescaled + 1 if value == 0.5 else 0
            if last or self._rescaled > RESCALED:
                self._fault(trainer, here)
        return last

    def _fault(self, trainer: L.Trainer, here: dict[str, Any]) -> None:
        losses: list[float] = [0.0] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(losses, float(here["loss"]))
        else:
            losses = [float(here["loss"])]
        stops = self.policy == "stop" or self._row > self.in_a_row or self._rescaled > RESCALED
        self.skipped += not stops
        if not trainer.is_global_zero:
            if stops:
                raise SystemExit(2)  # the first rank says why
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)] or range(trainer.world_size)
        batches = range(here["batch"] - here["batch"] % trainer.accumulate_grad_batches, here["batch"] + 1)
        images = [index for rank in ranks for index in data.train_indices(here["epoch"], batches, rank=rank)]
        what = f"the loss is {losses[ranks[0]]}" if not math.isfinite(losses[ranks[0]]) else "the gradient is not finite"
        file = self.run / "nonfinite.jsonl"
        with file.open("a") as stream:
            stream.write(json.dumps({**here, "loss": [str(loss) for loss in losses], "images": images}) + "\n")
        few = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
        where = f"{what} at step {here['step']} (epoch {here['epoch']}, learning rate {here['lr']:g}) of training images {few}"
        if self.policy == "stop":
            cure = "lower optimizer.lr, or set recipe.clip_grad; faults.nonfinite=skip leaves such steps out"
        else:
            cure = f"{self._row} steps in a row, faults.nonfinite_in_a_row={self.in_a_row}; lower optimizer.lr, or set recipe.clip_grad"
        if stops:
            raise UserError(f"{where} (all in {file}); the checkpoints are from before it; {cure}")
        print(f"\nskipped: {where} (all in {file})", flush=True)


def _on_its_way(value: Tensor) -> tuple[Tensor, Any]:
    """A number of a device in the host's memory, and the event that says when it is there: to ask the device would wait for all that it
    has been given to do since."""
    if not value.is_cuda:
        return value, None
    here = torch.empty_like(value, device="cpu", pin_memory=True)
    here.copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return here, arrived


def _any_nonfinite(tensors: list[Tensor]) -> Tensor:
    """Whether a number in them is infinite or none, of sharded tensors in the parts that are here: a bool on their device."""
    here = [tensor.detach() for tensor in map(sharding.part, tensors) if tensor.numel()]
    found, one = (torch.full((1,), number, device=here[0].device if here else None) for number in (0.0, 1.0))
    for dtype in {tensor.dtype for tensor in here}:
        # What float16's scaler calls: one pass over all of them, which also multiplies them, here by 1.
        torch._amp_foreach_non_finite_check_and_unscale_([tensor for tensor in here if tensor.dtype == dtype], found, one)
    return found[0] > 0


class Throughput(Callback):
    """Training images a second over all devices: the median over epochs, the first left out where there are others."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]

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
