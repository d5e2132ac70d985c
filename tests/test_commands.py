"""The commands as people type them, each in a process of its own."""

import csv
import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tnt_lightning import CONF, load_run, runs
from tnt_lightning.data import Digits
from tnt_lightning.errors import UserError

from .conftest import QUICK, command, train

PLAIN = ("recipe.augmentation.degrees=0", "recipe.augmentation.shift=0", "recipe.augmentation.zoom=0")


# ---- a run is a directory


def test_a_run_leaves_everything_behind(finished):
    result = runs.result_of(finished)
    assert result["checkpoint"] == "best"
    for part in ("val", "test"):
        assert 0 < result[f"{part}/top1"] <= result[f"{part}/top5"] <= 100 and result[f"{part}/loss"] > 0
    assert result["parameters"] == 397_642 and result["flops"] > 2e6 and result["images_per_s"] > 0
    assert result["steps"] == 2 * 19 and result["seed"] == 0 and result["wall_s"] > 0
    assert {"commit", "device", "versions", "python"} <= result.keys() and result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (finished / ".hydra" / "overrides.yaml").exists()
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["inner_heads"] == 2
    table = (finished.parent / "stdout.txt").read_text()
    for words in (
        f"{result['test/top1']:.2f} %",
        "test top-5",
        "parameters",
        "FLOPs",
        "images/s",
        str(finished),
        "tnt_lightning.evaluate run=",
    ):
        assert words in table


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_are_tensors_and_plain_data_with_raw_and_averaged_weights(finished, name):
    checkpoint = torch.load(runs.checkpoint_path(finished, name), weights_only=True)
    averaged, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert averaged.keys() == raw.keys() and all(tensor.dtype == torch.float32 for tensor in averaged.values())
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw)
    assert checkpoint["optimizer_states"] and checkpoint["lr_schedulers"]


def test_load_rebuilds_the_model_that_gave_the_figures(finished):
    model = load_run(finished)
    data = Digits(num_classes=10, in_chans=1, image_size=8, mean=0.0, std=1.0, crop_pct=1.0, num_workers=0)
    data.setup()
    images, labels = (
        torch.cat(parts) for parts in zip(*(data.batch_transform(*b, training=False) for b in data.test_dataloader()), strict=True)
    )
    with torch.no_grad():
        hits = (model(images).argmax(1) == labels).double().mean().item()
    assert not model.training and 100 * hits == pytest.approx(runs.result_of(finished)["test/top1"], abs=1e-4)
    by_file = load_run(runs.checkpoint_path(finished, "best"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), by_file.state_dict().values(), strict=True))


def test_evaluate_gives_the_same_figures_to_the_digit(finished):
    done = command("evaluate", f"run={finished}", cwd=finished.parent)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"(test|val)/(loss|top1|top5)\s*\D\s*([\d.]+)\s*\D\s*([\d.]+)", done.stdout)
    assert len(rows) == 6 and all(now == recorded for *_, now, recorded in rows), done.stdout


def test_what_is_no_run_is_said(tmp_path, finished):
    for path, message in (
        (tmp_path / "nothing", "no such run directory"),
        (tmp_path, "has no checkpoint 'last'; it has none"),
        ("https://example.org/last.ckpt", "a URL is not loaded from"),
    ):
        with pytest.raises(UserError, match=message):
            load_run(path)
    with pytest.raises(UserError, match="has no checkpoint 'lst'; it has best, last"):
        load_run(finished, "lst")


def test_a_pickle_is_not_executed(tmp_path, finished):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    torch.save({"state_dict": Bomb()}, runs.checkpoint_path(tmp_path, "last"))
    with pytest.raises(UserError, match="not a file of tensors and plain data"):
        load_run(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_network_are_listed(tmp_path, finished):
    other = ("position_encoding=sentence", "se=true", "model.outer_dim=48")
    lists = (
        r"weights of another network \(missing: blocks.\*.outer.se.expand.bias \(x3\), .*; unexpected: word_position; "
        r"of another shape: .*cls_token \(1, 1, 96\) for \(1, 1, 48\).*\)"
    )
    with pytest.raises(UserError, match=lists):
        train(tmp_path / "run", f"weights={finished}", *other)


@pytest.mark.slow
def test_a_directory_with_a_run_is_not_written_over(finished):
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file() and file.name != "train.log"}
    for overrides, code, words in (
        ((), 0, "is finished; nothing is left to train"),
        (("seed=1", "inner_heads=3"), 2, "holds a finished run of another configuration (seed=1, was 0; "),
        (("resume=false",), 2, "already holds a run; choose another hydra.run.dir"),
    ):
        done = command("train", *QUICK, *overrides, f"hydra.run.dir={finished}", cwd=finished.parent)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stdout + done.stderr
        assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file() and file.name != "train.log"} == before


