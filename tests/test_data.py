"""Splits, order, pipeline: what the model is shown, and in which order."""

import itertools
import pickle
import random
from collections import Counter

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from tnt_lightning.data import Digits, ImageNet
from tnt_lightning.data.module import TrainOrder, carve
from tnt_lightning.data.transforms import BatchTransform, eval_transform, random_affine, train_transform
from tnt_lightning.errors import UserError

DIGITS = dict(num_classes=10, in_chans=1, image_size=8, mean=0.0, std=1.0, crop_pct=1.0, batch_size=64, num_workers=0)


def photo(seed=0, size=(90, 70)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def imagenet(tmp_path):
    """A tree as ImageNet's, with two classes of six images, and what a file manager leaves behind."""
    for part in ("train", "val"):
        for label, name in enumerate(("n01", "n02")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(6):
                photo(seed=10 * label + i).save(folder / f"{i}.JPEG")
            (folder / "._0.JPEG").write_bytes(b"not an image")
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
    return tmp_path


# ---- digits


def test_digits_are_the_published_ones_in_a_stratified_split():
    data = Digits(**DIGITS)
    data.setup()
    assert [len(part.labels) for part in data.parts] == [1222, 216, 359]
    counts = [Counter(part.labels) for part in data.parts]
    assert sum(counts, Counter()) == Counter({0: 178, 1: 182, 2: 177, 3: 183, 4: 181, 5: 182, 6: 181, 7: 179, 8: 174, 9: 180})
    for count, share in zip(counts, (0.68, 0.12, 0.20), strict=True):
        assert all(
            abs(n - share * total) <= 1
            for n, total in zip((count[d] for d in range(10)), (178, 182, 177, 183, 181, 182, 181, 179, 174, 180), strict=True)
        )
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (64, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 255
    assert labels.tolist() == data.parts.test.labels[:64]


def test_val_fraction_zero_trains_on_everything_that_is_not_test():
    data = Digits(**DIGITS, val_fraction=0)
    data.setup()
    assert len(data.parts.train.labels) == 1222 + 216 and data.parts.val is None and len(data.parts.test.labels) == 359
    with pytest.raises(UserError, match="validation part of its own"):
        Digits(**DIGITS, val_fraction=0.1).setup()


# ---- folders


def test_imagenet_tree(imagenet):
    data = ImageNet(root=str(imagenet), num_classes=2, image_size=32, batch_size=4, num_workers=0)
    data.setup()
    assert len(data.parts.train.labels) == len(data.parts.val.labels) == 12 and data.parts.test is None
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32) and set(labels.tolist()) <= {0, 1}


def test_val_fraction_carves_a_stratified_part_so_that_no_test_image_chooses(imagenet):
    data = ImageNet(root=str(imagenet), num_classes=2, image_size=32, batch_size=4, num_workers=0, val_fraction=1 / 3)
    data.setup()
    assert Counter(data.parts.train.labels) == {0: 4, 1: 4} and Counter(data.parts.val.labels) == {0: 2, 1: 2}
    assert not set(data.parts.train.indices) & set(data.parts.val.indices) and len(data.parts.test.labels) == 12
    again = carve(data.parts.train.whole, 1 / 3, seed=0)[1].indices
    assert again == data.parts.val.indices != carve(data.parts.train.whole, 1 / 3, seed=1)[1].indices


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "val" / "n02").rename(root / "val" / "n03"), "class 'n02' is in train/ alone"),
        (lambda root: (root / "train").rename(root / "training"), "train: no such folder"),
        (lambda root: [f.unlink() for f in (root / "train" / "n01").iterdir()], "n01"),
        (lambda root: [(f.rename(root / f.name)) for f in (root / "val").iterdir()], "no class folders"),
    ],
)
def test_a_tree_that_would_shift_labels_is_refused(imagenet, spoil, message):
    spoil(imagenet)
    with pytest.raises(UserError, match=message):
        ImageNet(root=str(imagenet), num_classes=2).setup()


