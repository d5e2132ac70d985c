"""Nothing is lost: a run that was cut off in whatever way goes on to the same bits, and what cannot go on says so."""

import ctypes
import itertools
import json
import math
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tnt_lightning import load_run, prepare, runs
from tnt_lightning.checkpoints import WholeFiles, read
from tnt_lightning.cli import quoted
from tnt_lightning.curves import Curves
from tnt_lightning.data import Digits, ImageDataModule
from tnt_lightning.errors import UserError
from tnt_lightning.evaluate import evaluate_run
from tnt_lightning.signals import Signals
from tnt_lightning.train import main

from . import layouts, processes, soak
from .conftest import command, train
from .processes import START_S
from .test_training import same, weights

SHORT = (*soak.SHORT, "checkpoint.every_n_steps=2")
LONG = (*SHORT, "recipe.epochs=200")


class Started:
    """A real process that trains, forked from one that has imported everything; `work` does what soak.work does."""

    def __init__(self, run: Path, *arguments: str, work: Callable[..., None] = soak.work):
        self.run = run
        self.process = FORKS.Process(target=work, args=(run, arguments))
        self.process.start()
        STARTED.append(self)

    def after(self, batches: int, kind: str = ".steps") -> "Started":
        """Once so many batches have reached the network."""
        goal = time.monotonic() + 100
        while len(soak.lines(self.run.with_suffix(kind))) < batches:
            assert self.process.is_alive() and time.monotonic() < goal, self.said
            time.sleep(0.01)
        return self

    def send(self, number: int) -> "Started":
        os.kill(self.process.pid, number)
        return self

    def ended(self, timeout_s: float = 100) -> int:
        self.process.join(timeout_s)
        assert not self.process.is_alive(), self.said
        return self.process.exitcode

    @property
    def said(self) -> str:
        return "\n".join(soak.lines(self.run.with_suffix(".out")))


os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # read by the process that forks: it must have one thread
FORKS = multiprocessing.get_context("forkserver")
STARTED: list[Started] = []
FORKS.set_forkserver_preload(["tnt_lightning.train", "tnt_lightning.evaluate", "tnt_lightning.dashboard", "tests.soak"])


@pytest.fixture(autouse=True)
def none_is_left():
    yield
    for one in STARTED:
        one.process.kill()
    STARTED.clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody cut off."""
    run = tmp_path_factory.mktemp("whole") / "whole"
    assert Started(run, *SHORT).ended() == 0
    return run


@pytest.fixture
def cut(tmp_path, whole) -> Path:
    """A run of the same plan, killed in the middle of its second epoch."""
    run = tmp_path / "cut"
    assert Started(run, *SHORT).after(13).send(signal.SIGKILL).ended() == -signal.SIGKILL
    return run


def went_on(run: Path, *overrides: str) -> Started:
    again = Started(run, *SHORT, *overrides)
    assert again.ended() == 0, again.said
    return again


# ---- a process that dies


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_middle_of_an_epoch_to_the_same_bits(cut, whole):
    assert "goes on from" in went_on(cut).said and re.search(r"step (10|12) \(1 epochs and [24] batches done\)", went_on_line(cut))
    assert soak.differences(whole, cut) == []


def went_on_line(run: Path) -> str:
    return next(line for line in soak.lines(run.with_suffix(".out")) if line.startswith("goes on from"))


@pytest.mark.slow
def test_ten_kills_at_random_moments_by_every_plan(tmp_path):
    """Workers, repeated augmentation, accumulation, mixup, validation in the middle of epochs, without an average."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "10", "--folder", str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and ", 0 runs that ended otherwise" in done.stdout, done.stdout + done.stderr
    assert all(f"\n{plan}, every_n_steps=" in f"\n{done.stdout}" for plan in soak.PLANS)


def _poisoned(run: Path, arguments: Sequence[str]) -> None:
    transfer = ImageDataModule.on_after_batch_transfer

    def poison(self: ImageDataModule, batch: Any, index: int) -> Any:
        images, labels = transfer(self, batch, index)
        if self.trainer and self.trainer.training and self.trainer.global_step in (3, 9, 10, 13, 21):
            images = images * math.nan
        return images, labels

    ImageDataModule.on_after_batch_transfer = poison
    soak.work(run, arguments)


