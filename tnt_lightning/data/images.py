"""From a file, or bytes, to an image: decoded late, no more of it than is looked at, to the pixels that the whole image has there."""

import contextlib
import io
import os
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from tnt_lightning.errors import UserError

Image.init()
# Not all that Pillow knows: for some (EPS) it starts other programs, whatever the file's name ends in.
FORMATS: tuple[str, ...] = tuple(name for name in ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "AVIF", "PPM") if name in Image.OPEN)
TURNS = {  # EXIF's orientation -> what shows the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(UserError):
    """An image that cannot be read; args: the message. `file` and `why` where it was raised in this process."""

    file = why = ""

    @classmethod
    def of(cls, file: str, why: object) -> "BrokenImage":
        reason = " ".join(str(why).split()).removesuffix(".")
        error = cls(f"{file}: not a readable image ({reason}); remove or replace it (data.on_error=skip leaves such out of training)")
        error.file, error.why = file, reason
        return error


def open_image(source: str | bytes, name: str | None = None) -> Image.Image:
    """The image as its pixels are stored, which is what timm and torchvision see; its header is read, the rest yet to be decoded.

    source: a path, or a file's bytes, called `name` in an error. BrokenImage for what is no image, empty, or larger than Pillow's limit
    against decompression bombs.
    """
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image: Any = Image.open(file, formats=FORMATS)
    except MemoryError:
        raise
    except Exception as error:  # whatever damaged bytes lead Pillow's plugins to: OSError, SyntaxError, RuntimeError, struct.error, ...
        why: object = getattr(error, "strerror", None) or error
        if isinstance(error, Image.UnidentifiedImageError):
            why = "empty" if _is_empty(source) else f"of none of the kinds {', '.join(FORMATS)}"
        raise BrokenImage.of(name or str(source), why) from None
    image.source, image.called = source, name
    return image


def decoded(image: Image.Image) -> Image.Image:
    """The image, all of it decoded; BrokenImage where that cannot be done."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BrokenImage.of(getattr(image, "called", None) or str(getattr(image, "source", "an image")), error) from None
    return image


def open_as_seen(source: str | bytes, name: str | None = None) -> Image.Image:
    """The image as a person sees it: turned as the camera says (EXIF), 16 bits scaled to 8, transparency on white; L or RGB."""
    image, turn = open_image(source, name), None
    with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
        turn = TURNS.get(image.getexif().get(0x0112, 1))
    if _is_plain_jpeg(image) and image.mode in ("L", "RGB") and turn is None:
        return image
    image = decoded(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        return _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def upper_rows(image: Image.Image, rows: int) -> Image.Image:
    """At least the first rows, decoded.

    libjpeg decodes from top to bottom. Asked for fewer rows than there are, Pillow stops after them and calls the file broken; whether they
    are there is seen from the last one. Where that is black it may not have been reached, and a file without its end mark may be cut
    off below: those are decoded whole, and BrokenImage where that cannot be done.
    """
    if not _is_plain_jpeg(image) or rows >= image.height or not _has_its_end(image):
        return decoded(image)
    jpeg: Any = image
    decoder, _, offset, arguments = jpeg.tile[0]
    jpeg._size, jpeg.tile = (image.width, rows), [(decoder, (0, 0, image.width, rows), offset, arguments)]
    try:
        jpeg.load()
    except OSError:
        if jpeg.crop((0, rows - 1, image.width, rows)).getbbox() is None:
            return decoded(open_image(jpeg.source, jpeg.called))
    return jpeg


def scaled(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """(image, box) as they are, or both at a half, quarter or eighth where the box is still no smaller than size (height, width).

    libjpeg then leaves out the higher frequencies instead of averaging pixels, for less work.
    """
    left, top, right, bottom = box
    scale = next((s for s in (8, 4, 2) if right - left >= s * size[1] and bottom - top >= s * size[0]), 1)
    if scale == 1 or not _is_plain_jpeg(image):
        return image, box
    image.draft(None, (image.width // scale, image.height // scale))
    return image, (round(left / scale), round(top / scale), round(right / scale), round(bottom / scale))


def _is_plain_jpeg(image: Image.Image) -> bool:
    """One of open_image's that is yet to be decoded."""
    return type(image) is JpegImageFile and len(image.tile) == 1 and hasattr(image, "source")


def _has_its_end(image: Any) -> bool:
    image.fp.seek(-2, os.SEEK_END)
    return image.fp.read(2) == b"\xff\xd9"


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own convert clips at 255: a 16-bit grey image turns white."""
    pixels = np.asarray(image).astype(np.float64)
    whole = 1.0 if image.mode == "F" and pixels.max() <= 1 else 255.0 if image.mode == "F" else 65535.0
    return Image.fromarray(np.round(pixels.clip(0, whole) * (255 / whole)).astype(np.uint8))


def _is_empty(source: str | bytes) -> bool:
    if isinstance(source, bytes):
        return not source
    with open(source, "rb") as file:
        return not file.read(1)
