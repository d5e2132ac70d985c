"""Every system of the paper's tables: its published size, equal to an oracle where it is ours, and fit for all that a run does with it."""

import itertools
import math
import re

import pytest
import timm
import torch
import transformers
from omegaconf import OmegaConf
from timm.models._manipulate import group_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchprofile import profile_macs

from tnt_lightning import CONF, create_model, load_run, load_weights
from tnt_lightning.build import build_classifier
from tnt_lightning.config import check
from tnt_lightning.errors import UserError
from tnt_lightning.models import PVT, T2TViT, build_model, model_names
from tnt_lightning.models.cost import flops, parameters
from tnt_lightning.runs import config_of

from .conftest import PAPER, compose, resolved, train

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shaken(model):
    """Every parameter moved: what starts at zero would hide a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


# ---- sizes


def test_pixels_are_those_of_the_papers_table():
    """test_tables.py holds what is counted with them."""
    for name, row in PAPER["imagenet"].items():
        assert OmegaConf.load(CONF / "model" / f"{name}.yaml").image_size == row["resolution"]


def test_two_differences_from_the_paper_are_as_they_are_explained():
    """ViT's and DeiT-B's published 86.4 M are those without positions, T2T's authors' figures have the sinusoid in them."""
    for name in ("vit_b_16", "deit_b"):
        with torch.device("meta"):
            model = create_model(name)
        assert (parameters(model).live - model.pos_embed.numel()) / 1e6 == pytest.approx(86.4, abs=0.05)
    for name, theirs in (("t2t_vit_t_14", 21.5), ("t2t_vit_t_24", 64.1)):
        with torch.device("meta"):
            model = create_model(name)
        assert (parameters(model).live + model.pos_embed.numel()) / 1e6 == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_variants_of_table_5(number):
    row = PAPER["throughput_v100"][f"tnt_s_{number}"]
    with torch.device("meta"):
        model, same = create_model(f"tnt_s_{number}"), create_model("tnt_s", tnt_blocks=row["tnt_blocks"])
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in same.named_parameters()}
    assert flops(model, (3, 224, 224)) / 1e9 == pytest.approx(row["flops_g"], abs=0.06)


PRODUCTS = {"aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::_convolution"}


@pytest.mark.filterwarnings("ignore:No handlers found")  # of activations, which are no products
@pytest.mark.parametrize(
    "name, knobs",
    [
        ("pvt_small", dict(image_size=64, depths=[1, 1, 2, 1])),
        ("t2t_vit_t_14", dict(image_size=64, depth=1)),
        ("tnt_s", dict(image_size=32, depth=1)),
        ("resnet50", {}),
        ("efficientnet_b3", {}),
    ],
)
def test_flops_are_those_of_another_counter(name, knobs):
    model, side = create_model(name, **knobs).eval(), knobs.get("image_size", 64)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    counts = profile_macs(model, torch.zeros(1, 3, side, side), reduction=None)
    assert sum(count for node, count in counts.items() if node.operator in PRODUCTS) == flops(model, (3, side, side))


# ---- PVT beside transformers'

PVT_NAMES = {
    r"^pvt\.encoder\.patch_embeddings\.(\d)\.position_embeddings": "pos_embed{}",
    r"^pvt\.encoder\.patch_embeddings\.(\d)\.cls_token": "cls_token",
    r"^pvt\.encoder\.patch_embeddings\.(\d)\.projection": "patch_embed{}.proj",
    r"^pvt\.encoder\.patch_embeddings\.(\d)\.layer_norm": "patch_embed{}.norm",
    r"^pvt\.encoder\.block\.(\d)\.": "block{}.",
    r"^pvt\.encoder\.layer_norm": "norm",
    r"^classifier": "head",
}
PVT_PARTS = {
    "layer_norm_1": "norm1", "layer_norm_2": "norm2", "attention.self.query": "attn.q", "attention.self.sequence_reduction": "attn.sr",
    "attention.self.layer_norm": "attn.norm", "attention.output.dense": "attn.proj", "mlp.dense1": "mlp.fc1", "mlp.dense2": "mlp.fc2",
}  # fmt: skip


def from_transformers(state):
    """transformers' PVT by the official names, with keys and values in one matrix."""
    ours = {}
    for name, tensor in state.items():
        for theirs, mine in PVT_NAMES.items():
            if found := re.match(theirs, name):
                name = mine.format(*(int(stage) + 1 for stage in found.groups())) + name[found.end() :]
        for theirs, mine in PVT_PARTS.items():
            name = name.replace(theirs, mine)
        ours[name] = tensor
    for key in [name for name in ours if "attention.self.key" in name]:
        pair = [ours.pop(key), ours.pop(key.replace(".key", ".value"))]
        ours[key.replace("attention.self.key", "attn.kv")] = torch.cat(pair)
    return ours


