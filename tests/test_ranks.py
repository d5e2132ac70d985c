"""Several processes of one run: the first error is the one that is read, and none outlives another."""

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from tnt_lightning import prepare, ranks, runs
from tnt_lightning.build import build_data
from tnt_lightning.errors import UserError
from tnt_lightning.evaluate import evaluate_run

from . import layouts
from .conftest import QUICK, resolved, train

SOON = 30  # seconds from a failure to the end of every process
TWO = ("trainer.accelerator=cpu", "trainer.devices=2")
MARK = "TNT_LIGHTNING_TEST"
TINY = ("model=tnt_digits", "recipe=digits", "image_size=8", "data.batch_size=4")


class Started:
    """A command of two ranks; all that it starts carries its mark in the environment."""

    def __init__(self, folder: Path, name: str, *overrides: str):
        self.mark, self.folder = uuid.uuid4().hex, folder
        drop = ("HYDRA_FULL_ERROR", "TNT_LIGHTNING_SHORT_ERRORS", "LOCAL_RANK")
        env = {key: value for key, value in os.environ.items() if key not in drop} | {MARK: self.mark}
        with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
            line = [sys.executable, "-m", f"tnt_lightning.{name}", *TWO, *overrides]
            self.process = subprocess.Popen(line, cwd=folder, env=env, stdout=out, stderr=err)

    def all(self) -> dict[int, int]:
        """The parent of each process that lives."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # gone meanwhile
                pass
        return found

    def rank(self, number: int) -> int:
        if number == 0:
            return self.process.pid
        mark = f"LOCAL_RANK={number}".encode()
        below = [pid for pid, parent in self.all().items() if parent == self.rank(0)]
        return next(pid for pid in below if mark in Path(f"/proc/{pid}/environ").read_bytes())

    def worker(self, rank: int) -> int:
        """A process that loads training images for a rank."""
        above = self.rank(rank)
        return min(pid for pid, parent in self.all().items() if parent == above and pid != self.rank(1))

    def trains(self) -> "Started":
        began = time.monotonic()
        while not list(self.folder.glob("run/checkpoints/*.ckpt")):
            assert self.process.poll() is None and time.monotonic() - began < 120, self.errors()
            time.sleep(0.1)
        return self

    def errors(self) -> str:
        return (self.folder / "err.txt").read_text()

    def ends(self, within: float) -> int:
        """The exit code, when no process is left."""
        until = time.monotonic() + within
        code = self.process.wait(within)
        while self.all():
            assert time.monotonic() < until, f"left: {self.all()}"
            time.sleep(0.1)
        return code

    def kill(self) -> None:
        for pid in self.all():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    started = []

    def start(name: str, *overrides: str) -> Started:
        started.append(Started(tmp_path, name, *overrides))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def trained(start, *overrides: str) -> Started:
    endless = ("recipe.epochs=1000", "trainer.enable_progress_bar=false", "logger=none", "hydra.run.dir=run")
    return start("train", *endless, *overrides).trains()


# ---- a rank is killed


@pytest.mark.slow
def test_of_a_killed_rank_the_first_one_tells_and_all_end(start):
    run = trained(start, "data.num_workers=1")
    rank = run.rank(1)
    os.kill(run.worker(0), signal.SIGSTOP)  # rank 0 waits for an image now, in no collective that would fail
    time.sleep(1)
    os.kill(rank, signal.SIGKILL)
    assert run.ends(SOON) == 128 + signal.SIGKILL
    [line] = run.errors().splitlines()
    assert line.startswith(f"error: rank 1 (process {rank}) was killed by SIGKILL; ") and "lower data.num_workers or data" in line


@pytest.mark.slow
def test_the_others_do_not_outlive_rank_0(start):
    run = trained(start, "data.num_workers=1")
    os.kill(run.rank(0), signal.SIGKILL)
    assert run.ends(SOON) == -signal.SIGKILL
    [line] = run.errors().splitlines()
    assert line.startswith(f"error: rank 0 (process {run.process.pid}) was killed; ") and "lower data.num_workers or data" in line


# ---- a rank stands still


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_ends_the_run_at_the_time_out(start, rank):
    run = trained(start, "data.num_workers=1", "faults.timeout_s=5")
    for stopped in [run.rank(0)] if rank == 0 else [run.worker(1), run.rank(1)]:
        os.kill(stopped, signal.SIGSTOP)
    assert run.ends(5 + SOON) == (1 if rank else -signal.SIGKILL)
    [line] = run.errors().splitlines()
    assert line.startswith("error: a rank did not answer within faults.timeout_s=5 seconds; ")


# ---- ranks of unlike speed


def test_the_ranks_wait_for_the_best_checkpoint_of_the_first(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom tnt_lightning import runs, train\ncopy = runs.copy\n"
        "def slow(*files):\n    time.sleep(3)\n    copy(*files)\n"
        "runs.copy = slow\ntrain.main()\n"
    )
    drop = ("HYDRA_FULL_ERROR", "TNT_LIGHTNING_SHORT_ERRORS", "LOCAL_RANK")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    short = ("recipe.epochs=1", "recipe.warmup_epochs=0", "+trainer.limit_train_batches=2", "logger=csv", "hydra.run.dir=run")
    done = subprocess.run([sys.executable, "slow.py", *TWO, *short], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and runs.result_of(tmp_path / "run")["checkpoint"] == "best", done.stderr


# ---- a rank raises


@pytest.mark.slow
def test_a_worker_of_one_rank_that_is_killed_is_said_once_and_the_others_are_silent(start):
    run = trained(start, "data.num_workers=1")
    worker = run.worker(1)
    os.kill(worker, signal.SIGKILL)
    assert run.ends(SOON) == 2
    [line] = run.errors().splitlines()
    assert line.startswith(f"error: a process that loads images (pid {worker}) was killed, as the system does when memory runs out; ")


class Devices:
    """What the data module asks of a Trainer."""

    def __init__(self, rank: int):
        self.world_size, self.global_rank, self.num_nodes, self.accumulate_grad_batches, self.training = 2, rank, 1, 1, False


def shown(loader: str, rank: int, *overrides: str) -> tuple[object, list[int]]:
    """The split and the indices that a rank sees of it, in the first epoch."""
    data = build_data(resolved(*TINY, *overrides, "data.num_workers=0"))
    data.trainer = Devices(rank)
    data.setup()
    loaded = getattr(data, f"{loader}_dataloader")()
    return loaded.dataset.split, [key[0] if isinstance(key, tuple) else key for key in loaded.sampler]


def broken_in(loader: str, rank: int, *overrides: str) -> Path:
    """The last image that one rank is shown, cut off."""
    split, mine = shown(loader, rank, *overrides)
    assert mine[-1] not in shown(loader, 1 - rank, *overrides)[1]
    file = Path(split.path(mine[-1]))
    file.write_bytes(file.read_bytes()[:200])
    return file


def in_one_line(run: Started, file: Path, why: str) -> None:
    began = time.monotonic()
    while not run.errors():
        assert time.monotonic() - began < 120
        time.sleep(0.1)
    assert run.ends(SOON) == 2, run.errors()
    [line] = run.errors().splitlines()
    assert re.match(f"error: {re.escape(str(file))}: {why}", line)


@pytest.mark.slow
@pytest.mark.parametrize("part, rank", [("train", 1), ("val", 0)])
def test_a_broken_image_names_itself_through_workers_and_ranks(start, tmp_path, part, rank):
    layouts.folder(tmp_path / "images")
    data = ("data=folder", f"data.root={tmp_path / 'images'}")
    broken = broken_in(part, rank, *data)
    run = start("train", "logger=none", *TINY, *data, "data.num_workers=2", *QUICK, "hydra.run.dir=run")
    in_one_line(run, broken, r"not a readable image \(")


@pytest.mark.slow
def test_a_damaged_shard_names_itself_in_evaluation(start, tmp_path):
    layouts.imagenet(tmp_path / "images")
    images = resolved("data=imagenet", f"data.root={tmp_path / 'images'}", "data.num_classes=2", "data.num_workers=1", "data.subset=true")
    prepare.prepare(images, out := tmp_path / "out", chunk_mb=0.002)
    data = ("data=imagenet_stream", f"data.root={out}", "data.num_classes=2")
    train(tmp_path / "run", *TINY, *data, "data.num_workers=0")
    split, mine = shown("val", 1, *data)
    chunk = out / split.place.chunks[int(split.chunk[mine[-1]])].name
    spoilt = bytearray(chunk.read_bytes())
    spoilt[spoilt.index(split.read(mine[-1])[0]) + 20] ^= 1
    chunk.write_bytes(spoilt)
    in_one_line(start("evaluate", f"run={tmp_path / 'run'}", "data.num_workers=2"), chunk, r"damaged \(item \d")


# ---- in one process


@pytest.fixture
def two(monkeypatch):
    """A Trainer of two ranks that never starts the other, and what would be done at the exit of this process."""
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE", ranks._PARENT):
        monkeypatch.delenv(name, raising=False)
    left: list[int] = []
    monkeypatch.setattr(ranks, "_leave", left.append)
    monkeypatch.setattr(atexit, "register", lambda leave, code: leave(code))
    yield (lambda: L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)), left
    if ranks._watch is not None:
        ranks._watch.out.set()  # where a test failed, too
    ranks.ending, ranks._watch = False, None


def test_processes_that_something_else_starts_are_left_to_it(two, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    ranks.join(trainer := two[0](), 7)
    assert type(trainer.strategy.launcher) is _SubprocessScriptLauncher
    assert trainer.strategy._timeout.total_seconds() == 7
    with pytest.raises(RuntimeError, match="gloo"), ranks.together(trainer):
        raise RuntimeError("gloo: Connection closed by peer")
    assert two[1] == []


def test_what_a_rank_does_once_all_are_to_end_is_no_failure(two, capfd):
    make, left = two
    ranks.join(trainer := make(), 7)
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    trainer.strategy.launcher.procs = [other]
    ranks.ending = True
    watch = trainer.strategy.launcher.watch
    watch.start()
    other.wait()
    time.sleep(3 * ranks.TICK_S)
    assert watch.code is None and capfd.readouterr().err == ""
    with pytest.raises(SystemExit, match="143"), ranks.together(trainer):
        raise SystemExit(143)
    assert left == [] and watch.out.is_set()


def test_the_failure_of_another_takes_the_place_of_the_lost_connection(two, capfd):
    make, left = two
    ranks.join(trainer := make(), 7)
    others = [subprocess.Popen([sys.executable, "-c", code]) for code in ("import time; time.sleep(60)", "raise SystemExit(3)")]
    trainer.strategy.launcher.procs = others
    with pytest.raises(SystemExit, match="3"), ranks.together(trainer):
        raise torch.distributed.DistBackendError("NCCL error: remote process exited")
    assert [other.poll() for other in others] == [-signal.SIGKILL, 3] and left == [3]
    assert capfd.readouterr().err == f"rank 2 (process {others[1].pid}) ended with exit code 3; what it said stands above\n"


def test_an_error_of_rank_0_ends_the_others(two, capfd):
    make, left = two
    ranks.join(trainer := make(), 7)
    trainer.strategy.launcher.procs = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])]
    with pytest.raises(UserError, match="a mistake"), ranks.together(trainer):
        raise UserError("a mistake")
    assert trainer.strategy.launcher.procs[0].poll() == -signal.SIGKILL and left == [2] and capfd.readouterr().err == ""


def test_a_mistake_of_all_ranks_is_said_where_another_ended_first(two, capfd):
    make, left = two
    ranks.join(trainer := make(), 7)
    trainer.strategy.launcher.procs = [other := subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])]
    other.wait()
    assert trainer.strategy.launcher.watch.settled()
    with pytest.raises(UserError, match="a mistake"), ranks.together(trainer):
        raise UserError("a mistake")
    assert left == [2] and capfd.readouterr().err == ""


def test_a_run_from_before_there_was_a_time_out_is_measured(finished, tmp_path, capsys):
    old = tmp_path / "run"
    shutil.copytree(finished, old)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["faults"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluate_run(str(old), [])["test/top1"] > 0 and "weights" in capsys.readouterr().out
