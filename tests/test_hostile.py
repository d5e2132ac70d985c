"""Files of somebody else's: pickles that would run code, addresses, configurations that name code. Refused by name, nothing executed."""

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tnt_lightning import create_model, dashboard, load_run, load_weights, report, runs
from tnt_lightning.data import CIFAR10
from tnt_lightning.data.shards import Chunk, Remote, open_shards
from tnt_lightning.errors import UserError
from tnt_lightning.evaluate import evaluate_run

from . import layouts
from .conftest import train

REFUSED = r"not a file of tensors and plain data, or a damaged one \("


class Bomb:
    """Makes a file where it is unpickled, in the current folder."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


class Armed(torch.nn.Module):
    """Whatever class of somebody's, whose state is a bomb."""

    def __reduce__(self):
        return (OrderedDict, (), {"state": Bomb()})


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("exploded*")), "what a file brought along was executed"


def write_bomb(kind: str, file: Path, whole: Path) -> None:
    """whole: a checkpoint of ours"""
    file.parent.mkdir(parents=True, exist_ok=True)
    inside = torch.load(whole, weights_only=True)
    named = OrderedDict(inside["state_dict"])
    if kind == "bare pickle":
        file.write_bytes(pickle.dumps(Bomb()))
    elif kind == "tar":
        with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                content = pickle.dumps(Bomb())
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    elif kind == "metadata of the weights":
        named._metadata = {"": {"version": Bomb()}}
        torch.save({**inside, "state_dict": named}, file)
    elif kind == "an attribute of a tensor":
        tensor = torch.nn.Parameter(torch.zeros(2))
        tensor.note = Bomb()
        torch.save({**inside, "state_dict": {**named, "backbone.head.bias": tensor}}, file)
    else:
        content = {
            "zip": Bomb(),
            "legacy": {**inside, "state_dict": Bomb()},
            "optimizer": {**inside, "optimizer_states": [{"state": {0: Armed()}, "param_groups": []}]},
            "callbacks": {**inside, "callbacks": {"EMA": Bomb()}},
            "namespace": {**inside, "args": argparse.Namespace(epochs=Bomb())},
            "function": {**inside, "hyper_parameters": {"act": os.system}},
        }[kind]
        torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")


KINDS = (
    "zip", "legacy", "tar", "bare pickle", "optimizer", "callbacks", "namespace", "function", "metadata of the weights",
    "an attribute of a tensor",
)  # fmt: skip


