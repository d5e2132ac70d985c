"""Checkpoint files: written whole or not at all, checked before they are trusted, and where in training each of them stands.

A run has last.ckpt, previous.ckpt (the last one before it) and, where validation images choose, best.ckpt: a copy of the last.ckpt of
its time, so that a run can go on from any of the three.
"""

import io
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from tnt_lightning import runs
from tnt_lightning.errors import UserError

NAMES = ("last", "previous", "best")


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in training a checkpoint stands: between two optimizer steps.

    epoch: whole epochs done, with their validation; batch: batches of the next one done, a device; images: the same over all devices
    step: optimizer steps done
    validating: the validation that follows these batches is to be done still
    world, accumulation, num_workers: by what it was trained; train_images: how many there are
    rows: of metrics.csv until then; seconds: that training took until then
    """

    epoch: int = 0
    batch: int = 0
    images: int = 0
    step: int = 0
    validating: bool = False
    world: int = 1
    accumulation: int = 1
    num_workers: int = 0
    train_images: int = 0
    rows: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        middle = f" and {self.batch} batches" if self.batch else ""
        return f"step {self.step} ({self.epoch} epochs{middle} done)"

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = asdict(self)

    @staticmethod
    def of(checkpoint: dict[str, Any]) -> "Position":
        """UserError for a checkpoint that does not say."""
        try:
            return Position(**checkpoint["position"])
        except (KeyError, TypeError):
            raise UserError("a checkpoint that does not say where in training it stands; weights= starts a new run from it") from None


class Origin(NamedTuple):
    """What a run goes on from; bad: lines about checkpoints that would have been newer."""

    run: Path
    file: Path
    position: Position
    bad: list[str]


class WholeFiles(TorchCheckpointIO):
    """Lightning's own saving moves a file from $TMPDIR, which on another file system is a copy onto the final name: cut off in the
    middle, it leaves a truncated last.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)  # with a checksum of every tensor, which `read` compares
        path = Path(path)
        runs.write(path, buffer.getbuffer(), keep=path.with_stem("previous") if path.stem == "last" else None)


def read(file: Path) -> dict[str, Any]:
    """A checkpoint of ours, its tensors still on the disk. UserError for one that is damaged, or more than tensors and plain data.

    torch itself compares no checksums when it reads.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{file}: damaged ({damaged} is not as it was written)")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # of whatever bytes these are; torch's own text would advise to load them unsafely
        size = file.stat().st_size
        why = "empty" if not size else "truncated, or no checkpoint" if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise UserError(f"{file}: not a file of tensors and plain data, or a damaged one ({why})") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{file}: no checkpoint of a run")
    return content


def newest(run: Path) -> tuple[Path, Position, list[str]] | None:
    """The checkpoint that a run goes on from, where it stands, and what is wrong with those that would have come before it.

    None where the run was cut off before its first one. UserError where there are some and all of them are bad.
    """
    files = [runs.checkpoint_path(run, name) for name in NAMES]
    if not any(file.exists() for file in files):
        return None
    good, bad = [], []
    for file in files:
        if file.exists():
            try:
                good.append((file, Position.of(read(file))))
            except UserError as error:
                bad.append(str(error))
        elif file.stem == "last":
            bad.append(f"{file}: missing")
        if good and not bad:  # the last is the newest
            break
    if not good:
        raise UserError(f"{run}: no checkpoint is whole: {'; '.join(bad)}")
    return *max(good, key=lambda found: (found[1].step, found[1].epoch)), bad