def test_steps_that_were_left_out_are_counted_across_a_restart(tmp_path):
    """Those of all parts, and those in a row."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    skips = (*SHORT, "checkpoint.every_n_steps=5", "faults.nonfinite=skip")
    assert Started(whole, *skips, work=_poisoned).ended() == 0
    assert Started(run, *skips, work=_poisoned).after(13).send(signal.SIGKILL).ended() == -signal.SIGKILL  # from step 10 on again
    assert (again := Started(run, *skips, work=_poisoned)).ended() == 0, again.said
    assert soak.differences(whole, run) == [] and runs.result_of(run)["skipped_steps"] == 5


# ---- what is on the disk when


def test_nothing_is_named_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """Whatever is renamed has been synced, and its directory is synced after it; and the rows that a checkpoint counts before it."""
    done: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, os.replace

    def synced(number):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(number)

    def renamed(source, target):
        done.append(("rename", Path(source)))
        replace(source, target)
        done.append(("named", Path(target)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    run = tmp_path / "run"
    train(run, *SHORT)
    prepare._replace(tmp_path / "shards.json", "{}")
    names = [path.name for what, path in done if what == "named"]
    assert {"last.ckpt", "previous.ckpt", "best.ckpt", "config.yaml", "metrics.csv", "result.json", "shards.json"} <= set(names)
    for place, (what, path) in enumerate(done):
        if what == "rename" and path.name != ".previous.ckpt.tmp":  # another name of what is there
            assert ("sync", path) in done[:place], path
        if what == "named":
            assert ("sync", path.parent) in done[place:], path
    saves = [0, *(place for place, entry in enumerate(done) if entry == ("named", runs.checkpoint_path(run, "last")))]
    assert len(saves) > 10 and all(("sync", run / "metrics.csv") in done[one:other] for one, other in itertools.pairwise(saves))


def test_a_row_that_its_disk_has_no_room_for_is_not_there_in_part(tmp_path):
    curves = Curves(tmp_path / "metrics.csv")
    curves.log_metrics({"train/loss": 1.0}, step=1)
    whole = (tmp_path / "metrics.csv").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 3, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path / 'metrics.csv'}"):
            curves.log_metrics({"train/loss": 0.123456789}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.csv").read_bytes() == whole


def test_a_run_that_is_cut_off_before_its_first_checkpoint_starts_over(tmp_path, whole):
    run = tmp_path / "cut"
    Started(run, *SHORT, "checkpoint.every_n_steps=null").after(3).send(signal.SIGKILL).ended()
    assert (run / "config.yaml").exists() and not list((run / "checkpoints").glob("*.ckpt"))
    went_on(run)
    assert soak.differences(whole, run) == []


def test_a_run_that_is_cut_off_after_its_last_step_is_only_tested(cut, whole):
    for name in ("last", "previous", "best"):
        shutil.copy(runs.checkpoint_path(whole, name), runs.checkpoint_path(cut, name))
    shutil.copy(whole / "metrics.csv", cut / "metrics.csv")
    steps = len(soak.lines(cut.with_suffix(".steps")))
    went_on(cut)
    assert len(soak.lines(cut.with_suffix(".steps"))) == steps
    a, b = (json.loads((run / "result.json").read_text()) for run in (whole, cut))
    assert {k: v for k, v in a.items() if k != "wall_s"} == {k: v for k, v in b.items() if k != "wall_s"}


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_last_checkpoint(tmp_path):
    """TMPDIR lies on another file system, over which Lightning's own saving copies onto the final name."""
    elsewhere = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    draw, file = random.Random(0), tmp_path / "last.ckpt"
    seen = set()
    for _ in range(25):
        process = FORKS.Process(target=_save_for_ever, args=(file, str(elsewhere)))
        process.start()
        before = file.stat().st_mtime_ns if file.exists() else 0
        while not file.exists() or file.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.join()
        content = read(file)
        assert bool((content["state_dict"]["w"] == content["number"]).all())
        seen.add(content["number"])
        if file.with_stem("previous").exists():
            read(file.with_stem("previous"))
    assert len(seen) > 5


