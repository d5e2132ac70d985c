"""Shards: what prepare writes, and training from it, here and from afar."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import filelock
import litdata
import numpy as np
import pytest
import rich.progress
import torch
from litdata.streaming import downloader
from PIL import Image

from tnt_lightning import prepare as preparing
from tnt_lightning.build import build_data
from tnt_lightning.data import Digits, ImageNet, ImageNetStream
from tnt_lightning.data import shards as shards_module
from tnt_lightning.data.shards import MANIFEST, Manifest, Remote, Shards, open_shards
from tnt_lightning.data.splits import Files, Part
from tnt_lightning.data.stream import StreamOrder, chunks_of
from tnt_lightning.errors import UserError

from . import layouts
from .conftest import QUICK, command, resolved

AUGMENTED = dict(crop_scale=[0.08, 1.0], hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1")
OURS = dict(num_classes=3, image_size=16, batch_size=6, num_workers=0)
SMALL = 0.004  # megabytes a shard: about four of the images below


def make_tree(root: Path, train: int, val: int) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in ("n01", "n02", "n03"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, [*rng.integers(14, 20, 2).tolist(), 3], dtype=np.uint8))
                image.save(root / part / name / f"{name}_{i}.JPEG", quality=80)
    return root


def photos(root: Path) -> None:
    """Of a camera that was held upright, which ImageFolder turns."""
    layouts.folder(root)
    exif = Image.Exif()
    exif[0x0112] = 6
    layouts.photo(1, (20, 10)).save(root / "train" / "cat" / "upright.jpg", exif=exif)


def prepared(root: Path, out: Path, *overrides: str, chunk_mb: float = SMALL) -> Manifest:
    """What the command does, in this process."""
    config = resolved("data=imagenet", f"data.root={root}", "data.num_classes=3", "data.num_workers=2", "data.subset=true", *overrides)
    return preparing.prepare(config, out, chunk_mb=chunk_mb)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"), 14, 7)


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory) -> Path:
    """Shards of the tree, for tests that only read them."""
    out = tmp_path_factory.mktemp("shards") / "out"
    prepared(tree, out)
    return out


@pytest.fixture
def out(tree, tmp_path) -> Path:
    """Shards of the tree, to spoil."""
    prepared(tree, tmp_path / "out")
    return tmp_path / "out"


class Devices:
    """What the data module asks of a Trainer."""

    def __init__(self, world_size=1, global_rank=0, num_nodes=1):
        self.world_size, self.global_rank, self.num_nodes, self.accumulate_grad_batches = world_size, global_rank, num_nodes, 1
        self.training = False


def stream(root, *, trainer=None, **arguments) -> ImageNetStream:
    data = ImageNetStream(root=str(root), **OURS | arguments)
    data.trainer = trainer
    data.setup()
    return data


def epoch(data, number=0, first_batch=0):
    data.begin = number, first_batch
    loader = data.train_dataloader()
    return [(images, labels) for images, labels in loader]


def equal(these, those):
    return len(these) == len(those) and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(these, those, strict=True))


# ---- prepare


@pytest.mark.slow
def test_killed_prepare_goes_on_where_it_was_and_its_shards_train_a_model(tmp_path):
    root, out = make_tree(tmp_path / "images", 60, 7), tmp_path / "out"
    line = [
        "data=imagenet",
        f"data.root={root}",
        "data.num_classes=3",
        "data.num_workers=1",
        "data.subset=true",
        f"out={out}",
        "chunk_mb=0.0005",
    ]
    begun = subprocess.Popen(
        [sys.executable, "-m", "tnt_lightning.prepare", *line], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list((out / preparing.RECORDS).glob("*-chunk-*.json"))) < 5:
        assert begun.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert not (out / MANIFEST).exists()
    finished = {name: (out / name).stat().st_mtime_ns for name in preparing.written(out)}
    with pytest.raises(UserError, match="no such file; data.root is the folder that"):
        stream(out)

    done = command("prepare", *line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train 180, val 21 images" in done.stdout and "all as they were written" in done.stdout
    manifest = Manifest.loads((out / MANIFEST).read_text(), "")
    assert 5 <= len(finished) < len(manifest.chunks)
    assert all((out / name).stat().st_mtime_ns == when for name, when in finished.items()), "a finished shard was written again"
    assert not (out / preparing.RECORDS).exists()
    assert {path.name for path in out.rglob("*") if path.is_file()} == {MANIFEST, "index.json"} | {
        c.name.split("/")[1] for c in manifest.chunks
    }

    prepared(root, tmp_path / "at_once", "data.num_workers=1", chunk_mb=0.0005)
    assert (tmp_path / "at_once" / MANIFEST).read_bytes() == (out / MANIFEST).read_bytes()
    assert all((tmp_path / "at_once" / c.name).read_bytes() == (out / c.name).read_bytes() for c in manifest.chunks)

    recipe = (
        "model=tnt_digits",
        "recipe=digits",
        "data.in_chans=3",
        "image_size=8",
        "data.batch_size=45",
        "data.num_workers=2",
        "logger=csv",
    )
    done = command(
        "train", "data=imagenet_stream", f"data.root={out}", "data.num_classes=3", *recipe, *QUICK, "hydra.run.dir=run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2 * 4 and 0 < result["val/top1"] <= 100


def test_shards_hold_the_original_files_and_litdata_reads_them(tree, whole):
    manifest, place = open_shards(str(whole), keep=2)
    folder = ImageNet(root=str(tree), num_classes=3, subset=True)
    folder.setup()
    for name, split in (("train", folder.parts.train), ("val", folder.parts.val)):
        ours = Shards(place, manifest.split(name), manifest)
        assert ours.labels == list(split.labels) and ours.classes == list(split.classes)
        files = [Path(preparing.original(split, i)[1]) for i in range(len(ours.labels))]
        for index, file in enumerate(files):
            assert ours.read(index) == ((tree / name / file).read_bytes(), str(file))
            assert ours[index][0].tobytes() == split[index][0].tobytes()
        theirs = [(bytes(image), label, index, file) for image, label, index, file in litdata.StreamingDataset(str(whole / name))]
        assert sorted(item[2] for item in theirs) == list(range(len(files)))
        assert all(item == (ours.read(item[2])[0], ours.labels[item[2]], item[2], str(files[item[2]])) for item in theirs)


def test_a_shard_of_training_is_a_mixture_and_evaluation_keeps_its_order(whole):
    manifest, _ = open_shards(str(whole), keep=2)
    train, val = ([manifest.chunks[i].images for i in manifest.split(name)] for name in ("train", "val"))
    assert len(train) > 5 and sum(len(set(images[:, 1])) > 1 for images in train) >= len(train) - 2
    assert np.concatenate(val)[:, 0].tolist() == list(range(21))


@pytest.mark.parametrize(
    "name, lay", [("imagenet", layouts.imagenet_tars), ("pets", layouts.pets), ("flowers", layouts.flowers), ("folder", photos)]
)
def test_any_data_set_of_files_gives_its_own_pixels(tmp_path, name, lay):
    lay(tmp_path / "set")
    few = ["data.num_classes=2"] if name == "imagenet" else []
    config = resolved(f"data={name}", f"data.root={tmp_path / 'set'}", "data.subset=true", "data.num_workers=1", *few)
    preparing.prepare(config, tmp_path / "out", chunk_mb=0.01)
    theirs = build_data(config)
    theirs.setup()
    ours = stream(tmp_path / "out", num_classes=theirs.num_classes)
    for a, b in zip(ours.parts, theirs.parts, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.labels == list(b.labels) and a.classes == list(b.classes)
            assert all(a[i][0].size == b[i][0].size and a[i][0].tobytes() == b[i][0].tobytes() for i in range(len(a.labels)))


def test_names_that_are_not_utf8_are_written_out(tmp_path):
    root = make_tree(tmp_path / "images", 3, 2)
    for part in ("train", "val"):
        (root / part / "n02").rename(root / part / os.fsdecode(b"caf\xe9"))
        (root / part / "n03").rename(root / part / "n\u00e9")
    prepared(root, tmp_path / "out")
    data = stream(tmp_path / "out")
    assert data.parts.train.classes == [os.fsdecode(b"caf\xe9"), "n01", "n\u00e9"]
    assert {data.parts.train.read(i)[1].split("/")[0] for i in range(9)} == {r"caf\xe9", "n01", "n\u00e9"}
    assert len(epoch(data)) == 1 and len(list(litdata.StreamingDataset(str(tmp_path / "out" / "val")))) == 6


def test_names_that_are_files_of_the_current_folder_stay_names(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree / "train")
    prepared(tree, tmp_path / "out")
    name = stream(tmp_path / "out").parts.train.read(0)[1]
    assert Path(name).is_file()


def test_images_without_files_are_kept_to_the_pixel(tmp_path):
    preparing.prepare(resolved("data=digits"), tmp_path, chunk_mb=1)
    digits = dict(num_classes=10, in_chans=1, image_size=8)
    theirs, ours = Digits(**digits), ImageNetStream(root=str(tmp_path), **digits)
    theirs.setup(), ours.setup()
    for a, b in zip(ours.parts, theirs.parts, strict=True):
        assert a.labels == b.labels
        assert all(a[i][0].tobytes() == b[i][0].tobytes() for i in range(0, len(a.labels), 17))


def test_shards_of_shards_hold_the_same_files(tmp_path):
    photos(tmp_path / "set")
    Image.new("CMYK", (20, 10), (9, 90, 200, 30)).save(tmp_path / "set" / "train" / "cat" / "print.jpg")
    preparing.prepare(resolved("data=folder", f"data.root={tmp_path / 'set'}", "data.num_workers=1"), tmp_path / "first", chunk_mb=0.002)
    classes = len(stream(tmp_path / "first", num_classes=2).parts.train.classes)
    source = ["data=imagenet_stream", f"data.root={tmp_path / 'first'}", f"data.num_classes={classes}", "data.num_workers=1"]
    for _ in range(2):  # and goes on with what it has
        manifest = preparing.prepare(resolved(*source), tmp_path / "second", chunk_mb=0.005)
    first, second = stream(tmp_path / "first", num_classes=classes), stream(tmp_path / "second", num_classes=classes)
    assert manifest.made["as_seen"] is True and len(manifest.chunks) < len(first.parts.train.place.chunks)
    for a, b in zip(first.parts, second.parts, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.labels == b.labels and a.classes == b.classes
            assert all(a.read(i) == b.read(i) and a[i][0].tobytes() == b[i][0].tobytes() for i in range(len(a.labels)))


def test_what_val_fraction_carves_is_written_as_parts(tree, tmp_path):
    manifest = prepared(tree, tmp_path / "out", "data.val_fraction=0.25")
    assert {name: made["images"] for name, made in manifest.made["splits"].items()} == {"train": 30, "val": 12, "test": 21}
    data = stream(tmp_path / "out")
    assert Counter(data.parts.val.labels) == dict.fromkeys(range(3), 4) and len(data.parts.test.labels) == 21


def test_prepare_again_writes_only_what_is_missing(tree, out):
    manifest = Manifest.loads((out / MANIFEST).read_text(), "")
    before = {chunk.name: (out / chunk.name).stat().st_mtime_ns for chunk in manifest.chunks}
    gone, cut = (out / manifest.chunks[i].name for i in (1, 3))
    content = {path: path.read_bytes() for path in (gone, cut)}
    gone.unlink()
    cut.write_bytes(content[cut][:100])
    prepared(tree, out)
    assert all(path.read_bytes() == bytes_ for path, bytes_ in content.items())
    changed = {chunk.name for chunk in manifest.chunks if (out / chunk.name).stat().st_mtime_ns != before[chunk.name]}
    assert changed == {manifest.chunks[1].name, manifest.chunks[3].name}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda out, file: (out / "mine.txt").write_text("") or (out / MANIFEST).unlink(), "holds something else"),
        (lambda out, file: ["seed=1"], "begun with seed=0, now seed=1"),
        (lambda out, file: ["data.val_fraction=0.25"], "begun with other images"),
        (lambda out, file: file.rename(file.with_name("other.JPEG")), "begun with other images"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path, spoil, message):
    root, out = make_tree(tmp_path / "images", 3, 2), tmp_path / "out"
    prepared(root, out)
    overrides = spoil(out, root / "train" / "n02" / "n02_1.JPEG")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        prepared(root, out, *(overrides if isinstance(overrides, list) else []))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_made_is_answered_in_one_line(tree, tmp_path):
    (tmp_path / "file").touch()
    for out in (Path("/proc/nothing/out"), tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=f"out={out}: .* cannot be made or read .*; choose another out") as caught:
            prepared(tree, out)
        assert "\n" not in str(caught.value)


def test_of_two_that_begin_at_once_the_second_writes_no_plan(tmp_path, monkeypatch):
    root, out = make_tree(tmp_path / "images", 3, 2), tmp_path / "out"
    monkeypatch.setattr(preparing, "in_threads", lambda *args, **kwargs: stop.append(kwargs) or 1 / 0)
    stop: list = []

    class Lock(filelock.FileLock):
        """Another prepare, with another plan, gets in before this one has the lock."""

        def acquire(self, *args, **kwargs):
            if not stop and not others:
                others.append(1)
                with pytest.raises(ZeroDivisionError):
                    prepared(root, out, "seed=1")
            return super().acquire(*args, **kwargs)

    others: list = []
    monkeypatch.setattr(filelock, "FileLock", Lock)
    with pytest.raises(UserError, match="begun with seed=1, now seed=0"):
        prepared(root, out)
    assert json.loads((out / preparing.RECORDS / "plan.json").read_text())["seed"] == 1 and len(stop) == 1


def test_the_plan_of_many_images_shows_a_bar_and_takes_all_names(monkeypatch):
    bars, image, count = [], "/set/n01/a.JPEG", 100_001
    monkeypatch.setattr(preparing, "size", lambda split, index: 10**6)
    monkeypatch.setattr(rich.progress, "track", lambda steps, title, **kwargs: bars.append((title, kwargs["disable"])) or steps)
    many = Part(Files([image] * count, [0] * count, classes=["n01"]), range(count))
    made = preparing.plan(Digits(num_classes=10, in_chans=1, image_size=8), {"train": many, "val": Part(many, range(3))}, 64)
    assert bars == [("names of train", False), ("names of val", True)]
    assert made["splits"]["train"]["source"] == hashlib.sha256(b"n01/a.JPEG\x000\n" * count).hexdigest()


# ---- damage


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, why, workers",
    [
        (lambda file: flip(file, -40), r"damaged \(item \d+ is not what was written\)", 0),  # in an image
        (lambda file: flip(file, 5), r"damaged \(its table of contents", 0),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "bytes, .* were written", 1),
        (lambda file: file.unlink(), "No such file", 0),
    ],
)
def test_a_damaged_shard_is_named_in_one_line_by_verify_and_in_training(out, spoil, why, workers):
    file = out / "train" / "chunk-0-2.bin"
    spoil(file)
    with pytest.raises(UserError, match=why) as caught:
        preparing.verify(out, threads=workers)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    data = stream(out, num_workers=workers)
    with pytest.raises(UserError, match=why) as caught:
        epoch(data)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_a_bit_outside_the_images_is_found_by_verify(out):
    manifest, place = open_shards(str(out), keep=2)
    shards = Shards(place, manifest.split("train"), manifest)
    name = shards.read(5)[1].encode()
    file = out / manifest.chunks[shards.chunk[5]].name
    flip(file, file.read_bytes().index(name))
    with pytest.raises(UserError, match=f"{file.name}: damaged .its checksum"):
        preparing.verify(out, threads=1)


def test_a_broken_original_is_named(tree, tmp_path):
    root = make_tree(tmp_path / "images", 3, 2)
    broken = root / "train" / "n02" / "n02_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    prepared(root, tmp_path / "out")
    with pytest.raises(UserError, match=r"out/train/chunk-0-\d.bin: n02/n02_1.JPEG: not a readable image"):
        epoch(stream(tmp_path / "out", batch_size=9))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda content: content[:-10], "not a whole manifest"),
        (lambda content: content.replace('"size": ', '"size": 1', 1), "its checksum is another"),
        (lambda content: content.replace("train/chunk-0-1.bin", "../../chunk-0-1.bin"), "its checksum is another"),
        (lambda content: content.replace('"format": 1', '"format": 2'), "format 2, this version reads 1"),
        (lambda content: "[]", "not a whole manifest"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(out, spoil, message):
    (out / MANIFEST).write_text(spoil((out / MANIFEST).read_text()))
    with pytest.raises(UserError, match=message):
        stream(out)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content["made"].pop("as_seen"),
        lambda content: content.update(made=None),
        lambda content: content["made"]["splits"].pop("val"),
        lambda content: content["made"].update(splits={"train": 3, "val": 3}),
        lambda content: content["chunks"][0].update(size=float("inf")),
    ],
)
def test_a_manifest_with_a_right_checksum_says_all_that_is_asked_of_it(out, spoil):
    content = json.loads((out / MANIFEST).read_text())
    del content["checksum"]
    spoil(content)
    (out / MANIFEST).write_text(json.dumps({**content, "checksum": shards_module._checksum(content)}))
    for reading in (lambda: stream(out), lambda: preparing.verify(out, threads=1)):
        with pytest.raises(UserError, match=f"{out / MANIFEST}: not a whole manifest") as caught:
            reading()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"name": 3, "size": 1, "sha256": ""}', "\0"])
@pytest.mark.parametrize(
    "file, said", [("plan.json", "begin again|begun with"), ("train-chunk-0-1.json", "delete it: its shard is written")]
)
def test_a_damaged_record_is_named(tree, tmp_path, monkeypatch, file, said, text):
    out = tmp_path / "out"
    monkeypatch.setattr(preparing, "read_again", lambda *args, **kwargs: 1 / 0)  # ends before it is finished
    with pytest.raises(ZeroDivisionError):
        prepared(tree, out)
    (out / preparing.RECORDS / file).write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        prepared(tree, out)
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)


def test_a_manifest_names_no_file_outside_and_no_pickle_is_read(out):
    content = json.loads((out / MANIFEST).read_text())
    del content["checksum"]
    content["chunks"][0]["name"] = "train/../../../etc/passwd"
    (out / MANIFEST).write_text(json.dumps({**content, "checksum": shards_module._checksum(content)}))
    with pytest.raises(UserError, match="not a whole manifest .*chunk 'train/../../../etc/passwd'"):
        stream(out)


def test_index_json_is_not_asked_what_to_unpickle(out):
    for index in out.glob("*/index.json"):
        index.write_text(index.read_text().replace('"bytes"', '"pickle"'))
    assert len(epoch(stream(out))) == 7


# ---- order


@pytest.mark.parametrize("world, nodes", [(1, 1), (2, 1), (2, 2), (4, 2), (6, 3)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_share_an_epoch_without_overlap(world, nodes, repeats):
    lie = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 5))
    made = dict(lie=lie, place=None, window=3, nodes=nodes, total=96, repeats=repeats, world=world, seed=0)
    keys = [list(StreamOrder(100, rank=rank, **made)) for rank in range(world)]
    assert all(len(share) == 96 // world for share in keys)
    counts = Counter(index for index, _ in itertools.chain(*keys))
    assert sum(counts.values()) == 96 and max(counts.values()) == repeats and len(counts) <= -(-96 // repeats) + nodes
    assert len({key for share in keys for key in share}) == 96, "repeats of an image need draws of their own"
    # Machines read stretches of the chunks of their own; where one ends the next begins.
    read = [
        {int(lie[index]) for rank in range(node * world // nodes, (node + 1) * world // nodes) for index, _ in keys[rank]}
        for node in range(nodes)
    ]
    assert sum(map(len, read)) <= len(set.union(*read)) + nodes - 1
    # An epoch keeps few chunks open at a time: between a chunk's first image and its last, at most `window` others begin.
    places = np.stack([lie[[index for index, _ in share]] for share in keys], 1)[:, : world // nodes].ravel()
    first = {chunk: np.flatnonzero(places == chunk)[0] for chunk in set(places)}
    last = {chunk: np.flatnonzero(places == chunk)[-1] for chunk in set(places)}
    assert max(sum(first[a] < first[b] < last[a] for b in first) for a in first) <= 2 * 3


def test_every_epoch_is_another_and_mixes_chunks(whole):
    data = stream(whole, window=4)
    order = data.train_dataloader().sampler
    epochs = []
    for number in (0, 0, 1):
        order.set_epoch(number)
        epochs.append([index for index, _ in order])
    assert epochs[0] == epochs[1] != epochs[2] and Counter(epochs[0]).keys() == set(range(42))
    lie = chunks_of(data.parts.train)[epochs[0]]
    assert np.mean(lie[1:] != lie[:-1]) > 0.5


@pytest.mark.parametrize("repeats", [1, 3])
def test_workers_change_no_pixel_and_an_epoch_can_begin_in_its_middle(whole, repeats):
    augmentation = {**AUGMENTED, "repeats": repeats}
    alone = [epoch(stream(whole, augmentation=augmentation), number) for number in (0, 1)]
    assert not equal(*alone)
    for workers in (1, 2):
        data = stream(whole, augmentation=augmentation, num_workers=workers)
        loader = data.train_dataloader()
        for number in (0, 1):  # the workers stay
            loader.sampler.set_epoch(number)
            assert equal(list(loader), alone[number])
    for workers in (0, 2):
        data = stream(whole, augmentation=augmentation, num_workers=workers)
        data.begin = 1, 3
        loader = data.train_dataloader()
        assert equal(list(loader), alone[1][3:])
        loader.sampler.set_epoch(0)
        assert equal(list(loader), alone[0]), "the next epoch is a whole one"


def test_the_start_in_the_middle_is_that_of_each_rank(whole):
    for rank in range(2):
        data = stream(whole, trainer=Devices(2, rank), augmentation={**AUGMENTED, "repeats": 3})
        assert equal(epoch(data, 4, first_batch=5), epoch(data, 4)[5:])


def test_an_image_is_augmented_as_from_the_folder(tree, whole):
    folder = ImageNet(root=str(tree), **OURS, subset=True, augmentation=AUGMENTED)
    folder.setup()

    def images(data):
        return Counter(image.numpy().tobytes() + bytes([label]) for batch in epoch(data, 2) for image, label in zip(*batch, strict=True))

    assert images(folder) == images(stream(whole, augmentation=AUGMENTED))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("val_fraction, count", [(None, 21), (0.3, 12)])
def test_evaluation_counts_every_image_once(whole, world, val_fraction, count):
    want = stream(whole, val_fraction=val_fraction).parts.val
    transform = stream(whole).eval_transform
    seen = Counter()
    for rank in range(world):
        data = stream(whole, trainer=Devices(world, rank), val_fraction=val_fraction)
        lie = chunks_of(data.parts.val)[list(data.val_dataloader().sampler)]
        assert (np.diff(lie) >= 0).all(), "shard after shard"
        for batch in data.val_dataloader():
            seen += Counter((image.numpy().tobytes(), int(label)) for image, label in zip(*batch, strict=True))
    assert sum(seen.values()) == count
    assert seen == Counter((transform(want[i][0].convert("RGB")).numpy().tobytes(), want.labels[i]) for i in range(count))


def test_held_in_memory_it_is_the_same_images(whole):
    held, data = stream(whole, cache=True), stream(whole)
    assert equal(list(held.val_dataloader()), list(data.val_dataloader()))
    shown = [Counter(image.numpy().tobytes() for images, _ in epoch(each) for image in images) for each in (held, data)]
    assert shown[0] == shown[1]


# ---- from afar


def afar(whole, cache, **arguments) -> ImageNetStream:
    return stream(f"local:{whole}", cache_dir=str(cache), **{"window": 2, **arguments})


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_from_afar_are_fetched_once_and_give_the_same_pixels(whole, tmp_path, workers, monkeypatch):
    fetched = tmp_path / "fetched.txt"

    def download(address, file, really=shards_module.download):
        with fetched.open("a") as log:
            log.write(f"{address}\n")
        really(address, file)

    monkeypatch.setattr(shards_module, "download", download)
    here = stream(whole, window=2, augmentation=AUGMENTED)
    there = afar(whole, tmp_path / "cache", num_workers=workers, augmentation=AUGMENTED)
    loader = there.train_dataloader()
    for number in (0, 1):
        loader.sampler.set_epoch(number)
        assert equal(list(loader), epoch(here, number))
    counts = Counter(line for line in fetched.read_text().split() if line.endswith(".bin"))
    manifest, _ = open_shards(str(whole), keep=1)
    assert {f"local:{whole}/{manifest.chunks[i].name}" for i in manifest.split("train")} <= set(counts) and set(counts.values()) == {1}
    files = {path.name for path in (tmp_path / "cache").glob("*.bin")}
    assert files <= {f"{chunk.sha256}.bin" for chunk in manifest.chunks} and not list((tmp_path / "cache").glob("fetching-*"))


def test_the_cache_keeps_to_its_limit_and_the_epoch_to_its_pixels(whole, tmp_path, monkeypatch):
    manifest, _ = open_shards(str(whole), keep=1)
    largest = max(chunk.size for chunk in manifest.chunks)
    assert len(manifest.split("train")) > 9
    with pytest.raises(
        UserError, match=r"data.cache_gb=1e-06: 8 shards of .*e-06 GB are in use at a time; give at least .*e-05, or lower data.window"
    ):
        afar(whole, tmp_path / "cache", cache_gb=1e-6)
    limit, log = 8 * largest, tmp_path / "sizes.txt"

    def make_room(self, keep, really=Remote._make_room):  # also in the process that fetches ahead
        really(self, keep)
        there = [chunk.size for chunk in manifest.chunks if (self.cache / f"{chunk.sha256}.bin").exists()]
        with log.open("a") as file:
            file.write(f"{sum(there)}\n")

    monkeypatch.setattr(Remote, "_make_room", make_room)
    there = afar(whole, tmp_path / "cache", cache_gb=limit / 1e9)
    for number in range(3):
        assert equal(epoch(there, number), epoch(stream(whole, window=2), number))
    sizes = [int(line) for line in log.read_text().split()]
    # Who fetches ahead and who reads may each have brought one more.
    assert len(sizes) > len(manifest.split("train")) and max(sizes) <= limit + largest


class Reading:
    """Item i: reads image i in a worker, and waits until the cache holds `want`; what it holds then, and the worker's own children."""

    def __init__(self, split, want):
        self.split, self.want = split, want

    def __getitem__(self, index):
        self.split[index]
        cache, until = self.split.place.cache, time.monotonic() + 20
        while {path.name for path in cache.glob("*.bin")} != self.want and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        try:
            children = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            children = None
        return {path.name for path in cache.glob("*.bin")}, children


