"""A run is a directory: config.yaml (resolved), checkpoints/best.ckpt and last.ckpt, metrics.csv, result.json, train.log, wandb/.

Only tensors and plain data are stored, and only those are ever loaded.
"""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from torch import nn

from tnt_lightning.errors import UserError
from tnt_lightning.models import build_model

PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "hydra-core", "numpy", "pillow", "wandb")


def load(path: str | Path, checkpoint: str | None = None) -> nn.Module:
    """The backbone of a run, in evaluation mode, rebuilt from its own config, with the averaged weights of a checkpoint.

    path: a run directory, or a checkpoint in one; checkpoint: "best", "last", or None for the one that the result is of.
    UserError for what is missing, or not a run.
    """
    run, file = locate(path, checkpoint)
    backbone = build_model(**config_of(run)["model"])
    load_weights(backbone, file)
    return backbone.eval()


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
        return yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{run} is not a run directory: {file} cannot be read ({_first_line(error)})") from None


def result_of(run: Path) -> dict[str, Any]:
    """result.json; empty while the run is not finished."""
    file = run / "result.json"
    return json.loads(file.read_text()) if file.exists() else {}


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
    name = checkpoint or result_of(path).get("checkpoint", "last")
    file = checkpoint_path(path, name)
    if not file.exists():
        found = sorted(other.stem for other in file.parent.glob("*.ckpt"))
        raise UserError(f"{path} has no checkpoint {name!r}; it has {', '.join(found) or 'none'}")
    return path, file


def load_weights(backbone: nn.Module, file: Path) -> int:
    """The averaged weights of one of our checkpoints into its backbone; gives how many epochs they were trained.

    UserError for another network's, listing the keys.
    """
    prefix = "backbone."
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        state, epochs = checkpoint["state_dict"], int(checkpoint["epoch"]) + 1
    except (OSError, UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a checkpoint of tnt_lightning, or a damaged one ({_first_line(error)})") from None
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    wanted = backbone.state_dict()
    odd = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape),
    }
    if any(odd.values()):
        lists = "; ".join(f"{what}: {', '.join(names)}" for what, names in odd.items() if names)
        raise UserError(f"{file}: weights of another network ({lists})")
    backbone.load_state_dict(state)
    return epochs


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
