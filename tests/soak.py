"""`python -m tests.soak 200`: start a run, kill it at a random moment, go on, kill it again, to the end; then compare every bit.

Each process is a real one that gets a real SIGKILL. It is forked from one that has imported everything, which spares it the seven
seconds that importing takes. What is compared with the run that nobody killed: every tensor and number of last.ckpt and best.ckpt, every
row of metrics.csv, the figures of result.json, and every image that training asked for, with its seed and its pixels.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

SHORT = (
    "logger=csv", "recipe.epochs=3", "recipe.warmup_epochs=1", "+trainer.limit_train_batches=8", "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1", "model.depth=2", "recipe.drop_path_rate=0.1", "data.num_workers=0",
)  # fmt: skip
PLANS: dict[str, Sequence[str]] = {
    "plain": (),
    "workers": ("data.num_workers=2",),
    "repeated augmentation": ("+recipe.augmentation.repeats=3", "data.num_workers=1"),
    "accumulation": ("trainer.accumulate_grad_batches=2", "data.num_workers=2"),
    "mixup": ("+recipe.augmentation.mixup=0.8", "+recipe.augmentation.cutmix=1.0", "+recipe.augmentation.erase=0.25"),
    "validation in the middle": ("+trainer.val_check_interval=3", "trainer.check_val_every_n_epoch=1"),
    "without an average": ("recipe.ema_decay=null", "optimizer=lamb"),
}


def begin(run: Path, arguments: Sequence[str]) -> int:
    """The number of a forked process that does what `work` does."""
    sys.stdout.flush()
    return os.fork() or work(run, arguments)


def work(run: Path, arguments: Sequence[str]) -> NoReturn:
    """What `python -m tnt_lightning.train ARGUMENTS hydra.run.dir=RUN` does, with RUN.seen, .steps and .validating for what it saw."""
    code = 1
    try:
        os.setsid()
        multiprocessing.set_start_method("fork", force=True)  # loaders' workers, too, note what they read
        out = os.open(run.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from tnt_lightning.train import main

        witness(run)
        sys.argv = ["train.py", *arguments, f"hydra.run.dir={run}"]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def witness(run: Path) -> None:
    """Note each training image that is asked for (its index, its seed, its pixels), and each batch as it reaches the network."""
    seen, steps, validating = (run.with_suffix(kind) for kind in (".seen", ".steps", ".validating"))
    from tnt_lightning.data.module import ImageDataModule, Transformed

    read, transfer = Transformed.__getitem__, ImageDataModule.on_after_batch_transfer

    def noted(self: Any, key: Any) -> Any:
        item = read(self, key)
        if isinstance(key, tuple) and item is not None:
            with seen.open("a") as file:
                file.write(f"{key[0]} {key[1]} {item[1]} {zlib.crc32(item[0].contiguous().numpy().tobytes())}\n")
        return item

    def handed(self: Any, batch: Any, index: int) -> Any:
        images, labels = transfer(self, batch, index)
        if self.trainer and self.trainer.training:
            place = f"{self.trainer.current_epoch} {self.trainer.fit_loop.batch_idx + 1} {self.trainer.global_rank}"
            with steps.open("a") as file:
                file.write(f"{place} {zlib.crc32(images.contiguous().numpy().tobytes() + labels.contiguous().numpy().tobytes())}\n")
        if self.trainer and self.trainer.validating:
            with validating.open("a") as file:
                file.write("batch\n")
        return images, labels

    Transformed.__getitem__ = noted  # type: ignore[method-assign]
    ImageDataModule.on_after_batch_transfer = handed  # type: ignore[method-assign]


def ended(number: int, timeout_s: float = 120) -> int:
    """The exit code of a process; below zero the signal that killed it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(number, signal.SIGKILL)
    raise TimeoutError(f"process {number} did not end in {timeout_s} s")


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def kill_after(number: int, run: Path, steps: int, delay_s: float, sig: int = signal.SIGKILL) -> None:
    """Send a signal once so many more batches have reached the network, and a moment later; nothing where the process ends before."""
    goal = len(lines(run.with_suffix(".steps"))) + steps
    while len(lines(run.with_suffix(".steps"))) < goal:
        done = os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if done is not None:
            return
        time.sleep(0.002)
    time.sleep(delay_s)
    os.kill(number, sig)


