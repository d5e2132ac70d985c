"""The data sets: for each, where the files are and what the splits are; nothing about augmentation or loaders."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from tnt_lightning.data.decoding import unreadable
from tnt_lightning.data.module import ImageDataModule, Splits
from tnt_lightning.errors import UserError


class Digits(ImageDataModule):
    """Optical recognition of handwritten digits, bundled: 8x8, grey, 10 classes; train 1,222, val 216, test 359."""

    def splits(self) -> Splits:
        if self.root is not None:
            raise UserError(f"data.root={self.root}: the digits come with the package; leave data.root at null")
        if self.num_classes != 10:
            raise UserError(f"data.num_classes={self.num_classes}: there are 10 digits")
        folder = Path(__file__).parent / "digits"
        table = np.loadtxt(folder / "digits.csv.gz", delimiter=",", dtype=np.uint8)
        split = np.array((folder / "split.txt").read_text().split())
        pixels, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64]
        images = np.round(pixels * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
        return Splits(*(Arrays(images[split == part], labels[split == part]) for part in ("train", "val", "test")))


class ImageNet(ImageDataModule):
    """ImageNet-1k as sorted folders, root/train/CLASS/*.JPEG and root/val/CLASS/*.JPEG: 1,281,167 and 50,000 (paper, Table 2).

    The test labels are not public: val is the benchmark, unless val_fraction carves a validation part out of training.
    """

    def splits(self) -> Splits:
        if self.root is None:
            raise UserError("data.root is not set; give the folder that holds train/ and val/: data.root=/path/to/imagenet")
        root = Path(self.root).expanduser()
        train, val = (Folder(root / name) for name in ("train", "val"))
        if train.classes != val.classes:
            odd = sorted(set(train.classes) ^ set(val.classes))
            where = "train" if odd[0] in train.classes else "val"
            raise UserError(f"{root}: class {odd[0]!r} is in {where}/ alone ({len(odd)} such); the two need the same class folders")
        if (found := len(train.classes)) != self.num_classes:
            raise UserError(f"{root}: {found} class folders, data.num_classes={self.num_classes}; set data.num_classes={found}")
        return Splits(train, val, None)


class Arrays:
    """A split in memory: uint8 images (n, height, width), labels (n,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels.tolist()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


class Folder(DatasetFolder):
    """A split on disk, a folder a class, sorted by name; hidden files and folders (.ipynb_checkpoints, ._x.jpg) are passed over."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; data.root must hold train/ and val/, each with a folder a class")
        try:
            super().__init__(str(folder), loader=open_image, is_valid_file=_is_image)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())}") from None

    @property
    def labels(self) -> list[int]:
        return self.targets

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise UserError(f"{directory}: no class folders in it; expected {directory}/CLASS/IMAGE")
        return names, {name: label for label, name in enumerate(names)}


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMG_EXTENSIONS) and not Path(path).name.startswith(".")


def open_image(path: str) -> Image.Image:
    """The image, its header read and the rest yet to be decoded; UserError that names the file, since Pillow's own errors do not."""
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise unreadable(path, error) from None
