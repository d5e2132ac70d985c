"""W&B's views of a project and its own sweeps, as far as they can be looked at without an account."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tnt_lightning.config import KNOBS, check, plain
from tnt_lightning.workspace import main

from .conftest import compose

ROOT = Path(__file__).parents[1]
SWEEPS = sorted(ROOT.glob("experiments/*/wandb_sweep.yaml"))


@pytest.fixture
def written(tmp_path, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(sys, "argv", ["dashboard", "--project", "mine", "--entity", "us", "--out", str(tmp_path / "views")])
    main()
    assert capsys.readouterr().out.count("written ") == 1 + len(KNOBS)
    return {file.stem: json.loads(file.read_text()) for file in (tmp_path / "views").iterdir()}


def test_there_is_an_overview_and_a_view_for_each_ablation(written):
    assert written.keys() == {"TNT", *KNOBS}
    assert all(view["project"] == "mine" and view["entity"] == "us" for view in written.values())
    overview = json.dumps(written["TNT"])
    for shown in ("val/top1", "train/loss", "images_per_s", "memoryAllocatedBytes", '"examples"', "Parallel Coordinates Plot"):
        assert shown in overview
    for knob in KNOBS:
        assert f"c::{knob}" in overview or f"config:{knob}" in overview or f"{knob}.value" in overview
        [runs] = written[knob]["spec"]["section"]["runSets"]
        assert runs["filters"]["filters"] == [{"key": {"section": "run", "name": "tags"}, "op": "IN", "value": [knob], "disabled": False}]
        assert [group["name"].split(".")[0] for group in runs["grouping"]] == [knob]


def test_runs_with_and_without_a_test_part_are_seen(written):
    """ImageNet and iNat have validation images only; and every panel of an open section is on its first page."""
    for view in written.values():
        sections = view["spec"]["section"]["panelBankConfig"]["sections"]
        for section in sections:
            pages = section["flowConfig"]
            assert len(section["panels"]) <= pages["columnsPerPage"] * pages["rowsPerPage"]
        [accuracy] = (section for section in sections if section["isOpen"] and "Scatter Plot" in json.dumps(section))
        for panel in accuracy["panels"]:
            text, kind = json.dumps(panel["config"]), panel["viewType"]
            if "test/top1" in text:
                other = text.replace("test/top1", "val/top1").replace("test top-1", "validation top-1")
                assert (kind, other) in [(one["viewType"], json.dumps(one["config"])) for one in accuracy["panels"]]
        figures = {figure for panel in accuracy["panels"] for figure in ("val/top1", "test/top1") if figure in json.dumps(panel)}
        assert figures == {"val/top1", "test/top1"}


def test_logged_out_it_is_json(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB") and key != "NETRC"} | {"HOME": str(tmp_path)}
    line = [sys.executable, "-m", "tnt_lightning.dashboard"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.startswith("not logged in (wandb login): JSON instead\n"), done.stderr
    assert (tmp_path / "workspace" / "TNT.json").exists()
    done = subprocess.run([*line, "--out", "/proc/x"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.parent.name)
def test_a_sweep_of_wandbs_own_drives_the_command_through_the_models_grid(file):
    sweep = yaml.safe_load(file.read_text())
    env, *called, place, arguments = sweep["command"]
    assert (env, arguments) == ("${env}", "${args_no_hyphens}") and called[:3] == ["python", "-m", "tnt_lightning.train"]
    assert place == "hydra.run.dir=multirun/${oc.env:WANDB_SWEEP_ID}/${oc.env:WANDB_RUN_ID}"
    assert sweep["parameters"].pop("seed") == {"values": [0, 1, 2]}
    [(knob, swept)] = sweep["parameters"].items()
    seen = []
    for value in swept["values"]:
        config = compose(*called[3:], f"{knob}={value}")  # as W&B's agent writes it
        check(config, "tnt_s")
        seen.append(plain(config)[knob])
        assert seen[-1] == value or value == "null", "what W&B shows is what the run has"
    assert seen == OmegaConf.to_container(compose("model=tnt_s").grid[knob])


@pytest.mark.slow
def test_wandbs_schema_takes_the_sweep_files(tmp_path):
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which the README installs, makes the environment")
    code = "import sys, yaml; from sweeps.config import schema_violations_from_proposed_config as wrong\n"
    code += "for file in sys.argv[1:]: print(file, wrong(yaml.safe_load(open(file)))); assert not wrong(yaml.safe_load(open(file)))\n"
    code += "assert wrong({'method': 'grit', 'parameters': {}})"
    line = [uv, "run", "--no-project", "--python", sys.executable, "--with", "sweeps==0.3.0", "python", "-c", code, *map(str, SWEEPS)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert len(SWEEPS) == 5 and done.returncode == 0, done.stdout + done.stderr
