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
from tnt_lightning.config import changes, refuse_to_continue, text
from tnt_lightning.errors import UserError, one_line

RECORD = "sweep.json"  # in the sweep's directory: its command and its jobs
LOG = "job.log"  # in a run's directory: what its process said
ENDING_S = 130  # that jobs of a sweep that was killed may still take to end
AWAY = ("queued", "running")  # states of a job that was handed over and has not ended
ON_GPU = ("auto", "gpu", "cuda")  # the values of trainer.accelerator that may mean one
# Of the configuration: a run with others is the same run, without a word, or with one.
FREE = ("data.num_workers", "trainer.enable_progress_bar", "logger")
MEANS = (
    "kernel=", "model.kernel=", "compute.", "trainer.devices", "data.cache", "data.download", "checkpoint.", "faults.timeout_s",
)  # fmt: skip
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
    commit: str | None = None  # of the code that it was last started by
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
    at_once: None for as many as there are GPUs, and one without
    """

    gpus: list[str] | None
    at_once: int | None
    cores: int | None = field(default_factory=lambda: _cores())  # None: jobs run elsewhere

    def __post_init__(self) -> None:
        self._there = self.gpus
        self.serve(gpu=True)

    def serve(self, *, gpu: bool) -> None:
        """Jobs of which some need a GPU; or none does, and they have the machine as if it had none."""
        self.gpus = self._there if gpu or not self._there else []
        self.free = list(self.gpus or ())

    @property
    def places(self) -> int:
        return self.at_once or len(self.gpus or ()) or 1

    def share(self, devices: int) -> int | None:
        """Of the cores, for each process of a job. None on a machine with GPUs, whose jobs are not alike to share them."""
        if self.cores is None or self.gpus or self.places * devices == 1:
            return None
        return max(1, self.cores // (self.places * devices))


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
        self.commit, self._commits = runs.commit(), _commits_in(folder)
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
            self._summarise()
            if self._came not in (signal.SIGTERM, signal.SIGINT) and (batch := signals.slurm_job()):
                say(signals.requeue(batch))
            raise SystemExit(128 + self._came)
        return [known[job.run] for job in jobs]

    def _look(self, jobs: Sequence[Job]) -> Iterator[str]:
        """At what lies there of each job already, and say what is done with it."""
        cut_off, going, by_others = [], [], []
        commits: dict[str | None, list[str]] = {}
        for job in jobs:
            if self.engine.at_it(job):
                if self.fresh:
                    raise runs.in_use(job.run)
                job.commit = self._commits.get(os.path.relpath(job.run, self.folder), self.commit)
                going.append(job.name)
                continue
            wait_for(job.run)  # one that has not come to write anything either: it may have its GPUs
            if not runs.holds(job.run):
                continue
            if self.fresh:
                runs.put_aside(job.run)
                continue
            try:
                result, differ = _lies_there(job)
            except UserError as error:
                yield f"{job.name}: what lies there is of another configuration ({error}): put aside as {runs.put_aside(job.run)}"
                continue
            named = f"{job.name} ({_few(differ)})" if differ else job.name
            if result:
                job.state, job.commit = "skipped", result.get("commit")
                by_others += [named] if differ else []
            else:
                job.commit = self._commits.get(os.path.relpath(job.run, self.folder), self.commit)
                cut_off.append(named)
            if job.commit != self.commit or (job.commit or "").endswith("+"):
                commits.setdefault(job.commit, []).append(job.name if result else f"{job.name} (until it was cut off)")
        if done := [job for job in jobs if job.state == "skipped"]:
            yield f"{len(done)} of {len(jobs)} jobs are finished already; hydra.launcher.fresh=true starts over"
        if by_others:
            yield f"finished by other means: {'; '.join(by_others)}"
        if going:
            yield f"at it since before: {'; '.join(going)}"
        if cut_off:
            yield f"cut off before its end, and goes on: {'; '.join(cut_off)}"
        for commit, names in commits.items():
            now = f"this is {self.commit}" if commit != self.commit else "the changes that + stands for may be others now"
            yield f"trained by the code of commit {commit}, and {now}: {'; '.join(names)}"

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
        if sum(other.state in AWAY for other in self.jobs) >= self.machine.places:
            return None
        needed = job.devices if job.gpu and self.machine.gpus else 0
        if needed > len(self.machine.free):
            return None
        taken, self.machine.free = self.machine.free[:needed], self.machine.free[needed:]
        return tuple(taken)

    def _start(self, job: Job, gpus: tuple[str, ...], starter: "Starter") -> None:
        job.state, job.gpus, job.began = "running", gpus, time.monotonic()
        job.commit = job.commit if job.where else self.commit  # where it runs since before, it was started then
        env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_OTHERS)}
        env["TNT_LIGHTNING_SWEPT"] = json.dumps(job.swept)  # for the dashboard
        if self.machine.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            if _by_nvidia_smi():
                env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # in which it counts
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
        the jobs; but not a SIGTERM within seconds of the first one."""
        first_term: float | None = None

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal first_term
            if number == signal.SIGTERM:
                if first_term is not None and time.monotonic() - first_term < signals.SAME_S:
                    return
                first_term = time.monotonic()
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
            {"swept": list(job.swept), "run": os.path.relpath(job.run, self.folder), "state": job.state, "why": job.why or None,
             "commit": job.commit}
            for job in self.jobs
        ]  # fmt: skip
        record = {"command": self.command, "commit": self.commit, "jobs": jobs}
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
        self._summarise()
        if any(job.state == "failed" for job in self.jobs):
            raise SystemExit(1)

    def _summarise(self) -> None:
        table = Table("job", "state", "val top-1", "test top-1", "run")
        for job in self.jobs:
            result = runs.result_of(job.run) if job.state in ("finished", "skipped") else {}
            figures = [f"{result[key]:.2f}" if key in result else "" for key in ("val/top1", "test/top1")]
            table.add_row(escape(job.name), job.state, *figures, escape(os.path.relpath(job.run, self.folder)))
        with suppress(BrokenPipeError):
            Console().print(table)
        say(f"sweep  {self.folder}: {self._counts()}")
        if offline := {job.run / "wandb" for job in self.jobs if _is_offline(job.run)}:
            alone = offline == set(self.folder.glob("*/wandb"))  # with runs that were put aside the pattern would upload these too
            folders = f"{shlex.quote(str(self.folder))}/*/wandb" if alone else shlex.join(map(str, sorted(offline)))
            say(f"W&B    offline; to upload the whole sweep: wandb sync {folders}")
        failed = [job for job in self.jobs if job.state == "failed"]
        for job in failed:
            say(f"failed {job.name}: {job.why} (all it said: {job.run / LOG})")
        if failed or any(job.state == "stopped" for job in self.jobs):
            say(f"again, for what is not finished: {shlex.join(self.command)}")


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
    patience, said = time.monotonic() + ENDING_S, False
    while runs.busy(run):
        if not said:
            say(f"note   {run}: a process still trains in it; waiting for its end, at most {ENDING_S} seconds")
            said = True
        if time.monotonic() > patience:
            raise runs.in_use(run)
        time.sleep(0.5)


