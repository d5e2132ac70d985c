"""What is done sooner than in Pillow and timm gives the same bits."""

import io
import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import posterize

from tnt_lightning.data import augment
from tnt_lightning.data.images import open_image, upper_rows
from tnt_lightning.data.transforms import train_transform
from tnt_lightning.errors import UserError
from tnt_lightning.speed.data import photo as like_a_photo

from . import layouts
from .layouts import photo
from .test_data import imagenet, seeded, tiny  # noqa: F401

KINDS = {
    "4:2:0": dict(subsampling="4:2:0"),
    "4:2:2": dict(subsampling="4:2:2"),
    "4:4:4": dict(subsampling="4:4:4"),
    "progressive": dict(progressive=True),
    "restarts": dict(restart_marker_rows=1),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
def test_upper_rows_are_those_of_the_whole_image(tmp_path, kind, mode):
    rng = random.Random(kind)
    for size in ((64, 64), (75, 50), (33, 47), (500, 375)):
        file = tmp_path / "photo.jpg"
        photo(size=size).convert(mode).save(file, quality=rng.choice([30, 90]), **KINDS[kind])
        whole = np.asarray(Image.open(file))
        for rows in {1, 7, 8, 9, 15, 16, 17, size[1] - 1, size[1], *(rng.randint(1, size[1]) for _ in range(20))}:
            upper = upper_rows(open_image(str(file)), rows)
            assert upper.size == (size[0], rows) and upper.mode == mode
            np.testing.assert_array_equal(np.asarray(upper), whole[:rows])


def test_a_black_last_row_is_not_taken_for_an_error(tmp_path):
    image = photo(size=(64, 64))
    image.paste(0, (0, 16, 64, 48))
    image.save(tmp_path / "bars.jpg", quality=95)
    upper = upper_rows(open_image(str(tmp_path / "bars.jpg")), 32)
    assert upper.size == (64, 64), "the whole image, to be decoded"
    np.testing.assert_array_equal(np.asarray(upper), np.asarray(Image.open(tmp_path / "bars.jpg")))


@pytest.mark.parametrize("name", ["photo.png", "photo.bmp", "photo.webp", "turned.jpg", "cmyk.jpg"])
def test_whatever_else_is_decoded_whole(tmp_path, name):
    image = photo(size=(64, 64))
    file = tmp_path / name
    image.convert("CMYK" if name == "cmyk.jpg" else "RGB").save(file)
    opened = open_image(str(file))
    if name == "turned.jpg":
        opened = ImageOps.mirror(opened)
    upper = upper_rows(opened.convert("RGB") if opened.mode != "RGB" else opened, 20)
    want = Image.open(file).convert("RGB")
    np.testing.assert_array_equal(np.asarray(upper), np.asarray(ImageOps.mirror(want) if name == "turned.jpg" else want))


def test_a_file_that_ends_before_the_rows_is_an_error(tmp_path):
    data = io.BytesIO()
    photo(size=(200, 200)).save(data, "JPEG")
    file = tmp_path / "cut.jpg"
    file.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    for rows in (199, 40):  # the latter are there, but the rest is not
        with pytest.raises(UserError, match="cut.jpg: not a readable image .*runcated"):
            upper_rows(open_image(str(file)), rows)
    file.write_bytes(b"not an image")
    with pytest.raises(UserError, match="cut.jpg: not a readable image"):
        open_image(str(file))


ARGUMENTS: dict[str, list] = {
    "auto_contrast": [()],
    "equalize": [()],
    "invert": [()],
    "posterize": [(n,) for n in (1, 2, 4, 7, 8)],
    "solarize": [(x,) for x in (0, 1, 128, 255, 256)],
    "solarize_add": [(x,) for x in (0, 1, 99, 110)],
    "contrast": [(x,) for x in (0.1, 0.7, 1.0, 1.9)],
    "sharpness": [(x,) for x in (0.1, 0.7, 1.0, 1.9)],
    "shear": [(x,) for x in (0.0, 0.3, -0.3, 1 / 7, 0.25, -1.0, 3.0, 1e-9, -1e-12, 500.0)],
    "translate": [(x,) for x in (0.0, 0.45, -0.45, 1 / 7, 0.25, 0.999, -1.0, 1.5)],
}


@pytest.mark.parametrize("theirs", augment.OURS, ids=lambda f: f.__name__)
def test_an_operation_equals_timms(theirs):
    ours, rng = augment.OURS[theirs], random.Random(theirs.__name__)
    kind = theirs.__name__ if theirs.__name__ in ARGUMENTS else theirs.__name__.split("_")[0]
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)), like_a_photo((224, 224), noise)]
    images += [Image.new("RGB", (40, 30), (255, 0, 7))]  # areas of one colour: no histogram to stretch
    images += [Image.fromarray(noise.integers(90, 93 + i, (9, 40, 3), dtype=np.uint8)) for i in range(3)]
    for size in ((31, 17), (2, 1), (1, 1), (5, 64), (224, 120)):
        images.append(photo(size=size).resize((size[0] // 2 + 1, size[1] // 2 + 1)).resize(size))  # smooth, as photos are
    images[-1].paste((255, 255, 255), (0, 0, 100, 90))  # and an edge that a cubic overshoots
    for image, mode in itertools.product(images, ("RGB", "L", "CMYK")):
        more = [(rng.uniform(-0.45, 0.45),) for _ in range(4)] if kind in ("shear", "translate") else []
        for arguments in ARGUMENTS[kind] + more:
            for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)[: 2 if more else 1]:
                kwargs = dict(resample=resample, fillcolor=(124, 116, 104, 9)[: len(mode)])
                try:
                    want = theirs(image.convert(mode), *arguments, **kwargs)
                except OSError:  # no such operation for CMYK
                    continue
                np.testing.assert_array_equal(np.asarray(ours(image.convert(mode), *arguments, **kwargs)), np.asarray(want))


def test_a_batch_of_files_equals_timms(imagenet):  # noqa: F811
    first = imagenet / "train" / layouts.WORDNET[0]
    for i, size in enumerate(((500, 375), (375, 500), (640, 480), (299, 160))):
        photo(seed=i, size=(size[0] // 4, size[1] // 4)).resize(size).save(first / f"{first.name}_{i}.JPEG", quality=92)
    photo(seed=9, size=(300, 200)).convert("L").save(first / f"{first.name}_4.JPEG")
    policy = "rand-m9-mstd0.5-n4-p1-inc1"  # so that every operation comes up
    recipe = dict(crop_scale=[0.08, 1.0], hflip=0.5, rand_augment=policy)
    data = tiny(imagenet, image_size=64, batch_size=12, augmentation=recipe)
    loader = data.train_dataloader()
    theirs = create_transform(
        (3, 64, 64), is_training=True, auto_augment=policy, interpolation="bicubic", mean=(0.5,) * 3, normalize=False, hflip=0.5
    )
    for op in theirs.transforms[2].ops:
        if op.aug_fn is posterize:
            op.aug_fn = augment.safe_posterize
    for epoch in range(8):
        loader.sampler.set_epoch(epoch)
        images, labels = next(iter(loader))
        assert images.shape == (12, 3, 64, 64) and images.dtype == torch.uint8
        for image, label, (index, seed) in zip(images, labels, loader.sampler, strict=True):
            path = data.parts.train.path(index)
            assert label == data.parts.train.labels[index]
            assert torch.equal(image, seeded(theirs, Image.open(path).convert("RGB"), seed))


# ---- what is not to the bit, and off by default


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_resize_differs_by_few_levels(mode):
    image = photo(size=(60, 50)).resize((480, 400)).convert(mode)
    recipe = dict(crop_scale=(0.08, 1.0), hflip=0.5)
    for seed in range(10):
        exact = seeded(train_transform((64, 64), **recipe), image, seed).int()
        fast = seeded(train_transform((64, 64), **recipe, fast_resize=True), image, seed).int()
        assert exact.shape == fast.shape and (exact - fast).abs().max() <= 5 and (exact != fast).float().mean() < 0.05
    with pytest.raises(UserError, match="fast_resize=true.*lanczos"):
        train_transform((64, 64), interpolation="lanczos", **recipe, fast_resize=True)


def test_dct_scaling_decodes_large_crops_small_and_no_others(tmp_path):
    file = str(tmp_path / "photo.jpg")
    like_a_photo((800, 600), np.random.default_rng(0)).save(file, quality=95)
    recipe = dict(crop_scale=(0.08, 1.0))
    exact, small = train_transform((160, 160), **recipe), train_transform((160, 160), **recipe, dct_scaling=True)
    differing = 0
    for seed in range(20):
        opened = open_image(file)
        want, got = seeded(exact, open_image(file), seed).int(), seeded(small, opened, seed).int()
        assert (want - got).abs().float().mean() < 6
        assert torch.equal(want, got) == (opened.decoderconfig == ())
        differing += opened.decoderconfig != ()
    assert 5 < differing < 20
    image = Image.open(file).convert("RGB")
    assert torch.equal(seeded(exact, image, 0), seeded(small, image, 0)), "no JPEG that is yet to be decoded"
