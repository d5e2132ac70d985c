"""An infinite loss or gradient: the step does not touch the weights, and a person reads where it was."""

import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from tnt_lightning.callbacks import EMA, Checkpoints, Finite
from tnt_lightning.checkpoints import read
from tnt_lightning.classifier import Classifier
from tnt_lightning.errors import UserError

from .conftest import command
from .test_training import ADAMW, any_backbone, fit


class Poison(Callback):
    """Infinite or not a number in these steps: the pixels, and with them all; the loss alone; or the gradient alone."""

    def __init__(self, *steps, what=math.nan, where="pixels"):
        self.steps, self.what, self.where = steps, what, where

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.steps and self.where == "pixels":
            batch[0].fill_(self.what)

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step in self.steps and self.where == "loss":
            loss.data.fill_(self.what)

    def on_after_backward(self, trainer, module):
        if trainer.global_step in self.steps and self.where == "gradient":
            next(module.parameters()).grad[0, 0] = self.what


def classifier(**optimizer):
    torch.manual_seed(0)
    return Classifier(any_backbone(), num_classes=10, optimizer={**ADAMW, **optimizer}, warmup_epochs=0)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["pixels", "loss", "gradient"])
def test_training_stops_before_the_step(tmp_path, what, where):
    module, before = classifier(), {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            before.update(state(module))

    with pytest.raises(UserError) as error:
        fit(module, Poison(23, what=what, where=where), Watch(), EMA(decay=0.9), Finite(tmp_path), Checkpoints(tmp_path))
    rate = f"{json.loads((tmp_path / 'nonfinite.jsonl').read_text())['lr']:g}"
    what = "the gradient is not finite" if where == "gradient" else f"the loss is {what if where == 'loss' else math.nan}"
    assert str(error.value).startswith(f"{what} at step 23 (epoch 1, learning rate {rate}) of training images ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items()), "the weights of the step before"
    for name in ("last", "best"):
        checkpoint = read(tmp_path / f"{name}.ckpt")
        assert checkpoint["position"]["step"] == 19
        assert all(tensor.isfinite().all() for key in ("state_dict", "current_model_state") for tensor in checkpoint[key].values())


def test_the_images_of_the_batch_are_named(tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 23:
                seen.extend([trainer.datamodule.parts.train.labels, batch[1].tolist()])

    with pytest.raises(UserError):
        fit(classifier(), Watch(), Poison(23), Finite(tmp_path))
    labels, theirs = seen
    images = json.loads((tmp_path / "nonfinite.jsonl").read_text())["images"]
    assert len(images) == 64 and [int(labels[i]) for i in images] == theirs


@pytest.mark.parametrize("optimizer", [ADAMW, {**ADAMW, "fused": True}, dict(opt="lamb", lr=1e-3), dict(opt="sgd", lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("lag", [None, 2])
def test_a_skipped_step_leaves_weights_and_momenta_alone(tmp_path, optimizer, lag):
    """With a lag, as on a GPU, the fused optimizers leave the step out by themselves, and nobody waits for the answer."""
    if lag and not optimizer.get("fused"):
        optimizer = {**optimizer, "fused": True} if optimizer["opt"] == "sgd" else {**ADAMW, "fused": True}
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            momenta = trainer.optimizers[0].state_dict()["state"]
            seen.append((state(module), json.dumps(momenta, default=lambda tensor: tensor.tolist())))

    module, finite = classifier(**optimizer), Finite(tmp_path, policy="skip", lag=lag)
    trainer, _ = fit(module, Poison(5, 6, 20), Watch(), finite)
    for step in range(1, 38):
        same = all(torch.equal(tensor, seen[step - 1][0][name]) for name, tensor in seen[step][0].items())
        assert same == (step in (5, 6, 20)) and (seen[step][1] == seen[step - 1][1]) == same, step
    assert finite.skipped == 3 and trainer.global_step == 38
    assert [json.loads(line)["step"] for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()] == [5, 6, 20]


@pytest.mark.parametrize("lag", [None, 2])
def test_at_most_so_many_steps_in_a_row_are_skipped(tmp_path, lag):
    fused = {**ADAMW, "fused": True}
    fit(classifier(**fused), Poison(3, 4, 5, 7, 8, 9), Finite(tmp_path, policy="skip", in_a_row=3, lag=lag))
    with pytest.raises(UserError, match="4 steps in a row, faults.nonfinite_in_a_row=3"):
        fit(classifier(**fused), Poison(3, 4, 5, 6), Finite(tmp_path, policy="skip", in_a_row=3, lag=lag))


def test_with_a_lag_training_stops_with_weights_that_were_not_touched(tmp_path):
    module, before = classifier(fused=True), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            before.append(state(module))

    with pytest.raises(UserError, match="the loss is nan at step 23"):
        fit(module, Poison(23, 24, 25, 26), Watch(), Finite(tmp_path, lag=2), Checkpoints(tmp_path))
    assert all(torch.equal(tensor, before[22][name]) for name, tensor in module.state_dict().items())


def test_with_a_lag_a_step_that_another_optimizer_took_is_in_no_checkpoint(tmp_path):
    """One that is not fused takes it, and up to two more; what is said is where it began."""
    with pytest.raises(UserError, match="the loss is nan at step 23"):
        fit(classifier(), Poison(23), EMA(decay=0.9), Finite(tmp_path, lag=2), Checkpoints(tmp_path, every_n_steps=2))
    checkpoint = read(tmp_path / "last.ckpt")
    assert checkpoint["position"]["step"] == 22
    assert all(tensor.isfinite().all() for key in ("state_dict", "current_model_state") for tensor in checkpoint[key].values())


def test_float16_whose_gradients_never_become_finite_stops(tmp_path):
    """Its scaler leaves steps out on its way to a fitting scale, which takes it sixteen at most."""

    class Scaled(Poison):
        """The CPU has no float16 training: that there is a scaler is all that is looked at, and here it leaves steps out."""

        def on_train_start(self, trainer, module):
            trainer.precision_plugin.scaler = self

        def on_before_optimizer_step(self, trainer, module, optimizer):  # after Finite
            if trainer.global_step in self.steps:
                for parameter in module.parameters():
                    parameter.grad = None

    fit(classifier(), Finite(tmp_path), Scaled(*range(5, 40), what=math.inf, where="gradient"), epochs=3)
    with pytest.raises(UserError, match="the gradient is not finite at step 45"):
        fit(classifier(), Finite(tmp_path), Scaled(*range(5, 99), what=math.inf, where="gradient"), epochs=4)


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path):
    class Ruin(Callback):
        def on_train_epoch_end(self, trainer, module):
            nn.init.constant_(module.backbone[1].weight, math.inf)

    with pytest.raises(UserError, match="the weights are no longer finite at step 19"):
        fit(classifier(), Ruin(), Checkpoints(tmp_path))
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.slow
def test_a_learning_rate_that_explodes_ends_in_one_line(tmp_path):
    explode = ("optimizer=sgd", "optimizer.lr=1e4", "recipe.clip_grad=null", "recipe.epochs=2", "recipe.warmup_epochs=0", "logger=csv")
    done = command("train", *explode, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "optimizer.lr" in errors[0] and "Traceback" not in done.stderr, done.stderr
