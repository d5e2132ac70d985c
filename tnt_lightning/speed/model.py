"""How fast whole models are, side by side: images/s of inference and of training steps, latency, memory, and the share of what the device
can do."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timm.models import tnt as timms
from timm.optim import create_optimizer_v2
from torch import nn

from tnt_lightning import CONF
from tnt_lightning.build import best_precision
from tnt_lightning.errors import UserError
from tnt_lightning.models import build_model, cost, create_model, model_names
from tnt_lightning.speed.rows import Ceilings, Clock, Row, ceilings, in_turn, in_words, percentiles, ratios

UNIT = "times as fast"
TIMM = "timm"  # in `beside`: the same network as timm has it
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PASSES = {"inference": 1, "training": 3}  # of as many FLOPs as the forward pass has
TURN_S = 0.2  # a turn has as many calls as take about that long on a GPU


class Machine(NamedTuple):
    clock: Clock
    dtype: torch.dtype
    precision: str

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.clock.device.type, self.dtype, enabled=self.dtype != torch.float32)


def machine(config: dict[str, Any]) -> Machine:
    """What the trainer section means here, with torch's threads set."""
    accelerator, precision = config["trainer"]["accelerator"], config["trainer"]["precision"]
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    if not on_gpu and accelerator not in ("auto", "cpu"):
        raise UserError(f"trainer.accelerator={accelerator}: there is no CUDA GPU here; try cpu")
    if precision == "auto":
        precision = best_precision(accelerator)
    if precision not in DTYPES:
        raise UserError(f"trainer.precision={precision}: measured in {', '.join(DTYPES)}")
    torch.set_num_threads(config["threads"])
    torch.set_float32_matmul_precision("high" if config["compute"]["tf32"] else "highest")
    clock = Clock(torch.device("cuda" if on_gpu else "cpu"), "cpu" if not on_gpu and config["threads"] == 1 else "wall")
    return Machine(clock, DTYPES[precision], precision)


class Contestant:
    """A model on the device, with its optimizer, and what a turn of it is."""

    def __init__(self, model: nn.Module, here: Machine, size: tuple[int, ...], batch_size: int, num_classes: int, *, compiled: bool):
        self.flops = cost.flops(model, size)  # type: ignore[arg-type]
        on_gpu = here.clock.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        self.here, self.model = here, model.to(here.clock.device)
        self.images = torch.randn(batch_size, *size, device=here.clock.device)
        self.labels = torch.randint(num_classes, (batch_size,), device=here.clock.device)
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=1e-4, weight_decay=0.05, fused=True)
        self.scaler = torch.amp.GradScaler(here.clock.device.type, enabled=here.dtype == torch.float16)
        if compiled:
            self.model.compile()
        self.peak: dict[str, int] = {}
        for phase, call in self.turns().items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                call()
            if on_gpu:  # all others, made before, stand still
                self.peak[phase] = torch.cuda.max_memory_allocated() - before

    def turns(self) -> dict[str, Callable[[], None]]:
        # Training last: the optimizer's state, made by its first step, is no part of the memory of inference.
        return {"inference": lambda: self.infer(self.images), "latency": lambda: self.infer(self.images[:1]), "training": self.step}

    def infer(self, images: torch.Tensor) -> None:
        self.model.eval()
        with torch.no_grad(), self.here.autocast():
            self.model(images)

    def step(self) -> None:
        self.model.train()
        with self.here.autocast():
            loss = F.cross_entropy(self.model(self.images), self.labels, label_smoothing=0.1)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def measure(config: dict[str, Any]) -> list[Row]:
    """A row for each contestant and phase, eager and compiled; ratios are to every model that stands beside, in the same round."""
    here, console = machine(config), Console()
    on_gpu = here.clock.device.type == "cuda"
    batch_size = config["images"] or (256 if on_gpu else 2)
    side = config["image_size"]
    size = (config["data"]["in_chans"], *((side, side) if isinstance(side, int) else side))
    models = contestants(config)
    modes = [False, True] if (on_gpu if config["compiled"] is None else config["compiled"]) else [False]
    torch.manual_seed(config["seed"])
    best = ceilings(here.clock, here.dtype)
    field: dict[str, Contestant] = {}
    times: dict[str, dict[str, list[float]]] = {}
    with Progress(console=console, transient=True) as progress:
        todo = [(name, compiled) for compiled in modes for name in models]
        for name, compiled in progress.track(todo, description="warm-up, and compilation"):
            label = f"{name} compiled" if compiled else name
            field[label] = Contestant(models[name](), here, size, batch_size, config["data"]["num_classes"], compiled=compiled)
        calls = {
            (label, phase): max(1, round(TURN_S / here.clock.seconds(call))) if on_gpu else 1
            for label, one in field.items()
            for phase, call in one.turns().items()
        }
        for phase in ("inference", "training", "latency"):
            times[phase] = {label: [] for label in field}
            for turn in progress.track(range(config["rounds"]), description=phase):
                for label in in_turn(list(field), turn):
                    times[phase][label].append(here.clock.seconds(field[label].turns()[phase], calls[label, phase]))
    rows = [
        {
            "what": "model",
            "phase": phase,
            "name": label.removesuffix(" compiled"),
            "compiled": label.endswith(" compiled"),
            "ratio": {other: ratios(taken, times[phase][other]) for other in field if other != label},
            **(
                {"ms": percentiles([1e3 * s for s in taken])}
                if phase == "latency"
                else {
                    "images_per_s": percentiles([batch_size / s for s in taken]),
                    "utilisation": percentiles([PASSES[phase] * field[label].flops * batch_size / s / best.flops for s in taken]),
                }
            ),
            "peak_memory_gib": round(field[label].peak[phase] / 2**30, 3) if on_gpu else None,
            "gmac": round(field[label].flops / 1e9, 3),
            "batch_size": 1 if phase == "latency" else batch_size,
            "image_size": list(size[1:]),
            "precision": here.precision,
            "threads": config["threads"],
            "clock": here.clock.name,
            "ceiling_tmac_per_s": float(f"{best.flops / 1e12:.4g}"),
            "n": config["rounds"],
        }
        for phase, by_label in times.items()
        for label, taken in by_label.items()
    ]
    show(rows, config["beside"], best, console)
    return rows


