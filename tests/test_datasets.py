"""Each data set as it lies on a disk: its splits, its labels, what is refused, and an epoch of training on it."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import tarfile
import threading
import time
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tnt_lightning.build import build_data
from tnt_lightning.data import CIFAR10, CIFAR100, Digits, Flowers102, ImageFolder, ImageNet, INaturalist, OxfordPets
from tnt_lightning.data import archives as archives_module
from tnt_lightning.data.archives import Archive
from tnt_lightning.data.formats import read_mat
from tnt_lightning.data.images import BrokenImage, decoded, open_as_seen
from tnt_lightning.errors import UserError

from . import layouts
from .conftest import PAPER, QUICK, command, resolved

SMALL = dict(image_size=16, batch_size=4, num_workers=0, subset=True)


def set_up(kind, root, **arguments):
    data = kind(root=str(root), **{**SMALL, **arguments})
    data.setup()
    return data


def labels(part):
    assert [part[i][1] for i in range(len(part.labels))] == list(part.labels)
    return list(part.labels)


def named(data: str, *overrides):
    """The data module of a data set's own YAML."""
    return build_data(resolved(f"data={data}", "image_size=16", "data.batch_size=4", "data.num_workers=0", *overrides))


# ---- every data set


def test_every_data_set_of_conf_is_made_here():
    from .test_config import options

    assert set(layouts.MADE) == set(options("data")) - {"digits", "imagenet_stream"}  # test_stream.py makes that


@pytest.mark.parametrize("name", layouts.MADE)
def test_the_authors_own_files_give_the_splits(name, tmp_path):
    layouts.MADE[name](tmp_path)
    classes = ["data.num_classes=2"] if name == "imagenet" else []
    data = named(name, f"data.root={tmp_path}", "data.subset=true", *classes)
    data.setup()
    assert tuple(part and len(part.labels) for part in data.parts) == layouts.SIZES[name]
    assert (
        len(data.parts.train.classes) == data.num_classes == (2 if name in ("imagenet", "folder") else PAPER["datasets"][name]["classes"])
    )
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    for part in data.parts:
        assert part is None or labels(part)


def test_num_classes_is_the_sets_own_unless_given(tmp_path):
    layouts.folder(tmp_path / "folder")
    assert [kind().num_classes for kind in (Digits, CIFAR10, CIFAR100, Flowers102, OxfordPets, ImageNet)] == [10, 10, 100, 102, 37, 1000]
    assert [INaturalist(year=year).num_classes for year in (2018, 2019)] == [8142, 1010]
    assert ImageFolder(root=str(tmp_path / "folder")).num_classes == 2
    with pytest.raises(UserError, match="data.num_classes=None"):
        ImageFolder()


@pytest.mark.parametrize("name", [name for name in layouts.MADE if name != "folder"])
def test_other_counts_than_the_official_ones_are_named(name, tmp_path):
    layouts.MADE[name](tmp_path)
    classes = ["data.num_classes=2"] if name == "imagenet" else []
    data, paper = named(name, f"data.root={tmp_path}", *classes), PAPER["datasets"][name]
    first = paper.get("official_train", paper["train"]) if name != "flowers" else 1020
    here = len(data.splits().train.labels)
    with pytest.raises(UserError, match=f"train has {here} images, officially {first:,}; .*data.subset=true"):
        data.setup()
    last = data.official.get("val" if "test" not in data.official else "test")
    assert last == paper.get("official_val", paper.get("val", paper.get("test")))


