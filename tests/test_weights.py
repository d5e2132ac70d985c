"""Weights from elsewhere: each format gives the logits of the network that it was written from, and what does not fit is said.

The files are written from timm's models with random weights: nothing is downloaded, but for the test marked `network`.
"""

import argparse
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from tnt_lightning import create_model, load_run, load_weights, runs
from tnt_lightning.errors import UserError
from tnt_lightning.evaluate import evaluate_weights
from tnt_lightning.models import model_names
from tnt_lightning.models.weights import _card

from .conftest import PAPER, command, resolved, train

RELEASED = ["deit_b", "deit_s", "deit_ti", "regnety_16gf", "regnety_8gf", "resnet152", "resnet50", "tnt_b", "tnt_s"]
TWINS = {"tnt_s": "tnt_s_patch16_224", "tnt_b": "tnt_b_patch16_224"}
# timm's names -> those of the official code, as timm itself renames them the other way round on loading.
OFFICIAL = {
    r"^patch_pos$": "outer_pos", r"^pixel_pos$": "inner_pos", r"^pixel_embed\.": "patch_embed.", r"norm1_proj\.": "proj_norm1.",
    r"norm2_proj\.": "proj_norm2.", r"\.norm_in\.": ".inner_norm1.", r"\.attn_in\.": ".inner_attn.", r"\.norm_mlp_in\.": ".inner_norm2.",
    r"\.mlp_in\.": ".inner_mlp.", r"\.norm_out\.": ".outer_norm1.", r"\.attn_out\.": ".outer_attn.", r"\.norm_mlp\.": ".outer_norm2.",
    r"^(blocks\.\d+)\.mlp\.": r"\1.outer_mlp.",
}  # fmt: skip


def official(state: dict) -> dict:
    """A state dict of timm's TNT as the official release holds it, with its frozen `outer_tokens`."""
    renamed = {"outer_tokens": torch.zeros(1, 196, state["cls_token"].shape[-1])}
    for name, tensor in state.items():
        if name == "pixel_pos":
            tensor = tensor.flatten(2).transpose(1, 2)
        for theirs, ours in OFFICIAL.items():
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    return renamed


def shaken(name: str, **knobs) -> torch.nn.Module:
    """timm's model with every parameter moved: biases start at zero, where they would hide a mistake."""
    torch.manual_seed(0)
    model = timm.create_model(name, **knobs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def timms():
    return {name: shaken(twin) for name, twin in TWINS.items()}


WRITERS = {
    "timm.pth": lambda state, file: torch.save(state, file),
    "timm.safetensors": lambda state, file: save_file({n: t.contiguous() for n, t in state.items()}, file),
    "official.pth.tar": lambda state, file: torch.save(official(state), file),
    "trainer.pth.tar": lambda state, file: torch.save(  # as the official trainer and timm's save: arguments, averaged weights, DDP's prefix
        {
            "args": argparse.Namespace(lr=1e-3),
            "epoch": 3,
            "state_dict": {f"module.{n}": torch.zeros_like(t) for n, t in official(state).items()},
            "state_dict_ema": {f"module.{n}": t for n, t in official(state).items()},
        },
        file,
    ),
}


# ---- parity


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_same_logits(tmp_path, timms, format):
    theirs, ours = timms["tnt_s"], create_model("tnt_s").eval()
    WRITERS[format](theirs.state_dict(), tmp_path / format)
    loaded = load_weights(ours, tmp_path / format)
    assert loaded.changes == [] and loaded.published == (81.5, "tnt_s")
    assert loaded.name == f"{tmp_path / format}{' (state_dict_ema)' if format.startswith('trainer') else ''}"
    assert loaded.preprocessing == dict(mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.9, interpolation="bicubic")
    batch = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TWINS)
def test_logits_and_gradients_equal_timms(tmp_path, timms, name):
    theirs, ours = timms[name], create_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    load_weights(ours, tmp_path / "timm.pth")
    batch, logits = torch.randn(2, 3, 224, 224), {}
    for model in (theirs, ours):
        model.zero_grad()
        logits[model] = model(batch)
        torch.nn.functional.cross_entropy(logits[model], torch.tensor([3, 7])).backward()
    torch.testing.assert_close(logits[ours], logits[theirs], rtol=1e-5, atol=1e-5)
    torch.save({n: p.grad for n, p in theirs.named_parameters()}, tmp_path / "gradients.pth")
    wanted = create_model(name)  # its parameters become timm's gradients, by our names
    load_weights(wanted, tmp_path / "gradients.pth")
    gradients = dict(ours.named_parameters())
    for n, want in wanted.state_dict().items():
        got = gradients.pop(n).grad
        assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max()), n
    assert not gradients


