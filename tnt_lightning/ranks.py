"""The processes of one run on one machine, a rank each: none outlives another, and the first error is the one that is read.

Lightning starts ranks 1 and up as processes of the same command line. When one fails, the others' collectives fail for it, each with a
traceback of its own, or wait: whoever failed first speaks, and everyone else ends without a word. Rank 0 polls the processes that it
started, and these look whether rank 0 is there. Processes that something else starts (SLURM, torchrun) are that one's to end.

Under gloo a rank whose peer is gone comes out of its collective with an exception at once. Under NCCL it may sit in a CUDA call until
NCCL's own watchdog aborts it, so nothing here waits for a main thread for ever, and the watch's time-out comes before NCCL's.
"""

import atexit
import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch.distributed
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from tnt_lightning.errors import UserError
from tnt_lightning.faults import explained
from tnt_lightning.signals import ENDS

TIMEOUT_S = 1800  # where a configuration has none
TICK_S = 0.5
GRACE_S = 5.0  # for rank 0's main thread to come out by itself once the end is settled: then the dashboard is closed
PATIENCE_S = 12.0  # of the others, for rank 0 to end them; longer than it takes rank 0 to see why
ENDING_S = 30.0  # for the others to end, when all is done
MEETING_S = 60.0  # for ranks that have met to connect a second time
STARTING_S = 600.0  # until all ranks have met, which takes as long as their imports do
_PARENT = "TNT_LIGHTNING_RANK_0"  # to the others: the process that started them
_MEMORY = "a machine short of memory kills processes: lower data.num_workers or data.batch_size"

ending = False  # true once all ranks have agreed to stop: how they end then is nobody's failure
_watch: "_Watch | None" = None


def join(trainer: L.Trainer, timeout_s: float) -> None:
    """Make this process one of the ranks of the Trainer, before it fits or measures anything.

    timeout_s: seconds that a rank may stand still, all others waiting for it, before all are ended
    """
    global ending, _watch
    ending, _watch = False, None
    strategy: Any = trainer.strategy
    launcher = strategy.launcher
    ours = type(launcher) is _SubprocessScriptLauncher
    if ours and (_PARENT in os.environ):
        _watch = _Other(trainer, timeout_s, parent=int(os.environ[_PARENT]))
        _watch.start()
    elif ours and not launcher.cluster_environment.creates_processes_externally:
        _watch = _First(trainer, timeout_s)
        strategy._launcher = _watch.launcher
    if getattr(strategy, "_timeout", None) is not None:
        # A collective's own time-out would be a traceback on every rank, under NCCL an abort: it comes after the watch's.
        strategy._timeout = timedelta(seconds=timeout_s if _watch is None else max(timeout_s, STARTING_S) + 60)


