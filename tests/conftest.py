"""Ways through the public door: a configuration as the command line composes it, and the commands themselves."""

import copy
import functools
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import tnt_lightning.config  # noqa: F401  (the resolver that conf/ablation needs)
from tnt_lightning import CONF
from tnt_lightning.results import PAPER as PAPER

os.environ["WANDB_MODE"] = "disabled"  # no test uploads anything; test_dashboard.py has an environment of its own
FACTS = ("grid", "released", "publication")  # about a model, not choices of a run
QUICK = ("recipe.epochs=2", "recipe.warmup_epochs=1", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")


def compose(*overrides: str, with_hydra: bool = False):
    return copy.deepcopy(_composed(overrides, with_hydra))


@functools.cache
def _composed(overrides: tuple[str, ...], with_hydra: bool):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", list(overrides), return_hydra_config=with_hydra)


def resolved(*overrides: str) -> dict:
    config = compose(*overrides)  # what it asks of the environment and of folders may be another each time
    return {key: value for key, value in OmegaConf.to_container(config, resolve=True).items() if key not in FACTS}


def train(run: Path, *overrides: str) -> dict:
    """What `python -m tnt_lightning.train OVERRIDES hydra.run.dir=RUN` does, in this process."""
    from tnt_lightning.train import train

    return train(resolved("logger=csv", *QUICK, *overrides), run)


def command(name: str, *arguments: str, cwd: Path, timeout: int = 240, env: dict | None = None) -> subprocess.CompletedProcess:
    env = {key: value for key, value in (env or os.environ).items() if key not in ("HYDRA_FULL_ERROR", "TNT_LIGHTNING_SHORT_ERRORS")}
    line = [sys.executable, "-m", f"tnt_lightning.{name}", *arguments]
    return subprocess.run(line, cwd=cwd, env={**env, "COLUMNS": "200"}, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(autouse=True)
def _environment():
    """As it was before: what W&B and Lightning set in this process is not for the commands of the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def one_thread():
    """Of torch: small tensors are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """(exit code, the lines on stderr that are ours, all of stderr) of a command in this process: imports take most of a command's time."""

    def call(name: str, *arguments: str) -> tuple[object, list[str], str]:
        silent = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        monkeypatch.setattr(sys, "argv", [f"/somewhere/tnt_lightning/{name}.py", *arguments, *silent])
        environment = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "TNT_LIGHTNING_SHORT_ERRORS")}
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr("logging.raiseExceptions", True)
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            import_module(f"tnt_lightning.{name}").main()
        err = capsys.readouterr().err
        return end.value.code, [line for line in err.splitlines() if line.startswith("error:")], err

    return call


@pytest.fixture
def called(monkeypatch, capsys):
    """(exit code, stdout, lines on stderr) of a command without Hydra, in this process."""

    def call(name: str, *arguments) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            import_module(f"tnt_lightning.{name}").main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return call


def pytest_addoption(parser):
    parser.addoption("--clusters", action="store_true", help="also run the tests that set up SLURM (as root, on Debian) or Ray here")
    parser.addoption("--network", action="store_true", help="also run the tests that download (released weights)")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "cluster" in item.keywords and not config.getoption("--clusters"):
            item.add_marker(pytest.mark.skip(reason="sets up SLURM or Ray; pytest --clusters runs it"))
        if "network" in item.keywords and not config.getoption("--network"):
            item.add_marker(pytest.mark.skip(reason="downloads; pytest --network runs it"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The directory of a short default run, made by the command."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = command("train", *QUICK, f"hydra.run.dir={run}", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    (run.parent / "stdout.txt").write_text(done.stdout)
    return run
