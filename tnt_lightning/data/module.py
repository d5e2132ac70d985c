"""ImageDataModule: splits -> order -> augmented uint8 batches -> the device.

The order of images and every random draw depend on (seed, epoch, place in the order) alone: not on the number of
workers, and not on what was drawn before.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from tnt_lightning.data.decoding import unreadable
from tnt_lightning.data.transforms import BatchTransform, Transform, eval_transform, train_transform
from tnt_lightning.errors import UserError


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


class Part:
    """The images of `whole` at `indices`, in that order."""

    def __init__(self, whole: Labelled, indices: Sequence[int]):
        self.whole, self.indices = whole, indices
        self.labels = [whole.labels[i] for i in indices]
        self.classes = getattr(whole, "classes", None)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.whole[self.indices[index]]


class Transformed(Dataset):
    """(uint8 tensor, label) of a split. Asked for (index, seed), it draws the augmentation from that seed."""

    def __init__(self, split: Labelled, transform: Transform, mode: str):
        self.split, self.transform, self.mode = split, transform, mode

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        if seed is not None:
            _seed_all(seed)
        image, label = self.split[index]
        try:
            if image.mode != self.mode:  # convert() copies even where there is nothing to convert
                image = image.convert(self.mode)
            return self.transform(image), label
        except (OSError, SyntaxError) as error:  # files are decoded here, as far as the transform asks for
            raise unreadable(getattr(image, "filename", "an image"), error) from None


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) and (B,). In memory the channels come last, as Pillow has them: reordering costs more than all of the copying."""
    images, labels = default_collate([(image.permute(1, 2, 0), label) for image, label in samples])
    return images.permute(0, 3, 1, 2), labels


class TrainOrder(Sampler):
    """(index, seed) pairs of one rank: every epoch another order of whole global batches, each image `repeats` times running.

    Repeats of an image fall on different ranks where there are as many (repeated augmentation, arXiv 1901.09335); an epoch stays
    as long as without.
    """

    def __init__(self, size: int, *, total: int, repeats: int, rank: int, world: int, seed: int):
        self.size, self.total, self.repeats, self.rank, self.world, self.seed = size, total, repeats, rank, world, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:  # Lightning calls it
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.size).repeat(self.repeats)[: self.total]
        seeds = rng.integers(2**32, size=self.total)
        mine = slice(self.rank, None, self.world)
        return iter(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))