def names_ahead(there) -> tuple[int, list[str]]:
    """The first image of an epoch, and the cache's names of the chunks in the epoch's order."""
    lie, place = chunks_of(there.parts.train), there.parts.train.place
    order = [index for index, _ in there.train_dataloader().sampler]
    turns = list(dict.fromkeys(lie[order].tolist()))  # with a window of one, chunk after chunk
    assert turns != sorted(turns)
    return order[0], [f"{place.chunks[number].sha256}.bin" for number in turns]


def test_the_next_shards_are_fetched_ahead_in_the_order_of_the_epoch_and_no_child_is_left(whole, tmp_path):
    there = afar(whole, tmp_path / "cache", window=1)
    first, names = names_ahead(there)
    want = set(names[: 1 + Remote.AHEAD])
    reading = Reading(there.parts.train, want)
    ((held, children),) = torch.utils.data.DataLoader(reading, sampler=[first], batch_size=None, num_workers=1)
    assert held == want and children is None


@pytest.mark.parametrize("worker, fork", [(False, True), (True, False)])
def test_outside_of_workers_or_without_fork_a_shard_is_fetched_when_its_turn_comes(whole, tmp_path, monkeypatch, worker, fork):
    there = afar(whole, tmp_path / "cache", window=1)
    first, names = names_ahead(there)
    if worker:
        monkeypatch.setattr(shards_module, "get_worker_info", lambda: object(), raising=False)
    if fork:
        monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    else:
        monkeypatch.delattr(os, "fork")
    there.parts.train[first]
    assert [path.name for path in (tmp_path / "cache").glob("*.bin")] == names[:1]


