"""The lab book holds the paper's figures and those of its own data; an experiment file says what its run is expected to reach and costs."""

import csv
import re
import statistics
from pathlib import Path

import pytest
import torch

from tnt_lightning import CONF, create_model
from tnt_lightning.config import text
from tnt_lightning.models.cost import flops

from .conftest import PAPER

BOOK = Path(__file__).parents[1] / "experiments"


def published(knob: str) -> dict[str, str]:
    """Top-1 (percent) by the knob's value."""
    if knob == "tnt_blocks":
        rows = [row for row in PAPER["throughput_v100"].values() if knob in row]
        return {"null" if len(row[knob]) == 12 else text(row[knob]): f"{row['top1']:.1f}" for row in rows}
    rows = PAPER["ablations"][knob]
    return {text(value): f"{row['top1'] if isinstance(row, dict) else row:.1f}" for value, row in rows.items()}


def measured(file: Path, knob: str) -> dict[str, str]:
    """The rest of each row of a page's table, by the knob's value."""
    runs: dict[str, list[dict]] = {}
    with file.open(newline="") as stream:
        for run in csv.DictReader(stream):
            runs.setdefault(run[knob], []).append(run)
    found = {}
    for value, group in runs.items():
        assert sorted(run["seed"] for run in group) == ["0", "1", "2"]
        columns = [[float(run[name]) for run in group] for name in ("test_top1", "val_top1")]
        figures = [f"{statistics.fmean(column):.2f} ± {statistics.stdev(column):.2f}" for column in columns]
        [(parameters, macs)] = {(int(run["parameters"]), int(run["flops"])) for run in group}
        found[value] = " | ".join([*figures, str(len(group)), f"{parameters:,}", f"{macs / 1e6:.2f}"])
    return found


@pytest.mark.parametrize("folder", sorted(set(BOOK.glob("table_*")) - {BOOK / "table_09_transfer"}), ids=lambda folder: folder.name)
def test_a_page_of_the_lab_book_holds_the_papers_figures_and_those_of_its_runs(folder):
    expected, here = (folder / "README.md").read_text().split("## Measured")
    knob = re.sub(r"table_\d+_", "", folder.name)
    assert dict(re.findall(r"^\| `(.+?)` \| (\d\d\.\d) \|$", expected, re.M)) == published(knob)
    assert dict(re.findall(r"^\| `(.+?)` \| (\d.+) \|$", here, re.M)) == measured(folder / "digits.csv", knob)


def test_the_page_of_transfer_holds_the_papers_figures_and_those_of_its_runs():
    page = (BOOK / "table_09_transfer" / "README.md").read_text()
    expected, here = page.split("## Measured")
    sets = ("imagenet", "cifar10", "cifar100", "flowers", "pets", "inat2019")
    for model, row in PAPER["transfer"].items():
        figures = " | ".join("" if row[name] is None else f"{row[name]:.1f}" for name in sets)
        assert re.sub(" +", " ", f"| `{model}` | {figures} |") in re.sub(" +", " ", expected)
    runs: dict[tuple, list[dict]] = {}
    with (BOOK / "table_09_transfer" / "digits.csv").open(newline="") as stream:
        for run in csv.DictReader(stream):
            runs.setdefault((run["start"], run["images_per_class"], run["lr"]), []).append(run)
    for (start, images, rate), group in runs.items():
        assert sorted(run["seed"] for run in group) == ["0", "1", "2"]
        figures = [float(run["test_top1"]) for run in group]
        said = f"| {start.replace('_', ' ')} | {images} | {rate} | {statistics.fmean(figures):.2f} ± {statistics.stdev(figures):.2f} | 3 |"
        assert said in here, said


def test_the_index_names_every_page():
    pages = {page.parent.name for page in BOOK.glob("*/README.md")}
    assert set(re.findall(r"^\| \[(\w+)\]\(\1/README.md\) \|", (BOOK / "README.md").read_text(), re.M)) == pages


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_s", "tnt_b"])
def test_an_experiment_says_what_is_expected_and_what_it_costs(name):
    said, row = (CONF / "experiment" / f"imagenet_{name}.yaml").read_text(), PAPER["imagenet"][name]
    assert f"# expected: {row['top1']} top-1, {row['top5']} top-5 (paper)." in said
    with torch.device("meta"):
        model = create_model(name)
    operations = 3 * 2 * flops(model, (3, 224, 224)) * PAPER["recipe"]["epochs"] * PAPER["datasets"]["imagenet"]["train"]
    assert f"cost: {operations:.1e} floating-point operations".replace("e+", "e") in said
