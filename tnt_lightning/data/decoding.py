"""No more of a JPEG is decoded than is looked at; what is decoded has the pixels of the whole image."""

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from tnt_lightning.errors import UserError


def unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable image ({error}); remove or replace the file")


def upper_rows(image: Image.Image, rows: int) -> Image.Image:
    """At least the first rows of a JPEG file that is not decoded yet; any other image comes back as it is.

    libjpeg decodes from top to bottom. Asked for fewer rows than there are, Pillow stops after them and calls the file broken; whether they
    are there is seen from the last one. Where that is black, it may not have been reached, and the file really be broken: the whole image
    comes back, to be decoded.
    """
    if type(image) is not JpegImageFile or len(image.tile) != 1 or rows >= image.height or not image.filename:
        return image
    upper = (image.width, rows)
    decoder, _, offset, arguments = image.tile[0]
    image._size, image.tile = upper, [(decoder, (0, 0, *upper), offset, arguments)]  # type: ignore[list-item]  # a plain tuple up to Pillow 10
    try:
        image.load()
    except OSError:
        if image.crop((0, rows - 1, *upper)).getbbox() is None:
            return Image.open(image.filename)
    return image


def scaled(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """(image, box) as they are, or both at a half, quarter or eighth where the box is still no smaller than size (height, width).

    libjpeg then leaves out the higher frequencies instead of averaging pixels, for less work.
    """
    left, top, right, bottom = box
    scale = next((s for s in (8, 4, 2) if right - left >= s * size[1] and bottom - top >= s * size[0]), 1)
    if scale == 1 or type(image) is not JpegImageFile or len(image.tile) != 1:
        return image, box
    image.draft(None, (image.width // scale, image.height // scale))
    return image, (round(left / scale), round(top / scale), round(right / scale), round(bottom / scale))
