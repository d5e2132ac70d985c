"""Backbones that timm has, by their names there."""

import re
from typing import Any

import timm
from torch import nn

from tnt_lightning.errors import UserError, did_you_mean

TARGET = "timm.create_model"


def by_one_name(knobs: dict[str, Any]) -> dict[str, Any]:
    """`name`, as `model=timm model.name=...` has it, is timm's model_name."""
    return {"model_name" if knob == "name" else knob: value for knob, value in knobs.items()}


def build(**given: Any) -> nn.Module:
    """timm's model of that name with random weights. UserError for other names, and for arguments that it does not take.

    img_size reaches only models that are built for one size; others take any.
    """
    knobs = by_one_name(given)
    key = "name" if "name" in given else "model_name"
    name = knobs.pop("model_name", None)
    if loading := [knob for knob in knobs if knob.startswith(("pretrained", "checkpoint", "cache"))]:
        raise UserError(f"model.{loading[0]}={knobs[loading[0]]}: a model is built without weights; weights= loads them, as data only")
    if not isinstance(name, str) or not timm.is_model(name):  # timm's hf-hub: and local-dir: sources among them
        near = did_you_mean(str(name), timm.list_models(), "timm.list_models() has their names")
        raise UserError(f"model.{key}={name!r} is no model of timm {timm.__version__}{near}")
    card = timm.get_pretrained_cfg(name, allow_unregistered=True)
    arguments = {knob: value for knob, value in knobs.items() if knob != "img_size" or card is None or card.fixed_input_size}
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # timm's code, on the user's values
        said = " ".join(str(error).split())
        unknown = re.search(r"unexpected keyword argument '(\w+)'", said)
        cure = f"; leave it out: ~model.{unknown[1]}" if unknown and unknown[1] in given else ""
        raise UserError(f"model.{key}={name}: {said}{cure}") from error
    model.built_with = {"model_name": name, **knobs}  # type: ignore[assignment]  # tells weights of another network from its own
    return model
