"""Knobs that do not fit: each answer names the knob, its value, and values that would do."""

from collections.abc import Sequence

from tnt_lightning.errors import UserError

LARGEST = 65_536  # of any knob that counts something: beyond it no image, patch or network lies, but sums that take for ever


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def word_counts(patch_size: int) -> list[int]:
    return [k * k for k in divisors(patch_size)]


def check_whole(lowest: int = 1, highest: int = LARGEST, **knobs: int) -> None:
    for name, value in knobs.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise UserError(f"{name}={value!r} is not a whole number of at least {lowest}")
        if value > highest:
            raise UserError(f"{name}={value} is more than can be built; at most {highest:,}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(repr(choice) for choice in choices)}")


def check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate < 1:
            raise UserError(f"{name}={rate!r} is not a rate from 0 to below 1")


def check_mlp_ratio(mlp_ratio: float, narrowest: int, *, usual: int = 4) -> None:
    numeric = isinstance(mlp_ratio, (int, float)) and not isinstance(mlp_ratio, bool)
    if not numeric or not mlp_ratio <= 1_000 or not narrowest * mlp_ratio >= 1:
        raise UserError(f"mlp_ratio={mlp_ratio!r} leaves the MLPs no hidden unit, or more than a thousand for each; the paper's is {usual}")


def check_stages(name: str, values: Sequence[float], count: int, *, highest: int = LARGEST) -> None:
    """A whole number of at least 1 for each stage."""
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    if not listed or len(values) != count or any(type(value) is not int or not 1 <= value <= highest for value in values):
        raise UserError(f"{name}={values!r} is not a list of {count} whole numbers from 1 to {highest:,}, one for each stage")


def check_words(words_per_patch: int, patch_size: int) -> None:
    if words_per_patch not in word_counts(patch_size):
        raise UserError(
            f"words_per_patch={words_per_patch} does not cut a patch of patch_size={patch_size} into equal squares; "
            f"try one of {word_counts(patch_size)}"
        )


def check_heads(where: str, heads: int, dim: int) -> None:
    if dim % heads:
        raise UserError(f"{where}_heads={heads} does not divide {where}_dim={dim}; try one of {divisors(dim)}")


def check_image(image_size: int | Sequence[int], step: int, *, what: str = "") -> tuple[int, int]:
    """(height, width), multiples of `step`, which is a patch_size unless `what` says what it is."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size) if isinstance(image_size, Sequence) else ()
    if len(size) != 2:
        raise UserError(f"image_size={image_size!r} is neither a number nor (height, width)")
    check_whole(**{"image_size": size[0]})
    check_whole(**{"image_size": size[1]})
    for side in size:
        if below := side % step:
            fits = [n for n in (side - below, side - below + step) if n]
            of = f"{step}, {what}" if what else f"patch_size={step}"
            raise UserError(f"image_size={image_size!r}: {side} is not a multiple of {of}; try {' or '.join(map(str, fits))}")
    return size[0], size[1]


def check_blocks(tnt_blocks: Sequence[int] | None, depth: int) -> set[int]:
    if tnt_blocks is None:
        return set(range(1, depth + 1))
    known = isinstance(tnt_blocks, Sequence) and not isinstance(tnt_blocks, str)
    if not known or any(type(n) is not int or not 1 <= n <= depth for n in tnt_blocks) or len(set(tnt_blocks)) != len(tnt_blocks):
        raise UserError(
            f"tnt_blocks={tnt_blocks!r} does not name distinct blocks from 1 to depth={depth}; try {sorted({1, depth})}, or null for all"
        )
    return set(tnt_blocks)
