"""`trainer=fsdp`: in parts while it trains, and in everything that is written the same as whole."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch

from tnt_lightning import load_run, runs, sharding
from tnt_lightning.build import build_trainer
from tnt_lightning.checkpoints import read
from tnt_lightning.errors import UserError
from tnt_lightning.evaluate import evaluate_run

from . import soak
from .conftest import resolved
from .processes import START_S, TWO, Started

SHORT = (*soak.SHORT, *TWO, "checkpoint.every_n_steps=2")
# Training that says of each rank, after an epoch, how many numbers of the network, of its average and of the optimizer's state are there.
SAYS = """
import os
from tnt_lightning import callbacks, train
from tnt_lightning.sharding import part

def said(self, trainer, module):
    average = next(one for one in trainer.callbacks if isinstance(one, callbacks.EMA))._average_model.module
    momenta = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
    held = [sum(part(tensor).numel() for tensor in some) for some in (module.parameters(), average.parameters(), momenta)]
    if trainer.current_epoch == 1:
        os.write(1, f"\\nheld {held[0]} {held[1]} {held[2]}\\n".encode())

callbacks.Finite.on_train_epoch_start = said
train.main()
"""
# Training of which one rank has a loss that is not finite.
POISONED = """
from tnt_lightning import classifier, train
step = classifier.Classifier.training_step
def poisoned(self, batch, index):
    return step(self, batch, index) * (float("nan") if self.trainer.global_step == 5 and self.global_rank == 1 else 1)
classifier.Classifier.training_step = poisoned
train.main()
"""


class Run:
    """A run of two processes on the CPU."""

    def __init__(self, place: Path, *overrides: str, script: Path | None = None):
        self.place, out = place, place.with_suffix(".out")
        code = [str(script)] if script else ["-m", "tnt_lightning.train"]
        self.process = Started([*code, *SHORT, *overrides, f"hydra.run.dir={place}"], cwd=place.parent, out=out, err=out)

    def ended(self, code: int = 0) -> "Run":
        assert self.process.ends(START_S) == code, self.said
        return self

    def stopped(self) -> "Run":
        """In the middle of its second epoch."""
        curves = self.place / "metrics.csv"
        self.process.until(lambda: len(soak.lines(curves)) >= 1 + 8 + 1 + 3).send(signal.SIGTERM)
        return self.ended(143)

    @property
    def said(self) -> str:
        return self.place.with_suffix(".out").read_text()

    def copy(self, name: str) -> Path:
        shutil.copy(self.place.with_suffix(".out"), self.place.with_name(name).with_suffix(".out"))
        return Path(shutil.copytree(self.place, self.place.with_name(name)))


def largest_difference(one: Path, other: Path) -> float:
    """Between the tensors of two runs' checkpoints, of which all else is the same."""
    a, b = (read(runs.checkpoint_path(run, "last")) for run in (one, other))
    for checkpoint in (a, b):
        checkpoint["position"].pop("seconds")
        checkpoint["callbacks"].pop("Throughput")
    pairs = []

    def walk(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            a, b = list(a.values()), [b[key] for key in a]
        if isinstance(a, list | tuple):
            for x, y in zip(a, b, strict=True):
                walk(x, y)
        elif isinstance(a, torch.Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            pairs.append((a, b))
        elif not isinstance(a, float):
            assert a == b

    walk(a, b)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


@pytest.mark.slow
def test_sharded_training_is_that_of_ddp_with_half_of_everything_on_each_device(tmp_path):
    """And each goes on with what the other has written."""
    (tmp_path / "says.py").write_text(SAYS)
    ddp = Run(tmp_path / "ddp", script=tmp_path / "says.py").ended()
    sharded = Run(tmp_path / "sharded", "trainer=fsdp", script=tmp_path / "says.py").ended()
    size = runs.result_of(ddp.place)["parameters"]
    whole, parts = ([list(map(int, found)) for found in re.findall(r"^held (\d+) (\d+) (\d+)$", run.said, re.M)] for run in (ddp, sharded))
    assert whole == [[size] * 3] * 2
    assert len(parts) == 2 and sum(parts[0] + parts[1]) == 3 * size and all(abs(2 * n / size - 1) < 0.1 for n in parts[0]), parts

    assert largest_difference(ddp.place, sharded.place) < 1e-5
    one, other = (json.loads((run.place / "result.json").read_text()) for run in (ddp, sharded))
    for name in ("val/loss", "val/top1", "test/loss", "test/top1", "steps", "devices", "checkpoint"):
        assert one[name] == pytest.approx(other[name], abs=2e-5), name
    assert evaluate_run(str(sharded.place), ["trainer.devices=1", "trainer.strategy=auto"])["test/loss"] == pytest.approx(
        other["test/loss"]
    )
    assert load_run(sharded.place).num_classes == 10

    cut = Run(tmp_path / "cut", "trainer=fsdp").stopped()
    by_ddp = Run(cut.copy("by_ddp")).ended()
    assert "changed trainer.strategy=auto, was fsdp" in by_ddp.said and largest_difference(ddp.place, by_ddp.place) < 1e-5
    Run(cut.place, "trainer=fsdp").ended()
    assert largest_difference(sharded.place, cut.place) == 0
    by_sharded = Run(Run(tmp_path / "cut_ddp").stopped().place, "trainer=fsdp").ended()
    assert largest_difference(sharded.place, by_sharded.place) < 1e-5


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_sharded_training_in_one_line(tmp_path):
    (tmp_path / "poisoned.py").write_text(POISONED)
    run = Run(tmp_path / "run", "trainer=fsdp", script=tmp_path / "poisoned.py").ended(2)
    assert "Traceback" not in run.said and run.said.count("error: the loss is nan at step 5 (epoch 0, ") == run.said.count("error: ") == 1


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(UserError, match=r"trainer.strategy=fsdp: the model keeps running statistics \(BatchNorm\)"):
        sharding.refuse(timm.create_model("resnet18"))
    sharding.refuse(timm.create_model("vit_tiny_patch16_224"))
    with pytest.raises(UserError, match="trainer.strategy=fsdp: not in trainer.precision=16-mixed; try bf16-mixed or 32-true"):
        build_trainer(resolved("trainer=fsdp", "trainer.precision=16-mixed"))


@pytest.mark.parametrize(
    "name, parts",
    [("vit_tiny_patch16_224", 12), ("resnet18", 8), ("convnext_atto", 4), ("tnt_s_patch16_224", 12)],
)
def test_the_blocks_of_a_network_are_its_parts(name, parts):
    assert len(sharding._blocks(timm.create_model(name))) == parts