def beside(timeout_s: float) -> Any:
    """A second group of all ranks, over gloo, whose collectives wait for no device. UserError where they do not reach each other so."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface(os.environ.get("NCCL_SOCKET_IFNAME", ""))):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        group: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=MEETING_S))
    except RuntimeError as error:
        if re.search(r"(closed|reset) by peer", str(error)):  # another is gone
            raise
        where = os.environ.get("GLOO_SOCKET_IFNAME") or f"the address of {socket.gethostname()}"
        why = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the ranks do not reach each other over gloo, by {where} ({why}); name the network that they share, "
            "GLOO_SOCKET_IFNAME=eth0 or another of `ip address`"
        ) from None
    set_timeout = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout  # torch < 2.15
    set_timeout(timedelta(seconds=timeout_s + 60), group)
    return group


def _interface(asked: str) -> str | None:
    """The network interface that NCCL_SOCKET_IFNAME means: beginnings of names, or =names; None where it only excludes some."""
    if not asked or asked.startswith("^"):
        return None
    here = [name for _, name in socket.if_nameindex()]
    given = [name.partition(":")[0] for name in asked.lstrip("=").split(",")]
    fits = str.__eq__ if asked.startswith("=") else str.startswith
    return next((name for begin in given for name in here if fits(name, begin)), None)


@contextlib.contextmanager
def together(trainer: L.Trainer) -> Iterator[None]:
    """What all ranks do: where one fails, all end. SystemExit where the failure was another's, which has been said by then."""
    watch = _watch
    try:
        yield
    except BaseException as error:
        if watch is not None and ending:
            atexit.register(watch.leave, _code_of(error))
        elif watch is not None:
            watch.came_out(error)
        raise
    finally:
        if watch is not None:
            watch.out.set()


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's, with our watch in place of its observer, which kills every process, its own too, without a word."""

    watch: "_First"

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:  # it says otherwise the second time
            os.environ[_PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[_PARENT]
            self.watch.start()
            atexit.register(self.watch.wait_for_others)  # and so after Lightning has taken the process group down
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def kill(self, signum: Any) -> None:
        """Lightning hands a signal on to the others: it stops all of them."""
        global ending
        ending = True
        super().kill(signum)


class _Watch:
    """A thread beside the main one, which may be stuck: in a collective, on a disk, in CUDA.

    out: the main thread has come out of what all ranks do
    """

    def __init__(self, trainer: L.Trainer, timeout_s: float):
        self.timeout_s, self.beats, self.still = timeout_s, 0, 0.0
        self.out = threading.Event()
        trainer.callbacks.append(_Beat(self))  # type: ignore[attr-defined]

    def start(self) -> None:
        threading.Thread(target=self._run, name="ranks", daemon=True).start()

    def _run(self) -> None:
        then, beats = time.monotonic(), self.beats
        while self.on():
            time.sleep(TICK_S)
            now = time.monotonic()
            # Not by the clock alone: a job that was stopped as a whole and goes on (^Z, fg) has no rank that stands still.
            self.still = 0.0 if self.beats != beats else self.still + min(now - then, 2 * TICK_S)
            then, beats = now, self.beats
            if not ending:
                self.look()

    def is_still(self, longer: float = 0.0) -> bool:
        return not self.out.is_set() and self.still > longer + (self.timeout_s if self.beats else max(self.timeout_s, STARTING_S))

    @property
    def no_answer(self) -> str:
        hangs = "look for what hangs (a disk, the network, a device), or raise it"
        return f"error: a rank did not answer within faults.timeout_s={self.timeout_s:g} seconds; {hangs}"

    def on(self) -> bool:
        raise NotImplementedError

    def look(self) -> None:
        raise NotImplementedError

    def came_out(self, error: BaseException) -> None:
        """In the main thread, before the error goes on its way; SystemExit in its place where another has spoken."""
        raise NotImplementedError

    def leave(self, code: int) -> None:
        _leave(code)


class _First(_Watch):
    """Of rank 0, or the first rank of another machine: started the others here and ends them."""

    def __init__(self, trainer: L.Trainer, timeout_s: float):
        super().__init__(trainer, timeout_s)
        theirs: Any = trainer.strategy.launcher
        self.launcher = _Launcher(theirs.cluster_environment, theirs.num_processes, theirs.num_nodes)
        self.launcher.watch = self
        self.lock = threading.Lock()
        self.code: int | None = None  # the exit code, once the end is settled

    def on(self) -> bool:
        return not self.out.is_set()

    def look(self) -> None:
        if self.settled() and not self.out.wait(GRACE_S):
            _leave(self.code)

    def settled(self) -> bool:
        """Whether another rank has failed, or stands still; the first to see it says so and ends the rest."""
        with self.lock:
            if self.code is None and not self.out.is_set():
                first = self.launcher.cluster_environment.node_rank() * self.launcher.num_processes
                for rank, process in enumerate(self.launcher.procs, first + 1):
                    if code := process.poll():
                        self._end(*_ending_of(f"rank {rank} (process {process.pid})", code))
                        break
                else:
                    if self.is_still():
                        self._end(1, self.no_answer)
            return self.code is not None

    def _end(self, code: int, line: str | None) -> None:
        self.code = code
        if line is not None:
            _say(line)
        self._kill_others()

    def _kill_others(self) -> None:
        for pid in (*(process.pid for process in self.launcher.procs if process.poll() is None), *_started_here()):
            _kill(pid)
        for process in self.launcher.procs:
            with contextlib.suppress(Exception):  # in a system call that nothing ends
                process.wait(timeout=GRACE_S)

    def wait_for_others(self) -> None:
        """At the exit of this process: the command has not ended before all that it started."""
        until = time.monotonic() + ENDING_S
        for process in self.launcher.procs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self._kill_others()

    def leave(self, code: int) -> None:
        self.wait_for_others()
        _leave(code)

    def came_out(self, error: BaseException) -> None:
        if _is_of_another(error):
            until = time.monotonic() + GRACE_S
            while not self.settled() and time.monotonic() < until:
                time.sleep(TICK_S / 5)
        with self.lock:
            self.out.set()
            spoken = self.code is not None
            if not spoken:
                self.code = _code_of(error)
                self._kill_others()
        atexit.register(_leave, self.code)
        # A mistake that every rank finds is for rank 0 to say, also where another was quicker to end for it.
        if spoken and not isinstance(error, UserError):
            raise SystemExit(self.code) from None


class _Other(_Watch):
    """Of a rank that rank 0 started."""

    def __init__(self, trainer: L.Trainer, timeout_s: float, *, parent: int):
        super().__init__(trainer, timeout_s)
        self.parent, self.rank = parent, trainer.local_rank

    def on(self) -> bool:
        return True  # rank 0 may go while this process is about to end, too

    def look(self) -> None:
        if os.getppid() != self.parent:
            if self.rank == 1 and not self.out.is_set():  # one of the others speaks for all
                _say(f"error: rank 0 (process {self.parent}) was killed; {_MEMORY}")
            _leave(1)
        if self.is_still(longer=PATIENCE_S + self.rank):  # and rank 0 has not seen to it
            _say(self.no_answer)
            _kill(self.parent)
            _leave(1)

    def came_out(self, error: BaseException) -> None:
        # Another's failure is not said a second time, unless rank 0, which ends this process meanwhile, knows of none. An own one may be
        # that of every rank, a setting that does not fit: rank 0 says it.
        time.sleep(PATIENCE_S if _is_of_another(error) else 2 * TICK_S)
        atexit.register(_leave, _code_of(error))


class _Beat(Callback):
    """Tells a watch that the main thread gets on."""

    def __init__(self, watch: _Watch):
        self.watch = watch

    def beat(self, *_: Any, **__: Any) -> None:
        self.watch.beats += 1


for _hook in dir(Callback):
    if _hook == "setup" or (_hook.startswith("on_") and _hook.endswith(("_start", "_end"))):
        setattr(_Beat, _hook, _Beat.beat)


def _is_of_another(error: BaseException) -> bool:
    """Whether a collective failed, and not what this rank does by itself. Where that is not so, it costs a wait and nothing else."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = r"gloo|NCCL|pair closure|[Cc]onnection (was )?(closed|reset|refused)|Broken pipe|TCPStore|ProcessGroup"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def _ending_of(who: str, code: int) -> tuple[int, str | None]:
    """(exit code, line) for what Popen.returncode says of a rank; no line where the rank's own is enough."""
    if (told := code - 128) in ENDS:
        return code, f"error: {who} was ended by {signal.Signals(told).name}"
    if code > 0:
        return code, None if code == 2 else f"{who} ended with exit code {code}; what it said stands above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = f"; {_MEMORY}" if name == "SIGKILL" else ""
    return 128 - code, f"error: {who} was killed by {name}{hint}"


def _code_of(error: BaseException) -> int:
    """The exit code that an exception leads to."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, UserError) or explained(error) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _leave(code: int | None) -> NoReturn:
    """End this process and its loaders' workers now.

    At an ordinary exit too: to take a process group down whose other end is gone can wait for ever.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code or 0)


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):  # gone already
        os.kill(pid, signal.SIGKILL)


def _started_here() -> list[int]:
    """The other ranks and what they started, loaders' workers above all, where the system tells (/proc).

    By a mark in their environment: the workers of a rank that was killed are nobody's children, and while they are there they keep the
    rank's connections open, so that no other rank sees it gone.
    """
    mark = f"{_PARENT}={os.getpid()}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            if mark in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found
