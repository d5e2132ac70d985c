"""The jobs of a sweep: what each of them is, on which GPUs it runs, how far it is, and how it ended.

A job is a plain run with a directory of its own, named by what is swept; so the same sweep again skips the runs that are finished, goes
on with those that were cut off, and tries again those that failed.
"""

import csv
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from tnt_lightning import runs, signals, zygote
from tnt_lightning.config import changes
from tnt_lightning.errors import UserError, one_line

RECORD = "sweep.json"  # in the sweep's directory: its command and its jobs
LOG = "job.log"  # in a run's directory: what its process said
ENDING_S = 130  # that jobs of a sweep that was killed may still take to end
AWAY = ("queued", "running")  # states of a job that was handed over and has not ended
FREE = ("resume", "data.num_workers", "trainer.enable_progress_bar", "logger")  # of the configuration: a run with others is the same run
# What starts processes of one job, and what a batch system says of another one.
_OF_OTHERS = (
    "LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_", "SLURM_",
)  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Job:
    """A run of a sweep.

    swept: `key=value` of what is swept; argv: the arguments of `python -m tnt_lightning.train`; config: what they resolve to
    devices: of a GPU each, or processes on the CPU where gpu is false
    state: waiting, queued (by a cluster), running, finished, failed, stopped, or skipped, of one that was finished before
    """

    number: int
    swept: tuple[str, ...]
    argv: list[str]
    run: Path
    config: dict[str, Any]
    devices: int = 1  # of a node
    nodes: int = 1
    gpu: bool = True
    state: str = "waiting"
    gpus: tuple[str, ...] = ()
    where: str = ""  # it runs, where that is not this machine
    why: str = ""  # it failed, in one line
    began: float = 0.0
    first: tuple[float, int] | None = None  # when it was first seen in which epoch
    epoch: int = 0
    top1: float | None = None

    @property
    def name(self) -> str:
        return " ".join(self.swept) or self.run.name

    @property
    def figure(self) -> float | None:
        """The validation top-1 (percent), for Hydra's sweepers: not a number where the job failed, None where there is no such part."""
        return float("nan") if self.state in ("failed", "stopped") else runs.result_of(self.run).get("val/top1")


