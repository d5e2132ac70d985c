"""What a composed configuration must hold, checked before anything heavy is imported.

The ablation knobs are top-level keys, because that is how they are swept; a model's file sets their defaults and hands
them on to the model.
"""

import shlex
import sys
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from tnt_lightning import CONF
from tnt_lightning.errors import UserError

KNOBS = ("inner_heads", "words_per_patch", "position_encoding", "se", "tnt_blocks")
SECTIONS = ("model", "data", "optimizer", "recipe", "trainer", "logger", "grid")
KEYS = (*SECTIONS, *KNOBS, "image_size", "seed", "weights", "resume")


def models_with(knob: str) -> list[str]:
    """The models of conf/model/ that have a knob."""
    return sorted(path.stem for path in (CONF / "model").glob("*.yaml") if knob in OmegaConf.load(path))


def check(config: DictConfig, model: str) -> None:
    """UserError for keys that nobody reads, and for knobs that do not reach the model. `model` is its name, for the message."""
    for key in map(str, config):
        if key not in KEYS:
            raise UserError(f"{key}={config[key]}: no such key; the top-level keys are {', '.join(KEYS)}")
    known = OmegaConf.load(CONF / "recipe" / "imagenet.yaml")
    assert isinstance(known, DictConfig)
    for key in map(str, config.recipe):
        if key not in known:
            raise UserError(f"recipe.{key}={config.recipe[key]}: no such key; a recipe has {', '.join(map(str, known))}")
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed!r} is not a whole number from 0 to 2**32 - 1")
    for knob in KNOBS:
        if knob not in config:
            continue
        if knob not in config.model:
            raise UserError(f"{knob}={config[knob]}: model={model} has no such knob; models that have it: {', '.join(models_with(knob))}")
        if config.model[knob] != config[knob]:
            raise UserError(f"model.{knob}={config.model[knob]} is at odds with {knob}={config[knob]}; set {knob} alone, without `model.`")


def refuse_ablation_in_a_single_run(ablation: str | None) -> None:
    if ablation is not None:
        command = shlex.join(["python", "-m", "tnt_lightning.train", "-m", *(arg for arg in sys.argv[1:] if not arg.startswith("hydra."))])
        raise UserError(f"ablation={ablation} is a sweep of several runs; start it with -m: {command}")


def refuse_ablation_of_swept_models(ablation: str | None) -> None:
    """Hydra reads the grid once, of the model that is not swept; another model's rows would be missing without a word."""
    swept = [arg for arg in sys.argv[1:] if arg.startswith(("model=", "data=", "experiment=")) and "," in arg]
    if ablation is not None and swept:
        raise UserError(f"{swept[0]} beside ablation={ablation}: each model has a grid of its own; start a sweep for each")


def sweep_values(values: ListConfig) -> str:
    """[null, [1, 6]] -> "null,[1,6]": a grid as Hydra's sweeper reads it."""

    def text(value: Any) -> str:
        if isinstance(value, ListConfig):
            return f"[{','.join(map(text, value))}]"
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return ",".join(map(text, values))


OmegaConf.register_new_resolver("sweep", sweep_values, replace=True)
