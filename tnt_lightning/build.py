"""From a resolved configuration, plain data, to the objects of a run."""

import copy
import inspect
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from torch import nn

import tnt_lightning.data
from tnt_lightning import memory, sharding
from tnt_lightning.checkpoints import WholeFiles
from tnt_lightning.classifier import Classifier
from tnt_lightning.curves import Curves
from tnt_lightning.dashboard import Dashboard
from tnt_lightning.data import ImageDataModule
from tnt_lightning.errors import UserError, did_you_mean
from tnt_lightning.kernels import inner
from tnt_lightning.models import build_model, own
from tnt_lightning.models.parts import freeze, head_parameters

Config = dict[str, Any]
_THREADS = torch.get_num_threads()  # torch's own choice, before a job of a sweep set another


def build_data(config: Config) -> ImageDataModule:
    arguments = dict(config["data"])
    target = arguments.pop("_target_")
    # By name from our own list: a config that came with somebody's run directory must not choose what code runs.
    module, _, name = target.rpartition(".")
    known = [name for name in tnt_lightning.data.__all__ if name != "ImageDataModule"]
    if module != "tnt_lightning.data" or name not in known:
        raise UserError(f"data._target_={target!r} is not built from a config; known: tnt_lightning.data.{{{', '.join(known)}}}")
    kind = getattr(tnt_lightning.data, name)
    _refuse_unknown("data", name, arguments, *(cls.__init__ for cls in kind.__mro__ if issubclass(cls, ImageDataModule)))
    return kind(**arguments)


def build_classifier(config: Config) -> Classifier:
    recipe, epochs = config["recipe"], config["trainer"]["max_epochs"]
    if recipe["warmup_epochs"] >= epochs:
        raise UserError(f"recipe.warmup_epochs={recipe['warmup_epochs']} is not shorter than trainer.max_epochs={epochs}; lower it")
    _refuse_sections("optimizer", config["optimizer"])
    if config["model"].get("global_pool") == "":
        raise UserError("model.global_pool='': logits for each token, of which a classifier cannot be trained; try token or avg")
    if config["model"].get("kernel") == "triton" and not (_has_gpu(config["trainer"]["accelerator"]) or inner.INTERPRETED):
        raise inner.refusal("no GPU of NVIDIA's to run on")
    _refuse_too_large(config)
    backbone = build_model(**config["model"])
    freeze(backbone, recipe.get("freeze"))  # an older run has neither this nor head_epochs
    head_epochs = recipe.get("head_epochs", 0)
    _refuse_head_epochs(backbone, head_epochs, epochs)
    classifier = Classifier(
        backbone,
        num_classes=config["data"]["num_classes"],
        optimizer=config["optimizer"],
        head_epochs=head_epochs,
        **{name: recipe[name] for name in ("warmup_epochs", "warmup_lr", "min_lr", "label_smoothing")},
    )
    classifier.make_optimizer(fused=False)  # what does not fit is said now, not when training has begun
    if config["trainer"]["strategy"] == "fsdp":
        sharding.refuse(classifier.backbone)
    if own.allowed(config["model"]["_target_"]):
        _refuse_other_outputs(config, classifier.backbone)
    return classifier


def _refuse_head_epochs(backbone: nn.Module, head_epochs: int, epochs: int) -> None:
    """Epochs of the head alone, where there is no head, nothing else to train before or after, or no epoch after them."""
    if not head_epochs:
        return
    head, said = head_parameters(backbone), f"recipe.head_epochs={head_epochs}"
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    if not head:
        raise UserError(f"{said}: the model does not say which of its parts is the head; leave it at 0")
    if head_epochs >= epochs:
        raise UserError(
            f"{said} is not shorter than trainer.max_epochs={epochs}: all else would never be trained; lower it, or recipe.freeze=backbone"
        )
    if not head & trained or not trained - head:
        frozen = "all but the head" if head & trained else "the head"
        raise UserError(f"{said}: recipe.freeze keeps {frozen} as it is; leave one of the two out")


def _refuse_other_outputs(config: Config, backbone: torch.nn.Module) -> None:
    """Of a network of the user's own, which may give anything, and would be trained on logits for other classes without a word."""
    data = config["data"]
    side = data["image_size"]
    shadow = copy.deepcopy(backbone).to("meta").eval()
    with torch.no_grad():
        logits = shadow(torch.empty(2, data["in_chans"], *([side, side] if isinstance(side, int) else side), device="meta"))
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, data["num_classes"]):
        gives = f"the shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"model._target_={config['model']['_target_']}: gives {gives} for 2 images; a backbone gives logits, (2, {data['num_classes']})"
        )


