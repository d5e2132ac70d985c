"""A run is a directory: config.yaml (resolved), classes.json, checkpoints/best.ckpt and last.ckpt, metrics.csv, result.json, train.log,
wandb/.

What is stored is tensors and plain data. A run with a result.json is finished; any other goes on from its last checkpoint.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from tnt_lightning.errors import UserError

PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "hydra-core", "numpy", "pillow", "wandb")
CLASSES = "classes.json"
ROOT = Path(__file__).parents[1]  # of the checkout
PROGRAM = ("tnt_lightning", "hydra_plugins", "conf")  # in it
LARGEST = 10_000  # values in a configuration; one of ours has a hundred


@contextlib.contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Have a directory to oneself, and know that it can be written. UserError where another process trains in it, or where it cannot.

    A process that dies, in whatever way, leaves the directory free.
    """
    made = not run.exists()
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock")
        lock.acquire(timeout=2)  # somebody may be looking whether it is taken
    except Timeout:
        raise in_use(run) from None
    except OSError as error:
        raise _not_written(run, error) from None
    try:
        for folder in (run, run / "checkpoints"):
            for left in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                left.unlink()
            try:
                probe(folder)
            except OSError as error:
                raise _not_written(folder, error) from None
        yield
    finally:
        if not holds(run):  # refused: it leaves nothing
            with contextlib.suppress(OSError):
                (run / "checkpoints").rmdir()
                (run / ".lock").unlink()
                if made:
                    run.rmdir()
        lock.release()


def holds(run: Path) -> bool:
    """Whether a run lies in a directory."""
    return (run / "config.yaml").exists() or any((run / "checkpoints").glob("*.ckpt"))


def probe(folder: Path) -> None:
    """OSError where a folder can take no more: full, over a quota, read-only."""
    write(folder / ".probe", "room\n" * 1000)
    (folder / ".probe").unlink()


def in_use(run: Path) -> UserError:
    return UserError(f"{run} is in use by another process that trains in it; wait for its end, or choose another hydra.run.dir")


