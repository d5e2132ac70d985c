"""`python -m tnt_lightning.prepare data=... out=DIR`: a data set as shards for data=imagenet_stream, checked by reading them again.

Training images are shuffled once, so that no shard is of one class; val and test keep their order. A shard is finished when its record
is written, which comes last: started again after it was cut off, prepare goes on with those that are not.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tnt_lightning import runs
from tnt_lightning.cli import command
from tnt_lightning.config import check
from tnt_lightning.errors import UserError

if TYPE_CHECKING:
    from tnt_lightning.data import ImageDataModule
    from tnt_lightning.data.shards import Chunk, Manifest
    from tnt_lightning.data.splits import Labelled

RECORDS = ".prepare"  # in out, until all is done: the plan, and a record of each finished shard
MEASURED = 500  # files of a split whose size says how many images go into a shard


@command("prepare")
def main(config: DictConfig) -> None:
    plain: Any = OmegaConf.to_container(config)
    out, only_verify, chunk_mb = plain.pop("out"), plain.pop("verify"), plain.pop("chunk_mb")
    if out is None:
        raise UserError("out is not set; give the folder that the shards go into: out=DIR")
    if not isinstance(only_verify, bool):
        raise UserError(f"verify={only_verify} is neither true nor false")
    if isinstance(chunk_mb, bool) or not isinstance(chunk_mb, (int, float)) or not 0 < chunk_mb <= 1000:
        raise UserError(f"chunk_mb={chunk_mb} is not a number of megabytes above 0, up to 1000")
    place = Path(str(out)).expanduser()
    if only_verify:
        manifest = verify(place, threads=plain["data"]["num_workers"])
    else:
        check(OmegaConf.masked_copy(config, list(plain)), HydraConfig.get().runtime.choices["model"])
        manifest = prepare(plain, place, chunk_mb=chunk_mb)
    counts = ", ".join(f"{name} {made['images']:,}" for name, made in manifest.made["splits"].items())
    size = sum(chunk.size for chunk in manifest.chunks)
    print(f"{place}: {counts} images in {len(manifest.chunks):,} shards, {size / 1e9:.3g} GB; read again, all as they were written")


def prepare(config: dict[str, Any], out: Path, *, chunk_mb: float = 64) -> "Manifest":
    """Write the parts of the data set of a resolved config, with the one that data.val_fraction carves; go on where it was cut off.

    UserError where `out` holds anything else, and for a shard that, read again, is not what was written.
    """
    from filelock import FileLock, Timeout

    from tnt_lightning.build import build_data
    from tnt_lightning.data.shards import MANIFEST, Manifest

    data = build_data({**config, "data": {**config["data"], "cache": False}})
    data.setup()
    assert data.parts is not None
    splits = {name: split for name, split in data.parts._asdict().items() if split is not None}
    made = plan(data, splits, chunk_mb)
    records = out / RECORDS
    try:
        begun(out, made)  # first, as nothing is made in a folder of something else
        records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"out={out}: {error.filename or out} cannot be made or read ({error.strerror or error}); choose another out"
        ) from None
    try:
        with FileLock(records / "lock", timeout=0):
            claim(out, made)
            for left in records.glob("writing-*"):
                shutil.rmtree(left)
            known, shards = written(out), deal(made)
            todo = [shard for shard in shards if shard.name not in known or _size(out / shard.name) != known[shard.name].size]
            done = sum(len(shard.indices) for shard in shards) - sum(len(shard.indices) for shard in todo)

            def work(shard: Shard) -> int:
                write(shard, splits[shard.split], out, known.get(shard.name))
                return len(shard.indices)

            in_threads("writing", work, todo, total=done + sum(len(shard.indices) for shard in todo), done=done, threads=data.num_workers)
            known = written(out)
            manifest = Manifest(made, getattr(splits["train"], "classes", None), [known[shard.name] for shard in shards])
            for name in splits:
                _replace(out / name / "index.json", json.dumps(_litdata_index(manifest, name), sort_keys=True))
            read_again(out, manifest, threads=data.num_workers)
            _replace(out / MANIFEST, manifest.dumps())
            shutil.rmtree(records, ignore_errors=True)
    except Timeout:
        raise UserError(f"out={out}: another prepare is at work on it") from None
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}; the same command goes on from here") from None
    with contextlib.suppress(OSError):  # over NFS it holds the lock until now
        records.rmdir()
    return manifest


def verify(out: Path, *, threads: int) -> "Manifest":
    """Read all shards; UserError for the first that is not what was written."""
    from tnt_lightning.data.shards import MANIFEST, Manifest

    try:
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out / MANIFEST}: no such file; what python -m tnt_lightning.prepare has finished holds one")
        manifest = Manifest.loads((out / MANIFEST).read_bytes(), str(out / MANIFEST))
        read_again(out, manifest, threads=threads)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be read ({error.strerror or error})") from None
    return manifest


# ---- what to write


class Shard(NamedTuple):
    """name: SPLIT/FILE; indices: of the split, in the order in which they are written."""

    name: str
    split: str
    indices: np.ndarray


def plan(data: "ImageDataModule", splits: dict[str, "Labelled"], chunk_mb: float) -> dict[str, Any]:
    """All that decides which image goes where; a command that is started again must come to the same."""
    from rich.progress import track

    from tnt_lightning.data.shards import Shards

    train, _ = leaf(splits["train"], 0)
    as_seen = train.as_seen if isinstance(train, Shards) else data.as_seen
    made: dict[str, Any] = {"data": type(data).__name__, "seed": data.seed, "chunk_mb": chunk_mb, "as_seen": as_seen, "splits": {}}
    for name, split in splits.items():
        count, source = len(split.labels), hashlib.sha256()
        mark, labels = marks(split), split.labels
        for start in track(range(0, count, 10_000), f"names of {name}", transient=True, disable=count < 100_000):
            lines = [f"{mark(index)}\0{labels[index]}\n" for index in range(start, min(start + 10_000, count))]
            source.update("".join(lines).encode())
        sample = range(0, count, math.ceil(count / MEASURED))
        mean = sum(size(*leaf(split, index)) for index in sample) / len(sample)
        images = max(1, min(count, int(chunk_mb * 1e6 / max(1, mean))))
        made["splits"][name] = {"images": count, "shards": math.ceil(count / images), "source": source.hexdigest()}
    return made


def deal(made: dict[str, Any]) -> list[Shard]:
    shards = []
    for split, of in made["splits"].items():
        count = of["images"]
        order = np.random.default_rng(made["seed"]).permutation(count) if split == "train" else np.arange(count)
        shards += [Shard(f"{split}/chunk-0-{i}.bin", split, part) for i, part in enumerate(np.array_split(order, of["shards"]))]
    return shards


def leaf(split: "Labelled", index: int) -> tuple["Labelled", int]:
    """The split that holds the image itself, and the image's place in it."""
    from tnt_lightning.data.splits import Joined, Part

    while isinstance(split, (Part, Joined)):
        split, index = (split.whole, split.indices[index]) if isinstance(split, Part) else split.place(index)
    return split, index


