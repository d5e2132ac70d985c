"""What a composed configuration must hold, checked before anything heavy is imported.

The ablation knobs are top-level keys, because that is how they are swept; a model's file sets their defaults and hands
them on to the model.
"""

import functools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tnt_lightning import CONF, runs, trees
from tnt_lightning.errors import UserError, did_you_mean
from tnt_lightning.schema import AUGMENTATIONS, KINDS

KNOBS = ("inner_heads", "words_per_patch", "position_encoding", "se", "tnt_blocks")
OF_SOME_MODELS = (*KNOBS, "kernel")  # what a model's file sets at the top
SECTIONS = (
    "model", "data", "optimizer", "recipe", "trainer", "checkpoint", "faults", "compute", "logger", "grid", "released", "publication",
)  # fmt: skip
PUBLICATION = ("mean", "std", "crop_pct", "interpolation", "drop_path_rate", "clip_grad")  # what a model's own has instead of the recipe's
KEYS = (*SECTIONS, *OF_SOME_MODELS, "image_size", "seed", "weights", "resume")


@functools.cache
def _packaged(name: str) -> Any:
    """A file of conf/, to look at: to read it takes as long as all that is checked in it."""
    return OmegaConf.load(CONF / name)


def models_with(knob: str) -> list[str]:
    """The models of conf/model/ that have a knob."""
    return sorted(path.stem for path in (CONF / "model").glob("*.yaml") if knob in _packaged(f"model/{path.name}"))


