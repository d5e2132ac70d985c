"""What runs and sweeps came to: a row for each configuration, with mean and deviation over its seeds, and the paper's figure.

A run that failed or is not finished stays visible: its row says how many of its seeds have figures. Runs of other configurations or
commits are rows of their own.
"""

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from tnt_lightning import CONF, runs
from tnt_lightning.config import KNOBS, flat, text
from tnt_lightning.errors import UserError

# Of a configuration: a run with others is a run of the same row.
FREE = ("seed", "data.seed", "resume", "logger.", "checkpoint.", "faults.", "data.root", "data.num_workers", "data.cache", "data.download",
        "trainer.enable_progress_bar", "trainer.log_every_n_steps")  # fmt: skip
# Inside the package when installed from a wheel, in experiments/ in a checkout.
_PLACES = (Path(__file__).parent / "paper.yaml", Path(__file__).parents[1] / "experiments" / "paper.yaml")
PAPER: dict[str, Any] = yaml.safe_load(next(file for file in _PLACES if file.is_file()).read_text())
FIGURES = ("test/top1", "test/top5", "val/top1", "val/top5", "best/val/top1", "images_per_s", "wall_s")


@dataclass(kw_only=True)
class Run:
    """state: finished, failed, stopped, or unfinished; why: it failed; config: key -> value, as far as it is known"""

    folder: Path
    state: str
    config: dict[str, Any]
    swept: list[str]
    result: dict[str, Any] = field(default_factory=dict)
    why: str | None = None

    @property
    def whole(self) -> bool:
        """Whether all of its configuration is known."""
        return "recipe.epochs" in self.config

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    def curve(self, column: str) -> tuple[list[int], list[float]]:
        """(epochs, values) of a column of metrics.csv."""
        epochs, values = [], []
        try:
            with (self.folder / "metrics.csv").open(newline="") as stream:
                for row in csv.DictReader(stream):
                    if row.get(column) and row.get("epoch"):
                        epochs.append(int(float(row["epoch"])) + 1)
                        values.append(float(row[column]))
        except (OSError, ValueError):
            pass
        return epochs, values


@dataclass(kw_only=True)
class Row:
    """Runs that differ in their seed alone. knobs: in what it differs from other rows; paper: (figure, where it is from)"""

    commit: str | None
    knobs: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    paper: tuple[float, str] | None = None

    @property
    def name(self) -> str:
        return " ".join(f"{key}={text(value)}" for key, value in self.knobs.items()) or "run"

    def values(self, figure: str) -> list[float]:
        return [run.result[figure] for run in self.runs if run.result.get(figure) is not None]

    def mean(self, figure: str) -> float | None:
        return statistics.fmean(values) if (values := self.values(figure)) else None

    def deviation(self, figure: str) -> float | None:
        """Standard deviation of the sample; None of less than two."""
        return statistics.stdev(values) if len(values := self.values(figure)) > 1 else None

    @property
    def missing(self) -> list[Run]:
        return [run for run in self.runs if run.state != "finished"]


@dataclass(kw_only=True)
class Results:
    rows: list[Row]
    figure: str  # the one that is compared: test/top1 where there is a test part
    notes: list[str]
    places: list[Path]


def collect(places: Sequence[Path]) -> Results:
    """Of directories of runs, sweeps, or whatever holds some. UserError where one holds none."""
    found: dict[Path, Run] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such directory")
        here = {run.folder.resolve(): run for run in _runs(place)}
        if not here:
            raise UserError(f"{place}: no run and no sweep in it")
        found |= here
    every = list(found.values())
    rows, notes = _rows(every)
    tested = any("test/top1" in run.result for run in every)
    for row in rows:
        for run in row.missing:
            notes.append(f"{row.name} seed={text(run.seed)} {run.state}{f': {run.why}' if run.why else ''} ({run.folder})")
    return Results(rows=rows, figure="test/top1" if tested else "val/top1", notes=notes, places=list(places))


