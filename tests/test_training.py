"""Training itself: the schedule, the averages, the figures, and that runs repeat."""

import csv
import itertools
import shutil
import subprocess
import sys
import time

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import nn

from tnt_lightning import runs
from tnt_lightning.callbacks import EMA, Checkpoints
from tnt_lightning.classifier import Classifier
from tnt_lightning.data import Digits
from tnt_lightning.errors import UserError
from tnt_lightning.models import create_model

from .conftest import QUICK, resolved, train

PLAIN = ("recipe.augmentation.degrees=0", "recipe.augmentation.shift=0", "recipe.augmentation.zoom=0")


def weights(run, name="last", key="state_dict"):
    return torch.load(runs.checkpoint_path(run, name), weights_only=True)[key]


def metrics(run, column):
    return [float(row[column]) for row in csv.DictReader((run / "metrics.csv").open()) if row.get(column)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def any_backbone():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def fit(classifier, *callbacks, epochs=2, **data):
    torch.set_num_threads(1)  # tensors this small are slower on two
    module = Digits(num_classes=10, in_chans=1, image_size=8, mean=0.0, std=1.0, crop_pct=1.0, num_workers=0, **{"batch_size": 64, **data})
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(classifier, datamodule=module)
    return trainer, module


ADAMW = dict(opt="adamw", lr=1e-3, weight_decay=0.05)


def test_schedule_is_linear_warm_up_then_cosine_by_step():
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[1]["lr"])

    fit(Classifier(any_backbone(), num_classes=10, optimizer=ADAMW, warmup_epochs=1), Watch(), epochs=4)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        reference,
        [
            torch.optim.lr_scheduler.LinearLR(reference, start_factor=1e-3, total_iters=19),
            torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=3 * 19, eta_min=1e-5),
        ],
        milestones=[19],
    )
    want = []
    for _ in range(4 * 19):
        want.append(reference.param_groups[0]["lr"])
        reference.step()
        schedule.step()
    assert rates == pytest.approx(want, rel=1e-6)
    assert rates[0] == pytest.approx(1e-6) and rates[19] == pytest.approx(1e-3)


