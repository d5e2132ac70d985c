"""ImageDataModule: splits -> order -> augmented uint8 batches -> the device.

The order of images depends on (seed, epoch) alone, and an image's augmentation on (seed, epoch, index, repeat) alone: not on the
number of workers, and not on what was drawn before.
"""

import difflib
import json
import math
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from tnt_lightning import signals
from tnt_lightning.data import workers
from tnt_lightning.data.archives import Archive, fetch
from tnt_lightning.data.images import BrokenImage, decoded
from tnt_lightning.data.splits import Held, Joined, Labelled, Splits, at_most, carve, of_classes
from tnt_lightning.data.transforms import BatchTransform, Transform, eval_transform, train_transform
from tnt_lightning.errors import UserError

SHARED_MEMORY = Path("/dev/shm")


class Transformed(Dataset):
    """(uint8 tensor, label) of a split. Asked for (index, seed), it draws the augmentation from that seed.

    skipped: None stops at a broken image; a file (or "" for none) adds a line about it there and gives None in its place
    """

    def __init__(self, split: Labelled, transform: Transform, mode: str, skipped: str | None = None):
        self.split, self.transform, self.mode, self.skipped = split, transform, mode, skipped

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int] | None:
        index, seed = key if isinstance(key, tuple) else (key, None)
        try:
            image, label = self.split[index]
            if seed is not None:  # now, since to read an image may draw too: from afar, by the store's client
                _seed_all(seed)
            if image.mode != self.mode:  # convert() copies even where there is nothing to convert
                image = decoded(image).convert(self.mode)
            return self.transform(image), label
        except BrokenImage as error:
            if self.skipped is None:
                raise
            if self.skipped:
                # One write of one line: that of another worker comes before it or after it.
                with open(self.skipped, "a") as file:
                    file.write(f"{json.dumps({'index': index, 'file': error.file, 'why': error.why})}\n")
            return None


