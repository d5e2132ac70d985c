"""The processes of a loader, forked and known to live.

Until Python 3.12 a forked process may wait for ever before it runs a line: for a lock of the interpreter that another thread (gloo's,
W&B's) held at the moment of the fork. It never comes to load anything, and whoever waits for its batch waits for ever, too.
"""

import contextlib
import multiprocessing
import os
import select
from multiprocessing.context import ForkContext, ForkProcess

LIFE_S = 30.0  # until a forked process has given a sign of life, which takes milliseconds
ATTEMPTS = 3


class Forked(ForkProcess):
    """Forked anew where it gives no sign of life."""

    def start(self) -> None:
        task = {name: getattr(self, name) for name in ("_target", "_args", "_kwargs")}  # which a start takes away
        for attempt in range(1, ATTEMPTS + 1):
            reads, self._alive = os.pipe()
            vars(self).update(task, _popen=None)
            super().start()
            os.close(self._alive)
            # On a machine so busy that nothing gets on, the last one is left to its fate, as any process elsewhere is.
            if select.select([reads], [], [], LIFE_S)[0] or attempt == ATTEMPTS:
                os.close(reads)
                return
            os.close(reads)
            self.kill()
            self.join()

    def run(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody waits any longer
            os.write(self._alive, b".")
        os.close(self._alive)
        super().run()


class Forks(ForkContext):
    Process = Forked


def context() -> Forks | None:
    """For a DataLoader; None where processes are not forked."""
    return Forks() if multiprocessing.get_start_method() == "fork" else None
