"""Other engines for the jobs of a sweep: SLURM by submitit, Ray. Each is given jobs that are planned, and brings them to their end."""

import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, Self

from tnt_lightning import runs, signals, zygote
from tnt_lightning.errors import UserError
from tnt_lightning.sweep import ENDING_S, LOG, Job, Processes, say, wait_for

SLURM = "slurm"  # in a run's directory: the batch script, submitit's files, and job.json, which says what job of SLURM's it is
POLL_S = 3.0
# States after which a job of SLURM's may still be started again, in the moment before it is: looked at twice.
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED")


def _need(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"hydra/launcher={extra}: {package} is not installed; pip install '.[{extra}]'")


class Slurm:
    """A batch script for each job, and in it `srun` with a task for each device, which trains.

    A job is SLURM's from then on. Where the sweep's own process is gone, by whatever, it goes on, and the same sweep again waits for it;
    SIGINT and SIGTERM to the sweep cancel it, after a checkpoint.

    minutes: a job's time limit, None for the partition's; warning_s: seconds before it at which training hands the job back
    cpus_per_task: None for one and one for each loader process; mem_gb: of a node; sbatch: any other options
    """

    def __init__(
        self,
        *,
        partition: str | None,
        minutes: int | None,
        warning_s: int,
        cpus_per_task: int | None,
        mem_gb: float | None,
        setup: list[str],
        sbatch: dict[str, Any],
    ):
        _need("submitit", "slurm")
        for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
            if shutil.which(name) is None:
                raise UserError(f"hydra/launcher=slurm: no {name} here; start the sweep on a machine that hands jobs to SLURM")
        self.partition, self.minutes, self.warning_s = partition, minutes, warning_s
        self.cpus_per_task, self.mem_gb, self.setup, self.sbatch = cpus_per_task, mem_gb, setup, sbatch
        self.jobs: dict[str, Job] = {}  # by SLURM's number, those that have not ended
        self.seen: dict[str, int] = {}  # how many times in a row one was found to have ended, or not found
        self.over: deque[tuple[Job, int, str | None]] = deque()
        self.polled, self.force = 0.0, float("inf")

    # ---- an engine

    def at_it(self, job: Job) -> bool:
        try:
            told = json.loads((job.run / SLURM / "job.json").read_text())
            number, argv = told["job"], told["argv"]
        except (OSError, ValueError, RecursionError, LookupError, TypeError):  # not there, or damaged
            return False
        if not (isinstance(number, str) and number.isdecimal()):
            return False
        found = self._states(f"--jobs={number}").get(number)
        if found is None or found[0] in _ENDED:
            return False
        if argv != _of_the_run(job.argv):
            raise UserError(
                f"{job.name}: SLURM's job {number} trains in {job.run} by another configuration; wait for its end, or: scancel {number}"
            )
        job.where = number
        return True

    def starter(self, *, threads: int | None) -> "Slurm":
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # jobs are SLURM's

    # ---- a starter

    def start(self, job: Job, *, env: dict[str, str]) -> None:
        number = job.where or self._submit(job, env)
        self.jobs[number] = job
        job.state, job.where = "queued", f"SLURM's job {number}"

    def _submit(self, job: Job, env: dict[str, str]) -> str:
        import submitit

        folder, log = (job.run / SLURM).absolute(), str((job.run / LOG).absolute())
        folder.mkdir(parents=True, exist_ok=True)
        cpus = self.cpus_per_task or 1 + job.config["data"]["num_workers"]
        executor = submitit.SlurmExecutor(folder)
        with open(log, "a") as file:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(["python", "-m", zygote.COMMAND, *job.argv]), file=file)
        given: dict[str, Any] = dict(
            job_name=f"tnt {job.name}",
            partition=self.partition,
            time=self.minutes,
            nodes=job.nodes,
            ntasks_per_node=job.devices,
            cpus_per_task=cpus,
            gpus_per_node=job.devices if job.gpu else None,
            mem=None if self.mem_gb is None else f"{round(self.mem_gb * 1024)}MB",
            wckey=None,
            stderr_to_stdout=True,
            setup=self.setup,
            # srun has the number of cores from its command line alone since 22.05. A rank that fails takes the others along.
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}", f"--output={log}", "--open-mode=append"],
            additional_parameters={
                "requeue": True,
                "signal": f"USR1@{self.warning_s}",  # which training listens to, and not to submitit's USR2
                "output": log,
                **self.sbatch,
            },
        )
        executor.update_parameters(**given)
        try:
            with _environment(env), redirect_stderr(io.StringIO()):  # what sbatch says is in submitit's error, too
                number = str(executor.submit(_train, job.argv).job_id)
        except submitit.core.utils.FailedJobError as error:
            asks = f"; it asks for {job.devices} GPU(s) a node, trainer.accelerator=cpu for none" if job.gpu else ""
            raise UserError(f"{job.name}: not taken by SLURM: {' '.join(str(error).split())}{asks}") from None
        runs.write(folder / "job.json", json.dumps({"job": number, "argv": _of_the_run(job.argv)}) + "\n")
        return number

    def signal(self, number: int) -> None:
        """What runs gets SIGTERM, and what waits is taken out of the queue."""
        running = [job for job in self.jobs if self.jobs[job].state == "running"]
        self._cancel([job for job in self.jobs if job not in running])
        # Not cancelled outright: srun would end with it, and what training says of its checkpoint would be lost.
        self._cancel(running, "--signal=TERM")
        self.force = time.monotonic() + ENDING_S

    def _cancel(self, jobs: Iterable[str], *options: str) -> None:
        if jobs := list(jobs):
            subprocess.run(["scancel", *options, *jobs], capture_output=True, timeout=60)

    def ended(self, *, within: float) -> tuple[Job, int, str | None] | None:
        if not self.over:
            time.sleep(within)
            if time.monotonic() > self.polled + POLL_S:
                self._poll()
                self.polled = time.monotonic()
            if time.monotonic() > self.force:
                self._cancel(self.jobs)
                self.force = time.monotonic() + ENDING_S
        return self.over.popleft() if self.over else None

    def _poll(self) -> None:
        try:
            states = self._states()
        except UserError:  # it is asked again: the daemons of a cluster are started anew at times
            return
        for number, job in list(self.jobs.items()):
            state, code, nodes = states.get(number, ("", 0, ""))
            if state and state not in _ENDED:
                self.seen.pop(number, None)
                job.state = "queued" if state == "PENDING" else "running" if state == "RUNNING" else job.state
                job.where = f"SLURM's job {number}{f' on {nodes}' if nodes else ''}"
                continue
            self.seen[number] = self.seen.get(number, 0) + 1
            if state != "COMPLETED" and self.seen[number] < 2:
                continue
            del self.jobs[number]
            if not state:  # ended too long ago for SLURM to know it
                code = 0 if runs.result_of(job.run) else 1
            why = None if state in ("", "COMPLETED", "FAILED", "CANCELLED") else f"{state} of SLURM's job {number}"
            if state == "CANCELLED":
                code, why = -15, f"SLURM's job {number} was cancelled"
            self.over.append((job, code, why or _killed(job.run / LOG)))

    def _states(self, *which: str) -> dict[str, tuple[str, int, str]]:
        """State, exit code and nodes of this user's jobs, those that ended minutes ago too."""
        columns = "--Format=JobID:24,State:24,exit_code:12,NodeList:400"
        try:
            asked = ["squeue", f"--user={os.getuid()}", "--states=all", "--noheader", columns, *which]
            said = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise UserError("hydra/launcher=slurm: squeue does not answer") from None
        if said.returncode and "Invalid job id" not in said.stderr:
            raise UserError(f"hydra/launcher=slurm: {' '.join(said.stderr.split())}")
        rows = [line.split() for line in said.stdout.splitlines() if line.strip()]
        return {number: (state, os.waitstatus_to_exitcode(int(code)), "".join(nodes)) for number, state, code, *nodes in rows}


