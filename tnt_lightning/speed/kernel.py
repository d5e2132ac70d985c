"""How fast the inner block is, by itself: eager, by torch.compile, and fused, beside what the device can do."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timm.layers import DropPath

from tnt_lightning.errors import UserError
from tnt_lightning.models import build_model
from tnt_lightning.models.tnt import TNTBlock, TransformerBlock
from tnt_lightning.speed.model import TURN_S, Machine, machine
from tnt_lightning.speed.rows import Ceilings, Row, ceilings, in_turn, in_words, percentiles, ratios

UNIT = "times as fast as eager"


def measure(config: dict[str, Any]) -> list[Row]:
    """A row for each way and phase, of the first inner block of the model: inference, and forward and backward pass."""
    here, console = machine(config), Console()
    on_gpu = here.clock.device.type == "cuda"
    torch.manual_seed(config["seed"])
    model = build_model(**config["model"])
    block = next((block.inner for block in model.modules() if isinstance(block, TNTBlock)), None)
    if block is None:
        raise UserError(f"model={config['choices']['model']}: has no inner transformer to measure")
    if rate := config["recipe"]["drop_path_rate"]:  # the first block's is 0
        block.drop_path = DropPath(rate)
    words, dim = config["model"]["words_per_patch"], block.norm1.normalized_shape[0]
    patches = config["patches"] or (256 * 196 if on_gpu else 196)
    shape, hidden = (patches, words, dim), block.mlp.fc1.weight.shape[0]
    best, ways = ceilings(here.clock, here.dtype), contestants(block, here, config["compiled"])
    block.to(here.clock.device)
    times: dict[str, dict[str, list[float]]] = {"inference": {}, "training": {}}
    with Progress(console=console, transient=True) as progress:
        turns = {
            (phase, name): _turn(way, phase, torch.randn(shape, device=here.clock.device, dtype=here.dtype), block, here)
            for phase in times
            for name, way in ways.items()
        }
        for call in progress.track(list(turns.values()), description="warm-up, and compilation"):
            for _ in range(3):
                call()
        calls = {key: max(1, round(TURN_S / here.clock.seconds(call))) if on_gpu else 3 for key, call in turns.items()}
        for phase, by_name in times.items():
            by_name |= {name: [] for name in ways}
            for turn in progress.track(range(config["rounds"]), description=phase):
                for name in in_turn(list(ways), turn):
                    by_name[name].append(here.clock.seconds(turns[phase, name], calls[phase, name]))
    # Of the words alone, each read and written once, and of the products alone: what no implementation can do without.
    moved = {"inference": 2, "training": 5}  # the forward pass reads and writes; the backward one reads words and gradient, and writes
    products = patches * (words * dim * (4 * dim + 2 * hidden) + 2 * words**2 * dim)
    bytes_moved, by_phase = patches * words * dim * here.dtype.itemsize, {"inference": 1, "training": 3}
    rows: list[Row] = [
        {
            "what": "kernel",
            "phase": phase,
            "name": name,
            "ratio": ratios(taken, times[phase]["eager"]),
            "ms": percentiles([1e3 * s for s in taken]),
            "of_the_copy": percentiles([moved[phase] * bytes_moved / s / best.bytes for s in taken]),
            "of_the_product": percentiles([by_phase[phase] * products / s / best.flops for s in taken]),
            "shape": list(shape),
            "inner_heads": block.attn.num_heads,
            "precision": here.precision,
            "tf32": config["compute"]["tf32"],
            "threads": config["threads"],
            "clock": here.clock.name,
            "ceiling_tmac_per_s": float(f"{best.flops / 1e12:.4g}"),
            "ceiling_tb_per_s": float(f"{best.bytes / 1e12:.4g}"),
            "n": config["rounds"],
        }
        for phase, by_name in times.items()
        for name, taken in by_name.items()
    ]
    show(rows, best, console)
    if not on_gpu:
        console.print("the fused kernels are for NVIDIA's GPUs, and left out here")
    return rows


def contestants(block: TransformerBlock, here: Machine, compiled: bool | None) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Eager first; fused where the kernels run here."""

    def by(kernel: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(words: torch.Tensor) -> torch.Tensor:
            block.kernel = kernel
            return block(words)

        return call

    on_gpu = here.clock.device.type == "cuda"
    ways = {"eager": by("eager")}
    if on_gpu if compiled is None else compiled:
        ways["compiled"] = torch.compile(by("eager"))
    if on_gpu:
        ways["fused"] = by("triton")
    return ways


def _turn(
    way: Callable[[torch.Tensor], torch.Tensor], phase: str, words: torch.Tensor, block: TransformerBlock, here: Machine
) -> Callable[[], None]:
    def infer() -> None:
        block.eval()
        with torch.no_grad(), here.autocast():
            way(words)

    gradient, inputs = torch.randn_like(words), words.clone().requires_grad_()

    def train() -> None:
        block.train()
        with here.autocast():
            out = way(inputs)
        torch.autograd.grad(out, [inputs, *block.parameters()], gradient.to(out.dtype))

    return infer if phase == "inference" else train


def show(rows: list[Row], best: Ceilings, console: Console) -> None:
    patches, words, dim = rows[0]["shape"]
    sizes = f"{patches:,} patches of {words} words of {dim}, {rows[0]['inner_heads']} heads"
    sizes = f"{patches:,} patches of {words} words of {dim}, {rows[0]['inner_heads']} heads"
    title = f"inner block, {sizes}, {rows[0]['precision']}: p50 (p20 to p80)"
    table = Table("phase", "way", "speed / eager", "ms", "of a copy", "of a product", title=title, title_justify="left")
    for row in rows:
        shares = (f"{row[key]['p50']:.0%}" for key in ("of_the_copy", "of_the_product"))
        table.add_row(row["phase"], row["name"], in_words(row["ratio"], ".2f"), in_words(row["ms"], ".3g"), *shares)
    console.print(table)
    console.print(
        f"of a copy: the least traffic, of {best.bytes / 1e12:.3g} TB/s here; of a product: the block's matrix products, of "
        f"{best.flops / 1e12:.3g} T multiply-accumulates a second here"
    )


def bars(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        found.setdefault(row["phase"], {})[row["name"]] = row["ratio"]
    return found
