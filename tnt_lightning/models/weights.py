"""Weights into a backbone: from our runs, the official release, timm's files and the Hugging Face hub.

Only safetensors, and torch files that hold tensors and plain data, are read: nothing that a file brings along is executed.
"""

import argparse
import functools
import pickle
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict, load_model_config_from_hf, load_state_dict_from_hf
from torch import Tensor, nn

from tnt_lightning import CONF, runs
from tnt_lightning.errors import UserError
from tnt_lightning.models import build_model, create_model, model_names
from tnt_lightning.models.contract import STRIDE, ClassTokenBackbone
from tnt_lightning.models.knobs import check_image
from tnt_lightning.models.parts import head_modules
from tnt_lightning.models.timm import build as build_timm
from tnt_lightning.models.timm import by_one_name
from tnt_lightning.models.tnt import TNT, PlainBlock, TNTBlock

HUB = "hf-hub:"
PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")

# Names of the official code (https://github.com/huawei-noah/Efficient-AI-Backbones, tnt_pytorch) and of timm -> ours.
RENAMES = {
    r"^(outer_pos|patch_pos)$": "sentence_position",
    r"^(inner_pos|pixel_pos)$": "word_position",
    r"^(patch_embed|pixel_embed)\.": "word_embed.",
    r"(^|\.)(?:proj_norm([12])|norm([12])_proj)\.": r"\1fold.norm\2\3.",
    r"^(blocks\.\d+\.)?proj\.": r"\1fold.proj.",
    r"\.(inner_norm1|norm_in)\.": ".inner.norm1.",
    r"\.(inner_attn|attn_in)\.": ".inner.attn.",
    r"\.(inner_norm2|norm_mlp_in)\.": ".inner.norm2.",
    r"\.(inner_mlp|mlp_in)\.": ".inner.mlp.",
    r"\.(outer_norm1|norm_out)\.": ".outer.norm1.",
    r"\.(outer_attn|attn_out)\.": ".outer.attn.",
    r"\.(outer_norm2|norm_mlp)\.": ".outer.norm2.",
    r"^(blocks\.\d+)\.(outer_mlp|mlp)\.": r"\1.outer.mlp.",
    r"\.se_layer\.fc\.0\.": ".outer.se.norm.",
    r"\.se_layer\.fc\.1\.": ".outer.se.reduce.",
    r"\.se_layer\.fc\.3\.": ".outer.se.expand.",
}


class Weights(NamedTuple):
    """What `load_weights` loaded.

    name: where from; changes: what was adapted to the model, a line each; new_head: whether the model kept its own head
    preprocessing: the mean, std, crop_pct and interpolation that they go with
    published: (top-1 on ImageNet-1k in percent, of which model) where this network's weights are published, None for our own runs
    """

    name: str
    changes: list[str]
    new_head: bool
    preprocessing: dict[str, Any]
    published: tuple[float, str] | None


def load_weights(model: nn.Module, source: str | Path, *, exact: bool = False, new_head: bool = False) -> Weights:
    """Load `source` into a backbone. Position encodings are resized to the model's image size, and where the number of classes
    differs, or with new_head=True, the model keeps its own head; `changes` says so. exact=True refuses both.

    source: a run directory (the checkpoint of its result) or a checkpoint of ours; a safetensors or torch file with the names of
    ours, of timm or of the official release; "hf-hub:timm/tnt_s_patch16_224.in1k"; "released" for what timm publishes of this network

    UserError for a URL, a file that is missing, damaged or holds more than finite tensors and plain data, weights of another network
    (listing the parameters), and timm's `legacy` TNT, which is another network.
    """
    found = _read(model, str(source))
    ours = _unseen_knobs(model)
    theirs = (
        {knob: found.knobs.get(knob, value) for knob, value in ours.items()} if isinstance(model, TNT) else _telling(found.knobs) or ours
    )
    for knob in sorted(ours.keys() | theirs.keys()):
        if ours.get(knob) != theirs.get(knob):
            raise UserError(f"{found.name}: weights of another network ({knob}={theirs.get(knob)}, the model has {ours.get(knob)})")
    state, changes = _resized(model, _renamed(model, found), found)
    pool = getattr(model, "global_pool", None)
    if found.knobs.get("global_pool", pool) != pool:
        changes.append(f"global_pool is {pool!r}, theirs was {found.knobs['global_pool']!r}")
    head = _own_head(model, state, always=new_head)
    if exact and (changes or head):
        raise UserError(f"{found.name}: weights of another network ({'; '.join(changes + head)})")
    _refuse_another_network(found.name, state, model.state_dict())
    model.load_state_dict(state)
    return Weights(found.name, changes + head, bool(head), found.preprocessing, found.published)


