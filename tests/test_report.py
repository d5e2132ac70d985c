"""The report, by figures that were reckoned by hand, and as a browser shows it."""

import copy
import csv
import functools
import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tnt_lightning.cli import command as _  # noqa: F401  (registers the resolvers of conf/)
from tnt_lightning.cli import folder_name
from tnt_lightning.config import flat, plain
from tnt_lightning.report import main
from tnt_lightning.results import Results, collect, published, table

from .conftest import command, compose
from .test_sweeps import SHORT, Sweep

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@functools.cache
def composed(*overrides: str) -> dict:
    return plain(compose(*overrides))


def run(
    folder: Path, *overrides: str, seed: int = 0, top1: object = 90.0, commit: str | None = "abc", test: bool = True, **result: object
) -> Path:
    """A run as training leaves it; unfinished where it has no top1."""
    (folder / "checkpoints").mkdir(parents=True)
    config = copy.deepcopy(composed(*overrides))
    config["seed"] = config["data"]["seed"] = seed
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.csv").write_text("epoch,step,train/loss,val/top1\n0,9,2.5,\n0,10,,50.0\n1,19,1.5,\n1,20,,70.0\n")
    if top1 is not None:
        figures = {"val/top1": top1, "images_per_s": 1000.0, "wall_s": 60.0}
        figures |= {"test/top1": top1, "test/top5": 99.0, "val/top1": top1 - 1} if test and isinstance(top1, float) else {}
        size = {"parameters": 397_642, "parameters_as_in_the_paper": 398_026, "flops": 2_181_696}
        known = {"seed": seed, "commit": commit, "device": "x86_64", "devices": 1}
        (folder / "result.json").write_text(json.dumps({**figures, **size, **known, **result}))
    return folder


