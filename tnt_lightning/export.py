"""`python -m tnt_lightning.export run=DIR format=onnx|torch_export|safetensors|hub out=DIR`: a trained network for use elsewhere.

What was written is loaded again and compared with the network itself before it gets its place; the batch is of any size; what must be
done to an image, and the names of the classes, lie in the file.
"""

import copy
import json
import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnt_lightning import __version__
from tnt_lightning.cli import Parser, answered
from tnt_lightning.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from tnt_lightning.trained import Trained

Reloaded = Callable[["Tensor"], "Tensor"]

TOLERANCE = 1e-4  # of the largest logit, where that is more than 1; rounding of float32 in another order stays a hundred times below
BATCHES = (1, 3)  # none is the batch of 2 by which a network is traced


def main() -> None:
    parser = Parser(prog="python -m tnt_lightning.export", description=__doc__)
    keys = (
        "run=DIR (a run, or a checkpoint in one), or model=NAME weights=SOURCE and knobs of that model; "
        f"format={'|'.join(FORMATS)}; out=DIR; of format=hub also license=ID, of the weights, by default apache-2.0"
    )
    parser.add_argument("words", metavar="KEY=VALUE", nargs="+", help=keys)
    arguments = parser.parse_args()
    with answered():
        _export(arguments.words)


def _export(words: list[str]) -> None:
    from tnt_lightning import trained  # late, as torch is

    keys, others = trained.split(words)
    if others:
        raise UserError(f"{others[0]}: not of the form KEY=VALUE; there are run=, model=, weights=, format=, out= and license=")
    form, out, license = keys.pop("format", None), keys.pop("out", None), keys.pop("license", None)
    if form not in FORMATS:
        raise UserError(f"format={form or ''}: {'no such format' if form else 'missing'}; there are {', '.join(FORMATS)}")
    if not out:
        raise UserError("out= is missing; name a folder for what is exported: out=DIR")
    if license is not None and form != "hub":
        raise UserError(f"license={license}: of format=hub alone")
    network = trained.find(keys)
    files, line = export(network, form, Path(out).expanduser(), license=license or "apache-2.0")
    print(f"checked {line}")
    for file in files:
        print(f"written {file}")
    if form == "hub":
        print(f'load   timm.create_model("local-dir:{out}", pretrained=True)')
        print(f"upload hf upload OWNER/NAME {shlex.quote(out)}")


def export(trained: "Trained", form: str, out: Path, *, license: str = "apache-2.0") -> tuple[list[Path], str]:
    """Write `trained` into the folder `out`; gives the files, and what the check found.

    UserError, and nothing is written, where the files are there already, where what was written gives other logits when it is loaded
    again, or where the format cannot hold this network.
    """
    from rich.console import Console

    write, names = FORMATS[form]
    if taken := [name for name in names if (out / name).exists()]:
        raise UserError(f"out={out}: {taken[0]} lies there already; choose another folder, or move it away")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: a file; name a folder")
    ground = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    try:
        with (
            tempfile.TemporaryDirectory(dir=ground, prefix=".export-") as place,
            Console(stderr=True).status(f"{form}: write, load, compare"),
        ):
            reloaded = write(trained, Path(place), out.absolute().name, license)
            difference, largest = _compare(trained, reloaded)
            line = (
                f"largest difference {difference:.2g} between logits of the file and of the network, which reach {largest:.3g}, "
                f"in batches of {' and '.join(map(str, BATCHES))}"
            )
            if not difference <= TOLERANCE * max(1.0, largest):
                raise UserError(f"format={form}: not written, as it is not the same network: {line}")
            out.mkdir(parents=True, exist_ok=True)
            for name in names:
                os.replace(Path(place) / name, out / name)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror or error}); choose another folder") from None
    return [out / name for name in names], line


