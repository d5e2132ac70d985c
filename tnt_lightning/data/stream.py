"""ImageNetStream: training from shards, on this machine or in an object store, in an order that goes through few of them at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnt_lightning.data.module import ImageDataModule, TrainOrder
from tnt_lightning.data.shards import SPLITS, Place, Remote, Shards, open_shards
from tnt_lightning.data.splits import Joined, Labelled, Part, Splits
from tnt_lightning.errors import UserError


class ImageNetStream(ImageDataModule):
    """A data set as `python -m tnt_lightning.prepare` wrote it into root: a folder, or an address such as s3://BUCKET/PATH.

    Image i of a split, its label and its augmentation in (seed, epoch, repeat) are those of the data set that was prepared. The order
    depends on (seed, epoch), `window`, the shards and the number of machines, each of which reads shards of its own; not on the devices
    of a machine nor on the workers.

    window: shards that images are mixed among at a time
    cache_dir: where shards from afar are kept; None: ~/.cache/tnt_lightning/shards
    cache_gb: how much of it; None: all that comes
    """

    def __init__(self, *, window: int = 16, cache_dir: str | None = None, cache_gb: float | None = None, **shared: Any):
        super().__init__(**shared)
        if not isinstance(window, int) or window < 1:
            raise UserError(f"data.window={window!r} is not a whole number of at least 1")
        self.window, self.cache_dir, self.cache_gb = window, cache_dir, cache_gb

    def splits(self) -> Splits:
        if self.root is None:
            raise UserError("data.root is not set; give the folder or address of what python -m tnt_lightning.prepare wrote")
        manifest, place = open_shards(
            str(self.root),
            keep=self.window + 2,  # a shard's images end where those of the window-th after it begin
            cache=Path(self.cache_dir).expanduser() if self.cache_dir else None,
            limit=None if self.cache_gb is None else round(self.cache_gb * 1e9),
        )
        numbers = {name: manifest.split(name) for name in SPLITS}
        train, val, test = (Shards(place, numbers[name], manifest) if numbers[name] else None for name in SPLITS)
        assert train is not None
        return Splits(train, val, test)

    def _train_order(self, size: int, **arguments: Any) -> TrainOrder:
        assert self.parts is not None
        lie = chunks_of(self.parts.train)
        nodes = self.trainer.num_nodes if self.trainer else 1
        return StreamOrder(size, lie=lie, place=_place_of(self.parts.train), window=self.window, nodes=nodes, **arguments)

    def _eval_order(self, split: Labelled) -> Sequence[int]:
        return np.argsort(chunks_of(split), kind="stable").tolist()


class StreamOrder(TrainOrder):
    """Chunk after chunk in another order every epoch, and the images of `window` chunks mixed: a window that glides over the epoch.

    lie (size,): the number of the chunk in which an image lies
    nodes: machines; each gets a stretch of the chunks' order of its own, so that none reads all of them
    """

    def __init__(self, size: int, *, lie: np.ndarray, place: Place, window: int, nodes: int, **arguments: Any):
        super().__init__(size, **arguments)
        self.place, self.window, self.nodes = place, window, nodes
        self.numbers, self.lie = np.unique(lie, return_inverse=True)

    def _images(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        devices = self.world // self.nodes
        share = self.total // self.nodes
        count = -(-share // self.repeats)
        turn = rng.permutation(len(self.numbers))  # of a chunk, in this epoch
        order = rng.permutation(self.size)
        order = order[np.argsort(turn[self.lie[order]], kind="stable")]
        epoch = np.empty((share // devices, self.nodes, devices), np.int64)
        for node in range(self.nodes):
            images = order[node * count : (node + 1) * count]
            turns = turn[self.lie[images]]
            if node == self.rank // devices and isinstance(self.place, Remote):
                self.place.follow(self.numbers[np.argsort(turn)[turns[0] : turns[-1] + 1]])
            mixed = images[np.argsort(turns + self.window * rng.random(count), kind="stable")]
            epoch[:, node] = mixed.repeat(self.repeats)[:share].reshape(-1, devices)
        repeat = np.broadcast_to((np.arange(share) % self.repeats).reshape(-1, 1, devices), epoch.shape)
        return epoch.ravel(), repeat.ravel()


def chunks_of(split: Labelled) -> np.ndarray:
    """(size,): the number of the chunk in which each image of a split lies."""
    if isinstance(split, Part):
        return chunks_of(split.whole)[np.asarray(split.indices)]
    if isinstance(split, Joined):
        return np.concatenate([chunks_of(part) for part in split.splits])
    assert isinstance(split, Shards)
    return split.chunk


def _place_of(split: Labelled) -> Place:
    if isinstance(split, Part):
        return _place_of(split.whole)
    if isinstance(split, Joined):
        return _place_of(split.splits[0])
    assert isinstance(split, Shards)
    return split.place
