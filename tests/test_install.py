"""Installed: console scripts with completion, a user's own configurations, and a wheel in a clean environment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tnt_lightning import create_model

ROOT = Path(__file__).parents[1]
TRAIN = Path(sys.executable).with_name("tnt-train")


def run(*line: str | Path, cwd: Path, **env: str) -> str:
    left_out = ("PYTHONPATH", "HYDRA_FULL_ERROR", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")  # the last: of what is imported, once
    clean = {key: value for key, value in os.environ.items() if key not in left_out}
    done = subprocess.run(list(map(str, line)), cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def mine(tmp_path) -> Path:
    """A user's own configurations: a model, and an experiment that uses it."""
    for group in ("model", "experiment"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    defaults = "# @package _global_\ndefaults:\n  - "
    (tmp_path / "mine" / "model" / "little.yaml").write_text(f"{defaults}tnt_digits\n  - _self_\nmodel: {{outer_dim: 48}}\n")
    (tmp_path / "mine" / "experiment" / "try.yaml").write_text(f"{defaults}override /model: little\n  - _self_\nseed: 7\n")
    return tmp_path / "mine"


@pytest.mark.parametrize("way", [["--config-dir", "mine"], ["hydra.searchpath=[file://mine]"]])
def test_a_users_own_configurations(tmp_path, mine, way):
    shown = run(TRAIN, *way, "experiment=try", "--cfg", "job", cwd=tmp_path)
    assert "outer_dim: 48" in shown and "seed: 7" in shown


@pytest.mark.slow
def test_a_users_own_model_trains_and_is_named_in_answers(tmp_path, mine):
    quick = ("trainer=debug", "trainer.enable_progress_bar=false", "logger=csv", f"hydra.run.dir={tmp_path / 'run'}")
    run(TRAIN, "--config-dir", mine, "model=little", *quick, cwd=tmp_path)
    same = create_model("tnt_digits", outer_dim=48, in_chans=1, num_classes=10)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["parameters"] == sum(p.numel() for p in same.parameters())
    for override, line in (
        ("model=litle", "model=litle not found; available: deit_b, deit_s, deit_ti, efficientnet_b3, efficientnet_b4, little, pvt_medium"),
        ("modle.depth=3", "modle.depth=3: no such key; did you mean model.depth?"),
    ):
        done = subprocess.run([TRAIN, "--config-dir", mine, "model=little", override], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {line}")


@pytest.mark.skipif(shutil.which("bash") is None, reason="completion is tried in bash")
@pytest.mark.parametrize(
    "script, typed, wanted",
    [
        ("tnt-train", "model=tnt_", {f"model=tnt_{name}" for name in ("b", "digits", "s", "s_1", "s_2", "s_3", "s_4", "ti")}),
        ("tnt-train", "optimizer.l", {"optimizer.lr=", "optimizer.layer_decay="}),
        ("tnt-evaluate", "ru", {"run="}),
    ],
)
def test_the_shell_completes(tmp_path, script, typed, wanted):
    body = f"""
        eval "$({script} -sc install=bash)"
        COMP_WORDS=({script} {typed}); COMP_CWORD=1; COMP_LINE="{script} {typed}"; COMP_POINT=${{#COMP_LINE}}
        $(complete -p {script} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = os.pathsep.join([str(TRAIN.parent), os.environ["PATH"]])
    assert set(run("bash", "-c", body, cwd=tmp_path, PATH=path).split()) == wanted


@pytest.mark.slow
def test_a_wheel_in_a_clean_environment_works_the_same_from_another_folder(tmp_path, mine):
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which the README installs, makes the environment")
    home = tmp_path / "empty"
    home.mkdir()
    run(uv, "build", "--quiet", "--wheel", "--out-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run(uv, "venv", "--quiet", "--python", sys.executable, "env", cwd=tmp_path)
    pinned = ("--constraints", ROOT / "constraints.txt", "--no-compile-bytecode")
    run(uv, "pip", "install", "--quiet", "--python", "env", *pinned, wheel, cwd=tmp_path)
    scripts = tmp_path / "env" / "bin"
    where = run(scripts / "python", "-c", "import tnt_lightning; print(tnt_lightning.CONF)", cwd=home).strip()
    assert Path(where).is_relative_to(tmp_path / "env")
    said = run(scripts / "tnt-train", "trainer=debug", "hydra.run.dir=run", "logger.mode=offline", cwd=home)
    assert "test top-1" in said and "wandb sync" in said
    result = json.loads((home / "run" / "result.json").read_text())
    assert result["parameters"] == 397_642 and result["commit"] is None
    said = run(scripts / "tnt-train", "-m", "seed=0,1", "trainer=debug", "logger=csv", "hydra.sweep.dir=sweep", cwd=home)
    assert "2 finished" in said and (home / "sweep" / "seed=1" / "result.json").exists()
    table = run(scripts / "python", "-m", "tnt_lightning.evaluate", "run=run", cwd=home)
    assert f"{result['test/loss']:g}" in table
    assert "outer_dim: 48" in run(scripts / "tnt-train", "--config-dir", mine, "model=little", "--cfg", "job", cwd=home)
    code = "import tnt_lightning as t; print(t.create_model('tnt_s').num_classes, t.load_run('run').num_classes)"
    assert run(scripts / "python", "-c", code, cwd=home).split() == ["1000", "10"]
    assert sorted(path.name for path in home.iterdir()) == ["run", "sweep"]
