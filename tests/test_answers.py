"""A user's mistake gets one line that names the key or file, the value and the cure, and exit code 2; a bug of ours keeps its traceback."""

import copy
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tnt_lightning import CONF
from tnt_lightning.build import build_classifier, build_data, build_trainer
from tnt_lightning.cli import answer
from tnt_lightning.config import check, keys_of
from tnt_lightning.errors import UserError

from .conftest import command, compose

MODELS = ", ".join(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
TNTS = ", ".join(name for name in MODELS.split(", ") if name.startswith("tnt_"))
RELEASED = "deit_b, deit_s, deit_ti, regnety_16gf, regnety_8gf, resnet152, resnet50, tnt_b, tnt_s"
MISTAKES = {
    # a misspelt key, with + and without
    "modle.depth=3": "modle.depth=3: no such key; did you mean model.depth?",
    "+modle.depth=3": "modle.depth=3: no such key; did you mean model.depth?",
    "optimizer.lrr=1": "optimizer.lrr=1: no such key; did you mean optimizer.lr?",
    "+optimizer.lrr=1": "optimizer.lrr=1: no such key; did you mean optimizer.lr?",
    "+trainer.max_epoch=3": "trainer.max_epoch=3: no such key; did you mean trainer.max_epochs or trainer.min_epochs?",
    "+data.bath_size=3": "data.bath_size=3: no such key; did you mean data.batch_size or data.image_size?",
    "+model.dpeth=3": "model.dpeth=3: no such knob; did you mean model.depth?",
    "+recipe.augmentation.mixupp=1": "recipe.augmentation.mixupp=1: no such key; did you mean recipe.augmentation.mixup?",
    "epochs=3": "epochs=3: no such key; did you mean recipe.epochs?",
    "+lr=0.1": "lr=0.1: no such key; did you mean optimizer.lr?",
    "+heads=3": "heads=3: no such key; did you mean inner_heads?",
    "modle=tnt_s": "modle=tnt_s: no such key; did you mean model?",
    "+modle=tnt_s": "modle=tnt_s: no such key; did you mean model?",
    "+recipe.foo=1": "recipe.foo=1: no such key; there are epochs, batch_size",
    "+optimizer.foo=1": "optimizer.foo=1: no such key; adamw takes no such argument",
    "model=deit_s +model.foo=1": "model.model_name=deit_small_patch16_224: ",
    "trainer.max_steps=9": "trainer.max_steps=9: not among the arguments that conf/trainer/ names; did you mean trainer.max_epochs?; +",
    "trainer.limit_val_batches=9": "trainer.limit_val_batches=9: not set in this configuration; +trainer.limit_val_batches=9 adds it",
    "trainer.max_epoch=9": "trainer.max_epoch=9: not among the arguments that conf/trainer/ names; did you mean trainer.max_epochs?; +",
    "recipe.augmentation.mixup=1": "recipe.augmentation.mixup=1: not set in this configuration; +recipe.augmentation.mixup=1 adds it",
    "model=timm model.name=tnt": "model.name='tnt' is no model of timm ",
    "model=pvt_small image_size=40": "image_size=40: 40 is not a multiple of 32, the pixels from one token to the next; try 32 or 64",
    # an unknown option, with the list
    "model=tnt_xl": f"model=tnt_xl not found; available: {MODELS}",
    "data=cifar": "data=cifar not found; available: cifar10, cifar100, digits, flowers, folder, imagenet, imagenet_stream, inat2018",
    "optimizer.opt=adamm": "optimizer.opt=adamm: timm has no such optimizer; did you mean adam or ",
    "recipe.interpolation=cubic": "recipe.interpolation=cubic is not one of nearest, bilinear, bicubic, lanczos",
    "position_encoding=words": "position_encoding='words' is not one of 'none', 'sentence', 'word', 'both'",
    "+recipe.augmentation.rand_augment=foo": "recipe.augmentation.rand_augment=foo: no policy of timm's; the paper's is rand-m9",
    "trainer.precision=bf15": "trainer.precision=bf15: Precision 'bf15' is invalid.",
    "trainer.strategy=abc": "trainer.strategy=abc: ",
    "trainer.precision=99": "trainer.precision=99 is not text or a whole number from 1 to 64",
    # a wrong type, or out of range
    "optimizer.lr=abc": "optimizer.lr=abc is not a number from 0 to 10000",
    "seed=-1": "seed=-1 is not a whole number from 0 to",
    "recipe.epochs=1.5": "recipe.epochs=1.5 is not a whole number from 1 to 1,000,000,000",
    "recipe.ema_decay=1.5": "recipe.ema_decay=1.5 is not a number from 0 to 1 or auto or null",
    "weights=2024": "weights=2024 is not text or null; quote it: weights=\"'2024'\"",
    "se=maybe": "se='maybe' is neither true nor false",
    "model.global_pool=": "model.global_pool='': logits for each token, of which a classifier cannot be trained; try token or avg",
    "data/x.y=2": "data/x.y=2: not of the form KEY=VALUE",
    "seed=???": "seed=???: no value; give one, or null where there is to be none",
    "seed=${nowhere}": "seed: Interpolation key 'nowhere' not found",
    # larger than anything
    "image_size=100000": "image_size=100000 is not a whole number from 1 to 65,536",
    "image_size=[60000,60000] position_encoding=none": "data.batch_size=64: the pixels of 64 images of image_size=[60000, 60000] take",
    "model.outer_dim=49152 model.depth=24": "model: ",
    "image_size=[32768,32768]": "image_size=[32768, 32768]: ",
    "model.depth=9999": "depth=9999 is more than can be built; at most 1,000",
    "optimizer.lr=1e38": "optimizer.lr=1e+38 is not a number from 0 to 10000",
    "trainer.devices=99999": "trainer.devices=99999 is not a whole number from -1 to 1024 or text or a list of device numbers",
    # a knob that the model lacks, does not fit, or is at odds
    "model=deit_s inner_heads=2": f"inner_heads=2: model=deit_s has no such knob; models that have it: {TNTS}",
    "model=deit_s +inner_heads=2": f"inner_heads=2: model=deit_s has no such knob; models that have it: {TNTS}",
    "inner_heads=5": "inner_heads=5 does not divide inner_dim=24; try one of [1, 2, 3, 4, 6, 8, 12, 24]",
    "words_per_patch=5": "words_per_patch=5 does not cut a patch of patch_size=4 into equal squares; try one of [1, 4, 16]",
    "tnt_blocks=[5]": "tnt_blocks=[5] does not name distinct blocks from 1 to depth=3; try [1, 3], or null for all",
    "image_size=9": "image_size=9: 9 is not a multiple of patch_size=4; try 8 or 12",
    "model=deit_s image_size=9": "image_size: the model does not take 1 x 9 x 9 pixels (",
    "model.inner_heads=3": "model.inner_heads=3 is at odds with inner_heads=2; set inner_heads alone, without `model.`",
    "model.num_classes=11": "model.num_classes=11 is at odds with data.num_classes=10; set data.num_classes alone",
    "data.image_size=16": "data.image_size=16 is at odds with image_size=8; set image_size alone",
    # weights, runs and data that are not there, or others
    "weights=/nowhere": "/nowhere: no such run directory or file; weights also come from hf-hub:OWNER/NAME, or as `released`",
    "weights=released": f"weights=released: timm publishes {RELEASED} with the knobs of conf/model/; this network is none of them",
    "weights=https://example.org/x.pth": "https://example.org/x.pth: a URL is not loaded from",
    "resume=/nowhere": "/nowhere: no such run directory",
    "data=imagenet": "data.root is not set; give the folder that holds the images: data.root=/path/to/them; get it from https://image-net",
    "data=cifar10": "data.root is not set; give the folder that holds the images: data.root=/path/to/them; get it from https://www.cs.toro",
    "data=folder": "data.root is not set; give the folder that holds train/ and val/, or a folder for each class: data.root=/path",
    "data=folder data.root=/nowhere": "data.root=/nowhere: no such folder",
    "data=pets data.root=/nowhere": "/nowhere/oxford-iiit-pet/annotations/trainval.txt: no such file, nor annotations/trainval.txt in "
    "/nowhere; get it from https://www.robots.ox.ac.uk/~vgg/data/pets/; data.download=true fetches it",
    "data=inat2018 data.year=2017": "data.year=2017 is not a whole number from 2018 to 2019",
    "data.download=true": "data.download=true: Digits is not to be downloaded",
    "data.on_error=ignore": "data.on_error=ignore is not one of stop, skip",
    "data.cache=maybe": "data.cache=maybe is not true or false",
    "data=imagenet data.root=/nowhere": "/nowhere/train: no such folder; expected /nowhere/train/CLASS/IMAGE",
    "data.num_classes=11": "data.num_classes=11: the set has 10 classes; set data.num_classes=10",
    # no step to take, a batch that does not divide
    "+trainer.limit_train_batches=0": "no training step is left; raise trainer.limit_train_batches or trainer.max_steps",
    "+trainer.max_steps=0": "no training step is left; raise trainer.limit_train_batches or trainer.max_steps",
    "+trainer.val_check_interval=20": "trainer.val_check_interval=20: an epoch has 19 batches; lower it, or give a share of the epoch: 0.5",
    "+trainer.val_check_interval=1.5": "trainer.val_check_interval=1.5: ",
    "+trainer.fast_dev_run=true": "trainer.fast_dev_run: it writes no checkpoint to take figures of; trainer=debug runs a few batches",
    "recipe.epochs=0": "recipe.epochs=0 is not a whole number from 1 to 1,000,000,000",
    "recipe.warmup_epochs=60": "recipe.warmup_epochs=60 is not shorter than trainer.max_epochs=60; lower it",
    "trainer.accumulate_grad_batches=5": "data.batch_size=64 does not divide among 1 device(s) x 5 accumulation step(s); try 60 or 65",
    "data.batch_size=5000": "data.batch_size=5000 is larger than the training set of 1222 images; lower it",
    "+trainer.logger=true": "trainer.logger=True: set by the framework itself; leave it out",
    # the command line itself
    "logger=null": "logger=null: logger= takes the name of a file: csv, none, wandb",
    "model=[tnt_s,[1]]": "model=[tnt_s,[1]]: model= takes the name of a file: deit_b, deit_s, deit_ti,",
    "~logger": "logger: missing, or not a section of keys; a run needs logger=NAME",
    "~recipe.ema_decay": "recipe.ema_decay: missing; a run needs it",
    "~data.batch_size": "data.batch_size: missing; a run needs it",
    "inner_heads": "inner_heads: not of the form KEY=VALUE",
    "inner_heads=1,2": "inner_heads=1,2: several values are a sweep; start it with -m first: python -m tnt_lightning.train -m inner_heads",
    "ablation=se seed=3": "ablation=se is a sweep of several runs; start it with -m: python -m tnt_lightning.train -m ablation=se seed=3",
    "data.root=~/images": "data.root=~/images: Hydra does not read such a value bare; quote it: data.root=\"'~/images'\"",
    "data.root=/a=b": "data.root=/a=b: Hydra does not read such a value bare; quote it: data.root=\"'/a=b'\"",
    "recipe.lr=0.001": "recipe.lr is a rate for each optimizer; set optimizer.lr for the rate of this run",
}


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """What a command says on stderr before it ends with exit code 2; in this process, as imports take most of a command's time."""

    def call(name: str, *arguments: str) -> str:
        main = import_module(f"tnt_lightning.{name}").main
        silent = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        if name == "train":
            silent.append(f"hydra.run.dir={tmp_path / 'run'}")
        monkeypatch.setattr(sys, "argv", [f"/somewhere/tnt_lightning/{name}.py", *arguments, *silent])
        monkeypatch.setattr(os, "environ", os.environ.copy())
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(said, tmp_path, arguments):
    line = said("train", *arguments.split())
    assert line.startswith(f"error: {MISTAKES[arguments]}") and line.count("\n") == 1
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "nothing to measure; name a run, run=outputs/..., or weights for a model: model=tnt_s weights=released data=..."),
        (["run={run}", "model=tnt_s"], "model=tnt_s: of a finished run only data.*, trainer.* and kernel can be changed"),
        (["run={run}", "data.bath_size=3"], "data.bath_size=3: no such key; did you mean data.batch_size"),
        (["run={run}", "data.batch_size=abc"], "data.batch_size=abc is not a whole number from 1 to 16,777,216"),
        (["run={run}", "data.mean=[a]"], "data.mean=[a] is not a number from -10000 to 10000 or [a number from -10000 to 10000]"),
        (["run={run}", "data.crop_pct=-1"], "data.crop_pct=-1 is not a number from 0.01 to 1"),
        (["run={run}", "data.image_size=16"], "data.image_size=16 is at odds with image_size=8"),
        (["run={run}", "data.in_chans=3"], "model.in_chans=1 is at odds with data.in_chans=3"),
        (["run={run}", "trainer.max_epochs=abc"], "trainer.max_epochs=abc is not a whole number from 1 to 1,000,000,000"),
        (["run={run}", "trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0 is not a whole number"),
        (["run={run}", "trainer.devices=3", "trainer.accelerator=cpu"], "data.batch_size=64 does not divide among 3 device(s)"),
        (["run=5"], "{cwd}/5: no such run directory"),
        (["weights={run}", "resume=x"], "resume= and ablation= are of training"),
        (["run=/nowhere"], "/nowhere: no such run directory"),
        (["run={run}/checkpoints/lst.ckpt"], "{run}/checkpoints/lst.ckpt: no such checkpoint"),
        (["model=tnt_s", "weights={run}"], "{run}/checkpoints/best.ckpt: weights of another network (inner_heads=2, the model has 4)"),
        (["weights={run}", "data.num_classes=11"], "{run}/checkpoints/best.ckpt: head starts anew: 10 classes there, 11 here; fine-tune"),
    ],
)
def test_evaluate_answers_too(said, finished, arguments, line):
    answered = said("evaluate", *(argument.format(run=finished) for argument in arguments))
    assert re.match(
        re.escape(f"error: {line.format(run=finished, cwd=os.getcwd())}").replace("best\\.ckpt", r"(best|last)\.ckpt"), answered
    )
    assert answered.count("\n") == 1


