"""A run is a directory: config.yaml (resolved), checkpoints/best.ckpt and last.ckpt, metrics.csv, result.json, train.log, wandb/.

What is stored is tensors and plain data.
"""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from tnt_lightning.errors import UserError

PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "hydra-core", "numpy", "pillow", "wandb")


def start(run: Path, config: dict[str, Any]) -> None:
    """Claim a directory for a new run; UserError where one lies already."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        with (run / "config.yaml").open("x") as file:  # of two runs that start here at once, one
            yaml.safe_dump(config, file, sort_keys=False)
    except FileExistsError:
        raise UserError(f"{run} already holds a run; choose another hydra.run.dir, or move it away") from None


def finish(run: Path, result: dict[str, Any]) -> None:
    write(run / "result.json", json.dumps(result, indent=2) + "\n")


def config_of(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{run} is not a run directory: {file} cannot be read ({_first_line(error)})") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(name), dict) for name in ("model", "data", "recipe", "trainer")):
        raise UserError(f"{file} is not the configuration of a run")
    return config


def result_of(run: Path) -> dict[str, Any]:
    """result.json; empty while the run is not finished."""
    file = run / "result.json"
    try:
        result = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged ({_first_line(error)}); name a checkpoint: {run}/checkpoints/last.ckpt") from None
    return result if isinstance(result, dict) else {}


def checkpoint_path(run: Path, name: str) -> Path:
    return run / "checkpoints" / f"{name}.ckpt"


def locate(path: str | Path, checkpoint: str | None = None) -> tuple[Path, Path]:
    """(run directory, checkpoint file) of a run directory or of a checkpoint in one."""
    if "://" in str(path):
        raise UserError(f"{path}: a URL is not loaded from; download the run and give its directory")
    path = Path(path).expanduser().resolve()
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        return path.parent.parent, path
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    name = checkpoint or ("best" if result_of(path).get("checkpoint") == "best" else "last")
    file = checkpoint_path(path, name)
    if not file.exists():
        found = sorted(other.stem for other in file.parent.glob("*.ckpt"))
        raise UserError(f"{path} has no checkpoint {name!r}; it has {', '.join(found) or 'none'}")
    return path, file


def origin() -> dict[str, Any]:
    """Where figures come from: versions, the code's commit, the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "commit": _commit(),
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _commit() -> str | None:
    """The checkout's commit, with a + where tracked files differ from it; None outside a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write(file: Path, text: str) -> None:
    """Whole or not at all."""
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, file)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