@pytest.mark.parametrize("times", [2, 100])
def test_what_came_otherwise_than_written_is_fetched_again_and_then_named(whole, tmp_path, monkeypatch, times):
    def download(address, file, really=shards_module.download):
        really(address, file)
        if address.endswith("train/chunk-0-2.bin") and len(list(tmp_path.glob("spoilt-*"))) < times:
            (tmp_path / f"spoilt-{time.monotonic_ns()}").touch()
            flip(file, 50)

    monkeypatch.setattr(shards_module, "download", download)
    monkeypatch.setattr(shards_module.time, "sleep", lambda seconds: None)
    data = afar(whole, tmp_path / "cache")
    if times == 2:
        assert equal(epoch(data), epoch(stream(whole, window=2)))
        assert len(list(tmp_path.glob("spoilt-*"))) == 2
    else:
        with pytest.raises(UserError, match="train/chunk-0-2.bin: damaged .fetched three times"):
            epoch(data)


def test_an_object_store_is_asked_through_litdata(whole, tmp_path, monkeypatch):
    """Its own addresses and downloaders, without a store: this one stands in for S3's."""

    class Bucket(downloader.Downloader):
        def download_fileobj(self, remote_filepath, fileobj):
            random.random(), np.random.rand(), torch.rand(1)  # as boto3 does
            fileobj.write((whole / remote_filepath.removeprefix("s3://bucket/set/")).read_bytes())

    monkeypatch.setitem(downloader._DOWNLOADERS, "s3://", Bucket)
    there = stream("s3://bucket/set/", cache_dir=str(tmp_path), num_workers=1, augmentation=AUGMENTED)
    assert equal(epoch(there), epoch(stream(whole, augmentation=AUGMENTED)))