def _compare(trained: "Trained", reloaded: Reloaded) -> tuple[float, float]:
    """(largest difference of a logit, largest logit) over normalised noise."""
    import torch

    noise, differences, logits = torch.Generator().manual_seed(0), [], []
    with torch.no_grad():
        for size in BATCHES:
            images = torch.randn(size, *trained.data.input_size, generator=noise)
            wanted = trained.model(images)
            got = reloaded(images)
            if got.shape != wanted.shape:
                raise UserError(
                    f"not written: loaded again it gives the shape {tuple(got.shape)} for {size} images, not {tuple(wanted.shape)}"
                )
            differences.append((got - wanted).abs().max())
            logits.append(wanted.abs().max())
    return max(differences).item(), max(logits).item()


def metadata(trained: "Trained") -> dict[str, str]:
    """What a program that uses the file must know, each value as JSON."""
    known: dict[str, Any] = {**trained.preprocessing, "steps": STEPS, "tnt_lightning": __version__}
    if trained.classes is not None:
        known["classes"] = trained.classes
    if trained.config is not None:
        known["model"] = trained.config["model"]
    return {name: json.dumps(value) for name, value in known.items()}


STEPS = "resize the shorter side to image_size / crop_pct, cut out the middle, scale pixels to 0..1, subtract mean, divide by std"


# ---- formats: each writes into a folder, and gives what it loads from there again


