"""No more of a JPEG is decoded than is looked at; what is decoded has the pixels of the whole image."""

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from tnt_lightning.errors import UserError


def unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable image ({error}); remove or replace the file")


def upper_rows(image: Image.Image, rows: int) -> Image.Image:
    """At least the first rows of a JPEG that is not decoded yet; any other image comes back as it is.

    libjpeg decodes from top to bottom. Asked for fewer rows than there are, Pillow stops after them and calls the file broken; whether they
    are there is seen from the last one. Where that is black, it may not have been reached, and the file really be broken: the whole image
    comes back, to be decoded.
    """
    if type(image) is not JpegImageFile or len(image.tile) != 1 or rows >= image.height:
        return image
    file, upper = image.fp, (image.width, rows)
    assert file is not None
    image._size, image.tile = upper, [image.tile[0]._replace(extents=(0, 0, *upper))]
    try:
        image.load()
    except OSError:
        if image.crop((0, rows - 1, *upper)).getbbox() is None:
            file.seek(0)
            return Image.open(file)
    return image
