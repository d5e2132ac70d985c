"""Shards: the images of a data set, as the original files' bytes, in litdata's chunks, and the manifest by which they are checked.

A chunk is what litdata writes and reads: uint32 count, count + 1 uint32 offsets, the items; an item is four uint32 sizes, then the
image's bytes, its label (int64), its index in the split (int64) and its name. Nothing of it can be code. It is read here without
litdata, whose reader keeps a single chunk open, while a shuffled epoch goes to and fro among several; litdata fetches from object
stores. index.json, in which a chunk could ask litdata for pickle, is not read.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from tnt_lightning.data.images import open_as_seen, open_image
from tnt_lightning.errors import UserError

FORMAT = 1
MANIFEST = "shards.json"
SPLITS = ("train", "val", "test")
STORES = ("s3://", "gs://", "azure://", "r2://", "local:")
DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)  # what JSON that is not ours ends in
LITDATA = "needs litdata: pip install litdata"


class Chunk(NamedTuple):
    """name: SPLIT/FILE; images (n, 3) uint32: for each item its index in the split, its label, the CRC-32 of the image's bytes."""

    name: str
    size: int
    sha256: str
    images: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"images": base64.b64encode(self.images.astype("<u4").tobytes()).decode()}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Chunk":
        name, size, sha256 = entry["name"], int(entry["size"]), entry["sha256"]
        if not re.fullmatch(rf"({'|'.join(SPLITS)})/chunk-\d+-\d+\.bin", name) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"chunk {name!r}")  # a path of its own choice would be read, or written in the cache
        return cls(name, size, sha256, np.frombuffer(base64.b64decode(entry["images"]), "<u4").reshape(-1, 3))


