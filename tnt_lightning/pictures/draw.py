"""The paper's figures of a network: `explained` draws what `TNT.explain` saw, `features` what any backbone can show, `accuracy` Figure 2.

matplotlib is imported late and used by its objects alone, so that no window system is asked for.
"""

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tnt_lightning.errors import UserError
from tnt_lightning.models import TNT, Explanation
from tnt_lightning.pictures import maps
from tnt_lightning.pictures.maps import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_WORDS = ("4", "5", "6", "7", "positions")  # what only a network with words and explain() has
WIDTH = 7.0  # inches, of a whole picture
CHANNELS = 8  # of a row of feature maps
HEADS = 6  # of a row of maps by head; a network with more shows the first ones


@dataclass(kw_only=True)
class Picture:
    """name: of its files; number: as `figures=` takes it; caption: what is seen; alt: for who does not see it"""

    name: str
    number: str
    title: str
    caption: str
    alt: str
    figure: "Figure"

    @functools.cached_property
    def png(self) -> bytes:
        return self._saved("png")

    @functools.cached_property
    def svg(self) -> bytes:
        return self._saved("svg", Date=None)  # without it, the same picture would be another file each time

    def _saved(self, kind: str, **more: Any) -> bytes:
        """As a file, which says its title and caption inside."""
        file = io.BytesIO()
        self.figure.savefig(file, format=kind, dpi=150, metadata={"Title": self.title, "Description": self.caption, **more})
        return file.getvalue()


class Images(NamedTuple):
    """pixels: uint8 (B, C, H, W), as the network sees them; inputs: normalised, float32; names: as a row's label has them"""

    pixels: Tensor
    inputs: Tensor
    names: list[str]


class Points(NamedTuple):
    """Of Figure 3b. batches: of normalised images; labels: a class each; names: of the classes; whose: how a caption calls the labels"""

    batches: list[Tensor]
    labels: list[int]
    names: Sequence[str]
    whose: str


class Measured(NamedTuple):
    """A configuration of ours in Figure 2. data: `imagenet`, or what else; top1, deviation: percent, over n seeds"""

    name: str
    data: str
    params_m: float
    flops_g: float
    top1: float
    deviation: float | None
    n: int


class Panel(NamedTuple):
    """A cell of a sheet: a map, over an image where there is one; mark: (left, top, width, height) of a frame, in pixels of the image."""

    map: Tensor | None = None
    image: Tensor | None = None
    mark: tuple[float, float, float, float] | None = None
    colours: str = "viridis"
    limits: tuple[float, float] | None = None