@pytest.mark.slow
@pytest.mark.parametrize("name", layouts.MADE)
def test_an_epoch_by_the_command(name, tmp_path):
    layouts.MADE[name](tmp_path)
    run = tmp_path / "run"
    done = command(
        "train", f"data={name}", f"data.root={tmp_path}", "model=tnt_digits", "image_size=16", "data.batch_size=4", "data.num_workers=1",
        *QUICK, "recipe.epochs=1", "recipe.warmup_epochs=0", "logger=csv", f"hydra.run.dir={run}",
        *([] if name == "folder" else ["data.subset=true"]), *(["data.num_classes=2"] if name == "imagenet" else []), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "repeated augmentation is off" in done.stdout
    result = json.loads((run / "result.json").read_text())
    _, val, test = layouts.SIZES[name]
    assert ("test/top1" in result) == (test is not None) and ("val/top1" in result) == (val is not None)
    assert result["steps"] == layouts.SIZES[name][0] // 4
    assert result["checkpoint"] == ("best" if val and test else "last") and ("best/val/top1" in result) == bool(val and not test)


# ---- ImageNet


LABELS = dict(
    names_and_numbers=("val.txt", "ILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000002.JPEG 0\nILSVRC2012_val_00000003.JPEG 0\n"
                       "ILSVRC2012_val_00000004.JPEG 1\n"),
    synsets=("imagenet_2012_validation_synset_labels.txt", "n02119789\nn01440764\nn01440764\nn02119789\n"),
)  # fmt: skip


@pytest.mark.parametrize("how", ["imagenet_flat", "imagenet_tars", "imagenet_kaggle", *LABELS])
def test_imagenets_validation_images_side_by_side(how, tmp_path):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" if how == "imagenet_kaggle" else tmp_path
    if how in LABELS:
        layouts.tree(root)
        layouts.flat_val(root)
        name, text = LABELS[how]
        (root / name).write_text(text)
    else:
        getattr(layouts, how)(tmp_path)
    data = set_up(ImageNet, root, num_classes=2)
    assert labels(data.parts.val) == [1, 0, 0, 1]
    assert labels(data.parts.train) == [0] * 6 + [1] * 6 and data.parts.train.classes == list(layouts.WORDNET)


def test_tars_hold_the_same_pixels_as_the_folders_and_are_indexed_once(tmp_path):
    (tmp_path / "tars").mkdir()
    layouts.imagenet_flat(tmp_path / "folders")
    layouts.imagenet_tars(tmp_path / "tars")
    folders, tars = (set_up(ImageNet, tmp_path / place, num_classes=2).parts for place in ("folders", "tars"))
    for ours, theirs in zip(tars[:2], folders[:2], strict=True):
        for i in range(len(theirs.labels)):
            assert ours[i][1] == theirs[i][1] and np.array_equal(np.asarray(ours[i][0]), np.asarray(theirs[i][0]))
    again = pickle.loads(pickle.dumps(tars.train))
    assert again._file is None, "a descriptor means nothing in another process"
    assert np.array_equal(np.asarray(again[0][0]), np.asarray(folders.train[0][0]))
    index = tmp_path / "tars" / ".ILSVRC2012_img_train.tar.index.npz"
    kept = index.stat().st_mtime_ns
    set_up(ImageNet, tmp_path / "tars", num_classes=2)
    assert index.stat().st_mtime_ns == kept
    with (tmp_path / "tars" / "ILSVRC2012_img_train.tar").open("ab") as tar:
        tar.write(bytes(512))  # another tar now
    set_up(ImageNet, tmp_path / "tars", num_classes=2)
    assert index.stat().st_mtime_ns != kept
    index.write_bytes(index.read_bytes()[:50])  # a damaged one is made anew
    assert labels(set_up(ImageNet, tmp_path / "tars", num_classes=2).parts.train) == list(folders.train.labels)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: shutil.rmtree(root / "ILSVRC2012_devkit_t12"), "side by side, without labels; put ILSVRC2012_devkit_t12.tar.gz"),
        (
            lambda root: (root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"MATLAB"),
            "meta.mat: not a readable MATLAB file",
        ),
        (lambda root: (root / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n1\n"), "n00001740"),
        (lambda root: (root / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n"), "no label for"),
    ],
)
def test_validation_labels_that_do_not_fit(spoil, message, tmp_path):
    layouts.imagenet_flat(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        set_up(ImageNet, tmp_path, num_classes=2)


def test_a_label_file_of_ones_own(tmp_path):
    layouts.tree(tmp_path)
    layouts.flat_val(tmp_path)
    (own := tmp_path / "own.txt").write_text("0\n1\n1\n0\n")
    assert labels(set_up(ImageNet, tmp_path, num_classes=2, val_labels=str(own)).parts.val) == [0, 1, 1, 0]
    own.write_text("0\n1\n1\n2\n")
    with pytest.raises(UserError, match="own.txt: label '2' is neither a class of training nor a number from 0 to 1"):
        set_up(ImageNet, tmp_path, num_classes=2, val_labels=str(own))
    with pytest.raises(UserError, match="data.val_labels=/nowhere: no such file"):
        set_up(ImageNet, tmp_path, num_classes=2, val_labels="/nowhere")
    (alone := tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n2\n1\n")
    with pytest.raises(UserError, match="numbers mean nothing without the devkit's meta.mat"):
        set_up(ImageNet, tmp_path, num_classes=2, val_labels=str(alone))


def test_a_tar_that_was_cut_off(tmp_path):
    layouts.imagenet_tars(tmp_path)
    tar = tmp_path / "ILSVRC2012_img_train.tar"
    tar.write_bytes(tar.read_bytes()[:7000])
    with pytest.raises(UserError, match="not a whole tar"):
        set_up(ImageNet, tmp_path, num_classes=2)


# ---- CIFAR


def test_cifars_pixels_are_torchvisions(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10 as Theirs

    layouts.cifar10(tmp_path)
    monkeypatch.setattr(Theirs, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for part, train in (("train", True), ("test", False)):
        ours, theirs = getattr(set_up(CIFAR10, tmp_path, num_classes=10).parts, part), Theirs(str(tmp_path), train=train)
        assert ours.classes == theirs.classes and list(ours.labels) == theirs.targets
        assert all(np.array_equal(np.asarray(ours[i][0]), np.asarray(theirs[i][0])) for i in range(len(theirs)))
    assert len(set_up(CIFAR10, tmp_path / "cifar-10-batches-py", num_classes=10).parts.test.labels) == 4, "root may be the folder itself"


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("content", ["code", "half", "list"])
def test_a_batch_that_is_more_or_less_than_arrays(content, tmp_path):
    layouts.cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    whole = file.read_bytes()
    file.write_bytes(
        {"code": pickle.dumps(Malicious(tmp_path / "ran")), "half": whole[: len(whole) // 2], "list": pickle.dumps([])}[content]
    )
    with pytest.raises(UserError, match="data_batch_3: not a batch of arrays"):
        set_up(CIFAR10, tmp_path, num_classes=10)
    assert not (tmp_path / "ran").exists()


# ---- Flowers, Pets, iNaturalist


def test_flowers_trains_on_train_and_val_unless_val_is_kept(tmp_path):
    layouts.flowers(tmp_path)
    data = set_up(Flowers102, tmp_path, num_classes=102)
    assert labels(data.parts.train) == [0, 0, 4, 101, 76, 101] and labels(data.parts.test) == [101, 2, 8, 39, 59, 4]
    assert data.parts.val is None
    apart = set_up(Flowers102, tmp_path, num_classes=102, val_fraction=None).parts
    assert labels(apart.train) == [0, 0, 4, 101] and labels(apart.val) == [76, 101]
    assert np.array_equal(np.asarray(apart.train[0][0]), np.asarray(Image.open(tmp_path / "flowers-102" / "jpg" / "image_00005.jpg")))


def test_a_mat_file_that_is_not_whole(tmp_path):
    for name in ("setid", "imagelabels", "meta"):
        whole = (layouts.MATLAB / f"{name}.mat").read_bytes()
        for end in range(len(whole)):
            (cut := tmp_path / "cut.mat").write_bytes(whole[:end])
            with contextlib.suppress(UserError):  # any other error fails
                content = read_mat(cut)
                assert end >= 128 and set(content) < set(read_mat(layouts.MATLAB / f"{name}.mat")), "cut between two variables"
    with pytest.raises(UserError, match="cut.mat: not a readable MATLAB file"):
        read_mat(cut)


def test_pets_labels_and_names(tmp_path):
    layouts.pets(tmp_path)
    data = set_up(OxfordPets, tmp_path, num_classes=37)
    assert labels(data.parts.train)[:5] == [0, 0, 1, 1, 2] and data.parts.train.classes[:2] == ["Abyssinian", "american_bulldog"]
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("Abyssinian_1 1\n")
    with pytest.raises(UserError, match=r"test.txt: 'Abyssinian_1 1' is not of the form NAME CLASS SPECIES BREED"):
        set_up(OxfordPets, tmp_path, num_classes=37)


@pytest.mark.parametrize("layout", ["nested", "torchvision", "flat"])
def test_inat_takes_the_category_as_label_wherever_the_images_lie(layout, tmp_path):
    layouts.inat(tmp_path, layout=layout)
    data = set_up(INaturalist, tmp_path, year=2019, num_classes=1010)
    assert labels(data.parts.train) == labels(data.parts.val) == [3, 0, 1009, 3]
    assert data.parts.train.classes[1009] == "species 1009"
    assert any("265,240 and 3,003" in note and "265,213 and 3,030" in note for note in data.notes)


def test_inat_without_images_or_of_another_year(tmp_path):
    layouts.inat(tmp_path)
    with pytest.raises(UserError, match=r"train2018.json: no such file.*data.download=true fetches it"):
        set_up(INaturalist, tmp_path, year=2018, num_classes=8142)
    shutil.rmtree(tmp_path / "train_val2019")
    with pytest.raises(UserError, match="train_val2019/Birds/3/0{32}.jpg: no such file"):
        set_up(INaturalist, tmp_path, year=2019, num_classes=1010)
    with pytest.raises(UserError, match="data.year=2017"):
        INaturalist(year=2017, num_classes=10)


@pytest.mark.parametrize(
    "name, gone", [("flowers", "image_00005.jpg"), ("pets", "american_bulldog_2.jpg"), ("inat2019", "0" * 31 + "1.jpg")]
)
def test_listed_images_that_are_missing_are_counted(name, gone, tmp_path):
    layouts.MADE[name](tmp_path)
    next(tmp_path.rglob(gone)).unlink()
    with pytest.raises(UserError, match=f"{gone}: no such file .1 of .* listed images are missing"):
        named(name, f"data.root={tmp_path}").setup()
    fewer = named(name, f"data.root={tmp_path}", "data.subset=true")
    fewer.setup()
    assert len(fewer.parts.train.labels) == layouts.SIZES[name][0] - 1 and labels(fewer.parts.train)


# ---- a folder of one's own


def test_one_tree_is_split_by_fraction(tmp_path):
    layouts.tree(tmp_path, ("cat", "train"), ("all",))  # a class may be called train
    data = set_up(ImageFolder, tmp_path / "all", num_classes=2)
    assert data.parts.train.classes == ["cat", "train"] and data.parts.test is None
    assert labels(data.parts.train) == [0, 0, 0, 1, 1, 1] and labels(data.parts.val) == [0, 1]
    half = set_up(ImageFolder, tmp_path / "all", num_classes=2, val_fraction=0.5).parts
    assert len(half.train.labels) == len(half.val.labels) == 4
    whole = set_up(ImageFolder, tmp_path / "all", num_classes=2, val_fraction=0).parts
    assert len(whole.train.labels) == 8 and whole.val is None


@pytest.mark.parametrize("train, val", [("train", "valid"), ("Train", "Validation"), ("training", "val")])
def test_other_names_of_the_parts(train, val, tmp_path):
    layouts.tree(tmp_path, ("cat", "dog"), (train, val))
    data = set_up(ImageFolder, tmp_path)
    assert data.parts.train.classes == ["cat", "dog"] and len(data.parts.val.labels) == 8


def test_a_folder_around_the_data_is_no_class(tmp_path):
    layouts.tree(tmp_path / "around", ("cat", "dog"))
    with pytest.raises(UserError, match="around/ is the only class folder; name the folder that holds train/"):
        ImageFolder(root=str(tmp_path))


def test_every_image_is_taken_once_and_what_is_not_is_said(tmp_path):
    layouts.folder(tmp_path)
    cat = tmp_path / "train" / "cat"
    (cat / "round").symlink_to(cat)  # leads back
    (cat / "@eaDir").mkdir()
    (cat / "@eaDir" / "thumbnail.jpg").write_bytes(layouts.jpeg(0))
    (cat / "new.HEIC").write_bytes(b"")
    (tmp_path / "test" / "dog" / "new.HEIC").write_bytes(b"")
    data = set_up(ImageFolder, tmp_path)
    assert len(data.parts.train.labels) == 12 and "files that are taken for no images: 2 .heic" in data.notes


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    layouts.folder(tmp_path)
    real = os.scandir

    def scandir(place):  # as root, who runs tests in containers, may read everything
        if str(place).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="cat: Permission denied; the images in it would be missing"):
        set_up(ImageFolder, tmp_path, num_classes=2)


def test_a_test_folder_without_classes_is_passed_over(tmp_path):
    layouts.folder(tmp_path)
    for file in (tmp_path / "test").glob("*/*.JPEG"):
        file.rename(tmp_path / "test" / file.name)
    for folder in ("cat", "dog", ".ipynb_checkpoints"):
        shutil.rmtree(tmp_path / "test" / folder)
    data = set_up(ImageFolder, tmp_path)
    assert data.parts.test is None and any("test has no class folders" in note for note in data.notes)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: shutil.rmtree(root / "val" / "dog"), "val: class 'dog' is in training alone"),
        (lambda root: shutil.copytree(root / "test" / "dog", root / "test" / "emu"), "test: class 'emu' is in test alone"),
        (lambda root: [file.unlink() for file in (root / "train" / "dog").glob("*.JPEG")], "train/dog: no images in this class folder"),
        (lambda root: shutil.rmtree(root / "train"), "val/ without train/"),
    ],
)
def test_classes_that_one_side_lacks(spoil, message, tmp_path):
    layouts.folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        set_up(ImageFolder, tmp_path, num_classes=2)


def pixels(path: Path):
    return np.asarray(open_as_seen(str(path)).convert("RGB")).astype(int)


def test_photos_are_decoded_to_what_a_person_sees(tmp_path):
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    grey = np.tile(ramp, (16, 1))
    colour = np.stack([grey, grey[:, ::-1], np.full_like(grey, 90)], -1)

    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    assert np.array_equal(pixels(tmp_path / "sixteen.png")[..., 0], grey)
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    assert np.array_equal(pixels(tmp_path / "float.tiff")[..., 0], grey)

    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert abs(pixels(tmp_path / "cmyk.jpg") - colour).max() < 8
    Image.fromarray(colour).quantize(256).save(tmp_path / "palette.png")
    assert abs(pixels(tmp_path / "palette.png") - colour).mean() < 4

    clear = np.dstack([colour, np.where(np.arange(64) < 32, 255, 0)[None].repeat(16, 0).astype(np.uint8)])
    Image.fromarray(clear).save(tmp_path / "rgba.png")
    seen = pixels(tmp_path / "rgba.png")
    assert np.array_equal(seen[:, :32], colour[:, :32]) and (seen[:, 32:] == 255).all()

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the right: a viewer shows it turned back
    Image.fromarray(colour).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png"), np.rot90(colour, -1))
    stored = np.asarray(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(stored, colour), "ImageNet's images are taken as they are stored, as by timm"


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    layouts.photo(size=(40, 32)).save(tmp_path / "x.jpg")
    exif = b"Exif\0\0II*\0" + bytes([255, 255, 255, 127]) + bytes(range(256))
    layouts.photo(size=(40, 32)).save(tmp_path / "y.jpg", exif=exif)
    assert np.array_equal(pixels(tmp_path / "x.jpg"), pixels(tmp_path / "y.jpg"))
    for orientation in range(1, 9):  # Pillow's own, where its EXIF is whole
        tag = Image.Exif()
        tag[0x0112] = orientation
        layouts.photo(size=(40, 32)).save(tmp_path / "z.jpg", exif=tag)
        assert np.array_equal(pixels(tmp_path / "z.jpg"), np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "z.jpg"))))


@pytest.mark.parametrize("kind", ["png", "gif", "webp", "tiff", "bmp", "avif", "jpg"])
def test_damaged_bytes_are_a_broken_image_whatever_pillow_raises(kind, tmp_path):
    if f".{kind}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {kind}")
    layouts.photo(size=(24, 16)).save(tmp_path / f"x.{kind}")
    whole, rng = (tmp_path / f"x.{kind}").read_bytes(), np.random.default_rng(0)
    broken = 0
    for i in range(60):
        content = bytearray(whole[: int(rng.integers(1, len(whole)))] if i % 2 else whole)
        for place in rng.integers(0, len(content), 4):
            content[place] = int(rng.integers(256))
        try:
            decoded(open_as_seen(bytes(content), "x"))
        except BrokenImage:  # and nothing else
            broken += 1
    assert broken


def test_a_file_that_asks_for_another_program_is_no_image(tmp_path):
    (file := tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(UserError, match="x.jpg: not a readable image .of none of the kinds JPEG, "):
        open_as_seen(str(file))


# ---- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Flowers' own files, in miniature, on a web server of this machine."""
    (remote := tmp_path / "remote").mkdir()
    layouts.flowers(remote)
    with tarfile.open(remote / "102flowers.tgz", "w:gz") as tar:
        tar.add(remote / "flowers-102" / "jpg", "jpg")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(remote)))
    threading.Thread(target=web.serve_forever, daemon=True).start()

    def archive(name, holds):
        file = next(remote.rglob(name))
        return Archive(
            f"http://127.0.0.1:{web.server_port}/{file.relative_to(remote)}",
            hashlib.md5(file.read_bytes()).hexdigest(),
            f"flowers-102/{holds}",
            "flowers-102",
        )

    files = (archive("102flowers.tgz", "jpg"), archive("imagelabels.mat", "imagelabels.mat"), archive("setid.mat", "setid.mat"))
    monkeypatch.setattr(Flowers102, "archives", files)
    yield remote
    web.shutdown()


