"""Every file of conf/ composes and builds; knobs reach their layer."""

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tnt_lightning import CONF, create_model
from tnt_lightning.build import build_classifier, build_data
from tnt_lightning.config import KNOBS, check, refuse_to_continue
from tnt_lightning.data import ImageNet
from tnt_lightning.errors import UserError
from tnt_lightning.models import build_model, model_names

from .conftest import PAPER, compose, resolved


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))


TNTS = [name for name in model_names() if name.startswith("tnt_")]


# ---- every file


PAIRS = {*((model, data) for model in options("model") for data in ("digits", "imagenet")), *(("tnt_ti", data) for data in options("data"))}


@pytest.mark.parametrize("model, data", sorted(PAIRS))
def test_every_model_and_every_data_set_composes_and_builds(model, data):
    config = compose(f"model={model}", f"data={data}", *(["data.num_classes=7"] if data == "folder" else []))
    check(config, model)
    plain = OmegaConf.to_container(config, resolve=True)
    with torch.device("meta"):
        classifier = build_classifier(plain)
        images = torch.empty(2, *build_data(plain).input_size)
        assert classifier(images).shape == (2, plain["data"]["num_classes"])


@pytest.mark.parametrize("group, option", [(group, o) for group in ("optimizer", "recipe", "trainer", "logger") for o in options(group)])
def test_every_option_of_every_other_group_composes_and_builds(group, option):
    plain = resolved(f"{group}={option}", "recipe.mean=0.5", "recipe.std=0.5")
    build_data(plain)
    build_classifier(plain)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes_and_says_its_command_and_what_is_expected(experiment):
    config = compose(f"experiment={experiment}")
    check(config, experiment)
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert f"tnt_lightning.train experiment={experiment}" in text and "expected:" in text and "cost:" in text
    with torch.device("meta"):
        build_classifier(OmegaConf.to_container(config, resolve=True))


def test_the_imagenet_recipe_is_the_published_one():
    config, paper = compose("experiment=imagenet_tnt_s"), PAPER["recipe"]
    recipe, optimizer, augmentation = config.recipe, config.optimizer, config.recipe.augmentation
    assert recipe.epochs == paper["epochs"] and config.data.batch_size == paper["batch_size"]
    assert (optimizer.opt, optimizer.lr, optimizer.weight_decay, optimizer.eps) == (
        "adamw",
        paper["lr"],
        paper["weight_decay"],
        paper["adam_eps"],
    )
    for name in ("warmup_lr", "warmup_epochs", "label_smoothing", "ema_decay", "mean", "std", "crop_pct", "interpolation"):
        assert recipe[name] == paper[name], name
    assert config.model.drop_path_rate == paper["drop_path"]
    assert augmentation.rand_augment == paper["rand_augment"] and augmentation.color_jitter == paper["color_jitter"]
    assert (
        augmentation.erase == paper["random_erasing"]["prob"]
        and augmentation.repeats == "auto"
        and PAPER["datasets"]["imagenet"]["train"] > ImageNet.REPEATED
    )
    assert (augmentation.mixup, augmentation.cutmix) == (paper["mixup"], paper["cutmix"])


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_s", "tnt_b"])
def test_variants_are_the_published_ones(name):
    row, model = PAPER["variants"][name], compose(f"model={name}").model
    assert {knob: model[knob] for knob in ("depth", "inner_heads", "outer_dim", "outer_heads")} == {
        knob: row[knob] for knob in ("depth", "inner_heads", "outer_dim", "outer_heads")
    }


# ---- create_model: the same YAML as the commands


@pytest.mark.parametrize("model", model_names())
def test_create_model_is_the_model_of_the_commands(model):
    plain = resolved(f"model={model}", "data=imagenet", "recipe.drop_path_rate=0")
    with torch.device("meta"):
        theirs, ours = build_model(**plain["model"]), create_model(model)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_create_model_takes_knobs_and_names_what_it_does_not_know():
    with torch.device("meta"):
        model = create_model("tnt_s", inner_heads=2, num_classes=7, in_chans=1)
    assert model.blocks[0].inner.attn.num_heads == 2 and model.head.out_features == 7 and model.word_embed.proj.in_channels == 1
    with pytest.raises(UserError, match=f"'tnt_x' not found; available: {', '.join(model_names())}"):
        create_model("tnt_x")
    with pytest.raises(UserError, match="model.heads=2: no such knob; did you mean model.(inner|outer)_heads"):
        create_model("tnt_s", heads=2)