def marks(split: "Labelled") -> Callable[[int], str]:
    """A function of an image's place: what tells it from others without reading it; its name, or of one in shards its checksum."""
    from tnt_lightning.data.shards import Shards
    from tnt_lightning.data.splits import Files, Joined, Part, Tar

    if isinstance(split, Part):
        of, indices = marks(split.whole), split.indices
        return lambda index: of(indices[index])
    if isinstance(split, Joined):
        each, place = {id(part): marks(part) for part in split.splits}, split.place

        def mark(index: int) -> str:
            part, i = place(index)
            return each[id(part)](i)

        return mark
    if isinstance(split, Files):
        path = split.path
        return lambda index: _named(path(index))
    return split.mark if isinstance(split, Shards) else split.name if isinstance(split, Tar) else "{}.png".format


def _named(path: str) -> str:
    """FOLDER/FILE, of UTF-8 alone."""
    name = "/".join(path.rsplit("/", 2)[-2:])
    return name if name.isascii() else os.fsencode(name).decode(errors="backslashreplace")


def size(split: "Labelled", index: int) -> int:
    """Of an image of a leaf: about how many bytes it takes up."""
    from tnt_lightning.data.shards import Shards
    from tnt_lightning.data.splits import Files, Tar

    if isinstance(split, Files):
        return os.stat(split.path(index)).st_size
    return split.size(index) if isinstance(split, (Tar, Shards)) else len(original(split, index)[0])


