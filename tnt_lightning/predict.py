"""`python -m tnt_lightning.predict run=DIR FILES...`, or `model=... weights=... FILES...`: what a trained network sees in images.

Files, folders (all images in them) and patterns ('photos/**/*.jpg'). A file that cannot be read is named and left out; the exit code is
1 then, and 2 where nothing is found.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Column, Table

from tnt_lightning import runs, trees
from tnt_lightning.cli import Parser, answered, fail
from tnt_lightning.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tnt_lightning.trained import Trained

FORMATS = ("table", "jsonl", "csv")
VISIBLE = 224  # pixels that a picture of attention has at least, on its shorter side


class Prediction(NamedTuple):
    """The most probable classes of an image, the first one first: (label, name, probability from 0 to 1)."""

    file: str
    top: list[tuple[int, str, float]]


class Broken(NamedTuple):
    """A file that is no readable image."""

    file: str
    why: str


def main() -> None:
    parser = Parser(prog="python -m tnt_lightning.predict", description=__doc__)
    source = "run=DIR (a run, or a checkpoint in one); or model=NAME weights=SOURCE, and knobs of that model; then files, folders, patterns"
    parser.add_argument("words", metavar="KEY=VALUE|FILE", nargs="+", help=source)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes shown of an image, at most; by default 5")
    parser.add_argument("--format", choices=FORMATS, help="table, JSON lines or CSV; by default a table, or what FILE's name says")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines or CSV there; by default all goes to stdout")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time; by default 64")
    parser.add_argument("--attention", type=Path, metavar="DIR", help="also draw what the class token attends to (TNT), a PNG an image")
    arguments = parser.parse_intermixed_args()
    for name in ("top", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            fail(f"--{name.replace('_', '-')} {value}: at least 1")
    with answered():
        broken = _predict(arguments)
    if broken:
        raise SystemExit(1)


def _predict(arguments: Any) -> bool:
    """Whether any file was broken."""
    form = _format(arguments.format, arguments.out)
    from tnt_lightning import trained  # late, as torch is: mistakes above are answered at once

    keys, words = trained.split(arguments.words)
    files, named_none = trees.named(words)
    lost = [Broken(word, why) for word, why in named_none]
    if not files:
        raise UserError("; ".join(["no image found", *(f"{one.file}: {one.why}" for one in lost)]) if words else "no files named")
    network = trained.find(keys)
    if arguments.attention and not hasattr(network.model, "explain"):
        print(f"note   --attention: {type(network.model).__name__} has no explain(), nothing is drawn", file=sys.stderr)
        arguments.attention = None
    broken = [*lost]
    for nothing in lost:
        _say(nothing)
    shown: list[Prediction] = []
    lines: IO[str] = io.StringIO(newline="") if arguments.out else sys.stdout
    if form == "csv":
        lines.write(_csv([["file", "rank", "label", "class", "probability"]]))
    # A bar and lines that come one by one would write over each other.
    hidden = not sys.stderr.isatty() or (form != "table" and not arguments.out and sys.stdout.isatty())
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False, disable=hidden) as progress:
        seen = predict(network, files, top=arguments.top, batch_size=arguments.batch_size, attention=arguments.attention)
        for one in progress.track(seen, total=len(files), description="predict"):
            if isinstance(one, Broken):
                broken.append(one)
                _say(one)
            elif form == "table":
                shown.append(one)
            else:
                lines.write(_json(one) if form == "jsonl" else _csv(_rows(one)))
    if arguments.out:
        assert isinstance(lines, io.StringIO)
        _write(arguments.out, lines.getvalue())
    if shown:
        _print(shown)
    return bool(broken)


def _format(asked: str | None, out: Path | None) -> str:
    if out is None:
        return asked or "table"
    form = asked or out.suffix.removeprefix(".").lower()
    if form not in ("jsonl", "csv"):
        raise UserError(f"--out {out}: of the format jsonl or csv; name the file so, or add --format")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: {'a folder' if out.is_dir() else 'no such folder'}; name a file in a folder that is there")
    return form


def _say(broken: Broken) -> None:
    print(f"broken {one_line(broken.file)}: {one_line(broken.why)}", file=sys.stderr)


# ---- what is seen in them


def predict(
    trained: "Trained", files: Sequence[str], *, top: int = 5, batch_size: int = 64, attention: Path | None = None
) -> Iterator[Prediction | Broken]:
    """In the order of the files; on a GPU where there is one, in float32. Images are taken as a person sees them, turned as the camera
    says, and then prepared as evaluation does it.

    attention: a folder in which what the last block's class token attends to is drawn over each image (see `overlay`)
    """
    import torch

    from tnt_lightning.data.images import BrokenImage

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, data = trained.model.to(device), trained.data
    images, names = trained.images(files), _Names(attention)

    def read(index: int) -> "Tensor | Broken":
        try:
            item = images[index]
        except BrokenImage as error:
            return Broken(files[index], error.why)
        assert item is not None
        return item[0]

    def seen(pixels: "Tensor") -> "Iterator[tuple[list[tuple[int, str, float]], Image | None]]":
        inputs, _ = data.batch_transform(pixels.to(device), torch.zeros(len(pixels)), training=False)
        with torch.inference_mode():
            best = model(inputs).float().softmax(1).topk(min(top, data.num_classes))
            pictures = overlays(model, inputs, pixels) if attention else [None] * len(pixels)
        for labels, sure, picture in zip(best.indices.tolist(), best.values.tolist(), pictures, strict=True):
            yield [(label, trained.named(label), probability) for label, probability in zip(labels, sure, strict=True)], picture

    groups = [range(first, min(first + batch_size, len(files))) for first in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside the interpreter's lock
        coming = pool.map(read, groups[0]) if groups else iter(())
        for number, group in enumerate(groups):
            items = list(coming)
            coming = pool.map(read, groups[number + 1]) if number + 1 < len(groups) else iter(())
            whole = [item for item in items if not isinstance(item, Broken)]
            of_the_whole = seen(torch.stack(whole)) if whole else iter(())
            for index, item in zip(group, items, strict=True):
                if isinstance(item, Broken):
                    yield item
                    continue
                best, picture = next(of_the_whole)
                if picture is not None:
                    names.save(picture, files[index])
                yield Prediction(files[index], best)


def overlays(model: Any, inputs: "Tensor", pixels: "Tensor") -> "list[Image]":
    """Pictures of uint8 `pixels` (B, C, height, width), in red what the class token of the last block attends to (as in the paper's
    Figure 7), the mean over its heads, from its least to its largest value."""
    import torch.nn.functional as F
    from torchvision.transforms.v2.functional import to_pil_image

    from tnt_lightning.pictures.views import RED

    last = len(model.blocks)
    _, seen = model.explain(inputs, blocks=[last])
    attended = seen.outer[last].mean(1)[:, 0, 1:].float().cpu()  # (B, heads, 1+N, 1+N) -> (B, N)
    least, most = attended.amin(1, keepdim=True), attended.amax(1, keepdim=True)
    share = ((attended - least) / (most - least).clamp(min=1e-12)).reshape(len(pixels), 1, *model.grid_size)
    times = -(-VISIBLE // min(pixels.shape[2:]))
    large = pixels.float().expand(-1, 3, -1, -1).repeat_interleave(times, 2).repeat_interleave(times, 3)
    red = RED * F.interpolate(share, large.shape[2:], mode="bilinear")
    large = large * (1 - red)
    large[:, 0] += 255 * red[:, 0]
    return [to_pil_image(picture.round().byte()) for picture in large]


class _Names:
    """Pictures in a folder, called as the images that they are of; of several images of a name the later ones get a number."""

    def __init__(self, folder: Path | None):
        self.folder, self._taken = folder, set[str]()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unwritten(error) from None

    def save(self, picture: "Image", file: str) -> None:
        assert self.folder is not None
        stem, number = Path(file).stem, 1
        name = stem
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name)
        try:
            picture.save(self.folder / f"{name}.png")
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"--attention {self.folder}: cannot be written ({error.strerror or error}); choose another folder")


# ---- how it is said


def _rows(one: Prediction) -> list[list[Any]]:
    return [[one.file, rank, label, name, f"{share:.6f}"] for rank, (label, name, share) in enumerate(one.top, start=1)]


def _csv(rows: list[list[Any]]) -> str:
    content = io.StringIO(newline="")
    csv.writer(content, lineterminator="\n").writerows(rows)
    return content.getvalue().encode(errors="backslashreplace").decode()  # a file's name need not be text


def _json(one: Prediction) -> str:
    top = [{"label": label, "class": name, "probability": round(share, 6)} for label, name, share in one.top]
    return f"{json.dumps({'file': one.file, 'top': top})}\n"


def _write(file: Path, text: str) -> None:
    try:
        runs.write(file, text)
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written ({error.strerror or error}); choose another") from None


def _print(shown: Sequence[Prediction]) -> None:
    table = Table(Column("file", overflow="fold"), Column("class", overflow="fold"), Column("%", justify="right", no_wrap=True))
    for one in shown:
        for rank, (_, name, share) in enumerate(one.top):
            table.add_row("" if rank else escape(one_line(one.file)), escape(one_line(name)), f"{100 * share:.1f}")
        table.add_section()
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(table)  # into a file or a pipe all of it goes


if __name__ == "__main__":
    main()
