"""What `predict` says of images is what evaluation would, by the names that the classes have."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tnt_lightning import create_model, load_run, runs, trained, trees
from tnt_lightning.build import build_data
from tnt_lightning.data import Digits
from tnt_lightning.errors import UserError
from tnt_lightning.predict import predict

from . import layouts
from .conftest import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The bundled test images as files, DIGIT_NUMBER.png."""
    folder = tmp_path_factory.mktemp("digits")
    data = Digits(num_classes=10, in_chans=1, image_size=8)
    data.setup()
    for number, label in enumerate(data.parts.test.labels):
        data.parts.test[number][0].save(folder / f"{label}_{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(run, folder): trained on photos of cats and dogs, of which one is turned by its camera, one is grey and one is see-through."""
    root = tmp_path_factory.mktemp("photos")
    layouts.folder(root / "data")
    for name, image in odd_photos().items():
        image.save(root / "data" / "val" / "dog" / name, exif=image.getexif())
    train(
        root / "run", "data=folder", f"data.root={root / 'data'}", "recipe=digits", "model=tnt_digits", "data.in_chans=3", "image_size=16",
        "recipe.crop_pct=0.8", "recipe.mean=[0.4,0.5,0.6]", "data.batch_size=4", "data.num_workers=0", "recipe.epochs=1",
        "recipe.warmup_epochs=0",
    )  # fmt: skip
    return root / "run", root / "data"


def odd_photos() -> dict[str, Image.Image]:
    turned = layouts.photo(size=(40, 24))
    turned.getexif()[0x0112] = 6
    clear = layouts.photo(size=(24, 40)).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    return {"turned.jpg": turned, "grey.png": layouts.photo(size=(31, 17)).convert("L"), "clear.png": clear}


def test_accuracy_over_files_is_the_runs_to_the_digit(finished, digits):
    found = list(predict(trained.of_a_run(finished), [str(file) for file in sorted(digits.iterdir())], top=5))
    assert len(found) == 359
    truth = [one.file.rpartition("/")[2][0] for one in found]
    recorded = runs.result_of(finished)
    assert 100 * np.mean([one.top[0][1] == name for one, name in zip(found, truth, strict=True)]) == pytest.approx(recorded["test/top1"])
    within = [name in [called for _, called, _ in one.top] for one, name in zip(found, truth, strict=True)]
    assert 100 * np.mean(within) == pytest.approx(recorded["test/top5"])
    assert all(sorted(one.top, key=lambda entry: -entry[2]) == one.top for one in found)


def test_pixels_are_those_of_evaluation(photos):
    """Turned, grey and see-through photos too: the probabilities are those of the loader that evaluation reads from."""
    run, _ = photos
    data = build_data(runs.config_of(run))
    data.setup()
    batches = [data.batch_transform(*batch, training=False)[0] for batch in data.val_dataloader()]
    with torch.no_grad():
        wanted = torch.cat([load_run(run)(images) for images in batches]).softmax(1)
    files = [data.parts.val.path(i) for i in range(len(wanted))]
    assert sum("turned" in file for file in files) == 1
    for size in (1, 4, 100):
        found = list(predict(trained.of_a_run(run), files, batch_size=size))
        assert [one.file for one in found] == files
        shares = torch.tensor([[share for _, _, share in sorted(one.top)] for one in found])
        torch.testing.assert_close(shares, wanted, atol=1e-5, rtol=0)
        assert {name for one in found for _, name, _ in one.top} == {"cat", "dog"}


def test_a_photo_is_turned_whatever_the_network_was_trained_on(finished, digits, tmp_path):
    """Published sets are taken as they are stored; a phone's photo is not one of them."""
    files = sorted(digits.iterdir())[:5]
    for file in files:
        image = Image.open(file).transpose(Image.Transpose.ROTATE_90)
        image.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
        image.save(tmp_path / file.name, exif=image.getexif())
    upright, turned = (list(predict(trained.of_a_run(finished), [str(f / file.name) for file in files])) for f in (digits, tmp_path))
    assert [one.top for one in upright] == [one.top for one in turned]


def test_formats_say_the_same_and_broken_files_are_left_out(photos, tmp_path, monkeypatch, called):
    run, folder = photos
    shutil.copytree(folder / "test", tmp_path / "test")
    monkeypatch.chdir(tmp_path)
    first, *names = trees.images(Path("test"))
    Path(first).write_bytes(Path(first).read_bytes()[:300])
    (tmp_path / "test" / "notes.txt").write_text("no image")

    code, out, err = called("predict", f"run={run}", "test", "gone.jpg", "--format", "jsonl", "--batch-size", 3)
    assert code == 1 and len(err) == 2, err
    assert err[0] == "broken gone.jpg: no such file, folder or pattern" and err[1].startswith("broken test/cat/") and "runcated" in err[1]
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == names
    assert all(sum(one["probability"] for one in line["top"]) == pytest.approx(1, abs=1e-5) for line in lines)

    code, out, err = called("predict", f"run={run}", "test/*/*", *names, "--top", 1, "--out", "seen.csv")
    assert code == 1 and not out and len(err) == 1
    rows = list(csv.DictReader(io.StringIO((tmp_path / "seen.csv").read_text())))
    best = [(line["file"], "1", str(line["top"][0]["label"]), line["top"][0]["class"]) for line in lines]
    assert [(row["file"], row["rank"], row["label"], row["class"]) for row in rows] == best, "each file once"

    code, out, err = called("predict", f"run={run}", *names, "--top", 1)
    assert code == 0 and not err
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert table == [[line["file"], line["top"][0]["class"], f"{100 * line['top'][0]['probability']:.1f}"] for line in lines]


def test_attention_is_drawn_as_explain_gives_it(finished, digits, tmp_path, called):
    file = sorted(digits.iterdir())[3]
    (tmp_path / "other").mkdir()
    shutil.copy(file, tmp_path / "other")
    code, _, err = called("predict", f"run={finished}", file, tmp_path / "other", "--attention", tmp_path / "drawn")
    assert code == 0 and not err
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [f"{file.stem}-2.png", f"{file.stem}.png"]
    grey = np.asarray(Image.open(file)).astype(float)
    with torch.no_grad():
        _, seen = load_run(finished).explain(torch.tensor(grey[None, None] / 255).float(), blocks=[3])
    attended = seen.outer[3][0, :, 0, 1:].mean(0).reshape(2, 2).numpy()
    share = (attended - attended.min()) / (attended.max() - attended.min())
    drawn = np.asarray(Image.open(tmp_path / "drawn" / f"{file.stem}.png")).astype(float)
    assert drawn.shape == (224, 224, 3)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):  # in the corners a patch has its own value
        red = 0.6 * share[row, column]
        expected = grey[row, column] * (1 - red) + np.array([255 * red, 0, 0])
        np.testing.assert_allclose(drawn[row, column], expected, atol=0.51)


def test_weights_from_elsewhere_have_imagenets_names_and_their_own_pixels(tmp_path, monkeypatch, called):
    model = create_model("deit_ti")
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.arange(1000).flip(0) * 0.1
    model.head.bias.data[281] = 200
    save_file(model.state_dict(), tmp_path / "deit.safetensors")
    layouts.photo(size=(300, 250)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    words = ("model=deit_ti", "weights=deit.safetensors", "photo.jpg", "--format", "jsonl", "--top", 2)
    code, out, err = called("predict", *words, "--attention", "drawn")
    top = json.loads(out)["top"]
    assert code == 0 and [(one["label"], one["class"]) for one in top] == [(281, "tabby, tabby cat"), (0, "tench, Tinca tinca")]
    assert err == ["note   --attention: VisionTransformer has no explain(), nothing is drawn"] and not (tmp_path / "drawn").exists()
    data = trained.of_weights("deit_ti", "deit.safetensors", {}).data
    assert data.mean == pytest.approx([0.485, 0.456, 0.406]) and data.input_size == (3, 224, 224) and data.crop_pct == 0.9


def test_without_recorded_names_there_are_numbers(finished, digits, tmp_path):
    assert runs.classes_of(finished) == list("0123456789")
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "classes.json").write_text(json.dumps([f"n{i}" for i in range(10)]))
    file = str(next(digits.iterdir()))
    [one] = predict(trained.of_a_run(tmp_path / "run"), [file])
    assert all(name == f"n{label}" for label, name, _ in one.top)
    (tmp_path / "run" / "classes.json").unlink()
    [one] = predict(trained.find({"weights": str(tmp_path / "run" / "checkpoints" / "best.ckpt")}), [file])
    assert all(name == str(label) for label, name, _ in one.top)
    for content, message in (("[1, 2]", "no list of names"), ("{", "damaged"), ('["a"]', "1 names for data.num_classes=10")):
        (tmp_path / "run" / "classes.json").write_text(content)
        with pytest.raises(UserError, match=message):
            trained.of_a_run(tmp_path / "run")


def test_a_users_mistake_is_one_line_and_exit_code_2(finished, digits, tmp_path, monkeypatch, called):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    run = f"run={finished}"
    for words, message in (
        (
            (run, "gone.jpg", "x/*.png", "empty"),
            "no image found; gone.jpg: no such file, folder or pattern; x/*.png: no image is called so; known kinds: .jpg",
        ),
        ((run,), "no files named"),
        ((digits,), "no network is named; give run=DIR, or weights for a model"),
        (("model=tnt_s", digits), "weights= is missing; give run=DIR"),
        (("weights=released", digits), "model= is missing; give run=DIR"),
        ((run, "model=tnt_s", digits), "model=: a run has its own"),
        ((run, run, digits), "run= is given twice"),
        (("run=nothing", digits), "no such run directory"),
        (("model=tnt_digits", "weights=x.pth", "inner_hats=2", digits), "did you mean model.inner_heads "),
        (("model=tnt_digits", "weights=x.pth", digits), "x.pth: no such run directory or file"),
        ((run, digits, "--top", 0), "--top 0: at least 1"),
        ((run, digits, "--format", "xml"), "invalid choice: 'xml'"),
        ((run, digits, "--out", "seen.txt"), "--out seen.txt: of the format jsonl or csv"),
        ((run, digits, "--out", "gone/seen.csv"), "--out gone/seen.csv: no such folder"),
    ):
        code, out, err = called("predict", *words)
        assert code == 2 and not out and len(err) == 1 and err[0].startswith("error: ") and message in err[0], (words, err)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_files_are_found_in_folders_and_by_patterns(tmp_path, monkeypatch):
    for name in ("a=b.png", "b/c.JPG", "b/d/e.webp", "b/notes.txt", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert trained.split(["run=x", "a=b.png", "se=true", "./c=d"]) == ({"run": "x", "se": "true"}, ["a=b.png", "./c=d"])
    assert trees.named(["b", "a=b.png"]) == (["b/c.JPG", "b/d/e.webp", "a=b.png"], [])
    assert trees.named(["**/*.webp", "b/*", "b/notes.txt"]) == (["b/d/e.webp", "b/c.JPG", "b/notes.txt"], [])
    assert trees.named(["*.gif"]) == ([], [("*.gif", f"no image is called so; known kinds: {' '.join(trees.SUFFIXES)}")])