def test_the_bombs_are_live(tmp_path, finished):
    """Each would go off in a loader that trusts what it reads."""
    for kind in KINDS:
        write_bomb(kind, tmp_path / "x.pth", runs.checkpoint_path(finished, "last"))
        load = pickle.loads if kind in ("bare pickle", "tar") else None
        with tarfile.open(tmp_path / "x.pth") if kind == "tar" else io.BytesIO((tmp_path / "x.pth").read_bytes()) as file:
            if load:
                load(file.extractfile("pickle").read() if kind == "tar" else file.read())
            else:
                found = torch.load(file, weights_only=False)
                if kind == "function":
                    found["hyper_parameters"]["act"]("touch exploded")
        assert (tmp_path / "exploded").exists(), kind
        (tmp_path / "exploded").unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_not_executed_wherever_weights_are_read(tmp_path, finished, kind):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    write_bomb(kind, runs.checkpoint_path(run, "last"), runs.checkpoint_path(finished, "last"))
    shutil.copy(runs.checkpoint_path(run, "last"), runs.checkpoint_path(run, "best"))
    model = create_model("tnt_digits", in_chans=1, num_classes=10)
    for name in ("last", "best"):
        with pytest.raises(UserError, match=re.escape(f"{runs.checkpoint_path(run, name)}: not a file of tensors and plain data")):
            load_run(run, name)
    for name in ("x.ckpt", "x.pth", "x.pt", "x.safetensors", "x.bin", "x.pth.tar"):
        shutil.copy(runs.checkpoint_path(run, "last"), tmp_path / name)
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}: not a file of tensors and plain data, or a damaged one (")):
            load_weights(model, tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("door", ["evaluate run=", "evaluate weights=", "train resume=", "train weights="])
def test_a_pickle_is_not_executed_by_a_command(ended, tmp_path, finished, monkeypatch, kind, door):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # a trusting environment
    run, (name, key) = tmp_path / "run", door.split()
    shutil.copytree(finished, run)
    for file in ("last", "previous", "best"):
        write_bomb(kind, runs.checkpoint_path(run, file), runs.checkpoint_path(finished, "last"))
    for given in (run, runs.checkpoint_path(run, "last")):
        code, [line], err = ended(name, f"{key}{given}", *([f"hydra.run.dir={tmp_path / 'new'}"] if name == "train" else []))
        assert code == 2 and "Traceback" not in err
        assert re.match(rf"error: (\S+: no checkpoint is whole: )?{re.escape(str(run))}/checkpoints/(last|best)\.ckpt: {REFUSED}", line)


def test_a_repository_of_the_hub_is_not_executed(tmp_path, monkeypatch, finished):
    """Where it has no safetensors, timm reads its pickle."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--somebody--tnt" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    write_bomb("zip", snapshot / "pytorch_model.bin", runs.checkpoint_path(finished, "last"))
    card = dict(architecture="tnt_s_patch16_224", num_classes=1000, pretrained_cfg=dict(_target_="os.system", mean=[0.5] * 3))
    (snapshot / "config.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="hf-hub:somebody/tnt: ") as error:
        load_weights(create_model("tnt_s"), "hf-hub:somebody/tnt")
    assert "\n" not in str(error.value) and "weights_only=False" not in str(error.value)
    assert "pickle" in str(error.value).lower()


@pytest.mark.parametrize("door", ["evaluate", "train"])
def test_a_checkpoint_that_slurm_left_here_is_not_loaded(ended, tmp_path, finished, monkeypatch, door):
    """Under SLURM, Lightning looks for hpc_ckpt_*.ckpt in the current folder, and trusts it."""
    for name, value in dict(SLURM_NTASKS="1", SLURM_JOB_NAME="job", SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_LOCALID="0",
                            SLURM_NODEID="0", SLURM_NODELIST="localhost", SLURM_NTASKS_PER_NODE="1").items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write_bomb("zip", tmp_path / "hpc_ckpt_1.ckpt", runs.checkpoint_path(finished, "last"))
    if door == "evaluate":
        assert evaluate_run(str(finished), [])["test/top1"] == runs.result_of(finished)["test/top1"]
    else:
        assert train(tmp_path / "run", "+trainer.limit_train_batches=1")["epochs"] == 2


# ---- addresses


@pytest.fixture(scope="module")
def asked():
    """A server, and what it was asked for."""
    paths: list[str] = []

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            content = pickle.dumps(Bomb())
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", paths
        server.shutdown()


@pytest.mark.parametrize("door", [
    "evaluate run=", "evaluate weights=", "train weights=", "train resume=", "train data=imagenet data.root=",
    "train data=folder data.root=",
    "train data=cifar10 data.root=", "train data=imagenet_stream data.root=", "verify data=pets data.root=",
])  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_nothing_is_loaded_from_an_address(ended, tmp_path, asked, scheme, door):
    server, paths = asked
    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps(Bomb()))
    address = f"{scheme}://{tmp_path if scheme == 'file' else server}/bomb.ckpt"
    name, *before, key = door.split()
    own = [f"hydra.run.dir={tmp_path / 'new'}"] if name == "train" else []
    code, [line], err = ended(name, *before, f"{key}{address}", *own)
    assert code == 2 and "Traceback" not in err and not paths
    assert re.sub("/+", "/", address) in re.sub("/+", "/", line)


@pytest.mark.parametrize("scheme", ["http", "https", "HTTP", "file", "s3", "gs", "hf", "ftp", "memory", "simplecache::http"])
def test_no_kind_of_address_is_loaded_from(tmp_path, asked, scheme):
    server, paths = asked
    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps(Bomb()))
    address = f"{scheme}://{tmp_path if scheme == 'file' else server}/bomb.ckpt"
    for read in (load_run, lambda source: load_weights(create_model("tnt_digits"), source), lambda source: evaluate_run(source, [])):
        with pytest.raises(UserError, match=f"{re.escape(address)}: a URL is not loaded from"):
            read(address)
    assert not paths


# ---- a run directory of somebody's


@pytest.fixture
def theirs(tmp_path, finished):
    """(run directory, what changes its configuration)."""
    run = tmp_path / "theirs"
    shutil.copytree(finished, run)

    def change(key: str, value: object) -> Path:
        config = runs.config_of(finished)
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        return run

    return change


CODE = {"_target_": "os.system", "command": "touch exploded"}
TARGETS = ("os.system", "subprocess.Popen", "torch.hub.load", "builtins.eval", "hydra.utils.instantiate", "tnt_lightning.train.main")


@pytest.mark.parametrize("key, value", [
    *((f"{section}._target_", target) for section in ("model", "data") for target in (*TARGETS, CODE, None, 5, ["os.system"])),
    ("data._target_", "tnt_lightning.data.ImageDataModule"),
    ("data._target_", "tnt_lightning.data.shards.Remote"),
    ("model._target_", "tnt_lightning.models.create_model"),
    *(("model", {"_target_": "timm.create_model", "model_name": name}) for name in (
        "hf-hub:somebody/net", "hf_hub:somebody/net", "local-dir:/tmp/net", "https://example.org/net", CODE, ["tnt_s_patch16_224"], None)),
    *(("model", {"_target_": "timm.create_model", "model_name": "deit_small_patch16_224", knob: value}) for knob, value in (
        ("pretrained", True), ("pretrained_cfg", {"file": "x.pth"}), ("pretrained_cfg_overlay", {"url": "http://x"}),
        ("checkpoint_path", "x.pth"), ("cache_dir", "."), ("act_layer", CODE))),
    ("model._args_", ["touch exploded"]),
    ("model._partial_", True),
    ("model.depth", CODE),
    ("optimizer.opt", CODE),
    ("optimizer.opt", "os.system"),
    ("optimizer.lr", CODE),
    ("optimizer.param_group_fn", CODE),
    *((f"trainer.{key}", CODE) for key in ("strategy", "plugins", "logger", "profiler", "callbacks", "accelerator", "devices")),
    *((f"trainer.{key}", [CODE]) for key in ("plugins", "logger", "callbacks", "devices")),
    ("trainer.strategy", "os.system"),
    ("recipe.augmentation.rand_augment", CODE),
    ("data.augmentation.rand_augment", CODE),
    ("data.augmentation", CODE),
    ("data.interpolation", CODE),
    ("data.interpolation", "os.system"),
    ("data.mean", [CODE]),
    ("data.root", CODE),
    ("logger.name", CODE),
    ("hydra.callbacks.x", CODE),
    *((key, value) for key in ("recipe.interpolation", "data.root", "model.depth", "weights", "logger.project", "optimizer.new")
      for value in ("${oc.env:SECRET}", "x${oc.env:SECRET}", "${oc.decode:'{a: 1}'}", "${classes_in:/}", ["${oc.env:SECRET}"],
                    {"${oc.env:SECRET}": "${seed}"})),
], ids=str)  # fmt: skip
def test_a_configuration_of_somebodys_chooses_no_code(theirs, monkeypatch, key, value):
    monkeypatch.setenv("SECRET", "hunter2")
    run = theirs(key, value)
    with pytest.raises(UserError) as refused:
        evaluate_run(str(run), [])
    line = str(refused.value)
    assert key.split(".")[-1] in line, "the key is named"
    assert "\n" not in line and "hunter2" not in line
    if key.startswith("model"):
        with pytest.raises(UserError, match=r"^(model\.|depth=)"):
            load_run(run)


@pytest.mark.parametrize("text, said", [
    ("!!python/object/apply:os.system ['touch exploded']", "config.yaml cannot be read (could not determine a constructor for the tag"),
    ("model: !!python/object/new:os.system ['touch exploded']", "could not determine a constructor for the tag"),
    ("model: !!python/name:os.system ''", "could not determine a constructor for the tag"),
    ("model: !!python/module:antigravity ''", "could not determine a constructor for the tag"),
    ("model: &a {x: *a}\ndata: {}\nrecipe: {}\ntrainer: {}", "config.yaml"),
    ("model: {a: 2020-01-01, b: !!binary aGk=, c: !!set {x}}\ndata: {}\nrecipe: {}\ntrainer: {}", "config.yaml"),
    ("model: {1: x, null: y, [1, 2]: z}\ndata: {}\nrecipe: {}\ntrainer: {}", "config.yaml"),
    ("\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])
     + "\nmodel: {}\ndata: {}\nrecipe: {}\ntrainer: {}", "config.yaml"),
    ("PICKLE", "config.yaml"),
])  # fmt: skip
def test_a_configuration_file_is_plain_data(theirs, text, said):
    run = theirs("seed", 0)
    (run / "config.yaml").write_bytes(pickle.dumps(Bomb(), 0) if text == "PICKLE" else text.encode())
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        evaluate_run(str(run), [])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [pickle.dumps(Bomb(), 0), pickle.dumps(Bomb()), b'!!python/object/apply:os.system ["touch exploded"]'])
def test_a_result_and_a_dashboards_file_are_plain_data(ended, theirs, content):
    run = theirs("seed", 0)
    for name in ("result.json", dashboard.FILE, "skipped.jsonl"):
        (run / name).write_bytes(content)
    code, [line], _ = ended("evaluate", f"run={run}")
    assert code == 2 and f"{run / 'result.json'} is damaged" in line
    assert dashboard._read(run) == {}


@pytest.mark.parametrize("content", [pickle.dumps(Bomb(), 0), pickle.dumps(Bomb()), b'!!python/object/apply:os.system ["touch exploded"]'])
@pytest.mark.parametrize("name", ["sweep.json", "runs/seed=0/result.json", "runs/seed=0/config.yaml"])
def test_a_report_is_of_plain_data(monkeypatch, capsys, tmp_path, finished, name, content):
    sweep = tmp_path / "sweep"
    shutil.copytree(finished, sweep / "runs" / "seed=0")
    job = {"run": "runs/seed=0", "swept": ["seed=0"], "state": "finished"}
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [job]}))
    (sweep / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["report", str(sweep)])
    with contextlib.suppress(SystemExit):
        report.main()
    said = "".join(capsys.readouterr())
    assert Path(name).name in said and "Traceback" not in said


def test_a_dashboards_file_without_end_is_none(tmp_path):
    (tmp_path / dashboard.FILE).write_text("[" * 100_000)
    assert dashboard._read(tmp_path) == {}


# ---- data of somebody's


@pytest.mark.parametrize("content", [pickle.dumps(Bomb(), 0), pickle.dumps(Bomb()), b"!!python/name:os.system ''", b"[" * 100_000])
def test_a_manifest_is_plain_data(tmp_path, content):
    (tmp_path / "shards.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'shards.json'}: not a whole manifest")):
        open_shards(str(tmp_path), keep=1)


def test_the_cache_of_shards_deletes_nothing_but_shards(tmp_path):
    """Its folder may be named by a configuration that came with somebody's run."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)
    chunk = Chunk("train/chunk-0-0.bin", 100, "0" * 64, np.zeros((1, 3), np.uint32))
    place = Remote("s3://bucket/set", [chunk], keep=1, cache=tmp_path, limit=500)
    for name in ("0", "1"):
        (tmp_path / f"{name * 64}.bin").write_bytes(b"x" * 400)
    place._make_room(tmp_path / f"{'1' * 64}.bin")
    assert sorted(file.name[:3] for file in tmp_path.glob("*.bin")) == ["111", "pyt"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta"])
def test_cifars_files_are_plain_data(tmp_path, file, protocol):
    layouts.cifar10(tmp_path)
    place = tmp_path / "cifar-10-batches-py" / file
    place.write_bytes(pickle.dumps({"data": Bomb()}, protocol))
    with pytest.raises(UserError, match=re.escape(f"{place}: not a batch of arrays (it asks for ") + r"(posix|nt)\.system"):
        CIFAR10(root=str(tmp_path), num_classes=10).setup()


@pytest.mark.parametrize("code", [
    b"cnumpy\nload\n(S'x'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",  # an attribute of what is allowed
    b"\x80\x04\x8c\x05numpy\x8c\x0bcore.umath.\x93.",
    b"\x80\x02\x82\x01.",  # the registry of extensions
    b"Pid\n.",  # a persistent id
])  # fmt: skip
def test_cifars_files_reach_no_more_than_arrays(tmp_path, code):
    layouts.cifar10(tmp_path)
    place = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    place.write_bytes(code)
    with pytest.raises(UserError, match=re.escape(f"{place}: not a batch of arrays (")):
        CIFAR10(root=str(tmp_path), num_classes=10).setup()


@pytest.mark.parametrize("batch", [{"data": 5, "labels": 6}, {"data": [[1] * 3072] * 2, "labels": 7}, {"data": None, "labels": [1]}])
def test_cifars_files_of_other_data_are_said(tmp_path, batch):
    layouts.cifar10(tmp_path)
    for i in range(1, 6):
        (tmp_path / "cifar-10-batches-py" / f"data_batch_{i}").write_bytes(pickle.dumps(batch))
    with pytest.raises(UserError, match="data_batch_1 is not of this data set"):
        CIFAR10(root=str(tmp_path), num_classes=10).setup()
