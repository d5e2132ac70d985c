"""From a file, or bytes, to a decoded image."""

import contextlib
import io
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from tnt_lightning.errors import UserError

Image.init()
# Not all that Pillow knows: for some (EPS) it starts other programs, whatever the file's name ends in.
FORMATS: tuple[str, ...] = tuple(name for name in ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "AVIF", "PPM") if name in Image.OPEN)


class BrokenImage(UserError):
    """An image that cannot be read; args: the message. `file` and `why` where it was raised in this process."""

    file = why = ""

    @classmethod
    def of(cls, file: str, why: object) -> "BrokenImage":
        reason = " ".join(str(why).split()).removesuffix(".")
        error = cls(f"{file}: not a readable image ({reason}); remove or replace it, or train without it: data.on_error=skip")
        error.file, error.why = file, reason
        return error


def open_image(source: str | bytes, name: str | None = None) -> Image.Image:
    """The image as its pixels are stored, decoded whole; what timm and torchvision see.

    source: a path, or a file's bytes, called `name` in an error. BrokenImage for what is no image, truncated, empty, or larger than
    Pillow's limit against decompression bombs.
    """
    file: str | BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        why = error.strerror or error if isinstance(error, OSError) else error
        if isinstance(error, Image.UnidentifiedImageError):
            why = "empty" if _is_empty(source) else f"of none of the kinds {', '.join(FORMATS)}"
        raise BrokenImage.of(name or str(source), why) from None


def open_as_seen(source: str | bytes, name: str | None = None) -> Image.Image:
    """The image as a person sees it: turned as the camera says (EXIF), 16 bits scaled to 8, transparency on white; L or RGB."""
    image = open_image(source, name)
    with contextlib.suppress(OSError, SyntaxError, ValueError, TypeError, ZeroDivisionError, KeyError):
        image = ImageOps.exif_transpose(image)  # EXIF that cannot be read says nothing about the pixels
    if image.mode.startswith("I") or image.mode == "F":
        return _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


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