def batch_of(items: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
    """Images (B, C, height, width) uint8 and labels (B,), without what was skipped.

    In memory the channels come last, as Pillow has them: reordering costs more than all of the copying.
    """
    whole = [item for item in items if item is not None]
    if not whole:
        raise UserError(f"data.on_error=skip: all {len(items)} images of a batch are broken; python -m tnt_lightning.verify lists them")
    images, labels = default_collate([(image.permute(1, 2, 0), label) for image, label in whole])
    return images.permute(0, 3, 1, 2), labels


class TrainOrder(Sampler):
    """(index, seed) pairs of one rank: every epoch another order of whole global batches, each image `repeats` times running.

    The order depends on (seed, epoch), and the seed of an image's augmentation on (seed, epoch, index, repeat). Repeats of an image
    fall on different ranks where there are as many (repeated augmentation, arXiv 1901.09335); an epoch stays as long as without.
    start: images of this rank to leave out, the next time only and of this epoch only, to go on in its middle
    """

    def __init__(self, size: int, *, total: int, repeats: int, rank: int, world: int, seed: int, start: int = 0):
        self.size, self.total, self.repeats, self.rank, self.world, self.seed = size, total, repeats, rank, world, seed
        self.epoch, self.start = 0, start

    def set_epoch(self, epoch: int) -> None:  # Lightning calls it
        if epoch != self.epoch:  # of the epoch before nothing was left
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.total // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, repeat = self._images(np.random.default_rng((self.seed, self.epoch)))
        # By a generator of their own: the same of an image in whatever order.
        seeds = np.random.default_rng((self.seed, self.epoch, 1)).integers(2**32, size=(self.repeats, self.size))
        mine = slice(self.rank + self.start * self.world, None, self.world)
        self.start = 0
        return iter(zip(order[mine].tolist(), seeds[repeat[mine], order[mine]].tolist(), strict=True))

    def _images(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """For each place of the epoch, over all ranks: which image, and which of its repeats."""
        return rng.permutation(self.size).repeat(self.repeats)[: self.total], np.arange(self.total) % self.repeats


class ImageDataModule(L.LightningDataModule):
    """What every data set shares; one is made by `splits()`, which says where its images are.

    root: the folder that holds the data; download: fetch into it what is missing, where the authors allow that
    subset: fewer images than the set officially has are fine
    batch_size: GLOBAL: images an optimizer step, over all devices and accumulation steps
    num_workers: loader processes a device
    image_size: pixels, one number or (height, width); in_chans: 3, or 1 for grey
    num_classes: checked against what is found; None is the set's own
    val_fraction: None keeps the set's own validation part; a fraction carves one (seeded, stratified) out of training where the
        set has none, or out of which the set's own becomes the test part; 0 trains on everything that is not test
    classes: the names of some of the set's classes, or their numbers, from 0: those alone, numbered anew in this order
    images_per_class: train on at most so many images of each class, drawn with seed; None: on all
    augmentation: what of `train_transform` and `BatchTransform` to use in training, and `repeats` of an image in a row; "auto" is
        3 from REPEATED images up, and 1 on smaller sets, where an epoch of a few steps would show a third of them
    mean, std: normalisation, of pixels from 0 to 1, a channel or for all; crop_pct, interpolation: of evaluation
    on_error: "stop" at a broken image, or "skip" it in training: left out, listed in the file `skipped`; evaluation always stops
    cache: hold all images decoded in memory

    A subclass says in `classes` how many it has, in `page` where to get it, in `official` how many images its parts have, and in
    `archives` what can be downloaded. `notes` are lines for the user. `begin` is the epoch, and in
    it the batch, at which the next `train_dataloader` starts.

    UserError for a missing root, other counts than the official ones, a batch that does not divide, or classes that are not as told.
    """

    REPEATED = 100_000
    classes: int | None = None
    official: dict[str, int] = {}
    spare: float | None = None  # val_fraction of a set that has training images alone
    page = ""
    as_seen = False  # whether images are opened as a person sees them, or as their pixels are stored

    def __init__(
        self,
        *,
        root: str | None = None,
        batch_size: int = 1024,
        num_workers: int = 8,
        image_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int | None = None,
        val_fraction: float | None = None,
        classes: Sequence[str | int] | None = None,
        images_per_class: int | None = None,
        augmentation: dict[str, Any] | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        crop_pct: float = 0.9,
        interpolation: str = "bicubic",
        on_error: str = "stop",
        cache: bool = False,
        download: bool = False,
        subset: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if on_error not in ("stop", "skip"):
            raise UserError(f"data.on_error={on_error!r} is neither 'stop' nor 'skip'")
        num_classes = self.classes if num_classes is None else num_classes
        if in_chans not in (1, 3):
            raise UserError(f"data.in_chans={in_chans}: images have 3 channels, or 1 for grey")
        if val_fraction is not None and not (isinstance(val_fraction, (int, float)) and 0 <= val_fraction < 1):
            raise UserError(f"data.val_fraction={val_fraction!r} is not a fraction from 0 to below 1")
        self.root, self.batch_size, self.num_workers = root, batch_size, num_workers
        self.in_chans, self.val_fraction, self.seed = in_chans, val_fraction, seed
        for name, value, lowest in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("num_classes", num_classes, 1)):
            if not isinstance(value, int) or value < lowest:
                raise UserError(f"data.{name}={value!r} is not a whole number of at least {lowest}")
        assert num_classes is not None
        if images_per_class is not None and not (isinstance(images_per_class, int) and images_per_class >= 1):
            raise UserError(f"data.images_per_class={images_per_class!r} is not a whole number of at least 1")
        self.num_classes, self.only, self.images_per_class = num_classes, classes, images_per_class
        size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise UserError(f"image_size={image_size!r} is neither a whole number of pixels nor (height, width)")
        self.input_size = (in_chans, *size)
        self.mean, self.std = (per_channel(name, x, in_chans) for name, x in (("mean", mean), ("std", std)))
        per_image = dict(augmentation or {})
        self.repeats = per_image.pop("repeats", 1)
        per_batch = {name: per_image.pop(name) for name in ("degrees", "shift", "zoom", "erase", "mixup", "cutmix") if name in per_image}
        self.mixes = bool(per_batch.get("mixup") or per_batch.get("cutmix"))
        self.crop_pct, self.interpolation = crop_pct, interpolation
        self.train_transform = train_transform(size, mean=self.mean, interpolation=interpolation, **per_image)
        self.eval_transform = eval_transform(size, crop_pct=crop_pct, interpolation=interpolation)
        self.batch_transform = BatchTransform(num_classes=num_classes, mean=self.mean, std=self.std, **per_batch)
        self.on_error, self.cache, self.download, self.subset = on_error, cache, download, subset
        self.skipped: Path | None = None
        self._held: dict[int, Held] = {}
        self.notes: list[str] = []
        self.parts: Splits | None = None
        self.begin = (0, 0)

    @property
    def archives(self) -> tuple[Archive, ...]:
        return ()

    def splits(self) -> Splits:
        """The data set's own parts, whole."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its images are")

    def home(self) -> Path:
        """root, which must be given."""
        if self.root is None:
            get = (f"; get it from {self.page}" if self.page else "") + (", or give data.download=true too" if self.archives else "")
            raise UserError(f"data.root is not set; give the folder that holds the images: data.root=/path/to/them{get}")
        return Path(self.root).expanduser()

    def place(self, folder: str, mark: str) -> Path:
        """root/folder, or root where it is that folder itself: what holds `mark`."""
        for place in (self.home() / folder, self.home()):
            if (place / mark).exists():
                return place
        get = "; data.download=true fetches it" if self.archives else ""
        raise UserError(f"{self.home() / folder / mark}: no such file, nor {mark} in {self.home()}; get it from {self.page}{get}")

    def prepare_data(self) -> None:
        """Download; Lightning calls it in one process a node."""
        if self.download and not self.archives:
            where = f"; get it from {self.page}" if self.page else ""
            raise UserError(f"data.download=true: {type(self).__name__} is not to be downloaded{where}")
        if self.download and self.parts is None and not self._is_there():  # Lightning asks again when all is set up
            fetch(self.home(), self.archives)

    def _is_there(self) -> bool:
        """In whatever layout can be read."""
        try:
            for part in self.splits():
                if part is not None:
                    decoded(part[0][0])
        except UserError:
            return False
        return True

    def discrepancies(self, splits: Splits) -> list[str]:
        """What is not as the data set's authors say."""
        found = {name: len(part.labels) for name, part in splits._asdict().items() if part is not None}
        return [
            f"{name} has {found.get(name, 0):,} images, officially {n:,}" for name, n in self.official.items() if found.get(name, 0) != n
        ]

    def setup(self, stage: str | None = None) -> None:
        if self.parts is not None:
            return
        self.prepare_data()
        splits = self.splits()
        differ = "; ".join(self.discrepancies(splits))
        if self.only is not None:
            splits = self._of_classes(splits, self.only)
        train, val, test = splits
        classes = getattr(train, "classes", None)
        if classes is not None and len(classes) != self.num_classes:
            raise UserError(f"data.num_classes={self.num_classes}: the set has {len(classes)} classes; set data.num_classes={len(classes)}")
        if differ:
            if not self.subset:
                raise UserError(f"data.root={self.root}: {differ}; data.subset=true goes on with what is there")
            self.notes.append(f"a subset: {differ}")
        fraction = self.spare if self.val_fraction is None and val is None and test is None else self.val_fraction
        if fraction:
            if val is not None and test is not None:
                raise UserError(
                    f"data.val_fraction={self.val_fraction}: the set has a validation part of its own; null keeps it, 0 trains on it"
                )
            train, carved = carve(train, fraction, self.seed)
            val, test = carved, test or val
        elif fraction == 0 and test is not None and val is not None:
            train, val = Joined(train, val), None
        if self.images_per_class is not None:
            size, train = len(train.labels), at_most(train, self.images_per_class, self.seed)
            self.notes.append(f"{len(train.labels):,} of {size:,} training images: at most {self.images_per_class} of each class")
        if self.repeats == "auto":
            self.repeats = 3 if len(train.labels) >= self.REPEATED else 1
            if self.repeats == 1:
                few = f"repeated augmentation is off, as for every set of fewer than {self.REPEATED:,} training images"
                self.notes.append(f"{few}; recipe.augmentation.repeats=3 turns it on")
        if max(max(part.labels) for part in (train, val, test) if part is not None) >= self.num_classes:
            raise UserError(f"data.root={self.root}: a label is beyond data.num_classes={self.num_classes}")
        self.parts = Splits(train, val, test)

    def _of_classes(self, splits: Splits, wanted: Sequence[str | int]) -> Splits:
        names = [str(name) for name in getattr(splits.train, "classes", None) or range(max(splits.train.labels) + 1)]
        kept = []
        for one in wanted:
            number = one if isinstance(one, int) else names.index(one) if one in names else -1
            if not 0 <= number < len(names):
                near = difflib.get_close_matches(one, names, n=3) if isinstance(one, str) else []
                cure = (
                    f"did you mean {' or '.join(near)}?"
                    if near
                    else f"there are {len(names):,}, numbered from 0: {', '.join(names[:5])}, ..."
                )
                raise UserError(f"data.classes: the set has no class {one!r}; {cure}")
            kept.append(number)
        if len(set(kept)) < len(kept) or not kept:
            raise UserError(
                f"data.classes={list(wanted)}: {'names a class twice' if kept else 'no class at all'}; give each once, or null for all"
            )
        train, val, test = (None if part is None else of_classes(part, kept) for part in splits)
        assert train is not None
        return Splits(train, val, test)

    @property
    def skipped_images(self) -> int:
        """How many training images were left out as broken."""
        if self.skipped is None or not self.skipped.exists():
            return 0
        found = re.findall(r'^{"index": (\d+), ', self.skipped.read_text(errors="replace"), re.MULTILINE)  # a last line may be cut off
        return len(set(found))

    @property
    def mode(self) -> str:
        """Pillow's, of the images that the model sees."""
        return "L" if self.in_chans == 1 else "RGB"

    @property
    def world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def device_batch(self) -> int:
        """Images a device and forward pass: batch_size / (devices x accumulation)."""
        accumulation = self.trainer.accumulate_grad_batches if self.trainer else 1
        ways = self.world * accumulation
        if self.batch_size % ways:
            fits = [n for n in (self.batch_size // ways * ways, (self.batch_size // ways + 1) * ways) if n]
            raise UserError(
                f"data.batch_size={self.batch_size} does not divide among {self.world} device(s) x {accumulation} accumulation step(s); "
                f"try {' or '.join(map(str, fits))}"
            )
        return self.batch_size // ways

    def train_dataloader(self) -> DataLoader:
        """It starts at `begin`, the first time that it is gone through."""
        assert self.parts is not None
        if self.mixes and self.device_batch % 2:
            raise UserError(
                f"data.batch_size={self.batch_size} leaves {self.device_batch} images a device; mixup and cutmix pair them: an even number"
            )
        size = len(self.parts.train.labels)
        if size < self.batch_size:
            raise UserError(f"data.batch_size={self.batch_size} is larger than the training set of {size} images; lower it")
        (epoch, batch), self.begin = self.begin, (0, 0)
        order = self._order(self.rank, epoch, start=batch * self.device_batch)
        skipped = None if self.on_error == "stop" else str(self.skipped or "")
        return self._loader(Transformed(self._images(self.parts.train), self.train_transform, self.mode, skipped), order)

    def train_indices(self, epoch: int, batches: Iterable[int], *, rank: int) -> list[int]:
        """Which training images a rank gets in some batches of an epoch."""
        order = self._order(rank, epoch)
        mine = [index for index, _ in order]
        return [index for batch in batches for index in mine[batch * self.device_batch : (batch + 1) * self.device_batch]]

    def _order(self, rank: int, epoch: int, start: int = 0) -> TrainOrder:
        assert self.parts is not None
        size = len(self.parts.train.labels)
        total = size // self.batch_size * self.batch_size
        order = self._train_order(size, total=total, repeats=self.repeats, rank=rank, world=self.world, seed=self.seed, start=start)
        order.epoch = epoch  # Lightning sets it when workers have drawn from it already
        return order

    def _train_order(self, size: int, **arguments: Any) -> TrainOrder:
        return TrainOrder(size, **arguments)

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_loader(self.parts.val if self.parts else None)

    def test_dataloader(self) -> DataLoader | list:
        return self._eval_loader(self.parts.test if self.parts else None)

    def _eval_loader(self, split: Labelled | None) -> DataLoader | list:
        if split is None:
            return []
        if len(split.labels) < self.world:
            raise UserError(f"{len(split.labels)} images to evaluate on {self.world} devices: each needs one; lower trainer.devices")
        # Lightning's own sampler pads to equal lengths and would count 101 images as 102 on two ranks.
        mine = self._eval_order(split)[self.rank :: self.world]
        return self._loader(Transformed(self._images(split), self.eval_transform, self.mode), mine)

    def _eval_order(self, split: Labelled) -> Sequence[int]:
        return range(len(split.labels))

    def _images(self, split: Labelled) -> Labelled:
        """The split, with data.cache held in memory."""
        if not self.cache:
            return split
        if id(split) not in self._held:
            self._held[id(split)] = Held(split, self.mode, processes=self._beside)
        return self._held[id(split)]

    @property
    def _beside(self) -> int:
        """Processes on this machine that will take as much as this one: the first answers for all, before they start."""
        return self.world // self.trainer.num_nodes if self.trainer and self.rank == 0 else 1

    def _loader(self, images: Transformed, order: Sampler | Sequence[int]) -> DataLoader:
        self._check_shared_memory()
        return DataLoader(
            images,
            batch_size=self.device_batch,
            sampler=order,
            collate_fn=batch_of,
            num_workers=self.num_workers,
            multiprocessing_context=workers.context() if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=signals.in_a_worker,
        )

    def _check_shared_memory(self) -> None:
        """Workers hand their batches over in /dev/shm, which containers often keep at 64 MiB: full, it kills them by a bus error."""
        ahead = 2 * self.num_workers * self.device_batch * math.prod(self.input_size) * self._beside
        if not ahead or not SHARED_MEMORY.is_dir() or (free := shutil.disk_usage(SHARED_MEMORY).free) >= ahead:
            return
        raise UserError(
            f"data.num_workers={self.num_workers}: their batches take {ahead / 2**20:,.0f} MiB of {SHARED_MEMORY}, which has "
            f"{free / 2**20:,.0f} MiB free; enlarge it (docker run --shm-size), or lower data.num_workers"
        )

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        training = False
        if self.trainer and self.trainer.training:
            training = True
            # What follows in this step (erasing, mixing, dropout) is drawn from here: the same after a restart, another on each rank.
            loop = self.trainer.fit_loop
            step = self.trainer.current_epoch * int(self.trainer.num_training_batches) + loop.batch_idx + 1
            seed = int(np.random.SeedSequence((self.seed, step, self.rank)).generate_state(1)[0])
            _seed_all(seed)
            if batch[0].is_cuda:
                torch.cuda.manual_seed(seed)
        return self.batch_transform(*batch, training=training)


def per_channel(name: str, value: float | Sequence[float], in_chans: int) -> list[float]:
    values = [value] * in_chans if isinstance(value, (int, float)) else list(value)
    if len(values) != in_chans:
        raise UserError(
            f"recipe.{name}={values} has {len(values)} values for data.in_chans={in_chans}; give one a channel, or a single number"
        )
    return [float(x) for x in values]


def _seed_all(seed: int) -> None:
    """Every generator of the CPU that timm and torchvision draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.5 ms an image where CUDA is not initialised
