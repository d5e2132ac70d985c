"""What runs and sweeps came to: a row for each configuration, with mean and deviation over its seeds, and the paper's figure.

A run that failed, is damaged or is not finished stays visible: its row says how many of its runs have figures. Runs of other
configurations, data or commits are rows of their own.
"""

import csv
import functools
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tnt_lightning import CONF, runs
from tnt_lightning.config import KNOBS, flat, text
from tnt_lightning.errors import UserError, one_line

# Of a configuration: a run with others is a run of the same row. data.root is one of them where a published set lies in it.
FREE = ("seed", "data.seed", "resume", "kernel", "model.kernel", "faults.timeout_s", "data.num_workers", "data.cache", "data.cache_dir",
        "data.cache_gb", "data.download", "trainer.enable_progress_bar", "trainer.log_every_n_steps")  # fmt: skip
FREE_SECTIONS = ("logger.", "checkpoint.", "compute.")
# Inside the package when installed from a wheel, in experiments/ in a checkout.
_PLACES = (Path(__file__).parent / "paper.yaml", Path(__file__).parents[1] / "experiments" / "paper.yaml")
PAPER: dict[str, Any] = yaml.safe_load(next(file for file in _PLACES if file.is_file()).read_text())
FIGURES = ("test/top1", "test/top5", "val/top1", "val/top5", "best/val/top1", "images_per_s", "wall_s")


@dataclass(kw_only=True)
class Run:
    """One run.

    state: finished; repeated, of one that is finished too and whose seed has a newer run; failed, stopped, unfinished; damaged; missing,
    of one that its sweep says is finished
    config: key -> value; whole: all of it is known, and not only what was swept
    swept: key -> value of what a sweep varied, where it is of one
    commit: the code's, where it is known; why: a run has no figures
    """

    folder: Path
    state: str = "unfinished"
    config: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    swept: dict[str, Any] = field(default_factory=dict)
    sweep: Path | None = None
    result: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    why: str | None = None

    @property
    def seed(self) -> Any:
        return self.known.get("seed")

    @functools.cached_property
    def known(self) -> dict[str, Any]:
        """What tells it from others: its configuration, with the files that its model and data are of as the command line names them."""
        files = {group: name for group in ("model", "data") if self.whole and (name := _file(self.config, group)) is not None}
        return {**files, **self.swept, **self.config}

    @property
    def plan(self) -> str:
        """What runs of one row have in common."""
        return json.dumps({key: text(value) for key, value in self.config.items() if not _is_free(key, self.config)}, sort_keys=True)

    def figure(self, name: str) -> float | None:
        """None where there is none that could be averaged."""
        value = self.result.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None

    def curve(self, column: str) -> tuple[list[int], list[float]]:
        """(epochs, values) of a column of metrics.csv."""
        epochs, values = [], []
        try:
            with (self.folder / "metrics.csv").open(newline="") as stream:
                for row in csv.DictReader(stream):
                    if row.get(column) and row.get("epoch"):
                        epochs.append(int(float(row["epoch"])) + 1)
                        values.append(float(row[column]))
        except (OSError, ValueError, OverflowError, csv.Error):
            pass
        return epochs[: len(values)], values


class Published(NamedTuple):
    """A figure of the paper: top-1 in percent, where it is printed, and whether it is of other data, and so no measure of a row."""

    top1: float
    source: str
    foreign: bool = False


@dataclass(kw_only=True)
class Row:
    """Runs that differ in their seed alone. knobs: in what it differs from other rows; figure: the one that is compared"""

    commit: str | None
    knobs: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    figure: str = "test/top1"
    paper: Published | None = None

    @property
    def name(self) -> str:
        return _name(self.knobs)

    def said(self, key: str) -> str:
        """The value of a knob; nothing where it has no such knob."""
        return one_line(text(self.knobs[key])) if key in self.knobs else ""

    def values(self, figure: str) -> list[float]:
        return [value for run in self.runs if run.state == "finished" and (value := run.figure(figure)) is not None]

    def mean(self, figure: str) -> float | None:
        return statistics.fmean(values) if (values := self.values(figure)) else None

    def deviation(self, figure: str) -> float | None:
        """Standard deviation of the sample; None of less than two."""
        return statistics.stdev(values) if len(values := self.values(figure)) > 1 else None

    @property
    def count(self) -> str:
        """`3`, or `2 of 3` where a run has no figure."""
        n, of = len(self.values(self.figure)), sum(run.state != "repeated" for run in self.runs)
        return f"{n} of {of}" if n < of else str(n)