def record(place: Path, jobs: dict[str, str], commit: str = "abc") -> Path:
    """sweep.json, of "KEY=VALUE KEY=VALUE" -> state."""
    place.mkdir(exist_ok=True)
    why = {"failed": "it <b>does not</b> divide"}
    listed = [
        {"swept": swept.split(), "run": folder_name(swept.split()), "state": state, "why": why.get(state)} for swept, state in jobs.items()
    ]
    (place / "sweep.json").write_text(json.dumps({"command": ["x"], "commit": commit, "jobs": listed}))
    return place


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two values of a knob with three seeds each, of which one is cut off and one failed before it was a run."""
    place = tmp_path / "heads"
    jobs = {}
    for heads, figures in ((1, (90.0, 91.0, 95.0)), (2, (96.0, 97.0, None))):
        for seed, top1 in enumerate(figures):
            run(place / f"inner_heads={heads},seed={seed}", f"inner_heads={heads}", seed=seed, top1=top1)
            jobs[f"inner_heads={heads} seed={seed}"] = "finished" if top1 else "stopped"
    return record(place, {**jobs, "inner_heads=5 seed=0": "failed"})


def report(*arguments: object) -> None:
    before, sys.argv = sys.argv, ["report", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = before


def drawn(page: Path) -> dict[str, dict]:
    """heading -> what plotly is given, of the charts of a page"""
    content = page.read_text()
    figures = json.loads(re.search(r"^<script>const figures = (.*);$", content, re.M)[1])
    return dict(zip(re.findall(r'<h2 id="c\d+">(.*?)</h2>', content), figures, strict=True))


def rows(results: Results) -> list[tuple[str, str]]:
    return [(row.name, row.count) for row in results.rows]


def test_mean_and_deviation_over_seeds_and_what_is_missing(sweep):
    results = collect([sweep])
    one, two, five = results.rows
    assert [row.knobs for row in results.rows] == [{"inner_heads": 1}, {"inner_heads": 2}, {"inner_heads": 5}]
    assert one.mean("test/top1") == 92.0 and one.deviation("test/top1") == pytest.approx(7**0.5)  # ((-2)² + (-1)² + 3²) / 2 = 7
    assert two.mean("test/top1") == 96.5 and two.deviation("test/top1") == pytest.approx(0.5**0.5) and len(two.runs) == 3
    assert five.mean("test/top1") is None and len(five.runs) == 1
    assert [line.split(" (")[0] for line in results.notes] == [
        "inner_heads=2 seed=2 stopped", "inner_heads=5 seed=0 failed: it <b>does not</b> divide",
    ]  # fmt: skip
    assert one.paper == (81.0, "Table 7: TNT-S, ImageNet", True)


def test_the_command_writes_a_page_and_tables(sweep, capsys):
    report(sweep)
    said = capsys.readouterr().out
    assert "92.00 ± 2.65" in said and "2 of 3" in said and "0 of 1" in said and "note   inner_heads=5 seed=0 failed" in said
    assert "81.0 (ImageNet)" in said, "of other data than the digits"
    [first, second, third] = csv.DictReader((sweep / "report.csv").open())
    assert first["test/top1"] == "92.0" and float(first["test/top1_sd"]) == pytest.approx(2.6458, abs=1e-4) and first["seeds"] == "0 1 2"
    assert (second["n"], second["runs"], third["n"]) == ("2", "3", "0") and third["test/top1"] == ""
    assert len(list(csv.DictReader((sweep / "runs.csv").open()))) == 7
    latex = (sweep / "report.tex").read_text()
    assert r"inner\_heads & test top-1, \%" in latex and r"1 & 92.00 $\pm$ 2.65 & 91.00 $\pm$ 2.65 & test & 3 & 0.398 & 0.002182" in latex
    assert latex.count("\\\\\n") == 4 and latex.count("{tabular}") == 2
    page = (sweep / "report.html").read_text()
    assert "it &lt;b&gt;does not" in page and "<b>does not" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page.split("<script>")[0] + page.rsplit("<script>", 1)[1]), (
        "one file that needs no other"
    )


def test_no_cell_of_the_latex_table_belongs_to_the_line_before(tmp_path):
    for blocks in ("[1,3]", "[1]"):
        run(tmp_path / "runs" / blocks, f"tnt_blocks={blocks}", "weights='*'")
    run(tmp_path / "runs" / "other", "tnt_blocks=[1]", "weights=null")
    (tmp_path / "runs" / "a\nb").mkdir()
    run(tmp_path / "runs" / "a\nb" / "c", "tnt_blocks=[1]", "weights=null", seed=1, top1=None)
    report(tmp_path / "runs")
    latex = (tmp_path / "runs" / "report.tex").read_text()
    assert "\n  {[}1,3{]} & {*} & " in latex and "\n  {[}1{]} & null & " in latex
    assert not re.search(r"\\\\\s*[\[*]", latex), r"\\[1,3] would be a distance"
    assert all(line.startswith("% ") for line in latex.split("\\begin")[0].splitlines()), "a note is one line of comment"


def test_runs_of_other_commits_and_configurations_are_rows_of_their_own(tmp_path):
    for number, (override, seed, commit) in enumerate(((None, 0, "a"), (None, 1, "a"), (None, 2, "b"), ("optimizer.lr=0.001", 0, "a"))):
        run(tmp_path / "runs" / str(number), *filter(None, [override]), seed=seed, commit=commit)
    report(tmp_path / "runs")
    results = collect([tmp_path / "runs"])
    assert rows(results) == [
        ("optimizer.lr=0.001 commit=a", "1"), ("optimizer.lr=0.003 commit=a", "2"), ("optimizer.lr=0.003 commit=b", "1"),
    ]  # fmt: skip
    assert results.notes == ["optimizer.lr=0.003: runs of the commits a, b are rows of their own"]
    assert table(results)[0][:2] == ["optimizer.lr", "commit"] and "  0.003 & b & " in (tmp_path / "runs" / "report.tex").read_text()
    charts = drawn(tmp_path / "runs" / "report.html")
    assert len({trace["meta"] for trace in charts["test top-1 against optimizer.lr"]["data"]}) == 2, "a line for each commit"
    assert len({trace["meta"] for trace in charts["Learning curves: validation top-1"]["data"]}) == 3


FOLDER = ("data=folder", "model=tnt_digits", "recipe=digits", "image_size=8", "data.num_classes=10")
PUBLISHED = ("data=cifar10", "model=tnt_digits", "recipe=digits", "image_size=8")


@pytest.mark.parametrize(
    "one, other, apart",
    [
        ((*FOLDER, "data.root=/a"), (*FOLDER, "data.root=/b"), "data.root"),
        ((*PUBLISHED, "data.root=/a"), (*PUBLISHED, "data.root=/b"), None),
        ((*PUBLISHED, "data.root=/a", "data.subset=true"), (*PUBLISHED, "data.root=/b", "data.subset=true"), "data.root"),
        (("faults.nonfinite=stop",), ("faults.nonfinite=skip",), "faults.nonfinite"),
        (("faults.timeout_s=60",), ("faults.timeout_s=70",), None),
        (("logger=csv", "data.num_workers=0"), ("logger=none", "data.num_workers=3"), None),
        (("model=tnt_digits",), ("model=tnt_s", "image_size=16", "recipe=digits"), "model"),
        ((), (*PUBLISHED, "data.root=/a"), "data"),
    ],
)
def test_what_a_row_has_in_common(tmp_path, one, other, apart):
    run(tmp_path / "runs" / "one", *one, seed=0)
    run(tmp_path / "runs" / "other", *other, seed=1)
    assert collect([tmp_path / "runs"]).keys == ([apart] if apart else [])


def test_the_order_of_keys_tells_nothing_apart(tmp_path):
    run(tmp_path / "runs" / "one", seed=0)
    file = run(tmp_path / "runs" / "other", seed=1) / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()), sort_keys=True))
    assert rows(collect([tmp_path / "runs"])) == [("run", "2")]


def test_figures_of_speed_of_different_machines_are_noted(tmp_path):
    run(tmp_path / "runs" / "a", seed=0)
    run(tmp_path / "runs" / "b", "data.num_workers=2", seed=1, device="H100", devices=2)
    about = "run: its images/s and time are of runs with different"
    assert collect([tmp_path / "runs"]).notes == [
        f"{about} device: H100, x86_64", f"{about} devices: 1, 2", f"{about} data.num_workers: 0, 2",
    ]  # fmt: skip


def test_a_failed_job_is_charged_to_its_own_configuration_only(tmp_path):
    run(tmp_path / "models" / "model=tnt_digits,seed=0", "model=tnt_digits")
    failed = ("model=tnt_digits seed=1", "model=deit_s seed=0", "model=deit_s seed=1")
    record(tmp_path / "models", {"model=tnt_digits seed=0": "finished", **dict.fromkeys(failed, "failed")})
    assert rows(collect([tmp_path / "models"])) == [("model=tnt_digits", "1 of 2"), ("model=deit_s", "0 of 2")]
    run(tmp_path / "blocks" / "tnt_blocks=1,seed=0", "tnt_blocks=[1]")
    record(tmp_path / "blocks", {"tnt_blocks=[1] seed=0": "finished", "tnt_blocks=null seed=0": "failed"})
    assert rows(collect([tmp_path / "blocks"])) == [("tnt_blocks=[1]", "1"), ("tnt_blocks=null", "0 of 1")]
    run(tmp_path / "epochs" / "recipe.epochs=3", "recipe.epochs=3")
    record(tmp_path / "epochs", {"recipe.epochs=3": "finished", "recipe.epochs=4": "failed"})
    assert rows(collect([tmp_path / "epochs"])) == [("recipe.epochs=3", "1"), ("recipe.epochs=4", "0 of 1")]
    run(tmp_path / "rates" / "optimizer.lr=1e-3,seed=0", "optimizer.lr=1e-3")
    rates = {"optimizer.lr=1e-3 seed=0": "finished", "optimizer.lr=1e-3 seed=1": "failed", "optimizer.lr=1e-1 seed=1": "failed"}
    record(tmp_path / "rates", rates)
    assert rows(collect([tmp_path / "rates"])) == [("optimizer.lr=0.001", "1 of 2"), ("optimizer.lr=0.1", "0 of 1")]


def test_an_unfinished_run_is_of_the_commit_that_its_sweep_says(tmp_path):
    for seed, commit in enumerate("ab"):
        run(tmp_path / "sweep" / f"seed={seed}", seed=seed, commit=commit)
    run(tmp_path / "sweep" / "seed=2", seed=2, top1=None)
    record(tmp_path / "sweep", {"seed=0": "skipped", "seed=1": "finished", "seed=2": "stopped", "seed=3": "failed"}, commit="b")
    assert rows(collect([tmp_path / "sweep"])) == [("commit=a", "1"), ("commit=b", "1 of 3")]
    run(tmp_path / "alone", seed=4, top1=None)
    assert rows(collect([tmp_path]))[2:] == [("commit=unknown", "0 of 1")]


def test_what_is_gone_or_damaged_is_shown_as_such(tmp_path):
    place = tmp_path / "sweep"
    for seed, top1 in enumerate((90.0, 92.0, 50.0, 50.0, "98.3", float("nan"), 50.0)):
        run(place / f"seed={seed}", seed=seed, top1=top1)
    record(place, {f"seed={seed}": "finished" for seed in range(9)})
    (place / "seed=2" / "result.json").write_text('{"test/top1": 9')
    (place / "seed=3" / "config.yaml").write_text("seed: 3\nmodel: {")
    (place / "seed=6" / "result.json").unlink()
    for file in ("val", "test"):
        for seed in (4, 5):
            result = json.loads((place / f"seed={seed}" / "result.json").read_text())
            (place / f"seed={seed}" / "result.json").write_text(json.dumps({**result, f"{file}/top1": result["val/top1"]}))
    report(place)
    results = collect([place])
    [row] = results.rows
    assert row.count == "2 of 9" and row.mean("test/top1") == 91.0
    assert [run.state for run in row.runs] == ["finished"] * 2 + ["damaged"] * 2 + ["finished"] * 2 + ["missing"] * 3
    for seed, why in enumerate((
        "damaged: .*result.json is damaged", "damaged: .*config.yaml cannot be read", "finished: test/top1=98.3 is no finite number",
        "finished: test/top1=nan is no finite number", "missing: its sweep says finished, and its result.json is gone",
        "missing: its sweep says finished, and its directory is gone", "missing",
    ), start=2):  # fmt: skip
        assert re.match(f"run seed={seed} {why}", results.notes[seed - 2])


def test_a_damaged_record_of_a_sweep_hides_no_run(sweep):
    (sweep / "sweep.json").write_text('{"jobs": [{"run": 1}]}')
    results = collect([sweep])
    assert rows(results) == [("inner_heads=1", "3"), ("inner_heads=2", "2 of 3")]
    assert results.notes[0].endswith("sweep.json: not the record of a sweep, so a job that left no run is not in this report")


def test_runs_of_earlier_commands_in_a_sweep_are_in_its_report(tmp_path):
    place = tmp_path / "sweep"
    for seed in (0, 1, 2):
        run(place / f"seed={seed}", seed=seed)
    run(place / "seed=0.before1", "optimizer.lr=0.001")
    run(place / "seed=3" / "deeper", seed=3)
    results = collect([record(place, {"seed=0": "skipped", "seed=1": "finished"})])
    assert rows(results) == [("run", "4")]
    assert results.notes == [f"{place}: 2 runs in it are of earlier commands than the one that {place}/sweep.json is of"]


def test_of_a_seed_the_newest_run_counts_once(tmp_path):
    for age, top1 in enumerate((80.0, 90.0, 85.0)):
        file = run(tmp_path / "runs" / str(age), seed=0, top1=top1) / "result.json"
        os.utime(file, (1_000 - (age == 1) * -500, 1_000 + (age == 1) * 500))
    run(tmp_path / "runs" / "other", seed=1, top1=92.0)
    results = collect([tmp_path / "runs"])
    [row] = results.rows
    assert (row.count, row.mean("test/top1"), row.deviation("test/top1")) == ("2", 91.0, pytest.approx(2**0.5))
    assert results.notes == [
        f"run seed=0: of 3 runs the newest counts, {tmp_path}/runs/1; the same seed again is no other measurement"
    ]  # fmt: skip


def test_each_data_set_is_compared_by_its_own_figure(tmp_path, capsys):
    run(tmp_path / "runs" / "digits")
    run(tmp_path / "runs" / "imagenet", "data=imagenet", "data.root=/", top1=81.0, test=False)
    report(tmp_path / "runs")
    said = capsys.readouterr().out
    assert rows(collect([tmp_path / "runs"])) == [("data=digits", "1"), ("data=imagenet", "1")]
    assert re.search(r"digits .*│ test +│ 1 ", said) and re.search(r"imagenet .*│ val +│ 1 .*│ 81.5 ", said)
    assert "top-1 against data" in drawn(tmp_path / "runs" / "report.html")


@pytest.mark.parametrize(
    "overrides, figure",
    [
        (["model=tnt_s"], (81.5, "Table 4")),
        (["model=deit_s"], (79.8, "Table 4")),
        (["model=pvt_medium"], (81.2, "Table 4")),
        (["model=efficientnet_b4"], (82.9, "Table 4")),
        (["model=efficientnet_b4", "image_size=224"], None),
        (["model=tnt_s_3"], (81.1, "Table 5: TNT-S, ImageNet")),
        (["model=timm"], None),
        (["model=timm", "model.name=resnet50"], (76.2, "Table 4")),
        (["model=vit_b_16"], (77.9, "Table 4")),
        (["model=tnt_s", "inner_heads=6"], (81.3, "Table 7: TNT-S, ImageNet")),
        (["model=tnt_s", "words_per_patch=64", "inner_heads=2"], (81.0, "Table 8: TNT-S, ImageNet")),
        (["model=tnt_s", "se=true"], (81.7, "Table 12: TNT-S, ImageNet")),
        (["model=tnt_s", "position_encoding=none"], (80.5, "Table 6: TNT-S, ImageNet")),
        (["model=tnt_s", "tnt_blocks=[1,6]"], (81.1, "Table 5: TNT-S, ImageNet")),
        (["model=tnt_s", "se=true", "inner_heads=2"], None),
        (["model=tnt_s", "model.depth=6"], None),
        (["model=tnt_s", "model.inner_dim=12"], None),
        (["model=tnt_ti", "se=true"], None),
        (["model=tnt_s", "data.subset=true"], None),
        (["model=tnt_s", "image_size=192"], None),
        (["model=tnt_s", "image_size=384"], (83.1, "Table 9: fine-tuned at 384")),
        (["data=cifar10", "image_size=384"], (98.7, "Table 9: fine-tuned at 384")),
        (["data=pets", "model=tnt_b", "image_size=384"], (95.0, "Table 9: fine-tuned at 384")),
        (["data=inat2019", "image_size=384"], (81.4, "Table 9: fine-tuned at 384")),
        (["data=inat2018", "image_size=384"], None),
        (["data=cifar10"], None),
        (["data=cifar10", "image_size=384", "se=true"], None),
        (["data=cifar10", "model=tnt_ti", "image_size=384"], None),
    ],
)
def test_the_papers_figure_of_a_configuration(overrides, figure):
    data = [] if overrides[0].startswith("data=") else ["data=imagenet"]
    assert published(dict(flat(composed(*data, "data.root=/", *overrides))), {}) == (figure and (*figure, False))


@pytest.fixture
def large(tmp_path) -> Path:
    """Many rows with long names, two knobs, one of which the paper swept, marks of HTML in a name, and a row of one seed."""
    place = tmp_path / "large"
    for heads in (1, 2, 4):
        for number, rate in enumerate((0.01, 0.0003, 0.003, 0.001)):
            for seed in (0, 1) if number else (0,):
                top1 = 90.0 + heads + number + seed
                run(place / f"{heads},{number},{seed}", f"inner_heads={heads}", f"optimizer.lr={rate}", seed=seed, top1=top1)
    run(place / "weights", "weights='<b>%{x}</b>/a/long/path/to/the/weights/of/some/other/run/checkpoints/best.ckpt'")
    run(place / "cut", "inner_heads=4", "optimizer.lr=0.01", seed=1, top1=None)
    return place


def test_charts(large):
    report(large)
    charts = drawn(large / "report.html")
    assert list(charts) == [
        "test top-1 against inner_heads", "test top-1 against weights", "test top-1 against optimizer.lr", "test top-1 against GMAC",
        "test top-1 against parameters, M", "Learning curves: validation top-1", "Learning curves: training loss", "Time of a run",
    ]  # fmt: skip
    rates = charts["test top-1 against optimizer.lr"]
    assert rates["layout"]["xaxis"]["ticktext"] == ["0.0003", "0.001", "0.003", "0.01"]
    lines = [trace for trace in rates["data"] if "error_y" in trace]
    assert all(line["x"] == sorted(line["x"]) and line["mode"] == "lines+markers" for line in lines)
    assert lines[0]["y"] == [92.5, 94.5, 93.5, 91.0]
    assert lines[0]["error_y"]["array"][3] is None and lines[0]["error_y"]["array"][0] == pytest.approx(0.5**0.5)
    page = (large / "report.html").read_text()
    tables = dict(re.findall(r'aria-label="([^"]*), as a table"><table>(.*?)</table>', page))
    assert list(tables) == list(charts), "what a chart shows is in its table"
    cells = ("0.01", "inner_heads=1 weights=null", "91.00", "1")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in tables["test top-1 against optimizer.lr"]
    diamonds = [name for name, chart in charts.items() if '"diamond"' in json.dumps(chart["data"])]
    assert diamonds == [f"test top-1 against {name}" for name in ("inner_heads", "GMAC", "parameters, M")], "of what the paper varied"
    assert "<b>" not in json.dumps(charts) and "&lt;b&gt;%{x}&lt;/b&gt;" in json.dumps(charts), "no name is markup"
    assert not any("<b>" in template or "%{x}&" in template for template in re.findall(r'"hovertemplate": "(.*?)"', json.dumps(charts)))


def test_a_chart_of_too_many_lines_says_so(tmp_path):
    for number in range(13):
        for heads in (1, 2):
            folder = run(tmp_path / "runs" / f"{number},{heads}", f"inner_heads={heads}")
            config = (folder / "config.yaml").read_text()
            (folder / "config.yaml").write_text(config.replace("label_smoothing: 0.1", f"label_smoothing: {number / 100}"))
    report(tmp_path / "runs")
    assert drawn(tmp_path / "runs" / "report.html")["test top-1 against inner_heads"] is None
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "The other knobs have 13 settings, too many lines to tell apart: the figures are in the table." in page


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text('{"jobs": [{"run": 1}]}')
    for arguments, line in (
        ([str(tmp_path / "none")], "no such directory"),
        ([str(tmp_path / "empty")], "no run and no sweep in it"),
        ([str(tmp_path / "broken")], "sweep.json: not the record of a sweep"),
        ([], "the following arguments are required: DIR"),
        ([str(run(tmp_path / "run")), "--out", "/proc/x"], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as ended:
            report(*arguments)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and line in said and said.startswith("error: ") and said.count("\n") == 1


PROBE = """<script>addEventListener('load', () => setTimeout(async () => {
  const wait = () => new Promise(done => setTimeout(done, 100));
  const charts = [...document.querySelectorAll('.chart')];
  const marks = chart => chart.querySelectorAll('path.point, path.js-line, .bars path').length;
  const seen = {width: innerWidth, ink: getComputedStyle(document.body).color, charts: charts.map(marks)};
  const whole = document.documentElement;
  seen.closed = whole.scrollWidth;
  for (const details of document.querySelectorAll('details')) details.open = true;
  await wait();
  seen.open = whole.scrollWidth;
  seen.out = charts.filter(chart => [...chart.querySelectorAll('svg')].some(svg => svg.clientWidth > chart.clientWidth)).length;
  const controls = [...document.querySelectorAll('a[href], summary, input, button, [tabindex]')].filter(one => one.tabIndex >= 0);
  const name = one => one.labels?.[0]?.innerText || one.ariaLabel || one.innerText;
  seen.reached = controls.map(one => { one.focus(); return document.activeElement === one && one.offsetHeight > 0 && !!name(one).trim(); });
  seen.boxes = [];
  for (const box of document.querySelectorAll('input')) {
    const chart = document.getElementById('chart' + box.dataset.chart);
    const shown = () => chart.data.filter(trace => trace.meta == box.dataset.line).every(trace => trace.visible ?? true);
    const before = [shown(), marks(chart)];
    box.focus(); document.activeElement.click(); await wait();
    seen.boxes.push([box.labels[0].innerText.trim(), before[0] !== shown(), Math.sign(marks(chart) - before[1]), box.checked]);
  }
  for (const button of document.querySelectorAll('button')) {
    if (button.dataset.all === 'none') { button.focus(); document.activeElement.click(); await wait(); }
  }
  seen.none = [...document.querySelectorAll('fieldset div:has(button) input')].filter(box => box.checked).length;
  parent.postMessage(seen, '*');
}, 1500))</script></body>"""
CHROMIUMS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--window-size=1700,1200", "--virtual-time-budget=40000", "--dump-dom",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_on_a_desktop_and_on_a_phone(large, tmp_path, dark):
    """In frames as wide as their screens, because a window of Chromium's is at least 500 wide."""
    report(large, "--out", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    page.write_text(page.read_text().replace("</body>", PROBE))
    frames = "".join(f'<iframe src="{page.as_uri()}" style="width: {width}px; height: 900px; border: 0"></iframe>' for width in (1280, 390))
    listen = "addEventListener('message', said => { seen[said.data.width] = said.data; document.title = JSON.stringify(seen) })"
    (tmp_path / "frames.html").write_text(f"<title></title><script>const seen = {{}}; {listen}</script>{frames}")
    line = [CHROMIUM, *CHROMIUMS, f"--user-data-dir={tmp_path / 'profile'}", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
    done = subprocess.run([*line, (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=240)
    screens = json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1]))
    assert sorted(map(int, screens)) == [390, 1280]
    for width, seen in screens.items():
        assert len(seen["charts"]) == 8 and all(seen["charts"]), "every chart is drawn"
        assert seen["closed"] == seen["open"] == int(width) and not seen["out"], "nothing but tables scrolls sideways"
        assert (seen["ink"] == "rgb(231, 234, 240)") == dark
        assert len(seen["reached"]) > 60 and all(seen["reached"]), "a keyboard reaches whatever does something, and each has a name"
        papers = [box for box in seen["boxes"] if "paper" in box[0]]
        assert [box[1:] for box in papers] == [[True, 1, True]] * 3, "the paper's points come with their box"
        ours = [box[1:] for box in seen["boxes"] if box not in papers]
        assert len(ours) > 50 and all(toggled and gone == -1 and not checked for toggled, gone, checked in ours) and not seen["none"]


@pytest.mark.slow
def test_the_report_of_a_real_sweep_with_a_job_that_failed(tmp_path):
    sweep = Sweep(tmp_path, "inner_heads=1,5", "seed=0,1", *SHORT, "trainer.log_every_n_steps=1")
    sweep.ended(1)
    done = command("report", str(sweep.folder), cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")]
    results = [json.loads((sweep.folder / f"inner_heads=1,seed={seed}" / "result.json").read_text()) for seed in (0, 1)]
    mean, deviation = (f"{of([result['test/top1'] for result in results]):.2f}" for of in (statistics.fmean, statistics.stdev))
    assert [(line[0], line[1], line[4]) for line in cells] == [("1", f"{mean} ± {deviation}", "2"), ("5", "", "0 of 2")]
    why = "inner_heads=5 does not divide"
    assert [line.split(why)[0] for line in done.stdout.splitlines() if why in line] == [
        f"note   inner_heads=5 seed={seed} failed: " for seed in (0, 1)
    ]  # fmt: skip
    assert [run["state"] for run in csv.DictReader((sweep.folder / "runs.csv").open())] == ["finished", "finished", "failed", "failed"]
    charts = drawn(sweep.folder / "report.html")
    assert len(charts["Learning curves: training loss"]["data"]) == 2 and "Time of a run" in charts