# ---- several devices


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_count_every_image(tmp_path):
    short = (*PLAIN, *QUICK, "+trainer.limit_train_batches=4", "trainer.accelerator=cpu")
    done = command("train", *short, "trainer.devices=2", f"hydra.run.dir={tmp_path / 'two'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "64 = 32 a device x 2 device(s) x 1 accumulation" in done.stdout
    train(tmp_path / "one", *short)
    one, two = (torch.load(runs.checkpoint_path(tmp_path / run, "last"), weights_only=True) for run in ("one", "two"))
    for key in ("state_dict", "current_model_state"):  # the average, and the raw weights
        assert max((one[key][n] - two[key][n]).abs().max() for n in one[key]) < 1e-4
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["devices"] == 2
    for part, size in (("val", 216), ("test", 359)):  # an odd number of images on two ranks
        hits = result[f"{part}/top1"] / 100 * size
        assert hits == pytest.approx(round(hits), abs=1e-4)
    again = command("evaluate", f"run={tmp_path / 'two'}", "trainer.devices=1", cwd=tmp_path)
    rows = re.findall(r"(?:test|val)/top\d\s*\D\s*([\d.]+)\s*\D\s*([\d.]+)", again.stdout)
    assert len(rows) == 4 and all(now == recorded for now, recorded in rows), again.stdout + again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_several_processes_give_the_figures_of_one_to_the_last_image(finished, devices, tmp_path):
    """216 and 359 images: three ranks get 119 or 120 of the latter."""
    done = command(
        "evaluate", f"run={finished}", f"trainer.devices={devices}", "trainer.accelerator=cpu", "data.batch_size=66", cwd=tmp_path
    )
    rows = re.findall(r"((?:test|val)/\w+)\s*\D\s*([\d.]+)\s*\D\s*([\d.]+)", done.stdout)
    assert len(rows) == 6, done.stdout + done.stderr
    for name, now, recorded in rows:
        assert float(now) == pytest.approx(float(recorded), rel=1e-5) if "loss" in name else now == recorded, name


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    done = command("train", "trainer.accelerator=cpu", "trainer.devices=3", "data.batch_size=64", cwd=tmp_path)
    assert done.returncode == 2 and "error: data.batch_size=64 does not divide among 3 device(s)" in done.stderr


# ---- sweeps


def test_a_sweep_of_inner_heads(tmp_path):
    done = command("train", "-m", "inner_heads=1,2,4,6", "trainer=debug", "logger=csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for heads in (1, 2, 4, 6):
        run = tmp_path / "multirun" / "inner_heads=1,2,4,6,trainer=debug,logger=csv" / f"inner_heads={heads}"
        assert (run / ".hydra" / "config.yaml").exists()
        _, seen = load_run(run).explain(torch.zeros(1, 1, 8, 8))
        assert seen.inner[1].shape == (4, heads, 4, 4)


@pytest.mark.slow
def test_in_a_sweep_by_hydras_own_launcher_the_other_jobs_go_on(tmp_path):
    basic = ("hydra/launcher=basic", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    done = command("train", "-m", "inner_heads=5,2", "trainer=debug", *basic, cwd=tmp_path)
    assert done.returncode == 2 and "inner_heads=5 does not divide inner_dim=24" in done.stderr and "Traceback" not in done.stderr
    assert "test/top1" in runs.result_of(tmp_path / "sweep" / "inner_heads=2")
    assert not (tmp_path / "sweep" / "inner_heads=5" / "result.json").exists()


@pytest.mark.slow
def test_an_ablation_sweeps_its_grid(tmp_path):
    done = command("train", "-m", "ablation=tnt_blocks", "trainer=debug", f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    blocks = {"null": None, "1-3": [1, 3], "1": [1]}
    assert {name: runs.config_of(tmp_path / "sweep" / f"tnt_blocks={name}")["tnt_blocks"] for name in blocks} == blocks


def test_an_ablation_of_several_models_at_once_is_refused(tmp_path):
    for models in ("tnt_s,tnt_ti", "glob(tnt_*)"):
        done = command("train", "-m", "ablation=se", f"model={models}", f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path)
        assert done.returncode == 2 and f"model={models} beside ablation=se: each model has a grid of its own" in done.stderr
    done = command("train", "-m", "ablation=se", "model=deit_s", cwd=tmp_path)
    assert done.returncode == 2 and "ablation=se: this model has no grid for se; models that have one: tnt_b" in done.stderr


def test_evaluate_sets_recorded_figures_beside_those_of_the_same_checkpoint_only(finished, capsys):
    from tnt_lightning.evaluate import evaluate_run

    recorded = {}
    for name in ("best", "last"):
        evaluate_run(str(runs.checkpoint_path(finished, name)), [])
        rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if "/top" in line or "/loss" in line]
        recorded[name] = [cell.strip() for *_, cell in rows]
    assert len(recorded["best"]) == 6 and all(recorded["best"]) and recorded["last"] == [""] * 6


def test_evaluate_changes_what_does_not_change_the_model(finished, capsys):
    from tnt_lightning.evaluate import evaluate_run

    few = evaluate_run(str(finished), ["data.batch_size=50", "+trainer.limit_test_batches=1"])
    assert few["val/top1"] == runs.result_of(finished)["val/top1"] and few["test/top1"] * 50 / 100 == pytest.approx(
        round(few["test/top1"] / 2)
    )
    for argument in ("inner_heads=4", "model.depth=2", "data.batchsize=3"):
        with pytest.raises(UserError, match=argument):
            evaluate_run(str(finished), [argument])


def test_an_ablation_without_m_says_the_command(tmp_path):
    done = command("train", "ablation=inner_heads", "seed=3", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip().endswith("python -m tnt_lightning.train -m ablation=inner_heads seed=3")


def test_several_devices_in_a_sweep_by_hydras_own_launcher_are_refused(tmp_path):
    basic = ("hydra/launcher=basic", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    done = command("train", "-m", "seed=0,1", "trainer.devices=2", "trainer.accelerator=cpu", *basic, cwd=tmp_path)
    line = "trainer.devices=2: under hydra/launcher=basic a job runs on one device; hydra/launcher=tnt runs it on several"
    assert done.returncode == 2 and line in done.stderr


# ---- an ImageNet tree


def test_imagenet_trains_from_folders_by_the_recipe(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 5)):
        for label, name in enumerate(("n01", "n02", "n03")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 52, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / part / name / f"{i}.JPEG")
    result = train(
        tmp_path / "run", "data=imagenet", f"data.root={tmp_path}", "data.num_classes=3", "data.subset=true", "data.batch_size=12",
        "data.num_workers=0", "model=tnt_ti", "image_size=32", "model.depth=2",
    )  # fmt: skip
    assert result["steps"] == 2 * 6 and result["checkpoint"] == "last" and "test/top1" not in result
    curve = [float(row["val/top1"]) for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()) if row["val/top1"]]
    assert result["val/top1"] == pytest.approx(curve[-1], abs=1e-4) and result["best/val/top1"] == pytest.approx(max(curve), abs=1e-4)


# ---- help


def test_help_shows_what_people_need_first_and_every_file_to_choose(tmp_path):
    done = command("train", "--help", cwd=tmp_path)
    first = "\n".join(done.stdout.splitlines()[:16])
    for words in (
        "python -m tnt_lightning.train",
        "model=tnt_s data=imagenet",
        "-m inner_heads=1,2,4,6",
        "position_encoding",
        "hydra.run.dir",
    ):
        assert words in first, words
    assert "hydra/launcher=slurm|ray" in done.stdout
    for group in (folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"):
        named = next(line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] == [group.name])
        assert named == sorted(path.stem for path in group.glob("[!_]*.yaml"))
