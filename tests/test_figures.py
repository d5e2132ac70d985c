"""The paper's figures: what is drawn is what `explain` gives, at its place; files, captions, answers."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import save_file

from tnt_lightning import create_model, figures, trained
from tnt_lightning.pictures import draw, maps

from .conftest import PAPER, train

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(image_size=(32, 48), patch_size=16, outer_dim=48, outer_heads=3, inner_heads=1, depth=2, num_classes=5)


@pytest.fixture(scope="module")
def network():
    """2 rows of 3 sentences of 16 words: no two lengths are the same that a wrong order could take for each other."""
    torch.manual_seed(0)
    return create_model("tnt_s", **SMALL).eval()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 48), dtype=np.uint8))
    return draw.Images(pixels, pixels / 127.5 - 1, ["one", "two"])


@pytest.fixture(scope="module")
def pictures(network, images):
    return {picture.name: picture for picture in draw.explained(network, images)}


def layers(picture: draw.Picture) -> list[list[np.ndarray]]:
    """What lies on each axes, from below."""
    return [[np.asarray(image.get_array()) for image in axes.images] for axes in picture.figure.axes]


# ---- the numbers


def test_the_class_tokens_map_is_the_mean_over_heads_over_its_patches_pixels(pictures, network, images):
    seen = network.explain(images.inputs)[1]
    drawn = layers(pictures["figure_7_class_attention"])  # a row an image: the image, block 1, block 2
    for image, block, place in ((0, 1, 1), (0, 2, 2), (1, 2, 5)):
        attention = seen.outer[block][image].mean(0)[0, 1:].detach()
        assert drawn[place][1].shape == (32, 48)
        for patch in range(6):
            row, column = divmod(patch, 3)
            area = drawn[place][1][16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert area == pytest.approx(attention[patch].item(), rel=1e-6)
    heads = layers(pictures["figure_7_class_attention_by_head"])  # a row a block, a column a head
    assert heads[3 + 2][1][20, 40] == pytest.approx(seen.outer[2][0, 2, 0, 6].item(), rel=1e-6)


def test_one_hot_patch_lights_its_own_pixels():
    attention = torch.zeros(1, 2, 7, 7)
    attention[:, :, 0, 1 + 5] = 1  # the class token looks at the last patch, patch 4 at patch 2
    attention[:, :, 1 + 4, 1 + 2] = 1
    for found, area in (
        (maps.class_to_patches(attention, (2, 3)), (slice(16, 32), slice(32, 48))),
        (maps.patch_to_patches(attention, (2, 3), (1, 1)), (slice(0, 16), slice(32, 48))),
    ):
        wanted = torch.zeros(1, 2, 32, 48)
        wanted[:, :, *area] = 1
        assert torch.equal(maps.over_pixels(found, (32, 48)), wanted)


def test_a_word_lights_its_place_in_its_own_patch():
    inner = torch.zeros(2 * 6, 3, 16, 16)
    inner[6 + 4, :, 4 * 1 + 2, 4 * 3 + 1] = 1  # second image, patch 1,1 of 2 x 3, word 1,2 of 4 x 4 looks at word 3,1
    found = maps.word_to_words(inner, (2, 3), (1, 1), (1, 2))
    assert found.shape == (2, 3, 4, 4) and found.sum() == 3 and (found[1, :, 3, 1] == 1).all()


def test_words_and_features_stand_where_the_image_has_them(network):
    """A bright pixel in the middle of a word changes that word alone, as long as there is no attention."""
    dark = torch.zeros(1, 3, 32, 48)
    bright = dark.clone()
    bright[:, :, 16 + 4, 32 + 12] = 1  # patch 1,2, and in it word 1,3
    changed = (network.word_embed(bright) - network.word_embed(dark)).abs().detach()
    assert maps.words_in_place(changed, (2, 3))[0].nonzero().tolist() == [[4 + 1, 8 + 3]]
    tokens = torch.arange(7.0).view(1, 7, 1)
    assert torch.equal(maps.feature_maps(tokens, (2, 3)), torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]]))


def test_word_embeddings_drawn_are_the_mean_over_channels(pictures, network, images):
    words = network.explain(images.inputs)[1].words[2]
    drawn = layers(pictures["figure_4_word_embeddings"])[3 + 2][0]
    assert drawn.shape == (8, 12)
    assert drawn[4 + 1, 8 + 3] == pytest.approx(words[6 + 5, 4 * 1 + 3].mean().item(), rel=1e-5)


def test_queries_are_those_that_are_asked_for(network, images):
    seen = network.explain(images.inputs)[1]
    five, six = draw.explained(network, images, which=["5", "6"], blocks=[2], patches=[(2, 3)], words=[(1, 4)])
    assert layers(five)[1][0][15, 0] == pytest.approx(seen.inner[2][5, :, 3, 12].mean().item(), rel=1e-6)
    assert (layers(five)[0][0] == images.pixels[0, :, 16:, 32:].permute(1, 2, 0).numpy()).all()
    assert layers(six)[1][1][0, 47] == pytest.approx(seen.outer[2][0, :, 6, 3].mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match=re.escape("patches=[[3,1]]: an image has 2 rows of 3 patches here")):
        list(draw.explained(network, images, patches=[(3, 1)]))
    with pytest.raises(ValueError, match=re.escape("blocks=[3]: this network has the blocks 1 to 2")):
        list(draw.explained(network, images, blocks=[3]))


def test_without_position_encodings_there_is_no_picture_of_them(images):
    without = create_model("tnt_s", **SMALL, position_encoding="none").eval()
    assert not list(draw.explained(without, images, which=["positions"]))


def test_position_encodings_are_set_beside_each_other_by_their_cosine(pictures, network):
    encodings = network.sentence_position[0, 1:].detach().double()
    drawn = layers(pictures["positions_sentences"])[0][0]
    assert drawn.shape == (2 * 3 - 1, 3 * 4 - 1) and np.isnan(drawn[2]).all() and np.isnan(drawn[:, 3]).all()
    wanted = torch.nn.functional.cosine_similarity(encodings[5], encodings[1], dim=0)  # in the map of patch 1,2 that of patch 0,1
    assert drawn[3 + 0, 8 + 1] == pytest.approx(wanted.item(), rel=1e-5) and drawn[3 + 1, 8 + 2] == pytest.approx(1)
    assert layers(pictures["positions_words"])[0][0].shape == (19, 19)


def test_features_are_drawn_of_networks_side_by_side(network, images):
    other = create_model("deit_ti", num_classes=5, img_size=(32, 48), depth=2).eval()
    picture = draw.features({"ours": (network, images.inputs), "deit": (other, -images.inputs)}, images)
    rows = [axes.get_ylabel() for axes in picture.figure.axes if axes.get_ylabel()]
    assert rows == ["ours\nblock 1", "ours\nblock 2", "deit\nblock 1", "deit\nblock 2"]
    features = maps.feature_maps(network.explain(images.inputs)[1].sentences[2], (2, 3))[0].detach()
    first = maps.liveliest(features, draw.CHANNELS)[0]
    assert layers(picture)[draw.CHANNELS][0] == pytest.approx(features[first].numpy())
    [theirs] = other.forward_intermediates(-images.inputs[:1], indices=[1], intermediates_only=True)
    last = maps.liveliest(theirs[0], draw.CHANNELS)[-1]
    assert layers(picture)[-1][0] == pytest.approx(theirs[0, last].detach().numpy())


def test_figure_2_has_the_papers_points_and_ours():
    ours = [draw.Measured("mine", "imagenet", 23.8, 5.2, 81.0, 0.1, 3), draw.Measured("small", "digits", 0.4, 0.002, 98.0, None, 1)]
    picture = draw.accuracy(PAPER["imagenet"], ours)
    parameters, flops, *others = picture.figure.axes
    for axes, key in ((parameters, "params_m"), (flops, "flops_g")):
        drawn = {(x, y) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
        assert {(row[key], row["top1"]) for row in PAPER["imagenet"].values() if row[key] is not None} <= drawn
        assert (ours[0].params_m if key == "params_m" else ours[0].flops_g, 81.0) in drawn
    assert len(others) == 2 and others[0].lines[0].get_ydata()[0] == 98.0 and "digits" in picture.caption


# ---- t-SNE


def test_tsne_keeps_what_is_together_together_and_is_the_same_again():
    pytest.importorskip("sklearn", reason="of the extra figures; uv run --extra figures pytest has it")
    torch.manual_seed(0)
    groups = torch.cat([torch.randn(12, 20) + 30 * torch.randn(20) for _ in range(3)])
    places = draw.embedded(groups, perplexity=30, seed=1)
    assert np.array_equal(places, draw.embedded(groups, perplexity=30, seed=1))
    near = np.linalg.norm(places[:, None] - places[None], axis=-1).argsort(1)[:, 1]
    assert (near // 12 == np.arange(36) // 12).all()


# ---- files, captions, answers


def test_captions_name_block_and_head_and_files_are_valid(pictures):
    assert set(pictures) == {
        "figure_4_word_embeddings", "figure_5_inner_attention", "figure_6_outer_attention", "figure_7_class_attention",
        "figure_7_class_attention_by_head", "positions_sentences", "positions_words",
    }  # fmt: skip
    for name, picture in pictures.items():
        assert picture.alt and picture.caption.endswith(".")
        if name.startswith("figure"):
            assert ("by block and head" if name.endswith("by_head") else "blocks 1 and 2") in picture.caption
    assert (
        "its 3 heads" in pictures["figure_6_outer_attention"].caption and "mean over heads" in pictures["figure_7_class_attention"].caption
    )
    heads = [axes.get_title() for axes in pictures["figure_6_outer_attention"].figure.axes]
    assert heads[:6] == ["image", "block 1\nmean", "block 2\nmean", "block 2\nhead 1", "block 2\nhead 2", "block 2\nhead 3"]
    picture = pictures["figure_7_class_attention"]
    assert imread(io.BytesIO(picture.png)).shape[1] > 500 and Image.open(io.BytesIO(picture.png)).text["Description"] == picture.caption
    assert b"<svg" in picture.svg and b"Figure 7" in picture.svg


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("figures") / "<run>"
    train(place, "trainer=debug", "recipe.warmup_epochs=0")
    return place


@pytest.fixture
def drawn(tmp_path, monkeypatch, capsys):
    """What a command that succeeds prints."""

    def call(*arguments: str) -> str:
        silent = ("hydra/job_logging=none", "hydra/hydra_logging=none")
        monkeypatch.setattr(sys, "argv", ["tnt-figures", f"out={tmp_path / 'out'}", *arguments, *silent])
        monkeypatch.chdir(tmp_path)
        figures.main()
        return capsys.readouterr().out

    return call


def test_a_run_is_drawn_on_images_of_its_data(run, drawn, tmp_path):
    said = drawn(f"run='{run}'", "figures=[2,7]", "count=2", f"runs='{run}'")
    names = ["figure_2_accuracy", "figure_7_class_attention", "figure_7_class_attention_by_head"]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted([*(f"{name}.{kind}" for name in names for kind in ("png", "svg")), "figures.html"])
    assert [line.rpartition("/")[2] for line in said.splitlines()] == [*(f"{n}.{k}" for n in names for k in ("png", "svg")), "figures.html"]
    page = (tmp_path / "out" / "figures.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == len(names) == page.count("<figcaption>") == page.count(' alt="')
    assert "the mean over heads" in page and "&lt;run&gt;" in page and "<run>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_photos_are_prepared_as_the_runs_images_are(run, tmp_path):
    """A file of a digit is drawn as the digit itself is; of photos without labels, colours are what the network takes them for."""
    subject = trained.of_a_run(run)
    own = figures.own_images(subject)
    assert list(own.classes) == subject.classes == list("0123456789")
    renamed = subject._replace(classes=[f"n{digit}" for digit in range(10)])  # as classes.json may have them
    assert figures.own_images(renamed).classes[3] == figures.photos(renamed, []).classes[3] == "n3"
    for place in range(9):
        image = subject.data.parts.test[place][0]
        image.save(tmp_path / f"digit {place}.png")
    files = figures._named([str(tmp_path / "digit *.png"), str(tmp_path / "digit 3.png")])
    photos = figures.photos(subject, files)
    assert photos.called[3] == "digit 3" and len(files) == 9
    assert torch.equal(photos.take(range(9)), own.take(range(9)))
    with torch.no_grad():
        predicted = subject.model(figures.normalised(subject.data, own.take(range(9)))).argmax(1).tolist()
    [(model, points)] = figures.points(subject, None, photos, 500).values()
    assert points.labels == predicted and points.whose.startswith("class that") and model is subject.model
    assert figures.points(subject, None, own, 30)[subject.name][1].labels == [own.labels[i] for i in own.spread(30)]


def test_another_network_is_set_beside_it_on_the_same_pixels(run, tmp_path):
    """A run, or a model by its name with weights, whose normalisation is its own."""
    subject = trained.of_a_run(run)
    again = figures.beside(subject, None, str(run))
    save_file(subject.model.state_dict(), tmp_path / "weights.safetensors")
    named = figures.beside(subject, "tnt_digits", str(tmp_path / "weights.safetensors"))
    assert (again.name, named.name) == (f"{subject.name} beside it", "tnt_digits")
    other_classes = create_model("tnt_digits", in_chans=1, num_classes=7, image_size=8)
    save_file(other_classes.state_dict(), tmp_path / "seven.safetensors")
    assert figures.beside(subject, "tnt_digits", str(tmp_path / "seven.safetensors")).about.startswith("Weights: seven.safetensors. head")
    pixels = figures.own_images(subject).take([0, 1])
    assert torch.allclose(figures.normalised(named.data, pixels), pixels / 127.5 - 1)  # that of a TNT whose file does not say
    images = figures.normalised(subject.data, pixels)
    for other in (again, named):
        assert torch.equal(other.model(images), subject.model(images))


def test_a_network_without_words_has_the_other_figures(drawn, tmp_path):
    """And says which are left out."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    said = drawn("model=pvt_small", "image_size=32", "data=cifar10", "recipe=imagenet", "images=photo.png")
    written = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert written == {"figure_2_accuracy.png"}
    for number in ("4", "5", "6", "7", "positions"):
        assert f"note    no Figure {number}: it is of visual words and of explain(), which a PVT has not" in said
    assert "no Figure 3a: the network has no forward_intermediates, as timm's backbones have" in said
    assert "no Figure 3b: t-SNE needs 8 images or more, and there are 1" in said and "drawn alone in Figures 3a and 3b" in said
    assert "random" in (tmp_path / "out" / "figures.html").read_text()


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["images=nothing.jpg"], "error: images=nothing.jpg: no such file, folder or pattern"),
        (["images=*.jpg"], "error: images=*.jpg: no image is called so; known kinds: .jpg .jpeg"),
        (["images=empty"], "error: images=empty: no images in this folder; known kinds: .jpg .jpeg"),
        (["images=broken.png"], "error: broken.png: not a readable image"),
        (["model=deit_ti", "figures=[5]"], "error: figures=5: it is of visual words and of explain(), which a VisionTransformer has not"),
        (["figures=[8]"], "error: figures=[8] is not a list of some of 2, 3a, 3b, 4, 5, 6, 7, positions or null"),
        (["figures=[5]", "words=[[3,1]]"], "error: words=[[3,1]]: a patch has 2 rows of 2 words here; [row,column] from 1"),
        (["run=nowhere"], "nowhere: no such run directory"),
        (["resume=latest"], "error: resume= and ablation= are of training; figures takes run=, or model=, weights= and data="),
        (["beside=dait", "beside_weights=x", "figures=[3a]"], "error: beside=dait: no such model; available: deit_b"),
        (["run=nowhere", "image=1"], "error: image=1: no such key; did you mean images or image_size?"),
    ],
)
def test_mistakes_are_answered_in_one_line(ended, tmp_path, arguments, line):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    code, lines, err = ended("figures", *arguments)
    assert code == 2 and len(lines) == 1 and line in lines[0], err
    assert "Traceback" not in err and not (tmp_path / "figures").exists()
