"""What each key of a composed configuration may be. Models check their own knobs, and Lightning the rest of the Trainer's."""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig

# Bounds that no run comes near, where torch, timm or the machine would answer beyond them, hours later or not at all.
SIDE, CLASSES, RATE, PROCESSES, STEPS = 65_536, 2**24, 1e4, 1_024, 10**9


class Kind(NamedTuple):
    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))


def number(lowest: float = -inf, highest: float = inf) -> Kind:
    return _numeric((int, float), "a number", lowest, highest)


def whole(lowest: float, highest: float = inf) -> Kind:
    return _numeric((int,), "a whole number", lowest, highest)


def _numeric(types: tuple[type, ...], words: str, lowest: float, highest: float) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, types) and not isinstance(value, bool) and abs(value) != inf and lowest <= value <= highest  # type: ignore

    least, most = (f"{bound:,}" if isinstance(bound, int) and bound > 9_999 else f"{bound:g}" for bound in (lowest, highest))
    bounds = "" if lowest == -inf else f" from {least} up" if highest == inf else f" from {least} to {most}"
    return Kind(words + bounds, fits)


def several(kind: Kind, *counts: int) -> Kind:
    """A list of as many."""
    words = f"[{', '.join([kind.words] * counts[0])}]"
    return Kind(words, lambda v: isinstance(v, (list, ListConfig)) and len(v) in counts and all(map(kind.fits, v)))


def several_of(what: str) -> Kind:
    return Kind(f"a list of {what}", lambda v: isinstance(v, (list, ListConfig)) and all(isinstance(one, (int, str)) for one in v))


def one_of(*choices: str) -> Kind:
    return Kind(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}", lambda v: v in choices)


NULL = Kind("null", lambda v: v is None)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
NEVER = Kind("false", lambda v: v is False)
SECTION = Kind("a section of keys", lambda v: isinstance(v, DictConfig))
TEXT = Kind("text", lambda v: isinstance(v, str) and v != "")
DEVICES = Kind("text", lambda v: TEXT.fits(v) and not (v.isdecimal() and (len(v) > 4 or int(v) > PROCESSES)))
PROJECT = Kind(  # W&B's own rule
    "a name of at most 128 characters without any of / \\ # ? % :",
    lambda v: isinstance(v, str) and 0 < len(v) <= 128 and not set(v) & set("/\\#?%:"),
)
TAGS = Kind(
    "a list of texts of at most 64 characters",
    lambda v: isinstance(v, ListConfig) and all(isinstance(tag, str) and 0 < len(tag) <= 64 for tag in v),
)

IMAGE_SIZE = whole(1, SIDE) | several(whole(1, SIDE), 2)

PIXELS = {  # given in the recipe, from where the data section takes them
    "batch_size": whole(1, CLASSES),
    "mean": number(-RATE, RATE) | several(number(-RATE, RATE), 1, 3),
    "std": number(1e-6, RATE) | several(number(1e-6, RATE), 1, 3),
    "crop_pct": number(0.01, 1),
    "interpolation": one_of("nearest", "bilinear", "bicubic", "lanczos"),
    "augmentation": SECTION | NULL,
    "augmentation.repeats": whole(1, PROCESSES) | one_of("auto"),
    "augmentation.crop_scale": several(number(0, 1), 2) | NULL,
    "augmentation.hflip": number(0, 1),
    "augmentation.rand_augment": TEXT | NULL,
    "augmentation.color_jitter": number(0, RATE),
    "augmentation.fast_resize": FLAG,
    "augmentation.dct_scaling": FLAG,
    "augmentation.erase": number(0, 1),
    "augmentation.mixup": number(0, RATE),
    "augmentation.cutmix": number(0, RATE),
    "augmentation.degrees": number(0, 180),
    "augmentation.shift": number(0, 1),
    "augmentation.zoom": number(0, 0.99),
}
AUGMENTATIONS = tuple(name.removeprefix("augmentation.") for name in PIXELS if name.startswith("augmentation."))

