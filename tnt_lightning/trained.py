"""A trained network, with what is needed to use it: how images are prepared for it, and what its classes are called."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from omegaconf import OmegaConf
from timm.data import ImageNetInfo
from torch import nn

from tnt_lightning import CONF, runs
from tnt_lightning.build import build_data
from tnt_lightning.cli import of_run_changed
from tnt_lightning.data import ImageDataModule
from tnt_lightning.data.images import open_as_seen
from tnt_lightning.data.module import Transformed
from tnt_lightning.data.splits import Files
from tnt_lightning.errors import UserError
from tnt_lightning.models import build_model, create_model
from tnt_lightning.models.weights import Weights, load_run, load_weights

NAMING = "run=DIR, or weights for a model: model=tnt_s weights=released"


class Trained(NamedTuple):
    """source: where the weights are from; model: in evaluation mode, on the CPU
    data: prepares images as evaluation does; has images of its own where it is a data set's
    name, about: for a reader elsewhere, without a path of this machine: how a person calls it, and a sentence or more on its weights
    classes: names by label, None where nobody knows them
    run: the directory, and its resolved configuration; both None of weights from elsewhere
    published: top-1 on ImageNet-1k in percent, and of which model, where the weights are published ones
    """

    source: str
    model: nn.Module
    data: ImageDataModule
    name: str
    about: str
    classes: list[str] | None = None
    run: Path | None = None
    config: dict[str, Any] | None = None
    published: tuple[float, str] | None = None

    def named(self, label: int) -> str:
        """The name of a class as a person reads it; its number where it has none."""
        return str(label) if self.classes is None else _described(self.classes[label])

    def images(self, files: Sequence[str]) -> Transformed:
        """(uint8 pixels (C, height, width), 0) of each: as a person sees them, turned as the camera says, and then prepared as evaluation
        does it. Asked for one, BrokenImage, which names the file, where it cannot be read."""
        return Transformed(Files(files, [0] * len(files), classes=[], opener=open_as_seen), self.data.eval_transform, self.data.mode)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What a program elsewhere must do to an image: channels, pixels a side (height, width), crop, resizing, normalisation."""
        chans, *size = self.data.input_size
        how = dict(crop_pct=self.data.crop_pct, interpolation=self.data.interpolation, mean=self.data.mean, std=self.data.std)
        return {"in_chans": chans, "image_size": size, **how}


def find(keys: Mapping[str, str]) -> Trained:
    """What `run=`, or `model=` and `weights=` name; other keys are knobs of that model, as `create_model` takes them."""
    keys = dict(keys)
    run, name, source = (keys.pop(key, None) for key in ("run", "model", "weights"))
    if run is not None:
        if others := [*(["model"] if name else []), *(["weights"] if source else []), *keys]:
            raise UserError(f"{others[0]}=: a run has its own; give run={run} alone, or model= and weights= without it")
        return of_a_run(run)
    if name is None and source is not None and not keys and (Path(source).is_dir() or Path(source).suffix == ".ckpt"):
        return of_a_run(source)  # which knows its network
    if name is None or source is None:
        lacks = "model= is missing" if source else "weights= is missing" if name else "no network is named"
        raise UserError(f"{lacks}; give {NAMING}")
    return of_weights(name, source, {knob: _value(knob, value) for knob, value in keys.items()})


def of_a_run(path: str | Path, overrides: Sequence[str] = ()) -> Trained:
    """The network of a run (a directory, or a checkpoint in one) that its result is of; overrides of data.* and kernel change values of
    its configuration."""
    directory, file = runs.locate(path)
    config = of_run_changed(directory, overrides, ("data",))
    model, data, classes = load_run(file), build_data(config), runs.classes_of(directory)
    if classes is not None and len(classes) != data.num_classes:
        raise UserError(f"{directory / runs.CLASSES}: {len(classes)} names for data.num_classes={data.num_classes}; remove it for numbers")
    about = f"Weights: {file.name} of {directory.name}."
    return Trained(str(file), model, data, directory.name, about, classes, directory, config)


def of_weights(name: str, source: str, knobs: Mapping[str, Any], *, any_head: bool = False) -> Trained:
    """Weights from anywhere in a model of conf/model/, with the pixels that they go with; any_head: where only features are looked at."""
    model = create_model(name, **knobs).eval()
    loaded = load_weights(model, source) if any_head else with_their_head(model, source, "num_classes=N is the model's")
    sizes = [knobs[knob] for knob in ("image_size", "img_size") if knob in knobs]
    size: Any = sizes[0] if sizes else OmegaConf.load(CONF / "model" / f"{name}.yaml").image_size
    classes: Any = model.num_classes
    data = ImageDataModule(image_size=size, in_chans=knobs.get("in_chans", 3), num_classes=classes, **loaded.preprocessing)
    return Trained(loaded.name, model, data, name, _about(loaded), **_imagenets(loaded, classes))


def of_composed(config: dict[str, Any], name: str, kept: set[str]) -> Trained:
    """config["weights"], or random ones, in the model and with the data of a resolved configuration, with the pixels that the weights go
    with; `kept` names those (mean, std, crop_pct, interpolation) that stay as configured."""
    torch.manual_seed(config["seed"])
    model, source = build_model(**config["model"]).eval(), config["weights"]
    if source is None:
        about = "Weights: random; this network has learned nothing (weights=SOURCE)."
        return Trained("random", model, build_data(config), name, about)
    loaded = with_their_head(model, source, "choose the data that the weights were trained for")
    data = build_data(with_pixels(config, loaded, kept))
    return Trained(loaded.name, model, data, name, _about(loaded), **_imagenets(loaded, data.num_classes))


def with_pixels(config: dict[str, Any], loaded: Weights, kept: set[str]) -> dict[str, Any]:
    """A configuration with the normalisation, crop and interpolation that weights go with, but for those that `kept` names."""
    return {**config, "data": config["data"] | {key: value for key, value in loaded.preprocessing.items() if key not in kept}}


def with_their_head(model: nn.Module, source: str, cure: str) -> Weights:
    """Loaded into a network that is used as it is. UserError where it would keep a head of its own; cure: for the message."""
    loaded = load_weights(model, source)
    if loaded.new_head:
        raise UserError(f"{loaded.name}: {loaded.changes[-1]}; {cure}")
    return loaded


def _about(loaded: Weights) -> str:
    name = Path(loaded.name).name if Path(loaded.name).exists() else loaded.name
    return " ".join([f"Weights: {name}.", *(f"{change}." for change in loaded.changes)])


def _imagenets(loaded: Weights, classes: int) -> dict[str, Any]:
    """What is known of published weights for ImageNet-1k."""
    if loaded.published is None or classes != 1000:
        return {}
    return dict(classes=_imagenet().label_names(), published=loaded.published)


def _value(knob: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{knob}={text}: not a value") from None


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(KEY=VALUE by key, the other words) of a command line. What lies there as a file is no key."""
    keys: dict[str, str] = {}
    others = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch("[a-z_]+", key) or os.path.exists(word):  # Path.exists() raises for a name that is too long
            others.append(word)
        elif key in keys:
            raise UserError(f"{word}: {key}= is given twice")
        else:
            keys[key] = value
    return keys, others


def _described(name: str) -> str:
    """ImageNet's classes are called by their WordNet ids in all its layouts."""
    if not re.fullmatch(r"n\d{8}", name):
        return name
    try:
        return _imagenet().label_name_to_description(name)
    except KeyError:
        return name


@functools.cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo()
