"""The data sets: for each, where the files are and what the splits are; nothing about augmentation or loaders."""

import csv
import json
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torchvision.datasets
from torchvision.datasets.utils import extract_archive

from tnt_lightning import trees
from tnt_lightning.data.archives import Archive
from tnt_lightning.data.formats import read_mat, read_pickle
from tnt_lightning.data.images import open_image
from tnt_lightning.data.module import ImageDataModule
from tnt_lightning.data.splits import Arrays, Files, Splits, Tar, folder
from tnt_lightning.errors import UserError


class Digits(ImageDataModule):
    """Optical recognition of handwritten digits, bundled: 8x8, grey, 10 classes; train 1,222, val 216, test 359."""

    classes = 10

    def splits(self) -> Splits:
        if self.root is not None:
            raise UserError(f"data.root={self.root}: the digits come with the package; leave data.root at null")
        place = Path(__file__).parent / "digits"
        table = np.loadtxt(place / "digits.csv.gz", delimiter=",", dtype=np.uint8)
        split = np.array((place / "split.txt").read_text().split())
        pixels, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64]
        images = np.round(pixels * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
        names = [str(digit) for digit in range(10)]
        return Splits(*(Arrays(images[split == part], labels[split == part], classes=names) for part in ("train", "val", "test")))


class CIFAR10(ImageDataModule):
    """CIFAR-10, 32x32, 10 classes: train 50,000, test 10,000 (paper, Table 2); root holds cifar-10-batches-py/."""

    layout, label_key = torchvision.datasets.CIFAR10, "labels"
    classes = 10
    official = {"train": 50_000, "test": 10_000}
    page = "https://www.cs.toronto.edu/~kriz/cifar.html"

    @property
    def archives(self) -> tuple[Archive, ...]:
        return (Archive(self.layout.url, self.layout.tgz_md5, f"{self.layout.base_folder}/{self.layout.meta['filename']}"),)

    def splits(self) -> Splits:
        place = self.place(self.layout.base_folder, self.layout.meta["filename"])
        names = read_pickle(place / self.layout.meta["filename"]).get(self.layout.meta["key"], [])

        def part(files: list[list[str]]) -> Arrays:
            batches = [read_pickle(place / name) for name, _ in files]
            try:
                images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                labels = [label for batch in batches for label in batch[self.label_key]]
                if len(labels) != len(images):
                    raise ValueError(f"{len(labels)} labels for {len(images)} images")
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{place}: {files[0][0]} is not of this data set ({error})") from None
            return Arrays(np.ascontiguousarray(images, dtype=np.uint8), labels, classes=names)

        return Splits(part(self.layout.train_list), None, part(self.layout.test_list))


class CIFAR100(CIFAR10):
    """CIFAR-100, 32x32, 100 classes: train 50,000, test 10,000 (paper, Table 2); root holds cifar-100-python/."""

    layout, label_key = torchvision.datasets.CIFAR100, "fine_labels"
    classes = 100


class Flowers102(ImageDataModule):
    """Oxford 102 Flowers: train 2,040 (the authors' train and val together), test 6,149 (paper, Table 2).

    root holds flowers-102/ with jpg/, setid.mat and imagelabels.mat. val_fraction=None keeps the authors' val apart: 1,020 and 1,020.
    """

    classes = 102
    official = {"train": 1_020, "val": 1_020, "test": 6_149}
    page = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    archives = (
        Archive(f"{page}102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", "flowers-102/jpg", "flowers-102"),
        Archive(f"{page}imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", "flowers-102/imagelabels.mat", "flowers-102"),
        Archive(f"{page}setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", "flowers-102/setid.mat", "flowers-102"),
    )

    def __init__(self, *, val_fraction: float | None = 0, **kwargs):
        super().__init__(val_fraction=val_fraction, **kwargs)

    def splits(self) -> Splits:
        place = self.place("flowers-102", "setid.mat")
        ids, labels = read_mat(place / "setid.mat"), read_mat(place / "imagelabels.mat").get("labels", np.zeros(0)).ravel()
        names = torchvision.datasets.Flowers102.classes

        def part(key: str) -> Files:
            try:
                images = [int(i) for i in ids[key].ravel()]
                paths, own = [place / "jpg" / f"image_{i:05d}.jpg" for i in images], [int(labels[i - 1]) - 1 for i in images]
            except (KeyError, IndexError):
                raise UserError(f"{place}: setid.mat and imagelabels.mat do not go together ({key}); fetch them again") from None
            return Files.listed(paths, own, classes=names, subset=self.subset)

        return Splits(part("trnid"), part("valid"), part("tstid"))


class OxfordPets(ImageDataModule):
    """Oxford-IIIT Pets, 37 classes: trainval 3,680, test 3,669 (paper, Table 2).

    root holds oxford-iiit-pet/ with images/ and annotations/trainval.txt, test.txt.
    """

    classes = 37
    official = {"train": 3_680, "test": 3_669}
    page = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
    archives = (
        Archive(f"{page}data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", "oxford-iiit-pet/images", "oxford-iiit-pet"),
        Archive(
            f"{page}data/annotations.tar.gz",
            "95a8c909bbe2e81eed6a22bccdf3f68f",
            "oxford-iiit-pet/annotations/trainval.txt",
            "oxford-iiit-pet",
        ),
    )

    def splits(self) -> Splits:
        place = self.place("oxford-iiit-pet", "annotations/trainval.txt")
        rows = {name: _rows(place / "annotations" / f"{name}.txt", "NAME CLASS SPECIES BREED", columns=4) for name in ("trainval", "test")}
        for name, part in rows.items():
            if odd := next((row for row in part if not row[1].isdecimal()), None):
                raise UserError(f"{place / 'annotations' / name}.txt: {odd[1]!r} of {odd[0]} is no class number")
        named = {int(row[1]) - 1: row[0].rpartition("_")[0] for part in rows.values() for row in part}
        names = [named.get(label, str(label)) for label in range(max(named) + 1)]
        train, test = (
            Files.listed(
                [place / "images" / f"{row[0]}.jpg" for row in part], [int(row[1]) - 1 for row in part], classes=names, subset=self.subset
            )
            for part in rows.values()
        )
        return Splits(train, None, test)


class INaturalist(ImageDataModule):
    """iNaturalist of the 2018 or 2019 competition, split by its own train{year}.json and val{year}.json; label = category id.

    2018: train 437,513, val 24,426, 8,142 classes. 2019: 265,213 and 3,030 in the files, 1,010 classes (paper, Table 2: 265,240 and
    3,003). root holds the JSON files, or annotations/ with them, and the images: train_val{year}/SUPER/CATEGORY/, or those folders
    alone, or all images flat.
    """

    page = "https://github.com/visipedia/inat_comp"

    def __init__(self, *, year: int, **kwargs):
        if year not in (2018, 2019):
            raise UserError(f"data.year={year}: the years with a split of their own here are 2018 and 2019")
        self.classes = {2018: 8_142, 2019: 1_010}[year]
        super().__init__(**kwargs)
        self.year = year
        self.official = {2018: {"train": 437_513, "val": 24_426}, 2019: {"train": 265_213, "val": 3_030}}[year]
        if year == 2019:
            self.notes.append("the paper's Table 2 prints 265,240 and 3,003 images; the competition's files hold 265,213 and 3,030")

    @property
    def archives(self) -> tuple[Archive, ...]:
        images, train, val = {
            2018: ("b1c6952ce38f31868cc50ea72d066cc3", "bfa29d89d629cbf04d826a720c0a68b0", "f2ed8bfe3e9901cdefceb4e53cd3775d"),
            2019: ("c60a6e2962c9b8ccbd458d12c8582644", "b06a6683537867c0d5c7a45f407a306d", "5cc5509b0fe495f1c8c1362612448497"),
        }[self.year]
        base = f"https://ml-inat-competition-datasets.s3.amazonaws.com/{self.year}"
        return (
            Archive(f"{base}/train{self.year}.json.tar.gz", train, f"train{self.year}.json"),
            Archive(f"{base}/val{self.year}.json.tar.gz", val, f"val{self.year}.json"),
            Archive(f"{base}/train_val{self.year}.tar.gz", images, f"train_val{self.year}"),
        )

    def splits(self) -> Splits:
        place = self.place("annotations", f"train{self.year}.json")
        train, val = (self._part(place / f"{part}{self.year}.json") for part in ("train", "val"))
        return Splits(train, val, None)

    def _part(self, file: Path) -> Files:
        try:
            content = json.loads(file.read_text())
            label = {entry["image_id"]: int(entry["category_id"]) for entry in content["annotations"]}
            images = [(entry["file_name"], label[entry["id"]]) for entry in content["images"]]
            named = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; get it from {self.page}, or give data.download=true") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not the competition's JSON of images, annotations and categories ({error!r})") from None
        if not images:
            raise UserError(f"{file}: no images in it")
        where = self._where([Path(name) for name, _ in images[:1000]])
        names = [named.get(i, str(i)) for i in range(max(named, default=-1) + 1)]
        paths = [where(Path(name)) for name, _ in images]
        return Files.listed(paths, [label for _, label in images], classes=names, subset=self.subset)

    def _where(self, samples: list[Path]) -> Callable[[Path], Path]:
        """From a JSON's file name (train_val2018/Aves/12/HASH.jpg) to where the images lie here."""
        root = self.home()
        layouts: tuple[Callable[[Path], Path], ...] = (
            lambda name: root / name,
            lambda name: root / Path(*name.parts[1:]),
            lambda name: root / str(self.year) / Path(*name.parts[1:]),  # as torchvision unpacks them
            lambda name: root / name.parts[0] / name.name,
            lambda name: root / name.name,
        )
        for layout in layouts:
            if any(layout(sample).exists() for sample in samples):
                return layout
        raise UserError(f"{root / samples[0]}: no such file, nor {samples[0].name} in {root}; get the images from {self.page}")


