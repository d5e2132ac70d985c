"""`python -m tnt_lightning.report DIR...`: what runs and sweeps came to, as a table, report.html, report.csv and report.tex."""

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from tnt_lightning import runs
from tnt_lightning.cli import Parser, answered
from tnt_lightning.config import text
from tnt_lightning.errors import UserError
from tnt_lightning.results import COLUMNS, FIGURES, Results, collect, table


def main() -> None:
    parser = Parser(prog="python -m tnt_lightning.report", description=__doc__)
    parser.add_argument("places", metavar="DIR", nargs="+", type=Path, help="a run, a sweep, or a directory that holds some")
    parser.add_argument("--out", type=Path, help="where the report is written; by default DIR, and of several the current directory")
    arguments = parser.parse_args()
    out = arguments.out or (arguments.places[0] if len(arguments.places) == 1 else Path())
    with answered():
        results = collect(arguments.places)
        show(results)
        for file in write(results, out):
            print(f"written {file}")


def show(results: Results) -> None:
    """The table in the terminal, and what is missing in it. Of a narrow terminal's table some columns are in report.csv only."""
    head, cells = table(results)
    paper = head.index("paper, %")
    for row, line in zip(results.rows, cells, strict=True):
        if row.paper is not None and row.paper.foreign:
            line[paper] += " (ImageNet)"
    console, paper_roll = Console(), Console(width=10_000)  # into a file or a pipe all of it goes
    without, fold = ["images/s", "from"], 32 if console.is_terminal else None
    seen = _table(head, cells, without, fold)
    for spare in ("GMAC", "parameters, M", "compared"):
        if console.is_terminal and paper_roll.measure(seen).maximum > console.width:
            without.append(spare)
            seen = _table(head, cells, without, fold)
    (console if console.is_terminal else paper_roll).print(seen)
    for note in results.notes:
        print(f"note   {note}")


def _table(head: list[str], cells: list[list[str]], without: list[str], fold: int | None) -> Table:
    """Knobs in lines of so many characters, and figures in one."""
    places = [place for place, name in enumerate(head) if name not in without]
    knobs = [Column(escape(name), overflow="fold", max_width=fold) for name in head[: -len(COLUMNS)]]
    figures = [Column(escape(head[at]), min_width=max(len(line[at]) for line in cells)) for at in places if at >= len(knobs)]
    shown = Table(*knobs, *figures)
    for line in cells:
        shown.add_row(*(escape(line[place]) for place in places))
    return shown


def write(results: Results, out: Path) -> list[Path]:
    """report.html, report.csv (a line for each configuration), runs.csv (for each run) and report.tex; gives the files."""
    title = ", ".join(place.resolve().name for place in results.places)
    texts = {"report.csv": _rows(results), "runs.csv": _runs(results), "report.tex": _latex(results)}
    try:
        from tnt_lightning.charts import page

        texts["report.html"] = page(results, title=title)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "plotly":
            raise
        print("note   no report.html, which plotly draws: pip install 'tnt-lightning[report]'")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            runs.write(out / name, content)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror}); choose another --out") from None
    return [out / name for name in texts]


def _rows(results: Results) -> str:
    keys = [key for key in results.keys if key != "commit"]
    head = [*keys, "runs", "n", "compared", "seeds", "commit", "parameters", "parameters_as_in_the_paper", "flops"]
    head += [name for figure in FIGURES for name in (figure, f"{figure}_sd")] + ["paper", "paper_table"]
    lines = []
    for row in results.rows:
        seeds = " ".join(text(run.seed) for run in row.runs if run.state == "finished")
        sizes = [row.mean(key) for key in ("parameters", "parameters_as_in_the_paper", "flops")]
        figures = [value for figure in FIGURES for value in (row.mean(figure), row.deviation(figure))]
        known = [*(row.said(key) for key in keys), len(row.runs), len(row.values(row.figure)), row.figure, seeds, row.commit]
        lines.append([*known, *sizes, *figures, *((row.paper.top1, row.paper.source) if row.paper else ("", ""))])
    return _csv(head, lines)


def _runs(results: Results) -> str:
    head = ["configuration", "seed", "state", "commit", *FIGURES, "device", "run", "why"]
    return _csv(
        head,
        [
            [row.name, text(run.seed), run.state, run.commit, *(run.result.get(figure) for figure in FIGURES),
             run.result.get("device"), run.folder, run.why]
            for row in results.rows for run in row.runs
        ],
    )  # fmt: skip


def _csv(head: list[str], lines: list[list[Any]]) -> str:
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerows([head, *lines])
    return content.getvalue()


def _latex(results: Results) -> str:
    """A table for booktabs. Numbers stand to the right."""
    head, cells = table(results)
    knobs = len(head) - len(COLUMNS)
    lines = [f"  {' & '.join(map(_tex, line))} \\\\" for line in (head, *cells)]
    notes = "".join(f"% {note}\n" for note in results.notes)
    return (
        f"% needs \\usepackage{{booktabs}}; mean and standard deviation over n seeds\n{notes}"
        f"\\begin{{tabular}}{{{'l' * knobs}rrlrrrrrl}}\n  \\toprule\n{lines[0]}\n  \\midrule\n" + "\n".join(lines[1:]) + "\n"
        "  \\bottomrule\n\\end{tabular}\n"
    )


def _tex(cell: str) -> str:
    return "".join(_MARKS.get(char, char) for char in cell)


_MARKS = {char: f"\\{char}" for char in "&%$#_{}"}
_MARKS |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
_MARKS |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
_MARKS |= {char: f"{{{char}}}" for char in "[]*"}  # which belong to the \\ of the line before where a line begins with one


if __name__ == "__main__":
    main()
