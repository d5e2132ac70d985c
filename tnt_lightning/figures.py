"""`python -m tnt_lightning.figures run=DIR`, or `model=... weights=...`: the paper's figures of a network, as PNG, SVG and one page."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from tnt_lightning import runs, trees
from tnt_lightning.cli import command, given_in
from tnt_lightning.config import check, plain, refuse_keys_of_training
from tnt_lightning.errors import UserError
from tnt_lightning.schema import NULL, TEXT, Kind, several, whole
from tnt_lightning.schema import number as numeric

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tnt_lightning.data import ImageDataModule
    from tnt_lightning.pictures.draw import Measured, Picture, Points
    from tnt_lightning.trained import Trained

NUMBERS = ("2", "3a", "3b", "4", "5", "6", "7", "positions")
BATCH = 64  # images at a time through a network


def _list_of(kind: Kind, words: str) -> Kind:
    return Kind(f"a list of {words}", lambda v: isinstance(v, (list, ListConfig)) and len(v) > 0 and all(map(kind.fits, v)))


PLACES = _list_of(several(whole(1), 2), "[row,column] from 1")
SOURCES = TEXT | _list_of(TEXT, "texts")
OWN = {
    "out": TEXT,
    "figures": _list_of(Kind("", lambda v: str(v) in NUMBERS), f"some of {', '.join(NUMBERS)}") | NULL,
    "run": TEXT | NULL,
    "images": SOURCES | NULL,
    "count": whole(1, 32),
    "blocks": _list_of(whole(1), "block numbers") | NULL,
    "patches": PLACES | NULL,
    "words": PLACES | NULL,
    "beside": TEXT | NULL,
    "beside_weights": TEXT | NULL,
    "runs": SOURCES | NULL,
    "points": whole(5, 10_000),
    "perplexity": numeric(1, 1_000),
}


class TooFew(Exception):
    """Images, for t-SNE."""


class Found(NamedTuple):
    """Images to draw. take: places -> uint8 pixels (B, C, H, W); called: how each is called in a picture; labels: where they have classes,
    named by `classes`"""

    take: Callable[[Sequence[int]], "Tensor"]
    called: Sequence[str]
    labels: Sequence[int] | None
    classes: Sequence[str]

    def spread(self, count: int) -> list[int]:
        """So many places, or all of fewer, at equal distances."""
        size = len(self.called)
        return list(range(size)) if size <= count else [round(i * (size - 1) / max(1, count - 1)) for i in range(count)]


@command("figures")
def main(config: DictConfig) -> None:
    asked: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, list(OWN)))
    for key, kind in OWN.items():
        if not kind.fits(asked[key]):
            raise UserError(f"{key}={asked[key]} is not {kind.words}")
    from tnt_lightning.trained import of_a_run, of_composed  # late, as torch is

    hydra = HydraConfig.get()
    given = list(hydra.overrides.task)
    if asked["run"] is not None:
        named = OverridesParser.create().parse_overrides(given)
        others = [one.input_line or "" for one in named if one.key_or_group not in (*OWN, "seed")]
        trained = of_a_run(asked["run"], others)
    else:
        refuse_keys_of_training(config, hydra.runtime.choices.get("ablation"), "figures")
        of_training, model = OmegaConf.masked_copy(config, [str(key) for key in config if key not in OWN]), hydra.runtime.choices["model"]
        check(of_training, model)
        trained = of_composed(plain(of_training), model, given_in(("data", "recipe"), given))
    pictures, notes = drawn(trained, asked, seed=int(config.seed))
    files = write(Path(asked["out"]).expanduser(), pictures, notes, title=f"Figures of {trained.name}", about=trained.about)
    for note in notes:
        print(f"note    {note}")
    for file in files:
        print(f"written {file}")


def drawn(trained: "Trained", asked: dict[str, Any], *, seed: int) -> "tuple[list[Picture], list[str]]":
    """Pictures, and notes on what is left out. UserError where a figure is asked for by its number that the network cannot have."""
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws the figures, is missing: pip install 'tnt-lightning[figures]'")
    from rich.console import Console
    from rich.progress import track

    from tnt_lightning.models import TNT
    from tnt_lightning.pictures import draw
    from tnt_lightning.results import PAPER

    which = [str(number) for number in asked["figures"] or NUMBERS]
    pictures: list[Picture] = []
    notes: list[str] = []

    def left_out(number: str, why: str) -> None:
        """Of what was not asked for by its number, a note."""
        if asked["figures"] is not None:
            raise UserError(f"figures={number}: {why}")
        notes.append(f"no Figure {number}: {why}")

    missing = {number: why for number in which if (why := _lacks(trained.model, number))}
    for number, why in missing.items():
        left_out(number, why)
    which = [number for number in which if number not in missing]
    if "2" in which:
        ours, said = measured(_several(asked["runs"]))
        notes += said
        pictures.append(draw.accuracy(PAPER["imagenet"], ours))
    if set(which) - {"2"}:
        found = own_images(trained) if asked["images"] is None else photos(trained, _named(_several(asked["images"])))
        places = found.spread(asked["count"])
        pixels = found.take(places)
        images = draw.Images(pixels, normalised(trained.data, pixels), [found.called[place] for place in places])
        networks = {trained.name: (trained.model, images.inputs)}
        other = None
        if asked["beside"] is not None and asked["beside_weights"] is None:
            notes.append(
                f"beside={asked['beside']}: no beside_weights are given, and random ones show nothing; {trained.name} is drawn alone"
            )
        elif asked["beside_weights"] is not None:
            other = beside(trained, asked["beside"], asked["beside_weights"])
            networks[other.name] = (other.model, normalised(other.data, images.pixels))
        elif {"3a", "3b"} & set(which):
            notes.append(
                f"{trained.name} is drawn alone in Figures 3a and 3b: beside=deit_s beside_weights=SOURCE sets another one beside it"
            )
        if "3a" in which:
            pictures.append(draw.features(networks, images, asked["blocks"]))
        if "3b" in which:
            try:
                many = points(trained, other, found, asked["points"])
                pictures.append(draw.tsne(many, perplexity=asked["perplexity"], seed=seed))
            except ImportError:
                left_out("3b", "scikit-learn, which has t-SNE, is missing: pip install 'tnt-lightning[figures]'")
            except TooFew as error:
                left_out("3b", str(error))
        if isinstance(trained.model, TNT):
            queries = {key: None if asked[key] is None else [tuple(place) for place in asked[key]] for key in ("patches", "words")}
            wanted = [number for number in which if number in draw.OF_WORDS]
            console = Console(stderr=True)
            rows = draw.explained(trained.model, images, which=wanted, blocks=asked["blocks"], **queries)
            pictures += track(rows, "draw", console=console, transient=True, disable=not console.is_terminal)
            for number in wanted:
                if not any(picture.number == number for picture in pictures):
                    left_out(
                        number, "none of these blocks has an inner transformer" if number == "5" else "it learned no position encodings"
                    )
    return sorted(pictures, key=lambda picture: NUMBERS.index(picture.number)), notes


def _lacks(model: "nn.Module", number: str) -> str | None:
    """Why a network cannot have a figure."""
    from tnt_lightning.models import TNT
    from tnt_lightning.pictures.draw import OF_WORDS

    if number in OF_WORDS and not isinstance(model, TNT):
        return f"it is of visual words and of explain(), which a {type(model).__name__} has not; a TNT has"
    needed = {"3a": ("forward_intermediates", "feature_info"), "3b": ("forward_features", "forward_head")}.get(number, ())
    return next((f"the network has no {name}, as timm's backbones have" for name in needed if not hasattr(model, name)), None)


# ---- images


def _named(words: Sequence[str]) -> list[str]:
    files, lost = trees.named(words)
    if lost:
        raise UserError(f"images={lost[0][0]}: {lost[0][1]}")
    return files


def photos(trained: "Trained", files: Sequence[str]) -> Found:
    import torch

    images = trained.images(files)

    def take(places: Sequence[int]) -> "Tensor":
        return torch.stack([images[place][0] for place in places])  # type: ignore[index]

    names = [trained.named(label) for label in range(trained.data.num_classes)]
    return Found(take, [_short(Path(file).stem) for file in files], None, names)


def own_images(trained: "Trained") -> Found:
    """Of the test part, otherwise of validation, otherwise of training."""
    from tnt_lightning.data.module import Transformed, batch_of

    data = trained.data
    data.setup()
    assert data.parts is not None
    part: Any = data.parts.test or data.parts.val or data.parts.train
    shown = Transformed(part, data.eval_transform, data.mode)
    known = trained if trained.classes is not None else trained._replace(classes=getattr(part, "classes", None))
    names = [known.named(label) for label in range(data.num_classes)]
    called = [f"class {_short(names[label])}" for label in part.labels]
    return Found(lambda places: batch_of([shown[place] for place in places])[0], called, part.labels, names)


def normalised(data: "ImageDataModule", pixels: "Tensor") -> "Tensor":
    return data.batch_transform(pixels, pixels.new_zeros(len(pixels)), training=False)[0]


def points(trained: "Trained", other: "Trained | None", found: Found, most: int) -> "dict[str, tuple[nn.Module, Points]]":
    """For Figure 3b, of each network. Images without labels are coloured by what the first network takes them for."""
    import torch

    from tnt_lightning.pictures.draw import Points

    places = found.spread(most)
    if len(places) < 8:
        raise TooFew(f"t-SNE needs 8 images or more, and there are {len(places)}")
    pixels = [found.take(places[start : start + BATCH]) for start in range(0, len(places), BATCH)]
    batches = {one.name: [normalised(one.data, some) for some in pixels] for one in (trained, other) if one is not None}
    if found.labels is not None:
        labels, whose = [found.labels[place] for place in places], "class"
    else:
        with torch.no_grad():
            labels = torch.cat([trained.model(batch).argmax(1) for batch in batches[trained.name]]).tolist()
        whose = f"class that {trained.name} predicts"
    return {one.name: (one.model, Points(batches[one.name], labels, found.classes, whose)) for one in (trained, other) if one is not None}


def beside(trained: "Trained", name: str | None, source: str) -> "Trained":
    """Another network on the same pixels, with the normalisation of its weights: a model by its name, or without one a run."""
    from tnt_lightning.models import model_names
    from tnt_lightning.results import files
    from tnt_lightning.trained import of_a_run, of_weights

    chans, *size = trained.data.input_size
    if name is None:
        other = of_a_run(source)
    else:
        if name not in model_names():
            raise UserError(f"beside={name}: no such model; available: {', '.join(model_names())}")
        sides: Any = {key: size for key, value in files("model")[name]["model"].items() if value == "${image_size}"}
        other = of_weights(name, source, dict(in_chans=chans, num_classes=trained.data.num_classes, **sides), any_head=True)
    if other.data.input_size != trained.data.input_size:
        raise UserError(
            f"beside_weights={source}: images of {other.data.input_size} (channels, height, width) there, {trained.data.input_size} here"
        )
    return other._replace(name=f"{other.name} beside it") if other.name == trained.name else other


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


# ---- runs, for Figure 2


def measured(places: Sequence[str]) -> "tuple[list[Measured], list[str]]":
    """(configurations of runs that have figures, notes)"""
    from tnt_lightning.pictures.draw import Measured
    from tnt_lightning.results import collect, place

    if not places:
        return [], ["Figure 2 has the paper's points alone: runs=DIR adds those of runs"]
    results, ours = collect([Path(folder).expanduser() for folder in places]), []
    for row in results.rows:
        top1, size, flops = (row.mean(key) for key in (row.figure, "parameters_as_in_the_paper", "flops"))
        if top1 is not None and size is not None and flops is not None:
            data = place(row.runs[0].config).data or "other data"
            name, n = row.name if row.knobs else row.runs[0].folder.resolve().name, len(row.values(row.figure))
            ours.append(Measured(name, data, size / 1e6, flops / 1e9, top1, row.deviation(row.figure), n))
    return ours, results.notes


# ---- files


def write(out: Path, pictures: "Sequence[Picture]", notes: Sequence[str], *, title: str, about: str) -> list[Path]:
    """NAME.png and NAME.svg of each picture, and figures.html with all of them; gives the files."""
    from tnt_lightning.pictures.page import page

    contents: dict[str, str | bytes] = {f"{one.name}.{kind}": getattr(one, kind) for one in pictures for kind in ("png", "svg")}
    contents["figures.html"] = page(pictures, notes, title=title, about=about)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            runs.write(out / name, content)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror}); choose another out") from None
    return [out / name for name in contents]


def _several(given: Any) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)


if __name__ == "__main__":
    main()
