"""A backbone of the user's own, by its name on the Python path."""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from tnt_lightning.errors import UserError

# Of the environment alone, which reaches sweeps, ranks and every command: no file that came with somebody's run can set it.
ALLOWED = "TNT_LIGHTNING_MODELS"


def allowed(target: object) -> bool:
    """Whether the user has named the module, or a package that it is in: TNT_LIGHTNING_MODELS=mine.nets,other."""
    names = [name.strip() for name in os.environ.get(ALLOWED, "").split(",")]
    return isinstance(target, str) and any(name and target.startswith(f"{name}.") for name in names)


def build(target: str, knobs: dict[str, Any]) -> nn.Module:
    """What a class, or a function, of the user's makes of the knobs: a module that maps images (B, in_chans, H, W) to logits.

    UserError where there is no such thing, or where it takes no such knobs. Errors in its own code keep their tracebacks.
    """
    module, _, name = target.rpartition(".")
    try:
        missing = find_spec(module) is None
    except (ModuleNotFoundError, ValueError):  # of a package on the way there
        missing = True
    if missing:
        raise UserError(f"model._target_={target}: no module {module} on the Python path; PYTHONPATH=FOLDER adds a folder to it")
    make: Callable[..., Any] = getattr(import_module(module), name, None)  # type: ignore[assignment]
    if not callable(make):
        raise UserError(f"model._target_={target}: {module} has no class or function {name}")
    if not allowed(f"{make.__module__}."):
        raise UserError(f"model._target_={target} comes from {make.__module__}; {ALLOWED} does not name that")
    try:
        inspect.signature(make).bind(**knobs)
    except TypeError as error:
        raise UserError(f"model: {target} does not take these keys ({error})") from None
    model = make(**knobs)
    if not isinstance(model, nn.Module):
        raise UserError(f"model._target_={target} gives a {type(model).__name__}, no torch.nn.Module")
    return model
