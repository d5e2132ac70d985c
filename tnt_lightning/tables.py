"""`python -m tnt_lightning.tables [1 4 5 8 9 12]`: tables of the paper, beside what this code counts and what runs measured.

Where these differ from the paper by more than its rounding, a line below the table says why, or that nobody knows.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from tnt_lightning import CONF
from tnt_lightning.cli import Parser, answered, fail
from tnt_lightning.config import text
from tnt_lightning.errors import one_line
from tnt_lightning.results import PAPER, Place, Results, Row, collect, files, place, with_deviation

TITLES = {
    1: "the variants of TNT",
    4: "ImageNet",
    5: "TNT-S with words in fewer blocks, ImageNet; images/s on a V100 are the paper's, not measured here",
    8: "words per patch of TNT-S, ImageNet; 16 is TNT-S itself, with its own inner heads",
    9: "transfer at 384 x 384; M with a head for the classes of each set, GMAC with that of ImageNet",
    12: "squeeze-and-excitation in TNT-S, ImageNet",
}
LEGEND = (
    "M: million parameters as the paper counts them, TNT's with a frozen tensor of the official code that nothing reads; live: without it",
    "GMAC: 1e9 multiply-accumulates for an image, the paper's FLOPs; top-1: percent, of runs mean ± deviation over n seeds",
    "here: counted now, or measured by runs; *: not the paper's by more than its rounding, or of another recipe, as said below the table",
)
DIMENSIONS = {"depth": "depth", "inner_dim": "c", "inner_heads": "inner heads", "outer_dim": "d", "outer_heads": "outer heads"}
SIZES = {"params_m": "M", "flops_g": "GMAC"}
SAID = {"params_m": "{} M", "flops_g": "{} GMAC", "top1": "top-1 {}"}
WIDE = 10_000  # columns
HALF = 0.05  # of the last digit that the paper prints of parameters, FLOPs and top-1
RECIPE = {"trainer.max_epochs": "epochs", "data.batch_size": "batch_size", "optimizer.lr": "lr"}  # a run's key -> paper.yaml's


@dataclass(kw_only=True)
class Line:
    """A row of a table of the paper.

    where: the model, data and pixels that it is of; section, key: where it stands in paper.yaml
    paper: figure -> what is printed; here: figure -> what is counted; measured: the configurations of runs that are of it
    """

    name: str
    where: Place
    section: str
    key: Any
    paper: dict[str, Any]
    here: dict[str, Any] = field(default_factory=dict)
    measured: list[Row] = field(default_factory=list)

    def differs(self, figure: str, here: float | None) -> bool:
        """By more than rounding; what one of them does not have is no difference."""
        paper = self.paper.get(figure)
        if paper is None or here is None:
            return False
        return bool(here != paper) if figure in DIMENSIONS else abs(here - paper) > HALF + 1e-9

    def why(self, figure: str) -> str:
        reason = PAPER["remarks"].get(self.section, {}).get(self.key, {}).get(figure, "cause unknown")
        return str(reason)


def main() -> None:
    parser = Parser(prog="python -m tnt_lightning.tables", description=__doc__)
    available = ", ".join(map(str, TITLES))
    parser.add_argument("numbers", metavar="N", nargs="*", help=f"tables of the paper, of {available}; by default all of these")
    parser.add_argument("--runs", metavar="DIR", nargs="+", type=Path, help="runs, sweeps, or directories that hold some, as of report")
    given = parser.parse_args()
    for number in given.numbers:
        if number not in map(str, TITLES):
            fail(f"{number}: no such table here; available: {available}")
    with answered():
        show([int(number) for number in dict.fromkeys(given.numbers)] or list(TITLES), collect(given.runs) if given.runs else None)


# ---- the rows


def lines(number: int) -> list[Line]:
    """The rows of a table as the paper has them; nothing is counted yet."""
    if number == 1:
        return [_line("variants", name, name) for name in PAPER["variants"]]
    if number == 4:
        return [_line("imagenet", name, name, side=row["resolution"]) for name, row in PAPER["imagenet"].items()]
    if number == 5:
        rows = PAPER["throughput_v100"].items()
        return [
            _line("throughput_v100", name, "tnt_s", tnt_blocks=row["tnt_blocks"])
            if "tnt_blocks" in row
            else _line("throughput_v100", name, name)
            for name, row in rows
        ]
    if number == 9:
        sets = ("imagenet", "cifar10", "cifar100", "flowers", "pets", "inat2019")
        found = [_line("transfer", name, name, side=384, data=data) for name in PAPER["transfer"] for data in sets]
        for line in found:
            line.paper = {"params_m": line.paper["params_m"], "top1": line.paper[str(line.where.data)]}
        return found
    knob = {8: "words_per_patch", 12: "se"}[number]
    return [_line("ablations", value, "tnt_s", of=knob, **{knob: value}) for value in PAPER["ablations"][knob]]


def _line(section: str, key: Any, model: str, *, of: str | None = None, side: int = 224, data: str = "imagenet", **knobs: Any) -> Line:
    """of: the table in a section that has several, whose rows are named by values"""
    usual = files("model")[model]
    if knobs.get("tnt_blocks") == list(range(1, usual["model"].get("depth", 0) + 1)):
        knobs["tnt_blocks"] = None
    where = Place(model, {knob: value for knob, value in knobs.items() if value != usual[knob]}, data, side)
    rows = PAPER[section] if of is None else PAPER[section][of]
    return Line(
        name=str(key) if of is None else f"{of}={text(key)}",
        where=where,
        section=section if of is None else of,
        key=key,
        paper=dict(rows[key]),
    )


def count(line: Line) -> None:
    """Parameters (M, as the paper counts and live), FLOPs (1e9), and the dimensions of a TNT; no weights are made."""
    line.here = _counted(line.where.model, line.where.side, line.where.data, json.dumps(line.where.knobs))


@functools.cache
def _counted(model: str, side: int, data: str, knobs: str) -> dict[str, Any]:
    import torch

    from tnt_lightning.models import TNT
    from tnt_lightning.models.cost import flops, parameters

    with torch.device("meta"):
        network = _network(model, side, knobs)
        network.reset_classifier(PAPER["datasets"][data]["classes"])
    live, paper = parameters(network)
    found: dict[str, Any] = {"params_m": paper / 1e6, "live_m": live / 1e6}
    if data == "imagenet":  # another head changes the fourth digit, and counting takes most of the time
        found["flops_g"] = flops(network, (3, side, side)) / 1e9
    if isinstance(network, TNT):
        words: Any = next(block for block in network.blocks if hasattr(block, "inner"))
        found |= {
            "depth": len(network.blocks),
            "inner_dim": network.word_embed.proj.out_channels,
            "inner_heads": words.inner.attn.num_heads,
            "outer_dim": network.embed_dim,
            "outer_heads": words.outer.attn.num_heads,
        }
    return found


@functools.lru_cache(maxsize=1)  # the sets of Table 9 differ in the head alone
def _network(model: str, side: int, knobs: str) -> Any:
    from tnt_lightning.models import create_model

    given = json.loads(knobs)
    if "words_per_patch" in given:  # 4 heads do not divide the 6 channels of m = 64; heads change no size
        given["inner_heads"] = OmegaConf.load(CONF / "ablation" / "words_per_patch.yaml").inner_heads
    size = {name: side for name, value in files("model")[model]["model"].items() if value == "${image_size}"}
    return create_model(model, **size, **given)


# ---- runs


def of_runs(table: Sequence[Line], results: Results) -> list[Row]:
    """Give each row of a table the configurations that are of its model, data and pixels; gives those that are of some row."""
    placed = [(row, place(row.runs[0].config)) for row in results.rows if row.runs[0].whole]
    for line in table:
        line.measured = [row for row, where in placed if where == line.where and "top1" in line.paper]
    return [row for line in table for row in line.measured]


def _recipe(line: Line, row: Row) -> list[str]:
    """In what runs are trained otherwise than the paper says: where they start and, of a TNT, some of Table 3."""
    config, wanted = row.runs[0].config, {}
    if line.section != "transfer":
        wanted = {key: PAPER["recipe"][name] for key, name in RECIPE.items()}
    elif line.where.data != "imagenet":
        which = "epochs_cifar" if str(line.where.data).startswith("cifar") else "epochs_fine_grained"
        wanted = {"trainer.max_epochs": PAPER["recipe"]["transfer"][which]}
    if not str(line.where.model).startswith("tnt"):
        wanted = {}
    other = [f"{key}={text(config.get(key))} ({text(value)} in the paper)" for key, value in wanted.items() if config.get(key) != value]
    if (config.get("weights") is not None) != (line.section == "transfer"):
        other.append(f"weights={text(config.get('weights'))} ({'fine-tuned' if line.section == 'transfer' else 'none'} in the paper)")
    return other


def _why_measured(line: Line, row: Row) -> str:
    if other := _recipe(line, row):
        return f"another recipe, {', '.join(other)}"
    if not str(line.where.model).startswith("tnt"):
        return "the paper quotes the model's own publication, whose recipe may be another"
    return line.why("top1")


def _is_other(line: Line, row: Row) -> bool:
    mean = row.mean(row.figure)
    return mean is not None and (line.differs("top1", mean) or bool(_recipe(line, row)))


# ---- in the terminal


def show(numbers: Sequence[int], results: Results | None) -> None:
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=WIDE)  # into a file or a pipe all of it goes
    for sentence in LEGEND:
        console.print(Text(sentence))
    named: list[int] = []
    for number in numbers:
        table = lines(number)
        for line in track(table, f"Table {number}", console=errors, transient=True, disable=not errors.is_terminal):
            count(line)
        named += [id(row) for row in of_runs(table, results)] if results else []
        console.print(Text(f"\nTable {number}: {TITLES[number]}", style="bold"))
        _print(console, [cells for line in table for cells in _rows(number, line)], {line.name for line in table})
        for remark in remarks(table):
            console.print(Text(remark))
    for note in notes(results, named):
        console.print(Text(f"note   {note}"))


def notes(results: Results | None, named: Sequence[int]) -> Iterator[str]:
    """What is missing in the tables, and what is in none of them."""
    if results is None:
        yield "no runs are given, so no top-1 is measured here: --runs DIR"
        return
    if not named:
        yield "none of the runs is of a row of these tables, so no top-1 is measured here"
    others: dict[str, list[Path]] = {}
    for row in results.rows:
        if id(row) not in named:
            where = place(row.runs[0].config)
            model = " ".join([where.model or "another model", *(f"{knob}={text(value)}" for knob, value in where.knobs.items())])
            data = f"{where.data or 'other data'}{'' if where.side is None else f' at {where.side}'}"
            others.setdefault(f"{model} on {data}", []).extend(run.folder for run in row.runs)
    for what, folders in others.items():
        some = "" if len(folders) == 1 else f"{len(folders)} runs, such as "
        yield one_line(f"of no row here: {what} ({some}{folders[0]})")
    yield from results.notes


def _print(console: Console, rows: Sequence[dict[str, str]], names: set[str]) -> None:
    """Closer together, and then without some columns, where a terminal is too narrow."""
    for padding, without in (1, ()), (0, ()), (0, ("M live",)), (0, ("M live", "px")):
        shown = _table(rows, names, padding, without, fold=console.is_terminal)
        if Console(width=WIDE).measure(shown).maximum <= console.width:
            break
    console.print(shown)
    if left := [head for head in without if any(cells[head] for cells in rows)]:
        console.print(Text(f"not in a terminal this narrow: {', '.join(left)}"))


def _table(rows: Sequence[dict[str, str]], names: set[str], padding: int, without: Sequence[str], *, fold: bool) -> Table:
    always = ("top-1 here", "n") if any(cells["top-1 paper"] for cells in rows) else ()
    heads = [head for head in rows[0] if head not in without and (head in always or any(cells[head] for cells in rows))]
    longest = max(map(len, names))
    columns = [
        Column(min_width=longest, max_width=max(longest, 24) if fold else None, overflow="fold"),
        *(Column(Text(head.replace(" ", "\n")), justify="left" if head == "data" else "right", no_wrap=True) for head in heads[1:]),
    ]
    shown = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, padding, 0, 0))
    for cells in rows:
        shown.add_row(*(Text(cells[head]) for head in heads))
    return shown


def _rows(number: int, line: Line) -> list[dict[str, str]]:
    """heading -> cell; configurations beyond the first have a row each, and then so has the first."""
    cells = {"": line.name, "data": str(line.where.data) if number == 9 else "", "px": str(line.where.side) if number == 4 else ""}
    for figure, head in DIMENSIONS.items():
        cells[head] = "" if figure not in line.paper else _dimension(line, figure)
    for figure, head in SIZES.items():
        cells[f"{head} paper"] = f"{line.paper[figure]:.1f}" if figure in line.paper else ""
        cells[f"{head} here"] = f"{_mark(line, figure, line.here[figure])}{line.here[figure]:.3f}" if figure in line.here else ""
        if figure == "params_m":
            cells["M live"] = f"{line.here['live_m']:.3f}"
    cells["images/s paper"] = str(line.paper.get("images_per_s", ""))
    cells["top-1 paper"] = "" if line.paper.get("top1") is None else f"{line.paper['top1']:.1f}"
    runs = [{"top-1 here": "*" * _is_other(line, row) + with_deviation(row, row.figure), "n": row.count} for row in line.measured]
    blank = dict.fromkeys([*cells, "top-1 here", "n"], "")
    if len(runs) < 2:
        return [{**blank, **cells, **run} for run in runs or [{}]]
    told = [{key: row.said(key) for key in row.knobs} for row in line.measured]
    apart = [key for key in dict.fromkeys(key for one in told for key in one) if len({one.get(key) for one in told}) > 1]
    names = [" ".join(f"{key}={one[key]}" for key in apart if key in one) for one in told]
    return [{**blank, **cells}, *({**blank, "": f"  {name}", **run} for name, run in zip(names, runs, strict=True))]


def _mark(line: Line, figure: str, here: float | None) -> str:
    return "*" if line.differs(figure, here) else ""


def _dimension(line: Line, figure: str) -> str:
    paper, here = line.paper[figure], line.here[figure]
    return f"{paper}, here *{here}" if line.differs(figure, here) else str(paper)


def remarks(table: Sequence[Line]) -> list[str]:
    """A sentence for each difference, and one for those of a model that have one reason."""
    found: dict[tuple[str, str, str], list[str]] = {}

    def add(line: Line, figure: str, here: str, why: str) -> None:
        said = SAID.get(figure, f"{DIMENSIONS.get(figure)} {{}}").format(line.paper[figure])
        found.setdefault((line.name, said, why), []).append(f"{here} on {line.where.data}" if line.section == "transfer" else here)

    for line in table:
        for figure in (*DIMENSIONS, *SIZES):
            if line.differs(figure, here := line.here.get(figure)):
                add(line, figure, str(here) if figure in DIMENSIONS else f"{here:.3f}", line.why(figure))
        for row in line.measured:
            if _is_other(line, row):
                add(line, "top1", f"{with_deviation(row, row.figure)} (n={row.count})", _why_measured(line, row))
    return [f"* {name}: {said} in the paper, {', '.join(heres)} here: {why}" for (name, said, why), heres in found.items()]


if __name__ == "__main__":
    main()
