"""`python -m tnt_lightning.train`: compose -> build -> fit -> test -> result.json."""

import sys

from tnt_lightning import signals

if __name__ == "__main__" or sys.argv[0].endswith("tnt-train"):
    signals.hold()  # first of all: of a SLURM job whose time is over while it still imports

import contextlib
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tnt_lightning import runs
from tnt_lightning.cli import Arguments, arguments, command, composed, fail, quoted
from tnt_lightning.config import (
    changes,
    check,
    plain,
    refuse_ablation_in_a_single_run,
    refuse_ablation_of_swept_models,
    refuse_to_continue,
    text,
)
from tnt_lightning.errors import UserError

if TYPE_CHECKING:
    import lightning as L

    from tnt_lightning.checkpoints import Origin
    from tnt_lightning.signals import Signals

SPEAKING_S = 8  # that other tasks give the first one to say what is wrong: the end of one may end all (srun --kill-on-bad-exit)


# Of a configuration: what is no part of what a run came to.
_BESIDE = (
    "kernel=", "model.kernel=", "compute.", "logger.", "checkpoint.", "faults.", "data.num_workers=", "data.cache", "data.download=",
    "trainer.enable_progress_bar=", "trainer.log_every_n_steps=",
)  # fmt: skip
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def find_directory() -> None:
    """Before Hydra makes or writes into it: of `resume=latest` the run that it names; and of a run that goes on, what was composed for
    it stays as it is."""
    asked = arguments()
    if asked is None or asked.multirun or asked.cfg or asked.help:
        return
    place: Any = asked.given.get("hydra.run.dir")
    resume = asked.given.get("resume")
    if place is None and _tasks() > 1:
        if _rank() > 0 and not _node():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # by which srun ends all, and gives the highest exit code
            time.sleep(SPEAKING_S)
            raise SystemExit(2)
        fail("hydra.run.dir: of several tasks (srun, torchrun) each would make a directory of its own; give hydra.run.dir=DIR")
    if _rank() > 0:
        if _tasks() > 1 and "hydra.output_subdir" not in asked.given:  # as Lightning does with those that it starts
            sys.argv.append("hydra.output_subdir=null")
        return
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and place is None and resume is not False
    if place is not None and runs.holds(Path(place)):
        if resume == "latest":  # it is the one that is named
            asked.drop("resume")
    elif resume == "latest" or restarted:
        if resume == "latest" and _tasks() > 1:
            fail("resume=latest: of several tasks (srun, torchrun) each would look for itself; hydra.run.dir=RUN goes on with any")
        place = _latest(asked, place)
    if place is not None and runs.busy(Path(place)):  # also before it holds anything: the other one may be downloading its images
        fail(str(runs.in_use(Path(place))))
    if place is not None and runs.holds(Path(place)):
        sys.argv.append("hydra.output_subdir=null")


def _latest(asked: Arguments, place: str | None) -> str | None:
    """The newest unfinished run of what was asked for, which becomes the directory on the command line; otherwise `place`."""
    before = asked.given.get("resume")
    asked.drop("resume")
    config = composed(asked.overrides)
    try:
        if config is None:  # Hydra says what is wrong with it
            return place
        found = runs.unfinished(plain(config), beside=Path(place or config.hydra.run.dir))
    except OmegaConfBaseException:  # as above
        return place
    if found:
        asked.drop("hydra.run.dir")
        sys.argv.append(quoted("hydra.run.dir", found[0]))
        return str(found[0])
    print("no unfinished run of this configuration: a new one")
    if before not in (None, "latest"):
        sys.argv.append(quoted("resume", before))
    return place


def _tasks() -> int:
    """Of how many processes, that something else has started, this is one; at least."""
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ:
        return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    return _node() + 1


def _rank() -> int:
    """Of this process, where something says it: torchrun, Lightning, SLURM; of one that was started by hand, that of its machine."""
    return next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdecimal()), _node())


def _node() -> int:
    """Which machine this is, where a person started a process on each, with NODE_RANK as Lightning reads it."""
    if any(name in os.environ for name in _RANKS):
        return 0
    return next((int(os.environ[name]) for name in ("NODE_RANK", "GROUP_RANK") if os.environ.get(name, "").isdecimal()), 0)