@dataclass(kw_only=True)
class Results:
    rows: list[Row]
    notes: list[str]
    places: list[Path]

    @property
    def keys(self) -> list[str]:
        """The knobs in which its rows differ."""
        return _keys(self.rows)


def collect(places: Sequence[Path]) -> Results:
    """Of directories of runs, sweeps, or whatever holds some. UserError where one holds none."""
    found: dict[Path, Run] = {}
    notes: list[str] = []
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such directory")
        before = len(notes)
        try:
            here = list(_runs(place, notes))
        except OSError as error:
            raise UserError(f"{error.filename or place}: cannot be read ({error.strerror})") from None
        if not here:
            raise UserError(notes[before] if len(notes) > before else f"{place}: no run and no sweep in it")
        for run in here:
            if run.sweep is not None or run.folder.resolve() not in found:  # a sweep knows more of it
                found[run.folder.resolve()] = run
    rows = _rows(list(found.values()), notes)
    return Results(rows=rows, notes=[one_line(note) for note in dict.fromkeys(notes)], places=list(places))


def _runs(place: Path, notes: list[str], depth: int = 3) -> Iterator[Run]:
    if runs.holds(place):
        yield _run(place)
        return
    known: set[Path] = set()
    swept = (place / "sweep.json").exists()
    if swept:
        for run in _jobs(place, notes):
            known.add(run.folder.resolve())
            yield run
    if depth:
        earlier = 0
        for folder in sorted(path for path in place.iterdir() if path.is_dir() and not re.search(r"\.before\d+$", path.name)):
            for run in () if folder.resolve() in known else _runs(folder, notes, depth - 1):
                if run.folder.resolve() not in known:
                    earlier += 1
                    yield run
        if swept and known and earlier:
            notes.append(f"{place}: {earlier} runs in it are of earlier commands than the one that {place / 'sweep.json'} is of")


def _jobs(place: Path, notes: list[str]) -> list[Run]:
    """The jobs of a sweep's last command. One that failed before it was a run is of the configuration of its sisters with other seeds."""
    file = place / "sweep.json"
    try:
        record = json.loads(file.read_text())
        jobs, commit = record["jobs"], record.get("commit")
        if not all(isinstance(job["run"], str) and isinstance(job["state"], str) and _are_texts(job["swept"]) for job in jobs):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        notes.append(f"{file}: not the record of a sweep, so a job that left no run is not in this report")
        return []
    found = [_run(place / job["run"], job=job, sweep=place, commit=commit if isinstance(commit, str) else None) for job in jobs]
    for run in found:
        sister = next((one for one in found if one.whole and _setting(one) == _setting(run)), None)
        if not run.whole and sister is not None:
            run.config = {**sister.config, **{key: value for key, value in run.swept.items() if key in sister.config}}
            run.whole = True
    return found


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _setting(run: Run) -> dict[str, str]:
    """What was swept but seeds: of one command, jobs of one setting are of one configuration."""
    return {key: text(value) for key, value in run.swept.items() if not _is_free(key, {})}


def _run(folder: Path, *, job: dict[str, Any] | None = None, sweep: Path | None = None, commit: str | None = None) -> Run:
    said = job["state"] if job else "unfinished"
    why = str(job["why"]) if job and job.get("why") else None
    state = said if said in ("failed", "stopped") else "unfinished"  # or it runs still
    run = Run(folder=folder, state=state, why=why, swept=dict(map(_pair, job["swept"])) if job else {}, sweep=sweep, commit=commit)
    if runs.holds(folder):
        try:
            run.config, run.whole = dict(flat(runs.config_of(folder))), True
            run.result = runs.result_of(folder)
            if not run.result and (folder / "result.json").exists():
                raise UserError(f"{folder / 'result.json'} is damaged (no figures in it)")
        except UserError as error:
            run.state, run.why = "damaged", str(error)
            return run
        if run.result:
            run.state, run.why = "finished", None
            run.commit = str(run.result["commit"]) if run.result.get("commit") else None
            return run
    if said in ("finished", "skipped"):
        run.state, run.why = "missing", f"its sweep says {said}, and its {'result.json' if run.whole else 'directory'} is gone"
    return run


