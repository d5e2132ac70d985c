"""report.html: one file that needs nothing else, drawn by plotly. Whatever a chart shows its own table says too, and what its lines are
called and whether they are drawn is up to checkboxes of the page, which a keyboard reaches and plotly's own legend does not.
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tnt_lightning.config import text
from tnt_lightning.errors import one_line
from tnt_lightning.results import PAPER, Results, Row, Run, ablated, in_order, is_imagenet, table, with_deviation, words_of

COLOURS = ("#2f6fde", "#d9542b", "#1f9d6b", "#a04fc7", "#b8860b", "#0f98b0", "#c2417c", "#6b7280")
SYMBOLS = {"circle": "●", "square": "■", "triangle-up": "▲", "x": "✖"}  # the next one where colours begin again
PAPERS = "#8a8f98"
MOST = 12  # lines against a knob that an eye tells apart


@dataclass(kw_only=True)
class Line:
    """What a checkbox shows and hides; a trace's `meta` is the number of its line."""

    name: str
    colour: str
    symbol: str
    shown: bool = True


@dataclass(kw_only=True)
class Chart:
    """A drawing and its table. Without a figure there is only a word on why, and the table."""

    name: str
    about: str
    head: list[str]
    cells: list[list[str]]
    figure: go.Figure | None = None
    lines: list[Line] = field(default_factory=list)

    def line(self, name: str) -> int:
        """Another line, by the next colour and symbol; gives its number."""
        number = len(self.lines)
        symbol = list(SYMBOLS)[number // len(COLOURS) % len(SYMBOLS)]
        self.lines.append(Line(name=name, colour=COLOURS[number % len(COLOURS)], symbol=symbol))
        return number


def page(results: Results, *, title: str) -> str:
    """The whole of report.html. What a name in a configuration brings along is text in it, never markup."""
    rows = [row for row in results.rows if row.mean(row.figure) is not None]
    drawn = [
        *(_against(rows, knob) for knob in results.keys if len({row.said(knob) for row in rows}) > 1),
        _accuracy(rows, "flops", "GMAC", 1e9),
        _accuracy(rows, "parameters_as_in_the_paper", "parameters, M", 1e6),
        _curves(results.rows, "val/top1", "validation top-1, %"),
        _curves(results.rows, "train/loss", "training loss"),
        _time(results.rows),
    ]
    charts = [chart for chart in drawn if chart.cells]
    figures = [None if chart.figure is None else json.loads(chart.figure.to_json()) for chart in charts]
    sections = "\n".join(_section(number, chart) for number, chart in enumerate(charts))
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><a class="skip" href="#figures">to the figures</a>
<header><h1>{escape(title)}</h1><p>{escape(_counts(results))}</p></header>
<main>
<section><h2 id="figures">Figures</h2>
{_html(*table(results), label="figures")}
{f"<details open><summary>{_number(len(results.notes), 'note')}</summary><ul>{notes}</ul></details>" if notes else ""}</section>
<noscript><p>The charts need JavaScript; the tables below them do not.</p></noscript>
{sections}
<section><h2 id="runs">Runs</h2>
<details><summary>every run</summary>{_runs(results)}</details></section>
</main>
<script>{get_plotlyjs()}</script>
<script>const figures = {_script(figures)};
{SCRIPT}</script>
</body></html>
"""


def _section(number: int, chart: Chart) -> str:
    """A chart, its checkboxes, and its table."""
    drawing = f'<div class="chart" id="chart{number}" role="img" aria-labelledby="c{number}" aria-describedby="t{number}"></div>'
    return (
        f'<section><h2 id="c{number}">{escape(chart.name)}</h2><p>{escape(chart.about)}</p>'
        f"{drawing + _boxes(number, chart) if chart.figure is not None else ''}"
        f'<details id="t{number}"><summary>this chart as a table</summary>'
        f"{_html(chart.head, chart.cells, label=f'{chart.name}, as a table')}</details></section>"
    )


def _boxes(number: int, chart: Chart) -> str:
    if len(chart.lines) < 2:
        return ""
    marks = {**SYMBOLS, "diamond": "◆"}
    boxes = [
        f'<label><input type="checkbox" data-chart="{number}" data-line="{place}"{" checked" if line.shown else ""}>'
        f'<span aria-hidden="true" style="color:{line.colour}">{marks[line.symbol]}</span> {escape(line.name)}</label>'
        for place, line in enumerate(chart.lines)
    ]
    papers = [box for box, line in zip(boxes, chart.lines, strict=True) if line.symbol == "diamond"]
    ours = [box for box in boxes if box not in papers]
    inside = "".join(ours)
    if len(ours) > 4:
        inside += "".join(f'<button type="button" data-all="{which}">{which}</button>' for which in ("all", "none"))
    inside = f"<div>{inside}</div>"
    if len(ours) > MOST:
        inside = f"<details><summary>what the {len(ours)} colours are</summary>{inside}</details>"
    return f'<fieldset aria-label="shown in {escape(chart.name)}">{"".join(papers)}{inside}</fieldset>'


def _script(value: Any) -> str:
    return json.dumps(value).replace("<", "\\u003c")


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def _counts(results: Results) -> str:
    states = [run.state for row in results.rows for run in row.runs]
    here = f"{_number(len(states), 'run')} of {_number(len(results.rows), 'configuration')}"
    return f"{here}: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


# ---- charts


def _against(rows: Sequence[Row], knob: str) -> Chart:
    """The compared figure against a knob, a line for each setting of the others."""
    others: dict[str, list[Row]] = {}
    for row in rows:
        others.setdefault(" ".join(f"{key}={row.said(key)}" for key in row.knobs if key != knob), []).append(row)
    values = [one_line(value) for value in in_order(row.knobs[knob] for row in rows if knob in row.knobs)]
    values += [""] if any(knob not in row.knobs for row in rows) else []
    papers = {row.said(knob): paper for row in rows if knob in row.knobs and (paper := ablated(knob, row.knobs[knob]))}
    what = _compared(rows)
    chart = Chart(
        name=f"{what} against {knob}",
        about="Mean over seeds; the bar is a standard deviation to each side, the small dots are the seeds.",
        head=[knob, "with", f"{what}, %", "n", *(["paper, %", "from"] if papers else [])],
        cells=[
            [row.said(knob), name, with_deviation(row, row.figure), row.count,
             *(((f"{paper.top1:.1f}", paper.source) if (paper := papers.get(row.said(knob))) else ("", "")) if papers else ())]
            for name, group in others.items() for row in sorted(group, key=lambda row: values.index(row.said(knob)))
        ],
    )  # fmt: skip
    if len(others) > MOST:
        chart.about = f"The other knobs have {len(others)} settings, too many lines to tell apart: the figures are in the table."
        return chart
    numbers = all(isinstance(row.knobs.get(knob), int | float) and not isinstance(row.knobs[knob], bool) for row in rows)
    chart.figure = go.Figure()
    for name, group in others.items():
        number = chart.line(name or "mean")
        colour, symbol = chart.lines[number].colour, chart.lines[number].symbol
        group = sorted(group, key=lambda row: values.index(row.said(knob)))
        aside = (number - (len(others) - 1) / 2) * min(0.06, 0.5 / len(others))  # bars beside one another
        seeds = [(values.index(row.said(knob)) + aside, value) for row in group for value in row.values(row.figure)]
        chart.figure.add_scatter(  # between names there is no way
            meta=number, mode="lines+markers" if numbers else "markers", line_color=colour, marker=dict(size=9, symbol=symbol),
            x=[values.index(row.said(knob)) + aside for row in group], y=[row.mean(row.figure) for row in group],
            error_y=dict(array=[row.deviation(row.figure) for row in group]),
            customdata=[[_marks(f"{knob}={row.said(knob)} {name}"), row.count, words_of(row.figure)] for row in group],
            hovertemplate="%{customdata[0]}<br>%{customdata[2]} %{y:.2f} %, n=%{customdata[1]}<extra></extra>",
        )  # fmt: skip
        chart.figure.add_scatter(
            meta=number, x=[at for at, _ in seeds], y=[value for _, value in seeds], mode="markers",
            marker=dict(size=5, opacity=0.5, color=colour), hovertemplate="one seed: %{y:.2f} %<extra></extra>",
        )  # fmt: skip
    if papers:
        _add_paper(chart, rows, {f"{knob}={at}": (values.index(at), paper.top1) for at, paper in papers.items()})
    _axes(chart.figure, knob, f"{what}, %")
    ticks = [_marks(value or "without", width=max(8, 40 // len(values))) for value in values]
    chart.figure.update_xaxes(tickvals=list(range(len(values))), ticktext=ticks, range=[-0.5, len(values) - 0.5])
    return chart


def _compared(rows: Sequence[Row]) -> str:
    figures = {row.figure for row in rows}
    return words_of(figures.pop()) if len(figures) == 1 else "top-1"


def _accuracy(rows: Sequence[Row], size: str, words: str, unit: float) -> Chart:
    rows = [row for row in rows if row.mean(size) is not None]
    what = _compared(rows)
    chart = Chart(
        name=f"{what} against {words}", about="A dot for each configuration.", head=["configuration", words, f"{what}, %", "n"], cells=[],
        figure=go.Figure(),
    )  # fmt: skip
    assert chart.figure is not None
    for row in rows:
        number, x = chart.line(row.name), (row.mean(size) or 0) / unit
        chart.cells.append([row.name, f"{x:.4g}", with_deviation(row, row.figure), row.count])
        chart.figure.add_scatter(
            meta=number, x=[x], y=[row.mean(row.figure)], mode="markers", error_y=dict(array=[row.deviation(row.figure)]),
            marker=dict(size=10, color=chart.lines[number].colour, symbol=chart.lines[number].symbol),
            customdata=[[_marks(row.name), words_of(row.figure)]],
            hovertemplate=f"%{{customdata[0]}}<br>%{{x:.4g}} {words}, %{{customdata[1]}} %{{y:.2f}} %<extra></extra>",
        )  # fmt: skip
    key = "flops_g" if size == "flops" else "params_m"
    models = {name: (row[key], row["top1"]) for name, row in PAPER["imagenet"].items() if row[key] is not None}
    if rows:
        chart.cells += [[f"paper: {name}, ImageNet", f"{x:.4g}", f"{y:.1f}", ""] for name, (x, y) in models.items()]
        _add_paper(chart, rows, models)
    _axes(chart.figure, words, f"{what}, %")
    chart.figure.update_xaxes(rangemode="normal" if len({line[1] for line in chart.cells[: len(rows)]}) > 1 else "tozero")
    return chart


def _add_paper(chart: Chart, rows: Sequence[Row], points: dict[str, tuple[float, float]]) -> None:
    """name -> (x, y)"""
    assert chart.figure is not None
    there = any(map(is_imagenet, rows))
    chart.about += f" The paper's points are grey diamonds{'' if there else ', of ImageNet, and so no measure of these'}."
    chart.figure.add_scatter(
        meta=len(chart.lines), x=[x for x, _ in points.values()], y=[y for _, y in points.values()], text=list(map(_marks, points)),
        mode="markers", marker=dict(symbol="diamond", size=9, color=PAPERS), visible=there,
        hovertemplate="paper, %{text}: %{y:.1f} %<extra></extra>",
    )  # fmt: skip
    chart.lines.append(Line(name="the paper's points, of ImageNet", colour=PAPERS, symbol="diamond", shown=there))


def _curves(rows: Sequence[Row], column: str, words: str) -> Chart:
    chart = Chart(
        name=f"Learning curves: {words.split(',')[0]}", about="A line for each run; dotted where it does not count.", head=["epoch"],
        cells=[], figure=go.Figure(),
    )  # fmt: skip
    assert chart.figure is not None
    curves: list[dict[int, float]] = []
    for row in rows:
        curved = [(run, run.curve(column)) for run in row.runs]
        if not any(epochs for _, (epochs, _) in curved):
            continue
        number = chart.line(row.name)
        for run, (epochs, values) in curved:
            if epochs:
                curves.append(dict(zip(epochs, values, strict=True)))  # of several in an epoch the last one
                chart.head.append(_called(row, run))
                dash = "solid" if run.state == "finished" else "dot"
                chart.figure.add_scatter(
                    meta=number, x=list(curves[-1]), y=list(curves[-1].values()), mode="lines",
                    line=dict(color=chart.lines[number].colour, width=1.5, dash=dash), text=[_marks(_called(row, run))] * len(curves[-1]),
                    hovertemplate="%{text}<br>%{y:.4g} after epoch %{x}<extra></extra>",
                )  # fmt: skip
    for epoch in sorted({epoch for curve in curves for epoch in curve}):
        chart.cells.append([str(epoch), *(f"{curve[epoch]:.4g}" if epoch in curve else "" for curve in curves)])
    _axes(chart.figure, "epoch", words)
    chart.figure.update_xaxes(dtick=1 if len(chart.cells) <= 10 else None)  # there is no half an epoch
    return chart


def _called(row: Row, run: Run) -> str:
    return f"{row.name} seed={text(run.seed)}{'' if run.state == 'finished' else f' ({run.state})'}"


def _time(rows: Sequence[Row]) -> Chart:
    rows = [row for row in rows if row.mean("wall_s") is not None]
    devices = sorted({text(run.result.get("device")) for row in rows for run in row.runs if run.state == "finished"})
    chart = Chart(
        name="Time of a run",
        about=f"Start-up left out; on {', '.join(devices)}. Runs beside one another slow each other down.",
        head=["configuration", "minutes", "n", "images/s"],
        cells=[
            [row.name, with_deviation(row, "wall_s", 60), str(len(row.values("wall_s"))), f"{row.mean('images_per_s') or 0:,.0f}"]
            for row in rows
        ],
        figure=go.Figure(),
    )
    assert chart.figure is not None
    names = [_marks(row.name, width=24) for row in rows]
    deviation = [None if (seconds := row.deviation("wall_s")) is None else seconds / 60 for row in rows]
    chart.figure.add_bar(
        y=list(range(len(rows))), x=[(row.mean("wall_s") or 0) / 60 for row in rows], orientation="h", marker_color=COLOURS[0],
        width=0.6, error_x=dict(array=deviation), customdata=names, hovertemplate="%{customdata}<br>%{x:.2f} minutes<extra></extra>",
    )  # fmt: skip
    _axes(chart.figure, "minutes", "")
    chart.figure.update_layout(height=max(220, 90 + max([0, *(14 + 15 * (1 + name.count("<br>")) for name in names)]) * len(rows)))
    chart.figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=names, autorange="reversed", showgrid=False)
    return chart


def _axes(figure: go.Figure, x: str, y: str) -> None:
    figure.update_layout(
        template="none", height=400, margin=dict(l=56, r=16, t=16, b=48), hovermode="closest", showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", hoverlabel=dict(align="left", namelength=-1),
    )  # fmt: skip
    figure.update_xaxes(title=_marks(x), automargin=True, zeroline=False)
    figure.update_yaxes(title=_marks(y), automargin=True, zeroline=False)


def _marks(name: str, width: int = 48) -> str:
    """For plotly, which reads a markup of its own: in lines of so many characters, and what looks like markup escaped."""
    return "<br>".join(escape(line, quote=False) for line in textwrap.wrap(name, width, break_on_hyphens=False)[:4])


# ---- tables


def _runs(results: Results) -> str:
    head = ["configuration", "seed", "state", "test top-1, %", "val top-1, %", "commit", "run", "why"]
    cells = [
        [row.name, text(run.seed), run.state,
         *("" if (value := run.figure(key)) is None else f"{value:.2f}" for key in ("test/top1", "val/top1")),
         run.commit or "", str(run.folder), run.why or ""]
        for row in results.rows for run in row.runs
    ]  # fmt: skip
    return _html(head, cells, label="every run")


def _html(head: list[str], cells: list[list[str]], *, label: str) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    wide = ["", ' class="long"']
    body = "".join(f"<tr>{''.join(f'<td{wide[len(cell) > 40]}>{escape(cell)}</td>' for cell in line)}</tr>" for line in cells)
    inside = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{inside}</div>'


STYLE = """
:root{color-scheme:light dark;--ink:#1c2230;--soft:#5a6270;--paper:#fff;--line:#dde1e8;--accent:#2f6fde}
@media (prefers-color-scheme:dark){:root{--ink:#e7eaf0;--soft:#9aa3b2;--paper:#12151c;--line:#2b313d;--accent:#7aa7ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.5rem 0}h2{font-size:1.1rem;margin:2rem 0 .25rem}p{margin:.25rem 0;color:var(--soft)}
h1,h2,p,li,label{overflow-wrap:anywhere}
.skip{position:absolute;left:-99rem}.skip:focus{position:static}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}th{color:var(--soft);font-weight:600}
td.long{white-space:normal;min-width:16rem;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--accent);padding:.5rem 0}
.chart{width:100%;min-height:220px}
fieldset{border:0;margin:0;padding:0;min-width:0;font-size:.9rem}fieldset div{display:flex;flex-wrap:wrap;gap:0 1rem;align-items:center}
label{display:block;padding:.35rem 0;cursor:pointer}input{width:1.1rem;height:1.1rem;vertical-align:-.2rem;accent-color:var(--accent)}
button{font:inherit;color:var(--accent);background:none;border:1px solid var(--line);border-radius:.3rem;padding:.25rem .75rem}
@media print{details{display:block}}
"""

SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)'), narrow = matchMedia('(max-width: 40rem)');
function colours() {
  const of = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = {color: of('--soft'), gridcolor: of('--line'), linecolor: of('--line')};
  return {font: {color: of('--ink'), family: 'system-ui, sans-serif', size: narrow.matches ? 11 : 13}, xaxis: axis, yaxis: axis};
}
function laid(layout) {
  const now = colours();
  const modebar = {bgcolor: 'transparent', color: now.xaxis.color};
  return {...layout, modebar, font: now.font, xaxis: {...layout.xaxis, ...now.xaxis}, yaxis: {...layout.yaxis, ...now.yaxis}};
}
function draw() {
  figures.forEach((figure, n) => figure && Plotly.react('chart' + n, figure.data, laid(figure.layout),
    {responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : 'hover', scrollZoom: false,
     modeBarButtonsToRemove: ['select2d', 'lasso2d']}));
}
function show(boxes) {
  const chart = boxes[0].dataset.chart, shown = new Map(boxes.map(box => [+box.dataset.line, box.checked]));
  const traces = figures[chart].data.flatMap((trace, n) => shown.has(trace.meta) ? [n] : []);
  Plotly.restyle('chart' + chart, {visible: traces.map(n => shown.get(figures[chart].data[n].meta))}, traces);
}
for (const box of document.querySelectorAll('input[data-line]')) box.addEventListener('change', () => show([box]));
for (const button of document.querySelectorAll('button')) button.addEventListener('click', () => {
  const boxes = [...button.parentElement.querySelectorAll('input[data-line]')];
  for (const box of boxes) box.checked = button.dataset.all === 'all';
  show(boxes);
});
dark.addEventListener('change', draw); narrow.addEventListener('change', draw); draw();
"""