def conclude() -> None:
    """After Hydra: of a sweep its summary, and its exit code."""
    if (sweep := sys.modules.get("tnt_lightning.sweep")) is not None and sweep.current is not None:
        sweep.current.conclude()


@command(before=find_directory, after=conclude)
def main(config: DictConfig) -> float | None:
    """Trains; gives the validation top-1 (percent), which Hydra's sweepers read."""
    hydra = HydraConfig.get()
    check(config, hydra.runtime.choices["model"])
    plan = plain(config)
    if plan["resume"] == "latest":  # otherwise `find_directory` has found it
        raise UserError("resume=latest: for the command line of a single run, as it stands here; hydra.run.dir=RUN goes on with any")
    if hydra.mode == RunMode.MULTIRUN:  # in this process, by a launcher of Hydra's
        # Lightning's DDP starts the other ranks by this command line, and each would run the whole sweep.
        if plan["trainer"]["devices"] == "auto":
            plan["trainer"]["devices"] = 1
        if plan["trainer"]["devices"] not in (1, "1", [0]) or plan["trainer"]["num_nodes"] != 1:
            raise UserError(
                f"trainer.devices={text(plan['trainer']['devices'])}: under hydra/launcher={hydra.runtime.choices['hydra/launcher']} a job "
                "runs on one device; hydra/launcher=tnt runs it on several"
            )
        refuse_ablation_of_swept_models(hydra.runtime.choices.get("ablation"))
    elif OmegaConf.is_missing(hydra.job, "num"):  # and no job of a sweep
        refuse_ablation_in_a_single_run(hydra.runtime.choices.get("ablation"))
    if not OmegaConf.is_missing(hydra.job, "num") and plan["logger"]["name"] == "wandb" and not plan["logger"]["group"]:
        plan["logger"]["group"] = "/".join(Path(hydra.sweep.dir).absolute().parts[-2:])[-128:]
    result = train(plan, Path(hydra.runtime.output_dir))
    return result.get("val/top1")