class ImageFolder(ImageDataModule):
    """Your own images: root/train/CLASS/IMAGE beside val/ and, if you have one, test/; or one tree, root/CLASS/IMAGE.

    The classes are training's. A tree without val/ and test/ gives val_fraction of training to val, a tenth if it is None. Images are
    shown as a person sees them: turned by EXIF, 16 bits scaled to 8, transparency on white.
    """

    spare = 0.1
    as_seen = True

    def __init__(self, *, root: str | None = None, num_classes: int | None = None, **kwargs):
        if num_classes is None and root is not None:
            num_classes = len(trees.own_classes(Path(root).expanduser()))
        super().__init__(root=root, num_classes=num_classes, **kwargs)

    def splits(self) -> Splits:
        found = trees.parts(self.home())
        others: Counter[str] = Counter()
        train = folder(found["train"], as_seen=self.as_seen, others=others)
        if "test" in found and not any(entry.is_dir() for entry in found["test"].iterdir()):
            self.notes.append(f"{found.pop('test')} has no class folders: its images are without labels, and nothing is measured on them")
        val, test = (
            folder(found[name], train.classes, as_seen=self.as_seen, others=others) if name in found else None for name in ("val", "test")
        )
        if others:
            kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in others.most_common(5))
            self.notes.append(f"files that are taken for no images: {kinds}")
        return Splits(train, val, test)


