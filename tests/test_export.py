"""What `export` writes is the network itself, as those programs load it that it is written for."""

import json

import onnxruntime
import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tnt_lightning import create_model, load_run, load_weights, runs, trained
from tnt_lightning.data import Digits
from tnt_lightning.errors import UserError
from tnt_lightning.export import export

from . import layouts

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"onnx": "model.onnx", "torch_export": "model.pt2", "safetensors": "model.safetensors"}


@pytest.fixture(scope="module")
def digits():
    """Normalised test images (359, 1, 8, 8)."""
    data = Digits(num_classes=10, in_chans=1, image_size=8, mean=0.0, std=1.0, crop_pct=1.0, num_workers=0, batch_size=359)
    data.setup()
    return data.batch_transform(*next(iter(data.test_dataloader())), training=False)[0]


def loaded(form, file):
    """(images -> logits, metadata) of a file, by the program that it is for."""
    if form == "onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), session.get_modelmeta().custom_metadata_map
    if form == "torch_export":
        program = torch.export.load(file, extra_files=(extra := {"metadata.json": ""}))
        return program.module(), json.loads(extra["metadata.json"])
    model = create_model("tnt_digits", in_chans=1, num_classes=10).eval()
    load_weights(model, file, exact=True)
    with safe_open(file, "pt") as content:
        return model, content.metadata()


@pytest.mark.parametrize("form", [pytest.param("onnx", marks=pytest.mark.slow), "torch_export", "safetensors"])
def test_a_file_gives_the_runs_logits_in_batches_of_any_size(form, finished, digits, tmp_path, called):
    code, out, _ = called("export", f"run={finished}", f"format={form}", f"out={tmp_path / 'a' / 'b'}")
    assert code == 0 and "checked largest difference" in out and f"written {tmp_path / 'a' / 'b' / FILES[form]}" in out
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", FILES[form]]
    logits, known = loaded(form, tmp_path / "a" / "b" / FILES[form])
    with torch.no_grad():
        wanted = load_run(finished)(digits)
        for size in (359, 1, 64):
            torch.testing.assert_close(logits(digits[:size]), wanted[:size], atol=2e-5, rtol=0)
    read = {name: json.loads(value) for name, value in known.items() if name != "format"}
    assert read["mean"] == [0] and read["std"] == [1] and read["crop_pct"] == 1 and read["interpolation"] == "bicubic"
    assert read["image_size"] == [8, 8] and read["in_chans"] == 1 and read["classes"] == list("0123456789")
    assert read["model"] == runs.config_of(finished)["model"]


def test_timm_loads_a_folder_for_the_hub(tmp_path, called):
    model = create_model("tnt_s", image_size=32, num_classes=3).eval()
    nn.init.normal_(model.head.weight, std=0.1)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    words = ("model=tnt_s", f"weights={tmp_path / 'mine.safetensors'}", "image_size=32", "num_classes=3")
    code, out, err = called("export", *words, "format=hub", f"out={tmp_path / 'mine'}", "license=cc-by-4.0")
    assert code == 0, err
    assert f"upload hf upload OWNER/NAME {tmp_path / 'mine'}" in out
    twin = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    assert type(twin) is timm.models.TNT and twin.num_classes == 3
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images), atol=1e-5, rtol=0)
    photo, data = (
        layouts.photo(size=(50, 70)),
        trained.of_weights("tnt_s", words[1].partition("=")[2], dict(image_size=32, num_classes=3)).data,
    )
    pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(twin))(photo)
    wanted, _ = data.batch_transform(data.eval_transform(photo)[None], torch.zeros(1), training=False)
    torch.testing.assert_close(pixels, wanted[0], atol=1e-6, rtol=0)
    card = (tmp_path / "mine" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "timm" and str(tmp_path) not in card
    code, _, [err] = called("export", *words, "inner_heads=2", "format=hub", f"out={tmp_path / 'other'}")
    assert code == 2 and "timm has no network equal to this TNT; it has its own models, and tnt_b, tnt_s" in err
    assert not (tmp_path / "other").exists()


def test_a_model_of_timms_own_goes_back_to_timm(tmp_path):
    model = create_model("timm", name="test_vit", img_size=64, num_classes=4, global_pool="avg").eval()
    nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    network = trained.of_weights(
        "timm", str(tmp_path / "vit.safetensors"), dict(name="test_vit", img_size=64, num_classes=4, global_pool="avg")
    )
    export(network._replace(classes=["a", "b", "c", "d"]), "hub", tmp_path / "vit")
    twin = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images), atol=1e-5, rtol=0)
    assert twin.global_pool == "avg" and twin.pretrained_cfg["label_names"] == ["a", "b", "c", "d"]


def test_the_model_card_has_the_runs_figures_and_recipe(finished):
    from tnt_lightning.export import model_card

    card, result = model_card(trained.of_a_run(finished), "name", "tnt_s_patch16_224", "apache-2.0"), runs.result_of(finished)
    for row in (
        f"| test top-1 | {result['test/top1']:.2f} % |",
        "| recipe.epochs | 2 |",
        "| optimizer.opt | adamw |",
        "| crop_pct | 1.0 |",
    ):
        assert row in card
    assert str(finished) not in card
    last = model_card(trained.of_a_run(finished / "checkpoints" / "last.ckpt"), "name", "tnt_s_patch16_224", "apache-2.0")
    assert "None are recorded." in last, "the figures are the best checkpoint's"


class Noisy(nn.Module):
    """Another network each time that it is called."""

    def forward(self, images):
        return images.flatten(1)[:, :10] + torch.rand(images.shape[0], 10)


class Branching(nn.Module):
    """Decides by what it sees, which no exporter can follow."""

    def forward(self, images):
        return images.flatten(1)[:, :10] * (2 if images.sum().item() > 0 else 3)


@pytest.mark.parametrize(
    "network, message", [(Noisy, "it is not the same network: largest difference"), (Branching, "torch does not export")]
)
def test_what_is_not_the_network_is_not_written(finished, tmp_path, network, message):
    with pytest.raises(UserError, match=f"format=torch_export: .*{message}"):
        export(trained.of_a_run(finished)._replace(model=network()), "torch_export", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_users_mistake_is_one_line_and_exit_code_2(finished, tmp_path, monkeypatch, called):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.onnx").write_text("")
    run = f"run={finished}"
    for words, message in (
        ((run, "out=x"), "format=: missing; there are onnx, torch_export, safetensors, hub"),
        ((run, "out=x", "format=tflite"), "format=tflite: no such format"),
        ((run, "format=onnx"), "out= is missing"),
        ((run, "format=onnx", "out=file"), "out=file: a file; name a folder"),
        ((run, "format=onnx", "out=there"), "out=there: model.onnx lies there already"),
        ((run, "format=onnx", "out=x", "license=mit"), "license=mit: of format=hub alone"),
        ((run, "format=onnx", "out=x", "cat.jpg"), "cat.jpg: not of the form KEY=VALUE"),
        (("format=onnx", "out=x"), "no network is named"),
        ((run, "format=hub", "out=x"), "timm has no network equal to this TNT"),
    ):
        code, out, err = called("export", *words)
        assert code == 2 and not out and len(err) == 1 and err[0].startswith("error: ") and message in err[0], (words, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]
