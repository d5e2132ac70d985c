"""What the training loop adds to the steps themselves: whole steps of the real command, beside a bare loop of the same steps."""

import contextlib
import io
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tnt_lightning.build import build_classifier, build_data, speed_up
from tnt_lightning.config import text
from tnt_lightning.data import ImageDataModule
from tnt_lightning.errors import UserError
from tnt_lightning.speed import data as photos
from tnt_lightning.speed.model import Machine, machine
from tnt_lightning.speed.rows import Clock, Row, in_words, percentiles
from tnt_lightning.train import train

UNIT = "of a bare loop's step"
WARM = 3  # steps before the measured ones
TURN = 4  # steps of one, then as many of the other: a GPU is waited for only between them
NEXT = "[_TrainingEpochLoop].train_dataloader_next"
PARTS = {  # of a step, beside the bare loop's: what Lightning's profiler calls them
    "the average (EMA)": ("[Callback]EMA",),
    "the watch over loss and gradient": ("[Callback]Finite",),
    "checkpoints and signals": ("[Callback]Checkpoints",),
    "logging": ("log", "[Callback]TQDM", "[Callback]Rich"),
}


class Watch(L.Callback):
    """Times the steps of a training from the inside: the whole of them, and what each part of the loop took.

    bare: takes a turn after each few of its steps, so that whatever else the machine does falls on both
    """

    def __init__(self, here: Machine, steps: int, bare: "Bare | None" = None):
        self.here, self.steps, self.bare = here, steps, bare
        self.actions = Actions(here.clock)
        self.seconds = self.wall = self.bares = 0.0  # of a step; bares: of the bare loop's
        self.parts: dict[str, float] = {}  # empty until all steps are done
        self.synchronisations: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        trainer.profiler = self.actions  # type: ignore[attr-defined]
        module: Any = pl_module
        module.log = self.actions.timed("log", module.log)
        for logger in trainer.loggers:
            logger.log_metrics = self.actions.timed("log", logger.log_metrics)  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = batch_idx + 1 - WARM
        if done == 0:
            if self.bare is not None:
                self.bare.seconds(WARM)
            self.actions.seconds.clear()
            self._begin()
        elif 0 < done <= self.steps and (done % TURN == 0 or done == self.steps):
            self._end()
            if self.bare is not None:
                self.bares += self.bare.seconds((done - 1) % TURN + 1) / self.steps
            if done < self.steps:
                self._begin()
            else:
                self.parts = {part: self._part(names, 0) for part, names in PARTS.items()}
                self.waiting, self.waiting_wall = (self._part((NEXT,), clock) for clock in (0, 1))

    def _begin(self) -> None:
        self._began = self.here.clock.now(), time.perf_counter()
        if self.here.clock.device.type == "cuda":
            self._heard = warnings.catch_warnings(record=True)
            self._warnings = self._heard.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def _end(self) -> None:
        if self.here.clock.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self._heard.__exit__(None, None, None)
            heard = sum("synchroniz" in str(warning.message) for warning in self._warnings or ())
            self.synchronisations = (self.synchronisations or 0) + heard
        began, began_wall = self._began
        self.seconds += (self.here.clock.now() - began) / self.steps
        self.wall += (time.perf_counter() - began_wall) / self.steps

    def _part(self, names: tuple[str, ...], clock: int) -> float:
        """Seconds of a step, by the clock of the measurement (0) or on the wall (1)."""
        return sum(seconds[clock] for action, seconds in self.actions.seconds.items() if action.startswith(names)) / self.steps