def _pair(override: str) -> tuple[str, Any]:
    """Key and value of an override. OmegaConf's grammar is Hydra's: YAML would take 1e-3 for text and yes for true."""
    key, _, value = override.lstrip("+").partition("=")
    try:
        read: Any = OmegaConf.to_container(OmegaConf.create({"said": value, "value": "${oc.decode:${said}}"}), resolve=True)
    except OmegaConfBaseException:
        return key, value
    return key, read["value"]


def _rows(every: list[Run], notes: list[str]) -> list[Row]:
    plans: dict[str, list[Run]] = {}
    for run in every:  # of one whose configuration nobody knows, what its sweep says of it
        plans.setdefault(run.plan if run.whole else json.dumps([str(run.sweep or run.folder), _setting(run)]), []).append(run)
    shared = [_by_commit(group) for group in plans.values()]
    rows = [row for group in shared for row in group]
    tested = {_data(run) for run in every if "test/top1" in run.result}
    keys = _telling([row for row in rows if row.runs[0].whole], every)
    several = any(len(group) > 1 for group in shared)
    for row in rows:
        row.runs.sort(key=lambda run: text(run.seed).zfill(9))
        for key in keys if row.runs[0].whole else row.runs[0].swept:
            saying = next((run for run in row.runs if key in run.known), None)
            if saying is not None and not _is_free(key, saying.config):
                row.knobs[key] = saying.known[key]
        if several:
            row.knobs["commit"] = row.commit or "unknown"
        row.figure = "test/top1" if _data(row.runs[0]) in tested else "val/top1"
        row.paper = published(row.runs[0].config, row.knobs)
    ranks = {key: in_order(row.knobs[key] for row in rows if key in row.knobs) for key in _keys(rows)}
    rows.sort(key=lambda row: [rank.index(text(row.knobs[key])) if key in row.knobs else len(rank) for key, rank in ranks.items()])
    for group in shared:
        if len(group) > 1:
            commits = ", ".join(row.knobs["commit"] for row in group)
            name = _name({key: value for key, value in group[0].knobs.items() if key != "commit"})
            notes.append(f"{name}: runs of the commits {commits} are rows of their own")
    for row in rows:
        notes += _notes(row)
    for commit in dict.fromkeys(row.commit for row in rows if row.commit and row.commit.endswith("+") and len(row.runs) > 1):
        notes.append(f"{commit}: the + is for changes that are in no commit, and that its runs need not have in common")
    return rows


def _by_commit(runs: list[Run]) -> list[Row]:
    """Runs of one plan; one that does not say its commit is with the others where they are of one."""
    rows: dict[str | None, Row] = {}
    for run in runs:
        if run.commit or run.result:
            rows.setdefault(run.commit, Row(commit=run.commit)).runs.append(run)
    for run in runs:
        if not (run.commit or run.result):
            home = next(iter(rows.values())) if len(rows) == 1 else rows.setdefault(None, Row(commit=None))
            home.runs.append(run)
    return list(rows.values())