def load_run(path: str | Path, checkpoint: str | None = None) -> nn.Module:
    """The backbone of a run, in evaluation mode, rebuilt from its own config, with the averaged weights of a checkpoint.

    path: a run directory, or a checkpoint in one; checkpoint: "best", "last", or None for the one that the result is of.
    Of a run by kernel=triton the backbone has kernel="auto": it works without a GPU, too.
    UserError for what is missing, or not a run.
    """
    run, file = runs.locate(path, checkpoint)
    backbone = build_model(**runs.elsewhere(runs.config_of(run))["model"])
    load_weights(backbone, file, exact=True)
    return backbone.eval()


def as_timm(model: nn.Module, input_size: Sequence[int]) -> tuple[nn.Module, str, dict[str, Any]]:
    """(timm's network that equals a backbone, with its weights; its name there; its arguments but for input and classes).

    input_size: channels, height and width of the images. UserError where timm has no such network.
    """
    name, arguments = _name_in_timm(model)
    chans, *size = input_size
    twin = build_timm(model_name=name, in_chans=chans, img_size=size, num_classes=model.num_classes, **arguments)
    state = model.state_dict()
    if isinstance(model, TNT):
        theirs = twin.state_dict()
        state = {name: state[_our_name(name)] for name in theirs}
        # (1, m, c) -> (1, c, sqrt(m), sqrt(m))
        state["pixel_pos"] = state["pixel_pos"].transpose(1, 2).reshape(theirs["pixel_pos"].shape).contiguous()
    twin.load_state_dict(state)
    return twin.eval(), name, arguments


def _name_in_timm(model: nn.Module) -> tuple[str, dict[str, Any]]:
    if isinstance(model, TNT) and (twin := _twin(model)):
        return _card(twin)["hub"].partition("/")[2].partition(".")[0], {}
    given = getattr(model, "built_with", {})
    if "model_name" not in given:
        names = ", ".join(name for name in model_names() if name.startswith("tnt_") and _card(name))
        raise UserError(
            f"timm has no network equal to this {type(model).__name__}; it has its own models, and {names} with the knobs of conf/model/"
        )
    kept = {knob: value for knob, value in _telling(given).items() if knob != "model_name"}
    return given["model_name"], kept | ({"global_pool": given["global_pool"]} if "global_pool" in given else {})


# ---- reading


class _Found(NamedTuple):
    """A source: tensors by name, the knobs of their network as far as they are known, and what `Weights` passes on."""

    name: str
    state: dict[str, Tensor]
    knobs: dict[str, Any]
    preprocessing: dict[str, Any]
    published: tuple[float, str] | None = None


def _read(model: nn.Module, source: str) -> _Found:
    if source == "released" or source.startswith(HUB):
        return _from_hub(model, HUB + _released(model) if source == "released" else source)
    if "://" in source:
        raise UserError(f"{source}: a URL is not loaded from; download it and give the file, or {HUB}OWNER/NAME")
    try:
        path = Path(source).expanduser().resolve()
        missing = not path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{source}: no path of a file ({_first_line(error)})") from None
    if missing:
        raise UserError(f"{path}: no such run directory or file; weights also come from {HUB}OWNER/NAME, or as `released`")
    file = runs.locate(path)[1] if path.is_dir() else path
    content = _open(file)
    # The averaged weights first, as timm does.
    wrapper = next((name for name in ("state_dict_ema", "model_ema", "state_dict", "model") if isinstance(content.get(name), dict)), None)
    state = {name: tensor for name, tensor in (content[wrapper] if wrapper else content).items() if isinstance(tensor, Tensor)}
    if not state or not all(isinstance(name, str) for name in state):
        raise UserError(f"{file}: holds no tensors by name")
    if "pytorch-lightning_version" in content:
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items() if name.startswith("backbone.")}
        if not state or not isinstance(content.get("epoch"), int):
            raise UserError(f"{file}: a Lightning checkpoint, but not of tnt_lightning")
        config = runs.config_of(file.parent.parent)  # without it nobody knows the network and the pixels: it is an error then
        return _Found(str(file), _sound(file, state), config["model"], _preprocessing(config["data"]))
    twin = _twin(model)
    name = f"{file} ({wrapper})" if wrapper in ("state_dict_ema", "model_ema") else str(file)
    published = (_card(twin)["top1"], twin) if twin else None
    return _Found(name, _sound(file, clean_state_dict(state)), {}, _preprocessing(model), published)


