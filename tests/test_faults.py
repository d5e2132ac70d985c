"""Faults of the machine, for real: killed processes, refused memory, full disks. One line each, exit code 2, nothing half-written."""

import errno
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tnt_lightning import runs
from tnt_lightning.classifier import Classifier
from tnt_lightning.data.splits import Arrays
from tnt_lightning.faults import explained

from .conftest import QUICK

LESS = "lower data.num_workers or data.batch_size, or give data.cache=false"
CUDA = (
    "CUDA out of memory. Tried to allocate 9.19 GiB. GPU 0 has a total capacity of 139.72 GiB of which 1.50 GiB is free. Process 1 has "
    "138.20 GiB memory in use. Of the allocated memory 130.00 GiB is allocated by PyTorch, and 7.00 GiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
    "fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
SMALLER = (
    "take the same steps in smaller parts, trainer.accumulate_grad_batches=2 or twice what it is now, or lower data.batch_size or "
    "image_size, or try trainer.precision=bf16-mixed"
)


def caught(call, *args) -> BaseException:
    with pytest.raises(Exception) as error:
        call(*args)
    return error.value


# ---- a worker


class Dying(torch.utils.data.Dataset):
    """Its loader's process ends by a signal, or with an exit code."""

    def __init__(self, how: signal.Signals | int):
        self.how = how

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        if isinstance(self.how, signal.Signals):
            signal.signal(self.how, signal.SIG_DFL) if self.how != signal.SIGKILL else None
            os.kill(os.getpid(), self.how)
            time.sleep(60)
        os._exit(self.how)


@pytest.mark.parametrize("how, line", [
    (signal.SIGKILL, f"a process that loads images (pid {{pid}}) was killed, as the system does when memory runs out; {LESS}"),
    (signal.SIGBUS, "a process that loads images (pid {pid}) found no room in shared memory, /dev/shm (bus error); enlarge it (docker run "
     f"--shm-size), or {LESS}"),
    (signal.SIGSEGV, "a process that loads images (pid {pid}) ended by a signal (Segmentation fault); data.num_workers=0 shows where"),
    (3, "a process that loads images (pid {pid}) ended with exit code 3; data.num_workers=0 shows where, or ask"),
])  # fmt: skip
def test_a_dead_worker_of_a_loader(how, line):
    error = caught(list, DataLoader(Dying(how), num_workers=1))
    [pid] = set(re.findall(r"pid(?:\(s\))? (\d+)", f"{error} {error.__cause__}"))
    assert str(explained(error)).startswith(line.format(pid=pid)) and "\n" not in str(explained(error))


class Failing(torch.utils.data.Dataset):
    def __init__(self, call):
        self.call = call

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        self.call()


def write_where_it_is_full():
    with open("/dev/full", "w", buffering=1) as file:
        file.write("a line\n")


def make_where_nothing_can_be_made():
    raise PermissionError(errno.EACCES, "Permission denied", "/data/skipped.jsonl")


@pytest.mark.parametrize("call, line", [
    (lambda: torch.empty(2**60, dtype=torch.uint8), "out of memory (1,073,741,824.0 GiB asked for); lower data.num_workers or"),
    (lambda: bytearray(2**60), "out of memory; lower data.num_workers or"),
    (write_where_it_is_full, "/run: the disk is full; make room, or choose another hydra.run.dir; afterwards the same command"),
    (make_where_nothing_can_be_made, "/data/skipped.jsonl: no permission; change its rights"),
    (lambda: 1 / 0, None),
])  # fmt: skip
def test_what_comes_out_of_a_worker_is_only_its_text(call, line):
    """torch raises a worker's errors anew, without the system's number, with the worker's traceback as their message."""
    known = explained(caught(list, DataLoader(Failing(call), num_workers=1)), run=Path("/run"))
    assert (known and str(known).startswith(line) and "\n" not in str(known)) if line else known is None


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            child, state, parent = re.fullmatch(r"(\d+) \(.*\) (\w) (\d+) .*", stat.read_text(), re.DOTALL).groups()
            if int(parent) == pid and state != "Z":
                found.append(int(child))
    return found


@pytest.mark.slow
def test_a_worker_that_is_killed_in_training(tmp_path):
    run = tmp_path / "run"
    line = [sys.executable, "-m", "tnt_lightning.train", "data.num_workers=1", "recipe.epochs=500", "trainer.enable_progress_bar=false"]
    with subprocess.Popen(
        [*line, f"hydra.run.dir={run}"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            until = time.monotonic() + 90
            while not (run / "checkpoints" / "last.ckpt").exists() or not (workers := children(child.pid)):
                assert child.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            os.kill(workers[0], signal.SIGKILL)
            _, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 2 and "Traceback" not in err
    [said] = [line for line in err.splitlines() if line.startswith("error:")]
    assert said == f"error: a process that loads images (pid {workers[0]}) was killed, as the system does when memory runs out; {LESS}"


def test_a_worker_that_is_killed_in_evaluation(ended, finished, monkeypatch):
    def die(*_):
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Arrays, "__getitem__", die)
    code, [line], err = ended("evaluate", f"run={finished}", "data.num_workers=1")
    assert code == 2 and re.search(r"a process that loads images \(pid \d+\) was killed", line) and "Traceback" not in err


# ---- memory


@pytest.mark.parametrize("call, line", [
    (lambda: np.empty(2**57), f"out of memory (1.00 EiB asked for); {LESS}, or lower image_size"),
    (lambda: bytearray(2**62), f"out of memory; {LESS}, or lower image_size"),
    (lambda: torch.empty(2**50), f"out of memory (4,194,304.0 GiB asked for); {LESS}, or lower image_size"),
])  # fmt: skip
def test_memory_that_the_system_refuses(call, line):
    assert str(explained(caught(call))) == line


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError(CUDA), f"out of memory on GPU 0 (9.19 GiB asked for, 139.72 GiB in all, 1.50 GiB free); {SMALLER}"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than 1EB memory."), f"out of memory on the GPU; {SMALLER}"),
    (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
     f"out of memory on the GPU; {SMALLER}"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), f"out of memory on the GPU; {SMALLER}"),
    (RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)"),
     f"no room in shared memory, /dev/shm; enlarge it (docker run --shm-size), or {LESS}"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), f"out of memory; {LESS}, or lower image_size"),
])  # fmt: skip
def test_memory_as_torch_says_it(error, line):
    assert str(explained(error)) == line