class Manifest(NamedTuple):
    """made: of what, and how; classes: their names; chunks: of all splits, in the order of SPLITS."""

    made: dict[str, Any]
    classes: list[str] | None
    chunks: list[Chunk]

    def split(self, name: str) -> range:
        """The numbers of a split's chunks."""
        numbers = [number for number, chunk in enumerate(self.chunks) if chunk.name.startswith(f"{name}/")]
        return range(numbers[0], numbers[-1] + 1) if numbers else range(0)

    def dumps(self) -> str:
        content = {"format": FORMAT, **self._asdict(), "chunks": [chunk.to_json() for chunk in self.chunks]}
        return json.dumps({**content, "checksum": _checksum(content)}, sort_keys=True)

    @classmethod
    def loads(cls, text: str | bytes, where: str) -> "Manifest":
        """UserError for anything but a whole manifest of this format."""
        try:
            content = json.loads(text)
            checksum = content.pop("checksum")
            if content["format"] != FORMAT:
                raise UserError(f"{where}: shards of format {content['format']}, this version reads {FORMAT}; prepare them anew")
            if checksum != _checksum(content):
                raise ValueError("its checksum is another")
            chunks = [Chunk.of(entry) for entry in content["chunks"]]
            found = [SPLITS.index(chunk.name.split("/")[0]) for chunk in chunks]
            if found != sorted(found) or 0 not in found:
                raise ValueError("its chunks are out of order")
            made, classes = content["made"], content["classes"]
            if not isinstance(made["as_seen"], bool) or not all(isinstance(made["splits"][SPLITS[i]]["images"], int) for i in found):
                raise ValueError("it does not say how it was made")
            if len(made["splits"]) != len(set(found)) or not (classes is None or isinstance(classes, list)):
                raise ValueError("its parts are not those of its chunks")
            return cls(made, classes, chunks)
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(f"{where}: not a whole manifest of tnt_lightning.prepare ({error}); prepare, or copy, it again") from None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Place:
    """The chunks of a folder, read where they lie.

    keep: chunks that a process holds open
    """

    def __init__(self, address: str, chunks: Sequence[Chunk], *, keep: int):
        self.address, self.chunks, self.keep = address, chunks, keep
        self._opened: OrderedDict[int, tuple[BinaryIO, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened, self._lock = OrderedDict(), threading.Lock()

    def item(self, number: int, slot: int) -> bytes:
        """The bytes of an item."""
        with self._lock:
            if number not in self._opened:
                self._opened[number] = self._open(number)
                while len(self._opened) > self.keep:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(number)
            file, offsets = self._opened[number]
        # pread: workers that were forked share the file's position.
        return os.pread(file.fileno(), int(offsets[slot + 1] - offsets[slot]), int(offsets[slot]))

    def _open(self, number: int) -> tuple[BinaryIO, np.ndarray]:
        chunk = self.chunks[number]
        file = self._file(number)
        header = file.read(4 * (len(chunk.images) + 2))
        size = os.fstat(file.fileno()).st_size
        if size != chunk.size:
            raise UserError(f"{self.address}/{chunk.name}: {size:,} bytes, {chunk.size:,} were written; copy it, or prepare it, again")
        count, offsets = int.from_bytes(header[:4], "little"), np.frombuffer(header, "<u4", offset=4).astype(np.int64)
        if count != len(chunk.images) or offsets[0] != len(header) or offsets[-1] != size or (np.diff(offsets) < 0).any():
            raise self.damaged(number, "its table of contents is not what was written")
        return file, offsets

    def _file(self, number: int) -> BinaryIO:
        path = Path(self.address) / self.chunks[number].name
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; the manifest beside it lists it: copy it, or prepare it, again") from None

    def damaged(self, number: int, why: str) -> UserError:
        return UserError(f"{self.address}/{self.chunks[number].name}: damaged ({why}); delete it, and copy it, or prepare it, again")


class Remote(Place):
    """The chunks of an object store, each fetched once a machine into a folder, by its checksum as its name.

    In a worker of a DataLoader the next ones are fetched ahead; elsewhere each when its turn comes.

    limit: bytes that the folder may take; beyond, the chunks opened longest ago are deleted. What a process holds open takes up its
    room until it is closed. None: no limit.
    """

    AHEAD = 4

    def __init__(self, address: str, chunks: Sequence[Chunk], *, keep: int, cache: Path, limit: int | None):
        super().__init__(address, chunks, keep=keep)
        self.cache, self.limit = cache, limit
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        largest = max(chunk.size for chunk in chunks)
        if limit is not None and limit < (least := (keep + self.AHEAD) * largest):
            raise UserError(
                f"data.cache_gb={limit / 1e9:g}: {keep + self.AHEAD} shards of {largest / 1e9:.3g} GB are in use at a time; "
                f"give at least {least / 1e9:.3g}, or lower data.window"
            )
        # In shared memory: the loader's process says what follows what, its workers fetch.
        self.next = torch.arange(1, len(chunks) + 1, dtype=torch.int32).share_memory_()
        self._ask: tuple[int, BinaryIO] | None = None  # the process that asks, and where it writes what it has opened

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ask": None}

    def follow(self, numbers: np.ndarray) -> None:
        """In this order chunks will be wanted."""
        self.next[numbers] = torch.as_tensor([*numbers[1:], len(self.chunks)], dtype=torch.int32)

    def _file(self, number: int) -> BinaryIO:
        path = self._path(number)
        while True:
            try:
                file = path.open("rb", buffering=0)
                os.utime(path)
                break
            except FileNotFoundError:  # not yet here, or deleted since
                self._fetch(number)
        # Not in the process that trains, which has threads and a GPU: a copy of it could hang.
        if get_worker_info() is not None and hasattr(os, "fork"):
            with contextlib.suppress(OSError):  # without: each is fetched when its turn comes
                self._fetch_ahead(number)
        return file

    def _fetch_ahead(self, number: int) -> None:
        """In a process: the store's client draws from the generators that the augmentation draws from, so a thread would change pixels."""
        if self._ask is None or self._ask[0] != os.getpid():
            read, write = os.pipe()
            try:
                child = os.fork()
            except OSError:
                os.close(read)
                os.close(write)
                raise
            if child == 0:
                try:
                    os.close(write)
                    if os.fork() == 0:  # the child's child: whoever asks has none to wait for when it ends
                        while asked := os.read(read, 4096):  # nothing: who asked has ended
                            self._fetch_after(struct.unpack("<i", asked[-4:])[0])
                finally:
                    os._exit(0)
            os.close(read)
            self._ask = os.getpid(), os.fdopen(write, "wb", buffering=0)  # closed with this object
            os.waitpid(child, 0)
        self._ask[1].write(struct.pack("<i", number))

    def _fetch_after(self, number: int) -> None:
        for _ in range(self.AHEAD):
            number = int(self.next[number])
            if number >= len(self.chunks):
                return
            with contextlib.suppress(UserError):  # said when its turn comes
                if not self._path(number).exists():
                    self._fetch(number)

    def _path(self, number: int) -> Path:
        return self.cache / f"{self.chunks[number].sha256}.bin"

    def _fetch(self, number: int) -> None:
        from filelock import FileLock

        chunk, path = self.chunks[number], self._path(number)
        with FileLock(self.cache / "locks" / chunk.sha256):
            if path.exists():  # by another process
                return
            with tempfile.TemporaryDirectory(prefix="fetching-", dir=self.cache) as folder:
                fetched = Path(folder) / "chunk.bin"
                for attempt in range(3):
                    if attempt:
                        fetched.unlink()
                        time.sleep(attempt)
                    download(f"{self.address}/{chunk.name}", fetched)
                    if sha256(fetched) == chunk.sha256:
                        os.replace(fetched, path)
                        break
                else:
                    raise self.damaged(number, "fetched three times, with another checksum than was written")
        if self.limit is not None:
            self._make_room(path)

    def _make_room(self, keep: Path) -> None:
        there = []
        for path in self.cache.glob(f"{'[0-9a-f]' * 64}.bin"):  # and nothing else that may lie in a folder of somebody's choice
            with contextlib.suppress(FileNotFoundError):
                there.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        taken = sum(size for _, size, _ in there)
        assert self.limit is not None
        for _, size, path in sorted(there):
            if taken <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                taken -= size


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_clients: dict[tuple[int, str], Any] = {}  # by process: a connection does not outlive a fork


def download(address: str, file: Path) -> None:
    """An object into a file that is not there yet; UserError in one line."""
    folder = address.rpartition("/")[0]
    key = os.getpid(), folder
    try:
        if address.startswith("local:"):
            shutil.copyfile(address.removeprefix("local:"), file)
            return
        if key not in _clients:
            from litdata.streaming.downloader import get_downloader

            _clients[key] = get_downloader(folder, str(file.parent), [])
        with file.open("wb") as target:
            # And not download_file: for S3 its client is one whose threads do not outlive a fork, and which refuses plain http.
            _clients[key].download_fileobj(address, target)
    except ImportError as error:
        raise UserError(f"{address}: {LITDATA}" if _is_of_litdata(error) else f"{address}: {_one_line(error)}") from None
    except Exception as error:  # whatever the store's own client raises
        raise UserError(f"{address}: cannot be fetched ({_one_line(error)}); look at the address, the rights and the disk") from None


def _is_of_litdata(error: ImportError) -> bool:
    return (error.name or "").split(".")[0] == "litdata"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class Shards:
    """A split in shards: item i is (PIL image, label) of the split's i-th image, wherever it lies.

    chunk (n,): the number of the chunk in which an image lies; as_seen: whether its pixels are those of open_as_seen
    """

    def __init__(self, place: Place, numbers: range, manifest: Manifest):
        self.place, self.classes, self.as_seen = place, manifest.classes, manifest.made["as_seen"]
        self._open = open_as_seen if self.as_seen else open_image
        images = np.concatenate([place.chunks[number].images for number in numbers])
        counts = [len(place.chunks[number].images) for number in numbers]
        index = images[:, 0].astype(np.int64)
        if (np.sort(index) != np.arange(len(index))).any():
            raise UserError(
                f"{place.address}/{MANIFEST}: an image of {place.chunks[numbers[0]].name} is missing or twice in it; prepare it anew"
            )
        self.chunk, self._slot = np.empty(len(index), np.int32), np.empty(len(index), np.int32)
        self._label, self._crc = np.empty(len(index), np.int64), np.empty(len(index), np.uint32)
        self.chunk[index], self._slot[index] = np.repeat(numbers, counts), np.concatenate([np.arange(count) for count in counts])
        self._label[index], self._crc[index] = images[:, 1], images[:, 2]
        self.labels: list[int] = self._label.tolist()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content, name = self.read(index)
        chunk = self.place.chunks[int(self.chunk[index])]
        return self._open(content, f"{self.place.address}/{chunk.name}: {name}"), int(self._label[index])

    def mark(self, index: int) -> str:
        """What tells an image from others, without reading it."""
        return f"crc32:{self._crc[index]:08x}"

    def size(self, index: int) -> int:
        """The mean bytes of an image and its item, in the shard where the image lies; nothing is read."""
        chunk = self.place.chunks[int(self.chunk[index])]
        return chunk.size // len(chunk.images)

    def read(self, index: int) -> tuple[bytes, str]:
        """The bytes of the original file, and its name; UserError that names the chunk where they are not those that were written."""
        number, slot = int(self.chunk[index]), int(self._slot[index])
        item = self.place.item(number, slot)
        try:
            *sizes, named = struct.unpack_from("<4I", item)
            image = item[16 : 16 + sizes[0]]
            written = struct.unpack_from("<qq", item, 16 + sizes[0])
            name = item[len(item) - named :].decode()
        except (struct.error, UnicodeDecodeError):
            raise self.place.damaged(number, f"item {slot} cannot be read") from None
        if zlib.crc32(image) != self._crc[index] or written != (self._label[index], index) or len(item) != 16 + sum(sizes) + named:
            raise self.place.damaged(number, f"item {slot} is not what was written")
        return image, name


def open_shards(root: str, *, keep: int, cache: Path | None = None, limit: int | None = None) -> tuple[Manifest, Place]:
    """What lies in a folder, or at an address of STORES; cache, limit: see Remote."""
    if "://" not in root and not root.startswith("local:"):
        folder = Path(root).expanduser()
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder / MANIFEST}: no such file; data.root is the folder that python -m tnt_lightning.prepare has finished")
        manifest = Manifest.loads((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
        return manifest, Place(str(folder), manifest.chunks, keep=keep)
    if not root.startswith(STORES):
        raise UserError(f"data.root={root}: neither a folder nor an address that begins with {', '.join(STORES)}")
    address = root.rstrip("/")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / MANIFEST
        download(f"{address}/{MANIFEST}", file)
        manifest = Manifest.loads(file.read_bytes(), f"{address}/{MANIFEST}")
    place = cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tnt_lightning" / "shards"
    try:
        return manifest, Remote(address, manifest.chunks, keep=keep, cache=place, limit=limit)
    except OSError as error:
        raise UserError(f"data.cache_dir={place}: {error.strerror}; choose another folder") from None
