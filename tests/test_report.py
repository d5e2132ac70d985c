"""The report, by figures that were reckoned by hand, and as a browser shows it."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tnt_lightning.cli import command as _  # noqa: F401  (registers the resolvers of conf/)
from tnt_lightning.config import plain
from tnt_lightning.report import main
from tnt_lightning.results import collect, published

from .conftest import compose

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def run(folder: Path, *overrides: str, top1: float | None = 90.0, commit: str = "abc", curve: tuple[float, ...] = (50.0, 70.0)) -> Path:
    folder.mkdir(parents=True)
    config = plain(compose(*overrides))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = "".join(f"{epoch},{epoch * 10},{value}\n" for epoch, value in enumerate(curve))
    (folder / "metrics.csv").write_text(f"epoch,step,val/top1\n{rows}")
    if top1 is not None:
        figures = {"test/top1": top1, "test/top5": 99.0, "val/top1": top1 - 1, "images_per_s": 1000.0, "wall_s": 60.0}
        size = {"parameters": 397_642, "parameters_as_in_the_paper": 398_026, "flops": 2_181_696}
        result = {**figures, **size, "seed": config["seed"], "commit": commit, "device": "x86_64"}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two values of a knob with three seeds each, of which one is cut off and one failed before it was a run."""
    place = tmp_path / "heads"
    jobs = []
    for heads, figures in ((1, (90.0, 91.0, 95.0)), (2, (96.0, 97.0, None))):
        for seed, top1 in enumerate(figures):
            name = f"inner_heads={heads},seed={seed}"
            run(place / name, f"inner_heads={heads}", f"seed={seed}", top1=top1)
            jobs.append({"swept": name.split(","), "run": name, "state": "finished" if top1 else "stopped", "why": None})
    jobs.append(
        {"swept": ["inner_heads=5", "seed=0"], "run": "inner_heads=5,seed=0", "state": "failed", "why": "it <b>does not</b> divide"}
    )
    (place / "sweep.json").write_text(json.dumps({"command": ["x"], "commit": "abc", "jobs": jobs}))
    return place


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
    assert one.paper == (81.0, "Table 7: TNT-S, ImageNet")


def test_the_command_writes_a_page_and_tables(sweep, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(sweep)])
    main()
    said = capsys.readouterr().out
    assert "92.00 ± 2.65" in said and "2 of 3" in said and "0 of 1" in said and "note   inner_heads=5 seed=0 failed" in said
    [first, second, third] = csv.DictReader((sweep / "report.csv").open())
    assert first["test/top1"] == "92.0" and float(first["test/top1_sd"]) == pytest.approx(2.6458, abs=1e-4) and first["seeds"] == "0 1 2"
    assert (second["n"], second["runs"], third["n"]) == ("2", "3", "0") and third["test/top1"] == ""
    assert len(list(csv.DictReader((sweep / "runs.csv").open()))) == 7
    latex = (sweep / "report.tex").read_text()
    assert r"inner\_heads & test top-1, \%" in latex and r"1 & 92.00 $\pm$ 2.65 & 91.00 $\pm$ 2.65 & 3 & 0.398 & 0.002182" in latex
    assert latex.count("\\\\\n") == 4 and latex.count("{tabular}") == 2
    page = (sweep / "report.html").read_text()
    assert "it &lt;b&gt;does not" in page and "<b>does not" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page.split("<script>")[0] + page.rsplit("<script>", 1)[1]), (
        "one file that needs no other"
    )


def test_runs_of_other_commits_and_configurations_are_rows_of_their_own(tmp_path):
    for number, (override, commit) in enumerate((("seed=0", "a"), ("seed=1", "a"), ("seed=2", "b"), ("optimizer.lr=0.001", "a"))):
        run(tmp_path / "runs" / str(number), override, commit=commit)
    run(tmp_path / "runs" / "again", "seed=0", "data.num_workers=2", commit="a")
    results = collect([tmp_path / "runs"])
    assert sorted((row.commit, len(row.runs), row.knobs) for row in results.rows) == [
        ("a", 1, {"optimizer.lr": 0.001}), ("a", 3, {"optimizer.lr": 0.003}), ("b", 1, {"optimizer.lr": 0.003}),
    ]  # fmt: skip
    assert any("runs of the commits a, b are rows of their own" in note for note in results.notes)
    assert any("3 runs of seeds 0, 0, 1: the same seed again is no other measurement" in note for note in results.notes)


@pytest.mark.parametrize(
    "overrides, figure",
    [
        (["model=tnt_s"], (81.5, "Table 4")),
        (["model=deit_s"], (79.8, "Table 4")),
        (["model=tnt_s", "inner_heads=6"], (81.3, "Table 7: TNT-S, ImageNet")),
        (["model=tnt_s", "words_per_patch=64", "inner_heads=2"], (81.0, "Table 8: TNT-S, ImageNet")),
        (["model=tnt_s", "se=true"], (81.7, "Table 12: TNT-S, ImageNet")),
        (["model=tnt_s", "position_encoding=none"], (80.5, "Table 6: TNT-S, ImageNet")),
        (["model=tnt_s", "tnt_blocks=[1,6]"], (81.1, "Table 5: TNT-S, ImageNet")),
        (["model=tnt_s", "se=true", "inner_heads=2"], None),
        (["model=tnt_s", "model.depth=6"], None),
        (["model=tnt_ti", "se=true"], None),
    ],
)
def test_the_papers_figure_of_a_configuration(overrides, figure):
    from tnt_lightning.config import flat

    assert published(dict(flat(plain(compose("data=imagenet", "data.root=/", *overrides)))), {}) == figure


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
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and line in said and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_a_browser_draws_every_chart(sweep, tmp_path, monkeypatch, width, dark):
    monkeypatch.setattr(sys, "argv", ["report", str(sweep), "--out", str(tmp_path / "out")])
    main()
    page = tmp_path / "out" / "report.html"
    probe = (
        "<script>addEventListener('load', () => setTimeout(() => { document.title = JSON.stringify({"
        "charts: [...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('path.point, path.js-line, .bars path').length),"
        "wide: document.documentElement.scrollWidth, ink: getComputedStyle(document.body).color}) }, 1500))</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", probe))
    line = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},1200",
        "--virtual-time-budget=9000",
        "--dump-dom",
    ]
    line += ["--blink-settings=preferredColorScheme=0", f"--user-data-dir={tmp_path / 'profile'}"] if dark else []
    done = subprocess.run([*line, page.as_uri()], capture_output=True, text=True, timeout=120)
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1])
    assert len(seen["charts"]) == 5 and all(seen["charts"]), seen
    assert seen["wide"] <= max(width, 500), "nothing but tables scrolls sideways"  # chromium's own narrowest window is 500 wide
    assert (seen["ink"] == "rgb(231, 234, 240)") == dark
