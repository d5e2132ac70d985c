"""Several processes of one run: the first error is the one that is read, and none outlives another."""

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
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
from .processes import SOON_S, START_S, TWO, Started

SHORT = ("recipe.epochs=1", "recipe.warmup_epochs=0", "+trainer.limit_train_batches=2", "logger=csv", "trainer.enable_progress_bar=false",
         "trainer.log_every_n_steps=1", "hydra.run.dir=run")  # fmt: skip
TINY = ("model=tnt_digits", "recipe=digits", "image_size=8", "data.batch_size=4")


@pytest.fixture
def start(tmp_path):
    started = []

    def start(name: str, *overrides: str, **env: str) -> Started:
        """A command of ours, or a script that lies here."""
        line = [name] if name.endswith(".py") else ["-m", f"tnt_lightning.{name}"]
        err = tmp_path / f"err{len(started)}.txt"
        started.append(Started([*line, *TWO, *overrides], cwd=tmp_path, out=err.with_stem(f"out{len(started)}"), err=err, **env))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def trained(start, *overrides: str) -> Started:
    endless = ("recipe.epochs=1000", "trainer.enable_progress_bar=false", "logger=none", "hydra.run.dir=run")
    return trains(start("train", *endless, *overrides))


def trains(run: Started) -> Started:
    return run.until(lambda: list(run.out.parent.glob("run/checkpoints/*.ckpt")))


def errors(run: Started) -> list[str]:
    return run.err.read_text().splitlines()


# ---- a rank is killed


@pytest.mark.slow
def test_of_a_killed_rank_the_first_one_tells_and_all_end(start):
    run = trained(start, "data.num_workers=1")
    rank = run.rank(1)
    os.kill(run.worker(0), signal.SIGSTOP)  # rank 0 waits for an image now, in no collective that would fail
    time.sleep(1)
    os.kill(rank, signal.SIGKILL)
    assert run.ends() == 128 + signal.SIGKILL
    [line] = errors(run)
    assert line.startswith(f"error: rank 1 (process {rank}) was killed by SIGKILL; ") and "lower data.num_workers or data" in line


@pytest.mark.slow
def test_the_others_do_not_outlive_rank_0(start):
    run = trained(start, "data.num_workers=1")
    os.kill(run.rank(0), signal.SIGKILL)
    assert run.ends() == -signal.SIGKILL
    [line] = errors(run)
    assert line.startswith(f"error: rank 0 (process {run.pid}) was killed; ") and "lower data.num_workers or data" in line


# ---- a rank stands still


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_ends_the_run_at_the_time_out(start, rank):
    run = trained(start, "data.num_workers=1", "faults.timeout_s=5")
    for stopped in [run.rank(0)] if rank == 0 else [run.worker(1), run.rank(1)]:
        os.kill(stopped, signal.SIGSTOP)
    assert run.ends(5 + SOON_S) == (1 if rank else -signal.SIGKILL)
    [line] = errors(run)
    assert line.startswith("error: a rank did not answer within faults.timeout_s=5 seconds; ")


# ---- ranks of unlike speed


@pytest.mark.slow
def test_the_ranks_wait_for_the_best_checkpoint_of_the_first(start, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom tnt_lightning import runs, train\ncopy = runs.copy\n"
        "def slow(*files):\n    time.sleep(3)\n    copy(*files)\n"
        "runs.copy = slow\ntrain.main()\n"
    )
    run = start("slow.py", *SHORT)
    assert run.ends(START_S) == 0 and runs.result_of(tmp_path / "run")["checkpoint"] == "best", run.said


@pytest.mark.slow
def test_the_first_rank_ends_last(start, tmp_path):
    """Another one that is slower to come to its end than the first is not told that the first was killed, nor left behind."""
    (tmp_path / "slow.py").write_text(
        "import os, time\nfrom tnt_lightning import runs, train\norigin = runs.origin\n"
        "def slow():\n    time.sleep(5 * (os.environ.get('LOCAL_RANK') == '1'))\n    return origin()\n"
        "runs.origin = slow\ntrain.main()\nprint('end of', os.environ.get('LOCAL_RANK'), flush=True)\n"
    )
    run = start("slow.py", *SHORT).until(lambda: runs.result_of(tmp_path / "run"))
    run.until(lambda: run.process.poll() is not None, alive=False)
    assert run.all() == {} and run.process.returncode == 0 and errors(run) == [] and "end of 1" in run.said


# ---- a rank raises


