"""`python -m tnt_lightning.report DIR...`: what runs and sweeps came to, as a table, report.html, report.csv and report.tex."""

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from tnt_lightning import runs
from tnt_lightning.cli import Parser, fail
from tnt_lightning.config import text
from tnt_lightning.errors import UserError
from tnt_lightning.results import FIGURES, Results, collect, table


def main() -> None:
    parser = Parser(prog="python -m tnt_lightning.report", description=__doc__)
    parser.add_argument("places", metavar="DIR", nargs="+", type=Path, help="a run, a sweep, or a directory that holds some")
    parser.add_argument("--out", type=Path, help="where the report is written; by default DIR, and of several the current directory")
    arguments = parser.parse_args()
    out = arguments.out or (arguments.places[0] if len(arguments.places) == 1 else Path())
    try:
        results = collect(arguments.places)
        show(results)
        for file in write(results, out):
            print(f"written {file}")
    except UserError as error:
        fail(str(error))


def show(results: Results) -> None:
    """The table in the terminal, and what is missing in it."""
    head, cells = table(results)
    shown = [place for place, name in enumerate(head) if name not in ("images/s", "from")]  # a terminal is narrow
    seen = Table(*(Column(escape(head[place]), min_width=max(len(row[place]) for row in cells)) for place in shown))
    for row in cells:
        seen.add_row(*(escape(row[place]) for place in shown))
    Console().print(seen)
    for note in results.notes:
        print(f"note   {note}")


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
    keys = list(dict.fromkeys(key for row in results.rows for key in row.knobs))
    head = [*keys, "runs", "n", "seeds", "commit", "parameters", "parameters_as_in_the_paper", "flops"]
    head += [name for figure in FIGURES for name in (figure, f"{figure}_sd")] + ["paper", "paper_table"]
    lines = []
    for row in results.rows:
        seeds = " ".join(text(run.seed) for run in row.runs if run.state == "finished")
        sizes = [row.mean(key) for key in ("parameters", "parameters_as_in_the_paper", "flops")]
        figures = [value for figure in FIGURES for value in (row.mean(figure), row.deviation(figure))]
        known = [*(text(row.knobs.get(key)) for key in keys), len(row.runs), len(row.values(results.figure)), seeds, row.commit]
        lines.append([*known, *sizes, *figures, *(row.paper or ("", ""))])
    return _csv(head, lines)


def _runs(results: Results) -> str:
    head = ["configuration", "seed", "state", "commit", *FIGURES, "device", "run", "why"]
    return _csv(
        head,
        [
            [row.name, text(run.seed), run.state, run.result.get("commit"), *(run.result.get(figure) for figure in FIGURES),
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
    keys = len(head) - 8
    lines = [f"  {' & '.join(map(_tex, row))} \\\\" for row in (head, *cells)]
    notes = "".join(f"% {note}\n" for note in results.notes)
    return (
        f"% needs \\usepackage{{booktabs}}; mean and standard deviation over n seeds\n{notes}"
        f"\\begin{{tabular}}{{{'l' * keys}{'r' * 7}l}}\n  \\toprule\n{lines[0]}\n  \\midrule\n" + "\n".join(lines[1:]) + "\n"
        "  \\bottomrule\n\\end{tabular}\n"
    )


def _tex(cell: str) -> str:
    return "".join(_MARKS.get(char, char) for char in cell)


_MARKS = {char: f"\\{char}" for char in "&%$#_{}"}
_MARKS |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}


if __name__ == "__main__":
    main()