def test_more_or_fewer_classes_than_told(imagenet):
    with pytest.raises(UserError, match="set data.num_classes=2"):
        ImageNet(root=str(imagenet), num_classes=1000).setup()
    with pytest.raises(UserError, match="data.root is not set"):
        ImageNet(num_classes=1000).setup()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_line(imagenet, workers):
    broken = imagenet / "val" / "n02" / "3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    data = ImageNet(root=str(imagenet), num_classes=2, image_size=32, batch_size=4, num_workers=workers)
    data.setup()
    with pytest.raises(UserError) as caught:
        list(data.val_dataloader())
    assert str(caught.value).startswith(f"{broken}: not a readable image") and "\n" not in str(caught.value)


# ---- order


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_share_an_epoch_without_overlap(world, repeats):
    orders = [TrainOrder(101, total=96, repeats=repeats, rank=rank, world=world, seed=0) for rank in range(world)]
    shares = [[index for index, _ in order] for order in orders]
    assert all(len(share) == len(order) == 96 // world for share, order in zip(shares, orders, strict=True))
    counts = Counter(itertools.chain(*shares))
    assert set(counts.values()) == {repeats} and len(counts) == 96 // repeats
    seeds = [seed for order in orders for _, seed in order]
    assert len(set(seeds)) == len(seeds), "repeats of an image need draws of their own"


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        order = TrainOrder(50, total=48, repeats=1, rank=0, world=1, seed=seed)
        order.set_epoch(epoch)
        return list(order)

    assert order(0, 0) == order(0, 0) and order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


def test_workers_change_no_pixel(imagenet):
    def batches(workers):
        recipe = dict(crop_scale=[0.08, 1.0], hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1")
        data = ImageNet(root=str(imagenet), num_classes=2, image_size=32, batch_size=4, num_workers=workers, augmentation=recipe)
        data.setup()
        return [images for images, _ in data.train_dataloader()]

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone, shared)


class Devices:
    """What the data module asks of a Trainer."""

    def __init__(self, world_size, accumulate_grad_batches=1, global_rank=0):
        self.world_size, self.accumulate_grad_batches, self.global_rank = world_size, accumulate_grad_batches, global_rank


def test_batch_size_is_global():
    data = Digits(**DIGITS)
    data.trainer = Devices(4, accumulate_grad_batches=2)
    assert data.device_batch == 8
    data.trainer = Devices(5)
    with pytest.raises(UserError, match="data.batch_size=64 does not divide among 5 .* try 60 or 65"):
        data.device_batch  # noqa: B018
    mixing = Digits(**{**DIGITS, "batch_size": 6}, augmentation=dict(mixup=0.8))
    mixing.trainer = Devices(2)
    mixing.setup()
    with pytest.raises(UserError, match="even"):
        mixing.train_dataloader()
    assert len(mixing.val_dataloader()) == 36  # evaluation mixes nothing
    large = Digits(**{**DIGITS, "batch_size": 2000})
    large.setup()
    with pytest.raises(UserError, match="larger than the training set of 1222"):
        large.train_dataloader()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_every_image_once(world):
    seen = []
    for rank in range(world):
        data = Digits(**{**DIGITS, "batch_size": 60})
        data.trainer = Devices(world, global_rank=rank)
        data.setup()
        seen += [label for _, labels in data.test_dataloader() for label in labels.tolist()]
    assert Counter(seen) == Counter(data.parts.test.labels)


# ---- pipeline, against timm's own


def seeded(transform, image, seed):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return transform(image)


def test_training_pixels_equal_timms_for_the_same_draws():
    recipe = dict(interpolation="bicubic", hflip=0.5, color_jitter=0.4)
    ours = train_transform((32, 48), crop_scale=(0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1", **recipe)
    theirs = create_transform(
        (3, 32, 48), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", mean=(0.5,) * 3, normalize=False, **recipe
    )
    compared = 0
    for seed in range(60):
        try:
            want = seeded(theirs, photo(seed), seed)
        except ValueError:  # posterize to 0 bits: see below
            continue
        assert torch.equal(seeded(ours, photo(seed), seed), want)
        compared += 1
    assert compared > 50


def test_colour_jitter_without_rand_augment_equals_timms():
    ours = train_transform((32, 32), crop_scale=(0.08, 1.0), color_jitter=0.4)
    theirs = create_transform((3, 32, 32), is_training=True, color_jitter=0.4, hflip=0.0, interpolation="bicubic", normalize=False)
    assert torch.equal(seeded(ours, photo(), 1), seeded(theirs, photo(), 1))


def test_evaluation_pixels_equal_timms():
    want = create_transform((3, 32, 32), crop_pct=0.9, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)(photo())
    uint8 = eval_transform((32, 32), crop_pct=0.9)(photo())
    images, _ = BatchTransform(num_classes=10, mean=[0.5] * 3, std=[0.5] * 3)(uint8[None], torch.tensor([0]), training=False)
    torch.testing.assert_close(images[0], want, atol=1e-6, rtol=0)


def test_posterize_to_zero_bits_is_black():
    """timm's policies ask for it; Pillow 13 raises ValueError there, which would end a training run within a few batches."""
    policy = "rand-m10-n4-inc1"
    ours = train_transform((16, 16), rand_augment=policy)
    for seed in range(100):
        seeded(ours, photo(), seed)
    if int(PIL.__version__.split(".")[0]) >= 13:
        theirs = create_transform((3, 16, 16), is_training=True, auto_augment=policy, normalize=False)
        with pytest.raises(ValueError):
            [seeded(theirs, photo(), seed) for seed in range(100)]


def test_transforms_travel_to_workers_that_are_not_forked():
    transform = train_transform((16, 16), crop_scale=(0.08, 1.0), hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1")
    assert torch.equal(seeded(pickle.loads(pickle.dumps(transform)), photo(), 0), seeded(transform, photo(), 0))


def test_random_affine():
    images = torch.rand(4, 2, 8, 12)
    torch.testing.assert_close(random_affine(images, degrees=0, shift=0, zoom=0), images)
    moved = random_affine(images, degrees=10, shift=0.1, zoom=0.1)
    assert moved.shape == images.shape and not torch.allclose(moved[0] - images[0], moved[1] - images[1])
    # Turned by 90 degrees, a wide image keeps its square pixels: a square in the middle stays one.
    square = torch.zeros(1, 1, 8, 16)
    square[..., 2:6, 6:10] = 1
    torch.manual_seed(0)
    quarter = 90 / (torch.rand(4, 1) * 2 - 1)[0].item()
    torch.manual_seed(0)
    torch.testing.assert_close(random_affine(square, degrees=quarter, shift=0, zoom=0), square, atol=1e-4, rtol=0)


def test_mixing_gives_soft_targets_and_erasing_noise():
    images, labels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8)
    transform = BatchTransform(num_classes=10, mean=[0.0] * 3, std=[1.0] * 3, mixup=0.8, cutmix=1.0)
    _, targets = transform(images, labels, training=True)
    assert targets.shape == (8, 10) and torch.allclose(targets.sum(1), torch.ones(8))
    _, targets = transform(images, labels, training=False)
    assert torch.equal(targets, labels)
    erased, _ = BatchTransform(num_classes=10, mean=[0.0] * 3, std=[1.0] * 3, erase=1.0)(images, labels, training=True)
    assert all(0 < (image != 0).any(0).float().mean() < 1 for image in erased)


@pytest.mark.parametrize(
    "name, value",
    [("batch_size", "big"), ("batch_size", 0), ("num_workers", -1), ("image_size", 8.0), ("in_chans", 2), ("val_fraction", 1)],
)
def test_values_that_are_no_sizes(name, value):
    with pytest.raises(UserError, match=f"{name}={value!r}"):
        Digits(**{**DIGITS, name: value})


def test_mean_for_each_channel():
    with pytest.raises(UserError, match=r"recipe.mean=\[0.5, 0.5, 0.5\] has 3 values for data.in_chans=1"):
        Digits(**{**DIGITS, "mean": [0.5, 0.5, 0.5]})