def busy(run: Path) -> bool:
    """Whether a process trains in a directory at this moment."""
    if not (run / ".lock").exists():
        return False
    try:
        with FileLock(run / ".lock", timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _not_written(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another hydra.run.dir")


def start(run: Path, config: Mapping[str, Any], *, classes: Sequence[str] | None = None) -> None:
    """Write down what a claimed directory is a run of. The plan that a continued run had until now is kept beside it.

    classes: their names by label, where they have names
    """
    file = run / "config.yaml"
    text = recorded(config)
    if file.exists() and not _same(before := file.read_text(), text):
        free = next(name for number in itertools.count(1) if not (name := run / f"config.before{number}.yaml").exists())
        write(free, before)
    write(file, text)
    if classes:
        write(run / CLASSES, json.dumps(list(classes)) + "\n")


def put_aside(run: Path) -> Path:
    """Give a run that is to start anew another name, which is given."""
    free = next(name for number in itertools.count(1) if not (name := run.with_name(f"{run.name}.before{number}")).exists())
    os.replace(run, free)
    return free


def recorded(config: Mapping[str, Any]) -> str:
    """A resolved configuration as config.yaml holds it."""
    return yaml.safe_dump(dict(config), sort_keys=False)


def _same(one: str, other: str) -> bool:
    """Whether two config.yaml are of the same plan: `resume` says how it was started, not what it is."""
    return _plan(one) == _plan(other)


def _plan(text: str, beside: tuple[str, ...] = ("resume:",)) -> list[str]:
    return [line for line in text.splitlines() if not line.strip().startswith(beside)]


def unfinished(config: Mapping[str, Any], *, beside: Path) -> list[Path]:
    """The runs of this very configuration that can go on, the newest first: of those that lie beside a run directory, or in the
    folders of other days where it lies in one of days (outputs/DATE/TIME)."""
    beside_the_point = ("resume:", "kernel:")  # how it is computed
    wanted = _plan(recorded(config), beside_the_point)
    dated = beside.parent.parent.glob("????-??-??/*/config.yaml") if _is_date(beside.parent.name) else ()
    found = []
    for file in {*beside.parent.glob("*/config.yaml"), *dated}:
        run = file.parent
        with contextlib.suppress(OSError, ValueError):
            same = run != beside and _plan(file.read_text(), beside_the_point) == wanted
            if same and not (run / "result.json").exists() and not busy(run):
                found.append((_last_written(run), run))
    return [run for _, run in sorted(found, reverse=True)]


def _is_date(name: str) -> bool:
    return len(name) == 10 and name[4] == name[7] == "-" and name.replace("-", "").isdigit()


def _last_written(run: Path) -> float:
    last = checkpoint_path(run, "last")
    return (last if last.exists() else run / "config.yaml").stat().st_mtime


def finish(run: Path, result: dict[str, Any]) -> None:
    write(run / "result.json", json.dumps(result, indent=2) + "\n")


def config_of(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{run} is not a run directory: {file} cannot be read ({_first_line(error)})") from None
    if _larger_than(LARGEST, config):  # a few lines of YAML's references can stand for billions of values
        raise UserError(f"{file} is not the configuration of a run: more than {LARGEST:,} values")
    if not isinstance(config, dict) or not all(isinstance(config.get(name), dict) for name in ("model", "data", "recipe", "trainer")):
        raise UserError(f"{file} is not the configuration of a run")
    return config


def elsewhere(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run for another process, maybe on another machine: a kernel that was asked for there becomes `auto`, and a
    run from before there was a choice is computed layer by layer, as it was."""
    if config["model"].get("_target_") != "tnt_lightning.models.TNT":
        return config
    kernel = config["model"].get("kernel", "eager")
    kernel = "auto" if kernel == "triton" else kernel
    return {**config, "kernel": kernel, "model": {**config["model"], "kernel": kernel}}


def _larger_than(most: int, config: Any) -> bool:
    todo = [config]
    for count, value in enumerate(todo):
        if count == most:
            return True
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return False


def result_of(run: Path) -> dict[str, Any]:
    """result.json; empty while the run is not finished."""
    file = run / "result.json"
    try:
        result = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({_first_line(error)}); name a checkpoint: {run}/checkpoints/last.ckpt") from None
    return result if isinstance(result, dict) else {}


def classes_of(run: Path) -> list[str] | None:
    """The names of the classes by label; None where they have none, or where an older run did not record them."""
    file = run / CLASSES
    try:
        names = json.loads(file.read_text()) if file.exists() else None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({_first_line(error)}); without it classes are called by their numbers") from None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{file} is no list of names; without it classes are called by their numbers")
    return names


def checkpoint_path(run: Path, name: str) -> Path:
    return run / "checkpoints" / f"{name}.ckpt"


def locate(path: str | Path, checkpoint: str | None = None) -> tuple[Path, Path]:
    """(run directory, checkpoint file) of a run directory or of a checkpoint in one."""
    run, file = place(path)
    if file is not None:
        return run, file
    name = checkpoint or ("best" if result_of(run).get("checkpoint") == "best" else "last")
    file = checkpoint_path(run, name)
    if not file.exists():
        found = sorted(other.stem for other in file.parent.glob("*.ckpt"))
        raise UserError(f"{run} has no checkpoint {name!r}; it has {', '.join(found) or 'none'}")
    return run, file


def place(path: str | Path) -> tuple[Path, Path | None]:
    """The run directory that is meant, and the checkpoint where one is named."""
    if "://" in str(path):
        raise UserError(f"{path}: a URL is not loaded from; download the run and give its directory")
    path = Path(path).expanduser().resolve()
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        return path.parent.parent, path
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    return path, None


def origin() -> dict[str, Any]:
    """Where figures come from: versions, the code's commit, the machine."""
    import torch  # late: a sweep, which starts processes that import it, does not need it itself

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "commit": commit(),
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


@functools.cache
def commit() -> str | None:
    """Of the code that this process runs, as it was when it first asked: at the end of a long run something else may be checked out.
    With a + where files that make up the program differ from it; None outside a checkout."""
    head = checked_out()
    return None if head is None else head + ("" if _git("diff", "--quiet", head, "--", *PROGRAM) is not None else "+")


@functools.cache
def checked_out() -> str | None:
    """The checkout's commit, as it was when this process, or the one that it is a fork of, first asked."""
    return _git("rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else None


def _git(*line: str) -> str | None:
    """What git prints; None where it fails."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *line], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write(file: Path, content: str | bytes | memoryview, *, keep: Path | None = None) -> None:
    """Whole or not at all, and on the disk when this returns: beside it, fsync, replace, and fsync of the directory.

    keep: another name, under which what the file holds until now stays
    """
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        if keep is not None and file.exists():
            _also_as(file, keep)
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        # Under its final name, which is the one that says something to a person.
        raise type(error)(error.errno, error.strerror, str(file)) from None
    except BaseException:  # a signal that ends the process
        beside.unlink(missing_ok=True)
        raise
    sync(file.parent)


def _also_as(file: Path, other: Path) -> None:
    """The same file under another name, at no moment of which either is missing; a copy where the file system knows no such thing."""
    beside = other.with_name(f".{other.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(file, beside)
    except OSError:
        copy(file, other)
    else:
        os.replace(beside, other)


def copy(source: Path, target: Path) -> None:
    """As `write`, of a file."""
    beside = target.with_name(f".{target.name}.tmp")
    try:
        shutil.copyfile(source, beside)
        with beside.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(target)) from None
    sync(target.parent)


def sync(folder: Path) -> None:
    """What was renamed in a directory, to the disk; where the file system knows of such a thing."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no directory
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
