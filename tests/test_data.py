"""Splits, order, pipeline: what the model is shown, and in which order."""

import itertools
import json
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from timm.data import Mixup, create_transform
from timm.data.loader import PrefetchLoader

from tnt_lightning.data import Digits, ImageNet
from tnt_lightning.data.module import TrainOrder
from tnt_lightning.data.splits import Held, carve
from tnt_lightning.data.transforms import BatchTransform, eval_transform, random_affine, train_transform
from tnt_lightning.data.workers import Forks
from tnt_lightning.errors import UserError

from . import layouts
from .layouts import photo

DIGITS = dict(num_classes=10, in_chans=1, image_size=8, mean=0.0, std=1.0, crop_pct=1.0, batch_size=64, num_workers=0)


@pytest.fixture
def imagenet(tmp_path):
    layouts.imagenet(tmp_path)
    return tmp_path


def tiny(root, **arguments):
    """ImageNet's data module on a tree of two classes: 12 images to train on, 8 to validate."""
    data = ImageNet(**{**dict(root=str(root), num_classes=2, image_size=32, batch_size=4, num_workers=0, subset=True), **arguments})
    data.setup()
    return data


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
    data = tiny(imagenet)
    assert [len(part.labels) for part in data.parts[:2]] == [12, 8] and data.parts.test is None
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32) and set(labels.tolist()) <= {0, 1}


def test_val_fraction_carves_a_stratified_part_so_that_no_test_image_chooses(imagenet):
    data = tiny(imagenet, val_fraction=1 / 3)
    assert Counter(data.parts.train.labels) == {0: 4, 1: 4} and Counter(data.parts.val.labels) == {0: 2, 1: 2}
    assert not set(data.parts.train.indices) & set(data.parts.val.indices) and len(data.parts.test.labels) == 8
    again = carve(data.parts.train.whole, 1 / 3, seed=0)[1].indices
    assert again == data.parts.val.indices != carve(data.parts.train.whole, 1 / 3, seed=1)[1].indices


ONE, TWO = layouts.WORDNET


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "val" / TWO).rename(root / "val" / "n03"), f"val: class '{TWO}' is in training alone .2 such"),
        (lambda root: (root / "train").rename(root / "training"), "train: no such folder"),
        (lambda root: [f.unlink() for f in (root / "train" / ONE).glob("*.JPEG")], f"{ONE}: no images in this class folder"),
        (lambda root: shutil.rmtree(root / "val"), "val: no such folder"),
    ],
)
def test_a_tree_that_would_shift_labels_is_refused(imagenet, spoil, message):
    spoil(imagenet)
    with pytest.raises(UserError, match=message):
        tiny(imagenet)


def test_more_or_fewer_classes_than_told(imagenet):
    with pytest.raises(UserError, match="set data.num_classes=2"):
        tiny(imagenet, num_classes=1000)
    with pytest.raises(UserError, match="data.root is not set"):
        ImageNet(num_classes=1000).setup()


# ---- broken images


def spoil(imagenet, part="train"):
    broken = imagenet / part / TWO / f"{TWO}_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    return broken


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_line(imagenet, workers):
    broken = spoil(imagenet)
    with pytest.raises(UserError) as caught:
        list(tiny(imagenet, num_workers=workers).train_dataloader())
    assert str(caught.value).startswith(f"{broken}: not a readable image (") and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_left_out_and_listed_and_no_other_takes_their_place(imagenet, tmp_path, workers):
    broken = spoil(imagenet)
    data = tiny(imagenet, num_workers=workers, on_error="skip", augmentation=dict(repeats=3))
    data.skipped = tmp_path / "skipped.jsonl"
    loader = data.train_dataloader()
    whole = [list(loader.sampler), [label for _, labels in loader for label in labels.tolist()]]
    index = next(i for i in range(12) if data.parts.train.path(i) == str(broken))
    shown = [data.parts.train.labels[i] for i, _ in whole[0] if i != index]
    assert whole[1] == shown and len(shown) == 12 - 3 * (index in {i for i, _ in whole[0]})
    lines = [json.loads(line) for line in data.skipped.read_text().splitlines()]
    assert {line["file"] for line in lines} == {str(broken)} and data.skipped_images == 1 and "truncated" in lines[0]["why"].lower()


def test_evaluation_skips_nothing(imagenet):
    broken = spoil(imagenet, "val")
    with pytest.raises(UserError, match=f"{broken}: not a readable image"):
        list(tiny(imagenet, on_error="skip").val_dataloader())


