"""Fine-tuning: Table 9's experiments, a head of its own, the head first, frozen parts, a rate for each layer, and what an average spans."""

import functools
import os
import re
import signal
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from timm.optim import create_optimizer_v2

from tnt_lightning import CONF, create_model, load_run, load_weights, runs
from tnt_lightning.build import build_classifier, build_data
from tnt_lightning.callbacks import EMA
from tnt_lightning.classifier import Classifier
from tnt_lightning.config import check
from tnt_lightning.data import Digits, ImageDataModule
from tnt_lightning.errors import UserError
from tnt_lightning.evaluate import evaluate_run
from tnt_lightning.models import model_names
from tnt_lightning.models.cost import flops
from tnt_lightning.models.parts import head_modules, layers
from tnt_lightning.models.weights import RENAMES

from .conftest import PAPER, QUICK, compose, resolved, train
from .test_sharding import Run, largest_difference
from .test_training import ADAMW, fit, metrics, weights

pytestmark = pytest.mark.usefixtures("one_thread")

FINE_GRAINED = ("flowers", "pets", "inat2019", "inat2018")
IMAGES = {**{name: row["train"] for name, row in PAPER["datasets"].items()}, "inat2019": PAPER["datasets"]["inat2019"]["official_train"]}
SETS = ("cifar10", "cifar100", *FINE_GRAINED, "imagenet_384")
HALF = ("data.classes=[5,6,7,8,9]", "data.num_classes=5")
FEW = ("+trainer.limit_train_batches=3",)
RESNET = ("model=timm", "model.name=test_resnet", "image_size=32")  # with BatchNorm


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, one_thread) -> Path:
    """A run on the digits 0 to 4, at 8x8."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    train(run, "data.classes=[0,1,2,3,4]", "data.num_classes=5", *FEW)
    return run


# ---- the experiments of Table 9


@functools.cache
def flops_at_384(model: str) -> int:
    with torch.device("meta"):
        return flops(create_model(model, image_size=384), (3, 384, 384))


@pytest.mark.parametrize("model", ["tnt_s", "tnt_b"])
@pytest.mark.parametrize("name", SETS)
def test_an_experiment_is_the_papers_fine_tuning_and_says_what_it_comes_to(name, model):
    data, paper = name.removesuffix("_384"), PAPER["recipe"]["transfer"]
    config = compose(f"experiment=transfer_{name}", *([f"model={model}"] if model != "tnt_s" else []))
    check(config, model)
    before = compose(f"data={data}", f"model={model}").model
    assert {knob: value for knob, value in config.model.items() if value != before[knob]} == {"image_size": paper["resolution"]}
    epochs = 30 if name == "imagenet_384" else paper["epochs_fine_grained" if data in FINE_GRAINED else "epochs_cifar"]
    assert config.trainer.max_epochs == epochs and config.data.val_fraction == 0 and config.weights == "released"
    assert config.recipe.new_head == (name != "imagenet_384"), "where the classes stay, so does the head"
    augmentation = compose("experiment=imagenet_tnt_s").data.augmentation
    assert {**config.data.augmentation, "repeats": None} == {**augmentation, "repeats": None}
    assert config.data.augmentation.repeats == 3 or IMAGES[data] >= ImageDataModule.REPEATED
    average = EMA(decay=config.recipe.ema_decay)
    steps = IMAGES[data] // config.data.batch_size * epochs
    average.suit(steps)
    assert average.decay ** (0.05 * steps) == pytest.approx(0.5, abs=0.05), "half of it is of the last twentieth of the steps"

    said = (CONF / "experiment" / f"transfer_{name}.yaml").read_text()
    row = PAPER["transfer"][model]
    if (top1 := row.get(data)) is not None:
        assert re.search(r"# expected: (.+) \(paper\)", said)[1].split(", with model=tnt_b ")[model == "tnt_b"].split()[0] == str(top1)
    else:
        assert "# expected: not published" in said
    cost = f"{3 * 2 * flops_at_384(model) * epochs * IMAGES[data]:.1e}".replace("e+", "e")
    assert (f"cost: {cost} floating-point operations" if model == "tnt_s" else f"with model=tnt_b {cost};") in said


# ---- end to end


@pytest.mark.slow
def test_a_run_on_some_classes_is_fine_tuned_on_others_at_another_size(pretrained, tmp_path, capsys):
    capsys.readouterr()
    result = train(tmp_path / "run", "experiment=transfer_digits", f"weights={pretrained}", "recipe.epochs=3", *FEW)
    said = capsys.readouterr().out
    for line in (
        "classes 5: 5, 6, 7, 8, 9",
        f"weights {runs.checkpoint_path(pretrained, 'best')}",
        "sentence_position resized from 2x2 to 4x4 tokens",
        "head starts anew: 5 classes there, 5 here",
        "pixels 16x16, mean [0.0], std [1.0], as they were trained with",
        "the average spans 1 of 9 steps: recipe.ema_decay=auto is 0",
    ):
        assert line in said, line
    assert result["checkpoint"] == "last" and "trained_parameters" not in result
    model = load_run(tmp_path / "run")
    assert model.grid_size == (4, 4) and model.num_classes == 5
    assert evaluate_run(str(tmp_path / "run"), [])["test/top1"] == result["test/top1"]
    train(tmp_path / "kept", f"weights={pretrained}", *HALF, *FEW)
    assert "the head is theirs, of 5 classes too; recipe.new_head=true starts it anew" in capsys.readouterr().out


def test_a_new_head_is_the_models_own_and_all_else_the_weights(pretrained):
    for new, classes in ((True, 5), (False, 7)):
        model = create_model("tnt_digits", in_chans=1, num_classes=classes, image_size=16)
        head = model.head.weight.detach().clone()
        loaded = load_weights(model, pretrained, new_head=new)
        assert loaded.new_head and f"head starts anew: 5 classes there, {classes} here" in loaded.changes
        theirs = load_run(pretrained).state_dict()
        assert torch.equal(model.head.weight, head)
        assert all(torch.equal(t, theirs[n]) for n, t in model.state_dict().items() if "head" not in n and n != "sentence_position")


# ---- some classes, few images


def test_some_classes_are_numbered_anew_in_every_part():
    arguments = dict(in_chans=1, image_size=8, mean=0.0, std=1.0, num_workers=0)
    whole, half = Digits(num_classes=10, **arguments), Digits(num_classes=3, classes=[7, "3", 5], **arguments)
    whole.setup()
    half.setup()
    for part in ("train", "val", "test"):
        all_of_it, some = getattr(whole.parts, part), getattr(half.parts, part)
        assert some.classes == ["7", "3", "5"]
        wanted = [i for i, label in enumerate(all_of_it.labels) if label in (7, 3, 5)]
        assert some.labels == [{7: 0, 3: 1, 5: 2}[all_of_it.labels[i]] for i in wanted]
        for place in (0, len(wanted) - 1):
            (image, label), (theirs, _) = some[place], all_of_it[wanted[place]]
            assert image.tobytes() == theirs.tobytes() and label == some.labels[place]


def test_few_images_a_class_are_drawn_by_the_seed_and_are_among_more_of_them():
    def drawn(count: int, seed: int) -> list[int]:
        data = Digits(num_classes=10, in_chans=1, images_per_class=count, seed=seed)
        data.setup()
        assert [data.parts.train.labels.count(label) for label in range(10)] == [count] * 10
        assert len(data.parts.val.labels) == 216 and f"at most {count} of each class" in data.notes[0]
        return data.parts.train.indices

    assert drawn(3, seed=0) == drawn(3, seed=0) != drawn(3, seed=1)
    assert set(drawn(3, seed=0)) < set(drawn(8, seed=0))


# ---- an average that suits the steps


@pytest.mark.parametrize("steps", [100, 4_500, 24_960, 375_300])
def test_no_average_keeps_what_a_fine_tuning_starts_from(steps):
    """Users of the official code, whose average has no warm-up, met that: 0.99996 leaves 0.37 of the start after 64 epochs on CIFAR."""
    for decay in (0.99996, "auto"):
        average = EMA(decay=decay)
        average.suit(steps)
        left = 1.0
        for step in range(1, steps):
            left *= min(average.decay, average._warm_up(step))
        assert left < 1e-5


def test_the_span_of_an_average_is_the_papers_share_of_the_steps_or_is_said():
    auto = EMA(decay="auto")
    assert auto.suit(375_300) == "the average spans 25,020 of 375,300 steps: recipe.ema_decay=auto is 0.99996"
    fixed = EMA(decay=0.99996)
    assert fixed.suit(375_300) is None
    assert fixed.suit(24_960) == (
        "recipe.ema_decay=0.99996 spans 25,000 steps, of which there are 24,960: its warm-up does not end, and the average is of about the "
        "last 2,496; recipe.ema_decay=auto spans 1,664"
    )
    assert fixed.decay == 0.99996 and EMA(decay=0.99).suit(1_140) is None
    spans = EMA(decay="auto")
    assert spans.suit(3) and spans.decay == 0


# ---- a rate for each layer


def ours(name: str) -> str:
    for theirs, our in RENAMES.items():
        name = re.sub(theirs, our, name)
    return name


def test_the_layers_of_tnt_learn_at_timms_rates():
    def scales(model):
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}

    with torch.device("meta"):
        theirs, own = scales(timm.create_model("tnt_s_patch16_224")), scales(create_model("tnt_s"))
    assert {ours(name): rates for name, rates in theirs.items()} == own
    assert len({scale for scale, _ in own.values()}) == 14 and own["head.weight"] == (1, 0.05) and own["word_embed.proj.weight"][0] < 0.03


@pytest.mark.parametrize("name", [name for name in model_names() if name != "timm"])
def test_every_model_has_a_stem_blocks_and_a_head(name):
    with torch.device("meta"):
        model = create_model(name)
    depth = layers(model)
    assert depth.keys() == dict(model.named_parameters()).keys()
    [head] = head_modules(model)
    assert {n for n, d in depth.items() if d == max(depth.values())} == {f"{head}.weight", f"{head}.bias"}
    blocks = {n.rpartition(".mlp")[0] for n in depth if ".mlp." in n or ".conv1." in n} or {1}
    assert set(depth.values()) == set(range(max(depth.values()) + 1)) and max(depth.values()) > max(3, len(blocks) / 2)


def test_the_schedule_keeps_the_rate_of_each_layer():
    rates: list[list[float]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append([group["lr"] / group["lr_scale"] for group in trainer.optimizers[0].param_groups])

    alike: list[float] = []

    class Reference(Callback):
        def on_train_batch_start(self, trainer, *_):
            alike.append(trainer.optimizers[0].param_groups[0]["lr"])

    for optimizer, watch in ((ADAMW | {"layer_decay": 0.5}, Watch()), (ADAMW, Reference())):
        backbone = create_model("tnt_digits", in_chans=1, num_classes=10, depth=1)
        fit(Classifier(backbone, num_classes=10, optimizer=optimizer, warmup_epochs=1), watch, epochs=2, batch_size=611)
    assert len(rates) == len(alike) == 4 and min(map(len, rates)) == 6, "stem, block and head, with decay of weights and without"
    for row, rate in zip(rates, alike, strict=True):
        assert row == pytest.approx([rate] * len(row))


# ---- parts that stay as they are


@pytest.mark.parametrize(
    "what, stays",
    [
        ("backbone", r"(?!head)"),
        ("1", r"cls_token|(sentence|word)_position|word_embed|fold|blocks\.0\."),
        ("[word_embed,blocks.2.outer]", r"word_embed|blocks\.2\.outer"),
    ],
)
def test_frozen_parts_keep_every_bit_and_all_others_are_trained(pretrained, tmp_path, capsys, what, stays):
    capsys.readouterr()
    result = train(tmp_path / "run", f"weights={pretrained}", *HALF, *FEW, f"recipe.freeze={what}", "recipe.drop_path_rate=0.1")
    before = weights(pretrained, "best")
    for key in ("state_dict", "current_model_state"):
        after = weights(tmp_path / "run", key=key)
        unchanged = {name for name in before if torch.equal(before[name], after[name])}
        assert unchanged == {name for name in before if re.match(rf"backbone\.({stays})", name)}
    size = sum(tensor.numel() for name, tensor in before.items() if name not in unchanged)
    assert result["trained_parameters"] == size < result["parameters"]
    assert f"; {size:,} are trained" in capsys.readouterr().out
    moments = weights(tmp_path / "run", key="optimizer_states")[0]["state"]
    assert len(moments) == len(before) - len(unchanged), "nothing is kept for what is frozen"


def test_frozen_batch_statistics_stay_and_random_weights_that_are_frozen_are_said(tmp_path, capsys):
    train(tmp_path / "run", *RESNET, *FEW, "recipe.freeze=[layer1]", "recipe.ema_decay=null")
    assert "note   what is frozen (recipe.freeze) keeps its random weights: no weights= is given" in capsys.readouterr().out
    counts = {name: int(t) for name, t in weights(tmp_path / "run").items() if name.endswith("num_batches_tracked")}
    assert {name.split(".")[1] for name, count in counts.items() if count == 0} == {"layer1"}
    assert {count for name, count in counts.items() if "layer1" not in name} == {6}


# ---- the head first


@pytest.mark.parametrize("model", [(), RESNET], ids=["tnt", "batch statistics"])
def test_the_head_is_trained_alone_until_its_epochs_are_over(tmp_path, model):
    plan = (*model, *FEW, "recipe.clip_grad=1.0", "recipe.epochs=3", "recipe.head_epochs=2")
    train(tmp_path / "run", *plan)
    torch.manual_seed(0)
    classifier = build_classifier(resolved(*QUICK, *plan))
    start, [head] = classifier.state_dict(), head_modules(classifier.backbone)
    for checkpoint, changed in (("previous", lambda name: f".{head}." in name), ("last", lambda name: True)):
        after = weights(tmp_path / "run", checkpoint, key="current_model_state")
        assert weights(tmp_path / "run", checkpoint, key="epoch") == {"previous": 1, "last": 2}[checkpoint]
        moved = {name for name in start if not torch.equal(start[name], after[name])}  # buffers, too
        assert moved == {name for name in start if changed(name)}


def same_all(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_all(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same_all, a, b)) if isinstance(a, (list, tuple)) else a == b


def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(pretrained, tmp_path, monkeypatch):
    """While the head is alone, and again afterwards."""
    plan = (
        f"weights={pretrained}", *HALF, *FEW, "recipe.epochs=4", "recipe.head_epochs=2", "recipe.freeze=[word_embed]",
        "optimizer.layer_decay=0.5", "recipe.ema_decay=auto", "recipe.drop_path_rate=0.1", "recipe.new_head=true",
    )  # fmt: skip
    train(tmp_path / "whole", *plan)
    transfer, seen = ImageDataModule.on_after_batch_transfer, []

    def interrupted(self, batch, index):
        if self.trainer and self.trainer.training:
            seen.append(index)
            if len(seen) in (4, 8):
                os.kill(os.getpid(), signal.SIGTERM)
        return transfer(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDataModule, "on_after_batch_transfer", interrupted)
        for most in (4, 8):
            with pytest.raises(SystemExit):
                train(tmp_path / "run", *plan)
            assert most - 2 <= weights(tmp_path / "run", key="position")["step"] <= most
        train(tmp_path / "run", *plan)
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert same_all(weights(tmp_path / "run", key=key), weights(tmp_path / "whole", key=key)), key
    assert metrics(tmp_path / "run", "lr") == metrics(tmp_path / "whole", "lr")


@pytest.mark.slow
def test_on_two_devices_whole_or_sharded_and_cut_off_training_is_the_same(tmp_path):
    plan = ("recipe.head_epochs=2", "recipe.freeze=[word_embed]", "optimizer.layer_decay=0.5")
    cut = Run(tmp_path / "sharded", "trainer=fsdp", *plan).stopped()  # while the head is alone
    Run(cut.place, "trainer=fsdp", *plan).ended()
    assert largest_difference(Run(tmp_path / "whole", *plan).ended().place, cut.place) < 1e-5


def test_a_run_goes_on_with_the_same_parts_frozen_and_the_same_groups_of_rates(pretrained, tmp_path):
    train(tmp_path / "run", *HALF, *FEW, "recipe.freeze=1")
    again = (f"resume={tmp_path / 'run'}", *HALF, *FEW, "recipe.epochs=3")
    for other, said in (
        ("recipe.freeze=backbone", "recipe.freeze=backbone: the run to continue had 1"),
        ("optimizer.layer_decay=0.5", r"a rate for each layer \(optimizer.layer_decay\)=true: the run to continue had false"),
    ):
        with pytest.raises(UserError, match=said):
            train(tmp_path / "other", *again, *(["recipe.freeze=1"] if "layer" in other else []), other)


# ---- what does not fit


@pytest.mark.parametrize(
    "overrides, said",
    {
        "recipe.freeze=[block.0]": "recipe.freeze=[block.0]: the model has no part 'block.0' with parameters; did you mean blocks.0",
        "recipe.freeze=[stem]": "recipe.freeze=[stem]: the model has no part 'stem' with parameters; there are cls_token, word_position",
        "recipe.freeze=head": "recipe.freeze=head is not backbone or a whole number from 0 to 1,000,000,000 or a list of parts or null",
        "recipe.freeze=4": "recipe.freeze=4: the model has 3 blocks",
        "recipe.freeze=[cls_token,blocks,head,norm,fold,word_embed,sentence_position,word_position]": "nothing would be left to train",
        "recipe.head_epochs=60": "recipe.head_epochs=60 is not shorter than trainer.max_epochs=60: all else would never",
        "recipe.head_epochs=1 recipe.freeze=backbone": "recipe.head_epochs=1: recipe.freeze keeps all but the head as it is; leave",
        "recipe.head_epochs=1 recipe.freeze=[head]": "recipe.head_epochs=1: recipe.freeze keeps the head as it is; leave",
        "optimizer.layer_decay=2": "optimizer.layer_decay=2 is not a number from 0.01 to 1 or null",
        "data.classes=[5,x]": "data.classes: the set has no class 'x'; there are 10, numbered from 0: 0, 1, 2, 3, 4, ...",
        "data.classes=[5,10]": "data.classes: the set has no class 10; there are 10, numbered from 0: 0, 1, 2, 3, 4, ...",
        "data.classes=[5,5]": "data.classes=[5, 5]: names a class twice; give each once, or null for all",
        "data.classes=[]": "data.classes=[]: no class at all; give each once, or null for all",
        "data.classes=[5,6]": "data.num_classes=10: the set has 2 classes; set data.num_classes=2",
        "data.images_per_class=0": "data.images_per_class=0 is not a whole number from 1 up or null",
    }.items(),
)
def test_what_does_not_fit_is_said_in_one_line(overrides, said):
    config = compose(*overrides.split())

    def begun():
        check(config, "tnt_digits")
        plain = OmegaConf.to_container(config, resolve=True)
        build_classifier(plain)
        build_data(plain).setup()

    with pytest.raises(UserError) as refused:
        begun()
    assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1
