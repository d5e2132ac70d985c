"""Downloads: what a data set's authors publish, checked by md5, unpacked beside its final place and moved there whole."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from torchvision.datasets.utils import download_url, extract_archive

from tnt_lightning.errors import UserError


class Archive(NamedTuple):
    url: str
    md5: str
    holds: str  # a file or folder of root that is there once it is unpacked; where there is one already, nothing is fetched
    into: str = ""  # the folder of root that it is unpacked into


def fetch(root: Path, archives: tuple[Archive, ...]) -> None:
    """Into root what is not there yet; of several processes one does it, the others wait."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):
            for left in root.glob(".unpack-*"):  # by a process that was killed
                shutil.rmtree(left)
            for archive in archives:
                if not (root / archive.holds).exists():
                    _fetch(root, archive)
    except (OSError, RuntimeError) as error:
        raise UserError(f"data.download=true: {' '.join(str(error).split())}; fetch it by hand into {root}") from None


def _fetch(root: Path, archive: Archive) -> None:
    name, place = archive.url.rpartition("/")[2], root / archive.into
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpack-") as folder:
        packed = name != Path(archive.holds).name
        try:
            download_url(archive.url, root if packed else folder, name, archive.md5)
        except RuntimeError:
            raise RuntimeError(f"{archive.url}: what came has another md5 than {archive.md5}") from None
        if packed:
            print(f"unpack {root / name}")
            extract_archive(str(root / name), folder)
        for entry in Path(folder).iterdir():
            with contextlib.suppress(OSError):  # a folder that is there already, with something in it, is the user's
                os.replace(entry, place / entry.name)
    if not (root / archive.holds).exists():
        raise RuntimeError(f"{archive.url}: {archive.holds} is not in it")