class ImageNet(ImageDataModule):
    """ImageNet-1k as people hold it: train 1,281,167, val 50,000 (paper, Table 2).

    root holds train/CLASS/*.JPEG, or ILSVRC2012_img_train.tar, read without unpacking; and val/CLASS/*.JPEG, or the images of val/
    or ILSVRC2012_img_val.tar side by side. Those need their labels: the devkit (ILSVRC2012_devkit_t12/ or .tar.gz) or a file in
    root, or `val_labels`: lines of NAME LABEL, Kaggle's LOC_val_solution.csv, or a label a line in the order of the names; a label
    is a WordNet id, or its place from 0 among them, sorted.

    The test labels are not public: val is the benchmark, unless val_fraction carves a validation part out of training.
    """

    classes = 1_000
    official = {"train": 1_281_167, "val": 50_000}
    page = "https://image-net.org/download.php"
    LABELS = (
        "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz", "LOC_val_solution.csv", "val.txt", "val_labels.txt",
        "ILSVRC2012_validation_ground_truth.txt", "imagenet_2012_validation_synset_labels.txt",
    )  # fmt: skip

    def __init__(self, *, val_labels: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.val_labels = val_labels

    def splits(self) -> Splits:
        root = self.home()
        train: Files | Tar
        if not (root / "train").is_dir() and (root / "ILSVRC2012_img_train.tar").is_file():
            train = Tar(root / "ILSVRC2012_img_train.tar")
        else:
            train = folder(root / "train")
        return Splits(train, self._val(root, train.classes), None)

    def _val(self, root: Path, classes: list[str]) -> Files | Tar:
        place = root / "val"
        if place.is_dir() and not any(entry.is_dir() and not entry.name.startswith(".") for entry in place.iterdir()):
            flat = [name for name in trees.images(place) if Path(name).parent == place]
            label = self._labels(root, [Path(name).name for name in flat], classes)
            return Files(flat, label, classes=classes, opener=open_image)
        if place.is_dir() or not (root / "ILSVRC2012_img_val.tar").is_file():
            return folder(place, classes)
        tar = Tar(root / "ILSVRC2012_img_val.tar")
        tar.classes, tar.labels = classes, self._labels(root, [Path(tar.name(i)).name for i in range(len(tar.names))], classes)
        return tar

    def _labels(self, root: Path, images: list[str], classes: list[str]) -> list[int]:
        """Of images in the order of their names."""
        places = [root, root / "val", *root.resolve().parents[:3]]  # Kaggle's lies above ILSVRC/Data/CLS-LOC
        found = [Path(self.val_labels).expanduser()] if self.val_labels else [p / name for p in places for name in self.LABELS]
        file = next((path for path in found if path.exists()), None)
        if file is None:
            raise UserError(
                f"{root}: the validation images lie side by side, without labels; put ILSVRC2012_devkit_t12.tar.gz or val.txt there, "
                "or name a file: data.val_labels=FILE"
                if not self.val_labels
                else f"data.val_labels={self.val_labels}: no such file"
            )
        labels = _devkit(file) if file.is_dir() or file.name.endswith(".tar.gz") else _label_file(file)
        if isinstance(labels, list):
            numbered = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", Path(name).stem) for name in images]
            if all(numbered):  # also of a subset
                labels = {f"ILSVRC2012_val_{i:08d}": label for i, label in enumerate(labels, 1)}
            elif len(labels) == len(images):
                labels = dict(zip((Path(name).stem for name in images), labels, strict=True))
            else:
                raise UserError(f"{file}: {len(labels):,} labels for {len(images):,} validation images")
        place = {name: i for i, name in enumerate(classes)}
        try:
            given = [labels[Path(name).stem] for name in images]
            return [place[label] if label in place else _number(label, len(classes)) for label in given]
        except KeyError as error:
            raise UserError(f"{file}: no label for validation image {error}") from None
        except ValueError as error:
            raise UserError(f"{file}: label {error} is neither a class of training nor a number from 0 to {len(classes) - 1}") from None


def _number(label: str, count: int) -> int:
    if not label.isdecimal() or int(label) >= count:
        raise ValueError(repr(label))
    return int(label)


def _devkit(place: Path) -> list[str]:
    """The WordNet ids of the validation images in the order of their names, from the devkit: a folder, or its tar.gz."""
    if not place.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            try:
                extract_archive(str(place), folder)
            except (OSError, EOFError, tarfile.TarError) as error:
                raise UserError(f"{place}: not a whole archive ({error})") from None
            return _devkit(next(Path(folder).glob("ILSVRC2012_devkit*"), Path(folder)))
    truth = place / "data" / "ILSVRC2012_validation_ground_truth.txt"
    synsets = read_mat(place / "data" / "meta.mat").get("synsets", [])
    try:
        wordnet = {int(row["ILSVRC2012_ID"].item()): row["WNID"] for row in synsets}
        return [wordnet[int(row[0])] for row in _rows(truth, "a number a line", columns=1)]
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: not ImageNet's devkit of 2012 ({error!r})") from None


def _label_file(file: Path) -> list[str] | dict[str, str]:
    """{name without suffix: label}, or the labels alone in the order of the names."""
    if file.name == "ILSVRC2012_validation_ground_truth.txt":
        if (file.parent / "meta.mat").exists():
            return _devkit(file.parent.parent)
        raise UserError(f"{file}: its numbers mean nothing without the devkit's meta.mat beside it; give ILSVRC2012_devkit_t12.tar.gz")
    if file.suffix == ".csv":  # Kaggle: ImageId,PredictionString with "n03995372 85 1 499 272 ..."
        with file.open(newline="") as lines:
            return {row[0]: row[1].split()[0] for row in csv.reader(lines) if len(row) > 1 and row[1][:1] == "n"}
    rows = _rows(file, "NAME LABEL, or a label a line")
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    return {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}


def _rows(file: Path, form: str, columns: int | None = None) -> list[list[str]]:
    """A text file's words, line by line, without empty lines and comments."""
    try:
        rows = [line.split() for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error.__class__.__name__}); expected lines of {form}") from None
    for row in rows:
        if columns is not None and len(row) != columns:
            raise UserError(f"{file}: {' '.join(row)!r} is not of the form {form}")
    if not rows:
        raise UserError(f"{file}: empty; expected lines of {form}")
    return rows