@pytest.mark.slow
@pytest.mark.parametrize("what", ["not a number", "a bug"])
def test_what_one_rank_meets_ends_all_and_is_said_once(start, tmp_path, what):
    """Rank 1 meets it, and rank 0 has to hear of it."""
    (tmp_path / "meets.py").write_text(
        "import math, os\nfrom tnt_lightning import train\nfrom tnt_lightning.data import ImageDataModule\n"
        "transfer = ImageDataModule.on_after_batch_transfer\n"
        "def meets(self, batch, index):\n    images, labels = transfer(self, batch, index)\n"
        "    if os.environ.get('LOCAL_RANK') == '1' and self.trainer.training and self.trainer.global_step == 3:\n"
        f"        images = images * {'math.nan' if what == 'not a number' else '[][0]'}\n"
        "    return images, labels\n"
        "ImageDataModule.on_after_batch_transfer = meets\ntrain.main()\n"
    )
    run = start("meets.py", *(knob.replace("batches=2", "batches=6") for knob in SHORT))
    run.until(lambda: errors(run), alive=False)
    if what == "a bug":
        assert run.ends() == 1, run.said
        assert run.said.count("Traceback (most recent call last)") == run.said.count("IndexError: list index out of range") == 1, run.said
        assert re.fullmatch(r"rank 1 \(process \d+\) ended with exit code 1; what it said stands above", errors(run)[-1])
    else:
        assert run.ends() == 2, run.said
        [line] = errors(run)
        assert line.startswith("error: the loss is nan at step 3 (epoch 0, ")
        [row] = map(json.loads, (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines())
        assert row["loss"][1] == "nan" != row["loss"][0] and len(row["images"]) == 32, "those of rank 1 alone"


# ---- several machines


@pytest.mark.slow
def test_two_machines_that_are_started_by_hand_make_one_run(start, tmp_path):
    """With NODE_RANK, as Lightning documents it; the directory is that of the first one."""
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    lines = ("trainer.devices=1", "trainer.num_nodes=2", *SHORT)
    ours, theirs = (start("train", *lines, NODE_RANK=str(node), **place) for node in range(2))
    assert ours.ends(START_S) == 0 and theirs.ends() == 0, ours.said + theirs.said
    assert runs.result_of(tmp_path / "run")["devices"] == 2 and errors(ours) == errors(theirs) == []
    left_out = start("train", "trainer.devices=1", "trainer.num_nodes=2", NODE_RANK="1", **place)
    assert left_out.ends(START_S) == 2 and errors(left_out)[0].startswith("error: hydra.run.dir: of several tasks ")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ---- a worker of a rank, or what it reads


@pytest.mark.slow
def test_a_worker_of_one_rank_that_is_killed_is_said_once_and_the_others_are_silent(start):
    run = trained(start, "data.num_workers=1")
    worker = run.worker(1)
    os.kill(worker, signal.SIGKILL)
    assert run.ends() == 2
    [line] = errors(run)
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
    run.until(lambda: errors(run), alive=False)
    assert run.ends() == 2, run.said
    [line] = errors(run)
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
    assert left == [143] and watch.out.is_set(), "and the process group of ranks that are gone is left to the system"


def test_at_the_end_of_all_the_first_rank_waits_for_the_others_and_ends_those_that_hang(two, monkeypatch):
    make, left = two
    monkeypatch.setattr(ranks, "ENDING_S", 3)
    ranks.join(trainer := make(), 7)
    others = [subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"]) for seconds in (1, 60)]
    trainer.strategy.launcher.procs = others
    ranks.ending = True
    with pytest.raises(SystemExit, match="143"), ranks.together(trainer):
        raise SystemExit(143)
    assert [other.poll() for other in others] == [0, -signal.SIGKILL] and left == [143]


@pytest.mark.parametrize("code, line", [
    (3, "rank 1 (process 5) ended with exit code 3; what it said stands above"),
    (2, None),
    (143, "error: rank 1 (process 5) was ended by SIGTERM"),
    (-signal.SIGSEGV, "error: rank 1 (process 5) was killed by SIGSEGV"),
])  # fmt: skip
def test_how_another_rank_ended(code, line):
    """One that was told to end outside of training has said nothing."""
    assert ranks._ending_of("rank 1 (process 5)", code) == (128 - code if code < 0 else code, line)


# ---- the group beside that of the training


@pytest.fixture
def alone(monkeypatch):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_ranks_that_do_not_reach_each_other_over_gloo_say_what_to_name(monkeypatch):
    group = ranks.beside(1800)
    assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 1860, "only to meet is quick"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
    with pytest.raises(UserError, match=r"do not reach each other over gloo, by nowhere \(.*\); .* GLOO_SOCKET_IFNAME=eth0"):
        ranks.beside(1800)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("given, found", [("lo", "lo"), ("=lo", "lo"), ("l,nowhere", "lo"), ("=l", None), ("^lo", None), ("nowhere", None)])
def test_gloos_interface_is_that_of_nccl(monkeypatch, given, found):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", given)
    ranks.beside(1800)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == found


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