def train(config: dict[str, Any], run: Path, *, beside: Sequence["L.Callback"] = ()) -> dict[str, Any]:
    """Train by a resolved config into the directory `run`; gives what result.json holds. Top-1 and top-5 are percent.

    beside: callbacks that come along, to look on
    Where an unfinished run of that plan lies there, it goes on; of a finished one the result is given. SystemExit where a signal ends it.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from tnt_lightning import show
    from tnt_lightning.signals import Signals

    first = getattr(rank_zero_only, "rank", 0) == 0 and not _node()
    show.quiet()
    with Signals(first=first) as signals, runs.claimed(run) if first else contextlib.nullcontext():
        if config["resume"] is None and (run / "config.yaml").exists():
            # Cut off before its first checkpoint, it begins where it was to begin.
            config = {**config, "resume": runs.config_of(run).get("resume") or None}
        if first and runs.holds(run):
            if config["resume"] is False:
                raise UserError(f"{run} already holds a run; choose another hydra.run.dir, or go on with it: without resume=false")
            differ = changes(runs.config_of(run), config)
            if result := runs.result_of(run):
                if other := [line for line in differ if not line.startswith(_BESIDE)]:
                    raise UserError(f"{run} holds a finished run of another configuration ({_few(other)}); choose another hydra.run.dir")
                show.finished(result, run)
                return result
            refuse_to_continue(runs.config_of(run), config)
        else:
            differ = []
            if not first and (result := runs.result_of(run)):  # of several tasks, of which the first one says the same
                return result
        return _train(config, run, signals, differ, beside)


def _train(config: dict[str, Any], run: Path, signals: "Signals", differ: list[str], beside: Sequence["L.Callback"]) -> dict[str, Any]:
    import lightning as L

    from tnt_lightning import memory, ranks, show
    from tnt_lightning.build import build_classifier, build_data, build_trainer, speed_up
    from tnt_lightning.callbacks import EMA, Checkpoints, Finite, Throughput
    from tnt_lightning.curves import Curves
    from tnt_lightning.dashboard import Dashboard, Progress
    from tnt_lightning.evaluate import evaluate
    from tnt_lightning.models import cost
    from tnt_lightning.models.weights import load_weights
    from tnt_lightning.sharding import Sharded

    began = time.perf_counter()
    recipe, faults = config["recipe"], config["faults"]
    L.seed_everything(config["seed"], workers=True, verbose=False)

    classifier = build_classifier(config)
    data = build_data(config)
    parameters = cost.parameters(classifier.backbone)
    trained = sum(parameter.numel() for parameter in classifier.backbone.parameters() if parameter.requires_grad)
    size = {
        "parameters": parameters.live,
        "parameters_as_in_the_paper": parameters.paper,
        **({"trained_parameters": trained} if trained < parameters.live else {}),
        "flops": cost.flops(classifier.backbone, data.input_size),
    }
    loaded = None
    origin = _origin(config, run)
    if origin is not None:
        load_weights(classifier.backbone, origin.file, exact=True)
    elif config["weights"]:  # a continued run has its own
        loaded = load_weights(classifier.backbone, config["weights"], new_head=recipe["new_head"])

    speed_up(classifier, config["compute"])
    data.setup()
    data.skipped = run / "skipped.jsonl"
    assert data.parts is not None
    size_now = len(data.parts.train.labels)
    if origin is not None and origin.position.train_images != size_now:
        raise UserError(
            f"data.root={config['data']['root']}: {size_now:,} training images, and the run to continue had "
            f"{origin.position.train_images:,}; give the same images, or start from its weights="
        )
    curves, throughput, dashboard, logger = Curves(run / "metrics.csv"), Throughput(), Dashboard(run), config["logger"]
    finite = Finite(run, policy=faults["nonfinite"], in_a_row=faults["nonfinite_in_a_row"])
    callbacks: list[L.Callback] = [throughput, finite]
    if logger["name"] == "wandb":  # before EMA: example predictions are the average's
        shown = dict(every=logger["images_every"], count=logger["num_images"], figures=logger["figures_every"])
        callbacks.append(Progress(dashboard, throughput, **shown))
    average = EMA(decay=recipe["ema_decay"]) if recipe["ema_decay"] else None
    if average is not None:
        callbacks.append(average)
    checkpoints = Checkpoints(
        run / "checkpoints",
        every_n_steps=config["checkpoint"]["every_n_steps"],
        signals=signals,
        curves=curves,
        origin=origin,
        timeout_s=faults["timeout_s"],
    )
    callbacks += [checkpoints, *beside]
    trainer = build_trainer(config, run=run, callbacks=callbacks, curves=curves, dashboard=dashboard)
    ranks.join(trainer, faults["timeout_s"])
    data.trainer = trainer
    loader, limit = data.train_dataloader(), trainer.limit_train_batches  # what does not fit is said here, before anything is written
    batches = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
    if not batches or trainer.max_steps == 0:
        raise UserError("no training step is left; raise trainer.limit_train_batches or trainer.max_steps")
    every = trainer.val_check_interval
    if isinstance(every, int) and every > batches and trainer.limit_val_batches:
        raise UserError(f"trainer.val_check_interval={every}: an epoch has {batches} batches; lower it, or give a share of the epoch: 0.5")
    check_every = every if isinstance(every, int) else max(1, int(batches * every))
    if check_every < batches and check_every % trainer.accumulate_grad_batches and trainer.limit_val_batches:
        raise UserError(
            f"trainer.val_check_interval={every}: after {check_every} batches, in the middle of a step of "
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}; give a multiple of that"
        )
    steps = math.ceil(batches / trainer.accumulate_grad_batches) * config["trainer"]["max_epochs"]
    said = average.suit(min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps) if average is not None else None
    if (pixels := 5 * data.device_batch * math.prod(data.input_size)) > memory.total():  # its pixels, as they are loaded and normalised
        raise UserError(
            f"data.batch_size={data.batch_size}: the pixels of {data.device_batch} images of image_size={config['image_size']} take "
            f"{pixels / 2**30:,.0f} GiB, and this machine has {memory.total() / 2**30:,.0f}; lower one of the two"
        )
    with dashboard, ranks.together(trainer):
        if trainer.is_global_zero:
            hints = runs.unfinished(config, beside=run)[:1] if config["resume"] is None and origin is None else []
            runs.start(run, config, classes=getattr(data.parts.train, "classes", None))
            if origin is not None and origin.run == run:
                for name in ("last", "previous"):  # a damaged one is never taken for the one before
                    if any(line.startswith(f"{runs.checkpoint_path(run, name)}:") for line in origin.bad):
                        _put_aside(runs.checkpoint_path(run, name))
            show.opening(trainer, data, run, loaded)
            tells = loaded is not None or recipe["ema_decay"] == "auto"  # elsewhere a short run is one to see that it runs
            show.tuning(trainer, classifier, average=said if tells else None, begun=loaded or origin)
            show.going_on(trainer, data, origin, differ, hints)
            source = origin.run if origin else run  # without a checkpoint, a run starts over
            curves.go_on_from(source / "metrics.csv", origin.position.rows if origin else 0)
            dashboard.start(config, continued=origin.run if origin else None, figures=size)
        trainer.fit(classifier, datamodule=data, ckpt_path=origin.file if origin else None, weights_only=True)
        signals.phase = "after"
        if signals.came is not None:  # after the last step
            signals.hand_back()
            raise SystemExit(128 + signals.came)

        trainer.loggers = []  # metrics.csv holds the curves; what follows belongs to result.json and the dashboard's summary

        def figures(checkpoint: str) -> dict[str, float]:
            # Into a network that has been sharded for training no file is loaded.
            measured = build_classifier(config) if isinstance(trainer.strategy, Sharded) else classifier
            load_weights(measured.backbone, runs.checkpoint_path(run, checkpoint), exact=True)
            return evaluate(trainer, measured, data)

        # The best checkpoint is the result where validation images chose it and others test it; otherwise the last one is.
        chosen = checkpoints.best_step is not None
        choose = chosen and data.parts.test is not None
        result: dict[str, Any] = {"checkpoint": "best" if choose else "last"}
        result |= figures(result["checkpoint"])
        if chosen and not choose:
            result |= {f"best/{name}": value for name, value in figures("best").items()}
        result |= {
            **size,
            "images_per_s": throughput.images_per_s,
            **({"skipped_images": data.skipped_images} if data.on_error == "skip" else {}),
            **({"skipped_steps": finite.skipped} if finite.policy == "skip" else {}),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "devices": trainer.world_size,
            "precision": trainer.precision,
            "seed": config["seed"],
            "wall_s": checkpoints.start.seconds + time.perf_counter() - began,
            **runs.origin(),
        }
        if trainer.is_global_zero:
            runs.finish(run, result)
            signals.phase = "done"
            dashboard.summarise(result)
            show.closing(result, run)
    return result


def _origin(config: dict[str, Any], run: Path) -> "Origin | None":
    """What training goes on from: the run that lies in its directory, or the one that `resume` names; None for a new one.

    The same on every rank: the first one has written no checkpoint yet when the others look.
    """
    from tnt_lightning.checkpoints import Origin, Position, newest, read

    resume, epochs = config["resume"], config["trainer"]["max_epochs"]
    named = isinstance(resume, str) and resume != "latest"
    # Of another run, it has that one's best.ckpt before it has anything of its own.
    begun = not named or any(file.stem in ("last", "previous") for file in (run / "checkpoints").glob("*"))
    source, found = run, newest(run) if resume is not False and begun else None
    if found is None and named:
        source, file = runs.place(resume)
        found = (file, Position.of(read(file)), []) if file is not None else newest(source)
        if found is None:
            raise UserError(f"resume={resume}: it was cut off before its first checkpoint; start anew, without resume=")
        if found[1].epoch >= epochs:
            raise UserError(f"resume={resume}: trained for {found[1].epoch} epochs already; raise recipe.epochs to go on")
        refuse_to_continue(runs.config_of(source), config)
    if found is None:
        return None
    file, position, bad = found
    if position.epoch + bool(position.batch) > epochs:
        raise UserError(f"recipe.epochs={epochs}: {file} is of epoch {position.epoch + bool(position.batch)} already; raise recipe.epochs")
    return Origin(source, file, position, bad)


def _put_aside(file: Path) -> None:
    if file.exists():
        os.replace(file, file.with_suffix(".damaged"))


def _few(lines: list[str]) -> str:
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


if __name__ == "__main__":
    main()
