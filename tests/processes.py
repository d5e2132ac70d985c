"""A command of several processes: all that it starts carries its mark, and where it hangs each of them says what it does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

START_S = 300  # until a command trains: imports take a minute and more where others use the machine, too
SOON_S = 30  # from a failure or a signal to the end of every process
MARK = "TNT_LIGHTNING_TEST"
TWO = ("trainer.accelerator=cpu", "trainer.devices=2")
# Of other commands that this process, or who started it, has run.
DROPPED = (
    "HYDRA_FULL_ERROR", "TNT_LIGHTNING_SHORT_ERRORS", "LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


class Started:
    """`python ARGUMENTS`, with what it prints in the files `out` and `err`, which may be one."""

    def __init__(self, arguments: Sequence[str], *, cwd: Path, out: Path, err: Path, **env: str):
        self.mark, self.out, self.err = uuid.uuid4().hex, out, err
        kept = {key: value for key, value in os.environ.items() if key not in DROPPED}
        env = {**kept, **env, MARK: self.mark, "PYTHONFAULTHANDLER": "1"}
        with out.open("a") as stdout, err.open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], cwd=cwd, env=env, stdout=stdout, stderr=stderr, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def all(self) -> dict[int, int]:
        """The parent of each process that lives."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # gone meanwhile
                pass
        return found

    def rank(self, number: int) -> int:
        if number == 0:
            return self.pid
        mark = f"LOCAL_RANK={number}".encode()
        below = [pid for pid, parent in self.all().items() if parent == self.pid]
        return next(pid for pid in below if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))

    def worker(self, rank: int) -> int:
        """A process that loads training images for a rank."""
        above = self.rank(rank)
        return min(pid for pid, parent in self.all().items() if parent == above and pid != self.rank(1))

    def until(self, reached: Callable[[], object], within: float = START_S, *, alive: bool = True) -> "Started":
        """Wait for something to be so, while the command runs; with alive=False it may end meanwhile."""
        goal = time.monotonic() + within
        while not reached():
            assert not alive or self.process.poll() is None, f"ended with {self.process.returncode}\n{self.said}"
            assert time.monotonic() < goal, self.explained()
            time.sleep(0.02)
        return self

    def send(self, number: int, *, rank: int = 0) -> "Started":
        os.kill(self.rank(rank), number)
        return self

    def ends(self, within: float = SOON_S) -> int:
        """The exit code, when no process is left."""
        self.until(lambda: self.process.poll() is not None, within, alive=False)
        self.until(lambda: not self.all(), within, alive=False)
        return self.process.returncode

    @property
    def said(self) -> str:
        return "\n".join(file.read_text() for file in dict.fromkeys((self.out, self.err)))

    def explained(self) -> str:
        """What all the processes do, each by a traceback of its own; it ends them."""
        states = [f"load {Path('/proc/loadavg').read_text().strip()}"]
        left = self.all()
        for pid in left:
            for name in ("cmdline", "stat", "wchan"):
                try:
                    states.append(f"{pid} {name}: {(Path('/proc') / str(pid) / name).read_text().replace(chr(0), ' ')[-300:]}")
                except OSError as error:
                    states.append(f"{pid} {name}: {error.strerror}")
        for number in (signal.SIGCONT, signal.SIGABRT):
            for pid in left:
                _send(pid, number)
        time.sleep(3)
        return "\n".join(["too long", *states, self.said])

    def kill(self) -> None:
        for pid in self.all():
            _send(pid, signal.SIGKILL)
        self.process.wait()


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
