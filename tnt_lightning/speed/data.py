"""How fast images are loaded, beside timm's loader, and where the time of an image goes."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnt_lightning.speed.rows import Row, in_turn, in_words, percentiles

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from rich.progress import Progress
    from torch.utils.data import DataLoader

    from tnt_lightning.data import ImageNet

# What conf/recipe/imagenet.yaml does per image.
RECIPE: dict[str, Any] = {"crop_scale": [0.08, 1.0], "hflip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"}


UNIT = "times as fast as timm's"


def measure(config: dict[str, Any]) -> list[Row]:
    """Rows of loaders (num_workers 0: by CPU time, so images/s of one core; with workers: by the clock) and of the split of the time."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    torch.set_num_threads(1)
    data, rounds, console = config["data"], config["rounds"], Console()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        for size in data["sizes"]:
            root = Path(folder) / size
            for _ in progress.track(make_photos(root, size, data["images"], config["seed"]), data["images"], description=f"{size}: photos"):
                pass
            for workers in sorted({0, data["num_workers"]}):
                loaders = contestants(root, data, workers, larger=min(pixels(size)) >= 2 * data["image_size"])
                times: dict[str, list[float]] = {name: [] for name in loaders}
                for turn in progress.track(range(-1, rounds), description=f"{size}: {workers} workers"):
                    for name in in_turn(list(loaders), turn):
                        spent = seconds(loaders[name], time.perf_counter if workers else time.process_time)
                        if turn >= 0:  # the first starts workers and warms caches
                            times[name].append(spent)
                count = data["images"] // data["batch_size"] * data["batch_size"]
                rows += [loader_row(name, times, size=size, num_workers=workers, images=count) for name in times]
                del loaders  # their workers too
            rows += split(root, size, config, progress)
    show_data(rows, console)
    return rows


def contestants(root: Path, data: dict[str, Any], workers: int, *, larger: bool) -> dict[str, "DataLoader"]:
    """timm first; what is not to the bit after what is. Only larger photos have crops that are decoded at a half."""
    exact = {
        "timm": timms_loader(root, data, workers),
        "ours": ours(root, data, workers).train_dataloader(),
        "ours, data.cache=true": ours(root, data, workers, cache=True).train_dataloader(),
    }
    if workers:
        return exact
    options = [("fast_resize",), *([("dct_scaling",), ("fast_resize", "dct_scaling")] if larger else [])]
    return exact | {f"ours, {' and '.join(names)}": ours(root, data, workers, names).train_dataloader() for names in options}


def ours(root: Path, data: dict[str, Any], workers: int, options: Sequence[str] = (), *, cache: bool = False) -> "ImageNet":
    from tnt_lightning.data import ImageNet

    module = ImageNet(
        root=str(root),
        num_classes=1,
        subset=True,
        cache=cache,
        image_size=data["image_size"],
        batch_size=data["batch_size"],
        num_workers=workers,
        augmentation=RECIPE | dict.fromkeys(options, True),
    )
    module.setup()
    return module


def timms_loader(root: Path, data: dict[str, Any], workers: int) -> "DataLoader":
    """timm's at its best: the uint8 batches that its prefetcher would send to a GPU. Its policy asks Pillow 13 for what that refuses."""
    import torch
    from timm.data import ImageDataset, create_loader
    from timm.data.auto_augment import posterize

    from tnt_lightning.data.augment import safe_posterize

    loader = create_loader(
        ImageDataset(str(root / "train")),
        input_size=(3, data["image_size"], data["image_size"]),
        batch_size=data["batch_size"],
        is_training=True,
        scale=RECIPE["crop_scale"],
        hflip=RECIPE["hflip"],
        auto_augment=RECIPE["rand_augment"],
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_workers=workers,
        use_prefetcher=True,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
    ).loader
    for op in loader.dataset.transform.transforms[2].ops:
        if op.aug_fn is posterize:
            op.aug_fn = safe_posterize
    return loader


