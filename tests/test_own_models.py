"""A backbone of the user's own: a YAML of theirs, a module on their Python path, and their word that it may be built."""

import sys

import pytest
import torch
import yaml

from tnt_lightning import load_run, load_weights, runs
from tnt_lightning.build import build_classifier
from tnt_lightning.errors import UserError
from tnt_lightning.evaluate import evaluate_run
from tnt_lightning.models import build_model
from tnt_lightning.models.own import ALLOWED

from .conftest import resolved
from .test_sweeps import SHORT, Sweep

NETS = """
import os
from collections import OrderedDict
from torch import nn
from torch.hub import load

class Perceptron(nn.Module):
    def __init__(self, *, width, num_classes, image_size=8, in_chans=1, says="logits"):
        super().__init__()
        self.knobs, self.says = nn.Identity(), says
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * image_size**2, width), nn.GELU(), nn.Linear(width, num_classes))

    def forward(self, images):
        logits = self.layers(images)
        return logits if self.says == "logits" else {"logits": logits}

def narrow(num_classes):
    return Perceptron(width=2, num_classes=num_classes)

def nothing():
    return 5

five = 5
open("imported", "a").close()
"""
MINE = """
# @package _global_
image_size: 8
model:
  _target_: my_nets.Perceptron
  width: 16
  image_size: ${image_size}
  num_classes: ${data.num_classes}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with my_nets.py, which is on the Python path, and confs/model/mine.yaml."""
    (tmp_path / "my_nets.py").write_text(NETS)
    (tmp_path / "confs" / "model").mkdir(parents=True)
    (tmp_path / "confs" / "model" / "mine.yaml").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_nets", None)  # so that the next test sees whether it is imported


@pytest.mark.slow
def test_it_is_swept_measured_and_loaded_like_any_other(mine, monkeypatch, capsys):
    overrides = [override for override in SHORT if not override.startswith("model.")]
    sweep = Sweep(mine, "--config-dir", "confs", "model=mine", "model.width=4,8", *overrides, **{ALLOWED: "my_nets"})
    assert "2 finished" in sweep.ended(0)
    run = sweep.folder / "model.width=4"
    with pytest.raises(UserError, match=f"'my_nets.Perceptron' is not built from a config; .* where {ALLOWED}=MODULE names its module"):
        evaluate_run(str(run), [])  # somebody else's run, as far as this process was told

    monkeypatch.setenv(ALLOWED, "my_nets")
    result = runs.result_of(run)
    assert evaluate_run(str(run), [])["test/top1"] == pytest.approx(result["test/top1"])
    assert result["parameters"] == 64 * 4 + 4 + 4 * 10 + 10 and result["flops"] == 64 * 4 + 4 * 10
    model = load_run(run)
    assert model.layers[1].out_features == 4 and isinstance(model.knobs, torch.nn.Identity)
    assert load_weights(model, run).changes == []
    with pytest.raises(UserError, match=r"weights of another network \(width=8, the model has 4\)"):
        load_weights(model, sweep.folder / "model.width=8")


@pytest.mark.parametrize("allow", ["", "other", "my", "my_nets.Perceptron", "my_nets_too,torch.nn"])
def test_nothing_is_imported_that_was_not_named(mine, monkeypatch, allow):
    monkeypatch.setenv(ALLOWED, allow)
    with pytest.raises(UserError, match="is not built from a config"):
        build_model(_target_="my_nets.Perceptron", width=2, num_classes=10)
    assert not (mine / "imported").exists()


@pytest.mark.slow
def test_a_file_cannot_name_it(mine, finished, tmp_path, monkeypatch):
    """The word is of the environment: whatever a configuration holds, nothing of it counts as one."""
    monkeypatch.delenv(ALLOWED, raising=False)
    config = runs.config_of(finished)
    config |= {ALLOWED: "my_nets", "env": {ALLOWED: "my_nets"}, "model": {"_target_": "my_nets.narrow", "num_classes": 10}}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes((finished / "checkpoints" / "last.ckpt").read_bytes())
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    for use in (load_run, lambda run: evaluate_run(str(run), [])):
        with pytest.raises(UserError):
            use(tmp_path / "run")
    assert not (mine / "imported").exists()


def test_a_function_of_ones_own_and_what_does_not_fit(mine, monkeypatch):
    monkeypatch.setenv(ALLOWED, "other, my_nets")
    assert build_model(_target_="my_nets.narrow", num_classes=3).layers[-1].out_features == 3
    for target, knobs, says in [
        ("my_nets.Perceptron", dict(wide=3), r"my_nets.Perceptron does not take these keys \(missing a required .*'width'"),
        ("my_nets.Perceptron", dict(width=3, num_classes=2, wide=3), "does not take these keys .*'wide'"),
        ("my_nets.Percepton", {}, "my_nets has no class or function Percepton"),
        ("my_nets.five", {}, "my_nets has no class or function five"),
        ("my_nets.nothing", {}, "my_nets.nothing gives a int, no torch.nn.Module"),
        ("my_nets.load", dict(repo_or_dir="somebody/something", model="anything"), "comes from torch.hub; .* does not name that"),
        ("my_nets.os.system", dict(command="true"), "no module my_nets.os on the Python path; PYTHONPATH=FOLDER adds a folder"),
        ("other.Net", {}, "no module other on the Python path"),
        ("other.deeper.Net", {}, "no module other.deeper on the Python path"),
    ]:
        with pytest.raises(UserError, match=says):
            build_model(_target_=target, **knobs)


def test_what_it_gives_must_be_logits_of_the_classes(mine, monkeypatch):
    monkeypatch.setenv(ALLOWED, "my_nets")
    config = resolved()
    right = {"_target_": "my_nets.Perceptron", "width": 4, "num_classes": 10}
    build_classifier({**config, "model": right})
    with pytest.raises(UserError, match=r"gives the shape \(2, 7\) for 2 images; a backbone gives logits, \(2, 10\)"):
        build_classifier({**config, "model": {**right, "num_classes": 7}})
    with pytest.raises(UserError, match="gives a dict for 2 images"):
        build_classifier({**config, "model": {**right, "says": "more"}})