def _save_for_ever(file: Path, elsewhere: str) -> None:
    os.environ["TMPDIR"] = elsewhere
    number = random.randrange(1000)
    while True:
        number += 1
        WholeFiles().save_checkpoint({"state_dict": {"w": torch.full((500_000,), float(number))}, "number": number}, file)


# ---- files that are damaged


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "flipped": lambda content: content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :],
    "no checkpoint": lambda content: b"hello" * 100,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_instead_of_a_damaged_checkpoint_the_newest_good_one_is_taken(cut, whole, how):
    last = runs.checkpoint_path(cut, "last")
    last.write_bytes(DAMAGES[how](last.read_bytes()))
    said = went_on(cut).said
    line = next(line for line in said.splitlines() if line.startswith(f"note   {last}"))
    assert re.match(f"note   {last}: .*damaged .*", line) and line.endswith(f"instead of it {runs.checkpoint_path(cut, 'previous')}")
    assert soak.differences(whole, cut) == []


def test_where_no_checkpoint_is_whole_all_are_listed(cut, tmp_path):
    files = sorted((cut / "checkpoints").iterdir())
    assert {file.stem for file in files} == {"last", "previous", "best"}
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    again = Started(cut, *SHORT)
    assert again.ended() == 2
    line = again.said.splitlines()[-1]
    assert line.startswith(f"error: {cut}: no checkpoint is whole: ") and all(f"{file}: not a file of tensors" in line for file in files)
    assert "Traceback" not in again.said


