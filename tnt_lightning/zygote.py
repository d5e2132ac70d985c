"""The process that starts the jobs of a sweep, and outlives the sweep only to end them.

It imports once what every job imports, and a job is a fork of it, which takes a fraction of a second instead of many. A fork is sound
while this process has a single thread and has run nothing of torch in parallel and nothing on a GPU. Elsewhere than on Linux, where
system libraries have threads of their own, and by option, jobs are plain processes.

Lines of JSON come in and go out:
    {"start": NUMBER, "argv": [...], "env": {...}, "log": FILE}    start a job: `python -m tnt_lightning.train ARGV`
    {"signal": SIGNAL}                                             to every job
    {"ended": NUMBER, "code": CODE, "why": WHY}                    said of a job when none of its processes is left; -9: by SIGKILL
The end of what comes in is the end of the sweep, in whatever way it ended: jobs are told to stop, and write their checkpoints.
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tnt_lightning import runs

COMMAND = "tnt_lightning.train"
PRELOADED = ("lightning", "wandb", "hydra.main", "tnt_lightning.build", "tnt_lightning.dashboard", "tnt_lightning.evaluate",
             "tnt_lightning.ranks", "tnt_lightning.show", "tnt_lightning.signals", "tnt_lightning.config")  # fmt: skip
LEFT_S = 20  # that processes of a job may outlive its first one: ranks that notice, a service that uploads
KILLED_S = 5  # that these are waited for once they are killed, which takes as long as they have memory to give back
STOP_S = 120  # that jobs have for a checkpoint when the sweep is gone
HEADING = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?:process \d+: )?(?:CUDA_VISIBLE_DEVICES=\S* )?python -m .*$"  # of each attempt in a job's log
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
_PR_SET_PDEATHSIG = 1


def can_fork() -> bool:
    return sys.platform == "linux"


def main() -> None:
    global _out
    _out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no line of this process
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # who ends all processes of a sweep means its jobs, and the sweep itself tells those
    if sys.argv[1] == "fork":
        for name in PRELOADED:
            importlib.import_module(name)
        runs.checked_out()  # of now is the code that jobs are forks of
        threads = len(os.listdir("/proc/self/task"))
        if threads == 1:
            Forks().serve()
            return
        print(f"note   {threads} threads after the imports, which a fork would not survive: jobs are plain processes", file=sys.stderr)
    Plain().serve()


_out = 1


def _say(number: int, code: int, why: str | None = None) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(_out, json.dumps({"ended": number, "code": code, "why": why}).encode() + b"\n")


class Forks:
    """Without any thread: it waits for lines and for the ends of processes at one place."""

    def __init__(self) -> None:
        self.jobs: dict[int, int] = {}  # process -> number
        self.leaving: dict[int, tuple[int, int, float]] = {}  # process group -> number, exit code, when it is ended by force
        self.libc = ctypes.CDLL(None)

    def serve(self) -> None:
        ends, pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
        rest, force = b"", None
        while True:
            ready, _, _ = select.select([ends, *([0] if force is None else [])], [], [], 0.1 if self.leaving or force else None)
            if ends in ready:
                os.read(ends, 4096)
            if 0 in ready:
                if data := os.read(0, 1 << 16):
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self.obey(json.loads(line))
                else:
                    force = time.monotonic() + STOP_S
                    self.signal(signal.SIGTERM)
            self.reap()
            if force is not None:
                if not self.jobs and not self.leaving:
                    return
                if time.monotonic() > force:
                    self.signal(signal.SIGKILL)

    def obey(self, line: dict[str, Any]) -> None:
        if "signal" in line:
            self.signal(line["signal"])
            return
        try:
            log = _log(line["log"])
        except OSError as error:
            _say(line["start"], 1, _not_written(error))
            return
        parent, why = os.getpid(), None
        # What comes from here on waits until the child can take it: ignored, as it is in this process, it would be lost to the job.
        waiting = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process = os.fork()
        except OSError as error:
            why = _not_started(error)
        else:
            if process == 0:
                self.become(line, parent, log, waiting)
            self.jobs[process] = line["start"]
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        os.close(log)
        if why is not None:
            _say(line["start"], 1, why)

    def signal(self, number: int) -> None:
        for process in self.jobs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def reap(self) -> None:
        for process in list(self.jobs):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.leaving[process] = (self.jobs.pop(process), os.waitstatus_to_exitcode(status), time.monotonic() + LEFT_S)
        for group, (number, code, force) in list(self.leaving.items()):
            if _left(group, force):
                continue
            del self.leaving[group]
            _say(number, code)

    def become(self, job: dict[str, Any], parent: int, log: int, mask: set[int]) -> NoReturn:
        """The job, in the child: as if Python had just been started for it.

        mask: of signals, as it is to be again
        """
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, *_SIGNALS):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            self.libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # which died in between
                os._exit(1)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(_out)
            _print_to(log)
            os.environ.clear()
            os.environ.update(job["env"])
            sys.argv = [COMMAND, *job["argv"]]
            print(_heading(job, os.getpid()))
            runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


class Plain:
    """A thread for each job, which waits for its end."""

    def __init__(self) -> None:
        self.jobs: dict[int, subprocess.Popen] = {}
        self.libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def serve(self) -> None:
        for text in sys.stdin:
            line = json.loads(text)
            if "signal" in line:
                self.signal(line["signal"])
            else:
                self.obey(line)
        self.signal(signal.SIGTERM)
        force = time.monotonic() + STOP_S
        while self.jobs:
            time.sleep(0.1)
            if time.monotonic() > force:
                self.signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    def obey(self, job: dict[str, Any]) -> None:
        line = [sys.executable, "-m", COMMAND, *job["argv"]]
        try:
            log = _log(job["log"])
        except OSError as error:
            _say(job["start"], 1, _not_written(error))
            return
        try:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=job["env"], start_new_session=True,
                preexec_fn=self.be_free if os.name == "posix" else None,
            )  # fmt: skip
        except OSError as error:
            os.close(log)
            _say(job["start"], 1, _not_started(error))
            return
        with contextlib.suppress(OSError):  # of a full disk, which the job says
            os.write(log, _heading(job, process.pid).encode() + b"\n")
        os.close(log)
        self.jobs[job["start"]] = process
        threading.Thread(target=self.wait, args=(job["start"], process)).start()

    def be_free(self) -> None:
        """In the child: without what this process ignores, and not longer than it."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.libc is not None:
            self.libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def wait(self, number: int, process: subprocess.Popen) -> None:
        code, force = process.wait(), time.monotonic() + LEFT_S
        while os.name != "nt" and _left(process.pid, force):
            time.sleep(0.1)
        _say(number, code)
        del self.jobs[number]

    def signal(self, number: int) -> None:
        for process in list(self.jobs.values()):
            process.send_signal(number)


