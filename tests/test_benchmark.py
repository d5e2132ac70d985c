"""`python -m tnt_lightning.benchmark`: that it measures and says where; never how fast anything is."""

import io
import json
import random

import numpy as np
import pytest
import torch

from tnt_lightning import benchmark
from tnt_lightning.models import build_model
from tnt_lightning.speed import data, model
from tnt_lightning.speed.rows import Clock, ceilings

from .conftest import command, resolved

TINY = ("rounds=2", "data.images=4", "data.batch_size=4", "data.image_size=32")


@pytest.mark.slow
def test_data_is_measured_beside_timms(tmp_path):
    done = command("benchmark", "data", *TINY, "data.sizes=[60x50,100x80]", "data.num_workers=1", "out=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("speed / timm's", "60x50", "ours, fast_resize", "RandAugment", "benchmark_data.json"):
        assert words in done.stdout
    written = json.loads((tmp_path / "here" / "benchmark_data.json").read_text())
    assert {"commit", "device", "cpu", "versions"} <= written.keys() and written["config"]["rounds"] == 2
    loaders = [row for row in written["rows"] if row["what"] == "loader"]
    assert {(row["size"], row["num_workers"], row["name"]) for row in loaders} == {
        *(
            (size, workers, name)
            for size in ("60x50", "100x80")
            for workers in (0, 1)
            for name in ("timm", "ours", "ours, data.cache=true")
        ),
        *((size, 0, "ours, fast_resize") for size in ("60x50", "100x80")),
        *(("100x80", 0, name) for name in ("ours, dct_scaling", "ours, fast_resize and dct_scaling")),
    }
    assert all(row["n"] == 2 and 0 < row["ratio"]["p20"] <= row["ratio"]["p50"] <= row["ratio"]["p80"] for row in loaders)
    assert all(row["images_per_s"]["p50"] > 0 and row["clock"] == ("wall" if row["num_workers"] else "cpu") for row in loaders)
    steps = [row["name"] for row in written["rows"] if row["what"] == "split" and row["size"] == "60x50"]
    assert steps == ["decode", "crop", "flip", "RandAugment", "to tensor", "collate"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"], "nothing else is left behind"


def test_both_loaders_give_the_same_pixels_for_the_same_draws(tmp_path):
    given = dict(images=4, batch_size=2, image_size=32)
    list(data.make_photos(tmp_path, "90x60", 4, seed=0))
    theirs = data.timms_loader(tmp_path, given, 0).dataset
    mine = data.ours(tmp_path, given, 0).train_dataloader().dataset
    for i in range(4):
        for seed in range(10):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            image, label = theirs[i]
            assert torch.equal(torch.as_tensor(image), mine[i, seed][0]) and label == mine[i, seed][1]


def test_photos_are_like_photos():
    """As large as ImageNet's own (110 kB on average), and the same for the same seed."""

    sizes = []
    for seed in range(3):
        file = io.BytesIO()
        data.photo((500, 375), np.random.default_rng(seed)).save(file, "JPEG", quality=95, subsampling="4:2:0")
        sizes.append(len(file.getvalue()))
    assert all(80_000 < size < 140_000 for size in sizes) and len(set(sizes)) == 3
    first, again = (np.asarray(data.photo((40, 30), np.random.default_rng(1))) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("rounds=3",), "rounds=3: name what to measure first: model"),
        (("speed",), "speed: name what to measure first: model"),
        (("data", "rounds=0"), "rounds=0: expected a whole number from 1 up"),
        (("data", "data.sizes=[500]"), "data.sizes=[500]: expected a list of sizes like 500x375"),
        (("data", "data.images=8"), "data.batch_size=32 is larger than data.images=8; lower it"),
        (("data", "data.image=8"), "data.image=8: no such key; did you mean data.images or data.image_size?"),
        (("data", "+data.speed=8"), "data.speed=8: no such key"),
        (("model", "rounds=0"), "rounds=0: expected a whole number from 1 up"),
        (("model", "image=3"), "image=3: no such key; did you mean images or image_size?"),
        (("model", "beside=[tnt_x]"), "beside=tnt_x: no such model; available: timm, deit_b"),
        (("model", "trainer.precision=64-true"), "trainer.precision=64-true: measured in 32-true, bf16-mixed, 16-mixed"),
        (("kernel", "model=deit_s"), "model=deit_s: has no inner transformer to measure"),
        (("train", "trainer.devices=2"), "trainer.devices=2: measured on one device"),
        (("train", "steps=17"), "steps=17: an epoch of data=digits has fewer; lower it, or data.batch_size"),
        (("train", "out=/dev/null/here"), "out=/dev/null/here: cannot be written to"),
    ],
)
def test_a_mistake_is_one_line(ended, arguments, message):
    code, lines, _ = ended("benchmark", *arguments)
    assert code == 2 and len(lines) == 1 and message in lines[0]