def seconds(loader: "DataLoader", clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in loader:
        pass
    return clock() - begin


def loader_row(name: str, times: dict[str, list[float]], *, images: int, **where: Any) -> Row:
    return {
        "what": "loader",
        "name": name,
        **where,
        "clock": "wall" if where["num_workers"] else "cpu",
        "ratio": percentiles([theirs / mine for theirs, mine in zip(times["timm"], times[name], strict=True)]),
        "images_per_s": percentiles([images / spent for spent in times[name]]),
        "images": images,
        "n": len(times[name]),
    }


def split(root: Path, size: str, config: dict[str, Any], progress: "Progress") -> list[Row]:
    """CPU milliseconds an image of each step, of timm and of ours, for the same draws. Seeding and Python's own loop are not in it."""
    import numpy as np
    import torch
    from PIL import Image

    data = config["data"]
    theirs, mine = timms_loader(root, data, 0), ours(root, data, 0).train_dataloader()
    dataset: Any = mine.dataset
    train, (crop, *rest) = dataset.split, dataset.transform.transforms
    theirs_transform = theirs.dataset.transform.transforms  # type: ignore[attr-defined]
    names = ("decode", "crop", "flip", "RandAugment", "to tensor")
    steps: dict[str, list[Callable]] = {
        "timm": [lambda i: Image.open(train.path(i)).convert("RGB"), *theirs_transform],
        "ours": [lambda i: crop.cut(train[i][0]), crop.resized, *rest],
    }
    collates = {"timm": theirs.collate_fn, "ours": mine.collate_fn}
    times = {who: {name: [0.0] * config["rounds"] for name in (*names, "collate")} for who in steps}
    for turn in progress.track(range(config["rounds"]), description=f"{size}: split"):
        for who in in_turn(list(steps), turn):
            batch = []
            for i in range(data["images"]):
                for seed in (random.seed, np.random.seed, torch.default_generator.manual_seed):
                    seed(config["seed"] + turn * data["images"] + i)
                item: Any = i
                for name, step in zip(names, steps[who], strict=True):
                    begin = time.process_time()
                    item = step(item)
                    times[who][name][turn] += time.process_time() - begin
                batch.append((item, 0))
                if len(batch) == data["batch_size"] or i == data["images"] - 1:
                    begin = time.process_time()
                    collates[who](batch)
                    times[who]["collate"][turn] += time.process_time() - begin
                    batch = []
    return [
        {
            "what": "split",
            "name": name,
            "size": size,
            "ratio": percentiles([a / max(b, 1e-9) for a, b in zip(times["timm"][name], times["ours"][name], strict=True)]),
            **{f"{who}_ms": percentiles([1e3 * spent / data["images"] for spent in times[who][name]]) for who in steps},
            "images": data["images"],
            "n": config["rounds"],
        }
        for name in (*names, "collate")
    ]


def show_data(rows: list[Row], console: Any) -> None:
    from rich.table import Table

    loaders = Table("photos", "workers", "loader", "speed / timm's", "images/s", title="p50 (p20 to p80) over the rounds")
    for row in rows:
        if row["what"] == "loader":
            workers = str(row["num_workers"]) if row["num_workers"] else "0: one core"
            loaders.add_row(row["size"], workers, row["name"], in_words(row["ratio"], ".2f"), in_words(row["images_per_s"], ".0f"))
    console.print(loaders)
    steps = Table("photos", "step", "speed / timm's", "ours, ms", "timm, ms", title="CPU milliseconds an image")
    for row in rows:
        if row["what"] == "split":
            both = (in_words(row[f"{who}_ms"], ".2f") for who in ("ours", "timm"))
            steps.add_row(row["size"], row["name"], in_words(row["ratio"], ".2f"), *both)
    console.print(steps)


def pixels(size: str) -> tuple[int, int]:
    width, _, height = str(size).partition("x")
    return int(width), int(height)


def make_photos(root: Path, size: str, count: int, seed: int) -> Iterator[int]:
    """root/train/photos/*.jpg and one of root/val/photos, as they are made."""
    import numpy as np

    for part, number in (("val", 1), ("train", count)):
        folder = root / part / "photos"
        folder.mkdir(parents=True)
        for i in range(number):
            photo(pixels(size), np.random.default_rng((seed, i))).save(folder / f"{i}.jpg", quality=95, subsampling="4:2:0")
            if part == "train":
                yield i


def photo(size: tuple[int, int], rng: "np.random.Generator") -> "Image.Image":
    """What costs a decoder as much as a photo does: things of one colour before each other (edges), texture whose amplitude falls with
    the frequency (1/f) and is stronger here than there, and a camera's noise. About 100 kB for 500x375.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def texture(falloff: float) -> np.ndarray:
        waves = rng.standard_normal((*frequency.shape, 2)) @ [1, 1j] / frequency**falloff
        values = np.fft.irfft2(waves, s=(height, width))
        return values / values.std()

    things = Image.new("RGB", (2 * width, 2 * height), tuple(rng.integers(40, 216, 3).tolist()))
    draw = ImageDraw.Draw(things)
    for _ in range(120):
        x, y, radius = rng.uniform(0, 2 * width), rng.uniform(0, 2 * height), 6 + 0.07 * min(size) * rng.pareto(1.5)
        tall = radius * rng.uniform(0.4, 1)
        colour = np.clip(rng.normal(120, 50) + rng.normal(0, 25, 3), 0, 255).astype(int)
        draw.ellipse((x - radius, y - tall, x + radius, y + tall), fill=tuple(colour.tolist()))
    light = np.asarray(things.resize(size, Image.Resampling.BOX), dtype=float)
    light += (texture(1) * np.clip(14 + 12 * texture(2), 1, 50))[..., None]
    light += np.stack([5 * texture(1.4) for _ in range(3)], axis=-1) + rng.normal(0, 2, (height, width, 1))
    return Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))


def bars(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """For the picture: how fast the loaders are beside timm's, by photos and workers."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["what"] == "loader" and row["name"] != "timm":
            workers = f"{row['num_workers']} workers" if row["num_workers"] else "one core"
            found.setdefault(f"{row['size']}, {workers}", {})[row["name"]] = row["ratio"]
    return found