def _train(argv: list[str]) -> NoReturn:
    """In a task of a job: training in place of submitit's process, so that the job's signals reach it."""
    signals.hold()
    os.execv(sys.executable, [sys.executable, "-u", "-m", zygote.COMMAND, *argv])


def _of_the_run(argv: list[str]) -> list[str]:
    """The arguments that say what a run is, and not where in a sweep it stands."""
    return [arg for arg in argv if not arg.startswith("hydra.job.num=")]


def _killed(log: Path) -> str | None:
    """The task that was killed, where that came first: srun alone says it, and its exit code is that of the tasks that it ended then."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - (1 << 14)))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    started = [number for number, line in enumerate(lines) if "Starting with JobEnvironment" in line]  # the last time
    lines = lines[started[-1] :] if started else lines
    ends = [match for line in lines if (match := re.fullmatch(r"srun: error: (\S+: tasks? [-\d,]+: (.+))", line))]
    return ends[0][1] if ends and not ends[0][2].startswith("Exited with") else None


@contextmanager
def _environment(env: dict[str, str]) -> Iterator[None]:
    """sbatch hands its own on to the job."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({name: value for name, value in env.items() if name != "CUDA_VISIBLE_DEVICES"})
    if "SLURM_CONF" in before:  # of SLURM's variables the one that is the user's
        os.environ["SLURM_CONF"] = before["SLURM_CONF"]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Ray:
    """A task of Ray's for each job, which has its process and its GPUs where Ray has room for it.

    All machines see the same files under the same names. Jobs end with the sweep, after a checkpoint.

    address: of a cluster, None for RAY_ADDRESS's or one on this machine, of so many gpus and cpus
    """

    def __init__(self, *, address: str | None, gpus: int | None, cpus: int | None, cpus_per_device: int):
        _need("ray", "ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        # Where `uv run` has started this, Ray would start its processes by it, too, each in an environment that is made for it.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        # Otherwise a task without GPUs would see those of its machine.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        import ray

        address = address or os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {} if address else dict(num_gpus=gpus, num_cpus=cpus, include_dashboard=False)
        if address and (gpus, cpus) != (None, None):
            raise UserError(f"hydra.launcher.gpus, cpus: of a Ray on this machine, and {address} is a cluster with its own; leave them out")
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
        except (ConnectionError, ValueError, ray.exceptions.AuthenticationError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"hydra.launcher.address={address}: {said}; RAY_AUTH_MODE=token where its `ray start` says that tokens are on"
            ) from None
        self.ray, self.cpus_per_device, self.cluster = ray, cpus_per_device, address
        self.machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.jobs: dict[Any, tuple[Job, float]] = {}  # by what Ray gives for one; and when it was handed over
        self.stopped = self.told = False

    # ---- an engine

    def at_it(self, job: Job) -> bool:
        return False  # jobs end with the sweep that started them

    def starter(self, *, threads: int | None) -> "Ray":
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # Ray ends with this process, and what it runs

    # ---- a starter

    def start(self, job: Job, *, env: dict[str, str]) -> None:
        gpus, cpus = self._claims(job)
        env.setdefault("OMP_NUM_THREADS", str(max(1, int(self.cpus_per_device))))
        task = self.ray.remote(num_gpus=gpus, num_cpus=cpus, max_calls=1, max_retries=0)(_bring_to_its_end)
        job.state = "queued"
        self.jobs[task.options(name=job.name).remote(job, env, os.getcwd())] = (job, time.time())

    def _claims(self, job: Job) -> tuple[int, float]:
        """GPUs and cores of a job. UserError where no machine has them: Ray would wait for one that has."""
        most = {kind: max((machine.get(kind, 0) for machine in self.machines), default=0) for kind in ("GPU", "CPU")}
        gpus, cpus = job.devices if job.gpu else 0, job.devices * self.cpus_per_device
        accelerator, devices = job.config["trainer"]["accelerator"], f"trainer.devices={job.devices}"
        if gpus and not most["GPU"]:
            if accelerator != "auto":
                raise UserError(f"{job.name}: trainer.accelerator={accelerator}, and no machine of Ray's has a GPU; cpu trains without")
            gpus = 0
            if self.cluster and not self.told:
                self.told = True
                say(f"note   no machine of Ray's at {self.cluster} has a GPU now: jobs train without; trainer.accelerator=gpu refuses that")
        if gpus > most["GPU"]:
            raise UserError(f"{job.name}: {devices}, and no machine of Ray's has more than {most['GPU']:g} GPUs; lower it")
        if not any(machine.get("GPU", 0) >= gpus and machine.get("CPU", 0) >= cpus for machine in self.machines):
            several = f"{gpus} GPUs and {cpus:g} cores" if gpus and cpus <= most["CPU"] else f"more than {most['CPU']:g} cores"
            raise UserError(
                f"{job.name}: {devices} with hydra.launcher.cpus_per_device={self.cpus_per_device:g} each, and no machine of Ray's has "
                f"{several}; lower one of the two"
            )
        return gpus, cpus

    def signal(self, number: int) -> None:
        self.stopped = True
        for task in self.jobs:
            self.ray.cancel(task)

    def ended(self, *, within: float) -> tuple[Job, int, str | None] | None:
        for job, since in self.jobs.values():
            log = job.run / LOG
            if job.state == "queued" and log.exists() and log.stat().st_mtime >= since:
                job.state = "running"
        if not self.jobs:
            return None
        done, _ = self.ray.wait(list(self.jobs), num_returns=1, timeout=within)
        if not done:
            return None
        job, _ = self.jobs.pop(done[0])
        try:
            return job, self.ray.get(done[0]), None
        except self.ray.exceptions.RayError as error:
            wait_for(job.run)  # what Ray has given up may still write its checkpoint
            return job, -15 if self.stopped else 1, f"Ray: {' '.join(str(error).split())}"


def _bring_to_its_end(job: Job, env: dict[str, str], folder: str) -> int:
    """Where Ray has put a job; gives its exit code. Whatever ends this ends the job, after a checkpoint."""
    os.chdir(folder)
    env = {name: value for name, value in env.items() if name != "CUDA_VISIBLE_DEVICES"}
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ["OMP_NUM_THREADS"] = env["OMP_NUM_THREADS"]  # of each process; Ray has set that of the whole job
    with Processes(fork=zygote.can_fork(), threads=None) as processes:
        processes.start(job, env=env)
        while (ended := processes.ended(within=0.5)) is None:
            pass
    return ended[1]