def keys_of(config: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key, sections before what is in them."""
    if isinstance(config, DictConfig) and not config._is_missing():
        for name in config:
            yield f"{prefix}{name!s}"
            yield from keys_of(config._get_node(name), f"{prefix}{name!s}.")


def check(config: DictConfig, model: str) -> None:
    """UserError for a composed configuration that lacks keys, and for all that `check_values` refuses."""
    _refuse_no_value(config)
    _refuse_missing_keys(config)
    check_values(config, model)


def check_values(config: DictConfig, model: str) -> None:
    """UserError for keys that nobody reads, values that are not what they must be, and knobs that do not reach the model.

    model: its name, for the message
    """
    _refuse_no_value(config)
    _refuse_unknown_keys(config)
    for key, kind in KINDS.items():
        missing = object()
        value = OmegaConf.select(config, key, default=missing)
        if value is not missing and not kind.fits(value):
            quote = f"; quote it: {key}=\"'{text(value)}'\"" if "text" in kind.words and isinstance(value, (bool, int, float)) else ""
            raise UserError(f"{key}={text(value)} is not {kind.words}{quote}")
    for knob in OF_SOME_MODELS:
        if knob not in config:
            continue
        if knob not in config.model:
            raise UserError(
                f"{knob}={text(config[knob])}: model={model} has no such knob; models that have it: {', '.join(models_with(knob))}"
            )
        if config.model[knob] != config[knob]:
            raise UserError(
                f"model.{knob}={text(config.model[knob])} is at odds with {knob}={text(config[knob])}; set {knob} alone, without `model.`"
            )
    sources = {"num_classes": "data.num_classes", "in_chans": "data.in_chans", "image_size": "image_size", "img_size": "image_size"}
    for name, given in sources.items():
        value = OmegaConf.select(config, given)
        if name in config.model and config.model[name] != value:
            raise UserError(f"model.{name}={text(config.model[name])} is at odds with {given}={text(value)}; set {given} alone")
    if config.data.image_size != config.image_size:
        sizes = f"data.image_size={text(config.data.image_size)} is at odds with image_size={text(config.image_size)}"
        raise UserError(f"{sizes}; set image_size alone")


def _refuse_no_value(config: Any, prefix: str = "") -> None:
    """YAML can hold more than sections of named values: ???, which OmegaConf takes for a value still to come, and numbers as names."""
    for name in config:
        node = config._get_node(name)
        if not isinstance(name, str):
            raise UserError(f"{prefix}{name}: no such key; keys are text")
        if node._is_missing():
            raise UserError(f"{prefix}{name}=???: no value; give one, or null where there is to be none")
        if isinstance(node, DictConfig) and not node._is_none():
            _refuse_no_value(node, f"{prefix}{name}.")


def _refuse_missing_keys(config: DictConfig) -> None:
    """What `~KEY` took away, or a file of one's own did not set."""
    needed = {
        "model": ["_target_"],
        "data": ["_target_", "num_classes", *map(str, _packaged("data/_shared.yaml"))],
        "optimizer": ["opt", "lr", "weight_decay"],
        "recipe": [*map(str, _packaged("recipe/imagenet.yaml"))],
        "trainer": [*map(str, _packaged("trainer/default.yaml"))],
        "checkpoint": ["every_n_steps"],
        "faults": ["nonfinite", "nonfinite_in_a_row", "timeout_s"],
        "compute": ["compile", "channels_last", "tf32"],
        "logger": ["name"],
    }
    for section, keys in needed.items():
        if not isinstance(config.get(section), DictConfig):
            cure = f"{section}=NAME" if (CONF / section).is_dir() else "it"
            raise UserError(f"{section}: missing, or not a section of keys; a run needs {cure}")
        for key in keys:
            if key not in config[section]:
                raise UserError(f"{section}.{key}: missing; a run needs it")
    for key in ("seed", "image_size", "weights", "resume"):
        if key not in config:
            raise UserError(f"{key}: missing; a run needs it")


def _refuse_unknown_keys(config: DictConfig) -> None:
    """Of the sections that are read here; models, data sets, optimizers and the Trainer know their own arguments."""
    whole = _packaged("config.yaml")
    logger = f"{config.logger.name}.yaml" if config.logger.get("name") in ("csv", "none") else "wandb.yaml"
    readers = {
        "": KEYS,
        "recipe.": tuple(map(str, _packaged("recipe/imagenet.yaml"))),
        "recipe.augmentation.": AUGMENTATIONS,
        "publication.": PUBLICATION,
        "data.augmentation.": AUGMENTATIONS,
        **{f"{name}.": tuple(map(str, whole[name])) for name in ("checkpoint", "faults", "compute")},
        "logger.": tuple(map(str, _packaged(f"logger/{logger}"))),
    }
    for section, known in readers.items():
        node = OmegaConf.select(config, section.rstrip(".")) if section else config
        for name in map(str, node) if isinstance(node, DictConfig) else ():
            if not section and name not in known and (CONF / name).is_dir():
                raise UserError(f"{name}={text(node[name])}: a file of {name}/ begins with the line `# @package _global_`")
            if name not in known:
                key = [section + name, *keys_of(node[name], section + name + ".")][-1]
                here = [section + other for other in known] if section else [k for k in keys_of(config) if k.split(".")[0] in KEYS]
                cure = did_you_mean(key, here, f"there are {', '.join(known)}")
                raise UserError(f"{key}={text(OmegaConf.select(config, key))}: no such key{cure}")


def of_run(directory: Path) -> DictConfig:
    """The configuration that a run recorded, of which nothing is left to resolve: an interpolation in somebody's would read this
    machine's secrets."""
    recorded, file = runs.elsewhere(runs.config_of(directory)), directory / "config.yaml"
    todo: list[tuple[str, Any]] = [("", recorded)]
    for place, value in todo:
        if isinstance(value, dict):
            todo += [(f"{place}.{key}".lstrip("."), key) for key in value]
            todo += [(f"{place}.{key}".lstrip("."), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [(place, inner) for inner in value]
        elif isinstance(value, str) and "${" in value:
            raise UserError(f"{file}: {place}={value}: an interpolation; the configuration of a run holds plain values")
    try:
        return OmegaConf.create(recorded)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{file} is not the configuration of a run ({' '.join(str(error).split())})") from None


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as a run keeps it."""
    values: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), resolve=True)
    for key in ("grid", "released", "publication"):  # facts about the model, not choices of this run
        values.pop(key, None)
    return values


def as_sweep() -> str:
    """The command line that this process was called by, as a sweep."""
    script = Path(sys.argv[0])
    called = [script.name] if script.name.startswith("tnt-") else ["python", "-m", f"tnt_lightning.{script.stem}"]
    return shlex.join([*called, "-m", *(arg for arg in sys.argv[1:] if not arg.startswith("hydra."))])


def refuse_ablation_in_a_single_run(ablation: str | None) -> None:
    if ablation is not None:
        raise UserError(f"ablation={ablation} is a sweep of several runs; start it with -m: {as_sweep()}")


def refuse_keys_of_training(config: DictConfig, ablation: str | None, command: str) -> None:
    if config.resume is not None or ablation is not None:
        raise UserError(f"resume= and ablation= are of training; {command} takes run=, or model=, weights= and data=")


def refuse_ablation_of_swept_models(ablation: str | None) -> None:
    """Hydra reads the grid once, of the model that is not swept; another model's rows would be missing without a word."""
    swept = [arg for arg in sys.argv[1:] if re.match(r"(model|data|experiment)=.*[,(]", arg)]  # a,b or glob(t*), choice(a), range(2)
    if ablation is not None and swept:
        raise UserError(f"{swept[0]} beside ablation={ablation}: each model has a grid of its own; start a sweep for each")


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the plan of a run and this one, a line a key. `resume` says how a run was started, not what it is."""
    old, new = (dict(flat(config)) for config in (before, now))
    return [
        f"{key}={text(new[key]) if key in new else 'nothing'}, was {text(old[key]) if key in old else 'nothing'}"
        for key in dict.fromkeys([*old, *new])
        if key != "resume" and old.get(key, flat) != new.get(key, flat)
    ]


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def refuse_to_continue(before: dict[str, Any], now: dict[str, Any]) -> None:
    """What must stay for a run to go on: the network, however it is computed; the seed and the data, which set the order and the split;
    what its state is of."""
    free = ("root", "num_workers", "augmentation", "on_error", "cache", "cache_dir", "cache_gb", "download", "subset")
    plans = []
    for config in (before, now):
        data = {f"data.{name}": value for name, value in config["data"].items() if name not in free}
        model = {f"model.{name}": value for name, value in config["model"].items() if "drop" not in name and name != "kernel"}
        plans.append(
            {
                "seed": config["seed"],
                "optimizer.opt": config["optimizer"]["opt"],
                **model,
                **data,
                "an average (recipe.ema_decay)": bool(config["recipe"]["ema_decay"]),
                "a rate for each layer (optimizer.layer_decay)": config["optimizer"].get("layer_decay") is not None,
                "recipe.freeze": config["recipe"].get("freeze"),
            }
        )
    for key, value in plans[0].items():  # and an older run may lack what came later
        if plans[1].get(key, refuse_to_continue) != value and (key in plans[1] or key.startswith("model.")):
            what = "that is another network; " if key.startswith("model.") else ""
            given = text(plans[1][key]) if key in plans[1] else "nothing"
            raise UserError(f"{key}={given}: the run to continue had {text(value)}; {what}give the same, or start from its weights=")


def text(value: Any) -> str:
    """A value as the command line takes it: null, true, [1,6]."""
    if isinstance(value, (list, ListConfig)):
        return f"[{','.join(map(text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def sweep_values(values: ListConfig) -> str:
    """[null, [1, 6]] -> "null,[1,6]": a grid as Hydra's sweeper reads it."""
    return ",".join(map(text, values))


def classes_in(root: str | None) -> int:
    """How many classes a tree of images has."""
    if root is None:
        raise UserError("data.root is not set; give the folder that holds train/ and val/, or a folder for each class: data.root=/path")
    return len(trees.own_classes(Path(root).expanduser()))


OmegaConf.register_new_resolver("sweep", sweep_values, replace=True)
OmegaConf.register_new_resolver("classes_in", classes_in, replace=True)
