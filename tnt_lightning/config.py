"""What a composed configuration must hold, checked before anything heavy is imported.

The ablation knobs are top-level keys, because that is how they are swept; a model's file sets their defaults and hands
them on to the model.
"""

import shlex
import sys
from math import inf
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from tnt_lightning import CONF
from tnt_lightning.errors import UserError

KNOBS = ("inner_heads", "words_per_patch", "position_encoding", "se", "tnt_blocks")
SECTIONS = ("model", "data", "optimizer", "recipe", "trainer", "logger", "grid")
KEYS = (*SECTIONS, *KNOBS, "image_size", "seed", "weights", "resume")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
RANGES = {
    "seed": ("whole number", 0, 2**32 - 1),
    "optimizer.lr": ("number", 0, inf),
    "recipe.epochs": ("whole number", 1, inf),
    "recipe.warmup_epochs": ("number", 0, inf),
    "recipe.warmup_lr": ("number", 0, inf),
    "recipe.min_lr": ("number", 0, inf),
    "recipe.label_smoothing": ("number", 0, 1),
    "recipe.ema_decay": ("number or null", 0, 1),
    "recipe.clip_grad": ("number or null", 0, inf),
    "recipe.threads": ("whole number or null", 1, inf),
    "recipe.crop_pct": ("number", 0.01, 1),
    "trainer.max_epochs": ("whole number", 1, inf),
    "trainer.accumulate_grad_batches": ("whole number", 1, inf),
}
LOGGER_RANGES = {  # of logger=wandb
    "logger.images_every": ("whole number", 0, inf),
    "logger.num_images": ("whole number", 1, inf),
    "logger.init_timeout": ("number", 1, inf),
    "logger.finish_timeout": ("number", 1, inf),
}
LOGGER_MODES = ("auto", "online", "offline", "disabled")


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
    _check_logger(config.logger)
    for key, (kind, lowest, highest) in (RANGES | (LOGGER_RANGES if config.logger.name == "wandb" else {})).items():
        value = OmegaConf.select(config, key)
        numbers = (int,) if kind.startswith("whole number") else (int, float)
        if value is None and kind.endswith("or null"):
            continue
        if not isinstance(value, numbers) or isinstance(value, bool) or not lowest <= value <= highest:
            raise UserError(f"{key}={value!r} is not a {kind} from {lowest:g} to {highest:g}".replace(" to inf", " up"))
    if config.recipe.interpolation not in INTERPOLATIONS:
        raise UserError(f"recipe.interpolation={config.recipe.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
    for knob in KNOBS:
        if knob not in config:
            continue
        if knob not in config.model:
            raise UserError(f"{knob}={config[knob]}: model={model} has no such knob; models that have it: {', '.join(models_with(knob))}")
        if config.model[knob] != config[knob]:
            raise UserError(f"model.{knob}={config.model[knob]} is at odds with {knob}={config[knob]}; set {knob} alone, without `model.`")


def _check_logger(logger: DictConfig) -> None:
    names = sorted(path.stem for path in (CONF / "logger").glob("*.yaml"))
    if logger.name not in names:
        raise UserError(f"logger.name={logger.name!r} is not known; available: {', '.join(names)}")
    known = OmegaConf.load(CONF / "logger" / f"{logger.name}.yaml")
    assert isinstance(known, DictConfig)
    for key in map(str, logger):
        if key not in known:
            raise UserError(f"logger.{key}={logger[key]}: no such key; logger={logger.name} has {', '.join(map(str, known))}")
    if logger.name != "wandb":
        return
    if logger.mode not in LOGGER_MODES:
        raise UserError(f"logger.mode={logger.mode!r} is not one of {', '.join(LOGGER_MODES)}")
    if not isinstance(logger.project, str) or not 0 < len(logger.project) <= 128 or set(logger.project) & set("/\\#?%:"):
        raise UserError(f"logger.project={logger.project!r} is not a name of at most 128 characters without any of / \\ # ? % :")
    for key in ("entity", "group"):
        if not isinstance(logger[key], str | None):
            raise UserError(f"logger.{key}={logger[key]!r} is neither text nor null; quote it: logger.{key}=\"'{logger[key]}'\"")
    if not isinstance(logger.tags, ListConfig) or not all(isinstance(tag, str) and 0 < len(tag) <= 64 for tag in logger.tags):
        raise UserError(f"logger.tags={logger.tags} is not a list of texts of at most 64 characters; try logger.tags=[a,b]")


def refuse_ablation_in_a_single_run(ablation: str | None) -> None:
    if ablation is not None:
        command = shlex.join(["python", "-m", "tnt_lightning.train", "-m", *(arg for arg in sys.argv[1:] if not arg.startswith("hydra."))])
        raise UserError(f"ablation={ablation} is a sweep of several runs; start it with -m: {command}")


def refuse_ablation_of_swept_models(ablation: str | None) -> None:
    """Hydra reads the grid once, of the model that is not swept; another model's rows would be missing without a word."""
    swept = [arg for arg in sys.argv[1:] if arg.startswith(("model=", "data=", "experiment=")) and "," in arg]
    if ablation is not None and swept:
        raise UserError(f"{swept[0]} beside ablation={ablation}: each model has a grid of its own; start a sweep for each")


def refuse_to_continue(before: dict[str, Any], now: dict[str, Any]) -> None:
    """What must stay for a run to go on: the seed and the data, which set the order and the split, and whether there is an average."""
    free = ("root", "num_workers", "augmentation")
    plans = []
    for config in (before, now):
        data = {f"data.{name}": value for name, value in config["data"].items() if name not in free}
        plans.append({"seed": config["seed"], **data, "an average (recipe.ema_decay)": bool(config["recipe"]["ema_decay"])})
    for key, value in plans[1].items():
        if plans[0].get(key) != value:
            raise UserError(f"{key}={value}: the run to continue had {plans[0].get(key)}; give the same, or start from its weights=")


def sweep_values(values: ListConfig) -> str:
    """[null, [1, 6]] -> "null,[1,6]": a grid as Hydra's sweeper reads it."""

    def text(value: Any) -> str:
        if isinstance(value, ListConfig):
            return f"[{','.join(map(text, value))}]"
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return ",".join(map(text, values))


OmegaConf.register_new_resolver("sweep", sweep_values, replace=True)