@dataclass(kw_only=True)
class Machine:
    """What jobs share: GPUs, by the names that CUDA_VISIBLE_DEVICES takes; at most so many jobs at a time; CPU cores.

    gpus: None where none is known of, and jobs are left to look for themselves
    """

    gpus: list[str] | None
    at_once: int
    cores: int | None = field(default_factory=lambda: _cores())  # None: jobs run elsewhere

    def __post_init__(self) -> None:
        self.free = list(self.gpus or ())

    def share(self, devices: int) -> int | None:
        """Of the cores, for each process of a job. None on a machine with GPUs, whose jobs are not alike to share them."""
        if self.cores is None or self.gpus or self.at_once * devices == 1:
            return None
        return max(1, self.cores // (self.at_once * devices))


def gpus_here(given: int | Sequence[Any] | None) -> list[str] | None:
    """The GPUs of a sweep: those of CUDA_VISIBLE_DEVICES or else the machine's; all of them, so many, or those given by name.

    None where there is none that anybody knows of. UserError where others are asked for. Without a call of CUDA, which a process whose
    forks use GPUs must not make.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found: list[str] | None = None
    if visible is not None:
        found = [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
        found = found[: found.index("-1")] if "-1" in found else found
    elif shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
            found = [str(n) for n, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]
        except (OSError, subprocess.TimeoutExpired):
            pass
    found = found and list(dict.fromkeys(found))
    where = "CUDA_VISIBLE_DEVICES" if visible is not None else "this machine"
    if isinstance(given, int):
        if given > len(found or ()):
            raise UserError(f"hydra.launcher.gpus={given}: {where} has {len(found or ())}; hydra.launcher.jobs={given} runs as many jobs")
        return (found or [])[:given]
    if given is not None:
        wanted = list(dict.fromkeys(map(str, given)))
        if unknown := [gpu for gpu in wanted if found is not None and gpu not in found and gpu.isdecimal()]:
            raise UserError(f"hydra.launcher.gpus=[{','.join(wanted)}]: {where} has no GPU {unknown[0]}; it has {', '.join(found or ())}")
        return wanted
    return found or (found if visible is not None else None)


class Sweep:
    """A sweep's directory while its jobs run. UserError where another process is at it."""

    def __init__(self, folder: Path, machine: Machine, engine: "Engine", *, command: Sequence[str], fresh: bool):
        self.folder, self.machine, self.engine, self.command, self.fresh = folder, machine, engine, list(command), fresh
        self.jobs: list[Job] = []
        self._came: int | None = None
        self._said: dict[Path, str] = {}  # the state that was last told, where there is no terminal
        self._recorded = True

    def check(self, jobs: Iterable[Job]) -> None:
        """UserError for a job that never gets the GPUs that it needs, and for two that would share a directory."""
        seen = {job.run: job for job in self.jobs}
        for job in jobs:
            other = seen.setdefault(job.run, job)
            if changes(other.config, job.config):
                raise UserError(
                    f"{other.name} and {job.name}: both would lie in {job.run}; tell them apart by hydra.sweep.subdir, or leave it out"
                )
            most = len(self.machine.gpus or ())
            if job.gpu and most and job.devices > most:
                raise UserError(f"{job.name}: trainer.devices={job.devices}, and the sweep has {most} GPUs; lower it")

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Bring each job to its end, and give them back; one that was asked for before is not done again.

        SystemExit where a signal stops them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            raise UserError(
                f"{self.folder} is in use by another process that sweeps in it; wait for its end, or choose another hydra.sweep.dir"
            ) from None
        with lock:
            known = {job.run: job for job in self.jobs}
            new = [job for job in jobs if known.setdefault(job.run, job) is job]
            self.jobs += new
            for line in self._look(new):
                say(f"note   {line}")
            todo = [job for job in new if job.state == "waiting"]
            try:
                if todo:
                    with self._signals():
                        self._run(todo)
            finally:
                for job in self.jobs:
                    if job.state in ("waiting", *AWAY):
                        job.state = "stopped"
                self._record()
        if self._came is not None and any(job.state == "stopped" for job in self.jobs):
            self.conclude()
            if self._came not in (signal.SIGTERM, signal.SIGINT) and (batch := signals.slurm_job()):
                say(signals.requeue(batch))
            raise SystemExit(128 + self._came)
        return [known[job.run] for job in jobs]

    def _look(self, jobs: Sequence[Job]) -> Iterator[str]:
        """At what lies there of each job already, and say what is done with it."""
        commit, cut_off, going = runs.commit(), [], []
        others: dict[str | None, list[str]] = {}
        for job in jobs:
            if self.engine.at_it(job):
                if self.fresh:
                    raise runs.in_use(job.run)
                going.append(job.name)
                continue
            if not runs.holds(job.run):
                continue
            wait_for(job.run)
            if self.fresh:
                runs.put_aside(job.run)
                continue
            try:
                before, result = runs.config_of(job.run), runs.result_of(job.run)
                differ = [line for line in changes(before, job.config) if not line.startswith(FREE)]
            except UserError as error:
                differ, result = [str(error)], {}
            if differ:
                few = "; ".join(differ[:3]) + (f"; and {len(differ) - 3} more" if len(differ) > 3 else "")
                yield f"{job.name}: what lies there is of another configuration ({few}): put aside as {runs.put_aside(job.run)}"
            elif result:
                job.state = "skipped"
                if result.get("commit") != commit:
                    others.setdefault(result.get("commit"), []).append(job.name)
            else:
                cut_off.append(job.name)
        if done := [job for job in jobs if job.state == "skipped"]:
            yield f"{len(done)} of {len(jobs)} jobs are finished already; hydra.launcher.fresh=true starts over"
        if going:
            yield f"at it since before: {'; '.join(going)}"
        if cut_off:
            yield f"cut off before its end, and goes on: {'; '.join(cut_off)}"
        for other, names in others.items():
            yield f"trained by the code of commit {other}, and this is {commit}: {'; '.join(names)}"

    # ---- while jobs run

    def _run(self, todo: list[Job]) -> None:
        todo = sorted(todo, key=lambda job: -job.devices)  # otherwise those of few GPUs would keep one of many waiting
        with self.engine.starter(threads=self.machine.share(max(job.devices for job in todo))) as starter, self._table() as show:
            told, before = False, ""
            while (todo and self._came is None) or any(job.state in AWAY for job in self.jobs):
                if self._came is not None and not told:
                    starter.signal(signal.SIGTERM)
                    told = True
                for job in [] if told else todo:
                    if (gpus := self._place(job)) is not None:
                        self._start(job, gpus, starter)
                        show()
                todo = [job for job in todo if job.state == "waiting"]
                if (ended := starter.ended(within=0.5)) is not None:
                    self._end(*ended)
                if (states := " ".join(job.state for job in self.jobs)) != before:
                    before = states
                    self._record()
                show()

    def _place(self, job: Job) -> tuple[str, ...] | None:
        """GPUs that are free for a job; none of them where it needs none."""
        if sum(other.state in AWAY for other in self.jobs) >= self.machine.at_once:
            return None
        needed = job.devices if job.gpu and self.machine.gpus else 0
        if needed > len(self.machine.free):
            return None
        taken, self.machine.free = self.machine.free[:needed], self.machine.free[needed:]
        return tuple(taken)

    def _start(self, job: Job, gpus: tuple[str, ...], starter: "Starter") -> None:
        job.state, job.gpus, job.began = "running", gpus, time.monotonic()
        env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_OTHERS)}
        env["TNT_LIGHTNING_SWEPT"] = json.dumps(job.swept)  # for the dashboard
        if self.machine.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # in which nvidia-smi counts
        if threads := self.machine.share(job.devices):
            env.setdefault("OMP_NUM_THREADS", str(threads))
        starter.start(job, env=env)

    def _end(self, job: Job, code: int, why: str | None = None) -> None:
        self.machine.free = sorted([*self.machine.free, *job.gpus], key=(self.machine.gpus or []).index)
        job.gpus = ()
        try:
            finished = bool(runs.result_of(job.run))
        except UserError as error:
            finished, why = False, str(error)
        if finished:
            job.state = "finished"
        elif self._came is not None and code in (143, 130, 138, -signal.SIGTERM, -signal.SIGINT):
            job.state = "stopped"
        else:
            job.state, job.why = "failed", why or _last_words(job.run / LOG, code)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SLURM's SIGUSR1 stop the jobs, which write their checkpoints; a second one ends this process, and its end
        the jobs."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._came is not None and number != signals.SIGNALS[-1]:
                os._exit(128 + number)
            self._came = self._came or number

        before = {number: signal.signal(number, note) for number in signals.SIGNALS}
        signals.release()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- what is seen and what is kept of it

    def _record(self) -> None:
        """sweep.json, which a report reads. The jobs go on also where it cannot be written."""
        jobs = [
            {"swept": list(job.swept), "run": os.path.relpath(job.run, self.folder), "state": job.state, "why": job.why or None}
            for job in self.jobs
        ]
        record = {"command": self.command, "commit": runs.commit(), "jobs": jobs}
        try:
            runs.write(self.folder / RECORD, json.dumps(record, indent=2) + "\n")
        except OSError as error:
            if self._recorded:
                say(f"note   {error.filename}: cannot be written ({error.strerror}); the jobs go on")
            self._recorded = False

    @contextmanager
    def _table(self) -> Iterator[Any]:
        """In a terminal a table that lives; elsewhere a line whenever a job begins or ends."""
        console = Console()
        if console.is_terminal:
            with Live(self._rows(console.height), console=console, refresh_per_second=4, transient=True) as live:
                yield lambda: live.update(self._rows(console.height))
            return

        def lines() -> None:
            for job in self.jobs:
                if self._said.get(job.run, "waiting") != job.state and job.state != "skipped":
                    self._said[job.run] = job.state
                    on = f" on GPU {','.join(job.gpus)}" if job.gpus else f" ({job.where})" if job.where and job.state in AWAY else ""
                    figure = f": val top-1 {job.figure:.2f}" if job.state == "finished" and job.figure is not None else ""
                    say(f"{job.state:8} {job.name}{on}{figure}{f': {job.why}' if job.why else ''}")

        yield lines
        lines()

    def _rows(self, height: int) -> Table:
        table = Table("job", "state", *(["GPU"] if self.machine.gpus else []), "epoch", "val top-1", "time left", caption=self._counts())
        order = ("running", "failed", "queued", "waiting", "finished", "stopped", "skipped")
        rows = sorted(self.jobs, key=lambda job: order.index(job.state))
        for job in rows[: max(3, height - 8)]:
            if job.state == "running":
                _look_at(job)
            epochs = job.config["trainer"]["max_epochs"]
            seen = f"{job.epoch} of {epochs}" if job.state == "running" else ""
            figure = job.top1 if job.state == "running" else job.figure if job.state in ("finished", "skipped") else None
            left = _time_left(job, epochs) if job.state == "running" else ""
            on = [",".join(job.gpus)] if self.machine.gpus else []
            table.add_row(escape(job.name), job.state, *on, seen, "" if figure is None else f"{figure:.2f}", left)
        return table

    def _counts(self) -> str:
        states = [job.state for job in self.jobs]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))

    def conclude(self) -> None:
        """The summary of all its jobs; SystemExit where some failed."""
        table = Table("job", "state", "val top-1", "test top-1", "run")
        for job in self.jobs:
            result = runs.result_of(job.run) if job.state in ("finished", "skipped") else {}
            figures = [f"{result[key]:.2f}" if key in result else "" for key in ("val/top1", "test/top1")]
            table.add_row(escape(job.name), job.state, *figures, escape(os.path.relpath(job.run, self.folder)))
        with suppress(BrokenPipeError):
            Console().print(table)
        say(f"sweep  {self.folder}: {self._counts()}")
        if any(_is_offline(job.run) for job in self.jobs):
            say(f"W&B    offline; to upload the whole sweep: wandb sync {shlex.quote(str(self.folder))}/*/wandb")
        failed = [job for job in self.jobs if job.state == "failed"]
        for job in failed:
            say(f"failed {job.name}: {job.why} (all it said: {job.run / LOG})")
        if failed or any(job.state == "stopped" for job in self.jobs):
            say(f"again, for what is not finished: {shlex.join(self.command)}")
        if failed and self._came is None:
            raise SystemExit(1)


