"""The page that plans ImageNet and iNat: its figures are those of the code."""

import re
import runpy
from pathlib import Path

import pytest

from tnt_lightning import runs

from .conftest import PAPER

PAGE = Path(__file__).parents[1] / "experiments" / "planning"


@pytest.fixture(scope="module")
def plan() -> dict:
    return runpy.run_path(str(PAGE / "plan.py"))


@pytest.fixture(scope="module")
def tables(plan) -> dict[str, str]:
    return plan["tables"]()


def test_the_tables_are_what_the_code_counts(tables):
    page = (PAGE / "README.md").read_text()
    for title, table in tables.items():
        assert table in page, f"{title}: python experiments/planning/plan.py prints the tables anew"


def test_they_are_of_the_papers_sizes_and_of_the_releases_files(plan, tables):
    sizes = {data.name: (data.train, data.val, data.classes) for data in plan["data_sets"]()}
    assert sizes == {
        "ImageNet-1k": (1_281_167, 50_000, 1_000), "iNat 2018": (437_513, 24_426, 8_142), "iNat 2019": (265_213, 3_030, 1_010),
    }  # fmt: skip
    imagenet = plan["plans"]()[0]
    for name in ("tnt_s", "tnt_b"):
        _, macs, operations = plan["operations"](name, imagenet)
        assert macs / 1e9 == pytest.approx(PAPER["variants"][name]["flops_g"], abs=0.06)
        experiment = (PAGE.parents[1] / "conf" / "experiment" / f"imagenet_{name}.yaml").read_text()
        assert f"cost: {re.sub('e.', 'e', f'{operations:.1e}')} floating-point operations" in experiment
    row = next(line for line in tables["hours"].splitlines() if line.startswith("| tnt_s | ImageNet-1k, 224, 300 epochs |"))
    seconds = 6 * 5.219e9 * 375_300 * 1_024 / (8 * 989e12 * 0.1)  # by hand
    assert float(row.split("|")[4]) == pytest.approx(seconds / 3600, rel=2e-3)


@pytest.mark.slow
def test_a_checkpoint_has_the_bytes_that_are_planned(plan, finished):
    size = runs.checkpoint_path(finished, "last").stat().st_size
    assert 1 < size / (plan["STORED"] * runs.result_of(finished)["parameters"]) < 1.1
