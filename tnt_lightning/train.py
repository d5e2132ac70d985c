"""`python -m tnt_lightning.train`: compose -> build -> fit -> test -> result.json."""

import math
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tnt_lightning.cli import command
from tnt_lightning.config import check, refuse_ablation_in_a_single_run, refuse_ablation_of_swept_models, refuse_to_continue
from tnt_lightning.errors import UserError


@command()
def main(config: DictConfig) -> float | None:
    """Trains; gives the validation top-1 (percent), which Hydra's sweepers read."""
    hydra = HydraConfig.get()
    check(config, hydra.runtime.choices["model"])
    plain: Any = OmegaConf.to_container(config)
    for key in ("grid", "released"):  # facts about the model, not choices of this run
        plain.pop(key, None)
    if hydra.mode == RunMode.MULTIRUN:
        # Lightning's DDP starts the other ranks by this command line, and each would run the whole sweep.
        if plain["trainer"]["devices"] == "auto":
            plain["trainer"]["devices"] = 1
        if plain["trainer"]["devices"] not in (1, "1", [0]) or plain["trainer"]["num_nodes"] != 1:
            raise UserError(
                f"trainer.devices={plain['trainer']['devices']}: a job of a sweep runs on one device; leave trainer.devices at auto"
            )
        refuse_ablation_of_swept_models(hydra.runtime.choices.get("ablation"))
        if plain["logger"]["name"] == "wandb" and not plain["logger"]["group"]:
            plain["logger"]["group"] = "/".join(Path(hydra.sweep.dir).absolute().parts[-2:])
    else:
        refuse_ablation_in_a_single_run(hydra.runtime.choices.get("ablation"))
    result = train(plain, Path(hydra.runtime.output_dir))
    return result.get("val/top1")


def train(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """Train by a resolved config into the directory `run`; gives what result.json holds. Top-1 and top-5 are percent."""
    import lightning as L

    from tnt_lightning import memory, runs, show
    from tnt_lightning.build import build_classifier, build_data, build_trainer
    from tnt_lightning.callbacks import EMA, Best, Last, Throughput
    from tnt_lightning.dashboard import Dashboard, Progress
    from tnt_lightning.evaluate import evaluate
    from tnt_lightning.models import cost
    from tnt_lightning.models.weights import load_weights

    began = time.perf_counter()
    recipe = config["recipe"]
    show.quiet()
    L.seed_everything(config["seed"], workers=True, verbose=False)

    classifier = build_classifier(config)
    data = build_data(config)
    parameters = cost.parameters(classifier.backbone)
    size = {
        "parameters": parameters.live,
        "parameters_as_in_the_paper": parameters.paper,
        "flops": cost.flops(classifier.backbone, data.input_size),
    }
    loaded = continued = resume = None
    if config["resume"]:
        continued, resume = runs.locate(config["resume"], "last")
        done = load_weights(classifier.backbone, resume, exact=True).epochs or 0
        if done >= config["trainer"]["max_epochs"]:
            raise UserError(f"resume={config['resume']}: trained for {done} epochs already; raise recipe.epochs to go on")
        refuse_to_continue(runs.config_of(continued), config)
        if Best.chosen_in(resume) and not (resume.parent / "best.ckpt").exists():
            raise UserError(f"resume={config['resume']}: best.ckpt is missing beside last.ckpt; weights= starts a new run from the last")
    elif config["weights"]:  # a continued run has its own
        loaded = load_weights(classifier.backbone, config["weights"])

    data.setup()
    data.skipped = run / "skipped.jsonl"
    assert data.parts is not None
    folder, throughput, dashboard, logger = run / "checkpoints", Throughput(), Dashboard(run), config["logger"]
    callbacks: list[L.Callback] = [throughput]
    if logger["name"] == "wandb":  # before EMA: example predictions are the average's
        callbacks.append(Progress(dashboard, throughput, every=logger["images_every"], count=logger["num_images"]))
    if recipe["ema_decay"]:
        callbacks.append(EMA(decay=recipe["ema_decay"]))
    if data.parts.val is not None:
        callbacks.append(Best(folder, continued=resume.parent if resume else None))
    callbacks.append(Last(folder))  # after Best, whose state it holds
    trainer = build_trainer(config, run=run, callbacks=callbacks, dashboard=dashboard)
    data.trainer = trainer
    loader, limit = data.train_dataloader(), trainer.limit_train_batches  # what does not fit is said here, before anything is written
    batches = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
    if not batches or trainer.max_steps == 0:
        raise UserError("no training step is left; raise trainer.limit_train_batches or trainer.max_steps")
    every = trainer.val_check_interval
    if isinstance(every, int) and every > batches and trainer.limit_val_batches:
        raise UserError(f"trainer.val_check_interval={every}: an epoch has {batches} batches; lower it, or give a share of the epoch: 0.5")
    if (pixels := 5 * data.device_batch * math.prod(data.input_size)) > memory.total():  # its pixels, as they are loaded and normalised
        raise UserError(
            f"data.batch_size={data.batch_size}: the pixels of {data.device_batch} images of image_size={config['image_size']} take "
            f"{pixels / 2**30:,.0f} GiB, and this machine has {memory.total() / 2**30:,.0f}; lower one of the two"
        )
    with dashboard:
        if trainer.is_global_zero:
            runs.start(run, config)
            show.opening(trainer, data, run, loaded)
            dashboard.start(config, continued=continued, figures=size)
        trainer.fit(classifier, datamodule=data, ckpt_path=resume, weights_only=True)

        trainer.loggers = []  # metrics.csv holds the curves; what follows belongs to result.json and the dashboard's summary

        def figures(checkpoint: str) -> dict[str, float]:
            load_weights(classifier.backbone, runs.checkpoint_path(run, checkpoint), exact=True)
            return evaluate(trainer, classifier, data)

        # The best checkpoint is the result where validation images chose it and others test it; otherwise the last one is.
        chosen = runs.checkpoint_path(run, "best").exists()
        choose = chosen and data.parts.test is not None
        result: dict[str, Any] = {"checkpoint": "best" if choose else "last"}
        result |= figures(result["checkpoint"])
        if chosen and not choose:
            result |= {f"best/{name}": value for name, value in figures("best").items()}
        result |= {
            **size,
            "images_per_s": throughput.images_per_s,
            **({"skipped_images": data.skipped_images} if data.on_error == "skip" else {}),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "devices": trainer.world_size,
            "precision": trainer.precision,
            "seed": config["seed"],
            "wall_s": time.perf_counter() - began,
            **runs.origin(),
        }
        if trainer.is_global_zero:
            runs.finish(run, result)
            dashboard.summarise(result)
            show.closing(result, run)
    return result


if __name__ == "__main__":
    main()