# ---- mistakes


def test_mistakes_are_answered_in_one_line(tree, whole, tmp_path, monkeypatch):
    for arguments, message in (
        (dict(root=None), "data.root is not set"),
        (dict(root=str(tree)), f"{tree / MANIFEST}: no such file; data.root is the folder that"),
        (dict(root="ftp://host/path"), "data.root=ftp://host/path: neither a folder nor an address that begins with s3://"),
        (dict(root="local:/nowhere"), "local:/nowhere/shards.json: cannot be fetched .FileNotFoundError"),
        (dict(root=str(whole), num_classes=1000), "data.num_classes=1000: the set has 3 classes; set data.num_classes=3"),
        (dict(root=str(whole), window=0), "data.window=0 is not a whole number of at least 1"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ImageNetStream(**OURS | arguments).setup()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nothing/shards.json: no such file; what python -m tnt_lightning.prepare has finished holds one"):
        preparing.verify(tmp_path / "nothing", threads=1)
    monkeypatch.setitem(sys.modules, "litdata.streaming.downloader", None)
    monkeypatch.setitem(sys.modules, "litdata.streaming.writer", None)
    with pytest.raises(UserError, match=r"s3://bucket/shards.json: needs litdata: pip install litdata"):
        ImageNetStream(**OURS, root="s3://bucket").setup()
    with pytest.raises(UserError, match=r"prepare needs litdata: pip install litdata"):
        prepared(tree, tmp_path / "out")


@pytest.mark.parametrize(
    "line, said",
    [
        ((), "error: out is not set; give the folder that the shards go into: out=DIR"),
        (("out=x", "chunk=3"), "error: chunk=3: no such key"),
    ],
)
def test_the_command_answers_mistakes_with_two(tmp_path, line, said):
    done = command("prepare", *line, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
