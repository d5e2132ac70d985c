"""`python -m tnt_lightning.benchmark`: that it measures and says where; never how fast anything is."""

import io
import json
import random

import numpy as np
import pytest
import torch

from tnt_lightning import benchmark

from .conftest import command

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
    data = dict(images=4, batch_size=2, image_size=32)
    list(benchmark.make_photos(tmp_path, "90x60", 4, seed=0))
    theirs = benchmark.timms_loader(tmp_path, data, 0).dataset
    mine = benchmark.ours(tmp_path, data, 0).train_dataloader().dataset
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
        benchmark.photo((500, 375), np.random.default_rng(seed)).save(file, "JPEG", quality=95, subsampling="4:2:0")
        sizes.append(len(file.getvalue()))
    assert all(80_000 < size < 140_000 for size in sizes) and len(set(sizes)) == 3
    first, again = (np.asarray(benchmark.photo((40, 30), np.random.default_rng(1))) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "nothing: name what to measure first: data; such as"),
        (("rounds=3",), "rounds=3: name what to measure first: data"),
        (("speed",), "speed: name what to measure first: data"),
        (("data", "rounds=0"), "rounds=0: expected a whole number from 1 up"),
        (("data", "data.sizes=[500]"), "data.sizes=[500]: expected a list of sizes like 500x375"),
        (("data", "data.images=8"), "data.batch_size=32 is larger than data.images=8; lower it"),
        (("data", "data.image=8"), "data.image=8: no such key; did you mean data.images or data.image_size?"),
        (("data", "+data.speed=8"), "data.speed=8: no such key"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    done = command("benchmark", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_help_names_what_can_be_measured(tmp_path):
    done = command("benchmark", "--help", cwd=tmp_path)
    assert done.returncode == 0 and all(f"benchmark {name}" in done.stdout for name in benchmark.MEASURES)