def differences(one: Path, other: Path) -> list[str]:
    """What of two finished runs is not the same to the bit."""
    import torch

    found = []
    for name in ("last", "best"):
        a, b = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (one, other))
        for checkpoint in (a, b):
            checkpoint["position"].pop("seconds")
            checkpoint["callbacks"].pop("Throughput")
        found += [f"{name}.ckpt: {where}" for where in unequal(a, b)]
    rows = [lines(run / "metrics.csv") for run in (one, other)]
    if rows[0] != rows[1]:
        found.append(f"metrics.csv: {len(rows[0])} and {len(rows[1])} lines, or others")
    a, b = (json.loads((run / "result.json").read_text()) for run in (one, other))
    found += [f"result.json: {key}" for key in a if key not in ("wall_s", "images_per_s", "commit") and a[key] != b.get(key)]
    for kind in ("seen", "steps"):
        a, b = (set(lines(run.with_suffix(f".{kind}"))) for run in (one, other))
        if a != b:
            found.append(f"{kind}: {len(a - b)} missing, {len(b - a)} that should not be")
    return found


def unequal(a: Any, b: Any, where: str = "") -> list[str]:
    import torch

    if isinstance(a, dict) and isinstance(b, dict):
        gone = [f"{where}.{key} in one only" for key in a.keys() ^ b.keys()]
        return gone + [line for key in a.keys() & b.keys() for line in unequal(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in unequal(*pair, f"{where}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [where]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cycles", type=int, help="kills in all, at least one of each plan")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    import tnt_lightning.callbacks
    import tnt_lightning.evaluate
    import tnt_lightning.train  # noqa: F401

    failed = soak(given.cycles, given.folder, random.Random(given.seed))
    raise SystemExit(1 if failed else 0)


def soak(cycles: int, folder: Path, draw: random.Random) -> int:
    """So many kills, spread over the plans, and of each plan one; gives how many runs ended otherwise than the run that nobody killed."""
    whole: dict[str, Path] = {}
    killed: set[str] = set()
    kills = failed = 0
    for count in itertools.count():
        if kills >= cycles and killed == PLANS.keys():
            break
        plan = next((plan for plan in PLANS if plan not in killed), None) or draw.choice(list(PLANS))
        arguments = [*SHORT, *PLANS[plan]]
        if plan not in whole:
            whole[plan] = folder / f"whole{len(whole)}"
            code = ended(begin(whole[plan], arguments))
            assert code == 0, whole[plan].with_suffix(".out").read_text()
        # What loaders' workers have read ahead is lost in the middle of an epoch.
        every = draw.choice([2, 3, 5] if plan == "workers" and plan not in killed else [None, 1, 2, 3, 5])
        run = folder / f"run{count}"
        cuts = []
        for _ in range(draw.randint(1, 4 if cycles > 5 * len(PLANS) else 2)):
            number = begin(run, [*arguments, f"checkpoint.every_n_steps={'null' if every is None else every}"])
            kill_after(number, run, draw.randint(0, 12), draw.random() * draw.choice([0.0, 0.02, 0.3]))
            code = ended(number)
            if code == 0:
                break
            assert code == -signal.SIGKILL, run.with_suffix(".out").read_text()
            kills += 1
            killed.add(plan)
            cuts.append(len(lines(run.with_suffix(".steps"))))
        code = ended(begin(run, [*arguments, f"checkpoint.every_n_steps={'null' if every is None else every}"]))
        differ = differences(whole[plan], run) if code == 0 else [run.with_suffix(".out").read_text()]
        failed += bool(differ)
        print(f"{plan}, every_n_steps={every}, killed after {cuts} batches: {'; '.join(differ) or 'the same to the bit'}", flush=True)
    print(f"{kills} kills, {failed} runs that ended otherwise")
    return failed


if __name__ == "__main__":
    main()