def test_squeeze_and_excitation_of_the_official_code(tmp_path):
    model, other = create_model("tnt_digits", se=True, num_classes=3), create_model("tnt_digits", se=True, num_classes=3)
    place = {"norm": 0, "reduce": 1, "expand": 3}  # of its nn.Sequential
    state = {
        re.sub(r"outer\.se\.(\w+)\.", lambda match: f"se_layer.fc.{place[match[1]]}.", name): tensor
        for name, tensor in model.state_dict().items()
    }
    assert sum("se_layer" in name for name in state) == 3 * 6
    torch.save(state, tmp_path / "se.pth")
    load_weights(other, tmp_path / "se.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_timms_own_networks_take_timms_files(tmp_path):
    theirs = shaken("deit_small_patch16_224")
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")  # as DeiT's release wraps it
    ours = create_model("deit_s").eval()
    loaded = load_weights(ours, tmp_path / "deit.pth")
    assert loaded.preprocessing["mean"] == [0.485, 0.456, 0.406] and loaded.published == (79.8, "deit_s")
    batch = torch.randn(1, 3, 224, 224)
    assert torch.equal(ours(batch), theirs(batch))
    wide = create_model("deit_s", img_size=256, num_classes=7)
    assert load_weights(wide, tmp_path / "deit.pth").changes == [
        "pos_embed resized from 197 to 257 tokens",
        "head starts anew: 1000 classes there, 7 here",
    ]


def test_a_run_gives_its_weights_and_its_pixels(finished):
    model = create_model("tnt_digits", in_chans=1, num_classes=10)
    loaded = load_weights(model, finished)
    assert loaded.changes == [] and loaded.published is None
    assert loaded.preprocessing == dict(mean=0.0, std=1.0, crop_pct=1.0, interpolation="bicubic")
    same = load_run(finished).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())


# ---- adapted


def test_positions_are_resized_and_the_head_is_replaced_and_both_are_said(tmp_path, timms):
    torch.save(timms["tnt_s"].state_dict(), tmp_path / "timm.pth")
    model = create_model("tnt_s", image_size=(256, 224), num_classes=7)
    head = model.head.weight.clone()
    loaded = load_weights(model, tmp_path / "timm.pth")
    assert loaded.changes == ["sentence_position resized from 14x14 to 16x14 tokens", "head starts anew: 1000 classes there, 7 here"]
    assert loaded.new_head and torch.equal(model.head.weight, head)
    torch.testing.assert_close(model.sentence_position, resample_abs_pos_embed(timms["tnt_s"].patch_pos, [16, 14], [14, 14]))
    with pytest.raises(UserError, match=r"another network \(sentence_position resized from 14x14 to 16x14 tokens; head starts anew"):
        load_weights(model, tmp_path / "timm.pth", exact=True)


def test_positions_of_a_run_are_resized_from_its_own_grid(tmp_path):
    train(tmp_path / "run", "image_size=[8,16]", "+trainer.limit_train_batches=1")
    source = load_run(tmp_path / "run")
    model = create_model("tnt_digits", in_chans=1, num_classes=10, image_size=[16, 8])  # as many sentences, in another grid
    assert load_weights(model, tmp_path / "run").changes == ["sentence_position resized from 2x4 to 4x2 tokens"]
    torch.testing.assert_close(model.sentence_position, resample_abs_pos_embed(source.sentence_position, [4, 2], [2, 4]))


# ---- refused