@pytest.mark.slow
def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(cut, whole):
    """It goes on from previous.ckpt, cannot write, and goes on again."""
    last = runs.checkpoint_path(cut, "last")
    last.write_bytes(DAMAGES["flipped"](last.read_bytes()))
    before = runs.checkpoint_path(cut, "previous").read_bytes()
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); from tnt_lightning.train import main; main()"
    line = [sys.executable, "-c", small, *SHORT, f"hydra.run.dir={cut}"]
    done = subprocess.run(line, cwd=cut.parent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and f"error: {last}: larger than a file may be here" in done.stderr, done.stderr
    assert runs.checkpoint_path(cut, "previous").read_bytes() == before and last.with_suffix(".damaged").exists() and not last.exists()
    went_on(cut)
    assert soak.differences(whole, cut) == []


@pytest.mark.slow
def test_a_plan_that_cannot_be_written_leaves_the_one_before(cut):
    before = {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()}
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); from tnt_lightning.train import main; main()"
    (cut / "config.yaml").write_text((cut / "config.yaml").read_text() + "# " + "x" * 6000 + "\n")
    before[cut / "config.yaml"] = (cut / "config.yaml").read_bytes()
    line = [sys.executable, "-c", small, *SHORT, "recipe.min_lr=0", f"hydra.run.dir={cut}"]
    done = subprocess.run(line, cwd=cut.parent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "larger than a file may be here" in done.stderr, done.stderr
    assert {file: file.read_bytes() for file in cut.rglob("*") if file.is_file() and file.name != "train.log"} == {
        file: content for file, content in before.items() if file.name != "train.log"
    }


def test_a_best_checkpoint_that_is_gone_is_chosen_anew(cut):
    runs.checkpoint_path(cut, "best").unlink()
    said = went_on(cut).said
    assert f"note   {runs.checkpoint_path(cut, 'best')} is not the one of step 8" in said
    assert runs.checkpoint_path(cut, "best").exists() and runs.result_of(cut)["checkpoint"] == "best"


def test_a_best_checkpoint_that_was_not_copied_in_time_is_the_last_one(cut):
    best, last = (runs.checkpoint_path(cut, name) for name in ("best", "last"))
    os.replace(best, last)
    runs.checkpoint_path(cut, "previous").unlink()
    again = Started(cut, *SHORT).after(15).send(signal.SIGKILL)
    assert again.ended() == -signal.SIGKILL and "chosen anew" not in again.said
    assert read(best)["position"]["step"] == 8


# ---- which run goes on


def test_a_plain_start_is_a_new_run_and_says_how_to_go_on_with_an_old_one(cut, capsys):
    train(cut.parent / "new", *SHORT)
    said = capsys.readouterr().out
    assert f"note   {cut} is an unfinished run of this configuration; hydra.run.dir={cut} goes on with it" in said
    train(cut.parent / "other", *SHORT, "seed=1")
    assert "unfinished" not in capsys.readouterr().out


@pytest.mark.slow
def test_latest_is_the_newest_unfinished_run_of_the_configuration(cut, whole, tmp_path):
    days = tmp_path / "outputs"
    for day, name in (("2026-01-01", "10-00-00"), ("2026-01-02", "09-00-00")):
        shutil.copytree(cut, days / day / name)
    newer = days / "2026-01-02" / "09-00-00"
    os.utime(runs.checkpoint_path(newer, "last"))
    shutil.copytree(whole, days / "2026-01-03" / "08-00-00")  # finished
    overrides = [override for override in SHORT if not override.startswith("resume")]
    done = command("train", *overrides, "resume=latest", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert runs.result_of(newer) and not runs.result_of(days / "2026-01-01" / "10-00-00")
    assert same(weights(newer), weights(whole)) and len(list(days.glob("*/*"))) == 3
    new = command("train", *overrides, "seed=3", "resume=latest", "recipe.epochs=2", cwd=tmp_path)
    assert new.returncode == 0 and "no unfinished run of this configuration: a new one" in new.stdout and len(list(days.glob("*/*"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a=b", "it's", "with space"])
def test_any_directory_goes_on_and_a_refused_start_changes_nothing_in_it(cut, where):
    run = cut.with_name(where)
    cut.rename(run)
    for kind in (".steps", ".seen", ".out"):
        cut.with_suffix(kind).rename(run.with_suffix(kind))
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file() and file.name != "train.log"}
    asked = quoted("hydra.run.dir", run)
    refused = command("train", *SHORT, "seed=5", asked, cwd=run.parent)
    assert refused.returncode == 2 and "seed=5: the run to continue had 0" in refused.stderr
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file() and file.name != "train.log"}
    assert {k: v for k, v in after.items() if k.name != ".lock"} == {k: v for k, v in before.items() if k.name != ".lock"}
    if where == "a=b":
        done = command("train", *SHORT, "++resume=latest", "--config-dir=.", cwd=run.parent, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == 0 and "no unfinished run" in done.stdout, done.stderr  # beside it there is none: outputs/ is empty
        named = command("train", *SHORT, asked, "resume=latest", cwd=run.parent)
        assert named.returncode == 0 and runs.result_of(run), named.stderr


def test_a_refused_start_leaves_folders_that_were_there(tmp_path):
    (tmp_path / "mine" / "run").mkdir(parents=True)
    done = command("train", "data.batch_size=5000", f"hydra.run.dir={tmp_path / 'mine' / 'run'}", cwd=tmp_path)
    assert done.returncode == 2 and (tmp_path / "mine" / "run").is_dir() and not list((tmp_path / "mine" / "run").iterdir())


def test_a_run_from_another_that_is_cut_off_at_once_begins_there_again(tmp_path):
    run, more = tmp_path / "run", tmp_path / "more"
    Started(run, *SHORT).after(13).send(signal.SIGKILL).ended()
    Started(more, *SHORT, f"resume={run}", "checkpoint.every_n_steps=null").after(1).send(signal.SIGKILL).ended()
    assert [file.name for file in (more / "checkpoints").glob("*.ckpt")] == ["best.ckpt"], "brought along, and older than the last one"
    again = Started(more, *SHORT)
    assert again.ended() == 0 and again.said.count(f"goes on from {runs.checkpoint_path(run, 'last')}") == 2, again.said


def test_other_images_are_not_gone_on_with(tmp_path):
    train(tmp_path / "run", *SHORT, "recipe.epochs=2")
    (tmp_path / "run" / "result.json").unlink()
    checkpoint = torch.load(runs.checkpoint_path(tmp_path / "run", "last"), weights_only=True)
    checkpoint["position"]["train_images"] = 1000
    torch.save(checkpoint, runs.checkpoint_path(tmp_path / "run", "last"))
    with pytest.raises(UserError, match="1,222 training images, and the run to continue had 1,000"):
        train(tmp_path / "run", *SHORT, "recipe.epochs=2")


def test_a_validation_in_the_middle_of_a_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="trainer.val_check_interval=3: after 3 batches, in the middle of a step"):
        train(tmp_path / "run", *SHORT, "trainer.accumulate_grad_batches=2", "+trainer.val_check_interval=3")


def test_a_changed_plan_is_named_key_by_key_and_another_network_refused(cut):
    again = went_on(cut, "recipe.min_lr=0", "data.num_workers=1")
    for line in (
        "changed recipe.min_lr=0, was 1e-05",
        "changed data.num_workers=1, was 0",
        "note   0 loader process(es) before, 1 now: the same images and pixels, all is exact",
    ):
        assert line in again.said.splitlines()
    assert runs.config_of(cut)["recipe"]["min_lr"] == 0 and len(list(cut.glob("config.before*.yaml"))) == 1


def test_a_run_does_not_go_on_as_another_network(cut):
    before = {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"model.se=true: the run to continue had false; that is another network"):
        train(cut, *SHORT, "se=true")
    with pytest.raises(UserError, match="already holds a run"):
        train(cut, *SHORT, "resume=false")
    assert {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()} == before


def test_the_second_of_two_runs_in_one_directory_is_refused(tmp_path):
    first = Started(tmp_path / "run", *LONG).after(2)
    second = command("train", *LONG, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert second.returncode == 2 and second.stderr.startswith(f"error: {tmp_path / 'run'} is in use by another process")
    with pytest.raises(UserError, match="is in use by another process"):
        train(tmp_path / "run", *LONG)
    assert first.send(signal.SIGKILL).ended() == -signal.SIGKILL
    assert Started(tmp_path / "run", *SHORT).ended() in (0, 2)  # free again at once


def _slow_to_begin(run: Path, arguments: Sequence[str]) -> None:
    setup = Digits.setup

    def slow(self: Digits, stage: str | None = None) -> None:
        run.with_suffix(".begun").touch()
        while not run.with_suffix(".go").exists():
            time.sleep(0.05)
        setup(self, stage)

    Digits.setup = slow
    soak.work(run, arguments)


def test_the_second_is_refused_also_before_the_first_holds_anything(tmp_path):
    """While it downloads its images, say. What Hydra wrote for the first one stays as it is, also where the second is a mistake."""
    run = tmp_path / "run"
    first = Started(run, *SHORT, work=_slow_to_begin)
    while not run.with_suffix(".begun").exists():
        assert first.process.is_alive(), first.said
        time.sleep(0.05)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert {"config.yaml", "overrides.yaml", ".lock"} <= {file.name for file in before} and not runs.holds(run)
    for mistake in ((), ("recipe.clip_grad=no",)):
        second = Started(run, *SHORT, *mistake, "seed=3")
        assert second.ended() == 2 and f"error: {run} is in use by another process" in second.said.splitlines()[-1]
        assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    run.with_suffix(".go").touch()
    assert first.ended() == 0 and runs.result_of(run)["seed"] == 0


def test_a_copied_run_still_evaluates_and_goes_on(cut, whole, tmp_path, capsys):
    shutil.copytree(cut, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(cut)
    copy = tmp_path / "elsewhere" / "copy"
    for name in (".steps", ".seen"):
        shutil.copy(cut.with_suffix(name), copy.with_suffix(name))
    went_on(copy)
    assert soak.differences(whole, copy) == []
    load_run(copy)
    assert evaluate_run(str(copy), [])["test/top1"] == runs.result_of(whole)["test/top1"]
    train(copy, *SHORT, "data.num_workers=1", "+logger.note=other", "faults.timeout_s=5")  # how it was worked off is no other run
    assert f"{copy} is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a finished run of another configuration \(recipe.min_lr=0, was 1e-05\)"):
        train(copy, *SHORT, "data.num_workers=1", "recipe.min_lr=0")


# ---- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path, whole, number, code):
    run = tmp_path / "run"
    first = Started(run, *SHORT, "checkpoint.every_n_steps=null", "data.num_workers=1").after(11)
    assert first.send(number).ended() == code
    assert f"stopped by {signal.Signals(number).name} at step" in first.said and "Traceback" not in first.said
    step = read(runs.checkpoint_path(run, "last"))["position"]["step"]
    assert step >= 10
    went_on(run, "checkpoint.every_n_steps=null", "data.num_workers=1")
    differ = [line for line in soak.differences(whole, run) if not line.startswith("seen: 0 missing")]  # a worker reads ahead
    assert differ == [f"{name}.ckpt: .position.num_workers" for name in ("last", "best")]


def _stuck(run: Path, arguments: Sequence[str]) -> None:
    transfer, libc, mutex = ImageDataModule.on_after_batch_transfer, ctypes.CDLL(None), ctypes.create_string_buffer(128)

    def wait_for_ever(self: ImageDataModule, batch: Any, index: int) -> Any:
        if len(soak.lines(run.with_suffix(".steps"))) == 3:
            run.with_suffix(".stuck").touch()
            for _ in range(2):  # in C, which no handler of Python's interrupts: as in a collective, or on a dead disk
                libc.pthread_mutex_lock(mutex)
        return transfer(self, batch, index)

    ImageDataModule.on_after_batch_transfer = wait_for_ever
    soak.work(run, arguments)


def test_a_second_signal_ends_at_once_also_a_process_that_is_stuck(tmp_path):
    started = Started(tmp_path / "run", *LONG, work=_stuck)
    while not (tmp_path / "run.stuck").exists():
        assert started.process.is_alive(), started.said
        time.sleep(0.05)
    started.send(signal.SIGINT)
    time.sleep(0.5)
    assert started.process.is_alive()
    assert started.send(signal.SIGINT).ended(10) == 130 and "stopped by" not in started.said


def _in_a_terminal(run: Path, arguments: Sequence[str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests themselves run under
    os.setsid()
    terminal = os.open((run.parent / "terminal").read_text(), os.O_RDWR)  # the first one of a session is the one that it hangs on
    for stream in (0, 1, 2):
        os.dup2(terminal, stream)
    os.close(terminal)
    with (run.parent / "code").open("w") as file:
        try:
            soak.witness(run)
            sys.argv = ["train.py", *arguments, f"hydra.run.dir={run}"]
            main()
        except SystemExit as end:
            file.write(str(end.code))


def test_a_terminal_that_is_closed_ends_a_run_with_a_checkpoint(tmp_path):
    """Its progress bar has nowhere to write any more."""
    ours, theirs = pty.openpty()
    (tmp_path / "terminal").write_text(os.ttyname(theirs))
    shown = [*LONG, "trainer.enable_progress_bar=true", "checkpoint.every_n_steps=null"]
    started = Started(tmp_path / "run", *shown, work=_in_a_terminal)
    os.close(theirs)
    threading.Thread(target=lambda: [None for _ in iter(lambda: _read_of(ours), b"")], daemon=True).start()
    started.after(11)
    os.close(ours)
    started.ended()
    assert (tmp_path / "code").read_text() == str(128 + signal.SIGHUP)
    assert read(runs.checkpoint_path(tmp_path / "run", "last"))["position"]["step"] >= 10


def _read_of(stream: int) -> bytes:
    try:
        return os.read(stream, 4096)
    except OSError:  # closed
        return b""


def test_under_nohup_a_terminal_that_is_closed_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_sigterm_that_comes_twice_at_once_is_one(tmp_path):
    """Who ends a job tells all of its processes, and some of these tell others."""
    slow = [knob.replace("batches=8", "batches=1") for knob in LONG]
    started = Started(tmp_path / "run", *slow, "data.batch_size=1222", "model.depth=12").after(1)
    started.send(signal.SIGTERM)
    time.sleep(0.05)
    assert started.send(signal.SIGTERM).ended() == 143 and "stopped by SIGTERM at" in started.said


def test_a_signal_during_validation_swaps_no_weights(tmp_path):
    """It comes while the module holds the averaged weights; the raw ones are saved as such, and the validation is done again."""
    many = (*SHORT, "checkpoint.every_n_steps=null", "data.batch_size=8")  # 27 batches of validation
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert Started(whole, *many).ended() == 0
    cut = Started(run, *many).after(2, ".validating").send(signal.SIGTERM)
    assert cut.ended() == 143
    assert read(runs.checkpoint_path(run, "last"))["position"]["validating"], cut.said
    assert Started(run, *many).ended() == 0
    assert soak.differences(whole, run) == []


@pytest.mark.slow
def test_slurms_warning_hands_the_job_back_once_and_the_job_that_starts_again_goes_on(tmp_path):
    """A scontrol of our own writes down what it is asked. The warning goes to every process, during the imports and during training."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    env = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    line = [sys.executable, "-m", "tnt_lightning.train", *LONG, "data.num_workers=2"]

    def start(**more):
        return subprocess.Popen(line, cwd=tmp_path, env={**env, **more}, start_new_session=True, stdout=subprocess.PIPE, text=True)

    importing = start()
    until_signals(importing, "SigBlk", signal.SIGUSR1)
    os.killpg(importing.pid, signal.SIGUSR1)
    said, _ = importing.communicate(timeout=100)
    assert importing.returncode == 138 and "stopped by SIGUSR1 at step 0" in said and "job 77 handed back to SLURM" in said, said
    [run] = tmp_path.glob("outputs/*/*")

    training = start(SLURM_RESTART_COUNT="1")
    goal = time.monotonic() + START_S
    while not (run / "metrics.csv").exists() or len(soak.lines(run / "metrics.csv")) < 12:
        assert training.poll() is None and time.monotonic() < goal
        time.sleep(0.05)
    os.killpg(training.pid, signal.SIGUSR1)
    said, _ = training.communicate(timeout=100)
    assert training.returncode == 138 and "goes on from" in said and "Traceback" not in said, said
    assert (tmp_path / "asked").read_text() == "requeue 77\n" * 2 and len(list(tmp_path.glob("outputs/*/*"))) == 1


def until_signals(process: subprocess.Popen, are: str, number: int) -> None:
    """Wait until a process blocks (SigBlk) or handles (SigCgt) a signal."""
    goal = time.monotonic() + START_S
    while not int(re.search(rf"{are}:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16) & 1 << number - 1:
        assert process.poll() is None and time.monotonic() < goal
        time.sleep(0.01)


def test_what_cannot_be_written_is_found_before_training_starts(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"^{folder}.*: cannot be written .*; choose another hydra.run.dir"):
            train(folder, *SHORT)
    done = command("train", *SHORT, "hydra.run.dir=/proc/run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: /proc/run: ") and len(done.stderr.splitlines()) == 1


# ---- several devices


@pytest.fixture
def two_ranks():
    started = []

    def start(run: Path, *overrides: str) -> processes.Started:
        line = ["-m", "tests.witnessed", *SHORT, "recipe.epochs=5", *processes.TWO, *overrides, f"hydra.run.dir={run}"]
        out = run.with_suffix(".out")
        started.append(processes.Started(line, cwd=Path(__file__).parents[1], out=out, err=out))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def seen(run: Path, batches: int, kind: str = ".steps") -> Callable[[], bool]:
    return lambda: len(soak.lines(run.with_suffix(kind))) >= 2 * batches


@pytest.mark.slow
def test_two_ranks_that_are_killed_or_told_to_stop_go_on_to_the_same_bits(tmp_path, two_ranks):
    """One of them or both; and then one device takes the rest, with a line that says what is no longer exact."""
    mixing = ("+recipe.augmentation.mixup=0.8", "data.num_workers=1")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert (uncut := two_ranks(whole, *mixing)).ends(START_S) == 0, uncut.said

    for batches, number, rank, code in (
        (4, signal.SIGKILL, 0, -signal.SIGKILL),
        (11, signal.SIGKILL, 1, 137),
        (15, signal.SIGTERM, 0, 143),
        (19, signal.SIGTERM, 1, 143),
        (24, signal.SIGTERM, None, 143),  # as SLURM does: to loaders' workers, too
        (29, signal.SIGINT, None, 130),  # as a terminal does
    ):
        cut = two_ranks(run, *mixing).until(seen(run, batches))
        if batches == 19:
            shutil.copytree(run, tmp_path / "other")
        if rank is None:
            os.killpg(cut.pid, number)
        else:
            cut.send(number, rank=rank)
        assert cut.ends() == code, cut.said
    said = run.with_suffix(".out").read_text()
    assert said.count("goes on from") == 5 and said.count("stopped by SIGTERM") == 3 and said.count("stopped by SIGINT") == 1, said
    assert "Traceback" not in said, said
    assert (last := two_ranks(run, *mixing)).ends(START_S) == 0, last.said
    assert soak.differences(whole, run) == []

    (tmp_path / "other" / "result.json").unlink(missing_ok=True)
    alone = Started(tmp_path / "other", *SHORT, "recipe.epochs=5", *mixing, "trainer.accelerator=cpu", "trainer.devices=1")
    assert alone.ended() == 0, alone.said
    assert "note   2 device(s) x 1 accumulation step(s) before, 1 x 1 now: the same images in the same steps, but" in alone.said
    assert runs.result_of(tmp_path / "other")["steps"] == 40
    ours, theirs = (set(soak.lines(file.with_suffix(".seen"))) for file in (tmp_path / "other", whole))
    assert ours and ours <= theirs, "the same images with the same pixels"


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_during_a_validation_of_unequal_lengths(tmp_path, two_ranks):
    """Of 17 images one rank has 5 batches and the other 4, of which they see 4 and 3."""
    for part, count in (("train", 32), ("val", 17)):
        for number in range(count):
            file = tmp_path / "images" / part / "ab"[number % 2] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(layouts.jpeg(number))
    unequal = (
        "data=folder", f"data.root={tmp_path / 'images'}", "model=tnt_digits", "recipe=digits", "image_size=8", "data.batch_size=4",
        "+trainer.limit_val_batches=0.8", "checkpoint.every_n_steps=null",
    )  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert (uncut := two_ranks(whole, *unequal)).ends(START_S) == 0, uncut.said
    assert len(soak.lines(whole.with_suffix(".validating"))) >= 5 * (4 + 3)
    cut = two_ranks(run, *unequal).until(lambda: len(soak.lines(run.with_suffix(".validating"))) >= 4 + 3 + 1)
    assert cut.send(signal.SIGTERM, rank=1).ends() == 143, cut.said
    assert read(runs.checkpoint_path(run, "last"))["position"]["step"] in (15, 16, 17), cut.said
    assert (last := two_ranks(run, *unequal)).ends(START_S) == 0, last.said
    assert soak.differences(whole, run) == []


def test_a_flipped_bit_is_not_evaluated(cut):
    file = runs.checkpoint_path(cut, "last")
    file.write_bytes(DAMAGES["flipped"](file.read_bytes()))
    with pytest.raises(UserError, match=f"{file}: damaged"):
        load_run(file)


@pytest.mark.slow
def test_ctrl_c_ends_a_measurement_without_a_traceback(whole, tmp_path):
    line = [sys.executable, "-m", "tnt_lightning.evaluate", f"run={whole}"]
    measuring = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until_signals(measuring, "SigCgt", signal.SIGTERM)
    measuring.send_signal(signal.SIGINT)
    _, said = measuring.communicate(timeout=100)
    assert measuring.returncode == 130 and "Traceback" not in said, said