class Actions(Profiler):
    """Seconds by action, by a clock and by the one on the wall; the device is not waited for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.seconds: dict[str, tuple[float, float]] = {}
        self._begun: dict[str, tuple[float, float]] = {}

    def start(self, action_name: str) -> None:
        self._begun[action_name] = self.clock.raw(), time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name in self._begun:
            begun, before = self._begun.pop(action_name), self.seconds.get(action_name, (0.0, 0.0))
            self.seconds[action_name] = before[0] + self.clock.raw() - begun[0], before[1] + time.perf_counter() - begun[1]

    def timed(self, action: str, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.profile(action):
                return call(*args, **kwargs)

        return timed


class Bare:
    """The same steps in a loop of a few lines: images from a loader, to the device, augmented there, forward, backward, optimizer."""

    def __init__(self, plan: dict[str, Any], here: Machine):
        L.seed_everything(plan["seed"], verbose=False)
        self.here, self.device = here, here.clock.device
        self.classifier = build_classifier(plan).to(self.device)
        speed_up(self.classifier, plan["compute"])
        self.data: ImageDataModule = build_data(plan)
        self.data.setup()
        self.batches = self._load()
        self.clip = plan["trainer"]["gradient_clip_val"]
        self.optimizer = self.classifier.make_optimizer(fused=not (self.clip and here.precision.endswith("-mixed")))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=here.dtype == torch.float16)

    def seconds(self, steps: int) -> float:
        """Of the next steps together, without waiting for images."""
        self.classifier.train()
        # Where a loader works in this process its images leave the caches as cold as in the command; a GPU would work on while they come.
        batches = iter([next(self.batches) for _ in range(steps)]) if self.device.type == "cuda" else self.batches
        began, waiting = self.here.clock.now(), 0.0
        for _ in range(steps):
            asked = self.here.clock.raw()
            batch = next(batches)
            waiting += self.here.clock.raw() - asked
            self._step(batch)
        return self.here.clock.now() - began - waiting

    def _load(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from self.data.train_dataloader()

    def _step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        images, targets = self.data.batch_transform(*(part.to(self.device, non_blocking=True) for part in batch), training=True)
        with self.here.autocast():
            loss = F.cross_entropy(self.classifier(images), targets, label_smoothing=self.classifier.label_smoothing)
        self.scaler.scale(loss).backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.classifier.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def measure(config: dict[str, Any]) -> list[Row]:
    """A row for the whole step, and one for each part of it.

    In each round a short training by the command with the bare loop in turn, then one without: its loaders would gain time by the other's
    turns, so waiting for images is taken from there.
    """
    console = Console()
    if config["trainer"]["devices"] not in (1, "1", "auto"):
        raise UserError(f"trainer.devices={text(config['trainer']['devices'])}: measured on one device")
    threads = config["recipe"]["threads"] or torch.get_num_threads()
    here = machine({**config, "threads": threads})
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        plan = _plan(config, here, Path(folder), progress)
        bare = Bare(plan, here)
        for turn in progress.track(range(config["rounds"]), description="rounds"):
            both, alone = Watch(here, config["steps"], bare), Watch(here, config["steps"])
            for number, watch in enumerate((both, alone)):
                with contextlib.redirect_stdout(io.StringIO()):
                    train(plan, Path(folder) / f"run{turn}_{number}", beside=[watch])
                if not watch.parts:
                    data = config["choices"]["data"]
                    raise UserError(f"steps={config['steps']}: an epoch of data={data} has fewer; lower it, or data.batch_size")
            times["a bare loop"].append(both.bares)
            if here.clock.device.type == "cuda":  # which works while the host waits
                times["the command"].append(both.seconds)
            else:
                times["the command, without waiting for images"].append(both.seconds - both.waiting)
            times["wall"].append(alone.wall)
            times["waiting"].append(alone.waiting_wall)
            for part, seconds in both.parts.items():
                times[part].append(seconds)
    told = {
        "model": config["choices"]["model"],
        "data": config["choices"]["data"],
        "batch_size": plan["data"]["batch_size"],
        "image_size": plan["image_size"],
        "num_workers": plan["data"]["num_workers"],
        "precision": here.precision,
        "compiled": plan["compute"]["compile"],
        "threads": threads,
        "clock": here.clock.name,
        "steps": config["steps"],
        "n": config["rounds"],
    }
    if alone.synchronisations is not None:
        told["synchronisations_a_step"] = round(alone.synchronisations / config["steps"], 3)
    wall, waiting, bares = times.pop("wall"), times.pop("waiting"), times["a bare loop"]
    rows: list[Row] = [
        {"what": "part" if name in PARTS else "step", "name": name, "share": _shares(taken, bares), "ms": _ms(taken), **told}
        for name, taken in times.items()
    ]
    rows.append({"what": "waiting", "name": "waiting for images", "share": _shares(waiting, wall), "ms": _ms(waiting), **told})
    show(rows, percentiles(wall), console)
    return rows


def _shares(of: list[float], whole: list[float]) -> dict[str, float]:
    return percentiles([part / all_ for part, all_ in zip(of, whole, strict=True)])


def _ms(seconds: list[float]) -> dict[str, float]:
    return percentiles([1e3 * s for s in seconds])


def _plan(config: dict[str, Any], here: Machine, folder: Path, progress: Progress) -> dict[str, Any]:
    """The configuration of a run of as many steps; where no images are given, photos are made."""
    batches = WARM + config["steps"]
    plan = {name: value for name, value in config.items() if name not in ("out", "rounds", "steps", "choices")}
    plan |= {"resume": False, "recipe": {**plan["recipe"], "warmup_epochs": 0}}
    plan["trainer"] = {
        **plan["trainer"], "devices": 1, "max_epochs": 1, "precision": here.precision,
        "limit_train_batches": batches, "limit_val_batches": 0, "limit_test_batches": 0,
    }  # fmt: skip
    data = plan["data"]
    if data["root"] is None and config["choices"]["data"] == "imagenet":
        plan["data"] = data | {"root": str(folder / "photos"), "subset": True}
        _make_photos(folder / "photos", data["num_classes"], 2 * batches * data["batch_size"], config["seed"], progress)
    return plan


def _make_photos(root: Path, classes: int, images: int, seed: int, progress: Progress) -> None:
    """Photos of ImageNet's usual size, each under many names."""
    few = 64
    made = photos.make_photos(root / "made", "500x375", few, seed)
    for _ in progress.track(made, few, description="photos"):
        pass
    for part, count in (("val", classes), ("train", max(images, classes))):
        for number in range(count):
            name = root / part / f"{number % classes:04}" / f"{number}.jpg"
            name.parent.mkdir(parents=True, exist_ok=True)
            name.hardlink_to(root / "made" / "train" / "photos" / f"{number % few}.jpg")


def show(rows: list[Row], wall: dict[str, float], console: Console) -> None:
    first = rows[0]
    title = (
        f"a training step of {first['model']} on {first['data']}, {first['batch_size']} images, {first['precision']}, "
        f"by {'the processor' if first['clock'] == 'cpu' else 'the clock'}: p50 (p20 to p80)"
    )
    table = Table("what", "of a bare loop's step", "ms", title=title, title_justify="left")
    for row in rows:
        if row["what"] == "part" and first["what"] != "part":
            table.add_section()
            first = row
        if row["what"] != "waiting":
            table.add_row(row["name"], in_words(row["share"], ".3f"), in_words(row["ms"], ".3g"))
    console.print(table)
    waiting = rows[-1]
    share, processes = waiting["share"]["p50"], waiting["num_workers"]
    console.print(f"of {1e3 * wall['p50']:.3g} ms on the wall, {share:.1%} go to waiting for images of {processes} loader processes")
    if "synchronisations_a_step" in waiting:
        console.print(f"the device is waited for {waiting['synchronisations_a_step']:g} times a step")


def bars(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["what"] != "waiting":
            found.setdefault("steps" if row["what"] == "step" else "what of it goes to", {})[row["name"]] = row["share"]
    return found