def _notes(row: Row) -> Iterator[str]:
    """What a reader of its figures must know."""
    seeds: dict[tuple[str, str], list[Run]] = {}
    for run in row.runs:
        if run.state == "finished":
            seeds.setdefault((text(run.config.get("seed")), text(run.config.get("data.seed"))), []).append(run)
    for again in seeds.values():
        *older, newest = sorted(again, key=lambda run: (run.folder / "result.json").stat().st_mtime)
        for run in older:
            run.state = "repeated"
        if older:
            alone = "the same seed again is no other measurement"
            yield f"{row.name} seed={text(newest.seed)}: of {len(again)} runs the newest counts, {newest.folder}; {alone}"
    for run in row.runs:
        if run.state not in ("finished", "repeated"):
            yield f"{row.name} seed={text(run.seed)} {run.state}{f': {run.why}' if run.why else ''} ({run.folder})"
        elif run.state == "finished" and run.figure(row.figure) is None:
            it = f"{row.figure}={text(run.result[row.figure])} is no finite number" if row.figure in run.result else f"no {row.figure}"
            yield f"{row.name} seed={text(run.seed)} finished: {it} ({run.folder})"
    finished = [run for run in row.runs if run.state == "finished"]
    for words, values in {
        "device": {text(run.result.get("device")) for run in finished},
        "devices": {text(run.result.get("devices")) for run in finished},
        **{key: {text(run.config.get(key)) for run in finished} for key in ("data.num_workers", "data.cache", "kernel")},
    }.items():
        if len(values) > 1:
            yield f"{row.name}: its images/s and time are of runs with different {words}: {', '.join(sorted(values))}"


def _keys(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.knobs))


def _name(knobs: dict[str, Any]) -> str:
    return one_line(" ".join(f"{key}={text(value)}" for key, value in knobs.items())) or "run"


def _is_free(key: str, config: dict[str, Any]) -> bool:
    return key in FREE or key.startswith(FREE_SECTIONS) or (key == "data.root" and _set(config) is not None)


def _data(run: Run) -> tuple[Any, ...]:
    """What a run's figures are of: its data, as far as that says whether there is a test part."""
    return tuple(text(run.config.get(key)) for key in ("data._target_", "data.year", "data.root") if not _is_free(key, run.config))


def _telling(rows: list[Row], every: list[Run]) -> list[str]:
    """The keys in which rows differ: what was swept, and as many others as it takes to tell them apart; data and model first."""
    known = [{key: text(value) for run in row.runs for key, value in run.known.items() if not _is_free(key, run.config)} for row in rows]
    swept = dict.fromkeys(key for run in every for key in run.swept)
    keys = [key for key in swept if any(key in one for one in known)]

    def apart(chosen: list[str]) -> int:
        return len({tuple(one.get(key) for key in chosen) for one in known})

    def unlikely(key: str) -> tuple[int, ...]:
        first = ("data", "data.root", "model", *KNOBS)
        return (first.index(key) if key in first else len(first), key.count("."), key.startswith("trainer."))

    for key in sorted(dict.fromkeys(key for one in known for key in one), key=unlikely):
        if key in ("model", "data") and not all(key in one for one in known):
            continue
        if apart([*keys, key]) > apart(keys):
            keys.append(key)
    return keys