def _commits_in(folder: Path) -> dict[str, str | None]:
    """Of the runs that a sweep's record names: the commit of the code that each was last started by."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return {job["run"]: job.get("commit", record.get("commit")) for job in record["jobs"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _lies_there(job: Job) -> tuple[dict[str, Any], list[str]]:
    """The result of what lies in a job's directory, empty where it was cut off, and in what it differs without being another run.

    UserError where it is of another configuration; of a run that was cut off that is one that training would not go on with.
    """
    before, result = runs.config_of(job.run), runs.result_of(job.run)
    differ = [line for line in changes(before, job.config) if not line.startswith(FREE)]
    came_from, comes_from = (_place(config.get("resume")) for config in (before, job.config))
    if came_from != comes_from and (result or comes_from is not None):
        raise UserError(f"resume={text(job.config['resume'])}, was {text(before.get('resume'))}")
    if result:
        if others := [line for line in differ if not line.startswith(MEANS)]:
            raise UserError(_few(others))
        return result, differ
    if job.config["resume"] is False:
        raise UserError("resume=false: it never goes on")
    try:
        refuse_to_continue(before, job.config)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{job.run / 'config.yaml'} is not the configuration of a run") from None
    epoch, epochs = _progress(job.run)[0], job.config["trainer"]["max_epochs"]
    if epoch is not None and epoch >= epochs:
        raise UserError(f"recipe.epochs={epochs}, and it is in epoch {epoch + 1}")
    return result, differ


def _place(resume: Any) -> Path | None:
    """What a run goes on from; None for itself alone."""
    return Path(resume).expanduser().resolve() if resume else None


def _few(lines: list[str]) -> str:
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def _progress(run: Path) -> tuple[int | None, float | None]:
    """The epoch, from 0, and the last validation top-1, as far as the end of metrics.csv tells."""
    file = run / "metrics.csv"
    try:
        with file.open("rb") as stream:
            columns = stream.readline().decode().strip().split(",")
            if (tail := file.stat().st_size - (1 << 16)) > stream.tell():
                stream.seek(tail)
                stream.readline()  # in the middle of a row
            whole = stream.read().rpartition(b"\n")[0]  # and the last one may be half written
        rows = [dict(zip(columns, row, strict=False)) for row in csv.reader(whole.decode(errors="ignore").splitlines())]
        epochs = [int(float(row["epoch"])) for row in rows if row.get("epoch")]
        return max(epochs, default=None), next((float(row["val/top1"]) for row in reversed(rows) if row.get("val/top1")), None)
    except (OSError, ValueError):  # not there yet
        return None, None


def _look_at(job: Job) -> None:
    """How far a running job is."""
    epoch, top1 = _progress(job.run)
    job.epoch, job.top1 = job.epoch if epoch is None else epoch, job.top1 if top1 is None else top1
    if epoch is not None and job.first is None:
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


def _by_nvidia_smi() -> bool:
    """Whether a sweep's GPUs are numbers that it counts by."""
    return "CUDA_VISIBLE_DEVICES" not in os.environ and shutil.which("nvidia-smi") is not None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