def _left(group: int, force: float) -> bool:
    """Whether processes of a job are left: on its GPUs another job would meet them.

    force: when they are killed; what is there seconds later sits in a system call that nothing ends, and is not waited for
    """
    late = time.monotonic() - force
    try:
        os.killpg(group, signal.SIGKILL if late > 0 else 0)
    except (ProcessLookupError, PermissionError):
        return False
    return late < KILLED_S and (sys.platform != "linux" or any(_is_of(group, file) for file in Path("/proc").glob("[0-9]*/stat")))


def _is_of(group: int, file: Path) -> bool:
    """And no zombie, of which a container without an init process rids nobody."""
    try:
        state, _, its_group = file.read_bytes().rpartition(b")")[2].split()[:3]
    except (OSError, ValueError):
        return False
    return int(its_group) == group and state != b"Z"


def _not_written(error: OSError) -> str:
    return f"{error.filename}: cannot be written ({error.strerror})"


def _not_started(error: OSError) -> str:
    return f"no process could be started for it ({error.strerror})"


def _heading(job: dict[str, Any], process: int) -> str:
    """The first line of a job's log: with it the job is started by hand."""
    gpus = job["env"].get("CUDA_VISIBLE_DEVICES")
    line = shlex.join(["python", "-m", COMMAND, *job["argv"]])
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {process}: {'' if gpus is None else f'CUDA_VISIBLE_DEVICES={gpus} '}{line}"


def _log(file: str) -> int:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


def _print_to(log: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for here, there in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(here, there)
    os.close(nothing)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