current: Sweep | None = None  # of this process


class Engine(Protocol):
    """What runs jobs: this machine, or a cluster (`tnt_lightning.clusters`)."""

    def at_it(self, job: Job) -> bool:
        """Whether it runs a job already, for a sweep whose process is gone."""

    def starter(self, *, threads: int | None) -> "Starter":
        """threads: of each process, None where nothing says it"""


class Starter(Protocol):
    """What an engine starts jobs with, while it is entered; it sets `queued`, `running` and where of those that it was given."""

    def start(self, job: Job, *, env: dict[str, str]) -> None: ...

    def signal(self, number: int) -> None:
        """To every job."""

    def ended(self, *, within: float) -> tuple[Job, int, str | None] | None:
        """A job that ended, its exit code (-N: by signal N) and why it failed where its log does not say it; None where none did within
        so many seconds."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Here:
    """This machine."""

    def __init__(self, *, fork: bool):
        self.fork = fork

    def at_it(self, job: Job) -> bool:
        return False  # jobs end with the sweep that started them

    def starter(self, *, threads: int | None) -> "Processes":
        return Processes(fork=self.fork, threads=threads)


class Processes:
    """The process that starts jobs (`tnt_lightning.zygote`), seen from the sweep."""

    def __init__(self, *, fork: bool, threads: int | None):
        self.jobs: list[Job] = []
        env = dict(os.environ)
        if fork:
            env["OPENBLAS_NUM_THREADS"] = "1"  # whose threads numpy would start at its import
            if threads:
                env.setdefault("OMP_NUM_THREADS", str(threads))  # read when torch is imported, for all forks
            env.pop("CUDA_VISIBLE_DEVICES", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", zygote.__name__, "fork" if fork else "plain"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True,  # a Ctrl-C goes to the sweep alone
        )  # fmt: skip
        self._ended: queue.SimpleQueue[tuple[int, int, str | None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="sweep").start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                try:
                    said = json.loads(line)
                    self._ended.put((said["ended"], said["code"], said["why"]))
                except (ValueError, KeyError, TypeError):  # of something that prints when Python starts
                    sys.stderr.write(line.decode(errors="replace"))
        finally:
            self._ended.put(None)

    def start(self, job: Job, *, env: dict[str, str]) -> None:
        self.jobs.append(job)
        self._say(start=len(self.jobs) - 1, argv=job.argv, env=env, log=str(job.run / LOG))

    def signal(self, number: int) -> None:
        self._say(signal=int(number))

    def ended(self, *, within: float) -> tuple[Job, int, str | None] | None:
        """(job, exit code, why it could not be started) of one that ended; None where none did within so many seconds."""
        try:
            ended = self._ended.get(timeout=within)
        except queue.Empty:
            return None
        if ended is None:
            raise UserError("the process that starts the jobs was killed; the same command goes on with what is not finished")
        return self.jobs[ended[0]], *ended[1:]

    def _say(self, **line: Any) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it is gone, which `ended` says
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


def say(line: str) -> None:
    """To whoever still reads it: a sweep outlives the pipe that it prints to."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)