def chosen_blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    """Those that are asked for; by default the first, the middle and the last, which of 12 are the paper's: 1, 6, 12."""
    if blocks is None:
        return sorted({1, (depth + 1) // 2, depth})
    if out := [block for block in blocks if not 1 <= block <= depth]:
        raise UserError(f"blocks={list(blocks)}: this network has the blocks 1 to {depth}, and no {out[0]}")
    return sorted(set(blocks))


def words_across(model: TNT) -> int:
    """Words in a row of a patch."""
    return model.patch_size // int(model.word_embed.proj.stride[0])


# ---- what TNT.explain saw


def explained(
    model: TNT,
    images: Images,
    *,
    which: Sequence[str] = OF_WORDS,
    blocks: Sequence[int] | None = None,
    patches: Sequence[Grid] | None = None,
    words: Sequence[Grid] | None = None,
) -> Iterator[Picture]:
    """Figures 4 to 7 and the similarity of position encodings, of a network in evaluation mode.

    patches, words: the queries of Figures 5 and 6, (row, column) from 1; None takes two. UserError for what the network does not have.
    """
    numbers = chosen_blocks(blocks, len(model.blocks))
    side = words_across(model)
    at_patches = _places("patches", patches, model.grid_size, [(0.5, 0.5), (0.25, 0.75)])
    at_words = _places("words", words, (side, side), [(0.0, 0.0), (0.5, 0.5)])
    with torch.no_grad():
        seen = model.explain(images.inputs, blocks=numbers)[1]
    if "4" in which:
        yield _word_embeddings(model, images, seen, numbers)
    if "5" in which and seen.inner:
        yield _inner_attention(model, images, seen, at_patches, at_words)
    if "6" in which:
        yield _outer_attention(model, images, seen, at_patches)
    if "7" in which:
        yield _class_attention(model, images, seen)
        yield _class_attention_by_head(model, images, seen)
    if "positions" in which:
        yield from _positions(model)


def _places(key: str, given: Sequence[Grid] | None, grid: Grid, shares: Sequence[tuple[float, float]]) -> list[Grid]:
    """From 0. By default those at some share of the height and of the width."""
    if given is None:
        return list(dict.fromkeys((int(down * grid[0]), int(across * grid[1])) for down, across in shares))
    for row, column in given:
        if not (1 <= row <= grid[0] and 1 <= column <= grid[1]):
            what = "a patch" if key == "words" else "an image"
            raise UserError(f"{key}=[[{row},{column}]]: {what} has {grid[0]} rows of {grid[1]} {key} here; [row,column] from 1")
    return [(row - 1, column - 1) for row, column in given]


def _word_embeddings(model: TNT, images: Images, seen: Explanation, numbers: Sequence[int]) -> Picture:
    placed = {number: maps.words_in_place(seen.words[number], model.grid_size) for number in numbers}
    rows = [
        (name, [Panel(image=images.pixels[i]), *(Panel(placed[number][i]) for number in numbers)]) for i, name in enumerate(images.names)
    ]
    after = f"block{'s' if len(numbers) > 1 else ''} {_listed(numbers)}"
    return Picture(
        name="figure_4_word_embeddings",
        number="4",
        title="Figure 4: word embeddings",
        caption=f"The visual words as they leave {after}, each averaged over its channels and put back to its place in the image. "
        "Light is high; each map has a scale of its own.",
        alt=f"{len(images.names)} images, beside each a map of its words after {after}.",
        figure=_sheet("Figure 4: word embeddings, mean over channels", ["image", *(f"block {number}" for number in numbers)], rows),
    )


def _inner_attention(model: TNT, images: Images, seen: Explanation, patches: Sequence[Grid], words: Sequence[Grid]) -> Picture:
    size, last = model.patch_size, max(seen.inner)
    side = isqrt(seen.inner[last].shape[-1])
    heads = seen.inner[last].shape[1]
    shown = min(heads, HEADS) if heads > 1 else 0
    rows = []
    for row, column in patches:
        image = images.pixels[0, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
        for word in words:
            mark = (word[1] * size / side, word[0] * size / side, size / side, size / side)
            by_block = {n: maps.word_to_words(attention, model.grid_size, (row, column), word)[0] for n, attention in seen.inner.items()}
            cells = [*(by_block[number].mean(0) for number in by_block), *by_block[last][:shown]]
            panels = [Panel(maps.over_pixels(cell, (size, size)), mark=mark, colours="magma", limits=_limits(cell)) for cell in cells]
            rows.append((f"patch {row + 1},{column + 1}\nword {word[0] + 1},{word[1] + 1}", [Panel(image=image, mark=mark), *panels]))
    heads_said = f", and of block {last} each of {_counted(shown, heads)}" if shown else ""
    return Picture(
        name="figure_5_inner_attention",
        number="5",
        title="Figure 5: inner attention",
        caption=f"What a word (in the frame) attends to among the {side * side} words of its patch, in blocks {_listed(seen.inner)}: the "
        f"mean over heads{heads_said}. Image: {images.names[0]}. Patches and words are counted as row,column from 1. Light is much; each "
        "map goes from 0 to its own largest value.",
        alt=f"For {len(rows)} words, beside the patch that they are of, maps of their attention by block{' and head' if shown else ''}.",
        figure=_sheet(
            "Figure 5: attention of a word to the words of its patch",
            ["patch", *(f"block {n}\nmean" for n in seen.inner), *(f"block {last}\nhead {h + 1}" for h in range(shown))],
            rows,
        ),
    )


def _outer_attention(model: TNT, images: Images, seen: Explanation, patches: Sequence[Grid]) -> Picture:
    size, last = model.patch_size, max(seen.outer)
    heads = seen.outer[last].shape[1]
    shown = min(heads, HEADS) if heads > 1 else 0
    rows = []
    for place in patches:
        mark = (place[1] * size, place[0] * size, size, size)
        by_block = {n: maps.patch_to_patches(attention, model.grid_size, place)[0] for n, attention in seen.outer.items()}
        cells = [*(by_block[number].mean(0) for number in by_block), *by_block[last][:shown]]
        panels = [Panel(maps.over_pixels(cell, model.image_size), images.pixels[0], mark, "magma", _limits(cell)) for cell in cells]
        rows.append((f"patch {place[0] + 1},{place[1] + 1}", [Panel(image=images.pixels[0], mark=mark), *panels]))
    heads_said = f", and of block {last} each of {_counted(shown, heads)}" if shown else ""
    return Picture(
        name="figure_6_outer_attention",
        number="6",
        title="Figure 6: outer attention",
        caption=f"What a patch (in the frame) attends to among the patches of the image, in blocks {_listed(seen.outer)}: the mean over "
        f"heads{heads_said}. Image: {images.names[0]}. Patches are counted as row,column from 1. Light is much; each map goes from 0 to "
        "its own largest value.",
        alt=f"For {len(rows)} patches, beside the image, maps of their attention over it by block{' and head' if shown else ''}.",
        figure=_sheet(
            "Figure 6: attention of a patch to the patches",
            ["image", *(f"block {n}\nmean" for n in seen.outer), *(f"block {last}\nhead {h + 1}" for h in range(shown))],
            rows,
        ),
    )


def _class_attention(model: TNT, images: Images, seen: Explanation) -> Picture:
    by_block = {number: maps.class_to_patches(attention, model.grid_size).mean(1) for number, attention in seen.outer.items()}
    rows = []
    for i, name in enumerate(images.names):
        cells = [by_block[number][i] for number in by_block]
        panels = [Panel(maps.over_pixels(cell, model.image_size), images.pixels[i], None, "magma", _limits(cell)) for cell in cells]
        rows.append((name, [Panel(image=images.pixels[i]), *panels]))
    return Picture(
        name="figure_7_class_attention",
        number="7",
        title="Figure 7: attention of the class token",
        caption=f"What the class token attends to among the patches, over the image, in blocks {_listed(by_block)}: the mean over heads. "
        f"Light is much; each map goes from 0 to its own largest value.{unread(model)}",
        alt=f"{len(rows)} images, beside each a map by block of what the class token attends to.",
        figure=_sheet("Figure 7: attention of the class token to the patches", ["image", *(f"block {n}\nmean" for n in by_block)], rows),
    )


def _class_attention_by_head(model: TNT, images: Images, seen: Explanation) -> Picture:
    by_block = {number: maps.class_to_patches(attention, model.grid_size)[0] for number, attention in seen.outer.items()}
    heads = next(iter(by_block.values())).shape[0]
    shown = min(heads, HEADS)
    rows = []
    for number, attention in by_block.items():
        panels = [
            Panel(maps.over_pixels(cell, model.image_size), images.pixels[0], None, "magma", _limits(cell)) for cell in attention[:shown]
        ]
        rows.append((f"block {number}", panels))
    return Picture(
        name="figure_7_class_attention_by_head",
        number="7",
        title="Figure 7: attention of the class token, by head",
        caption=f"The same of one image, {images.names[0]}, by block and head ({_counted(shown, heads)}). Light is much; each map goes "
        f"from 0 to its own largest value.{unread(model)}",
        alt=f"One image, under maps of what the class token attends to: a row for each block, a column for each of {shown} heads.",
        figure=_sheet("Figure 7: attention of the class token, by head", [f"head {head + 1}" for head in range(shown)], rows),
    )


def unread(model: TNT) -> str:
    """A sentence more about the class token, where nothing reads it."""
    return "" if model.global_pool == "token" else " This network's head reads the patches, not the class token."


def _positions(model: TNT) -> Iterator[Picture]:
    side = words_across(model)
    encodings: list[tuple[str, nn.Parameter | None, int, Grid, str]] = [
        ("sentences", model.sentence_position, 1, model.grid_size, "patches of an image"),  # the first is the class token's
        ("words", model.word_position, 0, (side, side), "words of a patch"),
    ]
    for name, parameter, first, grid, things in encodings:
        if parameter is None or parameter.shape[1] - first < 2:
            continue
        table = maps.similarity(parameter.detach()[0, first:].cpu())
        panel = Panel(maps.grid_of_grids(table, grid), limits=(float(table.min()), 1.0))
        yield Picture(
            name=f"positions_{name}",
            number="positions",
            title=f"Position encodings of the {name}",
            caption=f"Cosine similarity of the learned position encodings of the {grid[0]} x {grid[1]} {things}. The map at a place shows "
            "how similar the encoding of that place is to those of all places; light is similar, 1 is its own.",
            alt=f"A grid of {grid[0]} x {grid[1]} maps, one for each of the {things}.",
            figure=_sheet(f"Position encodings of the {name}: cosine similarity", [""], [("", [panel])], width=4.6, bar=True),
        )


# ---- what any backbone can show


def features(networks: dict[str, tuple[nn.Module, Tensor]], images: Images, blocks: Sequence[int] | None = None) -> Picture:
    """Figure 3a: channels of the first image's features after some blocks.

    networks: name -> (the network, its own normalised images); one without blocks has stages, as timm's feature_info tells
    """
    rows: list[tuple[str, list[Panel]]] = []
    for name, (model, inputs) in networks.items():
        numbers = chosen_blocks(blocks, depth_of(model))
        with torch.no_grad():
            if isinstance(model, TNT):
                seen = model.explain(inputs[:1], blocks=numbers)[1]
                found = [maps.feature_maps(seen.sentences[number], model.grid_size) for number in numbers]
            else:
                backbone: Any = model
                found = backbone.forward_intermediates(inputs[:1], indices=[n - 1 for n in numbers], intermediates_only=True)
        for number, feature in zip(numbers, found, strict=True):
            shown = [feature[0, channel] for channel in maps.liveliest(feature[0], CHANNELS)]
            rows.append((f"{name}\nblock {number}", [Panel(channel) for channel in shown]))
    names = " and of ".join(networks)
    return Picture(
        name="figure_3a_feature_maps",
        number="3a",
        title="Figure 3a: feature maps",
        caption=f"Features of {names} as they leave some blocks, a channel each, put back on the grid of patches: of every block the "
        f"{CHANNELS} channels that differ most over the image. Image: {images.names[0]}. Light is high; each map has a scale of its own.",
        alt=f"A row of {CHANNELS} small maps for each block: {', '.join(name.replace(chr(10), ' ') for name, _ in rows)}.",
        figure=_sheet("Figure 3a: feature maps", [""] * CHANNELS, rows),
    )


def depth_of(model: nn.Module) -> int:
    """Blocks, or stages."""
    info: Any = model.feature_info
    return len(info)


def pooled(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """What the head reads (B, d): of a network that pools by its class token, that of the last block, after its norm."""
    backbone: Any = model
    with torch.no_grad():
        return torch.cat([backbone.forward_head(backbone.forward_features(batch), pre_logits=True).cpu() for batch in batches])


def embedded(features: Tensor, *, perplexity: float, seed: int) -> Any:
    """t-SNE by scikit-learn, (B, d) -> (B, 2), the same for the same seed; perplexity at most a third of the points."""
    from sklearn.manifold import TSNE

    perplexity = min(perplexity, max(1.0, (len(features) - 1) / 3))
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.double().numpy())


def tsne(networks: dict[str, tuple[nn.Module, Points]], *, perplexity: float, seed: int) -> Picture:
    """Figure 3b: the features that the head reads, in two dimensions, coloured by class. ImportError without scikit-learn."""
    sheet = _figure(WIDTH if len(networks) > 1 else 5.2, 4.4)
    for axes, (name, (model, points)) in zip(sheet.subplots(1, len(networks), squeeze=False)[0], networks.items(), strict=True):
        places = embedded(pooled(model, points.batches), perplexity=perplexity, seed=seed)
        classes = sorted(set(points.labels))
        for turn, label in enumerate(classes):
            at = [i for i, other in enumerate(points.labels) if other == label]
            colour = f"C{turn}" if len(classes) <= 10 else _hue(turn / len(classes))
            axes.scatter(
                places[at, 0], places[at, 1], s=14, color=colour, marker="osD^v"[turn % 5], linewidths=0, label=points.names[label]
            )
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    if len(classes) <= 20:
        handles, labels = axes.get_legend_handles_labels()
        sheet.legend(handles, labels, loc="outside lower center", ncols=min(10, len(classes)), fontsize=8, frameon=False, handletextpad=0.1)
    sheet.suptitle("Figure 3b: t-SNE of the features", fontsize=10)
    points = next(iter(networks.values()))[1]
    return Picture(
        name="figure_3b_tsne",
        number="3b",
        title="Figure 3b: t-SNE of the features",
        caption=f"The features of {' and of '.join(networks)} that the head reads, of {len(points.labels)} images, in two dimensions by "
        f"t-SNE (perplexity {min(perplexity, max(1.0, (len(points.labels) - 1) / 3)):g}, seed {seed}). Colour and shape are the "
        f"{points.whose}. Neighbours mean something; distances between groups do not.",
        alt=f"{len(points.labels)} points in {len(classes)} colours, one for each class.",
        figure=sheet,
    )


# ---- Figure 2


def accuracy(paper: dict[str, dict[str, Any]], ours: Sequence[Measured]) -> Picture:
    """Figure 2: top-1 against parameters and FLOPs. paper: name -> params_m, flops_g, top1, as in experiments/paper.yaml."""
    families: dict[str, list[str]] = {}
    for name in paper:
        families.setdefault(name.split("_")[0].rstrip("0123456789"), []).append(name)
    others = dict.fromkeys(one.data for one in ours if one.data != "imagenet")
    panels = ["imagenet", *others]
    sheet = _figure(WIDTH, 3.4 + 2.6 * len(others))
    table = sheet.subplots(len(panels), 2, squeeze=False)
    for row, data in zip(table, panels, strict=True):
        for axes, key, words in zip(row, ("params_m", "flops_g"), ("parameters, M", "GMAC"), strict=True):
            for turn, (family, names) in enumerate(families.items() if data == "imagenet" else ()):
                points = sorted((paper[name][key], paper[name]["top1"]) for name in names if paper[name][key] is not None)
                tnt = family == "tnt"
                style: dict[str, Any] = (
                    dict(color="C3", linewidth=2, zorder=3) if tnt else dict(color=_OTHERS[turn % len(_OTHERS)], linewidth=1)
                )
                axes.plot(
                    *zip(*points, strict=True), marker="osD^vPX<>"[turn % 9], markersize=7 if tnt else 5, label=f"{family}, paper", **style
                )
            for turn, one in enumerate(one for one in ours if one.data == data):
                error = None if one.deviation is None else [one.deviation]
                axes.errorbar(
                    [getattr(one, key)], [one.top1], yerr=error, marker="*", markersize=11, linestyle="", capsize=3, color=f"C{turn % 10}",
                    markeredgecolor="black", markeredgewidth=0.5, label=f"{one.name} (n={one.n})", zorder=4,
                )  # fmt: skip
            axes.set_xlabel(words, fontsize=8)
            axes.set_ylabel(f"top-1 on {'ImageNet' if data == 'imagenet' else data}, %", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.locator_params(axis="x", nbins=6)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
            for edge in ("top", "right"):
                axes.spines[edge].set_visible(False)
        row[1].legend(fontsize=6.5, frameon=False, loc="best")
    sheet.suptitle("Figure 2: accuracy against parameters and FLOPs", fontsize=10)
    here = "No runs are given, so there is no point of yours (runs=DIR)."
    if ours:
        here = "A star is a configuration of yours, the mean over n seeds with a standard deviation to each side."
    elsewhere = f" Those on {', '.join(others)} have panels of their own: the paper has no such points." if others else ""
    return Picture(
        name="figure_2_accuracy",
        number="2",
        title="Figure 2: accuracy against parameters and FLOPs",
        caption="Top-1 against parameters (millions) and multiply-accumulates of an image (1e9). Lines are the models of the paper's "
        f"Table 4, on ImageNet. {here}{elsewhere}",
        alt=f"Top-1 of the {len(paper)} models of the paper's Table 4, TNT's line in red, and of {len(ours)} configurations of yours.",
        figure=sheet,
    )


_OTHERS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")


# ---- on paper


def _sheet(
    title: str, heads: Sequence[str], rows: Sequence[tuple[str, list[Panel]]], *, width: float = WIDTH, bar: bool = False
) -> "Figure":
    """A row of panels for each label, under headings."""
    columns = len(heads)
    cell = min((width - 0.7) / columns, 1.9 if columns > 1 else width)
    longest = max(label.count("\n") for label, _ in rows)
    tall = max(cell * max(_shape(panel)[0] / _shape(panel)[1] for panel in panels) for _, panels in rows)
    sheet = _figure(cell * columns + 0.7, 0.75 + max(tall, 0.2 * longest + 0.25) * len(rows) + (0.2 if any(heads) else 0))
    for (label, panels), line in zip(rows, sheet.subplots(len(rows), columns, squeeze=False), strict=True):
        for at, axes in enumerate(line):
            axes.set_xticks([])
            axes.set_yticks([])
            if at >= len(panels):
                axes.axis("off")
                continue
            shown = _panel(axes, panels[at])
            if at == 0:
                axes.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
            if bar:
                sheet.colorbar(shown, ax=axes, shrink=0.7).ax.tick_params(labelsize=7)
    for axes, head in zip(sheet.axes[:columns], heads, strict=True):
        axes.set_title(head, fontsize=8)
    sheet.suptitle(title, fontsize=10)
    return sheet


def _panel(axes: Any, panel: Panel) -> Any:
    height, width = _shape(panel)
    extent, shown = (0, width, height, 0), None
    if panel.image is not None:
        pixels = panel.image.permute(1, 2, 0).cpu().numpy()
        grey = pixels.shape[2] == 1
        if panel.map is not None and not grey:  # under a map, a colour would be taken for a value
            pixels, grey = pixels.mean(2, keepdims=True), True
        if panel.map is not None:  # and black would hide the values above it
            pixels = 64 + pixels / 2
        gray: dict[str, Any] = dict(cmap="gray", vmin=0, vmax=255) if grey else {}
        shown = axes.imshow(pixels[..., 0] if grey else pixels, extent=extent, interpolation="nearest", **gray)
    if panel.map is not None:
        low, high = panel.limits or (None, None)
        alpha = None if panel.image is None else 0.65
        values = panel.map.float().cpu().numpy()
        shown = axes.imshow(values, cmap=panel.colours, vmin=low, vmax=high, alpha=alpha, extent=extent, interpolation="nearest")
    if panel.mark is not None:
        from matplotlib.patches import Rectangle

        left, top, across, down = panel.mark
        for colour, thick in (("black", 2.6), ("#35e0ff", 1.3)):  # to be seen on dark and on light
            axes.add_patch(Rectangle((left, top), across, down, fill=False, edgecolor=colour, linewidth=thick))
    return shown


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _shape(panel: Panel) -> tuple[int, int]:
    of = panel.image if panel.image is not None else panel.map
    assert of is not None
    return int(of.shape[-2]), int(of.shape[-1])


def _limits(values: Tensor) -> tuple[float, float]:
    return 0.0, max(float(values.max()), 1e-12)


def _hue(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["hsv"](share)


def _listed(numbers: Any) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _counted(shown: int, heads: int) -> str:
    return f"its {heads} heads" if shown == heads else f"the first {shown} of its {heads} heads"