@pytest.mark.slow
def test_a_refused_run_takes_only_its_own_away(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("mine.log", "notes.txt"):
        (tmp_path / "run" / name).touch()
    done = command("train", "inner_heads=5", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2 and sorted(path.name for path in (tmp_path / "run").iterdir()) == ["mine.log", "notes.txt"]
    done = command("evaluate", "weights=/nowhere", cwd=tmp_path / "run")
    assert done.returncode == 2 and len(list((tmp_path / "run").iterdir())) == 2


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    done = command("train", "trainer=debug", f"hydra.run.dir={tmp_path / 'file' / 'run'}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'file' / 'run'}: the run directory cannot be made")


@pytest.mark.parametrize(
    "content, line",
    [
        (b"foo: [\n", "{file}, line 2: expected the node content"),
        (b"\xff\xfe", "not composed: "),
        (b"", "experiment={{}}: a file of experiment/ begins with the line `# @package _global_`"),
    ],
)
def test_a_broken_file_of_ones_own(said, tmp_path, content, line):
    file = tmp_path / "mine" / "experiment" / "bad.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    answered = said("train", "--config-dir", str(tmp_path / "mine"), "experiment=bad")
    assert answered.startswith(f"error: {line.format(file=file)}") and answered.count("\n") == 1


def built(config) -> None:
    """All that a run builds before it starts."""
    OmegaConf.resolve(config)
    check(config, "the model")
    plain = OmegaConf.to_container(config)
    build_data(plain)
    with torch.device("meta"):
        build_classifier(plain)
    build_trainer(plain)


FREE = {"data.root", "weights", "resume", "logger.project", "logger.entity", "logger.group", "recipe.lr.sgd", "recipe.lr.lamb"}


@pytest.mark.parametrize("value", ["abc", "???", "a\nb", {"a": 1}, [[]]], ids=repr)
def test_every_key_refuses_what_it_cannot_be(value):
    """But for free text and for the rates of optimizers that are not chosen."""
    slipped = []
    whole, groups = compose(), {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    keys = [key for key in keys_of(whole) if not key.startswith("grid") and key not in groups]
    assert len(keys) > 80
    for key in keys:
        config, error = copy.deepcopy(whole), None
        OmegaConf.update(config, key, value, merge=False)
        try:
            built(config)
            slipped.append(key)
        except (UserError, OmegaConfBaseException) as caught:
            error = caught
        assert error is None or "\n" not in answer(error, [f"{key}={value}"])
    assert set(slipped) <= (set() if value == "???" else FREE if isinstance(value, str) else {"recipe.lr.sgd", "recipe.lr.lamb"})


# ---- bugs


def script(tmp_path, body: str, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "buggy.py").write_text(f"from tnt_lightning.cli import command\n@command()\ndef main(config):\n    {body}\nmain()\n")
    env = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "TNT_LIGHTNING_SHORT_ERRORS")}
    return subprocess.run([sys.executable, "buggy.py", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "body, error",
    [
        ("raise ValueError('a bug')", "ValueError: a bug"),
        ("config.pop('seed')", "ConfigTypeError: DictConfig in struct mode does not support pop"),  # OmegaConf's, in our code
        ("open('/nowhere')", "FileNotFoundError"),
    ],
)
def test_a_bug_keeps_its_traceback(tmp_path, body, error):
    done = script(tmp_path, body, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" in done.stderr and error in done.stderr and 'buggy.py", line 4' in done.stderr


def test_a_bug_in_one_job_of_a_sweep_leaves_the_others_and_shows_its_traceback(tmp_path):
    body = "print('job', config.seed) if config.seed else 1 / 0"
    done = script(tmp_path, body, "-m", "seed=0,1,2", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert "job 1" in done.stdout and "job 2" in done.stdout
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_a_mistake_keeps_its_traceback_for_who_asks(tmp_path):
    env = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    line = [sys.executable, "-m", "tnt_lightning.train", "ablation=se", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr
