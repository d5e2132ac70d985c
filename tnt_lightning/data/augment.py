"""RandAugment's operations, to the bit, sooner."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from PIL import Image
from timm.data import auto_augment as timms

_MODES = ("L", "RGB")
_CUBIC = np.array([[0, 1, 0, 0], [-1, 0, 1, 0], [2, -2, 1, -1], [-1, 1, -1, 1]], float)  # Pillow's, by powers of t
_DOUBT = 2e-3  # ten times what float32 can be wrong by here: four products and three sums of values up to about 400
_ROWS = 56  # at a time: fresh memory, which the system has to clear, costs more than the arithmetic


def sooner(policy: timms.RandAugment) -> timms.RandAugment:
    """The same pixels for the same draws, and no error where timm's policy asks Pillow 13 for what that refuses."""
    for op in policy.ops:
        op.aug_fn = OURS.get(op.aug_fn, op.aug_fn)
    policy.ops = np.array(policy.ops, dtype=object)  # np.random.choice would make an array of the list for each image
    return policy


# ---- a new level for each level: timm and Pillow build and check their tables in loops, for longer than it takes to look the pixels up


def invert(image: Image.Image, **kwargs: Any) -> Image.Image:
    return _looked_up(image, list(range(255, -1, -1))) if image.mode in _MODES else timms.invert(image, **kwargs)


def solarize(image: Image.Image, thresh: int, **kwargs: Any) -> Image.Image:
    if image.mode not in _MODES:
        return timms.solarize(image, thresh, **kwargs)
    return _looked_up(image, [i if i < thresh else 255 - i for i in range(256)])


def solarize_add(image: Image.Image, add: int, thresh: int = 128, **kwargs: Any) -> Image.Image:
    if image.mode not in _MODES:
        return timms.solarize_add(image, add, thresh, **kwargs)
    return _looked_up(image, [min(255, i + add) if i < thresh else i for i in range(256)])


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    if not 0 < bits_to_keep < 8 or image.mode not in _MODES:
        return safe_posterize(image, bits_to_keep, **kwargs)
    return _looked_up(image, [i >> (8 - bits_to_keep) << (8 - bits_to_keep) for i in range(256)])


def safe_posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's policies can ask to keep 0 bits: black up to Pillow 12, a ValueError since Pillow 13 that ends a training run."""
    return timms.posterize(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def auto_contrast(image: Image.Image, **kwargs: Any) -> Image.Image:
    if image.mode not in _MODES:
        return timms.auto_contrast(image, **kwargs)
    low, high = np.array(image.getextrema()).reshape(-1, 2).T[:, :, None]
    scale = 255.0 / np.maximum(high - low, 1)
    table = (np.arange(256) * scale + -low * scale).astype(int).clip(0, 255)
    return _looked_up(image, np.where(high > low, table, np.arange(256)).reshape(-1).tolist())


def equalize(image: Image.Image, **kwargs: Any) -> Image.Image:
    if image.mode not in _MODES:
        return timms.equalize(image, **kwargs)
    table: list[int] = []
    histograms = np.array(image.histogram()).reshape(-1, 256)
    for counts in histograms:
        step = int(counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        table += ((step // 2 + counts.cumsum() - counts) // step if step else np.arange(256)).tolist()
    return _looked_up(image, table)


def _looked_up(image: Image.Image, table: list[int]) -> Image.Image:
    image.load()
    return image._new(image.im.point(table * (image.im.bands * 256 // len(table)), None))


# ---- blended with what is made of the image


def contrast(image: Image.Image, factor: float, **kwargs: Any) -> Image.Image:
    if image.mode not in _MODES:
        return timms.contrast(image, factor, **kwargs)
    counts = np.array(image.convert("L").histogram())
    mean = int(int(counts @ np.arange(256)) / int(counts.sum()) + 0.5)
    return Image.blend(Image.new(image.mode, image.size, (mean,) * len(image.getbands())), image, factor)


def sharpness(image: Image.Image, factor: float, **kwargs: Any) -> Image.Image:
    """Pillow smooths in float32 by weights of 1 and, in the middle, 5 thirteenths, rounded: never near a half, so whole numbers will do."""
    if image.mode not in _MODES or min(image.size) < 3:
        return timms.sharpness(image, factor, **kwargs)
    pixels = np.array(image)  # the outermost stay as they are
    wide = pixels.reshape(*pixels.shape[:2], -1).astype(np.uint16)
    total = wide[:-2] + wide[1:-1]
    total += wide[2:]
    total = total[:, :-2] + total[:, 1:-1] + total[:, 2:]
    total += 4 * wide[1:-1, 1:-1] + 6
    total //= 13
    pixels[1:-1, 1:-1] = total.reshape(pixels[1:-1, 1:-1].shape)
    return Image.blend(Image.frombuffer(image.mode, image.size, pixels, "raw", image.mode, 0, 1), image, factor)


# ---- moved sideways or upwards


def shear_x(image: Image.Image, factor: float, **kwargs: Any) -> Image.Image:
    if not _is_ours(image, kwargs):
        return timms.shear_x(image, factor, **kwargs)
    return _slid(image, factor * (np.arange(image.height) + 0.5), kwargs["fillcolor"])


def shear_y(image: Image.Image, factor: float, **kwargs: Any) -> Image.Image:
    if not _is_ours(image, kwargs):
        return timms.shear_y(image, factor, **kwargs)
    return _turned(shear_x(_turned(image), factor, **kwargs))


def translate_x_rel(image: Image.Image, share: float, **kwargs: Any) -> Image.Image:
    if not _is_ours(image, kwargs):
        return timms.translate_x_rel(image, share, **kwargs)
    return _slid(image, np.full(image.height, share * image.width), kwargs["fillcolor"])


def translate_y_rel(image: Image.Image, share: float, **kwargs: Any) -> Image.Image:
    if not _is_ours(image, kwargs):
        return timms.translate_y_rel(image, share, **kwargs)
    return _turned(translate_x_rel(_turned(image), share, **kwargs))


def _is_ours(image: Image.Image, kwargs: dict[str, Any]) -> bool:
    return image.mode in _MODES and kwargs["resample"] == Image.Resampling.BICUBIC


def _turned(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.TRANSPOSE)


def _slid(image: Image.Image, shift: np.ndarray, fill: Any) -> Image.Image:
    """Pillow's bicubic affine map that moves each row sideways by its own `shift`, in float64 (height,).

    Pillow computes a cubic along each of four rows and a fifth across them, for each pixel; here one is enough. It is computed in float32
    with one set of weights a row; where that lies too close to a whole number to know on which side, again as Pillow does.
    """
    width, height = image.size
    bands = len(image.getbands())
    size, pitch = width * bands, width + 4
    padded = np.zeros((height + 2, pitch, bands), np.uint8)  # the outer pixels again; a row of anything above and below
    padded[1:-1, 2:-2] = np.asarray(image).reshape(height, width, bands)
    padded[1:-1, :2], padded[1:-1, -2:] = padded[1:-1, 2:3], padded[1:-1, -3:-2]
    flat = padded.reshape(-1)
    whole = np.floor(shift).clip(-width, width).astype(int)
    starts = (np.arange(1, height + 1) * pitch + 1 + whole) * bands
    windows = as_strided(flat, (len(flat) - size - 3 * bands + 1, size + 3 * bands), (1, 1))
    t = (shift - whole).clip(0, 1)[:, None]
    weights = (_CUBIC[0] + t * (_CUBIC[1] + t * (_CUBIC[2] + t * _CUBIC[3]))).astype(np.float32)

    # From outside comes what lies left of a row's `first` and from its `last` on.
    first, last = (_first_reaching(end, shift, width) for end in (0, width))
    sides = np.repeat([True, False, True], size)
    outside = as_strided(sides, (2 * size + 1, size), (1, 1))[np.where(first > 0, size - first * bands, 2 * size - last * bands)]
    ground = np.full((width, bands), fill, np.uint8).reshape(-1)

    moved = np.empty((height, size), np.uint8)
    doubtful = np.empty((height, size), bool)
    floats, values = np.empty((_ROWS, size + 3 * bands), np.float32), np.empty((_ROWS, size), np.float32)
    taps = as_strided(floats, (_ROWS, 4, size), (floats.strides[0], 4 * bands, 4))
    for top in range(0, height, _ROWS):
        rows = slice(top, top + _ROWS)
        window = windows[starts[rows]]  # all that a row is made of
        here = slice(len(window))
        floats[here] = window
        value = np.einsum("hk,hkx->hx", weights[rows], taps[here], out=values[here])
        np.clip(value, _DOUBT, 255.5, out=value)
        value -= _DOUBT
        below = value.astype(np.uint8)
        value += 2 * _DOUBT
        moved[rows] = value
        unsure = np.not_equal(below, moved[rows], out=doubtful[rows])
        if np.count_nonzero(unsure) > unsure.size // 16:  # areas of one colour: nothing is to be computed between four equal pixels
            differs = window[:, :-bands] != window[:, bands:]
            unsure &= differs[:, :size] | differs[:, bands : size + bands] | differs[:, 2 * bands :]
        np.copyto(moved[rows], ground, where=outside[rows])

    y, x = np.divmod(np.flatnonzero(doubtful), size)
    x, band = np.divmod(x, bands)
    kept = (x >= first[y]) & (x < last[y])
    y, x, band = y[kept], x[kept], band[kept]
    source = (x + 0.5 + shift[y]) - 0.5
    left = np.floor(source)
    t = source - left
    at = ((y + 1) * pitch + left.astype(int) + 1) * bands + band
    p, q, r, s = (flat[at + tap * bands].astype(np.int16) for tap in range(4))
    exact = q + t * ((r - p) + t * ((2 * (p - q) + r - s) + t * (-p + q - r + s)))  # its order of operations: it cuts off, not rounds
    moved[y, x * bands + band] = exact.clip(0, 255)
    return Image.frombuffer(image.mode, image.size, moved, "raw", image.mode, 0, 1)


def _first_reaching(end: int, shift: np.ndarray, width: int) -> np.ndarray:
    """The first x of each row, of 0 to width, for which Pillow's x + 0.5 + shift, rounded, is at least `end`."""
    x = np.ceil(end - 0.5 - shift)
    x -= (x - 0.5) + shift >= end
    x += (x + 0.5) + shift < end
    return x.clip(0, width).astype(int)


OURS: dict[Callable, Callable] = {
    timms.invert: invert,
    timms.solarize: solarize,
    timms.solarize_add: solarize_add,
    timms.posterize: posterize,
    timms.auto_contrast: auto_contrast,
    timms.equalize: equalize,
    timms.contrast: contrast,
    timms.sharpness: sharpness,
    timms.shear_x: shear_x,
    timms.shear_y: shear_y,
    timms.translate_x_rel: translate_x_rel,
    timms.translate_y_rel: translate_y_rel,
}
