"""`python -m tnt_lightning.benchmark WHAT`: how fast things are on this machine, side by side with what others use.

Machines share their cores and change their clocks: contestants take turns within a round, and what counts is the ratio of two times of
the same round.
"""

import json
import platform
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tnt_lightning import CONF
from tnt_lightning import config as configuration
from tnt_lightning.cli import command, fail
from tnt_lightning.errors import UserError, did_you_mean
from tnt_lightning.schema import FLAG, NULL, TEXT, Kind, several_of, whole

SIZES = Kind(
    "a list of sizes like 500x375, from 16x16 up",
    lambda v: isinstance(v, list) and v != [] and all(re.fullmatch(r"\d+x\d+", str(s)) and min(map(int, s.split("x"))) >= 16 for s in v),
)
KINDS = {  # of what the measurements have beside the keys of training
    "out": TEXT | NULL,
    "seed": whole(0, 2**32 - 1),
    "rounds": whole(1),
    "threads": whole(1),
    "images": whole(1) | NULL,
    "beside": several_of("models"),
    "compiled": FLAG | NULL,
    "steps": whole(1),
    "patches": whole(1) | NULL,
}
OF_DATA = {
    "data.images": whole(1),
    "data.sizes": SIZES,
    "data.batch_size": whole(1),
    "data.num_workers": whole(0),
    "data.image_size": whole(1),
}


def main() -> None:
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first.startswith("-"):  # --help, --cfg job and the like
        return overview()
    if first not in MEASURES:
        fail(f"{first or 'nothing'}: name what to measure first: {', '.join(MEASURES)}; such as python -m tnt_lightning.benchmark model")
    del sys.argv[1]
    return MEASURES[first]()


@command("benchmark")
def overview(config: DictConfig) -> None:
    raise UserError(f"name what to measure first: {', '.join(MEASURES)}; such as python -m tnt_lightning.benchmark model")


@command("benchmark_data")
def data(config: DictConfig) -> None:
    plain: Any = OmegaConf.to_container(config)
    flat = dict(configuration.flat(plain))
    _check(flat, {name: kind for name, kind in (KINDS | OF_DATA).items() if name in flat or name.startswith("data.")})
    if plain["data"]["batch_size"] > plain["data"]["images"]:
        raise UserError(f"data.batch_size={plain['data']['batch_size']} is larger than data.images={plain['data']['images']}; lower it")
    _measure("data", plain)


def _beside_training(what: str) -> Callable[[], None]:
    """Of a measurement that takes the keys of training, and a few of its own."""
    name = f"benchmark_{what}"

    def task(config: DictConfig) -> None:
        own = [key for key in map(str, OmegaConf.load(CONF / f"{name}.yaml")) if key in KINDS and key != "seed"]
        kept: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, own))
        _check(kept, KINDS)
        choices = HydraConfig.get().runtime.choices
        of_training = OmegaConf.masked_copy(config, [str(key) for key in config if key not in own])
        configuration.check(of_training, choices["model"])
        _measure(what, {**configuration.plain(of_training), **kept, "choices": dict(choices)})

    return command(name)(task)


def _check(values: dict[str, Any], kinds: dict[str, Kind]) -> None:
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"{key}={value}: no such key{did_you_mean(key, kinds, '--cfg job shows them all')}")
        if not kinds[key].fits(value):
            raise UserError(f"{key}={value}: expected {kinds[key].words}")


def _measure(what: str, config: dict[str, Any]) -> None:
    from tnt_lightning import runs  # late: torch takes seconds to import
    from tnt_lightning.speed.rows import draw

    out = None if config["out"] is None else Path(config["out"]).expanduser()
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            runs.probe(out)
        except OSError as error:
            raise UserError(f"out={out}: cannot be written to ({error.strerror}); choose another folder") from None
    measure: Any = import_module(f"tnt_lightning.speed.{what}")
    rows = measure.measure(config)
    if out is None:
        return
    file = out / f"benchmark_{what}.json"
    kept = {name: value for name, value in config.items() if name not in ("choices", "out")}
    origin = runs.origin()
    runs.write(file, json.dumps({"config": kept, "cpu": cpu(), **origin, "rows": rows}, indent=1) + "\n")
    print(f"rows    {file}")
    device = cpu() if origin["device"] == (platform.processor() or platform.machine()) else origin["device"]
    title = f"benchmark {what}: {device}, torch {origin['versions']['torch']}, p50 (p20 to p80)"
    if draw(file, title, measure.bars(rows), measure.UNIT):
        print(f"picture {file.with_suffix('.png')}, .svg")
    else:
        print("picture not drawn: pip install matplotlib, or '.[figures]'")


def cpu() -> str:
    """The processor's name, where Linux tells it."""
    try:
        return next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


MEASURES: dict[str, Callable[[], None]] = {
    "model": _beside_training("model"),
    "kernel": _beside_training("kernel"),
    "data": data,
    "train": _beside_training("train"),
}

if __name__ == "__main__":
    main()