def test_a_batch_of_nothing_but_broken_images(imagenet):
    for file in imagenet.glob("train/*/n*.JPEG"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="all 4 images of a batch are broken"):
        list(tiny(imagenet, on_error="skip").train_dataloader())


@pytest.mark.parametrize("count", [1, 5])
def test_what_a_skipped_image_leaves_is_mixed_as_far_as_it_pairs(count):
    images, labels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8), torch.arange(count)
    mixed, targets = BatchTransform(num_classes=10, mean=[0.0] * 3, std=[1.0] * 3, mixup=0.8)(images, labels, training=True)
    assert mixed.shape == images.shape and torch.allclose(targets.sum(1), torch.ones(count))
    assert torch.equal(targets[-1], torch.eye(10)[count - 1]) and torch.allclose(mixed[-1], images[-1] / 255)


# ---- held in memory


@pytest.mark.parametrize("workers", [0, 2])
def test_images_held_in_memory_are_the_same_to_the_pixel(imagenet, workers):
    recipe = dict(crop_scale=[0.08, 1.0], hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1")
    read, held = (tiny(imagenet, num_workers=workers, augmentation=recipe, cache=cache) for cache in (False, True))
    for loader in ("train_dataloader", "val_dataloader"):
        for (ours, _), (theirs, _) in zip(getattr(held, loader)(), getattr(read, loader)(), strict=True):
            assert torch.equal(ours, theirs)
    shutil.rmtree(imagenet / "train")
    assert len(list(held.train_dataloader())) == 3, "no file is opened again"


def test_a_broken_image_is_named_when_its_turn_comes_though_held(imagenet):
    broken = spoil(imagenet)
    with pytest.raises(UserError, match=f"{broken}: not a readable image"):
        list(tiny(imagenet, cache=True).train_dataloader())
    assert sum(len(labels) for _, labels in tiny(imagenet, cache=True, on_error="skip").train_dataloader()) == 11


def test_more_than_memory_is_refused(imagenet, monkeypatch):
    monkeypatch.setattr("tnt_lightning.data.splits._free_memory", lambda: 2**20)
    monkeypatch.setattr(Held, "BLOCK", 2**14)
    assert len(list(tiny(imagenet, cache=True).train_dataloader())) == 3
    monkeypatch.setattr("tnt_lightning.data.splits._free_memory", lambda: 2**15)
    with pytest.raises(UserError, match="data.cache=true: .* GiB of free memory for each process; set data.cache=false"):
        tiny(imagenet, cache=True).train_dataloader()


def test_little_shared_memory_is_said_before_it_kills_a_worker(imagenet, monkeypatch):
    data = tiny(imagenet, num_workers=2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="data.num_workers=2: their batches take .* MiB free; enlarge it .docker run --shm-size"):
        data.train_dataloader()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * 2 * 4 * 3 * 32 * 32))
    assert len(list(data.train_dataloader())) == 3


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


def test_the_draws_of_an_image_depend_on_seed_epoch_index_and_repeat_alone():
    def draws(**knobs):
        order = TrainOrder(**{**dict(size=60, total=48, repeats=3, rank=0, world=1, seed=0), **knobs})
        order.set_epoch(2)
        seen, repeat = {}, Counter()
        for index, seed in order:
            seen[index, repeat[index]] = seed
            repeat[index] += 1
        return seen

    whole, smaller, single = draws(), draws(total=30), draws(repeats=1)
    assert smaller.items() < whole.items()
    assert all(whole[key] == seed for key, seed in single.items() if key in whole)
    assert len(set(whole.values())) == 48


RECIPE = dict(crop_scale=[0.08, 1.0], hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1", repeats=3)


def epoch_of(data, epoch=1, first_batch=0):
    data.begin = epoch, first_batch
    loader = data.train_dataloader()
    return loader, list(loader)


STUCK = """
import os, sys, time
from pathlib import Path
from torch.utils.data import DataLoader
from tnt_lightning.data import workers

forks, workers.LIFE_S = Path(sys.argv[1]), 1.0

def wait_for_ever():  # in the new process, before it runs a line of its own
    forks.write_text(forks.read_text() + ".")
    if len(forks.read_text()) in (1, 3, 4):
        time.sleep(1000)

os.register_at_fork(after_in_child=wait_for_ever)
loader = DataLoader(range(8), batch_size=2, num_workers=2, multiprocessing_context=workers.context())
print([batch.tolist() for batch in loader], len(forks.read_text()))
"""


@pytest.mark.slow
def test_a_loader_process_that_hangs_in_its_fork_is_forked_anew(tmp_path, imagenet):
    (tmp_path / "forks").touch()
    done = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path / "forks")], capture_output=True, text=True, timeout=100)
    assert done.stdout == "[[0, 1], [2, 3], [4, 5], [6, 7]] 5\n", done.stderr
    assert isinstance(tiny(imagenet, num_workers=1).train_dataloader().multiprocessing_context, Forks)