def _runs(place: Path, depth: int = 3) -> Iterator[Run]:
    if runs.holds(place):
        yield _run(place)
    elif (place / "sweep.json").exists():
        for job in _jobs(place / "sweep.json"):
            folder = place / job["run"]
            if runs.holds(folder):
                yield _run(folder, swept=job["swept"], said=job)
            else:  # it failed before it was a run
                known = dict(_pair(override) for override in job["swept"])
                yield Run(folder=folder, state=job["state"], config=known, swept=job["swept"], why=job.get("why"))
    elif depth:
        for folder in sorted(path for path in place.iterdir() if path.is_dir() and ".before" not in path.name):
            yield from _runs(folder, depth - 1)


def _jobs(file: Path) -> list[dict[str, Any]]:
    try:
        jobs = json.loads(file.read_text())["jobs"]
        assert all(isinstance(job["run"], str) and isinstance(job["swept"], list) and isinstance(job["state"], str) for job in jobs)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise UserError(f"{file}: not the record of a sweep") from None
    return jobs


def _run(folder: Path, *, swept: Sequence[str] = (), said: dict[str, Any] | None = None) -> Run:
    config = dict(flat(runs.config_of(folder)))
    result = runs.result_of(folder)
    said = said or {}
    state = "finished" if result else said.get("state", "unfinished")
    if not result and state not in ("failed", "stopped"):  # or it runs still
        state = "unfinished"
    return Run(folder=folder, state=state, config=config, swept=list(swept), result=result, why=None if result else said.get("why"))


def _pair(override: str) -> tuple[str, Any]:
    key, _, value = override.lstrip("+").partition("=")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value


def _rows(every: list[Run]) -> tuple[list[Row], list[str]]:
    """Runs with a configuration by that and their commit; then those of which less is known, to where they belong."""
    notes: list[str] = []
    by_plan: dict[str, Row] = {}
    for run in every:
        if run.result:
            row = by_plan.setdefault(json.dumps([_plan(run), run.result.get("commit")], default=str), Row(commit=run.result.get("commit")))
            row.runs.append(run)
    rows = list(by_plan.values())
    for run in every:
        if not run.result and run.whole:  # it says no commit
            home = next((row for row in rows if _plan(row.runs[0]) == _plan(run)), None)
            if home is None:
                rows.append(home := Row(commit=None))
            home.runs.append(run)
    keys = _telling(rows, every)
    for row in rows:
        row.knobs = {key: row.runs[0].config.get(key) for key in keys}
    for run in every:
        if not run.whole:  # it failed before it had a configuration: what was swept is all that is known
            known = {key: run.config.get(key) for key in keys}
            home = next((row for row in rows if all(row.knobs[key] == value for key, value in known.items() if value is not None)), None)
            if home is None:
                rows.append(home := Row(knobs=known, commit=None))
            home.runs.append(run)
    for row in rows:
        row.runs.sort(key=lambda run: text(run.seed).zfill(9))
        seeds = [text(run.seed) for run in row.runs if run.state == "finished"]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{row.name}: {len(seeds)} runs of seeds {', '.join(seeds)}: the same seed again is no other measurement")
        commits = sorted(other.commit for other in rows if _plan(other.runs[0]) == _plan(row.runs[0]) and other.commit)
        if len(commits) > 1:
            notes.append(f"{row.name}: runs of the commits {', '.join(commits)} are rows of their own")
        row.paper = published(row.runs[0].config, row.knobs)
    return rows, list(dict.fromkeys(notes))


def _plan(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if not key.startswith(FREE)}


def _telling(rows: list[Row], every: list[Run]) -> list[str]:
    """The keys in which rows differ: what was swept, and as many others as it takes to tell them apart; top-level ones first."""
    swept = dict.fromkeys(_pair(override)[0] for run in every for override in run.swept)
    known = dict.fromkeys(key for row in rows for key in _plan(row.runs[0]))
    keys = [key for key in swept if not key.startswith(FREE) and (key in known or not rows)]

    def apart(chosen: list[str]) -> int:
        return len({tuple(text(row.runs[0].config.get(key)) for key in chosen) for row in rows})

    for key in sorted(known, key=lambda key: (key not in KNOBS, key.count("."), key.startswith("trainer."))):
        if apart([*keys, key]) > apart(keys):
            keys.append(key)
    return keys


