"""`python -m tests.two_gpus` on a machine that has none: by processes on the CPU, and by what nvidia-smi would say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import two_gpus

JOBS = {7: ("seed=0", ["0"]), 8: ("seed=1", ["1"]), 9: ("both", ["0", "1"])}
IDS = {"0": "GPU-a", "1": "GPU-b"}


def asked(*options: str, cwd: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(two_gpus.ROOT), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "tests.two_gpus", *options]
    return subprocess.run(line, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_all_checks_pass_on_two_processes(tmp_path):
    done = asked("--cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict PASS: equality PASS, placement PASS, throughput PASS, kill PASS\nto send along: two_gpus.json\n" in done.stdout
    found = json.loads((tmp_path / "two_gpus.json").read_text())
    assert found["passed"] and found["cpu"] and {"commit", "versions", "nccl", "nvidia_smi", "topology"} <= found["machine"].keys()
    figures = {name: check["figures"] for name, check in found["checks"].items()}
    assert figures["equality"]["images"] == 4 * 19 * 64 and 0 < figures["equality"]["weights"] < 1e-3
    assert [gpus for name, gpus in figures["placement"]["jobs"] if name.endswith("devices=2")] == [["97", "98"]] * 2
    one, two = figures["throughput"]["images_per_s"]
    assert figures["throughput"]["scaling"] == two / one > 0
    assert figures["kill"]["seconds"] < 30 and figures["kill"]["apart"] == 0
    assert not [*tmp_path.glob("*/")]


def test_without_two_gpus_it_is_a_line(tmp_path):
    done = asked(cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert re.fullmatch(r"error: two GPUs are needed, and torch sees [01] here; --cpu tries the script itself\n", done.stderr)


def test_what_does_not_pass_is_told_and_is_the_exit_code(tmp_path, monkeypatch, capsys):
    def broken(at: two_gpus.Place) -> two_gpus.Found:
        at.run("tnt_lightning.train", "inner_heads=5", at.accelerator, f"hydra.run.dir={at.folder / 'run'}", out=at.folder / "run")
        raise AssertionError

    def lost(at: two_gpus.Place) -> two_gpus.Found:
        raise FileNotFoundError("last.ckpt")

    monkeypatch.setattr(two_gpus, "CHECKS", {"broken": broken, "lost": lost, "other": lambda at: two_gpus.Found("nothing", [], {})})
    monkeypatch.setattr(sys, "argv", ["two_gpus.py", "--cpu", "--out", str(tmp_path / "here.json")])
    with pytest.raises(SystemExit) as end:
        two_gpus.main()
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 1 and "verdict FAIL: broken FAIL, lost FAIL, other PASS" in said
    checks = json.loads((tmp_path / "here.json").read_text())["checks"]
    [why] = checks["broken"]["wrong"]
    assert why.startswith("tnt_lightning.train ended with exit code 2: error: inner_heads=5 does not divide")
    assert checks["lost"]["wrong"] == ["FileNotFoundError: last.ckpt"] and checks["other"]["passed"]


def test_what_nvidia_smi_sees_of_the_jobs():
    apart = [{("GPU-a", 7), ("GPU-b", 8), ("GPU-a", 1)}, set(), {("GPU-a", 9), ("GPU-b", 9)}]
    assert two_gpus.seen_by_nvidia(apart, JOBS, IDS) == ("jobs seen in 2 of 3 looks", [])
    said, wrong = two_gpus.seen_by_nvidia([{("GPU-a", 7), ("GPU-a", 9), ("GPU-a", 8)}], JOBS, IDS)
    assert wrong == ["seed=1 computes on GPU-a, and was given 1", "several jobs compute on GPU-a"]
    assert two_gpus.seen_by_nvidia([{("GPU-a", 1)}], JOBS, IDS)[0].startswith("names no process of ours") and said