@pytest.mark.parametrize("first_batch", [0, 2])
def test_neither_workers_nor_a_start_in_the_middle_change_a_pixel(imagenet, first_batch):
    _, whole = epoch_of(tiny(imagenet, augmentation=RECIPE, batch_size=3))
    assert len(whole) == 4
    for workers in (0, 1, 2):
        loader, rest = epoch_of(tiny(imagenet, augmentation=RECIPE, batch_size=3, num_workers=workers), first_batch=first_batch)
        for (images, labels), (wanted, theirs) in zip(rest, whole[first_batch:], strict=True):
            assert torch.equal(images, wanted) and torch.equal(labels, theirs)
        assert len(list(loader)) == 4, "the next epoch is whole again"


def test_a_start_in_the_middle_on_two_ranks(imagenet):
    for rank in range(2):
        data = tiny(imagenet, augmentation=RECIPE)
        data.trainer = Devices(2, global_rank=rank)
        (_, whole), (_, rest) = epoch_of(data), epoch_of(data, first_batch=1)
        assert len(whole) == 3 and all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, whole[1:], strict=True))


def test_copies_of_a_repeated_image_differ(imagenet):
    images = torch.cat([images for images, _ in epoch_of(tiny(imagenet, augmentation=RECIPE, batch_size=3))[1]])
    assert all(not torch.equal(images[3 * i + a], images[3 * i + b]) for i in range(4) for a, b in ((0, 1), (1, 2), (0, 2)))


def test_repeats_are_off_on_a_small_set_unless_asked_for(imagenet, monkeypatch):
    data = tiny(imagenet, augmentation=dict(repeats="auto"))
    assert data.repeats == 1 and "fewer than 100,000 training images; recipe.augmentation.repeats=3 turns it on" in data.notes[-1]
    monkeypatch.setattr(ImageNet, "REPEATED", 12)
    large = tiny(imagenet, augmentation=dict(repeats="auto"))
    assert large.repeats == 3 and not any("repeated" in note for note in large.notes)


class Devices:
    """What the data module asks of a Trainer."""

    def __init__(self, world_size, accumulate_grad_batches=1, global_rank=0):
        self.world_size, self.accumulate_grad_batches, self.global_rank = world_size, accumulate_grad_batches, global_rank
        self.num_nodes = 1


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


def test_each_rank_and_each_step_mixes_differently(imagenet):
    data, batch = tiny(imagenet, augmentation=dict(mixup=0.8)), (torch.randint(0, 256, (4, 3, 32, 32)), torch.tensor([0, 0, 1, 1]))

    def mixed(rank, step):
        data.trainer = SimpleNamespace(
            global_rank=rank, training=True, current_epoch=2, num_training_batches=5, fit_loop=SimpleNamespace(batch_idx=step)
        )
        return data.on_after_batch_transfer(batch, 0)[1]

    assert torch.equal(mixed(0, 5), mixed(0, 5))
    assert not torch.equal(mixed(0, 5), mixed(1, 5)) and not torch.equal(mixed(0, 5), mixed(0, 6))


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


def test_batches_equal_those_of_timms_loader_and_mixup_for_the_same_draws():
    images, labels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    ours = BatchTransform(num_classes=10, mean=[0.5] * 3, std=[0.25] * 3, erase=0.25, mixup=0.8, cutmix=1.0)
    theirs = PrefetchLoader([(images, labels)], (0.5,) * 3, (0.25,) * 3, device=torch.device("cpu"), re_prob=0.25, re_mode="pixel")
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=10)

    def as_timm(_):
        (pixels, hard), *_ = theirs
        return mix(pixels, hard)

    erased = 0
    for seed in range(20):
        (pixels, soft), (wanted, targets) = (
            seeded(transform, images.clone(), seed) for transform in (lambda batch: ours(batch, labels, training=True), as_timm)
        )
        torch.testing.assert_close(pixels, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(soft, targets)
        erased += not torch.equal(wanted, (images.float() - 127.5) / 63.75)
    assert erased


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