KINDS = {
    "seed": whole(0, 2**32 - 1),
    "weights": TEXT | NULL,
    "resume": TEXT | NULL | NEVER,
    "image_size": IMAGE_SIZE,
    "optimizer.opt": TEXT,
    "optimizer.lr": number(0, RATE),
    "optimizer.weight_decay": number(0, RATE),
    "optimizer.eps": number(0, RATE),
    "optimizer.betas": several(number(0, 1), 2),
    "optimizer.momentum": number(0, 1),
    "optimizer.fused": FLAG,
    "optimizer.layer_decay": number(0.01, 1) | NULL,
    "recipe.epochs": whole(1, STEPS),
    "recipe.warmup_epochs": number(0, STEPS),
    "recipe.warmup_lr": number(0, RATE),
    "recipe.min_lr": number(0, RATE),
    "recipe.label_smoothing": number(0, 1),
    "recipe.drop_path_rate": number(0, 0.99),
    "recipe.ema_decay": number(0, 1) | one_of("auto") | NULL,
    "recipe.freeze": one_of("backbone") | whole(0, STEPS) | several_of("parts") | NULL,
    "recipe.new_head": FLAG,
    "recipe.head_epochs": whole(0, STEPS),
    "recipe.clip_grad": number(0) | NULL,
    "recipe.threads": whole(1, PROCESSES) | NULL,
    **{f"recipe.{name}": kind for name, kind in PIXELS.items()},
    "model": SECTION,
    "model.drop_path_rate": number(0, 0.99),
    "data._target_": TEXT,
    "data.root": TEXT | NULL,
    "data.num_workers": whole(0, PROCESSES),
    "data.num_classes": whole(1, CLASSES),
    "data.in_chans": whole(1),
    "data.image_size": IMAGE_SIZE,
    "data.val_fraction": number(0, 0.99) | NULL,
    "data.classes": several_of("names or numbers") | NULL,
    "data.images_per_class": whole(1) | NULL,
    "data.on_error": one_of("stop", "skip"),
    "data.cache": FLAG,
    "data.download": FLAG,
    "data.subset": FLAG,
    "data.year": whole(2018, 2019),
    "data.val_labels": TEXT | NULL,
    "data.window": whole(1, STEPS),
    "data.cache_dir": TEXT | NULL,
    "data.cache_gb": number(0, 1e6) | NULL,
    "data.seed": whole(0, 2**32 - 1),
    **{f"data.{name}": kind for name, kind in PIXELS.items()},
    "trainer.accelerator": TEXT,
    "trainer.strategy": TEXT,
    "trainer.precision": TEXT | whole(1, 64),
    "trainer.max_epochs": whole(1, STEPS),
    "trainer.num_nodes": whole(1, CLASSES),
    "trainer.accumulate_grad_batches": whole(1, STEPS),
    "trainer.check_val_every_n_epoch": whole(1, STEPS),
    "trainer.log_every_n_steps": whole(1, STEPS),
    "trainer.gradient_clip_val": number(0) | NULL,
    "trainer.limit_train_batches": number(0),
    "trainer.limit_val_batches": number(0),
    "trainer.limit_test_batches": number(0),
    "trainer.devices": whole(-1, PROCESSES) | DEVICES | Kind("a list of device numbers", lambda v: isinstance(v, ListConfig)),
    "trainer.enable_progress_bar": FLAG,
    "checkpoint.every_n_steps": whole(1) | NULL,
    "faults.nonfinite": one_of("stop", "skip"),
    "faults.nonfinite_in_a_row": whole(1),
    "faults.timeout_s": number(1),
    "compute.compile": FLAG,
    "compute.channels_last": FLAG,
    "compute.tf32": FLAG,
    "logger.name": one_of("wandb", "csv", "none"),
    "logger.mode": one_of("auto", "online", "offline", "disabled"),
    "logger.project": PROJECT,
    "logger.entity": TEXT | NULL,
    "logger.group": TEXT | NULL,
    "logger.tags": TAGS,
    "logger.images_every": whole(0, STEPS),
    "logger.num_images": whole(1, STEPS),
    "logger.figures_every": whole(0, STEPS),
    "logger.init_timeout": number(1, 86_400),
    "logger.finish_timeout": number(1, 86_400),
}