# ---- as a table


def words_of(figure: str) -> str:
    part, _, top = figure.partition("/")
    return f"{part} top-{top[-1]}"


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """(headings, cells): a line for each row; `98.66 ± 0.50`, and `2 of 3` where a run has no figure."""
    keys = list(dict.fromkeys(key for row in results.rows for key in row.knobs))
    head = [*keys, "test top-1, %", "val top-1, %", "n", "parameters, M", "GMAC", "images/s", "paper, %", "from"]
    return head, [_cells(row, keys, results.figure) for row in results.rows]


def _cells(row: Row, keys: list[str], figure: str) -> list[str]:
    n = len(row.values(figure))
    return [
        *(text(row.knobs.get(key)) for key in keys),
        *(_with_deviation(row, name) for name in ("test/top1", "val/top1")),
        f"{n} of {len(row.runs)}" if n < len(row.runs) else str(n),
        *(_scaled(row, *size) for size in (("parameters_as_in_the_paper", 1e6, ".4g"), ("flops", 1e9, ".4g"), ("images_per_s", 1, ",.0f"))),
        *((f"{row.paper[0]:.1f}", row.paper[1]) if row.paper else ("", "")),
    ]


def _with_deviation(row: Row, figure: str) -> str:
    mean, deviation = row.mean(figure), row.deviation(figure)
    return "" if mean is None else f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _scaled(row: Row, figure: str, unit: float, form: str) -> str:
    return "" if (mean := row.mean(figure)) is None else format(mean / unit, form)


# ---- the paper's figures


def published(config: dict[str, Any], knobs: dict[str, Any]) -> tuple[float, str] | None:
    """The paper's ImageNet top-1 (percent) of a configuration, else that of TNT-S with the same value of the one knob that is swept."""
    name = _variant(config)
    changed = {} if name is None else {k: config[k] for k in KNOBS if k in config and config[k] != _default(name, k)}
    if name is not None and str(config.get("data._target_", "")).rpartition(".")[2] in ("ImageNet", "ImageNetStream"):
        if not changed and name in PAPER["imagenet"]:
            return PAPER["imagenet"][name]["top1"], "Table 4"
        if name == "tnt_s" and len(changed) == 1:
            return _ablated(*next(iter(changed.items())))
        if name == "tnt_s" and changed.keys() == {"words_per_patch", "inner_heads"}:  # Table 8 has rows whose heads had to change
            return _ablated("words_per_patch", changed["words_per_patch"])
        return None
    ablated = [key for key in knobs if key in KNOBS]
    return _ablated(ablated[0], knobs[ablated[0]]) if len(ablated) == 1 else None


def _ablated(knob: str, value: Any) -> tuple[float, str] | None:
    if knob == "tnt_blocks":
        for row in PAPER["throughput_v100"].values():
            if row.get("tnt_blocks") == (list(range(1, 13)) if value is None else value):
                return row["top1"], "Table 5: TNT-S, ImageNet"
        return None
    tables = {"position_encoding": 6, "inner_heads": 7, "words_per_patch": 8, "se": 12}
    row = PAPER["ablations"][knob].get(value)
    return None if row is None else (row["top1"] if isinstance(row, dict) else row, f"Table {tables[knob]}: TNT-S, ImageNet")


def _variant(config: dict[str, Any]) -> str | None:
    if config.get("model._target_") == "timm.create_model":
        return {"deit_small_patch16_224": "deit_s"}.get(str(config.get("model.model_name")))
    sizes = ("depth", "outer_dim", "outer_heads")
    return next((name for name, row in PAPER["variants"].items() if all(config.get(f"model.{key}") == row[key] for key in sizes)), None)


def _default(variant: str, knob: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{variant}.yaml")).get(knob)  # type: ignore[union-attr]