@pytest.mark.parametrize(
    "knobs, message",
    [
        (dict(se=True), r"missing: blocks\.\*\.outer\.se\.expand\.bias \(x12\), .*outer\.se\.reduce\.weight \(x12\)\)"),
        (dict(position_encoding="sentence"), r"unexpected: word_position\)"),
        (dict(words_per_patch=64, inner_heads=2), r"of another shape: .*word_position \(1, 16, 24\) for \(1, 64, 6\)"),
        (dict(in_chans=1), r"of another shape: word_embed.proj.weight \(24, 3, 7, 7\) for \(24, 1, 7, 7\)\)"),
    ],
)
def test_weights_of_another_network_are_an_error_that_lists_the_keys(tmp_path, timms, knobs, message):
    torch.save(timms["tnt_s"].state_dict(), tmp_path / "timm.pth")
    model = create_model("tnt_s", **knobs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(model, tmp_path / "timm.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_change_the_network_though_no_shape(finished):
    with pytest.raises(UserError, match=r"another network \(inner_heads=2, the model has 4\)"):
        load_weights(create_model("tnt_digits", in_chans=1, num_classes=10, inner_heads=4), finished)


def test_arguments_of_timms_networks_change_them_though_no_shape(tmp_path, finished):
    small = ("data=digits", "model=deit_s", "image_size=16", "+model.embed_dim=24", "+model.depth=1")
    train(tmp_path / "run", *small, "+model.num_heads=2", "+trainer.limit_train_batches=1")
    knobs = dict(img_size=16, embed_dim=24, depth=1, in_chans=1, num_classes=10)
    load_weights(create_model("deit_s", **knobs, num_heads=2), tmp_path / "run")
    with pytest.raises(UserError, match=r"another network \(num_heads=2, the model has 3\)"):
        load_weights(create_model("deit_s", **knobs, num_heads=3), tmp_path / "run")
    with pytest.raises(UserError, match="this network is none of them"):
        load_weights(create_model("deit_s", num_heads=12), "released")


def test_another_pooling_is_said(finished):
    model = create_model("tnt_digits", in_chans=1, num_classes=10, global_pool="avg")
    assert load_weights(model, finished).changes == ["global_pool is 'avg', theirs was 'token'"]


def test_timms_legacy_network_is_refused_by_name(tmp_path):
    torch.save(timm.create_model("tnt_s_legacy_patch16_224").state_dict(), tmp_path / "file.pth")
    for source in (tmp_path / "file.pth", "hf-hub:timm/tnt_s_legacy_patch16_224.in1k"):
        with pytest.raises(UserError, match="timm's legacy TNT is another network"):
            load_weights(create_model("tnt_s"), source)


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (self.file.touch, ())


def test_what_is_no_file_of_weights_is_said(tmp_path, finished):
    model = create_model("tnt_digits", in_chans=1, num_classes=10)
    state = model.state_dict()

    def with_(name, tensor):
        return state | {name: tensor}

    inside, words = torch.load(runs.checkpoint_path(finished, "best"), weights_only=True), state["word_position"]
    files = {
        "bomb.pth": (
            {"state_dict": Bomb(tmp_path / "exploded")},
            "not a file of tensors and plain data, or a damaged one (UnpicklingError)",
        ),
        "text.pth": (b"hello", "not a file of tensors and plain data"),
        "nothing.pth": (b"", "not a file of tensors and plain data"),
        "cut.safetensors": (b"\x10\0\0\0\0\0\0\0{", "not a file of tensors and plain data, or a damaged one"),
        "empty.pth": ({"note": "nothing"}, "holds no tensors by name"),
        "numbers.pth": ({1: torch.zeros(2)}, "holds no tensors by name"),
        "list.pth": ([1, 2], "holds a list, not weights by name"),
        "nan.pth": (with_("head.bias", torch.full((10,), torch.nan)), "head.bias holds numbers that are complex, infinite or not numbers"),
        "whole.pth": (with_("head.bias", torch.zeros(10, dtype=torch.int64)), "of another kind of number: head.bias torch.int64"),
        "sparse.pth": (with_("head.weight", state["head.weight"].to_sparse()), "head.weight is no dense tensor"),
        "twice.pth": (with_("inner_pos", words), "holds word_position twice, under two names"),
        "scalar.pth": (with_("head.weight", torch.tensor(1.0)), "of another shape: head.weight () for (10, 96)"),
        "point.pth": (with_("sentence_position", torch.zeros(1, 1, 96)), "of another shape: sentence_position (1, 1, 96) for (1, 5, 96)"),
        "flat.pth": ({"pixel_pos": torch.zeros(4)}, "weights of another network"),
        "other.ckpt": ({**inside, "state_dict": {"net.weight": torch.zeros(2)}}, "a Lightning checkpoint, but not of tnt_lightning"),
        "moved.ckpt": (inside, "config.yaml cannot be read"),
    }
    for name, (content, message) in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(UserError) as caught:
            load_weights(model, tmp_path / name)
        said = str(caught.value)
        assert message in said and "\n" not in said and "weights_only" not in said, name
    for source, message in (
        (tmp_path / "none.pth", "none.pth: no such run directory or file"),
        ("~nosuchuser/x.pth", "no path of a file"),
        ("https://example.org/x.pth", "https://example.org/x.pth: a URL is not loaded from"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(model, source)
    assert not (tmp_path / "exploded").exists()


def test_a_safetensors_file_is_one_by_any_name(tmp_path):
    model = create_model("tnt_digits")
    save_file(model.state_dict(), tmp_path / "model.bin")
    assert load_weights(create_model("tnt_digits"), tmp_path / "model.bin").changes == []


def test_a_hostile_run_directory_executes_nothing(tmp_path, finished):
    """timm's own loading of a file, which in older versions unpickles, is no knob of a model."""
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "bomb.pth")
    config = runs.config_of(finished)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(runs.checkpoint_path(finished, "last").read_bytes())
    for knob in ("checkpoint_path", "pretrained_cfg", "pretrained", "cache_dir"):
        config["model"] = {"_target_": "timm.create_model", "model_name": "deit_small_patch16_224", knob: str(tmp_path / "bomb.pth")}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(UserError, match=f"model.{knob}=.*: a model is built without weights"):
            load_run(tmp_path / "run")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.yaml", "", "is not the configuration of a run"),
        ("config.yaml", "model: x", "is not the configuration of a run"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("result.json", "{", "result.json is damaged"),
    ],
)
def test_a_damaged_run_directory_is_said(tmp_path, finished, file, content, message):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "result.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        (tmp_path / "run" / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "run" / file).write_text(content)
    for use in (load_run, lambda run: load_weights(create_model("tnt_digits", in_chans=1, num_classes=10), run)):
        with pytest.raises(UserError, match=message):
            use(tmp_path / "run")


# ---- released


def test_released_weights_are_timms_and_their_figures_the_papers():
    published = set(timm.list_pretrained())
    for name in model_names():
        if card := _card(name):
            assert card["hub"].removeprefix("timm/") in published and "legacy" not in card["hub"]
            assert card["top1"] == PAPER["imagenet"][name]["top1"]
    assert [name for name in model_names() if _card(name)] == RELEASED


@pytest.mark.parametrize("name, knobs", [("tnt_ti", {}), ("tnt_s", dict(inner_heads=2)), ("tnt_s", dict(se=True)), ("tnt_digits", {})])
def test_what_was_never_released_is_said(name, knobs):
    with pytest.raises(UserError, match=r"weights=released: .*resnet50, tnt_b, tnt_s with the knobs of conf/model/; this network is none"):
        load_weights(create_model(name, **knobs), "released")


@pytest.fixture
def hub(tmp_path, timms):
    """A cache of the Hugging Face hub that holds TNT-S, as a download leaves it; the environment that points there, offline."""
    snapshot = tmp_path / "hub" / "models--timm--tnt_s_patch16_224.in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    save_file({n: t.contiguous() for n, t in timms["tnt_s"].state_dict().items()}, snapshot / "model.safetensors")
    card = dict(mean=[0.4, 0.5, 0.6], std=[0.5] * 3, crop_pct=0.8, interpolation="bilinear", num_classes=1000, input_size=[3, 224, 224])
    (snapshot / "config.json").write_text(json.dumps(dict(architecture="tnt_s_patch16_224", num_classes=1000, pretrained_cfg=card)))
    return {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}


def test_released_weights_come_from_the_hub_with_their_own_pixels(hub, tmp_path, timms):
    """Through the hub's cache, in a process of its own, since the hub's library reads its settings when it is imported."""
    torch.save(timms["tnt_s"].state_dict(), tmp_path / "same.pth")
    code = """
import torch
from tnt_lightning import create_model, load_weights
a, b, c = (create_model("tnt_s") for _ in "abc")
loaded = load_weights(a, "released")
load_weights(b, "hf-hub:timm/tnt_s_patch16_224.in1k")
load_weights(c, "same.pth")
states = [model.state_dict() for model in (a, b, c)]
print(all(torch.equal(states[0][n], state[n]) for state in states[1:] for n in state), loaded)
try:
    load_weights(create_model("tnt_s", inner_heads=2), "hf-hub:timm/tnt_s_patch16_224.in1k")
except ValueError as error:
    print(error)
try:
    load_weights(create_model("tnt_b"), "released")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **hub}, capture_output=True, text=True, check=True)
    same, heads, absent = done.stdout.splitlines()
    assert same.startswith("True Weights(name='hf-hub:timm/tnt_s_patch16_224.in1k', changes=[], new_head=False")
    assert "'mean': [0.4, 0.5, 0.6]" in same and "'crop_pct': 0.8" in same and "published=(81.5, 'tnt_s')" in same
    assert "another network (inner_heads=4, the model has 2)" in heads
    assert absent.startswith("hf-hub:timm/tnt_b_patch16_224.in1k: not fetched from the Hugging Face hub (")


@pytest.mark.network
@pytest.mark.parametrize("name", RELEASED)
def test_released_weights_give_timms_logits(name):
    theirs = timm.create_model(_card(name)["hub"].removeprefix("timm/"), pretrained=True).eval()
    ours = create_model(name).eval()
    load_weights(ours, "released")
    batch = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch), rtol=1e-4, atol=1e-4)


# ---- evaluate


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A tree like ImageNet's, with one small photo-like image for each of a thousand classes."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for label in range(1000):
        for part in ("train", "val"):
            folder = root / part / f"n{label:08}"
            folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(folder / "0.JPEG")
    return root


def test_evaluate_measures_with_the_weights_own_pixels_beside_the_published_figure(tmp_path, thousand):
    theirs = shaken("deit_small_patch16_224")
    torch.save(theirs.state_dict(), tmp_path / "deit.pth")
    few = ("data.batch_size=4", "data.num_workers=0", "trainer.limit_val_batches=1")
    line = (
        "model=deit_s",
        "data=imagenet",
        f"data.root={thousand}",
        "data.subset=true",
        "weights=deit.pth",
        *("+" * (o[0] == "t") + o for o in few),
    )
    done = command("evaluate", *line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pixels mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225], crop_pct 0.9, interpolation bicubic" in done.stdout
    assert re.search(r"published \(deit_s\)", done.stdout) and re.search(r"val/top1\s*\S\s*[\d.]+\s*\S\s*79\.8 ", done.stdout)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    images = torch.stack([transform(Image.open(thousand / "val" / f"n{label:08}" / "0.JPEG")) for label in range(4)])
    with torch.no_grad():
        want = F.cross_entropy(theirs(images), torch.arange(4)).item()
    got = float(re.search(r"val/loss\s*\S\s*([\d.]+)", done.stdout)[1])
    assert got == pytest.approx(want, rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deit.pth"], "measuring leaves nothing behind"


def test_evaluate_refuses_a_head_of_other_classes(tmp_path, finished):
    with pytest.raises(UserError, match="head starts anew: 10 classes there, 11 here; fine-tune the weights first"):
        evaluate_weights(resolved(f"weights={finished}", "data.num_classes=11"), set())


@pytest.mark.parametrize("override", ["++data.crop_pct=0.5", "recipe.crop_pct=0.5"])
def test_what_is_given_stays_as_given(tmp_path, finished, override):
    done = command("evaluate", f"weights={finished}", override, cwd=tmp_path)
    assert done.returncode == 0 and "crop_pct 0.5" in done.stdout and "mean 0.0" in done.stdout, done.stderr


def test_the_published_figure_stands_beside_the_benchmark(tmp_path, thousand, capsys):
    """Where a validation part is carved out of training, ImageNet's own is the test."""
    torch.save(shaken("deit_small_patch16_224").state_dict(), tmp_path / "deit.pth")
    few = (
        "data.batch_size=2",
        "data.num_workers=0",
        "+trainer.limit_val_batches=1",
        "+trainer.limit_test_batches=1",
        "data.num_classes=1000",
    )
    for label in range(1000):  # two training images a class, as one is carved out
        image = thousand / "train" / f"n{label:08}" / "0.JPEG"
        (image.parent / "1.JPEG").write_bytes(image.read_bytes())
    carved = (
        "model=deit_s",
        "data=imagenet",
        "data.subset=true",
        f"data.root={thousand}",
        f"weights={tmp_path / 'deit.pth'}",
        "data.val_fraction=0.5",
    )
    evaluate_weights(resolved(*carved, *few), set())
    rows = [line for line in capsys.readouterr().out.splitlines() if "/top1" in line]
    assert [("79.8" in row) for row in rows] == [False, True] and "test/top1" in rows[1]


# ---- train


def test_training_starts_from_other_weights_and_says_what_it_changed(tmp_path, finished, capsys):
    train(tmp_path / "run", f"weights={finished}", "image_size=16", "recipe.mean=0.5", "+trainer.limit_train_batches=1")
    said = capsys.readouterr().out
    assert f"weights {finished / 'checkpoints' / 'best.ckpt'}" in said
    assert "sentence_position resized from 2x2 to 4x4 tokens" in said
    assert "note   they were trained with other pixels: recipe.mean=0.0 recipe.std=1.0" in said