def original(split: "Labelled", index: int) -> tuple[bytes, str]:
    """The bytes of an image's file, and its name; of one in memory they are a PNG's."""
    from tnt_lightning.data.shards import Shards
    from tnt_lightning.data.splits import Files, Tar

    split, index = leaf(split, index)
    if isinstance(split, Shards):
        return split.read(index)
    name = marks(split)(index)
    if isinstance(split, Files):
        return Path(split.path(index)).read_bytes(), name
    if isinstance(split, Tar):
        return split.read(index), name
    content = io.BytesIO()
    split[index][0].save(content, "png")
    return content.getvalue(), name


def begun(out: Path, made: dict[str, Any]) -> bool:
    """Whether the folder was begun by the same plan; UserError unless it was, or is empty, or not there yet."""
    from tnt_lightning.data.shards import DAMAGE, MANIFEST, Manifest

    first: dict[str, Any] | None = None
    if (out / MANIFEST).exists():
        first = Manifest.loads((out / MANIFEST).read_bytes(), str(out / MANIFEST)).made
    elif (plan := out / RECORDS / "plan.json").exists():
        try:
            first = dict(json.loads(plan.read_bytes()))
        except DAMAGE as error:
            raise UserError(f"{plan}: not a whole plan ({error}); delete {out}, and begin again") from None
    elif out.exists() and (not out.is_dir() or any(entry.name != RECORDS for entry in out.iterdir())):
        raise UserError(f"out={out}: holds something else; choose a folder that is empty or not there yet")
    if first is not None and first != made:
        key = next((key for key in made if first.get(key) != made[key]), "splits")
        what = "other images" if key == "splits" else f"{key}={first.get(key)}, now {key}={made[key]}"
        raise UserError(f"out={out}: begun with {what}; choose another folder, or give the same again")
    return first is not None


def claim(out: Path, made: dict[str, Any]) -> None:
    """The folder is ours; under the lock, as another prepare may have begun it since."""
    again = begun(out, made)
    (out / RECORDS).mkdir(exist_ok=True)
    for split in made["splits"]:
        (out / split).mkdir(exist_ok=True)
    if not again:
        _replace(out / RECORDS / "plan.json", json.dumps(made))


def written(out: Path) -> dict[str, "Chunk"]:
    """By name, the chunks that were finished, also by earlier calls."""
    from tnt_lightning.data.shards import DAMAGE, MANIFEST, Chunk, Manifest

    if (out / MANIFEST).exists():
        return {chunk.name: chunk for chunk in Manifest.loads((out / MANIFEST).read_bytes(), str(out / MANIFEST)).chunks}
    chunks = {}
    for record in (out / RECORDS).glob("*-chunk-*.json"):
        try:
            chunk = Chunk.of(json.loads(record.read_bytes()))
        except DAMAGE as error:
            raise UserError(f"{record}: not a whole record of a shard ({error}); delete it: its shard is written again") from None
        chunks[chunk.name] = chunk
    return chunks


# ---- writing, and reading again


