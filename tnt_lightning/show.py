"""What a person reads in the terminal before and after a run."""

import logging
import os
import shlex
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from tnt_lightning.checkpoints import Origin
from tnt_lightning.classifier import Classifier
from tnt_lightning.data import ImageDataModule
from tnt_lightning.data.module import per_channel
from tnt_lightning.models.weights import Weights


def quiet() -> None:
    """Keep what Lightning says of itself at start-up, and its advice that does not apply here, out of the way."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",
        ".*Experiment logs directory .* exists and is not empty.*",  # the run directory, claimed a moment ago
        ".*Total length of `list` across ranks is zero.*",  # no validation part, as asked
        ".*resuming from a checkpoint that ended before the epoch ended.*",  # where the loader begins is our own doing
        ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 under a newer torch
        *([] if "SLURM_JOB_ID" in os.environ else ["The `srun` command is available on your system but is not used.*"]),
    ):
        warnings.filterwarnings("ignore", advice)


def opening(trainer: L.Trainer, data: ImageDataModule, run: Path, loaded: Weights | None) -> None:
    """Where the run lies, how the global batch is shared out, and what was done to the weights that it starts from."""
    assert data.parts is not None
    sizes = ", ".join(f"{name} {len(part.labels):,}" for name, part in data.parts._asdict().items() if part is not None)
    print(f"run    {run}")
    print(f"images {sizes}")
    if names := getattr(data.parts.train, "classes", None):
        few = ", ".join(str(name).encode(errors="backslashreplace").decode() for name in names[:5])
        print(f"classes {len(names):,}: {few}{', ...' if len(names) > 5 else ''}")
    print(
        f"batch  {data.batch_size} = {data.device_batch} a device x {trainer.world_size} device(s) x {trainer.accumulate_grad_batches} "
        f"accumulation step(s), {trainer.precision}, {trainer.max_epochs} epochs"
    )
    for note in data.notes:
        print(f"note   {note}")
    if loaded is not None:
        start_from(loaded)
        if not loaded.new_head:
            print(f"       the head is theirs, of {data.num_classes} classes too; recipe.new_head=true starts it anew")
        theirs = {name: loaded.preprocessing[name] for name in ("mean", "std")}
        if any(per_channel(name, value, data.in_chans) != getattr(data, name) for name, value in theirs.items()):
            print(f"note   they were trained with other pixels: recipe.mean={theirs['mean']} recipe.std={theirs['std']}")
        else:
            height, width = data.input_size[1:]
            print(f"pixels {height}x{width}, mean {data.mean}, std {data.std}, as they were trained with")


def tuning(trainer: L.Trainer, classifier: Classifier, *, average: str | None, begun: Any) -> None:
    """What of the network is trained when, and of how many steps its average is.

    begun: from whatever weights; None: they are random
    """
    names = [name for name, parameter in classifier.backbone.named_parameters() if not parameter.requires_grad]
    if names:
        size = {flag: sum(p.numel() for p in classifier.parameters() if p.requires_grad is flag) for flag in (True, False)}
        print(f"frozen {len(names)} tensors, {size[False]:,} parameters; {size[True]:,} are trained")
        if begun is None:
            print("note   what is frozen (recipe.freeze) keeps its random weights: no weights= is given")
    if classifier.head_epochs:
        print(f"head   alone is trained for the first {classifier.head_epochs} of {trainer.max_epochs} epochs (recipe.head_epochs)")
    if average is not None:
        print(f"note   {average}")


def going_on(trainer: L.Trainer, data: ImageDataModule, origin: Origin | None, differ: list[str], hints: list[Path]) -> None:
    """What a run goes on from, what is another than before, and what is therefore no longer exact.

    differ: lines about the plan; hints: unfinished runs that could have gone on instead
    """
    for run in hints:
        print(f"note   {run} is an unfinished run of this configuration; {shlex.quote(f'hydra.run.dir={run}')} goes on with it")
    if origin is None:
        return
    for why in origin.bad:
        print(f"note   {why}; instead of it {origin.file}")
    print(f"goes on from {origin.file}, {origin.position}")
    for line in differ:
        print(f"changed {line}")
    before = origin.position
    if (before.world, before.accumulation) != (trainer.world_size, trainer.accumulate_grad_batches):
        print(
            f"note   {before.world} device(s) x {before.accumulation} accumulation step(s) before, {trainer.world_size} x "
            f"{trainer.accumulate_grad_batches} now: the same images in the same steps, but what is drawn on the device (erasing, mixing, "
            "dropout) is another, and sums are rounded in another order"
        )
    if before.num_workers != data.num_workers:
        print(f"note   {before.num_workers} loader process(es) before, {data.num_workers} now: the same images and pixels, all is exact")


def finished(result: dict[str, Any], run: Path) -> None:
    """Of a run that needs nothing any more."""
    print(f"{run} is finished; nothing is left to train")
    closing(result, run)


def start_from(loaded: Weights) -> None:
    print(f"weights {loaded.name}")
    for change in loaded.changes:
        print(f"       {change}")


def closing(result: dict[str, Any], run: Path) -> None:
    """The figures of a finished run, and how to look at it."""
    table = Table(show_header=False)
    for name, value in rows(result):
        table.add_row(name, value)
    table.add_row("run", str(run))
    Console().print(table)
    print(f"curves: {run / 'metrics.csv'}   again: python -m tnt_lightning.evaluate run={run}")


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    figures = [(f"{part} {name}", f"{result[f'{part}/{key}']:.2f} %") for part in ("test", "val", "best/val")
               for key, name in (("top1", "top-1"), ("top5", "top-5")) if f"{part}/{key}" in result]  # fmt: skip
    live, paper = result["parameters"], result["parameters_as_in_the_paper"]
    live_m, paper_m = f"{live / 1e6:.2f} M", f"{paper / 1e6:.2f} M"
    also = f" ({paper_m} as the paper counts)" if paper_m != live_m else ""
    speed = result["images_per_s"]
    return [
        *figures,
        ("checkpoint", result["checkpoint"]),
        ("parameters", f"{live_m}{also}"),
        *([("trained of these", f"{trained / 1e6:.2f} M")] if (trained := result.get("trained_parameters")) else []),
        ("FLOPs", _flops(result["flops"])),
        ("training speed", f"{speed:,.0f} images/s" if speed else "not measured"),
        *(
            [("broken images", f"{broken} left out of training, listed in skipped.jsonl")]
            if (broken := result.get("skipped_images"))
            else []
        ),
        *([("steps left out", f"{steps}, listed in nonfinite.jsonl")] if (steps := result.get("skipped_steps")) else []),
        ("time, without start-up", f"{result['wall_s']:.0f} s"),
    ]


def _flops(macs: int) -> str:
    return f"{macs / 1e9:.2f} GMAC" if macs >= 1e8 else f"{macs / 1e6:.2f} MMAC"