def test_a_model_that_no_memory_holds(ended, tmp_path):
    code, [line], err = ended("train", "image_size=60000", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 2 and re.fullmatch(
        r"error: image_size=60000: [\d,]+ GiB of parameters \(.*\) do not fit into the [\d,]+ GiB of .*; lower it.*", line
    )
    assert "Traceback" not in err and not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_a_gpu_whose_memory_is_full_in_evaluation(ended, finished, monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(Classifier, "validation_step", fill)
    code, lines, err = ended("evaluate", f"run={finished}")
    assert code == 2 and "Traceback" not in err
    assert lines == [f"error: out of memory on GPU 0 (9.19 GiB asked for, 139.72 GiB in all, 1.50 GiB free); {SMALLER}"]


# ---- disks


GOES_ON = ", or choose another hydra.run.dir; afterwards the same command with hydra.run.dir=/run goes on"


@pytest.mark.parametrize("error, line", [
    (OSError(errno.ENOSPC, "", "/run/metrics.csv"), f"/run/metrics.csv: the disk is full; make room{GOES_ON}"),
    (OSError(errno.ENOSPC, "", "/tmp/x", None, "/run/last.ckpt"), f"/run/last.ckpt: the disk is full; make room{GOES_ON}"),
    (OSError(errno.ENOSPC, "", "/cache/x"), "/cache/x: the disk is full; make room"),
    (OSError(errno.EDQUOT, "", "/run/x"), f"/run/x: the quota of the disk is used up; make room{GOES_ON}"),
    (OSError(errno.EROFS, "", "/run/x"), f"/run/x: the file system is read-only; mount it for writing{GOES_ON}"),
    (OSError(errno.EFBIG, ""), f"/run: larger than a file may be here; raise the limit (ulimit -f){GOES_ON}"),
    (PermissionError(errno.EACCES, "", "/run/x"), f"/run/x: no permission; change its rights{GOES_ON}"),
    (PermissionError(errno.EPERM, "", "/data/x"), "/data/x: no permission; change its rights"),
    (OSError(errno.EIO, "", "/data/x"), "/data/x: the disk, or its mount, fails (input/output error); look after it"),
    # bugs, or said elsewhere
    (PermissionError(errno.EPERM, "Operation not permitted"), None),  # of a process
    (FileNotFoundError(errno.ENOENT, "", "/run/x"), None),
    (ConnectionResetError(errno.ECONNRESET, ""), None),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), None),
    (ValueError("CUDA out of memory"), None),
    (KeyError("DefaultCPUAllocator: can't allocate memory"), None),
], ids=repr)  # fmt: skip
def test_what_a_disk_refuses(error, line):
    known = explained(error, run=Path("/run"))
    assert (known and str(known)) == line