def test_download_fetches_what_is_missing(server, tmp_path, monkeypatch):
    root = tmp_path / "mine" / "data"
    data = set_up(Flowers102, root, num_classes=102, download=True)
    assert len(data.parts.train.labels) == 6 and labels(data.parts.test)
    assert not list(root.glob(".unpack-*"))
    monkeypatch.setattr(archives_module, "download_url", None)  # nothing is fetched twice
    set_up(Flowers102, root, num_classes=102, download=True)


def test_a_download_of_other_content_is_refused(server, tmp_path):
    (server / "flowers-102" / "setid.mat").write_bytes(zlib.compress(b"another"))
    with pytest.raises(UserError, match=r"data.download=true: .*setid.mat: what came has another md5"):
        set_up(Flowers102, tmp_path / "mine", num_classes=102, download=True)
    assert not (tmp_path / "mine" / "flowers-102" / "setid.mat").exists()
    with pytest.raises(UserError, match="ImageNet is not to be downloaded; get it from https://image-net.org"):
        set_up(ImageNet, tmp_path, num_classes=2, download=True)


def test_a_killed_unpacking_is_cleared_away_and_what_is_there_is_not_fetched(server, tmp_path, monkeypatch):
    (left := tmp_path / "mine" / ".unpack-abc").mkdir(parents=True)
    set_up(Flowers102, tmp_path / "mine", download=True)
    assert not left.exists()
    monkeypatch.setattr(archives_module, "download_url", None)
    set_up(Flowers102, tmp_path / "mine" / "flowers-102", download=True)  # another layout that is read


def test_of_two_processes_one_downloads(server, tmp_path, monkeypatch):
    fetched, real = [], archives_module.download_url
    monkeypatch.setattr(archives_module, "download_url", lambda url, *rest: (fetched.append(url), time.sleep(0.3), real(url, *rest)))
    threads = [threading.Thread(target=set_up, args=(Flowers102, tmp_path / "mine"), kwargs=dict(download=True)) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(fetched) == 3
