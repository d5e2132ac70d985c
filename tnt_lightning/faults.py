"""Faults of the machine: memory or a disk that is full, a process that was killed. What a person should read in place of a traceback."""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from tnt_lightning.errors import UserError

LESS_MEMORY = "lower data.num_workers or data.batch_size, or give data.cache=false"
FAILED = {  # what a file could not be written, or read, for; what helps
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the quota of the disk is used up", "make room"),
    errno.EFBIG: ("larger than a file may be here", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "mount it for writing"),
    errno.EACCES: ("no permission", "change its rights"),
    errno.EPERM: ("no permission", "change its rights"),
    errno.EIO: ("the disk, or its mount, fails (input/output error)", "look after it"),
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def explained(error: BaseException, *, run: Path | None = None, resumable: bool = True) -> UserError | None:
    """One line for a fault of the machine: what happened and what helps. None for anything else, which is a bug of ours.

    run: the run directory, where the command writes one: the path of an error that names no file; resumable: whether the same command
    goes on with it
    """
    for cause in _causes(error):
        if line := _of_a_worker(cause) or _of_memory(cause) or _of_a_file(cause, run, resumable):
            return UserError(line)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from. What was being handled when a bug struck is not its cause; a failed clean-up's is."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        context = error.__context__ if isinstance(error, (OSError, RuntimeError)) and not error.__suppress_context__ else None
        error = error.__cause__ or context


def _of_a_worker(error: BaseException) -> str | None:
    """torch's words for a process of a DataLoader that is gone."""
    text = str(error)
    if isinstance(error, RuntimeError) and re.search(r"unable to (write to|open|allocate|mmap).*(/torch_|shared memory|shm)", text):
        return f"no room in shared memory, /dev/shm; enlarge it (docker run --shm-size), or {LESS_MEMORY}"
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexpectedly(.*))", text)
    if not found or not isinstance(error, RuntimeError):
        return None
    pids, signal, ending = found.groups()
    if signal is None and isinstance(error.__cause__, RuntimeError) and (line := _of_a_worker(error.__cause__)):
        return line  # it knows by what signal
    who = f"a process that loads images (pid {pids})"
    if signal == "Bus error":
        return f"{who} found no room in shared memory, /dev/shm (bus error); enlarge it (docker run --shm-size), or {LESS_MEMORY}"
    if signal in ("Killed", None) and "exit code" not in (ending or ""):
        return f"{who} was killed, as the system does when memory runs out; {LESS_MEMORY}"
    how = f"ended by a signal ({signal})" if signal else f"ended {ending.strip().split('. ')[0]}"
    return f"{who} {how}; data.num_workers=0 shows where, or ask whoever ends processes on this machine"


def _of_memory(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, RuntimeError) and re.search(r"(CUDA|HIP|XPU|MPS)\b.*out of memory|CU\w+_STATUS_ALLOC_FAILED", text):
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        whole = re.search(r"GPU (\d+) has a total capacity of ([\d.]+ \w+)(?: of which ([\d.]+ \w+) is free)?", text)
        facts = [f"{asked[1]} asked for"] if asked else []
        if whole:
            facts += [f"{whole[2]} in all", *([f"{whole[3]} free"] if whole[3] else [])]
        where = f"GPU {whole[1]}" if whole else "the GPU"
        told = f" ({', '.join(facts)})" if facts else ""
        return (
            f"out of memory on {where}{told}; take the same steps in smaller parts, "
            "trainer.accumulate_grad_batches=2 or twice what it is now, or lower data.batch_size or image_size, "
            "or try trainer.precision=bf16-mixed"
        )
    allocator = isinstance(error, RuntimeError) and re.search(r"DefaultCPUAllocator: (can't allocate|not enough) memory", text)
    if allocator or isinstance(error, MemoryError) or _errno(error) == errno.ENOMEM:
        tried = re.search(r"tried to allocate (\d+) bytes", text)
        unable = re.search(r"Unable to allocate ([\d.]+ \w+)", text)  # numpy's
        size = f"{int(tried[1]) / 2**30:,.1f} GiB" if tried else unable[1] if unable else None
        return f"out of memory{f' ({size} asked for)' if size else ''}; {LESS_MEMORY}, or lower image_size"
    return None


def _of_a_file(error: BaseException, run: Path | None, resumable: bool) -> str | None:
    number, file = _errno(error), getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a copy: where it goes
    if number is None and isinstance(error, RuntimeError):  # torch's, writing a checkpoint: without the system's number
        if re.search(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+|No space left on device", str(error)):
            number = errno.ENOSPC
    elif file is None and (named := re.search(r"\[Errno \d+\] [^:]*: '(.*)'\s*$", str(error))):
        file = named[1]
    if number not in FAILED:
        return None
    if file is None and number not in FULL | {errno.EROFS, errno.EIO}:  # not of a file: of a process, a socket
        return None
    why, cure = FAILED[number]
    inside = run is not None and (file is None or Path(str(file)).absolute().is_relative_to(run.absolute()))
    line = f"{file or run or 'a file could not be written'}: {why}; {cure}"
    if inside:
        line += ", or choose another hydra.run.dir"
        if resumable:
            line += f"; afterwards the same command with hydra.run.dir={run} goes on"
    return line


def _errno(error: BaseException) -> int | None:
    """The system's number; out of a worker of a DataLoader comes its text alone, with the worker's traceback above."""
    if not isinstance(error, OSError):
        return None
    if error.errno is None and (told := re.search(r"\[Errno (\d+)\]", (str(error).strip().splitlines() or [""])[-1])):
        return int(told[1])
    return error.errno