@pytest.mark.parametrize("whole", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_of_torchs_on_a_full_disk(whole):
    error = caught(lambda: torch.save({"x": torch.zeros(10**6)}, "/dev/full", _use_new_zipfile_serialization=whole))
    assert str(explained(error, run=Path("/run"), resumable=False)) == (
        "/run: the disk is full; make room, or choose another hydra.run.dir"
    )


def test_a_bug_is_not_blamed_on_what_was_being_handled():
    def clean_up():
        try:
            raise OSError(errno.ENOSPC, "", "/run/x")
        finally:
            raise FileNotFoundError(errno.ENOENT, "", "/run/x.tmp")

    def stumble():
        try:
            raise OSError(errno.ENOSPC, "", "/run/x")
        except OSError:
            return {}["a bug"]

    assert str(explained(caught(clean_up))).startswith("/run/x: the disk is full")
    assert explained(caught(stumble)) is None


def buggy(tmp_path, body: str, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "buggy.py").write_text(f"from tnt_lightning.cli import command\n@command()\ndef main(config):\n    {body}\nmain()\n")
    env = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "TNT_LIGHTNING_SHORT_ERRORS")}
    return subprocess.run([sys.executable, "buggy.py", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)


def test_in_a_sweep_the_other_jobs_go_on(tmp_path):
    body = "print('job', config.seed) if config.seed else open('/dev/full', 'wb', 0).write(b'x')"
    done = buggy(tmp_path, body, "-m", "seed=0,1,2", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 2 and "job 1" in done.stdout and "job 2" in done.stdout and "Traceback" not in done.stderr
    line = f"{tmp_path / 'sweep' / 'seed=0'}: the disk is full; make room, or choose another hydra.run.dir"
    assert done.stderr.splitlines()[-1] == f"error: {line}" and f"job 0: {line}" in done.stdout + done.stderr


def test_a_log_that_its_disk_has_no_room_for_is_no_traceback(tmp_path):
    body = "import logging; logging.getLogger().addHandler(logging.FileHandler('/dev/full')); logging.warning('a line')"
    done = buggy(tmp_path, body, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0 and "a line" in done.stdout and "Traceback" not in done.stderr


def test_who_asks_for_the_traceback_gets_it(tmp_path, monkeypatch):
    body = "open('/dev/full', 'wb', 0).write(b'x')"
    (tmp_path / "buggy.py").write_text(f"from tnt_lightning.cli import command\n@command()\ndef main(config):\n    {body}\nmain()\n")
    env = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run([sys.executable, "buggy.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr and "[Errno 28]" in done.stderr


def limited(place: Path, size: int, line: list[str], kept: Path) -> subprocess.CompletedProcess:
    """A command that writes below `place`, where there is room for `size` bytes; what it leaves lies in `kept`.

    On a file system of its own where that may be mounted, else with files of at most that size.
    """
    place.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {shlex.quote(str(place))}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode == 0:
        script = f"{mount} && {{ {shlex.join(line)}; code=$?; cp -r {shlex.quote(str(place))} {shlex.quote(str(kept))}; exit $code; }}"
        return subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=place.parent, capture_output=True, text=True, timeout=120)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error in its place, as of a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(line, cwd=place.parent, capture_output=True, text=True, timeout=120, preexec_fn=limit)
    place.rename(kept)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kib", [16, 9 * 2**10], ids=["not for a log", "for one checkpoint of two"])
def test_a_run_on_a_disk_that_becomes_full(tmp_path, kib):
    run = tmp_path / "disk" / "run"
    line = [sys.executable, "-m", "tnt_lightning.train", *QUICK, "logger=csv", "+trainer.limit_train_batches=2", f"hydra.run.dir={run}"]
    done = limited(tmp_path / "disk", kib * 2**10, line, tmp_path / "kept")
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(said) == 1 and str(run) in said[0], done.stdout + done.stderr
    assert kib > 16 or ("cannot be written" in said[0] and not done.stdout), "found before anything is done"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    whole_or_not_at_all(tmp_path / "kept")


def whole_or_not_at_all(folder: Path) -> None:
    assert not [file for file in folder.rglob("*") if ".tmp" in file.name]
    for file in folder.rglob("*.ckpt"):
        with zipfile.ZipFile(file) as parts:
            assert parts.testzip() is None
        torch.load(file, weights_only=True)
    for file in folder.rglob("result.json"):
        assert runs.result_of(file.parent)