def in_order(values: Iterable[Any]) -> list[str]:
    """Different values: numbers by size, then others as they come."""
    texts = {text(value): value for value in values}
    numbers = {key: value for key, value in texts.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return [*sorted(numbers, key=lambda key: numbers[key]), *(key for key in texts if key not in numbers)]


# ---- as a table


def words_of(figure: str) -> str:
    part, _, top = figure.partition("/")
    return f"{part} top-{top[-1]}"


COLUMNS = ("test top-1, %", "val top-1, %", "compared", "n", "parameters, M", "GMAC", "images/s", "paper, %", "from")  # after the knobs


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """(headings, cells): a line for each row; `98.66 ± 0.50`, and `2 of 3` where a run has no figure."""
    keys = results.keys
    return [*keys, *COLUMNS], [_cells(row, keys) for row in results.rows]


def _cells(row: Row, keys: list[str]) -> list[str]:
    return [
        *(row.said(key) for key in keys),
        *(with_deviation(row, name) for name in ("test/top1", "val/top1")),
        row.figure.partition("/")[0] if row.values(row.figure) else "",
        row.count,
        *(_scaled(row, *size) for size in (("parameters_as_in_the_paper", 1e6, ".4g"), ("flops", 1e9, ".4g"), ("images_per_s", 1, ",.0f"))),
        *((f"{row.paper.top1:.1f}", row.paper.source) if row.paper else ("", "")),
    ]


def with_deviation(row: Row, figure: str, unit: float = 1) -> str:
    mean, deviation = row.mean(figure), row.deviation(figure)
    return "" if mean is None else f"{mean / unit:.2f}" if deviation is None else f"{mean / unit:.2f} ± {deviation / unit:.2f}"


def _scaled(row: Row, figure: str, unit: float, form: str) -> str:
    return "" if (mean := row.mean(figure)) is None else format(mean / unit, form)


# ---- the paper's figures


class Place(NamedTuple):
    """Where a configuration would stand in the paper's tables.

    model: the file in conf/model/ that its network is of; knobs: those that are not as in that file
    data: the data set as the tables call it; side: pixels of a square image. Each is None where the tables can have nothing of the kind.
    """

    model: str | None
    knobs: dict[str, Any]
    data: str | None
    side: int | None


def place(config: dict[str, Any]) -> Place:
    name, size = _file(config, "model"), config.get("image_size")
    changed = {} if name is None else {knob: config[knob] for knob in KNOBS if knob in config and config[knob] != _default(name, knob)}
    if name == "tnt_s" and changed.keys() == {"words_per_patch", "inner_heads"}:  # Table 8 has rows whose heads had to change
        del changed["inner_heads"]
    side = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    return Place(name, changed, _set(config), side if isinstance(side, int) else None)


def published(config: dict[str, Any], knobs: dict[str, Any]) -> Published | None:
    """The paper's top-1 of a configuration, else that of TNT-S on ImageNet with the same value of the one knob that is swept."""
    name, changed, data, side = place(config)
    row = PAPER["imagenet"].get(name)
    if row is not None and data == "imagenet" and side == row["resolution"]:
        if not changed:
            return Published(row["top1"], "Table 4")
        if name == "tnt_s" and len(changed) == 1:
            return ablated(*next(iter(changed.items())))
    if side == 384 and not changed and (figure := PAPER["transfer"].get(name, {}).get(data)) is not None:
        return Published(figure, "Table 9: fine-tuned at 384")
    swept = [knob for knob in knobs if knob in KNOBS]
    if data == "imagenet" or len(swept) != 1 or (figure := ablated(swept[0], knobs[swept[0]])) is None:
        return None
    return figure._replace(foreign=True)


def ablated(knob: str, value: Any) -> Published | None:
    """TNT-S on ImageNet with another value of a knob."""
    if knob == "tnt_blocks":
        blocks = list(range(1, 13)) if value is None else value
        found = next((row["top1"] for row in PAPER["throughput_v100"].values() if row.get("tnt_blocks", []) == blocks), None)
        number = 5
    else:
        found = next((row for key, row in PAPER["ablations"].get(knob, {}).items() if key == value), None)
        found = found["top1"] if isinstance(found, dict) else found
        number = {"position_encoding": 6, "inner_heads": 7, "words_per_patch": 8, "se": 12}.get(knob, 0)
    return None if found is None else Published(found, f"Table {number}: TNT-S, ImageNet")


def is_imagenet(row: Row) -> bool:
    return _set(row.runs[0].config) == "imagenet"


def _set(config: dict[str, Any]) -> str | None:
    """The published data set, as the paper's tables call it; None of a part of one, and of images of one's own."""
    name = None if config.get("data.subset") else _file(config, "data")
    return {"imagenet_stream": "imagenet", "folder": None}.get(str(name), name)


def _file(config: dict[str, Any], group: str) -> str | None:
    """The file in conf/GROUP/ that a run's model or data set is of, by what makes it that one."""
    if "model.name" in config:  # of model=timm: timm's model_name
        config = {**config, "model.model_name": config["model.name"]}
    for name, file in files(group).items():
        if "_target_" in file[group]:
            kept = {key: value for key, value in file[group].items() if "drop" not in key and "${" not in str(value)}
            kept = {"model_name" if key == "name" else key: value for key, value in kept.items()}
            kept = {key: kept[key] for key in ("_target_", "year") if key in kept} if group == "data" else kept
            if f"{group}._target_" in config and all(config.get(f"{group}.{key}", value) == value for key, value in kept.items()):
                return name
    return None


@functools.cache
def files(group: str) -> dict[str, dict[str, Any]]:
    files: dict[str, Any] = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted((CONF / group).glob("[!_]*.yaml"))}
    return files


def _default(model: str, knob: str) -> Any:
    return files("model")[model].get(knob)
