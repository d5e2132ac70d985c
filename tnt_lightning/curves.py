"""metrics.csv: what was logged, row by row; in the file as soon as it is known, and cut back to where a run goes on from."""

import contextlib
import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from tnt_lightning import runs


class Curves(Logger):
    """Lightning's CSVLogger keeps up to a hundred rows in memory, which a killed run loses, and deletes those of a run that goes on."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        self.rows = 0
        self._columns: list[str] = []

    @rank_zero_only
    def go_on_from(self, file: Path, rows: int) -> None:
        """Begin with the first rows of another run's metrics.csv, or of this one's own."""
        kept = _read(file)[:rows]
        if len(kept) < rows:
            print(f"note   {file} holds {len(kept)} of the {rows} rows that were logged until this checkpoint")
        self.rows = rows
        self._write(kept)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        row = {**metrics, "step": step}
        self.rows += 1
        if row.keys() <= set(self._columns):
            whole = self.file.stat().st_size
            try:
                with self.file.open("a", newline="") as stream:
                    stream.write(self._text([row]))
            except OSError as error:  # a full disk does not say which file it was
                with contextlib.suppress(OSError):
                    os.truncate(self.file, whole)
                raise type(error)(error.errno, error.strerror, str(self.file)) from None
        else:
            self._write([*_read(self.file), row])

    @rank_zero_only
    def sync(self) -> None:
        """Its rows to the disk, before a checkpoint that counts them."""
        if self.rows and self.file.exists():
            with self.file.open("rb+") as stream:
                os.fsync(stream.fileno())

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._columns = sorted({column for row in rows for column in row})
        if rows:
            runs.write(self.file, self._text(rows, header=True))
        else:
            self.file.unlink(missing_ok=True)

    def _text(self, rows: list[dict[str, Any]], *, header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    # What else Lightning asks of a logger.
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in config.yaml."""

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""  # the progress bar shows any other


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows; of one that was being written when the machine went down, what is whole."""
    if not file.exists():
        return []
    text = file.read_text()
    with io.StringIO(text[: text.rfind("\n") + 1]) as stream:
        return [{name: value for name, value in row.items() if name} for row in csv.DictReader(stream)]
