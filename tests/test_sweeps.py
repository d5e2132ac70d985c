"""Sweeps as people start them: real jobs, each a process of its own."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from PIL import Image

from tnt_lightning import CONF, runs
from tnt_lightning.cli import folder_name
from tnt_lightning.curves import Curves
from tnt_lightning.errors import UserError
from tnt_lightning.sweep import Job, Machine, _last_words, _lies_there, _look_at, gpus_here
from tnt_lightning.zygote import _is_of, _left

from .conftest import QUICK, resolved

SHORT = (*QUICK[:2], "logger=csv", "+trainer.limit_train_batches=4", "model.depth=1", "trainer.accelerator=cpu")
LONG = (*SHORT, "recipe.epochs=400", "+trainer.limit_val_batches=1")


class Sweep:
    """`python -m tnt_lightning.train -m ...` in a process of its own."""

    def __init__(self, folder: Path, *overrides: str, terminal: int = subprocess.PIPE, **env: str):
        self.folder, self.heard = folder / "sweep", ""
        line = [sys.executable, "-m", "tnt_lightning.train", "-m", *overrides, f"hydra.sweep.dir={self.folder}"]
        env = {**os.environ, "OF_THE_SWEEP": str(self.folder), **env}
        self.process = subprocess.Popen(
            line, cwd=folder, stdout=terminal, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
        )

    def ended(self, code: int) -> str:
        said = self.heard + (self.process.communicate(timeout=400)[0] or "")
        assert self.process.returncode == code, said + "".join(log.read_text() for log in self.folder.glob("*/job.log"))
        assert "Traceback" not in said
        return said

    def says(self, line: str) -> None:
        while line not in self.heard:
            piece = os.read(self.process.stdout.fileno(), 1 << 16).decode()
            assert piece, self.heard
            self.heard += piece

    def processes(self) -> set[int]:
        """Of it and of all that it started, those that are there."""
        mark, found = f"OF_THE_SWEEP={self.folder}".encode(), set()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # gone meanwhile, or somebody else's
                if mark in environ.read_bytes().split(b"\0"):
                    found.add(int(environ.parent.name))
        return found

    def gone(self, within: float) -> bool:
        goal = time.monotonic() + within
        while left := self.processes():
            if time.monotonic() > goal:
                for process in left:
                    os.kill(process, signal.SIGKILL)
                return False
            time.sleep(0.1)
        return True

    def started(self, name: str, times: int = 1) -> int:
        """The process of a job, once it says so."""
        return self.until(lambda: (found := self.headings(name)) and len(found) >= times and int(found[-1][0]))

    def headings(self, name: str) -> list[tuple[str, str]]:
        """(process, CUDA_VISIBLE_DEVICES) as the job's processes said it."""
        log = self.folder / name / "job.log"
        return (
            re.findall(r"^[-0-9]+ [:0-9]+ process (\d+): (?:CUDA_VISIBLE_DEVICES=(\S*) )?python", log.read_text(), re.M)
            if log.exists()
            else []
        )

    def trained(self, name: str) -> None:
        self.until((self.folder / name / "checkpoints" / "last.ckpt").exists)

    def until(self, condition):
        goal = time.monotonic() + 200
        while not (value := condition()):
            assert time.monotonic() < goal and self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.02)
        return value

    def states(self) -> dict[str, str]:
        return {job["run"]: job["state"] for job in json.loads((self.folder / "sweep.json").read_text())["jobs"]}


def gone(process: int, within: float = 30) -> bool:
    goal = time.monotonic() + within
    while time.monotonic() < goal:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def pipes(process: int) -> set[str]:
    links = set()
    for file in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            links.add(os.readlink(file))
    return {link for link in links if link.startswith("pipe:")}


CALLBACKS = """
import json, os, time
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

class Seen(Callback):
    # What a process of a job finds, in a file that the environment names: a line at its start and one at its end.
    def on_job_start(self, config, **_):
        self.note("start")

    def on_job_end(self, config, job_return, **_):
        self.note("end")

    def note(self, what):
        names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS")
        line = {"what": what, "at": time.monotonic(), "process": os.getpid(), "run": HydraConfig.get().runtime.output_dir}
        line |= {name: os.environ.get(name) for name in names} | {"threads": torch.get_num_threads()}
        with open(os.environ["SEEN"], "a") as stream:
            stream.write(json.dumps(line) + "\\n")

class Late(Callback):
    def on_job_end(self, config, job_return, **_):
        time.sleep(3)

class Crash(BaseException):
    pass

class Crashing(Callback):
    def on_job_start(self, config, **_):
        if config.seed == 1 and Path("broken").exists():
            raise Crash("by design")
"""