class ImageDataModule(L.LightningDataModule):
    """What every data set shares; one is made by `splits()`, which says where its images are.

    root: the folder that holds the data
    batch_size: GLOBAL: images an optimizer step, over all devices and accumulation steps
    num_workers: loader processes a device
    image_size: pixels, one number or (height, width); in_chans: 3, or 1 for grey
    num_classes: checked against what is found
    val_fraction: None keeps the set's own validation part; a fraction carves one (seeded, stratified) out of training where the
        set has none, or out of which the set's own becomes the test part; 0 trains on everything that is not test
    augmentation: what of `train_transform` and `BatchTransform` to use in training, and `repeats` of an image in a row
    mean, std: normalisation, of pixels from 0 to 1, a channel or for all; crop_pct, interpolation: of evaluation

    UserError for a missing root, a batch that does not divide, or classes that are not as told.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        batch_size: int = 1024,
        num_workers: int = 8,
        image_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int,
        val_fraction: float | None = None,
        augmentation: dict[str, Any] | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        crop_pct: float = 0.9,
        interpolation: str = "bicubic",
        seed: int = 0,
    ):
        super().__init__()
        if in_chans not in (1, 3):
            raise UserError(f"data.in_chans={in_chans}: images have 3 channels, or 1 for grey")
        if val_fraction is not None and not (isinstance(val_fraction, (int, float)) and 0 <= val_fraction < 1):
            raise UserError(f"data.val_fraction={val_fraction!r} is not a fraction from 0 to below 1")
        self.root, self.batch_size, self.num_workers = root, batch_size, num_workers
        self.in_chans, self.num_classes, self.val_fraction, self.seed = in_chans, num_classes, val_fraction, seed
        for name, value, lowest in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("num_classes", num_classes, 1)):
            if not isinstance(value, int) or value < lowest:
                raise UserError(f"data.{name}={value!r} is not a whole number of at least {lowest}")
        size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise UserError(f"image_size={image_size!r} is neither a whole number of pixels nor (height, width)")
        self.input_size = (in_chans, *size)
        self.mean, self.std = (per_channel(name, x, in_chans) for name, x in (("mean", mean), ("std", std)))
        per_image = dict(augmentation or {})
        self.repeats = per_image.pop("repeats", 1)
        per_batch = {name: per_image.pop(name) for name in ("degrees", "shift", "zoom", "erase", "mixup", "cutmix") if name in per_image}
        self.mixes = bool(per_batch.get("mixup") or per_batch.get("cutmix"))
        self.train_transform = train_transform(size, mean=self.mean, interpolation=interpolation, **per_image)
        self.eval_transform = eval_transform(size, crop_pct=crop_pct, interpolation=interpolation)
        self.batch_transform = BatchTransform(num_classes=num_classes, mean=self.mean, std=self.std, **per_batch)
        self.parts: Splits | None = None

    def splits(self) -> Splits:
        raise NotImplementedError(f"{type(self).__name__} does not say where its images are")

    def setup(self, stage: str | None = None) -> None:
        if self.parts is not None:
            return
        train, val, test = self.splits()
        if self.val_fraction:
            if val is not None and test is not None:
                raise UserError(
                    f"data.val_fraction={self.val_fraction}: the set has a validation part of its own; null keeps it, 0 trains on it"
                )
            train, carved = carve(train, self.val_fraction, self.seed)
            val, test = carved, test or val
        elif self.val_fraction == 0 and test is not None and val is not None:
            train, val = Joined(train, val), None
        self.parts = Splits(train, val, test)

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
        assert self.parts is not None
        if self.mixes and self.device_batch % 2:
            raise UserError(
                f"data.batch_size={self.batch_size} leaves {self.device_batch} images a device; mixup and cutmix pair them: an even number"
            )
        size = len(self.parts.train.labels)
        total = size // self.batch_size * self.batch_size
        if not total:
            raise UserError(f"data.batch_size={self.batch_size} is larger than the training set of {size} images; lower it")
        order = TrainOrder(size, total=total, repeats=self.repeats, rank=self.rank, world=self.world, seed=self.seed)
        return self._loader(self.parts.train, self.train_transform, order)

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
        mine = range(self.rank, len(split.labels), self.world)
        return self._loader(split, self.eval_transform, mine)

    def _loader(self, split: Labelled, transform: Transform, order: Sampler | Sequence[int]) -> DataLoader:
        return DataLoader(
            Transformed(split, transform, self.mode),
            batch_size=self.device_batch,
            sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        training = False
        if self.trainer and self.trainer.training:
            training = True
            # What follows in this step (erasing, mixing, dropout) is drawn from here: the same after a restart, another on each rank.
            step = self.trainer.fit_loop.total_batch_idx + 1
            seed = int(np.random.SeedSequence((self.seed, step, self.rank)).generate_state(1)[0])
            _seed_all(seed)
            if batch[0].is_cuda:
                torch.cuda.manual_seed(seed)
        return self.batch_transform(*batch, training=training)


class Joined:
    """One split after another."""

    def __init__(self, *splits: Labelled):
        self.places = [(split, i) for split in splits for i in range(len(split.labels))]
        self.labels = [label for split in splits for label in split.labels]
        self.classes = getattr(splits[0], "classes", None)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        split, i = self.places[index]
        return split[i]


def carve(split: Labelled, fraction: float, seed: int) -> tuple[Part, Part]:
    """(the rest, the carved part): of each class the same fraction, drawn with seed, at least one image on either side."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(split.labels)
    kept, carved = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise UserError(f"data.val_fraction={fraction}: class {label} has a single training image, none to spare for validation")
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        carved += members[:count].tolist()
        kept += members[count:].tolist()
    return Part(split, sorted(kept)), Part(split, sorted(carved))


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
