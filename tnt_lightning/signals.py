"""What a training process does with signals: it notes them, and training stops between two steps, with a checkpoint.

SIGTERM, SIGINT and SIGHUP, which a terminal sends as it closes, end the run; SIGUSR1, which SLURM sends ahead of a job's time limit
(--signal=USR1@120), hands the job back to SLURM too. A second signal ends the process at once, but for a SIGTERM or SIGHUP within seconds
of another.
"""

import os
import re
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))  # Windows has no SIGUSR1
HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
ENDS = (signal.SIGTERM, signal.SIGINT, *HANGUP)
REPEATED = (signal.SIGTERM, *HANGUP)
UNHEARD_S = 20  # outside of training: until a signal that nobody took up ends the process all the same
SAME_S = 5  # one of REPEATED so soon after another is the same one: who ends a job tells all its processes, and some of these tell others
WORKER_S = 30  # how long a loader's worker outlives a SIGTERM that was sent to every process of a job


class Signals:
    """The signal that came. Training looks at it between two steps; before it and after it one of ENDS ends the process at once.

    phase: "before" training, in "training", "after" it, or "done", when all is written
    first: whether this is the process that hands a job back to SLURM, once for all of them
    """

    def __init__(self, *, first: bool = True) -> None:
        self.came: int | None = None
        self.phase = "before"
        self.first = first
        self._ending = False
        self._first_term: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in (*SIGNALS, *HANGUP):
                if number not in HANGUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    self._before[number] = signal.signal(number, self._note)
            self._terminal = [stream for stream in (1, 2) if os.isatty(stream)]
            out, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._woke = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(out,), daemon=True, name="signals").start()
            release()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._woke)
            os.close(self._pipe)

    def _note(self, number: int, frame: FrameType | None) -> None:
        ends = number in ENDS
        if number in HANGUP:  # what is written to a terminal that is gone would be an error, before the checkpoint is there
            for stream in self._terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if number in REPEATED and self._first_term is not None and time.monotonic() - self._first_term < SAME_S:
            return
        if number in REPEATED:
            self._first_term = time.monotonic()
        if ends and self._ending:
            os._exit(128 + number)
        self._ending |= ends
        self.came = self.came or number
        if self.phase == "after":  # all is saved that training gave
            self.hand_back()
        if self.phase == "after" or (ends and self.phase != "training"):
            raise SystemExit(128 + number)

    def _listen(self, pipe: int) -> None:
        """In a thread, which the system's own handler wakes: Python's handlers wait for the main thread, which may be deep in C, in a
        collective or on a dead disk."""
        ends, first_term = 0, None
        while number := os.read(pipe, 1):
            if number[0] in REPEATED:
                if first_term is not None and time.monotonic() - first_term < SAME_S:
                    continue
                first_term = time.monotonic()
            ends += number[0] in ENDS
            if ends == 2:
                os._exit(128 + number[0])
            if ends and self.phase != "training":
                timer = threading.Timer(UNHEARD_S, self._end_unheard, (number[0],))
                timer.daemon = True
                timer.start()
        os.close(pipe)

    def _end_unheard(self, number: int) -> None:
        if not self._ending:
            os._exit(128 + number)

    def hand_back(self) -> None:
        """After SIGUSR1, under SLURM: ask for the job to be started again."""
        if self.first and self.came not in (None, *ENDS) and (job := slurm_job()):
            print(requeue(job), flush=True)


def hold() -> None:
    """In a SLURM job, keep SIGUSR1 waiting, which would kill a process that is still importing; `release` delivers it."""
    if "SLURM_JOB_ID" in os.environ and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def release() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def in_a_worker(_: int) -> None:
    """Of a loader's worker process, which inherits the handlers: the process that trains decides, and its workers serve it until then."""
    signal.set_wakeup_fd(-1)  # what comes here is not for the process that trains
    for number in (*SIGNALS, *HANGUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        # The loader itself ends a worker that does not come to an end by this signal.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_S))


def name(number: int) -> str:
    return signal.Signals(number).name


def slurm_job() -> str | None:
    """The job that SLURM can start again, as scontrol names it; None outside of one, and in an interactive one."""
    if "SLURM_JOB_ID" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ["SLURM_JOB_ID"]
    return job if re.fullmatch(r"[0-9_]+", job) else None


def requeue(job: str) -> str:
    """Ask SLURM to start a job again; gives a line that says how that went."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        why = done.stderr.strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} not handed back: scontrol requeue {job}: {error}"
    return f"job {job} handed back to SLURM" if done.returncode == 0 else f"job {job} not handed back: {why}"