def contestants(config: dict[str, Any]) -> dict[str, Callable[[], nn.Module]]:
    """By name, ours first: what makes each, with the classes, channels and pixels of ours."""
    own, name = config["model"], config["choices"]["model"]
    given = {
        "num_classes": config["data"]["num_classes"],
        "in_chans": config["data"]["in_chans"],
        "drop_path_rate": config["recipe"]["drop_path_rate"],
        **dict.fromkeys(("image_size", "img_size"), config["image_size"]),
    }
    found: dict[str, Callable[[], nn.Module]] = {name: lambda: build_model(**own)}
    for other in config["beside"]:
        if other == TIMM:
            if (theirs := twin(own)) is not None:
                found[TIMM] = theirs
        elif other not in model_names():
            raise UserError(f"beside={other}: no such model; available: {TIMM}, {', '.join(model_names())}")
        elif other != name:
            known = OmegaConf.load(CONF / "model" / f"{other}.yaml").model
            found[other] = partial(create_model, other, **{knob: value for knob, value in given.items() if knob in known})
    return found


def twin(model: dict[str, Any]) -> Callable[[], nn.Module] | None:
    """timm's network of the same arithmetic and sizes; None where timm has none."""
    if model["_target_"] != "tnt_lightning.models.TNT" or model["se"] or model["tnt_blocks"] or model["position_encoding"] != "both":
        return None
    across = isqrt(model["words_per_patch"])
    return lambda: timms.TNT(
        img_size=model["image_size"], patch_size=model["patch_size"], in_chans=model["in_chans"], num_classes=model["num_classes"],
        embed_dim=model["outer_dim"], inner_dim=model["inner_dim"] or model["outer_dim"] // model["words_per_patch"], depth=model["depth"],
        num_heads_inner=model["inner_heads"], num_heads_outer=model["outer_heads"], mlp_ratio=model["mlp_ratio"],
        qkv_bias=model["qkv_bias"], drop_path_rate=model["drop_path_rate"], first_stride=model["patch_size"] // across,
    )  # fmt: skip


def show(rows: list[Row], beside: list[str], best: Ceilings, console: Console) -> None:
    """A table for each phase, ratios first: to the same mode of each that stands beside."""
    others = [name for name in beside if any(row["name"] == name for row in rows)]
    for phase in ("inference", "training", "latency"):
        of_phase = [row for row in rows if row["phase"] == phase]
        first = of_phase[0]
        title = f"{phase}, {first['batch_size']} image(s) of {'x'.join(map(str, first['image_size']))}, {first['precision']}: "
        table = Table(title=title + "p50 (p20 to p80)", title_justify="left")
        for column in ("model", *(f"speed / {name}'s" for name in others)):
            table.add_column(column)
        latency, memory = phase == "latency", first["peak_memory_gib"] is not None
        table.add_column("ms" if latency else "images/s")
        if not latency:
            table.add_column("of what is possible")
        if memory:
            table.add_column("peak GiB")
        for row in of_phase:
            mode = " compiled" if row["compiled"] else ""
            cells = [in_words(row["ratio"].get(name + mode), ".2f") for name in others]
            cells.append(in_words(row["ms"], ".2f") if latency else in_words(row["images_per_s"], ".4g"))
            if not latency:
                cells.append(f"{row['utilisation']['p50']:.0%}")
            table.add_row(row["name"] + mode, *cells, *([f"{row['peak_memory_gib']:.2f}"] if memory else []))
        console.print(table)
    reached = f"{best.flops / 1e12:.3g} T multiply-accumulates a second"
    console.print(f"of what is possible: of {reached}, which a large matrix product reaches here")


def bars(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """For the picture: how fast each is beside the others of its mode."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        group = f"{row['phase']}{', compiled' if row['compiled'] else ''}"
        for other, ratio in row["ratio"].items():
            if row["name"] == rows[0]["name"] and other.endswith(" compiled") == row["compiled"]:
                found.setdefault(group, {})[f"{row['name']} / {other.removesuffix(' compiled')}"] = ratio
    return found