def write(shard: Shard, split: "Labelled", out: Path, known: "Chunk | None") -> None:
    """A shard whole, or not at all, and then its record; UserError where it is not what was `known`."""
    from tnt_lightning.data.shards import Chunk, sha256

    images = np.empty((len(shard.indices), 3), np.uint32)
    with tempfile.TemporaryDirectory(prefix="writing-", dir=out / RECORDS) as folder:
        writer = _writer(folder, len(shard.indices))
        for slot, index in enumerate(shard.indices.tolist()):
            content, name = original(split, index)
            label = int(split.labels[index])
            writer.add_item(slot, (content, label, index, name))
            images[slot] = index, label, zlib.crc32(content)
        (file,) = map(Path, writer.done())
        chunk = Chunk(shard.name, file.stat().st_size, sha256(file), images)
        if known is not None and chunk.sha256 != known.sha256:
            raise UserError(f"{out / shard.name}: its images are not those that it was once written from; choose another out")
        _replace(out / shard.name, file)
    _replace(out / RECORDS / f"{shard.name.replace('/', '-')}.json", json.dumps(chunk.to_json()))


def _writer(folder: str, count: int) -> Any:
    """litdata's, of a single chunk; a tuple and not a dictionary, of which litdata makes another format where pyarrow is installed."""
    from tnt_lightning.data.shards import LITDATA

    try:
        from litdata.streaming.serializers import StringSerializer
        from litdata.streaming.writer import BinaryWriter
    except ImportError:
        raise UserError(f"prepare {LITDATA}") from None

    class Text(StringSerializer):
        def can_serialize(self, data: Any) -> bool:
            return isinstance(data, str)  # litdata's own leaves the name of a file of the current folder to pickle

    return BinaryWriter(folder, chunk_size=count, serializers={"str": Text()})


def _litdata_index(manifest: "Manifest", split: str) -> dict[str, Any]:
    """index.json, by which litdata's own StreamingDataset reads a split."""
    chunks = [manifest.chunks[number] for number in manifest.split(split)]
    entries = [
        {"filename": Path(chunk.name).name, "chunk_bytes": chunk.size, "chunk_size": len(chunk.images), "dim": None} for chunk in chunks
    ]
    with tempfile.TemporaryDirectory() as folder:
        writer = _writer(folder, max(len(chunk.images) for chunk in chunks))
        writer.add_item(0, (b"", 0, 0, ""))
        return {"chunks": entries, "config": writer.get_config(), "updated_at": "0"}


def read_again(out: Path, manifest: "Manifest", *, threads: int) -> None:
    """Each file by its checksum, each image by its own, all of them by their number; UserError for the first that is not as written."""
    from tnt_lightning.data.shards import Place, Shards, sha256

    place = Place(str(out), manifest.chunks, keep=2 * max(1, threads))
    shards = {name: Shards(place, manifest.split(name), manifest) for name in manifest.made["splits"]}
    for name, made in manifest.made["splits"].items():
        if len(shards[name].labels) != made["images"]:
            raise UserError(f"{out}: {len(shards[name].labels):,} images in {name}, {made['images']:,} were to be written")

    def work(number: int) -> int:
        chunk = manifest.chunks[number]
        split = shards[chunk.name.split("/")[0]]
        for index in chunk.images[:, 0].tolist():
            split.read(index)
        if sha256(out / chunk.name) != chunk.sha256:
            raise place.damaged(number, "its checksum is not that of what was written")
        return len(chunk.images)

    total = sum(len(chunk.images) for chunk in manifest.chunks)
    in_threads("reading again", work, range(len(manifest.chunks)), total=total, done=0, threads=threads)


def in_threads(title: str, work: Callable[[Any], int], tasks: Sequence[Any], *, total: int, done: int, threads: int) -> None:
    """work(task), which says how many images it did, for all tasks, under a bar; the first error stops what has not begun."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn()
    with Progress(*columns) as bar, ThreadPoolExecutor(max(1, threads)) as pool:
        line = bar.add_task(title, total=total, completed=done)
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                bar.advance(line, future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _replace(path: Path, content: str | Path) -> None:
    """A file with this text, or this file, there whole or not at all, also after a crash of the machine."""
    beside = path.with_name(f".{path.name}.new") if isinstance(content, str) else content
    if isinstance(content, str):
        beside.write_text(content)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
    runs.sync(path.parent)


if __name__ == "__main__":
    main()
