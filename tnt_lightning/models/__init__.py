"""Backbones: plain torch modules that know nothing of Lightning, Hydra or W&B."""

from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from tnt_lightning import CONF
from tnt_lightning.errors import UserError, did_you_mean
from tnt_lightning.models import own, timm
from tnt_lightning.models.pvt import PVT
from tnt_lightning.models.t2t_vit import T2TViT
from tnt_lightning.models.tnt import TNT, Explanation

__all__ = ["PVT", "TNT", "Explanation", "T2TViT", "build_model", "create_model"]


OURS: dict[str, Callable[..., nn.Module]] = {f"tnt_lightning.models.{kind.__name__}": kind for kind in (TNT, PVT, T2TViT)}


def build_model(*, _target_: str = "", **knobs: Any) -> nn.Module:
    """The backbone that a config's `model` section describes. ValueError for knobs that do not fit, or a target that is not known.

    Only ours and timm's are built, and what the user has named in TNT_LIGHTNING_MODELS: a config that came with somebody's run directory
    must not choose what code runs.
    """
    if _target_ == timm.TARGET:
        return timm.build(**knobs)
    if own.allowed(_target_):
        model = own.build(_target_, knobs)
        model.built_with = {"_target_": _target_, **knobs}  # type: ignore[assignment]  # as below
        return model
    if not isinstance(_target_, str) or _target_ not in OURS:
        raise UserError(
            f"model._target_={_target_!r} is not built from a config; known: {', '.join([*OURS, timm.TARGET])}; "
            f"one of your own where {own.ALLOWED}=MODULE names its module"
        )
    kind = OURS[_target_]
    known = kind.__init__.__kwdefaults__ or {}
    if unknown := sorted(set(knobs) - set(known)):
        near = did_you_mean(f"model.{unknown[0]}", [f"model.{knob}" for knob in known], f"{kind.__name__} has {', '.join(sorted(known))}")
        raise UserError(f"model.{unknown[0]}={knobs[unknown[0]]}: no such knob{near}")
    model = kind(**knobs)
    if not isinstance(model, TNT):
        model.built_with = knobs  # type: ignore[assignment]  # tells weights of another network from its own, as of timm's
    return model


def model_names() -> list[str]:
    """The models of conf/model/, as `model=NAME` on the command line and `create_model(NAME)` take them."""
    return sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def create_model(name: str, /, **knobs: Any) -> nn.Module:
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