def _is_offline(run: Path) -> bool:
    """Whether its W&B run waits for being uploaded."""
    try:
        return json.loads((run / "wandb.json").read_text())["mode"] == "offline"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def wait_for(run: Path) -> None:
    """A run whose sweep was killed may still be writing its checkpoint."""
    patience = time.monotonic() + ENDING_S
    while runs.busy(run):
        if time.monotonic() > patience:
            raise runs.in_use(run)
        time.sleep(0.5)


def _look_at(job: Job) -> None:
    """How far a running job is, by the end of its metrics.csv."""
    file = job.run / "metrics.csv"
    try:
        with file.open("rb") as stream:
            columns = stream.readline().decode().strip().split(",")
            stream.seek(max(stream.tell(), file.stat().st_size - (1 << 16)))
            rows = [dict(zip(columns, row, strict=False)) for row in csv.reader(stream.read().decode(errors="ignore").splitlines())]
        job.epoch = max([int(float(row["epoch"])) for row in rows if row.get("epoch")], default=job.epoch)
        job.top1 = next((float(row["val/top1"]) for row in reversed(rows) if row.get("val/top1")), job.top1)
    except (OSError, ValueError):  # not there yet, or a line half written
        return
    if job.first is None:
        job.first = (time.monotonic(), job.epoch)


def _time_left(job: Job, epochs: int) -> str:
    if job.first is None or job.epoch <= job.first[1]:
        return ""
    seconds = (time.monotonic() - job.first[0]) / (job.epoch - job.first[1]) * max(0, epochs - job.epoch)
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _last_words(log: Path, code: int) -> str:
    """Of a job that failed: its error, else the last line that it said, else how it ended."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:  # a real-time signal
            return f"killed by signal {-code}"
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - (1 << 14)))
            said = stream.read().decode(errors="replace")
    except OSError:
        said = ""
    *_, latest = re.split(zygote.HEADING, said, flags=re.M)  # of an earlier attempt nothing
    lines = [line.strip() for line in latest.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("srun: ", "slurmstepd: ", "submitit "))] or lines
    last = next((line for line in reversed(own) if line.startswith("error: ")), own[-1] if own else f"exit code {code}")
    return one_line(last.removeprefix("error: "))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
