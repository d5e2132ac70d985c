"""Weights & Biases, beside metrics.csv: on the first rank alone, and never in the way of training.

wandb is known here only and imported late. Its calls run in a thread that is waited for so many seconds and no longer;
whatever goes wrong in one ends in a single line, and metrics.csv goes on alone.
"""

import io
import json
import math
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from tnt_lightning import runs
from tnt_lightning.callbacks import Checkpoints, Throughput
from tnt_lightning.config import flat
from tnt_lightning.data import ImageDataModule
from tnt_lightning.data.module import Transformed, batch_of
from tnt_lightning.models import TNT
from tnt_lightning.pictures import draw

CALL_S = 20.0  # for a call that only hands data to W&B's service process
FIGURES = 4  # images in one
VISIBLE = 96  # pixels a side that a person wants to see
SWEPT = "TNT_LIGHTNING_SWEPT"  # in the environment of a sweep's job: which of its overrides are swept
FILE = "wandb.json"  # in the run directory: which W&B run it is


class Dashboard(Logger):
    """The W&B run of a run directory. It logs between `start` and a failure, or the end of the `with` block around training.

    The block's end finishes the W&B run: as failed where it is left by an exception.
    """

    def __init__(self, run: Path):
        super().__init__()
        self.run = run
        self.page: Any = None  # wandb.Run while there is one

    def start(self, config: dict[str, Any], *, continued: Path | None = None, figures: dict[str, Any]) -> None:
        """Open the W&B run that `config["logger"]` asks for, and say in one line where it is.

        config: the resolved configuration; continued: the run directory that this one continues; figures: for the summary
        """
        knobs = config["logger"]
        if knobs["name"] != "wandb" or knobs["mode"] == "disabled":
            return
        exits = sys.exit, sys.excepthook
        with isolate_rng(include_cuda=False):  # the draws of training are those of a run without W&B
            try:
                self._open(knobs, config, continued)
            except Exception as error:
                self.page = None
                print(f"W&B    not used: {_reason(error)}; the curves are in {self.run / 'metrics.csv'}")
            finally:
                sys.exit, sys.excepthook = exits  # wandb puts its own in their place, one around the other, run after run
        if self.page is None:
            self._close()
        self.summarise(figures)

    def _open(self, knobs: dict[str, Any], config: dict[str, Any], continued: Path | None) -> None:
        import wandb

        reach_s, self._finish_s = knobs["init_timeout"], knobs["finish_timeout"]
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=reach_s, x_service_wait=CALL_S,
            finish_timeout=self._finish_s, finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,  # otherwise a killed run loses its last fifteen seconds
        )  # fmt: skip
        session = _within(2 * CALL_S, wandb.setup, settings)  # starts the service process
        mode = session.settings.mode if knobs["mode"] == "auto" else knobs["mode"]  # with WANDB_MODE
        if mode == "disabled":
            return
        before = _read(continued) if continued else {}
        given = session.settings  # with WANDB_RUN_GROUP, and what an agent of W&B's sets
        swept = _swept(given.sweep_param_path)
        arguments = dict(
            project=before.get("project") or knobs["project"],
            entity=before.get("entity") or knobs["entity"],
            id=before.get("id"),
            resume="allow" if before else None,
            group=knobs["group"] or given.run_group or given.sweep_id,
            name="/".join(self.run.parts[-2:])[-128:],
            job_type="sweep" if swept else "train",
            tags=[*dict.fromkeys([*knobs["tags"], *(key[-64:] for key in swept if key != "seed")])] or None,
            config={**_on_top(swept, config), **config},
            dir=self.run,
            reinit="create_new",  # leaves wandb.run alone, and a run of somebody else's in this process
        )
        why = f"{mode}, as asked"
        if mode not in ("offline", "dryrun"):
            why = "offline, not logged in (wandb login)"
            try:
                if _within(CALL_S, wandb.login, prompt=False, verify=False):
                    why = f"offline, {session.settings.base_url} did not take the run"
                    self.page = _within(reach_s + CALL_S, wandb.init, mode="online", **arguments)
            except Exception as error:
                why += f": {_reason(error)}"
        if self.page is None:
            self.page = _within(2 * CALL_S, wandb.init, mode="offline", **arguments)
        # The parts of a continued run; the last of them may have been moved since.
        folders = [*before.get("folders", [])[:-1], str(continued / "wandb")] if continued and before else []
        folders = list(dict.fromkeys([*folders, str(self.run / "wandb")]))
        known = dict(id=self.page.id, project=self.page.project, entity=self.page.entity or None)
        known |= dict(mode="offline" if self.page.offline else "online", url=self.page.url, folders=folders)
        runs.write(self.run / FILE, json.dumps(known, indent=2) + "\n")
        self._folders = [folder for folder in folders if Path(folder).is_dir()]
        print(f"W&B    {why}; to upload it: {self._sync()}" if self.page.offline else f"W&B    {self.page.url}")
        self._attempt(self.page.define_metric, "trainer/global_step")
        self._attempt(self.page.define_metric, "*", step_metric="trainer/global_step", step_sync=True)

    def _sync(self, *options: str) -> str:
        """The command that uploads: of a continued run the parts, which W&B puts together in the order of their start."""
        return shlex.join(["wandb", "sync", *options, *self._folders])

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.page is not None:
            self._attempt(self.page.log, metrics if step is None else {**metrics, "trainer/global_step": step})

    def summarise(self, figures: dict[str, Any]) -> None:
        """Figures under the names of result.json; what is None is not known yet."""
        if self.page is not None:
            self._attempt(self.page.summary.update, {name: value for name, value in figures.items() if value is not None})

    def give_up(self, error: Exception) -> None:
        """Log no more to W&B, after an error of its own."""
        if self.page is not None:
            print(f"W&B    stopped: {_reason(error)}; training goes on, the curves are in {self.run / 'metrics.csv'}", flush=True)
            self.page = None
            self._close()

    def _attempt(self, call: Callable, *args: Any, **kwargs: Any) -> None:
        try:
            _within(CALL_S, call, *args, **kwargs)
        except Exception as error:
            self.give_up(error)

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        page, self.page = self.page, None
        if page is None:
            return
        try:
            _within(self._finish_s + CALL_S, page.finish, exit_code=0 if kind is None else 1)
            if page.offline:
                runs.probe(self.run / "wandb")  # W&B does not say when a full disk cut its record short
        except Exception as error:
            again = self._sync() if page.offline else self._sync("--include-online")
            print(f"W&B    not finished: {_reason(error)}; to upload it: {again}")
        finally:
            self._close()

    def _close(self) -> None:
        """End wandb's session, so that the next run of this process has one of its own, and the exit waits for none."""
        try:
            import wandb

            if wandb.run is None:  # otherwise the session is somebody else's too
                _within(CALL_S, wandb.teardown)
        except Exception:
            pass  # it was broken already, and that has been said

    # What else Lightning asks of a logger.
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The configuration is there from the start."""

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""  # the progress bar shows any other


class Progress(Callback):
    """What the dashboard shows as training goes on: images/s and the best validation top-1, example predictions, and figures of a TNT.

    every: epochs between example predictions, 0 for none; count: how many, always the same, spread over the validation part
    figures: epochs between the paper's Figures 4 to 7 and the position encodings, of the first of those images; 0 for none

    It goes before EMA, which takes the averaged weights out again at the end of a validation.
    """

    def __init__(self, dashboard: Dashboard, throughput: Throughput, *, every: int, count: int, figures: int = 0):
        self.dashboard, self.throughput, self.every, self.count, self.figures = dashboard, throughput, every, count, figures
        self._examples: tuple[Tensor, Tensor] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        why = "this network has no visual words" if not isinstance(pl_module.backbone, TNT) else None
        if why is None and find_spec("matplotlib") is None:
            why = "matplotlib is missing, pip install 'tnt-lightning[figures]'"
        if self.figures and why:
            self.figures = 0
            if self.dashboard.page is not None:
                print(f"W&B    no figures: {why}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = {"images_per_s": self.throughput.images_per_s}
        if self.dashboard.page is not None and "val/top1" in trainer.callback_metrics:
            # best.ckpt is written after this hook, so the figure of this epoch counts too.
            scores = [callback.best_top1 for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints)]
            figures["best/val/top1"] = max(float(s) for s in (*scores, trainer.callback_metrics["val/top1"]) if s is not None)
        self.dashboard.summarise(figures)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs
        shown = [
            show for every, show in ((self.every, self._predict), (self.figures, self._draw)) if every and (last or epoch % every == 0)
        ]
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)  # sharded weights would need the other ranks
        if self.dashboard.page is None or not shown or not whole or trainer.state.fn != "fit":
            return
        with isolate_rng(include_cuda=False):
            try:
                logged = {name: value for show in shown for name, value in show(trainer, pl_module).items()}
                self.dashboard.log_metrics(logged, trainer.global_step - 1)
            except Exception as error:
                self.dashboard.give_up(error)

    def _chosen(self, data: ImageDataModule) -> tuple[Tensor, Tensor, list[str]]:
        """Images (uint8), their labels, and what the classes are called."""
        assert data.parts is not None and data.parts.val is not None
        if self._examples is None:
            shown = Transformed(data.parts.val, data.eval_transform, data.mode)
            places = np.linspace(0, len(shown) - 1, min(self.count, len(shown))).round().astype(int)
            self._examples = batch_of([shown[int(i)] for i in places])
        names = getattr(data.parts.val, "classes", None) or [str(i) for i in range(data.num_classes)]
        return *self._examples, list(names)

    def _predict(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Images with the class that the model gives them; Lightning has put it into evaluation mode."""
        import wandb

        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        pixels, labels, names = self._chosen(data)
        inputs, _ = data.batch_transform(pixels.to(module.device), labels, training=False)
        precision = trainer.precision_plugin
        with torch.no_grad(), precision.val_step_context():
            logits = module.backbone(precision.convert_input(inputs))  # type: ignore[operator]
        sure, predicted = logits.float().softmax(1).max(1)
        kind = "png" if min(pixels.shape[2:]) < VISIBLE else "jpg"  # a photograph as png takes several times the place
        examples = [
            wandb.Image(_visible(image), caption=f"predicted {names[guess]} ({p:.0%}), is {names[label]}", file_type=kind)
            for image, guess, p, label in zip(pixels, predicted.tolist(), sure.tolist(), labels.tolist(), strict=True)
        ]
        return {"examples": examples}

    def _draw(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        import wandb

        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        pixels, labels, names = self._chosen(data)
        pixels, labels = pixels[:FIGURES], labels[:FIGURES]
        inputs, _ = data.batch_transform(pixels.to(module.device), labels, training=False)
        precision = trainer.precision_plugin
        images = draw.Images(pixels, precision.convert_input(inputs), [f"class {names[label]}" for label in labels.tolist()])
        backbone: Any = module.backbone
        with precision.val_step_context():
            return {
                f"figures/{picture.name}": wandb.Image(Image.open(io.BytesIO(picture.png)), caption=picture.caption, file_type="png")
                for picture in draw.explained(backbone, images)
            }


def _visible(pixels: Tensor) -> Any:
    """A picture of uint8 (C, height, width), of a small one each pixel so many times."""
    times = math.ceil(VISIBLE / min(pixels.shape[1:]))
    return to_pil_image(pixels.repeat_interleave(times, 1).repeat_interleave(times, 2))


def _swept(parameters: str | None) -> dict[str, Any]:
    """What a sweep gives this run, by key; of a sweep of W&B's own it is in the file that the agent writes for the run."""
    if parameters:
        written = yaml.safe_load(Path(parameters).read_text())
        return {key.lstrip("+"): one["value"] for key, one in written.items() if key != "wandb_version"}
    pairs = (override.partition("=") for override in json.loads(os.environ.get(SWEPT, "[]")))
    return {key.lstrip("+"): value for key, _, value in pairs}


def _on_top(swept: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What a sweep is about, as W&B groups by it: `optimizer_lr`, since it takes dots for sections; of `model=NAME`, which is a section,
    `model_choice`."""
    values = dict(flat(config))
    return {re.sub(r"\W", "_", key) + ("" if key in values else "_choice"): values.get(key, given) for key, given in swept.items()}


def _read(run: Path) -> dict[str, Any]:
    """What `run` says of its W&B run; nothing where it had none."""
    try:
        return dict(json.loads((run / FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _within(seconds: float, call: Callable, *args: Any, **kwargs: Any) -> Any:
    """What `call` gives, or its exception; TimeoutError after so many seconds, and the call is left alone in its thread."""
    done: Future = Future()

    def work() -> None:
        try:
            done.set_result(call(*args, **kwargs))
        except BaseException as error:  # wandb exits, too, where its service does not
            done.set_exception(error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}"))

    threading.Thread(target=work, daemon=True, name="dashboard").start()
    try:
        return done.result(seconds)
    except TimeoutError as error:
        raise error if done.done() else TimeoutError(f"no answer in {seconds:g} s") from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__


if __name__ == "__main__":
    from tnt_lightning.workspace import main

    main()
