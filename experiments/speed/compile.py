"""What ptxas makes of the fused kernels, without a GPU: registers, spills, shared memory and instructions, into compile.csv.

python experiments/speed/compile.py          # five minutes; the table beside this file
"""

import contextlib
import csv
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tnt_lightning.kernels import inner_triton
from tnt_lightning.kernels.inner_triton import KERNELS, Shape, compiled

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have: A100, H100 (CUDA C++ Programming Guide, compute capabilities)
LEAST = 99 * 1024  # of GPUs from Ampere on: the consumers' ones
NETWORKS = {  # words a patch, channels, heads
    "TNT-Ti": (16, 12, 2), "TNT-S": (16, 24, 4), "TNT-B": (16, 40, 4), "TNT-S, m=64": (64, 6, 2), "TNT-S, m=4": (4, 96, 4),

}  # fmt: skip
COUNTED = ("HGMMA", "HMMA", "MUFU", "SHFL", "BAR", "LDS", "STS", "LDL", "STL")  # tensor cores, functions, shuffles, barriers, memory


class Absent:
    """Stands where Triton expects the driver of a GPU, of which it asks no more than which one it is."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def as_if_on(architecture: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(Absent(architecture))
    try:
        yield
    finally:
        driver.set_active(before)


def shape_of(network: str, dtype: torch.dtype) -> Shape:
    m, c, heads = NETWORKS[network]
    return Shape(m, c, 4 * c, heads, 1e-5, dtype)


def measured(kernel: Any, shape: Shape, architecture: int) -> list[dict[str, Any]]:
    """Of each launch of a kernel in training, with words and parameters in float32.

    part: the gradients that it is for, where that is not all; spilled: bytes of the stack, which is registers that did not fit
    """
    with as_if_on(architecture):
        built = compiled(kernel, shape, torch.float32, torch.float32)
    names = ("",) if len(built) == 1 else ("words", "weights")
    return [
        {"kernel": kernel.__name__, "part": name, **_resources(kernel, shape, architecture, one)}
        for name, one in zip(names, built, strict=True)
    ]


def _resources(kernel: Any, shape: Shape, architecture: int, built: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage.split(kernel.__name__)[-1]))
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE))
    launch = inner_triton.LAUNCHES[kernel.__name__][shape.padded]
    return {
        "tile": max(launch.tile, 16, shape.num_words),
        "warps": launch.num_warps,
        "registers": int(resources["REG"]),
        "spilled": int(resources["STACK"]),
        "shared": built.metadata.shared,
        "fits": "yes" if built.metadata.shared <= SHARED[architecture] else "no",
        "instructions": instructions.total(),
        **{name: instructions[name] for name in COUNTED},
    }


def main() -> None:
    with (Path(__file__).parent / "compile.csv").open("w", newline="") as file:
        file.write(
            f"# Triton {triton.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}; bytes; no GPU was at hand\n"
        )
        writer, named = csv.writer(file), False
        for architecture, network in itertools.product(SHARED, NETWORKS):
            for dtype in (torch.bfloat16, torch.float16, torch.float32) if network == "TNT-S" else (torch.bfloat16,):
                for kernel in KERNELS:
                    for found in measured(kernel, shape_of(network, dtype), architecture):
                        row = {"sm": architecture, "network": network, "products": str(dtype).removeprefix("torch."), **found}
                        if not named:
                            writer.writerow(row)
                            named = True
                        writer.writerow(row.values())
                        file.flush()
                        print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