def _open(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size:  # safetensors, by whatever name
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data, which timm's and the official trainer add
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever bytes these are; torch's own text would advise to load them unsafely
        reason = _first_line(error) if isinstance(error, OSError) else type(error).__name__
        raise UserError(f"{file}: not a file of tensors and plain data, or a damaged one ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not weights by name")
    if "position" in content:  # of ours, with checksums, which torch itself does not compare
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{file}: damaged ({damaged} is not as it was written)")
    return content


def _sound(source: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(f"{source}: {name} is no dense tensor")
        if tensor.is_complex() or (tensor.is_floating_point() and not tensor.isfinite().all()):
            raise UserError(f"{source}: {name} holds numbers that are complex, infinite or not numbers")
    return state


def _from_hub(model: nn.Module, source: str) -> _Found:
    name = source.removeprefix(HUB)
    _refuse_legacy(source, name)
    try:
        config, architecture, knobs = load_model_config_from_hf(name)
        config, architecture = dict(config), str(architecture)
        knobs = {**(knobs or {}), "model_name": architecture}
    except LocalEntryNotFoundError as error:  # in older versions of the hub's library a ValueError too
        raise _not_fetched(source, error) from None
    except (RepositoryNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: no such model of timm's on the Hugging Face hub ({_first_line(error)})") from None
    except (OSError, RuntimeError, EntryNotFoundError) as error:
        raise _not_fetched(source, error) from None
    _refuse_legacy(source, architecture)
    try:
        state = _sound(source, load_state_dict_from_hf(name, weights_only=True))
    except pickle.UnpicklingError:
        raise UserError(f"{source}: its pickle holds more than tensors and plain data") from None
    except (OSError, RuntimeError, EntryNotFoundError, SafetensorError) as error:
        if "weights_only" in str(error):  # timm's words, which would advise to load it unsafely
            raise UserError(f"{source}: its pickle holds more than tensors and plain data") from None
        raise _not_fetched(source, error) from None
    preprocessing = _preprocessing(model) | _preprocessing(config)
    for name_here in model_names():
        if (card := _card(name_here)).get("hub") == name:
            return _Found(source, state, _unseen_knobs(_empty(name_here)), preprocessing, (card["top1"], name_here))
    return _Found(source, state, knobs, preprocessing)


def _not_fetched(source: str, error: Exception) -> UserError:
    return UserError(
        f"{source}: not fetched from the Hugging Face hub ({_first_line(error)}); where there is no connection, "
        "download model.safetensors elsewhere and give weights=FILE.safetensors"
    )


def _preprocessing(model: nn.Module | dict[str, Any]) -> dict[str, Any]:
    """Of timm's pretrained_cfg, which our networks carry too."""
    config: Any = getattr(model, "pretrained_cfg", model)
    return {name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in PREPROCESSING if name in config}


# ---- what is released


def _card(name: str) -> dict[str, Any]:
    """`released` of conf/model/NAME.yaml: hub, timm's name of the weights there, and top1 on ImageNet-1k. Empty where there are none."""
    card: Any = OmegaConf.select(OmegaConf.load(CONF / "model" / f"{name}.yaml"), "released")
    return dict(card or {})


def _empty(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name)


def _twin(model: nn.Module) -> str | None:
    """The model of conf/model/ with released weights that `model` is, whatever its image size and number of classes."""

    wanted = _shapes(model)
    return next((name for name, shapes in _released_shapes().items() if shapes == wanted), None)


@functools.cache  # to build them takes longer than to read a file
def _released_shapes() -> dict[str, dict[str, Any]]:
    return {name: _shapes(_empty(name)) for name in model_names() if _card(name)}


def _shapes(model: nn.Module) -> dict[str, Any]:
    free = {*_positions(model), *_head_names(model)}
    same = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in free}
    return same | _unseen_knobs(model) | {"global_pool": getattr(model, "global_pool", None)}


def _released(model: nn.Module) -> str:
    if twin := _twin(model):
        return _card(twin)["hub"]
    names = ", ".join(name for name in model_names() if _card(name))
    raise UserError(f"weights=released: timm publishes {names} with the knobs of conf/model/; this network is none of them")


# ---- fitting


def _renamed(model: nn.Module, found: _Found) -> dict[str, Tensor]:
    if not isinstance(model, TNT):
        return dict(found.state)
    if any(re.fullmatch(r"blocks\.\d+\.proj\.bias", name) for name in found.state):
        _refuse_legacy(found.name, "legacy")
    state = {}
    for name, tensor in found.state.items():
        if name == "outer_tokens":  # frozen in the official code, and read by nothing
            continue
        if name == "pixel_pos" and tensor.ndim == 4:
            tensor = tensor.flatten(2).transpose(1, 2)  # (1, c, sqrt(m), sqrt(m)) -> (1, m, c)
        name = _our_name(name)
        if name in state:
            raise UserError(f"{found.name}: holds {name} twice, under two names")
        state[name] = tensor
    return state


def _our_name(name: str) -> str:
    for theirs, ours in RENAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def _refuse_legacy(source: str, name: str) -> None:
    if "legacy" in name:
        raise UserError(
            f"{source}: timm's legacy TNT is another network (it convolves the whole image and normalises each word alone); "
            f"the paper's are {HUB}timm/tnt_s_patch16_224.in1k and {HUB}timm/tnt_b_patch16_224.in1k"
        )


def _unseen_knobs(model: nn.Module) -> dict[str, Any]:
    """What makes another network of parameters of the same shapes; of others every argument, but for sizes and rates."""
    if not isinstance(model, TNT):
        return _telling(getattr(model, "built_with", {}))
    found = {"patch_size": model.patch_size}
    for block in model.blocks:
        if isinstance(block, TNTBlock):
            found["inner_heads"] = block.inner.attn.num_heads
        if isinstance(block, (TNTBlock, PlainBlock)):
            found["outer_heads"] = block.outer.attn.num_heads
    return found


def _telling(knobs: dict[str, Any]) -> dict[str, Any]:
    free = ("_target_", "image_size", "img_size", "in_chans", "num_classes", "global_pool", "kernel")
    return {name: value for name, value in by_one_name(knobs).items() if name not in free and "drop" not in name}


def _resized(model: nn.Module, state: dict[str, Tensor], found: _Found) -> tuple[dict[str, Tensor], list[str]]:
    """`state` with position encodings for the image size of the model, and a line where that changed them."""
    if isinstance(model, ClassTokenBackbone):
        return _resized_positions(model, state, found)
    name = "pos_embed"
    before = state.get(name)
    if convert := getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None):
        # timm's own way to take up the names and sizes of its models' origins.
        try:
            state = convert(state, model)
        except Exception as error:  # timm's code, on what may be of any network
            raise UserError(f"{found.name}: weights of another network ({_first_line(error)})") from None
    after = state.get(name)
    if before is None or after is None or after is before:
        return state, []
    return state, [f"{name} resized from {before.shape[1]} to {after.shape[1]} tokens"]


def _resized_positions(model: ClassTokenBackbone, state: dict[str, Tensor], found: _Found) -> tuple[dict[str, Tensor], list[str]]:
    """As above, of ours, which may have encodings at several resolutions; of a source that does not say its image size, a square one."""
    lines = []
    for name, (new, prefix) in model.positions(model.image_size).items():
        before = state.get(name)
        if before is None or before.ndim != 3 or len(before) != 1 or before.shape[1] <= prefix:
            continue
        old = _square(before.shape[1] - prefix)
        if (size := found.knobs.get("image_size")) is not None:
            old = model.positions(check_image(size, model.stride, what=STRIDE))[name][0]
        if old is None or old == new or before.shape[1] != prefix + old[0] * old[1]:
            continue
        state = state | {name: resample_abs_pos_embed(before, list(new), list(old), num_prefix_tokens=prefix)}
        lines.append(f"{name} resized from {old[0]}x{old[1]} to {new[0]}x{new[1]} tokens")
    return state, lines


def _positions(model: nn.Module) -> set[str]:
    """What depends on the image size."""
    if isinstance(model, ClassTokenBackbone):
        return set(model.positions(model.image_size))
    return {"pos_embed"}  # timm's name


def _square(tokens: int) -> tuple[int, int] | None:
    side = isqrt(tokens)
    return (side, side) if side * side == tokens else None


def _head_names(model: nn.Module) -> list[str]:
    return [f"{head}.{part}" for head in head_modules(model) for part in ("weight", "bias")]


def _own_head(model: nn.Module, state: dict[str, Tensor], *, always: bool) -> list[str]:
    """The model's own head into `state` where the number of classes differs, or always, and a line that says so."""
    own, lines = model.state_dict(), []
    for name in _head_names(model):
        if name not in state or (name in own and own[name].shape[1:] != state[name].shape[1:]) or state[name].ndim == 0:
            continue
        if name in own and own[name].shape == state[name].shape and not always:
            continue
        theirs = state.pop(name).shape[0]
        if name in own:
            state[name] = own[name]
        if name.endswith("weight"):
            lines.append(f"{name.removesuffix('.weight')} starts anew: {theirs} classes there, {len(own[name]) if name in own else 0} here")
    return lines


def _refuse_another_network(source: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    odd = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another kind of number": sorted(
            f"{name} {state[name].dtype}"
            for name in wanted.keys() & state.keys()
            if wanted[name].is_floating_point() != state[name].is_floating_point()
        ),
        "of another shape": sorted(
            f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}"
            for name in wanted.keys() & state.keys()
            if wanted[name].shape != state[name].shape
        ),
    }
    if any(odd.values()):
        raise UserError(
            f"{source}: weights of another network ({'; '.join(f'{what}: {_list(names)}' for what, names in odd.items() if names)})"
        )


def _list(names: list[str]) -> str:
    """Of twelve blocks each name once: blocks.*.outer.se.norm.bias (x12)."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} (x{count})" for name, count in counts.items())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
