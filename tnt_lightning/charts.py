"""report.html: one file that needs nothing else, drawn by plotly, with a table of every figure that a chart shows."""

import json
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tnt_lightning.config import text
from tnt_lightning.results import PAPER, Results, Row, table, words_of

COLOURS = ("#2f6fde", "#d9542b", "#1f9d6b", "#a04fc7", "#b8860b", "#0f98b0", "#c2417c", "#6b7280")
PAPERS = "#8a8f98"


def page(results: Results, *, title: str) -> str:
    """The whole of report.html. What a name in a configuration brings along is text in it, never markup."""
    charts = [
        *(chart for knob in _knobs(results) if (chart := _against(results, knob)) is not None),
        _accuracy(results, "flops", "GMAC", 1e9),
        _accuracy(results, "parameters_as_in_the_paper", "parameters, M", 1e6),
        _curves(results, "val/top1", "validation top-1, %"),
        _curves(results, "train/loss", "training loss"),
        _time(results),
    ]
    drawn = [(name, about, figure) for name, about, figure in charts if figure.data]
    figures = [json.loads(figure.to_json()) for _, _, figure in drawn]
    sections = "\n".join(
        f'<section><h2 id="c{n}">{escape(name)}</h2><p>{escape(about)}</p>'
        f'<div class="chart" id="chart{n}" role="img" aria-labelledby="c{n}" aria-describedby="figures"></div></section>'
        for n, (name, about, _) in enumerate(drawn)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><a class="skip" href="#figures">to the figures</a>
<header><h1>{escape(title)}</h1><p>{escape(_counts(results))}</p></header>
<main>
<section><h2 id="figures">Figures</h2>
<div class="wide" tabindex="0" role="region" aria-labelledby="figures">{_html(*table(results))}</div>
{f"<details open><summary>{len(results.notes)} notes</summary><ul>{notes}</ul></details>" if notes else ""}</section>
{sections}
<section><h2 id="runs">Runs</h2>
<details><summary>every run</summary>
<div class="wide" tabindex="0" role="region" aria-labelledby="runs">{_runs(results)}</div></details></section>
</main>
<script>{get_plotlyjs()}</script>
<script>const figures = {_script(figures)};
{SCRIPT}</script>
</body></html>
"""


def _script(value: Any) -> str:
    return json.dumps(value).replace("<", "\\u003c")


def _counts(results: Results) -> str:
    every = [run for row in results.rows for run in row.runs]
    states = [run.state for run in every]
    return f"{len(every)} runs of {len(results.rows)} configurations: " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))


# ---- charts


def _knobs(results: Results) -> list[str]:
    """Keys that take several values."""
    keys = dict.fromkeys(key for row in results.rows for key in row.knobs)
    return [key for key in keys if len({text(row.knobs.get(key)) for row in results.rows}) > 1]


def _against(results: Results, knob: str) -> tuple[str, str, go.Figure] | None:
    """The compared figure against a knob, a line for each setting of the others."""
    rows = [row for row in results.rows if row.mean(results.figure) is not None]
    others: dict[str, list[Row]] = {}
    for row in rows:
        others.setdefault(" ".join(f"{key}={text(value)}" for key, value in row.knobs.items() if key != knob), []).append(row)
    if len(others) > 12:
        return None
    figure = go.Figure()
    values = list(dict.fromkeys(text(row.knobs.get(knob)) for row in rows))
    numbers = all(isinstance(row.knobs.get(knob), int | float) and not isinstance(row.knobs[knob], bool) for row in rows)
    mode = "lines+markers" if numbers else "markers"  # between names there is no way
    for number, (name, group) in enumerate(others.items()):
        x = [text(row.knobs.get(knob)) for row in group]
        colour = COLOURS[number % len(COLOURS)]
        deviation = [row.deviation(results.figure) or 0 for row in group]
        figure.add_scatter(
            x=x, y=[row.mean(results.figure) for row in group], name=name or "mean", mode=mode, line_color=colour, marker_size=9,
            error_y=dict(array=deviation, visible=True), customdata=[len(row.values(results.figure)) for row in group],
            hovertemplate=f"{knob}=%{{x}}: %{{y:.2f}} %, n=%{{customdata}}<extra></extra>",
        )  # fmt: skip
        seeds = [(at, value) for at, row in zip(x, group, strict=True) for value in row.values(results.figure)]
        figure.add_scatter(
            x=[at for at, _ in seeds], y=[value for _, value in seeds], mode="markers", marker=dict(size=5, opacity=0.5, color=colour),
            showlegend=False, hovertemplate="one seed: %{y:.2f} %<extra></extra>",
        )  # fmt: skip
    published = [(text(row.knobs.get(knob)), row.paper) for row in rows if row.paper]
    if published:
        _add_paper(
            figure, [at for at, _ in published], [paper[0] for _, paper in published if paper], [f"{knob}={at}" for at, _ in published]
        )
    _axes(figure, knob, f"{words_of(results.figure)}, %", results)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=values)
    about = "Mean over seeds; the bar is a standard deviation to each side, the small dots are the seeds."
    return f"{words_of(results.figure)} against {knob}", about + _about_paper(bool(published), results), figure


def _accuracy(results: Results, size: str, words: str, unit: float) -> tuple[str, str, go.Figure]:
    figure = go.Figure()
    rows = [row for row in results.rows if row.mean(results.figure) is not None and row.mean(size) is not None]
    for number, row in enumerate(rows):
        figure.add_scatter(
            x=[(row.mean(size) or 0) / unit], y=[row.mean(results.figure)], name=row.name, mode="markers",
            marker=dict(size=10, color=COLOURS[number % len(COLOURS)]), showlegend=len(rows) <= 12,
            error_y=dict(array=[row.deviation(results.figure) or 0], visible=True),
            hovertemplate=f"{escape(row.name)}<br>%{{x:.4g}} {words}, %{{y:.2f}} %<extra></extra>",
        )  # fmt: skip
    if rows:
        key = "flops_g" if size == "flops" else "params_m"
        models = [(name, row) for name, row in PAPER["imagenet"].items() if row[key] is not None]
        _add_paper(figure, [row[key] for _, row in models], [row["top1"] for _, row in models], [name for name, _ in models])
    _axes(figure, words, f"{words_of(results.figure)}, %", results)
    figure.update_xaxes(rangemode="tozero")
    return f"{words_of(results.figure)} against {words}", "A dot for each configuration." + _about_paper(bool(rows), results), figure


def _add_paper(figure: go.Figure, x: list[Any], y: list[float], names: list[str]) -> None:
    figure.add_scatter(
        x=x, y=y, text=names, name="paper (ImageNet)", mode="markers", visible="legendonly",
        marker=dict(symbol="diamond", size=9, color=PAPERS), hovertemplate="paper, %{text}: %{y:.1f} %<extra></extra>",
    )  # fmt: skip


def _about_paper(there: bool, results: Results) -> str:
    if not there:
        return ""
    if _imagenet(results):
        return " The paper's figures are the grey diamonds."
    return " The legend brings in the paper's figures, which are of ImageNet, and so no measure of these."


def _imagenet(results: Results) -> bool:
    return any("ImageNet" in str(run.config.get("data._target_")) for row in results.rows for run in row.runs)


def _curves(results: Results, column: str, words: str) -> tuple[str, str, go.Figure]:
    figure = go.Figure()
    for number, row in enumerate(results.rows):
        named = False
        for run in row.runs:
            epochs, values = run.curve(column)
            if not epochs:
                continue
            last = dict(zip(epochs, values, strict=True))  # of several in an epoch the last one
            figure.add_scatter(
                x=list(last), y=list(last.values()), mode="lines", name=row.name, legendgroup=row.name, showlegend=not named,
                line=dict(color=COLOURS[number % len(COLOURS)], width=1.5, dash="solid" if run.state == "finished" else "dot"),
                hovertemplate=f"{escape(row.name)} seed={text(run.seed)}: %{{y:.4g}} after epoch %{{x}}<extra></extra>",
            )  # fmt: skip
            named = True
    _axes(figure, "epoch", words, results, paper=False)
    return f"Learning curves: {words.split(',')[0]}", "A line for each run; dotted where it is not finished.", figure


def _time(results: Results) -> tuple[str, str, go.Figure]:
    figure = go.Figure()
    rows = [row for row in results.rows if row.mean("wall_s") is not None]
    if rows:
        figure.add_bar(
            y=[row.name for row in rows], x=[(row.mean("wall_s") or 0) / 60 for row in rows], orientation="h", marker_color=COLOURS[0],
            error_x=dict(array=[(row.deviation("wall_s") or 0) / 60 for row in rows], visible=True),
            hovertemplate="%{y}: %{x:.2f} minutes<extra></extra>",
        )  # fmt: skip
    _axes(figure, "minutes", "", results, paper=False)
    figure.update_layout(height=max(220, 90 + 26 * len(rows)), showlegend=False)
    figure.update_yaxes(automargin=True, autorange="reversed")
    devices = sorted({str(run.result.get("device")) for row in results.rows for run in row.runs if run.result})
    return (
        "Time of a run",
        f"Start-up left out; on {', '.join(devices) or 'no device yet'}. Runs beside one another slow each other down.",
        figure,
    )


def _axes(figure: go.Figure, x: str, y: str, results: Results, *, paper: bool = True) -> None:
    if paper and _imagenet(results):
        figure.for_each_trace(lambda trace: trace.update(visible=True), selector=dict(name="paper (ImageNet)"))
    figure.update_layout(
        template="none", height=420, margin=dict(l=56, r=16, t=16, b=48), hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", legend=dict(orientation="h", y=-0.22),
    )  # fmt: skip
    figure.update_xaxes(title=x, automargin=True, zeroline=False)
    figure.update_yaxes(title=y, automargin=True, zeroline=False)


# ---- tables


def _runs(results: Results) -> str:
    head = ["configuration", "seed", "state", "test top-1, %", "val top-1, %", "commit", "run", "why"]
    cells = [
        [row.name, text(run.seed), run.state, *(f"{run.result[key]:.2f}" if key in run.result else "" for key in ("test/top1", "val/top1")),
         str(run.result.get("commit") or ""), str(run.folder), run.why or ""]
        for row in results.rows for run in row.runs
    ]  # fmt: skip
    return _html(head, cells)


def _html(head: list[str], cells: list[list[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


STYLE = """
:root{color-scheme:light dark;--ink:#1c2230;--soft:#5a6270;--paper:#fff;--line:#dde1e8;--accent:#2f6fde}
@media (prefers-color-scheme:dark){:root{--ink:#e7eaf0;--soft:#9aa3b2;--paper:#12151c;--line:#2b313d;--accent:#7aa7ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.5rem 0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .25rem}p{margin:.25rem 0;color:var(--soft)}
.skip{position:absolute;left:-99rem}.skip:focus{position:static}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}th{color:var(--soft);font-weight:600}
li{overflow-wrap:anywhere}summary{cursor:pointer;color:var(--accent);padding:.5rem 0}
.chart{width:100%;min-height:220px}
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
  figures.forEach((figure, n) => Plotly.react('chart' + n, figure.data, laid(figure.layout),
    {responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : 'hover', scrollZoom: false}));
}
dark.addEventListener('change', draw); narrow.addEventListener('change', draw); draw();
"""
