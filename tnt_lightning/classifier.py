"""The LightningModule: trains any backbone that maps images to logits. It sees no knob of any model."""

import re
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tnt_lightning.errors import UserError, did_you_mean
from tnt_lightning.models.parts import head_modules, head_parameters


class Classifier(L.LightningModule):
    """Cross-entropy on hard or mixed labels; AdamW and the like with linear warm-up and cosine decay, by step (paper, Table 3).

    optimizer: arguments of timm's create_optimizer_v2 (opt, lr, weight_decay, ...); no decay on biases, norms, class token, positions.
        With layer_decay each layer's whole schedule is scaled, from warmup_lr to min_lr
    warmup_epochs, warmup_lr: linear from warmup_lr to lr; min_lr: where the cosine ends
    label_smoothing: of the training loss only
    head_epochs: so many epochs train the head alone

    Parameters without requires_grad stay as they are. Parts of which nothing is trained, frozen or before head_epochs are over, are as
    in evaluation: no batch statistics, no drop path.

    Logs train/loss (of the first rank's share) and lr (with layer_decay that of the head) by step; val/ and test/ loss, top1 and top5 by
    epoch: in percent, on hard labels, exact on any number of devices.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        optimizer: Mapping[str, Any],
        warmup_epochs: float = 5,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        label_smoothing: float = 0.1,
        head_epochs: int = 0,
    ):
        super().__init__()
        self.backbone = backbone
        self.optimizer = dict(optimizer)
        self.warmup_epochs, self.warmup_lr, self.min_lr = warmup_epochs, warmup_lr, min_lr
        self.label_smoothing, self.head_epochs = label_smoothing, head_epochs
        self.val, self.test = Figures(num_classes), Figures(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = F.cross_entropy(self(images), targets, label_smoothing=self.label_smoothing)
        if self.trainer._logger_connector.should_update_logs:  # the calls take a millisecond, on steps whose figures nobody keeps, too
            self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
            self.log("lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups), batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._count(self.val, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._count(self.test, batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val", self.val)

    def on_test_epoch_end(self) -> None:
        self._report("test", self.test)

    def _count(self, figures: "Figures", batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        figures.update(self(images).float(), labels)

    def _report(self, part: str, figures: "Figures") -> None:
        # Already summed over the ranks.
        for name, value in figures.compute().items():
            self.log(f"{part}/{name}", value, prog_bar=name == "top1", sync_dist=True)

    def make_optimizer(self, *, fused: bool) -> Optimizer:
        """timm's, over the backbone; fused=False: without torch's fused step even where the recipe asks for it."""
        arguments = self.optimizer if fused else {name: value for name, value in self.optimizer.items() if name != "fused"}
        try:
            return create_optimizer_v2(self.backbone, **arguments)
        except (TypeError, ValueError) as error:
            opt = self.optimizer["opt"]
            if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
                known = [f"optimizer.{name}" for name in arguments if name != unknown[1]]
                near = did_you_mean(f"optimizer.{unknown[1]}", known, f"{opt} takes no such argument")
                raise UserError(f"optimizer.{unknown[1]}={arguments[unknown[1]]}: no such key{near}") from None
            if "registry" in str(error):
                names = map(str, list_optimizers())
                raise UserError(
                    f"optimizer.opt={opt}: timm has no such optimizer{did_you_mean(opt, names, 'the paper has adamw')}"
                ) from None
            raise UserError(f"optimizer ({opt}): {error}") from None

    def configure_optimizers(self):
        total = int(self.trainer.estimated_stepping_batches)
        if total < 1:
            raise UserError("no training step is left; raise trainer.limit_train_batches or trainer.max_steps")
        # torch's fused step may unscale gradients itself, so Lightning does not clip before it under mixed precision.
        clips_mixed = self.trainer.gradient_clip_val and str(self.trainer.precision).endswith("-mixed")
        optimizer = self.make_optimizer(fused=not clips_mixed)
        self._plan = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        warmup = round(total * self.warmup_epochs / (self.trainer.max_epochs or 1))
        scheduler = CosineLRScheduler(
            optimizer, t_initial=total - warmup, lr_min=self.min_lr, warmup_t=warmup, warmup_lr_init=self.warmup_lr,
            warmup_prefix=True, t_in_epochs=False,
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The schedule is a function of the step, and the plan is that of this run's configuration: nothing of it is restored.
        checkpoint["lr_schedulers"] = [{} for _ in checkpoint.get("lr_schedulers", [])]

    def on_train_start(self) -> None:
        for group, plan in zip(self.trainer.optimizers[0].param_groups, self._plan, strict=True):
            group.update(plan)
        self.lr_scheduler_step(self.lr_schedulers(), None)

    def on_train_epoch_start(self) -> None:
        """What is not trained in this epoch into evaluation mode, all else into training mode."""
        backbone = self.backbone.train()
        if self.current_epoch < self.head_epochs:
            backbone.eval()
            for name in head_modules(backbone):
                backbone.get_submodule(name).train()
        for module in backbone.modules():
            own = [parameter.requires_grad for parameter in module.parameters()]
            if own and not any(own):
                module.eval()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.current_epoch < self.head_epochs:
            # Every optimizer leaves out what has no gradient: no decay, no momentum. To turn requires_grad off and on would be less work,
            # but DDP fixes what it sums when it starts.
            head = head_parameters(self.backbone)
            for name, parameter in self.backbone.named_parameters():
                if name not in head:
                    parameter.grad = None

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)  # timm's schedules are told the step, torch's count it


class Figures(nn.Module):
    """Loss, top-1 and top-5 over an epoch. With fewer than five classes, top5 is of as many as there are."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.loss = MeanMetric()
        hits: dict[str, Metric | MetricCollection] = {
            f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)
        }
        self.hits = MetricCollection(hits, compute_groups=False)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.hits.update(logits, labels)

    def compute(self) -> dict[str, Tensor]:
        """loss, and top1 and top5 in percent, over all ranks; starts anew."""
        figures = {"loss": self.loss.compute(), **{name: 100 * value for name, value in self.hits.compute().items()}}
        self.loss.reset()
        self.hits.reset()
        return figures
