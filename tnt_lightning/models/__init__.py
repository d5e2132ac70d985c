"""Backbones: plain torch modules that know nothing of Lightning, Hydra or W&B."""

from typing import Any

from omegaconf import OmegaConf
from torch import nn

from tnt_lightning import CONF
from tnt_lightning.errors import UserError, did_you_mean
from tnt_lightning.models.tnt import TNT, Explanation

__all__ = ["TNT", "Explanation", "build_model", "create_model"]


def build_model(*, _target_: str = "", **knobs: Any) -> nn.Module:
    """The backbone that a config's `model` section describes. ValueError for knobs that do not fit, or a target that is not known.

    Only the names below are built: a config that came with somebody's run directory must not choose what code runs.
    """
    if _target_ == "tnt_lightning.models.TNT":
        known = TNT.__init__.__kwdefaults__ or {}
        if unknown := sorted(set(knobs) - set(known)):
            near = did_you_mean(f"model.{unknown[0]}", [f"model.{knob}" for knob in known], f"TNT has {', '.join(sorted(known))}")
            raise UserError(f"model.{unknown[0]}={knobs[unknown[0]]}: no such knob{near}")
        return TNT(**knobs)
    if _target_ == "timm.create_model":
        import timm

        name = knobs.pop("model_name", None)
        if loading := [knob for knob in knobs if knob.startswith(("pretrained", "checkpoint", "cache"))]:
            raise UserError(f"model.{loading[0]}={knobs[loading[0]]}: a model is built without weights; weights= loads them, as data only")
        if not isinstance(name, str) or not timm.is_model(name):  # also keeps out timm's hf-hub: and local-dir: sources
            raise UserError(f"model.model_name={name!r} is no model of timm {timm.__version__}")
        try:
            model = timm.create_model(name, pretrained=False, **knobs)
        except Exception as error:  # timm's code, on the user's values
            raise UserError(f"model.model_name={name}: {' '.join(str(error).split())}") from error
        model.knobs = {"model_name": name, **knobs}  # type: ignore[assignment]  # tells weights of another network from its own
        return model
    raise UserError(f"model._target_={_target_!r} is not built from a config; known: tnt_lightning.models.TNT, timm.create_model")


def model_names() -> list[str]:
    """The models of conf/model/, as `model=NAME` on the command line and `create_model(NAME)` take them."""
    return sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def create_model(name: str, **knobs: Any) -> nn.Module:
    """The bare backbone of conf/model/NAME.yaml, with random weights, for 1,000 classes and three channels unless told.

    knobs: the arguments of the model itself, such as `inner_heads=2`, `num_classes=10`, `image_size=384`.
    ValueError for an unknown name, or knobs that do not fit.
    """
    if name not in model_names():
        raise UserError(f"model {name!r} not found; available: {', '.join(model_names())}")
    defaults = {"data": {"in_chans": 3, "num_classes": 1000}, "recipe": {"drop_path_rate": 0.0}}
    config = OmegaConf.merge(defaults, OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    section = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(section, dict)
    return build_model(**{**section, **knobs})