def _onnx(trained: "Trained", place: Path, name: str, license: str) -> Reloaded:
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter is made of it)
    except ModuleNotFoundError as error:
        raise UserError(f"format=onnx: needs {error.name}: pip install 'tnt-lightning[export]'") from None
    images = torch.zeros(2, *trained.data.input_size)
    try:
        program = torch.onnx.export(
            trained.model,
            (images,),
            dynamo=True,
            dynamic_shapes=_any_batch(),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    except Exception as error:  # torch's code, on any network
        raise _not_taken("onnx", error) from None
    assert program is not None
    program.model.metadata_props.update(metadata(trained))
    program.save(place / "model.onnx", external_data=False)
    session = onnxruntime.InferenceSession(place / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _torch_export(trained: "Trained", place: Path, name: str, license: str) -> Reloaded:
    import torch

    images = torch.zeros(2, *trained.data.input_size)
    try:
        program = torch.export.export(trained.model, (images,), dynamic_shapes=_any_batch())
    except Exception as error:  # as above
        raise _not_taken("torch_export", error) from None
    torch.export.save(program, place / "model.pt2", extra_files={"metadata.json": json.dumps(metadata(trained))})
    return torch.export.load(place / "model.pt2").module()


def _safetensors(trained: "Trained", place: Path, name: str, license: str) -> Reloaded:
    import torch
    from safetensors.torch import save_file

    from tnt_lightning.models.weights import load_weights

    state = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    save_file(state, place / "model.safetensors", {"format": "pt", **metadata(trained)})
    again = copy.deepcopy(trained.model)
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    load_weights(again, place / "model.safetensors", exact=True)
    return again


def _hub(trained: "Trained", place: Path, name: str, license: str) -> Reloaded:
    import timm
    from safetensors.torch import save_file

    from tnt_lightning.models.weights import as_timm

    try:
        twin, architecture, arguments = as_timm(trained.model, trained.data.input_size)
    except UserError as error:
        raise UserError(f"format=hub: {error}; format=safetensors takes any network") from None
    card: Any = twin.pretrained_cfg
    pixels = {key: trained.preprocessing[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": trained.data.num_classes,
        "num_features": twin.num_features,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "input_size": trained.data.input_size,
            **{key: card[key] for key in ("fixed_input_size", "first_conv", "classifier") if key in card},
            "num_classes": trained.data.num_classes,
            **pixels,
        },
    }
    if trained.classes is not None:
        config["label_names"] = trained.classes
        config["label_descriptions"] = {label: trained.named(i) for i, label in enumerate(trained.classes)}
    save_file(twin.state_dict(), place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (place / "README.md").write_text(model_card(trained, name, architecture, license), encoding="utf-8")
    return timm.create_model(f"local-dir:{place}", pretrained=True).eval()


def _any_batch() -> tuple[dict[int, Any]]:
    import torch

    return ({0: torch.export.Dim("batch")},)


def _not_taken(form: str, error: Exception) -> UserError:
    return UserError(
        f"format={form}: torch does not export this network ({' '.join(str(error).split())[:300]}); format=safetensors takes any"
    )


FORMATS: dict[str, tuple[Callable[["Trained", Path, str, str], Reloaded], list[str]]] = {
    "onnx": (_onnx, ["model.onnx"]),
    "torch_export": (_torch_export, ["model.pt2"]),
    "safetensors": (_safetensors, ["model.safetensors"]),
    "hub": (_hub, ["model.safetensors", "config.json", "README.md"]),
}


# ---- the model card of format=hub

RECIPE = (
    "data._target_", "data.batch_size", "data.val_fraction", "image_size", "recipe.epochs", "optimizer.opt", "optimizer.lr",
    "optimizer.weight_decay", "recipe.warmup_epochs", "recipe.label_smoothing", "recipe.drop_path_rate", "recipe.ema_decay",
    "recipe.clip_grad", "recipe.augmentation", "seed",
)  # fmt: skip


def model_card(trained: "Trained", name: str, architecture: str, license: str) -> str:
    """README.md of a model on the Hugging Face hub: figures, recipe, how to load it, licence; no path of this machine."""
    of_tnt = "tnt" in architecture
    about = f"timm's `{architecture}`" + (
        ", the Transformer in Transformer ([arXiv 2103.00112](https://arxiv.org/abs/2103.00112))" if of_tnt else ""
    )
    figures, recipe = _figures(trained), _recipe(trained)
    parts = [
        f"---\ntags:\n- image-classification\n- timm\nlibrary_name: timm\npipeline_tag: image-classification\nlicense: {license}\n---",
        f"# {one_line(name)}",
        f"{about}, for {trained.data.num_classes:,} classes" + (", trained with tnt_lightning." if trained.run else "."),
        "## Figures",
        _table(figures) if figures else "None are recorded.",
        *(["## Recipe", _table(recipe)] if recipe else []),
        "## Images",
        f"{STEPS[0].upper()}{STEPS[1:]}.",
        _table(trained.preprocessing),
        "## Use",
        "```python\nimport timm\n\n"
        f'model = timm.create_model("hf-hub:OWNER/{name}", pretrained=True).eval()  # or "local-dir:FOLDER"\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```",
        "## Licence",
        f"The weights: {license}. The images that they were trained on have terms of their own.",
    ]
    return "\n\n".join(parts) + "\n"


def _figures(trained: "Trained") -> dict[str, Any]:
    from tnt_lightning import runs

    if trained.run is None:
        return {f"top-1 on ImageNet-1k (published, {trained.published[1]})": f"{trained.published[0]} %"} if trained.published else {}
    result = runs.result_of(trained.run)
    chosen = result.get("checkpoint")
    if Path(trained.source).stem != chosen:
        return {}  # of another checkpoint
    figures = {
        f"{part} {said}": f"{result[key]:.2f} %"
        for part in ("test", "val")
        for said, top in (("top-1", "top1"), ("top-5", "top5"))
        if isinstance(result.get(key := f"{part}/{top}"), int | float)
    }
    kept = ("parameters", "flops", "seed", "device", "devices", "precision", "commit", "versions")
    return figures | {key: result[key] for key in kept if result.get(key) is not None}


def _recipe(trained: "Trained") -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = {key: OmegaConf.select(OmegaConf.create(trained.config or {}), key) for key in RECIPE}
    return {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in found.items() if value is not None
    }


def _table(rows: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        return one_line(value if isinstance(value, str) else json.dumps(value)).replace("|", "\\|")

    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {cell(value)} |" for key, value in rows.items())])


if __name__ == "__main__":
    main()