@pytest.mark.parametrize("depths", [[1, 2, 1, 1], [1, 1, 2, 2]])
def test_pvts_logits_and_gradients_equal_transformers(depths):
    config = transformers.PvtConfig(image_size=64, depths=depths, num_labels=7, layer_norm_eps=1e-6)
    theirs = shaken(transformers.PvtForImageClassification(config)).double().eval()
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and ("patch_embeddings" in name or "attention.self" in name):
            module.eps = 1e-5  # as in the official code; transformers has one for all
    ours = PVT(image_size=64, depths=depths, num_classes=7).double().eval()
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    wanted = theirs(images).logits
    torch.testing.assert_close(ours(images), wanted, rtol=1e-10, atol=1e-10)
    ours(images).square().sum().backward()
    wanted.square().sum().backward()
    gradients = from_transformers({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-8)


# ---- T2T-ViT beside the text of its paper and its code's, written plainly


def plain_t2t(state, images, *, depth, heads):
    """Logits, from tensors by their official names, an image and a token at a time."""

    def norm(x, name):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * state[f"{name}.weight"] + state[
            f"{name}.bias"
        ]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def mlp(x, name):
        hidden = linear(x, f"{name}.fc1")
        return linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"{name}.fc2")

    def split(picture, kernel, stride, padding):
        """(C, H, W) -> (tokens, C * kernel^2): windows row by row, of each the channels one after the other."""
        chans, height, width = picture.shape
        padded = picture.new_zeros(chans, height + 2 * padding, width + 2 * padding)
        padded[:, padding : padding + height, padding : padding + width] = picture
        return torch.stack(
            [
                padded[:, top : top + kernel, left : left + kernel].reshape(-1)
                for top in range(0, height + 2 * padding - kernel + 1, stride)
                for left in range(0, width + 2 * padding - kernel + 1, stride)
            ]
        )

    def stage(x, name):
        x = norm(x, f"{name}.norm1")
        q, k, v = linear(x, f"{name}.attn.qkv").chunk(3, dim=1)
        attended = torch.softmax(q @ k.T / math.sqrt(x.shape[1]), dim=1) @ v
        x = v + linear(attended, f"{name}.attn.proj")
        return x + mlp(norm(x, f"{name}.norm2"), f"{name}.mlp")

    def block(x, name):
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=1)
        size = x.shape[1] // heads
        parts = [slice(size * head, size * (head + 1)) for head in range(heads)]
        attended = torch.cat([torch.softmax(q[:, p] @ k[:, p].T / math.sqrt(size), dim=1) @ v[:, p] for p in parts], dim=1)
        x = x + linear(attended, f"{name}.attn.proj")
        return x + mlp(norm(x, f"{name}.norm2"), f"{name}.mlp")

    logits = []
    for image in images:
        height, width = image.shape[1:]
        x = stage(split(image, 7, 4, 2), "tokens_to_token.attention1")
        x = stage(split(x.T.reshape(-1, height // 4, width // 4), 3, 2, 1), "tokens_to_token.attention2")
        x = linear(split(x.T.reshape(-1, height // 8, width // 8), 3, 2, 1), "tokens_to_token.project")
        x = torch.cat([state["cls_token"][0], x])
        for position in range(len(x)):
            for channel in range(x.shape[1]):
                angle = position / 10000 ** (2 * (channel // 2) / x.shape[1])
                x[position, channel] += math.cos(angle) if channel % 2 else math.sin(angle)
        for number in range(depth):
            x = block(x, f"blocks.{number}")
        logits.append(linear(norm(x, "norm")[0], "head"))
    return torch.stack(logits)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@pytest.mark.parametrize("fused", [True, False])
def test_t2t_equals_a_plain_reference(size, fused):
    knobs = dict(depth=2, num_heads=2, embed_dim=16, num_classes=5, token_dim=8)
    model = T2TViT(image_size=size, **knobs).double().eval()
    for parameter in model.parameters():  # near its start attention is almost an average, which hides a mistake in it
        torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = plain_t2t({name: tensor.detach() for name, tensor in model.state_dict().items()}, images, depth=2, heads=2)
    torch.testing.assert_close(model(images), wanted, rtol=1e-6, atol=1e-6)  # the sinusoid is kept in float32


def starred(model):
    return {re.sub(r"\.\d+\.", ".*.", name) for name in model.state_dict()}


def both(*names):
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def test_names_are_those_of_the_official_files():
    stages = [f"tokens_to_token.attention{n}." for n in (1, 2)]
    t2t = {"cls_token", "pos_embed", "blocks.*.attn.qkv.weight", *(f"{stage}attn.qkv.weight" for stage in stages)} | both(
        *(f"{stage}{part}" for stage in stages for part in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
        *(f"blocks.*.{part}" for part in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
        "tokens_to_token.project", "norm", "head",
    )  # fmt: skip
    assert starred(T2TViT(depth=2)) == t2t
    pvt = {"cls_token"} | both("norm", "head")
    for n in (1, 2, 3, 4):
        pvt |= {f"pos_embed{n}"} | both(f"patch_embed{n}.proj", f"patch_embed{n}.norm")
        pvt |= both(*(f"block{n}.*.{part}" for part in ("norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")))
        pvt |= both(f"block{n}.*.attn.sr", f"block{n}.*.attn.norm") if n < 4 else set()
    assert starred(PVT(depths=[2, 2, 2, 2])) == pvt


# ---- what a run does with any of them

THIN = {  # the networks of the files, with fewer blocks or channels
    **{name: dict(depth=2) for name in model_names() if name.startswith(("deit", "vit", "t2t"))},
    **{name: dict(depth=2, tnt_blocks=[1]) for name in model_names() if name.startswith("tnt")},
    **{name: dict(depths=[1, 1, 1, 1]) for name in ("pvt_small", "pvt_medium")},
    **{name: dict(layers=[1, 1, 1, 1]) for name in ("resnet50", "resnet152")},
    **{name: dict(w0=48, wa=27.89, wm=2.09, group_size=8, depth=17) for name in ("regnety_8gf", "regnety_16gf")},
    "timm": dict(name="convnext_atto"),
}
ONE_SIZE = [name for name in model_names() if not name.startswith(("resnet", "regnet", "efficient", "timm"))]


def thin(name, side=64, **knobs):
    size = {"img_size": side} if name.startswith(("deit", "vit")) else {"image_size": side} if name in ONE_SIZE else {}
    return create_model(name, **size, **THIN.get(name, {}), **knobs)


@pytest.fixture(scope="module", params=model_names())
def system(request):
    return request.param, shaken(thin(request.param, num_classes=5)).eval()


def test_forward_and_backward(system):
    _, model = system
    model.train()
    out = model(torch.randn(2, 3, 64, 64))
    out.square().mean().backward()
    assert out.shape == (2, 5) and out.isfinite().all()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad(set_to_none=True)
    model.eval()


def test_the_average_of_an_epoch(system):
    """As EMA keeps it, with running statistics."""
    _, model = system
    average = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first is a copy
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    average.update_parameters(model)
    for name, tensor in average.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, before[name] + 0.5)
    model.load_state_dict(before)


def test_a_checkpoint_gives_the_same_logits(system, tmp_path):
    name, model = system
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other, images = thin(name, num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    loaded = load_weights(other, tmp_path / "model.pth", exact=True)
    with torch.no_grad():
        assert loaded.changes == [] and torch.equal(other(images), model(images))


def test_weights_at_another_size_and_for_other_classes(system, tmp_path):
    name, model = system
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = thin(name, side=96, num_classes=3).eval()
    changes = load_weights(other, tmp_path / "model.pth").changes
    assert "starts anew: 5 classes there, 3 here" in changes[-1]
    assert any("resized" in line for line in changes) == (name in ONE_SIZE)
    with torch.no_grad():
        assert other(torch.randn(1, 3, 96, 96)).shape == (1, 3)
        if name in ONE_SIZE:
            grown = thin(name, num_classes=5).eval()
            grown.load_state_dict(model.state_dict())
            grown.set_input_size((96, 96))
            fresh = {key: tensor for key, tensor in grown.state_dict().items() if "head" not in key}
            for key, tensor in fresh.items():
                torch.testing.assert_close(tensor, other.state_dict()[key], rtol=1e-5, atol=1e-5)
            grown(torch.randn(1, 3, 96, 96))


def test_bfloat16(system):
    _, model = system
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            near = model(images)
    assert near.dtype == torch.bfloat16 and (near.float() - exact).norm() < 0.1 * exact.norm()


def test_recipe_and_head(system):
    """The last to use the network: its head changes."""
    _, model = system
    free = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    places = {name for name, _ in model.named_parameters() if re.search("pos_embed|position|cls_token", name)}
    assert places <= free
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        assert features.shape == (2, model.head_hidden_size)
        model.reset_classifier(9)
        assert model(images).shape == (2, 9) and model.get_classifier().out_features == 9
        model.reset_classifier(0)
        torch.testing.assert_close(model(images), features)
    model.set_grad_checkpointing()
    assert model.train()(images).requires_grad


SMALL = {
    PVT: dict(image_size=32, widths=[8, 8, 16, 16], depths=[1, 1, 2, 1], heads=[1, 2, 2, 4], num_classes=5),
    T2TViT: dict(image_size=32, embed_dim=16, depth=2, num_heads=2, token_dim=8, num_classes=5),
}


def test_torch_compile_has_no_graph_break():
    model, images = PVT(**SMALL[PVT]).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


@pytest.mark.parametrize("kind", SMALL)
def test_gradient_checkpointing_changes_no_gradient(kind):
    model, images, gradients = shaken(kind(**SMALL[kind])), torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("kind", SMALL)
def test_drop_path_rises_over_the_blocks(kind):
    model = kind(**SMALL[kind], drop_path_rate=0.4)
    rates = [module.drop_prob for name, module in model.named_modules() if name.endswith(("drop_path", "drop_path1")) and "block" in name
             and hasattr(module, "drop_prob")]  # fmt: skip
    count = sum(SMALL[kind]["depths"]) if "depths" in SMALL[kind] else SMALL[kind]["depth"]
    assert rates == pytest.approx([0.4 * n / (count - 1) for n in range(1, count)])


@pytest.mark.parametrize("kind", SMALL)
def test_rectangles_and_pooling(kind):
    model = kind(**{**SMALL[kind], "image_size": (32, 64)}, global_pool="avg").eval()
    images = torch.randn(2, 3, 32, 64)
    tokens = model.forward_features(images)
    torch.testing.assert_close(model(images), model.head(tokens[:, 1:].mean(1)))
    with pytest.raises(AssertionError, match="set_input_size"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "kind, knobs, message",
    [
        (PVT, dict(image_size=48), "image_size=48: 48 is not a multiple of 32, the pixels from one token to the next; try 32 or 64"),
        (PVT, dict(heads=[1, 3, 2, 4]), r"heads=\[1, 3, 2, 4\]: 3 does not divide 8 of widths"),
        (PVT, dict(depths=[1, 2]), r"depths=\[1, 2\] is not a list of 4 whole numbers"),
        (PVT, dict(reductions=[8, 4, 2, 2]), r"reductions=\[8, 4, 2, 2\]: the last stage"),
        (PVT, dict(reductions=[16, 4, 2, 1]), "the map of 8x8 in stage 1 is smaller than the 16 pixels"),
        (T2TViT, dict(image_size=40), "image_size=40: 40 is not a multiple of 16"),
        (T2TViT, dict(num_heads=3), "num_heads=3 does not divide embed_dim=16; try one of"),
        (T2TViT, dict(depth=0), "depth=0 is not a whole number"),
        (T2TViT, dict(mlp_ratio=0), "mlp_ratio=0 leaves the MLPs no hidden unit, or more than a thousand for each; the paper's is 3"),
        *((kind, dict(global_pool="max"), "global_pool='max'") for kind in SMALL),
        *((kind, dict(drop_path_rate=1), "drop_path_rate=1 is not a rate") for kind in SMALL),
        *((kind, dict(qkv_bias="yes"), "qkv_bias='yes'") for kind in SMALL),
    ],
)
def test_impossible_combinations_name_the_knob_the_value_and_the_cure(kind, knobs, message):
    with pytest.raises(UserError, match=message):
        kind(**{**SMALL[kind], **knobs})


# ---- training by the command's way


@pytest.mark.parametrize(
    "model",
    [
        ["model=pvt_small", "model.depths=[1,1,1,1]", "model.widths=[8,8,16,16]", "model.heads=[1,1,2,2]"],
        ["model=t2t_vit_t_14", "model.depth=1", "model.embed_dim=48", "model.token_dim=8"],
        ["model=timm", "model.name=efficientnet_lite0"],
    ],
    ids=lambda overrides: "-".join(overrides[:2]),
)
def test_a_run_trains_and_is_rebuilt(tmp_path, model):
    few = ("image_size=32", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1")
    result = train(tmp_path / "run", "data=digits", "data.batch_size=16", *model, *few)
    rebuilt = load_run(tmp_path / "run")
    assert result["parameters"] == parameters(rebuilt).live
    assert all(tensor.isfinite().all() for tensor in rebuilt.state_dict().values())
    fresh = build_model(**config_of(tmp_path / "run")["model"])
    assert load_weights(fresh, tmp_path / "run").changes == []


def test_positions_of_a_rectangular_run_are_resized_from_its_own_grid(tmp_path):
    small = ("model=t2t_vit_t_14", "model.depth=1", "model.embed_dim=48", "model.token_dim=8", "data.batch_size=16")
    train(tmp_path / "run", "image_size=[32,64]", *small, "+trainer.limit_train_batches=1", "+trainer.limit_test_batches=1")
    knobs = dict(depth=1, embed_dim=48, token_dim=8, in_chans=1, num_classes=10)
    other = create_model("t2t_vit_t_14", image_size=[64, 32], **knobs)
    assert load_weights(other, tmp_path / "run").changes == ["pos_embed resized from 2x4 to 4x2 tokens"]
    with pytest.raises(UserError, match=r"another network \(num_heads=6, the model has 3\)"):
        load_weights(create_model("t2t_vit_t_14", **knobs, num_heads=3), tmp_path / "run")


# ---- timm's by name


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["model.name=convnext_tinny"], "model.name='convnext_tinny' is no model of timm .*; did you mean convnext_tiny"),
        (["model.name=hf-hub:somebody/net"], "model.name='hf-hub:somebody/net' is no model of timm"),
        (["model.name=local-dir:/tmp/x"], "model.name='local-dir:/tmp/x' is no model of timm"),
        (["model.name=vgg11"], "model.name=vgg11: .*'drop_path_rate'; leave it out: ~model.drop_path_rate$"),
        (["+model.pretrained=true"], "model.pretrained=True: a model is built without weights"),
    ],
)
def test_what_timm_does_not_have_is_said(overrides, line):
    with pytest.raises(UserError, match=line):
        build_model(**resolved("model=timm", *overrides)["model"])


def test_any_of_timms_by_its_name_for_the_size_that_it_is_asked_for():
    for name, chosen in (("vgg11", ["~model.drop_path_rate"]), ("resnet18", []), ("swin_tiny_patch4_window7_224", ["image_size=448"])):
        plain = resolved("model=timm", f"model.name={name}", "data=imagenet", *chosen)
        with torch.device("meta"):
            ours, theirs = build_classifier(plain).backbone, timm.create_model(name)
        assert type(ours) is type(theirs)
        assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    with torch.device("meta"):
        assert ours(torch.empty(1, 3, 448, 448)).shape == (1, 1000)


# ---- its own publication


def test_pixels_are_those_of_a_models_own_publication():
    def pixels(*overrides):
        return {key: resolved(*overrides)["recipe"][key] for key in ("mean", "std", "crop_pct", "interpolation")}

    tnt = dict(mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.9, interpolation="bicubic")
    own = {name: list(values) for name, values in IMAGENET.items()}
    assert pixels("data=imagenet") == tnt
    assert pixels("data=imagenet", "model=resnet50") == own | dict(crop_pct=0.875, interpolation="bilinear")
    assert pixels("data=imagenet", "model=vit_b_16") == tnt | dict(crop_pct=1.0)
    assert pixels("data=imagenet", "model=resnet50", "recipe.crop_pct=0.5")["crop_pct"] == 0.5
    assert pixels("data=digits", "model=resnet50") == pixels("data=digits")
    data = resolved("data=imagenet", "model=pvt_small")["data"]
    assert data["mean"] == own["mean"] and data["crop_pct"] == 0.875


def test_pvt_medium_is_regularised_as_its_authors_do():
    medium, small = (resolved("data=imagenet", f"model={name}") for name in ("pvt_medium", "pvt_small"))
    assert (medium["model"]["drop_path_rate"], medium["trainer"]["gradient_clip_val"]) == (0.3, 1.0)
    assert (small["model"]["drop_path_rate"], small["trainer"]["gradient_clip_val"]) == (0.1, None)


@pytest.mark.parametrize("name", ["pvt_small", "pvt_medium", "t2t_vit_t_14", "t2t_vit_t_24"])
def test_files_of_the_authors_are_measured_with_the_same_pixels(name):
    with torch.device("meta"):
        card = create_model(name).pretrained_cfg
    recipe = resolved("data=imagenet", f"model={name}")["recipe"]
    for key in ("mean", "std", "crop_pct", "interpolation"):
        assert recipe[key] == (list(card[key]) if isinstance(card[key], tuple) else card[key])


@pytest.mark.parametrize("name", [name for name in model_names() if name not in ("tnt_digits", "timm")])
def test_a_file_says_its_size_and_where_it_is_published(name):
    lines = (CONF / "model" / f"{name}.yaml").read_text().splitlines()
    header = " ".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert re.search(r"[\d.]+ M parameters", header) and re.search(r"[\d.]+ GMAC at \d{3}", header) and re.search(r"Table \d", header)


def test_a_misspelt_fact_is_refused():
    config = compose("model=pvt_small", "+publication.crop=1")
    with pytest.raises(UserError, match=r"publication.crop=1: no such key; did you mean publication.crop_pct"):
        check(config, "pvt_small")
