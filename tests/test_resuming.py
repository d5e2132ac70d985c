"""Nothing is lost: a run that was cut off in whatever way goes on to the same bits, and what cannot go on says so."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tnt_lightning import load_run, runs
from tnt_lightning.checkpoints import WholeFiles, read
from tnt_lightning.cli import quoted
from tnt_lightning.errors import UserError

from . import soak
from .conftest import command, train
from .test_training import same, weights

SHORT = (*soak.SHORT, "checkpoint.every_n_steps=2")
LONG = (*SHORT, "recipe.epochs=200")


class Started:
    """A real process that trains, forked from one that has imported everything."""

    def __init__(self, run: Path, *arguments: str):
        self.run = run
        self.process = FORKS.Process(target=soak.work, args=(run, arguments))
        self.process.start()

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
FORKS.set_forkserver_preload(["tnt_lightning.train", "tnt_lightning.evaluate", "tnt_lightning.dashboard", "tests.soak"])


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
    plan = (*SHORT, "data.val_fraction=0")
    run, more = tmp_path / "run", tmp_path / "more"
    Started(run, *plan).after(13).send(signal.SIGKILL).ended()
    Started(more, *plan, f"resume={run}", "checkpoint.every_n_steps=null").after(1).send(signal.SIGKILL).ended()
    assert not list((more / "checkpoints").glob("*.ckpt"))
    again = Started(more, *plan)
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


def test_a_copied_run_still_evaluates_and_goes_on(cut, whole, tmp_path):
    shutil.copytree(cut, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(cut)
    copy = tmp_path / "elsewhere" / "copy"
    for name in (".steps", ".seen"):
        shutil.copy(cut.with_suffix(name), copy.with_suffix(name))
    went_on(copy)
    assert soak.differences(whole, copy) == []
    load_run(copy)


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


def test_a_second_signal_ends_at_once(tmp_path):
    whole_set = [knob.replace("batches=8", "batches=1") for knob in LONG]
    started = Started(tmp_path / "run", *whole_set, "data.batch_size=1222", "model.depth=12").after(1)  # steps of a second and more
    began = time.monotonic()
    started.send(signal.SIGINT)
    time.sleep(0.05)
    assert started.send(signal.SIGINT).ended() == 130 and time.monotonic() - began < 5


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
    time.sleep(0.5)
    os.killpg(importing.pid, signal.SIGUSR1)
    said, _ = importing.communicate(timeout=100)
    assert importing.returncode == 138 and "stopped by SIGUSR1 at step 0" in said and "job 77 handed back to SLURM" in said, said
    [run] = tmp_path.glob("outputs/*/*")

    training = start(SLURM_RESTART_COUNT="1")
    goal = time.monotonic() + 100
    while not (run / "metrics.csv").exists() or len(soak.lines(run / "metrics.csv")) < 12:
        assert training.poll() is None and time.monotonic() < goal
        time.sleep(0.05)
    os.killpg(training.pid, signal.SIGUSR1)
    said, _ = training.communicate(timeout=100)
    assert training.returncode == 138 and "goes on from" in said and "Traceback" not in said, said
    assert (tmp_path / "asked").read_text() == "requeue 77\n" * 2 and len(list(tmp_path.glob("outputs/*/*"))) == 1


def test_what_cannot_be_written_is_found_before_training_starts(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"^{folder}.*: cannot be written .*; choose another hydra.run.dir"):
            train(folder, *SHORT)
    done = command("train", *SHORT, "hydra.run.dir=/proc/run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: /proc/run: ") and len(done.stderr.splitlines()) == 1


# ---- several devices


def two_ranks(run: Path, *overrides: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "tests.witnessed", *SHORT, "trainer.accelerator=cpu", "trainer.devices=2", *overrides]
    out = run.with_suffix(".out").open("a")
    return subprocess.Popen([*line, f"hydra.run.dir={run}"], cwd=Path(__file__).parents[1], stdout=out, stderr=out, start_new_session=True)


def rank_1(process: subprocess.Popen) -> int:
    """Its process number."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if b"LOCAL_RANK=1" in environ.read_bytes().split(b"\0") and os.getpgid(int(environ.parent.name)) == process.pid:
                return int(environ.parent.name)
        except OSError:
            continue
    raise AssertionError("no second rank")


def wait_for(process: subprocess.Popen, run: Path, batches: int) -> None:
    goal = time.monotonic() + 150
    while len(soak.lines(run.with_suffix(".steps"))) < batches:
        assert process.poll() is None and time.monotonic() < goal, run.with_suffix(".out").read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_or_told_to_stop_go_on_to_the_same_bits(tmp_path):
    """And then one device takes the rest, with a line that says what is no longer exact."""
    mixing = ("+recipe.augmentation.mixup=0.8", "data.num_workers=1")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert two_ranks(whole, *mixing).wait(300) == 0, whole.with_suffix(".out").read_text()

    killed = two_ranks(run, *mixing)
    wait_for(killed, run, 2 * 11)
    os.kill(rank_1(killed), signal.SIGKILL)
    assert killed.wait(30) == 137
    stopped = two_ranks(run, *mixing)
    wait_for(stopped, run, 2 * 15)
    shutil.copytree(run, tmp_path / "other")
    os.kill(rank_1(stopped), signal.SIGTERM)
    assert stopped.wait(30) == 143
    stopped = two_ranks(run, *mixing)
    wait_for(stopped, run, 2 * 19)
    os.killpg(stopped.pid, signal.SIGTERM)  # as SLURM does: to loaders' workers, too
    assert stopped.wait(30) == 143
    said = run.with_suffix(".out").read_text()
    assert said.count("goes on from") == 2 and said.count("stopped by SIGTERM") == 2 and "Traceback" not in said, said
    assert two_ranks(run, *mixing).wait(300) == 0, run.with_suffix(".out").read_text()
    assert soak.differences(whole, run) == []

    (tmp_path / "other" / "result.json").unlink(missing_ok=True)
    alone = Started(tmp_path / "other", *SHORT, *mixing, "trainer.accelerator=cpu", "trainer.devices=1")
    assert alone.ended() == 0, alone.said
    assert "note   2 device(s) x 1 accumulation step(s) before, 1 x 1 now: the same images in the same steps, but" in alone.said
    assert runs.result_of(tmp_path / "other")["steps"] == 24
    seen, theirs = (set(soak.lines(file.with_suffix(".seen"))) for file in (tmp_path / "other", whole))
    assert seen and seen <= theirs, "the same images with the same pixels"


def test_a_flipped_bit_is_not_evaluated(cut):
    file = runs.checkpoint_path(cut, "last")
    file.write_bytes(DAMAGES["flipped"](file.read_bytes()))
    with pytest.raises(UserError, match=f"{file}: damaged"):
        load_run(file)


def test_ctrl_c_ends_a_measurement_without_a_traceback(whole, tmp_path):
    line = [sys.executable, "-m", "tnt_lightning.evaluate", f"run={whole}"]
    measuring = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    time.sleep(3)
    measuring.send_signal(signal.SIGINT)
    _, said = measuring.communicate(timeout=100)
    assert measuring.returncode == 130 and "Traceback" not in said, said
