"""A tree of images, a folder a class: what is in it, without opening any. Hidden files and folders (.ipynb_checkpoints) do not count."""

import os
from pathlib import Path

from tnt_lightning.errors import UserError

# What Pillow reads without a program beside it.
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")


def parts(root: Path) -> dict[str, Path]:
    """{train, val, test} of a tree, as far as they are there; {train: root} for one without: root/CLASS/IMAGE."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder")
    named = {name: root / name for name in ("train", "val", "test")}
    for other in ("valid", "validation"):
        if not named["val"].is_dir() and (root / other).is_dir():
            named["val"] = root / other
    # A class may be called "train" too: its folder then holds images, not folders.
    if not named["train"].is_dir() or not _folders(named["train"]):
        if named["val"].is_dir() and _folders(named["val"]):
            raise UserError(f"{root}: {named['val'].name}/ without train/; expected train/CLASS/IMAGE beside it")
        return {"train": root}
    return {name: folder for name, folder in named.items() if folder.is_dir()}


def classes(folder: Path) -> list[str]:
    """The class folders' names, sorted: label i is the i-th."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected {folder}/CLASS/IMAGE")
    if not (names := _folders(folder)):
        raise UserError(f"{folder}: no class folders in it; expected {folder}/CLASS/IMAGE")
    return names


def images(folder: Path) -> list[str]:
    """Paths of the images in a folder and in the folders below it, in one order on every machine."""
    found: list[str] = []
    for place, below, files in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [os.path.join(place, name) for name in sorted(files) if is_image(name)]
    return found


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