def test_nothing_to_measure_is_said(tmp_path):
    done = command("benchmark", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nothing: name what to measure first: model, kernel, data, train; such as")


@pytest.mark.slow
def test_a_model_is_measured_beside_timms_twin_and_others(tmp_path):
    small = ("image_size=32", "images=2", "model.depth=1", "rounds=2", "beside=[timm,deit_ti,resnet50]")
    done = command("benchmark", "model", "model=tnt_ti", *small, "compiled=false", "out=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("inference, 2 image(s) of 32x32, 32-true", "speed / timm's", "of what is possible", "benchmark_model.png"):
        assert words in done.stdout
    written = json.loads((tmp_path / "here" / "benchmark_model.json").read_text())
    names = ["tnt_ti", "timm", "deit_ti", "resnet50"]
    assert [(row["phase"], row["name"]) for row in written["rows"]] == [
        (phase, name) for phase in ("inference", "training", "latency") for name in names
    ]
    for row in written["rows"]:
        assert row["ratio"].keys() == {*names} - {row["name"]} and row["n"] == 2 and row["clock"] == "cpu"
        assert row["peak_memory_gib"] is None, "of the device; the CPU has none of its own"
        assert ("ms" in row) == (row["phase"] == "latency") and (row["phase"] == "latency" or 0 < row["utilisation"]["p50"] < 1)
    ours, theirs = written["rows"][:2]
    assert ours["ratio"]["timm"]["p50"] * theirs["ratio"]["tnt_ti"]["p50"] == pytest.approx(1, rel=0.3), "of the same rounds"
    assert ours["gmac"] == pytest.approx(theirs["gmac"]), "timm's is the same network"
    assert {file.name for file in (tmp_path / "here").iterdir()} == {f"benchmark_model.{ending}" for ending in ("json", "png", "svg")}


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_s", "tnt_b"])
def test_the_twin_is_the_same_network(name):
    section = resolved(f"model={name}", "data=imagenet")["model"]
    with torch.device("meta"):
        ours, theirs = build_model(**section), model.twin(section)()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert theirs.blocks[0].attn_in.num_heads == section["inner_heads"] and theirs.blocks[0].attn_out.num_heads == section["outer_heads"]
    for knob in ("se=true", "position_encoding=word", "tnt_blocks=[1]"):
        assert model.twin(resolved(f"model={name}", "data=imagenet", knob)["model"]) is None, "timm has no such network"
    words = model.twin(resolved(f"model={name}", "data=imagenet", "words_per_patch=4", "inner_heads=1")["model"])
    with torch.device("meta"):
        assert words().pixel_pos.shape[-2:] == (2, 2) or words().pixel_pos.shape[1] == 4


@pytest.mark.slow
def test_the_inner_block_is_measured_beside_what_the_device_does(tmp_path):
    done = command("benchmark", "kernel", "model=tnt_ti", "patches=4", "rounds=2", "compiled=false", "out=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "here" / "benchmark_kernel.json").read_text())["rows"]
    assert [(row["phase"], row["name"], row["shape"]) for row in rows] == [
        (phase, "eager", [4, 16, 12]) for phase in ("inference", "training")
    ]
    assert all(row["ceiling_tmac_per_s"] > 0 and row["ceiling_tb_per_s"] > 0 and row["of_the_product"]["p50"] > 0 for row in rows)
    assert "inner block, 4 patches of 16 words of 12, 2 heads, 32-true" in done.stdout


def test_a_large_product_and_a_copy_are_the_ceilings():
    found = ceilings(Clock(torch.device("cpu"), "cpu"), torch.float32)
    assert 1e9 < found.flops < 1e13 and 1e8 < found.bytes < 1e13


@pytest.mark.slow
def test_whole_steps_are_measured_beside_a_bare_loop(tmp_path):
    small = ("rounds=2", "steps=3", "data.batch_size=16", "model.depth=1", "recipe.clip_grad=1.0")
    done = command("benchmark", "train", *small, "out=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "here" / "benchmark_train.json").read_text())["rows"]
    assert [row["name"] for row in rows if row["what"] == "step"] == ["a bare loop", "the command, without waiting for images"]
    parts = {row["name"]: row["share"]["p50"] for row in rows if row["what"] == "part"}
    assert parts.keys() == {"the average (EMA)", "the watch over loss and gradient", "checkpoints and signals", "logging"}
    assert all(0 < share < 1 for share in parts.values()), "each of them was heard of"
    assert rows[-1]["name"] == "waiting for images" and 0 < rows[-1]["share"]["p50"] < 1
    assert "of a bare loop's step" in done.stdout and [path.name for path in tmp_path.iterdir()] == ["here"], "no run is left"


def test_help_names_what_can_be_measured(tmp_path):
    done = command("benchmark", "--help", cwd=tmp_path)
    assert done.returncode == 0 and all(f"benchmark {name}" in done.stdout for name in benchmark.MEASURES)
