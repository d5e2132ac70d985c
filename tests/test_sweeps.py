"""Sweeps as people start them: real jobs, each a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tnt_lightning import runs
from tnt_lightning.cli import folder_name
from tnt_lightning.errors import UserError
from tnt_lightning.sweep import Machine, _last_words, gpus_here

from .conftest import QUICK

SHORT = (*QUICK[:2], "logger=csv", "+trainer.limit_train_batches=4", "model.depth=1", "trainer.accelerator=cpu")
LONG = (*SHORT, "recipe.epochs=400", "+trainer.limit_val_batches=1")


class Sweep:
    """`python -m tnt_lightning.train -m ...` in a process of its own."""

    def __init__(self, folder: Path, *overrides: str, **env: str):
        self.folder = folder / "sweep"
        line = [sys.executable, "-m", "tnt_lightning.train", "-m", *overrides, f"hydra.sweep.dir={self.folder}"]
        self.process = subprocess.Popen(
            line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env}, start_new_session=True
        )

    def ended(self, code: int) -> str:
        said, _ = self.process.communicate(timeout=400)
        assert self.process.returncode == code, said + "".join(log.read_text() for log in self.folder.glob("*/job.log"))
        assert "Traceback" not in said
        return said

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


@pytest.mark.parametrize("fork", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_of_four_jobs_one_fails_and_the_others_have_run(tmp_path, fork):
    said = Sweep(tmp_path, "inner_heads=1,5,2,4", *SHORT, f"hydra.launcher.fork={fork}").ended(1)
    sweep = tmp_path / "sweep"
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
    again = Sweep(tmp_path, "seed=0,1", *SHORT)
    assert "cut off before its end, and goes on: seed=1" in again.ended(0) and again.states() == {"seed=0": "skipped", "seed=1": "finished"}
    assert "goes on from" in (sweep.folder / "seed=1" / "job.log").read_text()
    said = Sweep(tmp_path, "seed=0,1", *SHORT, "optimizer.lr=0.001").ended(0)
    for seed in (0, 1):
        aside = sweep.folder / f"seed={seed}.before1"
        assert f"seed={seed}: what lies there is of another configuration (optimizer.lr=0.001, was 0.003): put aside as {aside}" in said
        assert runs.result_of(aside) and runs.config_of(sweep.folder / f"seed={seed}")["optimizer"]["lr"] == 0.001
    said = Sweep(tmp_path, "seed=0,1", *SHORT, "optimizer.lr=0.001", "hydra.launcher.fresh=true").ended(0)
    assert "finished seed=0" in said and runs.result_of(sweep.folder / "seed=0.before2")


@pytest.mark.slow
def test_another_commit_is_said(tmp_path):
    Sweep(tmp_path, "seed=0,1", *SHORT).ended(0)
    file = tmp_path / "sweep" / "seed=0" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "commit": "0123456789ab"}))
    assert "note   trained by the code of commit 0123456789ab, and this is " in Sweep(tmp_path, "seed=0,1", *SHORT).ended(0)


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
    """As SLURM and systemd do: the sweep and its starter tell a job to stop that was told already."""
    sweep = Sweep(tmp_path, "seed=0,1", *LONG)
    process = sweep.started("seed=0")
    sweep.trained("seed=0")
    starter = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    for one in (process, starter, sweep.process.pid):
        os.kill(one, signal.SIGTERM)
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
    """Four GPUs that only the names of are there; what each job has is what its own process says."""
    sizes = "trainer.devices=1,2"
    overrides = [*SHORT[:-1], "trainer.accelerator=auto", "recipe.epochs=1", "recipe.warmup_epochs=0", "+trainer.limit_val_batches=1"]
    sweep = Sweep(tmp_path, "seed=0,1,2,3", sizes, *overrides, "hydra.launcher.gpus=4", CUDA_VISIBLE_DEVICES="2,3,5,7")
    said = sweep.ended(0)
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
def test_jobs_at_the_same_time_share_the_cores(tmp_path):
    for part, count in (("train", 64), ("val", 8)):
        for name in ("cat", "dog"):
            (folder := tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    photos = ("data=folder", f"data.root={tmp_path / 'photos'}", "model=tnt_digits", "recipe=digits", "image_size=8")
    sweep = Sweep(tmp_path, "seed=0,1", *photos, *SHORT, "hydra.launcher.jobs=2")
    sweep.ended(0)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert share >= 8 or [runs.config_of(sweep.folder / f"seed={seed}")["data"]["num_workers"] for seed in (0, 1)] == [share, share]
    machine = Machine(gpus=None, at_once=2, cores=8)
    assert machine.share(1) == 4 and machine.share(2) == 2 and machine.share(16) == 1
    assert Machine(gpus=None, at_once=1, cores=8).share(1) is None and Machine(gpus=["0"], at_once=2, cores=8).share(1) is None


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


def test_the_machines_gpus(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: NVIDIA H200 (UUID: GPU-0)\\nGPU 1: NVIDIA H200 (UUID: GPU-1)\\n'\n")
    smi.chmod(0o755)
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
