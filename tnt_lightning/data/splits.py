"""Splits: the images of one part of a data set, and their labels; where they lie, and nothing about augmentation or loaders."""

import hashlib
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from rich.progress import track

from tnt_lightning import trees
from tnt_lightning.data.images import BrokenImage, decoded, open_as_seen, open_image
from tnt_lightning.errors import UserError

Opener = Callable[..., Image.Image]


class Labelled(Protocol):
    """A split as a data set gives it: item i is (PIL image, label); labels without opening an image.

    One whose classes have names holds them in order as `classes`.
    """

    @property
    def labels(self) -> Sequence[int]: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


class Splits(NamedTuple):
    """train always; val is None where the set has no validation part, test is None where its test labels are not public."""

    train: Labelled
    val: Labelled | None
    test: Labelled | None


class Arrays:
    """Images in memory: uint8 (n, height, width) grey, or (n, height, width, 3)."""

    def __init__(self, images: np.ndarray, labels: Sequence[int] | np.ndarray, *, classes: Sequence[str]):
        self.images, self.labels, self.classes = images, np.asarray(labels).tolist(), list(classes)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


class Files:
    """Images on disk, a file each."""

    def __init__(self, paths: Sequence[str | Path], labels: Sequence[int], *, classes: Sequence[str], opener: Opener = open_image):
        # Bytes in one array: a list of a million texts is copied into every worker, as they are counted there.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=bytes)
        self.labels, self.classes, self._open = list(labels), list(classes), opener

    @classmethod
    def listed(cls, paths: Sequence[Path], labels: Sequence[int], *, classes: Sequence[str], subset: bool) -> "Files":
        """Those that a list names; UserError where some are not there, unless a subset is fine."""
        there: dict[Path, set[str]] = {}
        for folder in {path.parent for path in paths}:
            there[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        found = [i for i, path in enumerate(paths) if path.name in there[path.parent]]
        if len(found) < len(paths) and not (subset and found):
            first = next(path for path in paths if path.name not in there[path.parent])
            raise UserError(f"{first}: no such file ({len(paths) - len(found):,} of {len(paths):,} listed images are missing)")
        return cls([paths[i] for i in found], [labels[i] for i in found], classes=classes)

    def path(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._open(self.path(index)), self.labels[index]


def folder(place: Path, classes: Sequence[str] | None = None, *, as_seen: bool = False, others: Counter[str] | None = None) -> Files:
    """The images of place/CLASS/; classes: those that must be there, no more and no fewer; others: see trees.images."""
    found = trees.classes(place)
    if classes is not None and (odd := sorted(set(found) ^ set(classes))):
        where = place.name if odd[0] in found else "training"
        more = f" ({len(odd)} such)" if len(odd) > 1 else ""
        raise UserError(f"{place}: class {odd[0]!r} is in {where} alone{more}; all parts need the same class folders")
    paths, labels = [], []
    for label, name in enumerate(found):
        images = trees.images(place / name, others)
        if not images:
            raise UserError(f"{place / name}: no images in this class folder; known kinds: {' '.join(trees.SUFFIXES)}")
        paths += images
        labels += [label] * len(images)
    return Files(paths, labels, classes=found, opener=open_as_seen if as_seen else open_image)


class Tar:
    """Images in a tar, read where they lie in it. Members that are tars themselves (ImageNet's training images) are the classes."""

    def __init__(self, tar: Path, classes: Sequence[str] | None = None):
        self.tar = tar
        names, self._offsets, self._sizes = _index(tar)
        self.names = np.char.encode(names, "utf-8", "surrogateescape")
        self.labels: list[int] = []
        self.classes: list[str] = []
        inner = [name.split("/")[0] if "/" in name else "" for name in names.tolist()]
        if all(inner):
            self.classes = sorted(set(inner))
            label = {name: i for i, name in enumerate(self.classes)}
            self.labels = [label[name] for name in inner]
        self._file: int | None = None

    def name(self, index: int) -> str:
        return bytes(self.names[index]).decode(errors="surrogateescape")

    def size(self, index: int) -> int:
        return int(self._sizes[index])

    def read(self, index: int) -> bytes:
        if self._file is None:
            self._file = os.open(self.tar, os.O_RDONLY)
        # pread: workers that were forked share the file's position.
        return os.pread(self._file, self.size(index), int(self._offsets[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.read(index), f"{self.tar}:{self.name(index)}"), self.labels[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _index(tar: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(names, offsets, sizes) of a tar's images by name; kept beside the tar, as reading ImageNet's million headers takes minutes."""
    state = tar.stat()
    mark = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    kept = tar.with_name(f".{tar.name}.index.npz")
    try:
        with np.load(kept, allow_pickle=False) as file:
            if str(file["mark"]) == mark:
                return file["names"], file["offsets"], file["sizes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # none yet, or not a whole one: made anew
    entries = sorted(_members(tar))
    if not entries:
        raise UserError(f"{tar}: no images in it")
    names, offsets, sizes = np.array([e[0] for e in entries]), np.array([e[1] for e in entries]), np.array([e[2] for e in entries])
    try:
        beside = kept.with_name(f"{kept.name}.{os.getpid()}.npz")
        np.savez(beside, mark=mark, names=names, offsets=offsets, sizes=sizes)
        os.replace(beside, kept)
    except OSError:
        pass  # a read-only data set: indexed again next time
    return names, offsets, sizes


def _members(tar: Path) -> list[tuple[str, int, int]]:
    found = []
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
            inner = [member for member in outer if member.isfile()]
            for member in track(inner, description=f"index of {tar.name}", transient=True, disable=len(inner) < 100):
                if not member.name.endswith(".tar"):
                    found.append((member.name.removeprefix("./"), member.offset_data, member.size))
                    continue
                file.seek(member.offset_data)
                with tarfile.open(fileobj=file, mode="r:") as nested:
                    name = Path(member.name).stem
                    found += [(f"{name}/{Path(m.name).name}", m.offset_data, m.size) for m in nested if m.isfile()]
    except FileNotFoundError:
        raise UserError(f"{tar}: no such file") from None
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{tar}: not a whole tar ({error}); compare its checksum, and fetch it again") from None
    return [(name, offset, size) for name, offset, size in found if trees.is_image(Path(name).name)]


class Part:
    """The images of `whole` at `indices`, in that order. kept: of these classes of it alone, which are numbered anew."""

    def __init__(self, whole: Labelled, indices: Sequence[int], *, kept: Sequence[int] | None = None):
        self.whole, self.indices = whole, indices
        self.labels = [whole.labels[i] for i in indices]
        self.classes = getattr(whole, "classes", None)
        if kept is not None:
            number = {label: new for new, label in enumerate(kept)}
            self.labels = [number[label] for label in self.labels]
            self.classes = [self.classes[label] for label in kept] if self.classes else None

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.whole[self.indices[index]][0], self.labels[index]


class Joined:
    """One split after another."""

    def __init__(self, *splits: Labelled):
        self.splits, self._ends = splits, np.cumsum([len(split.labels) for split in splits])
        self.labels = [label for split in splits for label in split.labels]
        self.classes = getattr(splits[0], "classes", None)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        split, i = self.place(index)
        return split[i]

    def place(self, index: int) -> tuple[Labelled, int]:
        """The split that an image comes from, and its index there."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.splits[which], index - (int(self._ends[which - 1]) if which else 0)


def of_classes(split: Labelled, kept: Sequence[int]) -> Part:
    """The images of some classes alone."""
    chosen = set(kept)
    return Part(split, [i for i, label in enumerate(split.labels) if label in chosen], kept=kept)


def at_most(split: Labelled, count: int, seed: int) -> Part:
    """At most `count` images of each class, drawn with seed; of a smaller count those that are among a larger one's."""
    order = np.random.default_rng(seed).permutation(len(split.labels))
    seen: Counter[int] = Counter()
    chosen = []
    for index in order.tolist():
        label = split.labels[index]
        if seen[label] < count:
            seen[label] += 1
            chosen.append(index)
    return Part(split, sorted(chosen))


def carve(split: Labelled, fraction: float, seed: int) -> tuple[Part, Part]:
    """(the rest, the carved part): of each class the same fraction, drawn with seed, at least one image on either side."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(split.labels)
    counts = np.bincount(labels)
    kept, carved = [], []
    for label, members in enumerate(np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])):
        if not len(members):
            continue
        members = rng.permutation(members)
        if len(members) < 2:
            name = (getattr(split, "classes", None) or {label: label})[label]
            raise UserError(f"class {name!r} has a single training image, none to spare for validation; add some, or data.val_fraction=0")
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        carved += members[:count].tolist()
        kept += members[count:].tolist()
    return Part(split, sorted(kept)), Part(split, sorted(carved))


class Held:
    """A split decoded once into large blocks of memory, which forked workers share without a copy and without /dev/shm."""

    BLOCK = 2**26

    def __init__(self, split: Labelled, mode: str, *, processes: int = 1):
        """processes: on this machine, each of which will hold as much"""
        self.labels, self.classes, self.mode = split.labels, getattr(split, "classes", None), mode
        self._blocks: list[np.ndarray] = []
        self._places = np.zeros((len(self.labels), 4), np.int64)  # block, start, width, height
        self._broken: dict[int, BrokenImage] = {}

        def converted(index: int) -> Image.Image | BrokenImage:
            try:
                return decoded(split[index][0]).convert(mode)
            except BrokenImage as error:
                return error

        free, filled, held = _free_memory() // processes, 0, 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
            images = pool.map(converted, range(len(self.labels)))
            for index, image in enumerate(track(images, "hold in memory", len(self.labels), transient=True)):
                if isinstance(image, BrokenImage):  # said when its turn comes, as without holding
                    self._broken[index] = image
                    continue
                pixels = np.frombuffer(image.tobytes(), np.uint8)
                if not self._blocks or filled + len(pixels) > len(self._blocks[-1]):
                    self._blocks.append(np.empty(max(self.BLOCK, len(pixels)), np.uint8))
                    held, filled = held + len(self._blocks[-1]), 0
                    if held > free:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise UserError(
                            f"data.cache=true: {index:,} of {len(self.labels):,} images fill the "
                            f"{free / 2**30:.1f} GiB of free memory for each process; "
                            "set data.cache=false"
                        )
                self._blocks[-1][filled : filled + len(pixels)] = pixels
                self._places[index] = len(self._blocks) - 1, filled, *image.size
                filled += len(pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index in self._broken:
            raise BrokenImage.of(self._broken[index].file, self._broken[index].why)
        block, start, width, height = self._places[index].tolist()
        pixels = self._blocks[block][start : start + width * height * len(self.mode)]
        return Image.frombuffer(self.mode, (width, height), pixels, "raw", self.mode, 0, 1), self.labels[index]


def _free_memory() -> int:
    """Bytes that can be had without swapping; of the container where it has a limit of its own."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**40
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            held = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(held["inactive_file"])  # of files: given up on demand
            free = min(free, int(limit) - used)
    except (OSError, KeyError, ValueError):
        pass
    return free