def test_the_average_is_that_of_the_raw_weights_with_a_warm_up():
    raw = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            raw.append(module.backbone[1].weight.detach().double().clone())

    classifier = Classifier(any_backbone(), num_classes=10, optimizer=ADAMW, warmup_epochs=0)
    ema = EMA(decay=0.9)
    fit(classifier, Watch(), ema, epochs=5)
    average = raw[0]
    for step, current in enumerate(raw[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * current
    assert len(raw) == 5 * 19
    got = classifier.backbone[1].weight  # training ends on the average
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), average, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(got.double(), raw[-1], atol=1e-4)


def test_validation_in_training_is_of_the_average_and_gives_the_raw_weights_back():
    seen = {"trained": [], "validated": [], "next": []}

    class Watch(Callback):
        def keep(self, when, module):
            seen[when].append(module.backbone[1].weight.detach().clone())

        def on_train_epoch_start(self, trainer, module):
            self.keep("next", module)

        def on_validation_epoch_start(self, trainer, module):
            self.keep("validated", module)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 18:
                self.keep("trained", module)

    fit(Classifier(any_backbone(), num_classes=10, optimizer=ADAMW, warmup_epochs=0), EMA(decay=0.9), Watch(), epochs=2)
    assert not torch.equal(seen["trained"][0], seen["validated"][0])
    assert torch.equal(seen["trained"][0], seen["next"][1])


def test_figures_are_those_of_the_whole_set():
    classifier = Classifier(any_backbone(), num_classes=10, optimizer=ADAMW, warmup_epochs=0)
    trainer, data = fit(classifier, epochs=1, batch_size=50)
    trainer.validate(classifier, datamodule=data, verbose=False)
    batches = [data.batch_transform(*batch, training=False) for batch in data.val_dataloader()]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = classifier(images)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)  # classes before the right one
    got = trainer.callback_metrics
    assert got["val/top1"].item() == pytest.approx(100 * (ranks < 1).double().mean().item(), abs=1e-4)
    assert got["val/top5"].item() == pytest.approx(100 * (ranks < 5).double().mean().item(), abs=1e-4)
    assert got["val/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_three_classes_have_a_top5_of_all():
    classifier = Classifier(nn.Identity(), num_classes=3, optimizer=ADAMW)
    classifier.val.update(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert classifier.val.compute()["top5"] == 100


def test_weight_decay_spares_biases_norms_class_token_and_positions():
    backbone = create_model("tnt_digits", in_chans=1, num_classes=10)
    trainer, _ = fit(Classifier(backbone, num_classes=10, optimizer=ADAMW, warmup_epochs=0), epochs=1)
    names = {id(p): n for n, p in backbone.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in trainer.optimizers[0].param_groups}
    assert groups[0] == {
        n for n in names.values() if n in ("cls_token", "sentence_position", "word_position") or "norm" in n or n.endswith("bias")
    }
    assert groups[0] | groups[0.05] == set(names.values())


def test_the_same_seed_gives_the_same_bits_with_any_number_of_workers(tmp_path):
    mix = ("+recipe.augmentation.mixup=0.8", "recipe.drop_path_rate=0.1", "+trainer.limit_train_batches=5")
    for name, more in dict(a=(), b=(), workers=("data.num_workers=2",), other=("seed=1",)).items():
        train(tmp_path / name, *mix, *more)
    for key in ("state_dict", "current_model_state"):
        a, b, workers, other = (weights(tmp_path / name, key=key) for name in ("a", "b", "workers", "other"))
        assert same(a, b) and same(a, workers) and not same(a, other)
    assert metrics(tmp_path / "a", "train/loss") == metrics(tmp_path / "b", "train/loss")
    assert metrics(tmp_path / "a", "val/loss") == metrics(tmp_path / "b", "val/loss")


def test_accumulation_takes_the_same_steps(tmp_path):
    short = (*PLAIN, "recipe.ema_decay=null")
    train(tmp_path / "whole", *short, "+trainer.limit_train_batches=3")
    train(tmp_path / "halves", *short, "+trainer.limit_train_batches=6", "trainer.accumulate_grad_batches=2")
    whole, halves = (weights(tmp_path / name) for name in ("whole", "halves"))
    assert max((whole[n] - halves[n]).abs().max() for n in whole) < 1e-5


@pytest.mark.slow
def test_the_default_job_learns_the_digits(tmp_path):
    """The goal of the default recipe: no seed under 97% (experiments/digits holds five)."""
    from tnt_lightning.train import train

    assert train(resolved("trainer.enable_progress_bar=false"), tmp_path / "run")["test/top1"] >= 97


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_optimizers_lower_the_loss(tmp_path, optimizer):
    train(tmp_path / "run", f"optimizer={optimizer}", "recipe.label_smoothing=0")
    losses = metrics(tmp_path / "run", "train/loss")
    assert len(losses) == 38 and sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_mixed_precision_clips_and_keeps_weights_and_average_in_float32(tmp_path, optimizer):
    """What a GPU takes by default, here on the CPU: bfloat16 with the digits' clipping and torch's fused optimizers."""
    result = train(tmp_path / "run", f"optimizer={optimizer}", "trainer.precision=bf16-mixed", "+trainer.limit_train_batches=3")
    assert result["precision"] == "bf16-mixed"
    for key in ("state_dict", "current_model_state"):
        assert {tensor.dtype for tensor in weights(tmp_path / "run", key=key).values()} == {torch.float32}


def test_without_a_validation_part_the_last_average_is_the_result(tmp_path):
    result = train(tmp_path / "run", "data.val_fraction=0")
    assert result["checkpoint"] == "last" and "test/top1" in result and "val/top1" not in result
    assert {f.name for f in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    averaged, raw = (weights(tmp_path / "run", key=key) for key in ("state_dict", "current_model_state"))
    assert not same(averaged, raw)


def test_of_equal_validation_figures_the_later_checkpoint_is_best(tmp_path):
    """With a learning rate of nothing every epoch is as good as the first."""
    train(tmp_path / "run", "optimizer.lr=1e-12", "recipe.min_lr=0", "recipe.warmup_lr=0", "recipe.epochs=3")
    assert weights(tmp_path / "run", "best", key="epoch") == 2


def test_last_is_the_last_epoch_where_an_earlier_one_was_best(tmp_path):
    class Falling(Classifier):
        def on_validation_epoch_end(self):
            self.log("val/top1", 90.0 - self.current_epoch)

    fit(Falling(any_backbone(), num_classes=10, optimizer=ADAMW, warmup_epochs=0), Checkpoints(tmp_path), epochs=3)
    epochs = {name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["epoch"] for name in ("best", "last")}
    assert epochs == {"best": 0, "last": 2}


def test_clipping_reaches_the_gradients(tmp_path):
    still = ("optimizer=sgd", "optimizer.weight_decay=0", "recipe.ema_decay=null", "recipe.epochs=2", "+trainer.limit_train_batches=2")
    train(tmp_path / "free", *still)
    train(tmp_path / "clipped", *still, "recipe.clip_grad=1e-9")
    train(tmp_path / "start", *still, "optimizer.lr=1e-12", "recipe.min_lr=0", "recipe.warmup_lr=0")
    start, free, clipped = (weights(tmp_path / name) for name in ("start", "free", "clipped"))
    assert max((clipped[n] - start[n]).abs().max() for n in start) < 1e-7 < max((free[n] - start[n]).abs().max() for n in start)


def test_weights_start_another_run(tmp_path, finished):
    train(tmp_path / "run", f"weights={finished}", "optimizer.lr=1e-12", "recipe.min_lr=0", "recipe.warmup_lr=0", "recipe.ema_decay=null")
    best = weights(finished, "best")
    assert all(torch.allclose(tensor, best[name], atol=1e-6) for name, tensor in weights(tmp_path / "run").items())


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """Cut off after an epoch and continued in another directory: weights, average, optimizer, best checkpoint."""
    plan = ("recipe.epochs=4", "recipe.drop_path_rate=0.1", "+recipe.augmentation.mixup=0.8")
    whole = train(tmp_path / "whole", *plan)
    arguments = [*QUICK, *plan, f"hydra.run.dir={tmp_path / 'cut'}"]
    child = subprocess.Popen([sys.executable, "-m", "tnt_lightning.train", *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            weights(tmp_path / "cut")
            break
        except (OSError, RuntimeError, EOFError):  # not there, or not whole
            time.sleep(0.02)
    child.kill()
    child.wait()
    done = weights(tmp_path / "cut", key="epoch") + 1
    assert done < 4, "the run ended before it was killed"
    resumed = train(tmp_path / "resumed", *plan, f"resume={tmp_path / 'cut'}")
    for name, key in itertools.product(("last", "best"), ("state_dict", "current_model_state")):
        assert same(weights(tmp_path / "resumed", name, key), weights(tmp_path / "whole", name, key)), (name, key)
    for column in ("train/loss", "val/loss"):
        assert metrics(tmp_path / "resumed", column) == metrics(tmp_path / "whole", column), "from the first step on"
    assert {k: v for k, v in resumed.items() if "/" in k} == {k: v for k, v in whole.items() if "/" in k}


@pytest.mark.slow
def test_resume_of_a_moved_run_keeps_its_best_checkpoint_and_takes_the_new_plan(tmp_path, finished):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    fade = ("recipe.min_lr=0", "recipe.warmup_lr=0", "optimizer.lr=1e-9", "optimizer.weight_decay=1e9", "recipe.epochs=3")
    result = train(tmp_path / "run", f"resume={moved}", *fade)  # the third epoch takes everything that was learned
    assert result["epochs"] == 3 and result["steps"] == 3 * 19
    rates = metrics(tmp_path / "run", "lr")
    assert len(rates) == 3 * 19 and 0 < max(rates[-19:]) < 1e-9, "the last third of a cosine from 1e-9 to 0"
    assert same(weights(tmp_path / "run", "best"), weights(finished, "best"))
    assert {group["weight_decay"] for group in weights(tmp_path / "run", key="optimizer_states")[0]["param_groups"]} == {0, 1e9}


@pytest.mark.slow
def test_a_run_without_validation_and_from_weights_is_continued_by_the_same_overrides(tmp_path, finished, capsys):
    same = (f"weights={finished}", "+trainer.limit_val_batches=0")
    train(tmp_path / "cut", *same)
    assert not runs.checkpoint_path(tmp_path / "cut", "best").exists()
    capsys.readouterr()
    result = train(tmp_path / "run", *same, f"resume={tmp_path / 'cut'}", "recipe.epochs=3")
    assert result["epochs"] == 3 and "weights " not in capsys.readouterr().out, "its own weights go on"


def test_resume_says_what_it_cannot_continue(tmp_path, finished):
    for overrides, message in (
        ([f"resume={finished}"], "trained for 2 epochs already; raise recipe.epochs"),
        ([f"resume={finished}", "recipe.epochs=3", "words_per_patch=16"], "model.words_per_patch=16: the run to continue had 4; that is"),
        ([f"resume={finished / 'checkpoints' / 'lst.ckpt'}"], "lst.ckpt: no such checkpoint"),
        ([f"resume={finished}", "recipe.epochs=3", "seed=1"], "seed=1: the run to continue had 0"),
        ([f"resume={finished}", "recipe.epochs=3", "data.batch_size=32"], "data.batch_size=32: the run to continue had 64"),
        ([f"resume={finished}", "recipe.epochs=3", "recipe.ema_decay=null"], "an average"),
        ([f"resume={finished}", "recipe.epochs=3", "optimizer=sgd"], "optimizer.opt=sgd: the run to continue had adamw"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_an_average_in_half_precision_is_refused(tmp_path):
    with pytest.raises(UserError, match="trainer.precision=bf16-true: .* try bf16-mixed"):
        train(tmp_path / "run", "trainer.precision=bf16-true")


def test_sizes_are_those_of_the_data_not_of_the_model(tmp_path):
    """Any backbone: DeiT knows no knob of TNT."""
    result = train(
        tmp_path / "run",
        "model=deit_s",
        "image_size=32",
        "+model.patch_size=8",
        "+model.embed_dim=24",
        "+model.depth=1",
        "+trainer.limit_train_batches=2",
    )
    assert 0 <= result["test/top1"] <= 100


def test_batches_run_whole(tmp_path):
    assert train(tmp_path / "run", "data.batch_size=100")["steps"] == 2 * (1222 // 100)


def test_every_metric_of_a_run_is_finite(finished):
    for column in ("train/loss", "val/loss", "val/top1", "val/top5", "lr"):
        values = metrics(finished, column)
        assert values and all(itertools.starmap(lambda v: v == v and abs(v) < 1e6, [(v,) for v in values]))


def test_the_training_loss_is_smoothed():
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, *_):
            losses.append((outputs["loss"].item(), F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.3).item()))

    still = dict(opt="sgd", lr=1e-12)
    classifier = Classifier(any_backbone(), num_classes=10, optimizer=still, warmup_epochs=0, min_lr=0, label_smoothing=0.3)
    torch.nn.init.normal_(classifier.backbone[3].weight, std=3)
    fit(classifier, Watch(), epochs=1)
    assert all(logged == pytest.approx(want, rel=1e-4) for logged, want in losses)


def test_every_step_draws_anew():
    shares = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, *_):
            shares.append(round(batch[1].max(1).values.min().item(), 4))

    fit(Classifier(any_backbone(), num_classes=10, optimizer=ADAMW, warmup_epochs=0), Watch(), epochs=1, augmentation=dict(mixup=0.8))
    assert len(shares) == 19 and len(set(shares)) > 15
