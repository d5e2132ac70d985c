"""What every measurement of speed shares: contestants in turn, ratios of the same round, rows with p20, p50 and p80, a picture of them."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    import numpy as np

    return dict(zip(("p20", "p50", "p80"), (float(f"{x:.4g}") for x in np.percentile(values, (20, 50, 80))), strict=True))


def ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """How many times as fast: seconds `to`, over seconds `of` in the same round."""
    return percentiles([theirs / mine for mine, theirs in zip(of, to, strict=True)])


def in_words(figure: dict[str, float] | None, digits: str) -> str:
    return "" if figure is None else f"{figure['p50']:{digits}} ({figure['p20']:{digits}} to {figure['p80']:{digits}})"


def in_turn(names: list[str], turn: int) -> list[str]:
    """Another one begins each round."""
    first = turn % len(names)
    return names[first:] + names[:first]


class Clock(NamedTuple):
    """Seconds: "cpu", of this process on a processor, which other work does not change; or "wall", when the device is done."""

    device: "torch.device"
    name: str

    def now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return self.raw()

    def raw(self) -> float:
        """Without waiting for the device."""
        return time.process_time() if self.name == "cpu" else time.perf_counter()

    def seconds(self, call: Callable[[], Any], times: int = 1) -> float:
        """Of one call, on average."""
        begin = self.now()
        for _ in range(times):
            call()
        return (self.now() - begin) / times


class Ceilings(NamedTuple):
    """What the device reaches on large tensors, measured: FLOPs (multiply-accumulates) and bytes a second."""

    flops: float
    bytes: float


def ceilings(clock: Clock, dtype: "torch.dtype") -> Ceilings:
    """Of a square matrix product, and of a copy, which reads and writes each byte."""
    import torch

    on_gpu = clock.device.type == "cuda"
    side, count = (8192, 2**28) if on_gpu else (1024, 2**24)
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    source = torch.empty(count, dtype=torch.float32, device=clock.device).fill_(1)
    target = torch.empty_like(source)
    for call in (lambda: a @ b, lambda: target.copy_(source)):
        clock.seconds(call, 3)  # warm
    product = min(clock.seconds(lambda: a @ b, 10 if on_gpu else 1) for _ in range(5))
    copy = min(clock.seconds(lambda: target.copy_(source), 10 if on_gpu else 1) for _ in range(5))
    return Ceilings(flops=side**3 / product, bytes=2 * 4 * count / copy)


def draw(file: Path, title: str, bars: dict[str, dict[str, dict[str, float]]], unit: str) -> bool:
    """Bars of p50 with p20 to p80, by group and name: file.png and file.svg. False where matplotlib is missing."""
    try:
        os.environ.setdefault("MPLBACKEND", "Agg")
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    figure = Figure(figsize=(9, 1.2 + 0.32 * sum(map(len, bars.values())) + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    place, ticks, labels = 0.0, [], []
    for group, values in bars.items():
        axes.text(0, place - 0.15, f" {group}", va="bottom", fontweight="bold", fontsize=9)
        place += 0.6
        for name, value in values.items():
            spread = [[value["p50"] - value["p20"]], [value["p80"] - value["p50"]]]
            axes.barh(place, value["p50"], height=0.75, color=f"C{names.index(name) % 10}", xerr=spread, error_kw={"ecolor": "0.3"})
            axes.text(value["p80"], place, f"  {value['p50']:.3g}", va="center", fontsize=8)
            ticks.append(place)
            labels.append(name)
            place += 1
        place += 0.6
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for ending in ("png", "svg"):
        figure.savefig(file.with_suffix(f".{ending}"), dpi=150)
    return True