@pytest.mark.parametrize(
    "section",
    [
        dict(_target_="os.system", command="true"),
        dict(_target_="tnt_lightning.models.tnt.torch.hub.load"),
        dict(_target_="timm.create_model", model_name="hf-hub:somebody/something"),
    ],
)
def test_a_config_does_not_choose_what_code_runs(section):
    with pytest.raises(UserError):
        build_model(**section)
    with pytest.raises(UserError):
        build_data({"data": {**section, "num_classes": 10}})


# ---- ablations


@pytest.mark.parametrize("model", [name for name in TNTS if not name.startswith("tnt_s_")])
@pytest.mark.parametrize("ablation", options("ablation"))
def test_every_row_of_every_ablation_builds(model, ablation):
    config = compose(f"ablation={ablation}", f"model={model}", with_hydra=True)
    swept = config.hydra.sweeper.params
    assert list(swept) == [ablation] == [knob for knob in KNOBS if knob == ablation]
    override = OverridesParser.create().parse_override(f"{ablation}={swept[ablation]}")
    values = list(override.sweep_string_iterator())
    grid = compose(f"model={model}").grid[ablation]
    assert len(values) == len(grid) >= 2
    for value, wanted in zip(values, grid, strict=True):
        plain = resolved(f"ablation={ablation}", f"model={model}", f"{ablation}={value}")
        assert plain["model"][ablation] == plain[ablation] == (list(wanted) if OmegaConf.is_list(wanted) else wanted)
        with torch.device("meta"):
            build_model(**plain["model"])


def test_the_ablations_of_tnt_s_are_the_papers():
    grid = compose("model=tnt_s").grid
    assert all(compose(f"model=tnt_s_{number}").grid == grid for number in (1, 2, 3, 4))
    paper = PAPER["ablations"]
    for knob in ("inner_heads", "words_per_patch", "position_encoding", "se"):
        assert list(grid[knob]) == list(paper[knob])
    published = [row["tnt_blocks"] for row in PAPER["throughput_v100"].values() if "tnt_blocks" in row]
    assert [list(blocks) if blocks else list(range(1, 13)) for blocks in grid.tnt_blocks] == published


def test_the_words_ablation_has_two_heads_in_every_row():
    assert resolved("ablation=words_per_patch", "model=tnt_s")["model"]["inner_heads"] == 2


# ---- knobs


@pytest.mark.parametrize("model", TNTS)
def test_top_level_knobs_reach_the_layers(model):
    def build(*overrides):
        with torch.device("meta"):
            return build_model(**resolved(f"model={model}", *overrides)["model"])

    side = compose(f"model={model}").image_size
    assert build("inner_heads=1").blocks[0].inner.attn.num_heads == 1
    assert build("words_per_patch=1", "inner_heads=1").word_embed.proj.stride == (build().patch_size,) * 2
    assert "word_position" not in dict(build("position_encoding=sentence").named_parameters())
    assert build("se=true").blocks[0].outer.se is not None
    assert not hasattr(build("tnt_blocks=[1]").blocks[1], "inner")
    assert build(f"image_size={2 * side}").grid_size == (2 * side // build().patch_size,) * 2


# ---- continuing a run


def test_a_run_from_before_a_key_was_there_is_continued():
    now = resolved("data=digits")
    before = {**now, "data": {key: value for key, value in now["data"].items() if key not in ("subset", "on_error", "download", "cache")}}
    refuse_to_continue(before, now)
    with pytest.raises(UserError, match="data.val_fraction=0.5: the run to continue had null"):
        refuse_to_continue(before, resolved("data=digits", "data.val_fraction=0.5"))
