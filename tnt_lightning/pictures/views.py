"""Views of one image for a page that answers clicks: SVG with the pixels, a map over them in red, and cells that can be chosen.

No drawing library: a browser does it, crisply at any size. Places are (row, column) from 0, and from 1 in what a person reads.
"""

import io
from base64 import b64encode
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tnt_lightning.models import TNT
from tnt_lightning.pictures import maps
from tnt_lightning.pictures.draw import unread, words_across
from tnt_lightning.pictures.maps import Grid

SMOOTH = 128  # pixels a side from which an image is shown as a photo; a smaller one is shown as the squares that it is made of
RED = 0.6  # how much of a cell the largest value of a map covers, here and in `predict --attention`
GAP = 0.08  # between the patches of `by_word`, of a patch
MOST = 3  # places that a caption names


class Choice(NamedTuple):
    """What of a TNT is looked at: a block, from 1; a head, from 1, or 0 for the mean of all; a patch, and a word of it."""

    block: int
    outer_head: int
    inner_head: int
    patch: Grid
    word: Grid


def image(pixels: Tensor) -> str:
    """uint8 (C, H, W), as any network sees it."""
    said = _size(pixels)
    height, width = pixels.shape[1:]
    return _figure("The image", f"{said}.", _svg(height, width, said, _under(pixels, None)))


def most_attended(model: TNT, inputs: Tensor, block: int) -> Grid:
    """The patch to which the class token attends most in that block, by the mean over heads. inputs: one normalised image (1, C, H, W)"""
    with torch.inference_mode():
        outer = model.explain(inputs, blocks=[block])[1].outer[block]
    return divmod(int(maps.class_to_patches(outer, model.grid_size)[0].mean(0).argmax()), model.grid_size[1])


def of_tnt(model: TNT, inputs: Tensor, pixels: Tensor, choice: Choice) -> list[str]:
    """Five figures: the image with its patches, what the chosen one attends to among them, what the class token does, what the chosen
    word does among the words of that patch, and what each of those words does.

    inputs: normalised (1, C, H, W); pixels: the same as uint8 (C, H, W). In a block without an inner transformer the last two say so.
    """
    block, outer_head, inner_head, patch, word = choice
    with torch.inference_mode():
        seen = model.explain(inputs, blocks=[block])[1]
    grid, size, side = model.grid_size, model.patch_size, words_across(model)
    outer, heads = _of_head(seen.outer[block], outer_head)
    where, this, that = f"Block {block}, {heads}", f"patch {_place(patch)}", f"word {_place(word)}"

    def over_image(title: str, said: str, attention: Tensor | None, more: str = "") -> str:
        return _figure(title, f"{said}.{more}", cells(pixels, grid, cell="patch", said=said, attention=attention, mark=patch))

    of_patch, of_class = maps.patch_to_patches(outer, grid, patch)[0, 0], maps.class_to_patches(outer, grid)[0, 0]
    shown = [
        over_image("The image", f"{_size(pixels)}, in {grid[1]} x {grid[0]} patches; {this} is chosen", None),
        over_image(
            "Outer attention of the patch",
            f"{where}: {this} attends most to {_most(of_patch)}; to the class token with {_percent(1 - of_patch.sum())}",
            of_patch,
        ),
        over_image(
            "Attention of the class token",
            f"{where}: the class token attends most to {_most(of_class)}; to itself with {_percent(1 - of_class.sum())}",
            of_class,
            unread(model),
        ),
    ]
    if block not in seen.inner:
        none = f"Block {block} has no inner transformer; the words pass it by."
        return [*shown, *(_figure(f"Inner attention of {of}", none, "") for of in ("the word", "every word"))]
    inner, heads = _of_head(seen.inner[block], inner_head)
    table = torch.stack([maps.word_to_words(inner, grid, patch, divmod(i, side))[0, 0] for i in range(side**2)])  # (m, side, side)
    of_word, where = table[word[0] * side + word[1]], f"Block {block}, {heads}"
    within = pixels[:, patch[0] * size : (patch[0] + 1) * size, patch[1] * size : (patch[1] + 1) * size]
    word_said = f"{where}: {that} of {this} attends most to {_most(of_word)}"
    words_said = f"{where}: {this} once for each of its {side} x {side} words, under what the word in the small frame attends to"
    one = cells(within, (side, side), cell="word", said=word_said, attention=of_word, mark=word)
    return [
        *shown,
        _figure("Inner attention of the word", f"{word_said}.", one),
        _figure("Inner attention of every word", f"{words_said}.", by_word(within, table, said=words_said, mark=word)),
    ]


def _of_head(attention: Tensor, head: int) -> tuple[Tensor, str]:
    """(..., heads, T, T) -> (..., 1, T, T), and how that is called."""
    count = attention.shape[1]
    if head:
        return attention[:, head - 1 : head].float().cpu(), f"head {head} of {count}"
    return attention.float().mean(1, keepdim=True).cpu(), f"mean of {count} heads" if count > 1 else "one head"


