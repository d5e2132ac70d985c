"""A tree of images, a folder a class: what is in it, without opening any. Hidden files and folders (.ipynb_checkpoints) do not count."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tnt_lightning.errors import UserError

# What Pillow reads without a program beside it.
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def parts(root: Path) -> dict[str, Path]:
    """{train, val, test} of a tree, as far as they are there; {train: root} for one without: root/CLASS/IMAGE."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; give the one that holds train/ and val/, or a folder for each class")
    # A class may be called "train" too: its folder then holds images, not folders.
    named = {PARTS[name.lower()]: root / name for name in _folders(root) if name.lower() in PARTS}
    deep = [name for name, folder in named.items() if _folders(folder)]
    if not deep:
        return {"train": root}
    if "train" not in deep:
        raise UserError(f"{root}: {named[max(deep)].name}/ without train/; expected train/CLASS/IMAGE beside it")
    return {name: named[name] for name in ("train", "val", "test") if name in named}


def own_classes(root: Path) -> list[str]:
    """Of training; UserError for fewer than two, which is what a folder around the data looks like."""
    folder = parts(root)["train"]
    if len(found := classes(folder)) < 2:
        raise UserError(f"{folder}: {found[0]}/ is the only class folder; name the folder that holds train/, or a folder for each class")
    return found


def classes(folder: Path) -> list[str]:
    """The class folders' names, sorted: label i is the i-th."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected {folder}/CLASS/IMAGE")
    if not (names := _folders(folder)):
        raise UserError(f"{folder}: no class folders in it; expected {folder}/CLASS/IMAGE")
    return names


def images(folder: Path, others: Counter[str] | None = None) -> list[str]:
    """Paths of the images in a folder and in the folders below it, in one order on every machine.

    others: counts the files of other kinds, by suffix
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()  # a link to a folder above would lead round for ever
    for place, below, files in os.walk(folder, followlinks=True, onerror=_refuse):
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in seen:
            below.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        below[:] = sorted(name for name in below if not _is_hidden(name))
        found += [os.path.join(place, name) for name in sorted(files) if is_image(name)]
        if others is not None:
            others.update(os.path.splitext(name)[1].lower() for name in files if not is_image(name) and not _is_hidden(name))
    return found


def named(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The images that a person names by files, folders (with what is below them) and patterns, in that order, each once; and the words
    that name none, with the reason. A file by its own name may be called anything."""
    found: list[str] = []
    lost = []
    for word in words:
        path = os.path.expanduser(word)
        if os.path.isdir(path):
            here, why = images(Path(path)), f"no images in this folder; known kinds: {' '.join(SUFFIXES)}"
        elif os.path.exists(path):
            here, why = [path], ""
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            here = [match for match in matches if is_image(os.path.basename(match)) and os.path.isfile(match)]
            why = f"no image is called so; known kinds: {' '.join(SUFFIXES)}"
        else:
            here, why = [], "no such file, folder or pattern"
        found += here
        if not here:
            lost.append((word, why))
    return list(dict.fromkeys(found)), lost


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "@eaDir"))  # the latter: thumbnails of Synology's


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: {error.strerror}; the images in it would be missing")


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name))
    except OSError as error:
        _refuse(error)
