"""The paper's tables as `tables` prints them: whose figures they are, and that no difference is hidden."""

import contextlib
import copy
import io
import re
import sys
from pathlib import Path

import pytest
from torchvision.models import EfficientNet_B3_Weights, EfficientNet_B4_Weights, ResNet50_Weights, ResNet152_Weights, ViT_B_16_Weights

from tnt_lightning import tables

from .conftest import PAPER
from .test_report import run

PAGE = Path(__file__).parents[1] / "experiments" / "tables" / "README.md"
NUMBERS = ["1", "4", "5", "8", "9", "12"]
COUNTS = {"M paper": "params_m", "GMAC paper": "flops_g"}

pytestmark = pytest.mark.usefixtures("one_thread")


def said(*arguments: object) -> str:
    """What the command prints. What it counted once it does not count again."""
    before, sys.argv = sys.argv, ["tables", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            tables.main()
    finally:
        sys.argv = before
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


@pytest.fixture(scope="module")
def whole() -> str:
    return said()


def read(printed: str) -> dict[str, tuple[list[dict[str, str]], list[str]]]:
    """number -> (rows, remarks). A cell belongs to the heading that ends where it ends, as numbers stand to the right."""
    found = {}
    for part in re.split(r"^Table ", printed, flags=re.M)[1:]:
        number, body = part.split(":", 1)
        _, _, upper, lower, rule, *rest = body.split("\n")
        assert set(rule.strip()) == {"─"}
        words = {match.end(): match[0] for match in re.finditer(r"\S+", lower)}
        words |= {end: f"{match[0]} {words.get(end, '')}".strip() for match in re.finditer(r"\S+", upper) for end in [match.end()]}
        rows = []
        for line in rest[: next(at for at, line in enumerate(rest) if not line.strip())]:
            cells = dict.fromkeys(words.values(), "")
            for match in re.finditer(r"\S+(?: \S+)*", line):
                head = words.get(match.end())
                cells[head if head is not None else "name" if match.start() < 4 else "data"] = match[0]
            rows.append(cells)
        found[number] = rows, [line[2:] for line in rest if line.startswith("* ")]
    return found


@pytest.mark.slow
def test_every_figure_of_the_paper_is_there(whole):
    found = {number: rows for number, (rows, _) in read(whole).items()}
    assert list(found) == NUMBERS
    for number, section in {"1": "variants", "4": "imagenet", "5": "throughput_v100"}.items():
        assert [row["name"] for row in found[number]] == list(PAPER[section])
    sections = {
        "1": PAPER["variants"], "4": PAPER["imagenet"], "5": PAPER["throughput_v100"],
        "8": PAPER["ablations"]["words_per_patch"], "12": PAPER["ablations"]["se"],
    }  # fmt: skip
    words = {**COUNTS, "top-1 paper": "top1", "images/s paper": "images_per_s", "px": "resolution", "c": "inner_dim", "d": "outer_dim"}
    for number, rows in sections.items():
        for printed, published in zip(found[number], rows.values(), strict=True):
            assert {words[head]: float(printed[head]) for head in words if printed.get(head)} == {
                figure: value for figure, value in published.items() if figure in words.values()
            }
    assert [row["inner heads"] for row in found["1"]] == [str(row["inner_heads"]) for row in PAPER["variants"].values()]
    transfer = {(row["name"], row["data"]): row for row in found["9"]}
    for name, published in PAPER["transfer"].items():
        for data, top1 in published.items():
            if data != "params_m":
                row = transfer.pop((name, data))
                assert (row["M paper"], row["top-1 paper"]) == (str(published["params_m"]), "" if top1 is None else str(top1))
    assert not transfer


def test_what_is_counted_is_what_torchvision_counts_of_the_same_networks(whole):
    rows = {row["name"]: row for row in read(whole)["4"][0]}
    for name, weights in {
        "resnet50": ResNet50_Weights.IMAGENET1K_V1, "resnet152": ResNet152_Weights.IMAGENET1K_V1,
        "efficientnet_b3": EfficientNet_B3_Weights.IMAGENET1K_V1, "efficientnet_b4": EfficientNet_B4_Weights.IMAGENET1K_V1,
        "deit_b": ViT_B_16_Weights.IMAGENET1K_V1, "vit_b_16": ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1,
    }.items():  # fmt: skip
        counted = [float(rows[name][head].lstrip("*")) for head in ("M here", "M live", "GMAC here")]
        size = weights.meta["num_params"] / 1e6
        assert counted == pytest.approx([size, size, weights.meta["_ops"]], abs=6e-4)


def differences(number: str, rows: list[dict[str, str]]) -> set[tuple[str, str]]:
    """(row, figure that is counted), by what is printed."""
    found = set()
    for row in rows:
        for head in COUNTS:
            here = row.get(head.replace("paper", "here"), "")
            if row.get(head) and here and abs(float(here.lstrip("*")) - float(row[head])) > 0.05:
                assert here.startswith("*"), f"Table {number}, {row}"
                found.add((row["name"], here.lstrip("*")))
            else:
                assert not here.startswith("*"), f"Table {number}, {row}"
    return found


def test_no_difference_is_without_a_remark_and_no_remark_without_a_difference(whole):
    used = set()
    for number, (rows, remarks) in read(whole).items():
        differing = differences(number, rows)
        for name, here in differing:
            assert [line for line in remarks if line.startswith(f"{name}: ") and here in line.split(" here: ")[0]], (
                f"Table {number}, {name}"
            )
        for line in remarks:
            name, why = line.split(": ")[0], line.split(" here: ")[1]
            assert name in {name for name, _ in differing} and why
            used.add(why)
    assert used == {"cause unknown", *(why for rows in PAPER["remarks"].values() for row in rows.values() for why in row.values())}


def test_a_difference_that_nobody_knows_of_is_said(monkeypatch):
    changed = copy.deepcopy(PAPER)
    changed["ablations"]["se"][True]["params_m"] = 24.6
    changed["variants"]["tnt_s"]["inner_dim"] = 48
    monkeypatch.setattr(tables, "PAPER", changed)
    printed = said(12, 1)
    assert "24.6 *24.744" in " ".join(printed.split()) and "* se=true: 24.6 M in the paper, 24.744 here: cause unknown\n" in printed
    assert "48, here *24" in printed and "* tnt_s: c 48 in the paper, 24 here: cause unknown\n" in printed


def test_the_lab_book_has_them_as_they_are_counted(whole):
    kept = PAGE.read_text()
    assert "\n".join(line.rstrip() for line in whole.strip().splitlines()) in kept, (
        "python -m tnt_lightning.tables prints the page's block anew (without spaces at the ends of lines)"
    )


# ---- runs

IMAGENET = ("data=imagenet", "data.root=/")


@pytest.fixture
def measured(tmp_path) -> Path:
    place = tmp_path / "runs"
    for seed, top1 in enumerate((81.0, 82.0, 81.6)):
        run(place / f"s{seed}", *IMAGENET, "model=tnt_s", seed=seed, top1=top1, test=False)
    run(place / "se", *IMAGENET, "model=tnt_s", "se=true", top1=81.72, test=False)
    run(place / "cut", *IMAGENET, "model=tnt_s", "se=true", seed=1, top1=None)
    run(place / "digits", top1=81.7)
    run(place / "subset", *IMAGENET, "model=tnt_s", "data.subset=true", top1=81.5, test=False)
    run(place / "small", *IMAGENET, "model=tnt_s", "image_size=192", top1=81.5, test=False)
    run(place / "deep", *IMAGENET, "model=tnt_s", "model.depth=13", top1=81.5, test=False)
    return place


def test_runs_of_a_rows_model_and_data_stand_beside_it_and_others_are_named(measured):
    printed = said(12, "--runs", measured)
    rows, remarks = read(printed)["12"]
    assert [(row["name"], row["top-1 here"], row["n"]) for row in rows] == [
        ("se=false", "81.53 ± 0.50", "3"),
        ("se=true", "81.72", "1 of 2"),
    ]
    assert remarks == []
    others = re.findall(r"^note   of no row here: (.*) \(.*/(\w+)\)$", printed, re.M)
    assert sorted(others) == [
        ("another model on imagenet at 224", "deep"), ("tnt_digits on digits at 8", "digits"),
        ("tnt_s on imagenet at 192", "small"), ("tnt_s on other data at 224", "subset"),
    ]  # fmt: skip
    assert re.search(r"^note   .*seed=1 unfinished", printed, re.M)
    assert "no runs are given" not in printed


def test_other_recipes_are_neither_averaged_nor_silent(tmp_path):
    run(tmp_path / "runs" / "whole", *IMAGENET, "model=tnt_s", top1=80.0, test=False)
    run(tmp_path / "runs" / "short", *IMAGENET, "model=tnt_s", "recipe.epochs=10", top1=81.5, test=False)
    run(tmp_path / "runs" / "released", *IMAGENET, "model=resnet50", "weights=released", top1=76.2, test=False)
    run(tmp_path / "runs" / "tuned", "data=cifar10", "data.root=/", "image_size=384", "recipe.epochs=64", "weights=released", top1=98.7)
    run(tmp_path / "runs" / "scratch", "data=pets", "data.root=/", "image_size=384", top1=94.0)
    found = read(said(4, 9, "--runs", tmp_path / "runs"))
    rows, remarks = found["4"]
    at = next(at for at, row in enumerate(rows) if row["name"] == "tnt_s")
    assert [(row["name"], row["top-1 here"]) for row in rows[at : at + 3]] == [
        ("tnt_s", ""), ("recipe.epochs=10", "*81.50"), ("recipe.epochs=300", "*80.00"),
    ]  # fmt: skip
    assert {line for line in remarks if "top-1" in line} == {
        "tnt_s: top-1 81.5 in the paper, 81.50 (n=1) here: another recipe, trainer.max_epochs=10 (300 in the paper)",
        "tnt_s: top-1 81.5 in the paper, 80.00 (n=1) here: cause unknown",
        "resnet50: top-1 76.2 in the paper, 76.20 (n=1) here: another recipe, weights=released (none in the paper)",
    }
    rows, remarks = found["9"]
    assert {(row["data"], row["top-1 here"]) for row in rows if row["top-1 here"]} == {("cifar10", "98.70"), ("pets", "*94.00")}
    assert [line.split(" here: ")[1] for line in remarks if "top-1" in line] == ["another recipe, weights=null (fine-tuned in the paper)"]


def test_without_runs_that_is_said(whole, tmp_path):
    assert whole.count("\nnote ") == 1 and "no runs are given, so no top-1 is measured here: --runs DIR" in whole
    run(tmp_path / "runs" / "digits")
    assert "note   none of the runs is of a row of these tables" in said(12, "--runs", tmp_path / "runs")


# ---- the command


@pytest.mark.parametrize("columns", [80, 100])
def test_a_row_is_a_line_on_a_terminal(columns, measured, whole, monkeypatch):
    run(measured / "short", *IMAGENET, "model=tnt_s", "recipe.epochs=10", top1=60.0, test=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    printed = said("--runs", measured)
    assert max(map(len, printed.splitlines())) <= columns
    for number, (rows, _) in read(whole).items():
        shown = printed.split(f"\nTable {number}:")[1].split("\nTable")[0]
        for row in rows:
            cells = [row["name"], *(row[head] for head in ("data", "M here", "GMAC here", "top-1 paper") if row.get(head))]
            assert re.search(rf"^ {' .*'.join(map(re.escape, cells))} ", shown, re.M), f"Table {number}, {row}"
    assert ("not in a terminal this narrow: M live" in printed) == (columns == 80)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["7"], "error: 7: no such table here; available: 1, 4, 5, 8, 9, 12\n"),
        (["4", "four"], "error: four: no such table here; available: 1, 4, 5, 8, 9, 12\n"),
        (["4", "--runs", "/nowhere"], "error: /nowhere: no such directory\n"),
    ],
)
def test_mistakes_are_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as ended:
        said(*arguments)
    assert ended.value.code == 2 and capsys.readouterr().err == line