def _most(attention: Tensor) -> str:
    best = attention.flatten().topk(min(MOST, attention.numel()))
    places = [divmod(at, attention.shape[1]) for at in best.indices.tolist()]
    return ", ".join(f"{_place(place)} ({_percent(share)})" for place, share in zip(places, best.values, strict=True))


def _percent(share: Any) -> str:
    return f"{100 * max(0.0, float(share)):.1f}%"


def _place(place: Grid) -> str:
    return f"{place[0] + 1},{place[1] + 1}"


def _size(pixels: Tensor) -> str:
    return f"The image as the network sees it, {pixels.shape[2]} x {pixels.shape[1]} pixels"


def _figure(title: str, said: str, view: str) -> str:
    return f"<figure><h2>{title}</h2>{view}<figcaption>{escape(said)}</figcaption></figure>"


# ---- drawing


def png(pixels: Tensor) -> str:
    """uint8 (C, H, W), of 1, 3 or 4 channels, as the address of a PNG that holds them."""
    array, file = pixels.permute(1, 2, 0).cpu().numpy(), io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else np.ascontiguousarray(array)).save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def look(pixels: Tensor) -> str:
    """The class of an element that shows it."""
    return "smooth" if min(pixels.shape[1:]) >= SMOOTH else "crisp"


def cells(pixels: Tensor, grid: Grid, *, cell: str, said: str, attention: Tensor | None = None, mark: Grid | None = None) -> str:
    """An image (C, H, W) cut into `grid` cells, each of which may be chosen: it has `data-place="ROW,COLUMN"`, from 0.

    cell: what one is called; said: what is seen, for who does not see it; attention: a share for each cell, `grid`, drawn from 0 to its
    largest; mark: the place in a frame
    """
    height, width = pixels.shape[1:]
    down, across = height / grid[0], width / grid[1]
    places = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            share = "" if attention is None else f": {_percent(attention[row, column])}"
            places.append(
                f'<rect class="cell" data-place="{row},{column}" {_box(row * down, column * across, down, across)}>'
                f"<title>{cell} {_place((row, column))}{share}</title></rect>"
            )
    marked = "" if mark is None else _frame(mark[0] * down, mark[1] * across, down, across)
    return _svg(height, width, said, _under(pixels, attention) + "".join(places) + marked)


def by_word(pixels: Tensor, attention: Tensor, *, said: str, mark: Grid) -> str:
    """A patch (C, size, size) once for each of its words, at the place of the word, under what that word attends to.

    attention: (m, side, side), a map for each word; mark: the word that is chosen. Each may be, as with `cells`.
    """
    size, side = pixels.shape[1], attention.shape[1]
    step, word, parts = size * (1 + GAP), size / side, []
    for number, one in enumerate(attention):
        row, column = divmod(number, side)
        around = _frame(0, 0, size, size) if (row, column) == mark else ""
        parts.append(
            f'<g class="cell" data-place="{row},{column}" transform="translate({column * step:g} {row * step:g})">'
            f"<title>word {_place((row, column))}</title>"
            f"{_under(pixels, one)}{_frame(row * word, column * word, word, word)}{around}</g>"
        )
    return _svg(step * side - size * GAP, step * side - size * GAP, said, "".join(parts))


def _under(pixels: Tensor, attention: Tensor | None) -> str:
    """Under a map an image is grey: a colour would be taken for a value."""
    height, width = pixels.shape[1:]
    if attention is None:
        return f'<image class="{look(pixels)}" width="{width}" height="{height}" href="{png(pixels)}"/>'
    share = attention.float().cpu() / attention.max().clamp(min=1e-12).item()
    red = share.new_zeros(4, *share.shape)
    red[0], red[3] = 255, (255 * RED * share).round()
    grey = pixels.float().mean(0, keepdim=True).round().byte()
    return (
        f'<image class="{look(pixels)}" width="{width}" height="{height}" href="{png(grey)}"/>'
        f'<image class="crisp" width="{width}" height="{height}" preserveAspectRatio="none" href="{png(red.byte())}"/>'
    )


def _frame(top: float, left: float, height: float, width: float) -> str:
    """In two colours, to be seen on dark and on light."""
    box = _box(top, left, height, width)
    return f'<rect class="frame outer" {box}/><rect class="frame" {box}/>'


def _box(top: float, left: float, height: float, width: float) -> str:
    return f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'


def _svg(height: float, width: float, said: str, inside: str) -> str:
    return f'<svg class="view" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(said)}">{inside}</svg>'


STYLE = """
.view{display:block;width:100%;max-height:80vh;overflow:visible}
.view rect{fill:transparent;vector-effect:non-scaling-stroke}
.view .cell{cursor:pointer}
.view rect.cell{stroke:#8888;stroke-width:1px}
.view .cell:hover{stroke:#35e0ff;stroke-width:2px}
.view .frame{stroke:#35e0ff;stroke-width:2px;pointer-events:none}
.view .frame.outer{stroke:#000;stroke-width:5px}
"""
