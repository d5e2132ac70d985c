"""`python experiments/planning/plan.py` prints the tables of the README.md beside it: from the code's own counts, measured figures of
this lab book, and the assumptions that stand here in capitals. Nothing is measured."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from tnt_lightning.data import ImageNet, INaturalist
from tnt_lightning.models import create_model
from tnt_lightning.models.cost import flops, parameters

HERE = Path(__file__).parent
BATCH = 1024  # of all GPUs: conf/recipe/imagenet.yaml
PEAK = 989e12  # floating-point operations/s of an H100 SXM in bfloat16, without sparsity (NVIDIA's table; README.md says where it was read)
SHARES = (0.03, 0.1, 0.3)  # of it that training may reach: ASSUMED
GPUS = (8, 64)
NODE = 8  # GPUs of a node: ASSUMED
DAY_S = 24 * 3600  # in which a run is to be done: ASSUMED
REDUCING = 0.1  # of a step that the reduction of gradients may take: ASSUMED
STATE = {"weights": 4, "gradients": 4, "AdamW's two moments": 8, "average": 4}  # bytes a parameter on a GPU, float32
STORED = sum(STATE.values()) - STATE["gradients"]  # in a checkpoint
WORKERS, AHEAD = 8, 2  # loader processes a GPU (conf/data/_shared.yaml), and batches that each holds ready (torch's default)


class Data(NamedTuple):
    name: str
    train: int
    val: int
    classes: int
    photos: str  # whose size is nearest, of those that were measured in data_speed


class Plan(NamedTuple):
    data: Data
    size: int
    epochs: int

    @property
    def steps(self) -> int:
        return self.data.train // BATCH * self.epochs

    @property
    def name(self) -> str:
        return f"{self.data.name}, {self.size}, {self.epochs} epochs"


def data_sets() -> list[Data]:
    found = [Data("ImageNet-1k", *ImageNet.official.values(), ImageNet.classes, "500x375")]
    for year in (2018, 2019):
        inat = INaturalist(year=year)
        found.append(Data(f"iNat {year}", *inat.official.values(), inat.num_classes, "800x600"))
    return found


def plans() -> list[Plan]:
    """At 224 by the recipe; at 384 the fine-tuning: 25 epochs on ImageNet (DeiT's), 300 on iNat (the paper's of iNat 2019)."""
    return [Plan(data, *how) for data in data_sets() for how in ((224, 300), (384, 25 if "ImageNet" in data.name else 300))]


def operations(name: str, plan: Plan) -> tuple[int, int, float]:
    """(parameters, multiply-accumulates an image, floating-point operations of the run: two each, thrice the forward pass)."""
    with torch.device("meta"):
        model = create_model(name, num_classes=plan.data.classes, image_size=plan.size)
    macs = flops(model, (3, plan.size, plan.size))
    return parameters(model).live, macs, 6.0 * macs * plan.steps * BATCH


def gigabytes(data: Data) -> float:
    """Of its files, as the table of data sets in docs/data.md has it."""
    key = {"ImageNet-1k": "imagenet", "iNat 2018": "inat2018", "iNat 2019": "inat2019"}[data.name]
    row = re.search(rf"^\| `{key}` \|.*? (\d+) GB", (HERE.parents[1] / "docs" / "data.md").read_text(), re.M)
    assert row is not None
    return float(row[1])


def images_a_core(photos: str) -> float:
    """Measured in experiments/data_speed: our loader, one core, the ImageNet recipe at 224."""
    rows = json.loads((HERE.parent / "data_speed" / "results.json").read_text())["rows"]
    want = {"what": "loader", "name": "ours", "size": photos, "num_workers": 0}
    return next(row["images_per_s"]["p50"] for row in rows if want.items() <= row.items())


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head), *[[str(cell) for cell in row] for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tables() -> dict[str, str]:
    runs = [(name, plan, *operations(name, plan)) for name in ("tnt_s", "tnt_b") for plan in plans()]
    need = [(plan, plan.steps * BATCH / DAY_S) for plan in plans()]
    recipe = need[0][1] / BATCH  # steps/s of ImageNet at 224 in a day
    weights = {name: count for name, plan, count, _, _ in runs if plan.name == need[0][0].name}
    ring = {(name, n): 2 * (n - 1) / n * count for name, count in weights.items() for n in GPUS}
    return {
        "what a run computes": table(
            ("model", "run", "parameters, M", "GMAC an image", "steps", "operations"),
            [
                (name, plan.name, f"{count / 1e6:.2f}", f"{macs / 1e9:.2f}", f"{plan.steps:,}", f"{total:.2e}")
                for name, plan, count, macs, total in runs
            ],
        ),
        "hours": table(
            ("model", "run", *(f"{n} GPUs at {share:.0%}" for n in GPUS for share in SHARES)),
            [
                (name, plan.name, *(short(total / (n * PEAK * share) / 3600) for n in GPUS for share in SHARES))
                for name, plan, _, _, total in runs
            ],
        ),
        "what a GPU takes": table(
            ("model", "size", *(f"images/s at {share:.0%}" for share in SHARES), *(f"loader cores at {share:.0%}" for share in SHARES)),
            [
                (
                    name,
                    plan.size,
                    *map(short, speeds := [PEAK * share / (6 * macs) for share in SHARES]),
                    *(short(speed / images_a_core(plan.data.photos)) for speed in speeds),
                )
                for name, plan, _, macs, _ in runs
                if plan.data.name == need[0][0].data.name
            ],
        ),
        "to be done in a day": table(
            ("run", "images/s", "a GPU of 8", "of 64", "loader cores", "a node of 8", "from storage, MB/s", "to the GPUs, MB/s"),
            [
                (
                    plan.name,
                    short(speed),
                    *(short(speed / n) for n in GPUS),
                    short(cores := speed / images_a_core(plan.data.photos)),
                    short(cores / (GPUS[1] / NODE)),
                    short(speed * gigabytes(plan.data) * 1e3 / (plan.data.train + plan.data.val)),
                    short(speed * 3 * plan.size**2 / 1e6),
                )
                for plan, speed in need
            ],
        ),
        "gradients": table(
            ("model", "GPUs", "MB a step and GPU, float32", "bfloat16", "Gbit/s out of a node, float32", "bfloat16"),
            [
                (
                    name,
                    n,
                    *(short(numbers * size / 1e6) for size in (4, 2)),
                    *(short(numbers * size * 8 / 1e9 * recipe / REDUCING) if n > NODE else "none leaves it" for size in (4, 2)),
                )
                for (name, n), numbers in ring.items()
            ],
        ),
        "memory and disk": table(
            ("model", "on each GPU, GB", "a checkpoint, GB", "the three of a run, GB"),
            [(name, *(short(count * size / 1e9) for size in (sum(STATE.values()), STORED, 3 * STORED))) for name, count in weights.items()],
        ),
        "data on a node": table(
            ("data", "files, GB", "decoded, GB a GPU", "batches in /dev/shm at 224, GB", "at 384"),
            [
                (
                    data.name,
                    short(gigabytes(data)),
                    short(3 * math.prod(map(int, data.photos.split("x"))) * data.train / 1e9),
                    *(short(NODE * WORKERS * AHEAD * BATCH / NODE * 3 * size**2 / 1e9) for size in (224, 384)),
                )
                for data in data_sets()
            ],
        ),
    }


if __name__ == "__main__":
    for title, text in tables().items():
        print(f"## {title}\n\n{text}\n")
