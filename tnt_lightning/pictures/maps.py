"""What `TNT.explain` saw, put back to its places in the image: the numbers that the pictures are drawn from. No drawing here.

Shapes as in models/tnt.py: B images, N = down * across sentences, m = side * side words in a sentence; a grid is (down, across). A place
is (row, column), both from 0.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def class_to_patches(outer: Tensor, grid: Grid) -> Tensor:
    """Attention of the class token to each patch (paper, Figure 7): (B, heads, 1+N, 1+N) -> (B, heads, down, across).

    What the class token gives to itself is left out, so a map sums to less than 1.
    """
    return outer[:, :, 0, 1:].unflatten(-1, grid)


def patch_to_patches(outer: Tensor, grid: Grid, place: Grid) -> Tensor:
    """Attention of the patch at `place` to each patch (paper, Figure 6): (B, heads, 1+N, 1+N) -> (B, heads, down, across)."""
    return outer[:, :, 1 + place[0] * grid[1] + place[1], 1:].unflatten(-1, grid)


def word_to_words(inner: Tensor, grid: Grid, place: Grid, word: Grid) -> Tensor:
    """Attention of a word to the words of its patch (paper, Figure 5): (B*N, heads, m, m) -> (B, heads, side, side)."""
    side = isqrt(inner.shape[-1])
    by_image = inner.unflatten(0, (-1, grid[0] * grid[1]))  # (B*N, ...) -> (B, N, heads, m, m)
    return by_image[:, place[0] * grid[1] + place[1], :, word[0] * side + word[1]].unflatten(-1, (side, side))


def words_in_place(words: Tensor, grid: Grid) -> Tensor:
    """Words averaged over their channels, at their places in the image (paper, Figure 4): (B*N, m, c) -> (B, down*side, across*side)."""
    side = isqrt(words.shape[1])
    mean = words.mean(-1).unflatten(1, (side, side)).unflatten(0, (-1, *grid))  # (B, down, across, side, side)
    return mean.transpose(2, 3).reshape(mean.shape[0], grid[0] * side, grid[1] * side)


def feature_maps(sentences: Tensor, grid: Grid) -> Tensor:
    """Channels of the sentences on the grid (paper, Figure 3a): (B, 1+N, d) -> (B, d, down, across)."""
    return sentences[:, 1:].transpose(1, 2).unflatten(-1, grid)


def liveliest(maps: Tensor, count: int) -> list[int]:
    """Of the channels of one image (d, down, across) the numbers of those whose values differ most over the image, in their order."""
    order = maps.flatten(1).var(1).argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


def similarity(positions: Tensor) -> Tensor:
    """Cosine similarity of position encodings to each other: (T, dim) -> (T, T)."""
    unit = F.normalize(positions.double(), dim=-1)
    return unit @ unit.T


def grid_of_grids(table: Tensor, grid: Grid) -> Tensor:
    """(N, N), each row a map over the grid, as one picture: at the place of each row its map, and a line of NaN between two of them.

    Gives (down*(down+1) - 1, across*(across+1) - 1).
    """
    maps = F.pad(table.unflatten(-1, grid), (0, 1, 0, 1), value=torch.nan)  # (N, down+1, across+1)
    whole = maps.unflatten(0, grid).transpose(1, 2).reshape(grid[0] * (grid[0] + 1), grid[1] * (grid[1] + 1))
    return whole[:-1, :-1]


def over_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """A map whose cells are areas of an image of `size` (height, width), a value for each pixel: (..., h, w) -> (..., height, width)."""
    down, across = size[0] // maps.shape[-2], size[1] // maps.shape[-1]
    return maps.repeat_interleave(down, -2).repeat_interleave(across, -1)