def with_callback(name: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """(overrides, environment) for a callback of Hydra's, which is called in the job."""
    (folder / "callbacks.py").write_text(CALLBACKS)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return [f"+hydra.callbacks.{name.lower()}._target_=callbacks.{name}"], {"PYTHONPATH": path, "SEEN": str(folder / "seen.jsonl")}


def what_was_seen(folder: Path) -> list[tuple[dict, dict]]:
    """(start, end) of each process of each job."""
    lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    ends = {line["process"]: line for line in lines if line["what"] == "end"}
    return [(line, ends[line["process"]]) for line in lines if line["what"] == "start"]


def test_of_four_jobs_one_fails_and_the_others_have_run(tmp_path):
    """On the CPU of a machine with GPUs, by their names: one after the other, as on one without."""
    said = Sweep(tmp_path, "inner_heads=1,5,2,4", *SHORT, CUDA_VISIBLE_DEVICES="0,1").ended(1)
    sweep = tmp_path / "sweep"
    assert re.findall(r"^(running|finished|failed)  *inner_heads=(\d)", said, re.M)[:8] == [
        ("running", "1"), ("finished", "1"), ("running", "5"), ("failed", "5"),
        ("running", "2"), ("finished", "2"), ("running", "4"), ("finished", "4"),
    ]  # fmt: skip
    assert "on GPU" not in said and "CUDA_VISIBLE_DEVICES= python" in (sweep / "inner_heads=1" / "job.log").read_text()
    for heads in (1, 2, 4):
        result = runs.result_of(sweep / f"inner_heads={heads}")
        assert f"finished inner_heads={heads}: val top-1 {result['val/top1']:.2f}" in said
        assert runs.config_of(sweep / f"inner_heads={heads}")["model"]["inner_heads"] == heads
    assert re.search(
        rf"^failed inner_heads=5: inner_heads=5 does not divide .* \(all it said: {sweep}/inner_heads=5/job.log\)$", said, re.M
    )
    assert "sweep: 3 finished, 1 failed" in said
    assert not (sweep / "inner_heads=5" / "config.yaml").exists()
    record = json.loads((sweep / "sweep.json").read_text())
    assert [(job["swept"], job["state"]) for job in record["jobs"]] == [
        (["inner_heads=1"], "finished"), (["inner_heads=5"], "failed"), (["inner_heads=2"], "finished"), (["inner_heads=4"], "finished"),
    ]  # fmt: skip
    assert record["command"][:5] == ["python", "-m", "tnt_lightning.train", "-m", "inner_heads=1,5,2,4"]


@pytest.mark.slow
def test_the_same_sweep_again_does_what_is_left(tmp_path):
    """One job finished, one killed, one failed; then another configuration, and a fresh start."""
    sweep = Sweep(tmp_path, "seed=0,2", *SHORT)
    sweep.ended(0)
    figures = (sweep.folder / "seed=0" / "result.json").read_bytes()
    sweep = Sweep(tmp_path, "seed=0,1", *SHORT, "recipe.epochs=2")
    said = sweep.ended(0)
    assert "1 of 2 jobs are finished already" in said and sweep.states() == {"seed=0": "skipped", "seed=1": "finished"}
    assert (sweep.folder / "seed=0" / "result.json").read_bytes() == figures
    (sweep.folder / "seed=1" / "result.json").unlink()
    file = sweep.folder / "seed=1" / "config.yaml"  # as an older version wrote it
    file.write_text(re.sub(r"\n *nonfinite_in_a_row: .*", "", file.read_text()))
    again = Sweep(tmp_path, "seed=0,1", *SHORT, "hydra.launcher.devices_per_job=2", "faults.timeout_s=900")
    said = again.ended(0)
    means = "faults.timeout_s=900, was 1800; trainer.devices=2, was 1"
    assert f"finished by other means: seed=0 ({means})\n" in said
    assert f"cut off before its end, and goes on: seed=1 ({means}; faults.nonfinite_in_a_row=10, was nothing)\n" in said
    assert again.states() == {"seed=0": "skipped", "seed=1": "finished"} and runs.result_of(sweep.folder / "seed=1")["devices"] == 2
    assert "goes on from" in (sweep.folder / "seed=1" / "job.log").read_text()
    said = Sweep(tmp_path, "seed=0,1", *SHORT, "optimizer.lr=0.001").ended(0)
    for seed in (0, 1):
        aside = sweep.folder / f"seed={seed}.before1"
        assert f"seed={seed}: what lies there is of another configuration (optimizer.lr=0.001, was 0.003): put aside as {aside}" in said
        assert runs.result_of(aside) and runs.config_of(sweep.folder / f"seed={seed}")["optimizer"]["lr"] == 0.001
    said = Sweep(tmp_path, "seed=0,1", *SHORT, "optimizer.lr=0.001", "hydra.launcher.fresh=true").ended(0)
    assert "finished seed=0" in said and runs.result_of(sweep.folder / "seed=0.before2")


@pytest.mark.slow
def test_other_code_is_said(tmp_path):
    """A checkout of its own: with changes, with changes that may be others, and once they are committed."""
    here, seeds = tmp_path / "checkout", ("seed=0,1", *SHORT)
    for name in ("tnt_lightning", "hydra_plugins", "conf", "experiments"):
        shutil.copytree(CONF.parent / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))

    def git(*line: str) -> str:
        identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
        return subprocess.run(["git", *identity, *line], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    def cut_off() -> None:
        (here / "sweep" / "seed=1" / "result.json").unlink()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=none")
    zeroth = git("rev-parse", "--short=12", "HEAD")
    sweep = Sweep(here, *seeds)
    sweep.trained("seed=0")
    (here / "tnt_lightning" / "errors.py").open("a").write("\n")
    (here / "conf" / "README.md").write_text("of no use\n")
    git("add", ".", ":!sweep")
    git("commit", "--quiet", "--message=one")
    sweep.ended(0)
    results = [runs.result_of(sweep.folder / f"seed={seed}")["commit"] for seed in (0, 1)]
    assert results == [zeroth, zeroth + "+"], "the code that they are forks of; the second reads other files beside it"
    shutil.rmtree(sweep.folder)
    first = git("rev-parse", "--short=12", "HEAD") + "+"
    with (here / "tnt_lightning" / "__init__.py").open("a") as stream:
        stream.write("\n")
    assert "trained by the code" not in Sweep(here, *seeds).ended(0)
    cut_off()
    whose = "seed=0; seed=1 (until it was cut off)"
    note = f"note   trained by the code of commit {first}, and the changes that + stands for may be others now: {whose}\n"
    assert note in Sweep(here, *seeds).ended(0)
    cut_off()
    git("commit", "--quiet", "--all", "--message=two")
    second = git("rev-parse", "--short=12", "HEAD")
    assert f"note   trained by the code of commit {first}, and this is {second}: {whose}\n" in Sweep(here, *seeds).ended(0)


@pytest.mark.slow
def test_a_killed_job_is_a_failure_that_goes_on(tmp_path):
    sweep = Sweep(tmp_path, "seed=0,1", *LONG, "hydra.launcher.jobs=2")
    process = sweep.started("seed=0")
    sweep.trained("seed=0")
    os.kill(process, signal.SIGKILL)
    sweep.until(lambda: sweep.states()["seed=0"] == "failed")
    sweep.trained("seed=1")
    other = sweep.started("seed=1")
    sweep.process.send_signal(signal.SIGINT)
    said = sweep.ended(130)
    assert gone(other, within=1) and sweep.states() == {"seed=0": "failed", "seed=1": "stopped"}
    assert "failed seed=0: killed by SIGKILL" in said
    assert "again, for what is not finished: python -m tnt_lightning.train -m seed=0,1" in said
    again = Sweep(tmp_path, "seed=0,1", *LONG)
    again.started("seed=0", times=2)
    again.process.send_signal(signal.SIGTERM)
    assert "cut off before its end, and goes on: seed=0; seed=1" in again.ended(143)
    assert "stopped by SIGTERM at" in (sweep.folder / "seed=1" / "job.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fork", ["true", "false"])
def test_of_a_killed_sweep_nothing_is_left_and_it_goes_on(tmp_path, fork):
    knobs = (f"hydra.launcher.fork={fork}", "hydra.launcher.jobs=2")
    sweep = Sweep(tmp_path, "seed=0,1,2", *LONG, *knobs)
    processes = [sweep.started(f"seed={seed}") for seed in (0, 1)]
    for seed in (0, 1):
        sweep.trained(f"seed={seed}")
    starter = int(Path(f"/proc/{processes[0]}/stat").read_text().rpartition(")")[2].split()[1])
    sweep.process.kill()
    assert all(gone(process) for process in (*processes, starter))
    again = Sweep(tmp_path, "seed=0,1,2", *LONG, *knobs)
    for seed in (0, 1):
        again.started(f"seed={seed}", times=2)
    log = sweep.folder / "seed=0" / "job.log"
    again.until(lambda: "goes on from" in log.read_text())
    again.process.send_signal(signal.SIGTERM)
    assert again.ended(143).count("stopped") >= 3 and "stopped by SIGTERM at" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stop_while_the_first_job_starts_is_not_lost(tmp_path, number):
    sweep = Sweep(tmp_path, "seed=0,1", *LONG, "recipe.epochs=100000", "hydra.launcher.fork=true", "hydra.launcher.jobs=2")
    sweep.says("running  seed=0\n")
    sweep.process.send_signal(number)
    assert sweep.gone(within=110)  # after 120 seconds its starter kills what does not end
    said = sweep.ended(130 if number == signal.SIGINT else -signal.SIGKILL)
    assert number == signal.SIGKILL or "2 stopped" in said
    assert not list(sweep.folder.glob("*/checkpoints/*.ckpt"))


@pytest.mark.slow
def test_of_a_job_of_several_processes_with_loaders_nothing_is_left(tmp_path):
    overrides = ("seed=0", *LONG, "recipe.epochs=100000", "trainer.devices=2", "data.num_workers=1")
    sweep = Sweep(tmp_path, *overrides)
    sweep.trained("0")
    before = sweep.processes()
    assert len(before) >= 6, "the sweep, its starter, two ranks, two loaders"
    sweep.process.kill()
    again = Sweep(tmp_path, *overrides)  # at once: it waits for the end of what the other one left
    again.until(lambda: "goes on from" in (again.folder / "0" / "job.log").read_text())
    assert not before & again.processes() and len(again.headings("0")) == 2
    again.process.send_signal(signal.SIGTERM)
    assert "cut off before its end, and goes on: 0" in again.ended(143) and not again.processes()


@pytest.mark.slow
def test_a_crash_is_named_and_once_its_cause_is_gone_the_job_runs(tmp_path):
    """By a traceback, before there is a config.yaml, and a failure also where a signal comes while the last job ends. Then a process that
    has not come to write one still has the directory."""
    (tmp_path / "broken").touch()
    overrides, env = with_callback("Crashing", tmp_path)
    sweep = Sweep(tmp_path, "seed=1,0", *SHORT, *overrides, *with_callback("Late", tmp_path)[0], **env)
    sweep.until((sweep.folder / "seed=0" / "result.json").exists)
    sweep.process.send_signal(signal.SIGTERM)
    said, run = sweep.ended(1), sweep.folder / "seed=1"
    assert "sweep: 1 failed, 1 finished\n" in said
    assert f"failed seed=1: callbacks.Crash: by design (all it said: {run / 'job.log'})\n" in said
    assert "Traceback" in (run / "job.log").read_text() and not (run / "config.yaml").exists()
    (tmp_path / "broken").unlink()
    with FileLock(run / ".lock"):
        again = Sweep(tmp_path, "seed=1,0", *SHORT, *overrides, **env)
        again.says(f"note   {run}: a process still trains in it; waiting for its end, at most 130 seconds\n")
        assert len(again.headings("seed=1")) == 1
    assert "1 of 2 jobs are finished already" in again.ended(0) and again.states() == {"seed=1": "finished", "seed=0": "skipped"}


@pytest.mark.slow
def test_in_a_terminal_a_table_lives(tmp_path):
    master, terminal = pty.openpty()
    sweep = Sweep(tmp_path, "seed=0,1", *LONG, terminal=terminal, COLUMNS="120", LINES="40", TERM="xterm")
    os.close(terminal)
    row = r"│ seed=0 +│ running +│ (\d+) of 400 +│ (\d+\.\d\d) +│ \d+ min \d\d s +│\s+│ seed=1 +│ waiting +│"
    shown = ""
    while not re.search(row, shown):
        shown = (shown + re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", os.read(master, 1 << 16).decode(errors="ignore")))[-20_000:]
    assert re.search(r"┃ job +┃ state +┃ epoch +┃ val top-1 +┃ time left ┃", shown) and "1 running, 1 waiting" in shown
    sweep.process.send_signal(signal.SIGTERM)
    try:
        while piece := os.read(master, 1 << 16):
            shown += piece.decode(errors="ignore")
    except OSError:  # the terminal is gone: the end
        pass
    sweep.ended(143)
    assert re.search(r"│ seed=0 │ stopped │", shown) and "sweep: 2 stopped" in shown


@pytest.mark.slow
@pytest.mark.parametrize("fork", ["true", "false"])
def test_a_killed_starter_takes_its_jobs_along(tmp_path, fork):
    sweep = Sweep(tmp_path, "seed=0,1", *LONG, f"hydra.launcher.fork={fork}")
    process = sweep.started("seed=0")
    sweep.trained("seed=0")
    os.kill(int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    assert "error: the process that starts the jobs was killed" in sweep.ended(2) and gone(process)
    assert sweep.states() == {"seed=0": "stopped", "seed=1": "stopped"}


@pytest.mark.slow
def test_who_ends_every_process_of_a_sweep_gets_its_checkpoints(tmp_path):
    """As SLURM and systemd do: the sweep and its starter tell a job to stop that was told already; and `timeout` tells the sweep twice."""
    sweep = Sweep(tmp_path, "seed=0,1", *LONG)
    process = sweep.started("seed=0")
    sweep.trained("seed=0")
    starter = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    assert not pipes(process) & pipes(sweep.process.pid), "a job has no part in what its starter says"
    for one in (process, starter, sweep.process.pid):
        os.kill(one, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(sweep.process.pid, signal.SIGTERM)
    assert "2 stopped" in sweep.ended(143) and gone(starter)
    assert "stopped by SIGTERM at" in (sweep.folder / "seed=0" / "job.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fork", ["true", "false"])
def test_a_job_that_cannot_be_started_fails_alone(tmp_path, fork):
    """What prints when Python starts is no line of the starter's."""
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "seed=0").touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('a banner')\n")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    sweep = Sweep(tmp_path, "seed=0,1", *SHORT, f"hydra.launcher.fork={fork}", PYTHONPATH=path)
    said = sweep.ended(1)
    assert sweep.states() == {"seed=0": "failed", "seed=1": "finished"}
    assert f"failed seed=0: {sweep.folder / 'seed=0'}: cannot be written (" in said


@pytest.mark.slow
def test_a_configuration_of_ones_own_reaches_the_jobs(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("defaults:\n  - config\n  - _self_\nrecipe:\n  label_smoothing: 0.25\n")
    sweep = Sweep(tmp_path, "--config-dir", "mine", "--config-name", "own", "seed=0,1", *SHORT)
    sweep.ended(0)
    assert runs.config_of(sweep.folder / "seed=1")["recipe"]["label_smoothing"] == 0.25
    assert "2 of 2 jobs are finished already" in Sweep(tmp_path, "--config-dir", "mine", "--config-name", "own", "seed=0,1", *SHORT).ended(
        0
    )


@pytest.mark.slow
def test_two_sweeps_in_one_directory_are_refused(tmp_path):
    sweep = Sweep(tmp_path, "seed=0,1", *LONG)
    sweep.started("seed=0")
    assert "sweep is in use by another process that sweeps in it" in Sweep(tmp_path, "seed=0,1", *LONG).ended(2)
    sweep.process.send_signal(signal.SIGTERM)
    sweep.ended(143)


@pytest.mark.slow
def test_jobs_of_different_sizes_train_on_processes_of_their_own(tmp_path):
    Sweep(tmp_path, "trainer.devices=1,2", *SHORT, "hydra.launcher.jobs=2").ended(0)
    for devices in (1, 2):
        assert runs.result_of(tmp_path / "sweep" / f"trainer.devices={devices}")["devices"] == devices
    Sweep(tmp_path, "seed=0,1", *SHORT, "hydra.launcher.jobs=2", "hydra.launcher.devices_per_job=2").ended(0)
    assert [runs.result_of(tmp_path / "sweep" / f"seed={seed}")["devices"] for seed in (0, 1)] == [2, 2]


@pytest.mark.slow
def test_no_two_jobs_at_a_time_have_one_gpu(tmp_path):
    """Four GPUs that only the names of are there; what each job has is what its own processes find."""
    found, env = with_callback("Seen", tmp_path)
    sizes = "trainer.devices=1,2"
    overrides = [*SHORT[:-1], "trainer.accelerator=auto", "recipe.epochs=1", "recipe.warmup_epochs=0", "+trainer.limit_val_batches=1"]
    sweep = Sweep(tmp_path, "seed=0,1,2,3", sizes, *overrides, *found, "hydra.launcher.gpus=4", CUDA_VISIBLE_DEVICES="2,3,5,7", **env)
    said = sweep.ended(0)
    spans = [
        (start["run"], set(start["CUDA_VISIBLE_DEVICES"].split(",")), start["at"], end["at"]) for start, end in what_was_seen(tmp_path)
    ]
    assert len(spans) == 4 * (1 + 2) and {len(gpus) for _, gpus, _, _ in spans} == {1, 2}
    together = [(one, other) for one in spans for other in spans if one[0] < other[0] and one[2] < other[3] and other[2] < one[3]]
    assert together and not any(one[1] & other[1] for one, other in together)
    assert {start["CUDA_DEVICE_ORDER"] for start, _ in what_was_seen(tmp_path)} == {os.environ.get("CUDA_DEVICE_ORDER")}
    busy: dict[str, str] = {}
    most, seen = 0, set()
    for line in said.splitlines():
        if match := re.match(r"running  (\S+) (\S+) on GPU (\S+)$", line):
            name = f"{match[1]},{match[2]}"
            assert not busy.keys() & set(match[3].split(",")), said
            busy |= dict.fromkeys(match[3].split(","), name)
            seen |= busy.keys()
            assert [gpus for _, gpus in sweep.headings(name)] == [match[3]] and len(match[3].split(",")) == int(name[-1])
            most = max(most, len(busy))
        elif match := re.match(r"finished (\S+) (\S+):", line):
            busy = {gpu: name for gpu, name in busy.items() if name != f"{match[1]},{match[2]}"}
    assert most == 4 and not busy and seen == {"2", "3", "5", "7"}


@pytest.mark.slow
def test_of_the_machines_gpus_a_job_has_one_unless_it_asks_for_more(tmp_path, monkeypatch):
    """GPUs that nvidia-smi alone knows of."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    two_gpus(tmp_path / "bin")
    found, env = with_callback("Seen", tmp_path)
    overrides = (*SHORT[:-1], "trainer.accelerator=auto", "trainer.devices=auto", *found)
    sweep = Sweep(tmp_path, "seed=0,1", *overrides, **env, PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    sweep.ended(0)
    assert sorted((start["CUDA_VISIBLE_DEVICES"], start["CUDA_DEVICE_ORDER"]) for start, _ in what_was_seen(tmp_path)) == [
        ("0", "PCI_BUS_ID"),
        ("1", "PCI_BUS_ID"),
    ]
    assert [runs.result_of(sweep.folder / f"seed={seed}")["devices"] for seed in (0, 1)] == [1, 1]


@pytest.mark.slow
def test_a_sweeper_that_goes_batch_by_batch_gets_every_batch(tmp_path):
    sweep = Sweep(tmp_path, "inner_heads=5,1", *SHORT, "hydra.sweeper.max_batch_size=1")
    said = sweep.ended(1)
    assert sweep.states() == {"inner_heads=5": "failed", "inner_heads=1": "finished"}
    assert said.count("sweep  ") == 1 and said.count("\nfailed   inner_heads=5") == 1


SWEEPER = """
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from pathlib import Path

class Asking(BasicSweeper):
    def sweep(self, arguments):
        Path(self.config.hydra.sweep.dir).mkdir(parents=True)
        for number, heads in enumerate((1, 5)):
            [job] = self.launcher.launch([[*arguments, f"inner_heads={heads}"]], initial_job_idx=number)
            print("figure", job.return_value)
"""


@pytest.mark.slow
def test_a_sweeper_reads_the_validation_figure_of_each_job(tmp_path):
    plugin = tmp_path / "hydra_plugins" / "asking" / "__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(SWEEPER)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = Sweep(tmp_path, *SHORT, "hydra.sweeper._target_=hydra_plugins.asking.Asking", PYTHONPATH=path).ended(1)
    result = runs.result_of(tmp_path / "sweep" / "inner_heads=1")
    assert re.findall(r"^figure (\S+)$", said, re.M) == [str(result["val/top1"]), "nan"]


@pytest.mark.slow
def test_jobs_at_the_same_time_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found, env = with_callback("Seen", tmp_path)
    for part, count in (("train", 64), ("val", 8)):
        for name in ("cat", "dog"):
            (folder := tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    photos = ("data=folder", f"data.root={tmp_path / 'photos'}", "model=tnt_digits", "recipe=digits", "image_size=8")
    sweep = Sweep(tmp_path, "seed=0,1", *photos, *SHORT, "hydra.launcher.jobs=2", *found, **env)
    sweep.ended(0)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(start["OMP_NUM_THREADS"], start["threads"]) for start, _ in what_was_seen(tmp_path)] == [(str(share), share)] * 2
    assert share >= 8 or [runs.config_of(sweep.folder / f"seed={seed}")["data"]["num_workers"] for seed in (0, 1)] == [share, share]
    machine = Machine(gpus=None, at_once=2, cores=8)
    assert machine.share(1) == 4 and machine.share(2) == 2 and machine.share(16) == 1
    assert Machine(gpus=None, at_once=1, cores=8).share(1) is None and Machine(gpus=["0"], at_once=2, cores=8).share(1) is None
    machine = Machine(gpus=["0", "1"], at_once=None, cores=8)
    assert machine.places == 2 and machine.share(1) is None
    machine.serve(gpu=False)
    assert machine.places == 1 and machine.share(2) == 4 and machine.free == []
    machine.serve(gpu=True)
    assert machine.places == 2 and machine.free == ["0", "1"]


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["seed=0,1", "optimizer.lr=-1"], "seed=0: optimizer.lr=-1 is not a number"),
        (["seed=0,1", "hydra.launcher.jobs=0"], "hydra.launcher.jobs=0 is not null or a whole number from 1"),
        (["seed=0,1", "hydra.launcher.fresh=maybe"], "hydra.launcher.fresh=maybe is not true or false"),
        (["seed=0,1", "hydra.launcher.job=2"], "hydra.launcher.job=2: no such key; did you mean hydra.launcher.jobs?"),
        (["seed=0,1", "trainer.devices=[0,1]"], "seed=0: trainer.devices=[0,1]: a job's devices are chosen by the sweep"),
        (["seed=0,1", "trainer.num_nodes=2"], "seed=0: trainer.num_nodes=2: a job of this launcher runs on one machine"),
        (["seed=0,1", "trainer.devices=3", "hydra.launcher.gpus=[0,1]"], "seed=0: trainer.devices=3, and the sweep has 2 GPUs"),
        (["seed=0,1", "model=tnt_s,nope"], "model=nope not found; available: deit_b, deit_s, deit_ti"),
        (["seed=0,1", "hydra.sweep.subdir=one"], "seed=0 and seed=1: both would lie in "),
        (["seed=0,1", "hydra.launcher.gpus=2", "hydra.launcher.jobs=2"], "hydra.launcher.gpus=2: "),
        (["seed=0,1", "resume=latest"], "seed=0: resume=latest: a sweep goes on by the same command"),
    ],
)
def test_what_does_not_fit_is_said_before_any_job(tmp_path, overrides, line):
    said = Sweep(tmp_path, *overrides).ended(2)
    assert said.startswith(f"error: {line}") and said.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is left of it"


def two_gpus(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: NVIDIA H200 (UUID: GPU-0)\\nGPU 1: NVIDIA H200 (UUID: GPU-1)\\n'\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_the_machines_gpus(monkeypatch, tmp_path):
    two_gpus(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_here(None) == ["0", "1"] and gpus_here(1) == ["0"] and gpus_here([1, 1]) == ["1"] and gpus_here(0) == []
    with pytest.raises(UserError, match=r"gpus=4: this machine has 2; hydra.launcher.jobs=4 runs as many"):
        gpus_here(4)
    for visible, found in {"3,GPU-1a,3": ["3", "GPU-1a"], "": [], "-1": [], "0,-1,1": ["0"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus_here(None) == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UserError, match=r"gpus=\[0,1\]: CUDA_VISIBLE_DEVICES has no GPU 0; it has 4, 5"):
        gpus_here([0, 1])
    assert gpus_here([5]) == ["5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "")
    assert gpus_here(None) is None and gpus_here(["1"]) == ["1"]
    with pytest.raises(UserError, match="this machine has 0"):
        gpus_here(2)


@pytest.mark.parametrize(
    "overrides, name",
    [
        (["seed=0", "tnt_blocks=[1,6]"], "seed=0,tnt_blocks=1-6"),
        (["+trainer.limit_train_batches=4", "se=true"], "trainer.limit_train_batches=4,se=true"),
        (["data.root=/a/b"], "data.root=_a_b-"),
        (["data.root='/a b'"], "data.root=__a_b_-"),
        ([f"data.root={'字' * 100}"], f"data.root={'字' * 33}-"),
    ],
)
def test_a_directory_is_named_by_overrides(overrides, name):
    found = folder_name(overrides)
    assert found == name or (name.endswith("-") and re.fullmatch(re.escape(name) + "[0-9a-f]{8}", found))


def test_other_overrides_have_other_names():
    different = ["w=/a/b", "w=/a_b", "w=a:b", "w=a/b", "w='a b'", "w=ab", "w=[[1,2],[3]]", "w=[[1],[2,3]]", "w=[1,2,3]", "w={a:1}", "w=a1"]
    assert len({folder_name([override]) for override in different}) == len(different)


def test_of_a_log_with_several_attempts_the_last_one_tells(tmp_path):
    log, heading = tmp_path / "job.log", "2026-01-02 03:04:05 process 7: python -m tnt_lightning.train\n"
    log.write_text(f"{heading}error: /old: no space\n{heading}run x\nRuntimeError: boom\n")
    assert _last_words(log, 1) == "RuntimeError: boom" and _last_words(log, -9) == "killed by SIGKILL"
    assert _last_words(log, -40) == "killed by signal 40" and _last_words(tmp_path / "none", 3) == "exit code 3"
    for first in ("process 7: CUDA_VISIBLE_DEVICES=0,1 ", ""):  # SLURM's jobs have no process here
        log.write_text(f"{heading}error: /old: no space\n2026-01-02 03:04:05 {first}python -m tnt_lightning.train a=b\nboom\n")
        assert _last_words(log, 1) == "boom"
    log.write_text(f"{heading}error: a: b\nmore\n{heading}")
    assert _last_words(log, 1) == "exit code 1"


@pytest.fixture(scope="module")
def plan() -> dict:
    return resolved("logger=csv")


def changed(plan: dict, changes: dict) -> dict:
    config = OmegaConf.create(plan)
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    return OmegaConf.to_container(config)


@pytest.mark.parametrize(
    "before, now, finished, answer",
    [
        ({}, {}, True, []),
        ({}, {"trainer.devices": 2, "logger.name": "wandb", "data.num_workers": 3}, True, ["trainer.devices=2, was 1"]),
        ({}, {"optimizer.lr": 0.1}, True, "optimizer.lr=0.1, was 0.003"),
        ({}, {"optimizer.lr": 0.1}, False, ["optimizer.lr=0.1, was 0.003"]),
        ({}, {"model.inner_heads": 4}, False, "model.inner_heads=4: the run to continue had 2"),
        ({}, {"trainer.max_epochs": 90}, False, ["trainer.max_epochs=90, was 60"]),
        ({}, {"trainer.max_epochs": 9}, False, "recipe.epochs=9, and it is in epoch 10"),
        ({"resume": "/one"}, {"resume": "/one"}, True, []),
        ({"resume": "/one"}, {"resume": "/other/../one"}, True, []),
        ({"resume": "/one"}, {"resume": "/other"}, True, "resume=/other, was /one"),
        ({"resume": "/one"}, {}, True, "resume=null, was /one"),
        ({}, {"resume": "/other"}, True, "resume=/other, was null"),
        ({}, {"resume": False}, True, []),
        ({"resume": "/one"}, {"resume": "/other"}, False, "resume=/other, was /one"),
        ({"resume": "/one"}, {}, False, []),
        ({}, {"resume": False}, False, "resume=false: it never goes on"),
    ],
)
def test_what_lies_in_a_jobs_directory_is_finished_goes_on_or_is_another_run(tmp_path, plan, before, now, finished, answer):
    runs.start(tmp_path, changed(plan, before))
    if finished:
        runs.finish(tmp_path, {"val/top1": 90.0})
    else:
        (tmp_path / "metrics.csv").write_text("epoch,step\n8,1\n9,2\n")
    job = Job(number=0, swept=(), argv=[], run=tmp_path, config=changed(plan, now))
    if isinstance(answer, list):
        result, differ = _lies_there(job)
        assert bool(result) == finished and differ == answer
    else:
        with pytest.raises(UserError, match=re.escape(answer)):
            _lies_there(job)


def test_of_long_curves_a_job_shows_whole_rows_alone(tmp_path):
    job = Job(number=0, swept=(), argv=[], run=tmp_path, config={})
    curves = Curves(tmp_path / "metrics.csv")
    for step in range(2_300):
        curves.log_metrics({"epoch": step // 100, "train/loss": 1 + step / 7_000_000_000, "val/top1": 50 + step / 1_000}, step)
        if step > 2_250:  # the reader begins in the middle of another row each time
            _look_at(job)
            assert (job.epoch, job.top1) == (step // 100, 50 + step / 1_000)
    assert curves.file.stat().st_size > 1 << 16
    with curves.file.open("a") as stream:
        stream.write("229,4")
    _look_at(job)
    assert (job.epoch, job.top1) == (22, 52.299)


def test_a_job_that_is_stopped_the_moment_it_is_forked_ends(tmp_path):
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(5)\n")
    starter = "from tnt_lightning import zygote; zygote.PRELOADED, zygote.COMMAND = (), 'sleeper'; zygote.main()"
    line = [sys.executable, "-c", starter, "fork"]
    with subprocess.Popen(line, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for number in range(20):
            start = {"start": number, "argv": [], "env": {}, "log": str(tmp_path / "log")}
            process.stdin.write(f'{json.dumps(start)}\n{{"signal": {int(signal.SIGTERM)}}}\n'.encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline()) == {"ended": number, "code": -signal.SIGTERM, "why": None}
        process.stdin.close()
        assert process.wait(timeout=60) == 0


STARTER = """
import os, resource, sys
from tnt_lightning import zygote

zygote.PRELOADED, sys.argv[1:] = (), [sys.argv[1]]
if os.getuid() == 0:
    os.setuid(65534)  # for whom limits hold
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
before = len(os.listdir("/proc/self/fd"))
zygote.main()
sys.exit(len(os.listdir("/proc/self/fd")) - before > 4)  # its own: a copy of stdout, the pipe of its signals, and the listing
"""


@pytest.mark.parametrize("fork", ["fork", "plain"])
def test_where_no_process_can_be_started_the_jobs_fail_and_the_starter_does_not(fork):
    lines = "".join(json.dumps({"start": number, "argv": [], "env": {}, "log": os.devnull}) + "\n" for number in range(20))
    done = subprocess.run([sys.executable, "-c", STARTER, fork], input=lines, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    why = "no process could be started for it (Resource temporarily unavailable)"
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"ended": n, "code": 1, "why": why} for n in range(20)]


def test_who_kills_a_job_waits_until_it_is_gone():
    """As long as it takes to give its memory back, its GPUs are not free either."""
    with subprocess.Popen(
        [sys.executable, "-c", "held = b'x' * (1 << 28); print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        process.stdout.readline()
        stat = Path(f"/proc/{process.pid}/stat")
        assert _left(process.pid, time.monotonic() + 60) and _is_of(process.pid, stat)
        force = time.monotonic()
        while _left(process.pid, force):
            time.sleep(0.001)
        assert not _is_of(process.pid, stat) and process.wait(timeout=1) == -signal.SIGKILL