def _refuse_too_large(config: Config) -> None:
    """A model that the machine cannot hold; without the memory that it would take."""
    if torch.get_default_device().type == "meta":
        return
    with torch.device("meta"):
        shapes = build_model(**config["model"])
    size = sum(parameter.numel() * parameter.element_size() for parameter in shapes.parameters())
    if size > memory.total():
        name, shape = max(((name, tuple(p.shape)) for name, p in shapes.named_parameters()), key=lambda pair: math.prod(pair[1]))
        knob = f"image_size={config['data']['image_size']}" if "pos" in name else "model"
        raise UserError(
            f"{knob}: {size / 2**30:,.0f} GiB of parameters ({name} is {shape}) do not fit into the {memory.total() / 2**30:,.0f} GiB of "
            "this machine; lower it, or the model's other sizes"
        )


def speed_up(classifier: Classifier, compute: Config) -> None:
    """Before the training of a network, which is changed in place and keeps its names: what the `compute` section asks for."""
    torch.set_float32_matmul_precision("high" if compute["tf32"] else "highest")
    if compute["channels_last"]:
        classifier.backbone.to(memory_format=torch.channels_last)  # images follow the first weights
    if compute["compile"]:
        classifier.backbone.compile()


def build_trainer(
    config: Config,
    *,
    run: Path | None = None,
    callbacks: list[Callback] | None = None,
    curves: Curves | None = None,
    dashboard: Dashboard | None = None,
) -> L.Trainer:
    """The Trainer of `config`, and torch's CPU threads as it says; with a run directory it logs to the curves and the dashboard."""
    torch.set_num_threads(config["recipe"]["threads"] or _THREADS)
    arguments = dict(config["trainer"])
    if arguments["precision"] == "auto":
        arguments["precision"] = best_precision(arguments["accelerator"])
    if arguments["precision"] in ("bf16-true", "16-true") and config["recipe"]["ema_decay"]:
        raise UserError(
            f"trainer.precision={arguments['precision']}: an average in half precision stands still; "
            "try bf16-mixed, or recipe.ema_decay=null"
        )
    if arguments["strategy"] == "fsdp" and arguments["precision"] in ("16-mixed", "16", 16):
        raise UserError(f"trainer.strategy=fsdp: not in trainer.precision={arguments['precision']}; try bf16-mixed or 32-true")
    _refuse_unknown("trainer", "lightning.Trainer", arguments, L.Trainer.__init__)
    _refuse_sections("trainer", arguments)
    # Under SLURM, Lightning takes any hpc_ckpt_*.ckpt from here; by default here is wherever the command was started.
    arguments.setdefault("default_root_dir", str(run) if run is not None else os.devnull)
    name = config["logger"]["name"]
    loggers: list[Logger] = [curves] if curves is not None and name != "none" else []
    if dashboard is not None and name == "wandb":
        loggers.append(dashboard)
    ours: dict[str, Any] = dict(
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks or []),
        plugins=[WholeFiles()],
        use_distributed_sampler=False,  # the data module splits images among ranks itself
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    if arguments["strategy"] == "fsdp":
        ours["strategy"] = sharding.Sharded()
        del arguments["strategy"]
    if both := sorted(arguments.keys() & ours.keys()):
        raise UserError(f"trainer.{both[0]}={arguments[both[0]]}: set by the framework itself; leave it out")
    if arguments.get("fast_dev_run"):
        raise UserError("trainer.fast_dev_run: it writes no checkpoint to take figures of; trainer=debug runs a few batches of everything")
    try:
        return L.Trainer(**arguments, **ours)
    except Exception as error:  # Lightning's code, on the user's values
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{_at_fault(arguments, ours)}: {said}") from None


def _at_fault(arguments: dict[str, Any], ours: dict[str, Any]) -> str:
    """The argument without which there is a Trainer, of those that do not have Lightning's own default."""
    own = {name: parameter.default for name, parameter in inspect.signature(L.Trainer.__init__).parameters.items()}
    for name, value in arguments.items():
        if value == own[name]:
            continue
        try:
            L.Trainer(**{**arguments, name: own[name]}, **ours)
        except Exception:  # as above
            continue
        return f"trainer.{name}={value}"
    return "trainer"


def _refuse_unknown(section: str, reader: str, arguments: Mapping[str, Any], *signatures: Any) -> None:
    known = {name for signature in signatures for name in inspect.signature(signature).parameters} - {"self", "args", "kwargs"}
    for name, value in arguments.items():
        if name not in known:
            near = did_you_mean(f"{section}.{name}", [f"{section}.{other}" for other in known], f"{reader} takes no such argument")
            raise UserError(f"{section}.{name}={value}: no such key{near}")


def _refuse_sections(section: str, arguments: Mapping[str, Any]) -> None:
    """Of somebody's configuration they might describe an object to build, and nothing here builds one."""
    for name, value in arguments.items():
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)):
            raise UserError(f"{section}.{name}={value}: a section; the arguments of the {section} are plain values")


def _has_gpu(accelerator: str) -> bool:
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def best_precision(accelerator: str) -> str:
    """bfloat16 on a GPU that has it, otherwise float16 with scaling; float32 elsewhere."""
    if not _has_gpu(accelerator):
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
