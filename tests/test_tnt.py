"""The backbone: of the published sizes, and true to each of its knobs. (test_weights.py sets it beside timm's.)"""

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet, FeatureInfo
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_weight_decay

from tnt_lightning import create_model
from tnt_lightning.errors import UserError
from tnt_lightning.models import TNT
from tnt_lightning.models.cost import flops, parameters

from .conftest import PAPER

SMALL = dict(image_size=16, patch_size=4, words_per_patch=4, outer_dim=24, inner_heads=2, outer_heads=3, depth=3, num_classes=5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(n=2, size=(16, 16), chans=3):
    return torch.randn(n, chans, *size)


# ---- the published sizes


def published():
    for name in ("tnt_ti", "tnt_s", "tnt_b"):
        row = PAPER["variants"][name]
        yield pytest.param(name, {}, row["params_m"], row["flops_g"], id=name)
    for m, row in PAPER["ablations"]["words_per_patch"].items():
        yield pytest.param("tnt_s", dict(words_per_patch=m, inner_heads=2), row["params_m"], row["flops_g"], id=f"words_{m}")
    for se, row in PAPER["ablations"]["se"].items():
        yield pytest.param("tnt_s", dict(se=se), row["params_m"], row["flops_g"], id=f"se_{se}")
    for name, row in PAPER["throughput_v100"].items():
        if "tnt_blocks" in row:
            yield pytest.param("tnt_s", dict(tnt_blocks=row["tnt_blocks"]), None, row["flops_g"], id=name)


@pytest.mark.parametrize("name, knobs, params_m, flops_g", list(published()))
def test_parameters_and_flops_are_the_published_ones(name, knobs, params_m, flops_g):
    with torch.device("meta"):
        model = create_model(name, **knobs)
    assert flops(model, (3, 224, 224)) / 1e9 == pytest.approx(flops_g, abs=0.06)
    if params_m is not None:
        assert parameters(model).paper / 1e6 == pytest.approx(params_m, abs=0.06)


@pytest.mark.parametrize("name, live_m", [("tnt_ti", 6.076), ("tnt_s", 23.769), ("tnt_b", 65.429)])
def test_live_parameters(name, live_m):
    with torch.device("meta"):
        assert parameters(create_model(name)).live / 1e6 == pytest.approx(live_m, abs=5e-4)


def test_inner_dim_follows_the_published_rule():
    for m, row in PAPER["ablations"]["words_per_patch"].items():
        with torch.device("meta"):
            assert create_model("tnt_s", words_per_patch=m, inner_heads=2).word_embed.proj.out_channels == row["inner_dim"]


# ---- each knob bites


@pytest.mark.parametrize("inner_heads, outer_heads", [(1, 2), (2, 1), (3, 8), (6, 4)])
def test_heads_reach_the_attention_maps(inner_heads, outer_heads):  # no parameter count shows this knob
    _, seen = TNT(**{**SMALL, "inner_heads": inner_heads, "outer_heads": outer_heads}).explain(images())
    assert seen.inner[1].shape == (2 * 16, inner_heads, 4, 4)
    assert seen.outer[1].shape == (2, outer_heads, 17, 17)


@pytest.mark.parametrize("words", [1, 4, 16])
def test_words_per_patch_cuts_the_patch(words):
    _, seen = TNT(**{**SMALL, "words_per_patch": words, "outer_dim": 48, "inner_heads": 1}).explain(images())
    assert seen.words[3].shape == (2 * 16, words, 48 // words)


@pytest.mark.parametrize("encoding", ["none", "sentence", "word", "both"])
def test_position_encoding_makes_places_distinguishable(encoding):
    model = TNT(**SMALL, position_encoding=encoding).eval()
    assert ("sentence_position" in model.state_dict()) == (encoding in ("sentence", "both"))
    assert ("word_position" in model.state_dict()) == (encoding in ("word", "both"))
    batch = images()
    # Without sentence positions, patches in another order are the same image to the class token.
    swapped = torch.cat([batch[..., 4:8], batch[..., :4], batch[..., 8:]], dim=-1)
    same = torch.allclose(model(batch), model(swapped), atol=1e-5)
    assert same == (encoding in ("none", "word"))


def test_word_positions_tell_words_apart():
    flat = torch.ones(1, 3, 4, 4)  # one patch; words differ by padding and position only
    model = TNT(**{**SMALL, "image_size": 4}, position_encoding="word")
    torch.nn.init.zeros_(model.word_embed.proj.weight)
    words, _ = model._embed(flat)
    assert not torch.allclose(words[:, 0], words[:, 1])


def test_tnt_blocks_choose_which_blocks_have_words():
    _, seen = TNT(**SMALL, tnt_blocks=[1, 3]).explain(images())
    assert sorted(seen.inner) == [1, 3] and sorted(seen.outer) == [1, 2, 3]
    assert torch.equal(seen.words[1], seen.words[2]) and not torch.equal(seen.words[2], seen.words[3])


def test_se_scales_the_branch_by_the_mean_token():
    block = TNT(**SMALL, se=True).blocks[0].outer.eval()
    x = torch.randn(2, 17, 24)
    torch.nn.init.constant_(block.se.expand.bias, 0.5)
    torch.nn.init.zeros_(block.se.expand.weight)
    after_attention = x + block.attn(block.norm1(x))
    branch = block.mlp(block.norm2(after_attention))
    want = after_attention + branch + branch * torch.tanh(torch.tensor(0.5))
    torch.testing.assert_close(block(x), want)


def test_mlp_ratio_is_that_of_both_transformers():
    block = TNT(**SMALL, mlp_ratio=2).blocks[0]
    assert block.inner.mlp.fc1.out_features == 2 * 6 and block.outer.mlp.fc1.out_features == 2 * 24


def test_drop_path_is_drawn_per_patch_inside_and_per_image_outside():
    model = TNT(**SMALL, drop_path_rate=0.5).train()
    rates = [getattr(block.outer.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.25, 0.5])
    assert rates == pytest.approx([getattr(block.inner.drop_path, "drop_prob", 0.0) for block in model.blocks])
    block = model.blocks[2]
    torch.nn.init.ones_(block.inner.attn.proj.bias)
    words = torch.randn(8 * 16, 4, 6)
    moved = (block.inner(words) != words).flatten(1).any(1).reshape(8, 16)
    assert any(0 < row.sum() < 16 for row in moved), "every patch of an image fell together"
    torch.nn.init.ones_(block.outer.attn.proj.bias)
    sentences = torch.randn(64, 17, 24)
    moved = (block.outer(sentences) != sentences).any(-1)
    assert (moved.all(1) | ~moved.any(1)).all() and 0 < moved.all(1).sum() < 64


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropout_is_random_in_training_only(rate):
    model, batch = TNT(**SMALL, **{rate: 0.5}), images()
    assert not torch.equal(model.train()(batch), model(batch))
    assert torch.equal(model.eval()(batch), model(batch))


def test_qkv_bias():
    assert TNT(**SMALL, qkv_bias=True).blocks[0].inner.attn.qk.bias is not None
    assert TNT(**SMALL).blocks[0].inner.attn.qk.bias is None


def test_a_word_sees_its_own_patch_only():
    model, batch = TNT(**SMALL).eval(), images(1)
    changed = batch.clone()
    changed[..., :4, :4] = 0
    _, a = model.explain(batch)
    _, b = model.explain(changed)
    differs = (a.words[3] != b.words[3]).flatten(1).any(1)
    assert differs.tolist() == [True] + [False] * 15


# ---- looking inside


def test_explain_agrees_with_forward():
    model, batch = TNT(**SMALL).eval(), images()
    logits, seen = model.explain(batch, blocks=[1, 3])
    torch.testing.assert_close(logits, model(batch))
    assert sorted(seen.inner) == sorted(seen.outer) == sorted(seen.words) == sorted(seen.sentences) == [1, 3]
    for maps in (*seen.inner.values(), *seen.outer.values()):
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    torch.testing.assert_close(model.norm(seen.sentences[3]), model.forward_features(batch))
    with pytest.raises(ValueError, match=r"blocks=\[4\].*1 to 3"):
        model.explain(batch, blocks=[4])


# ---- image sizes


def test_rectangular_images():
    assert TNT(**{**SMALL, "image_size": (8, 16)})(images(2, (8, 16))).shape == (2, 5)


@pytest.mark.parametrize("size", [(32, 32), (8, 24)])
def test_set_input_size_resizes_positions_as_timm_does(size):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, num_heads=3, depth=1)
    model = TNT(**SMALL)
    with torch.no_grad():
        model.sentence_position.copy_(theirs.pos_embed)
    theirs.set_input_size(size)
    model.set_input_size(size)
    torch.testing.assert_close(model.sentence_position, theirs.pos_embed)
    same = model.sentence_position
    model.set_input_size(size)
    assert model.sentence_position is same, "an optimizer may have it"
    with pytest.raises(UserError, match="30 is not a multiple of patch_size=4"):
        model.set_input_size(30)
    assert model(images(2, size)).shape == (2, 5)
    with pytest.raises(AssertionError, match="set_input_size"):
        model(images())


# ---- timm's contract: the checks that timm makes of its own models


@pytest.fixture(params=["token", "avg"])
def contract(request):
    return TNT(**SMALL, global_pool=request.param, se=True, tnt_blocks=[1, 3])


def test_every_parameter_gets_a_gradient(contract):
    out = contract.train()(images())
    out.mean().backward()
    assert out.shape == (2, 5) and not out.isnan().any()
    missing = [n for n, p in contract.named_parameters() if p.grad is None]
    assert not missing


def test_classifier_contract(contract):
    batch = images(1)
    assert contract.get_classifier() is contract.head
    cfg = contract.default_cfg
    assert all(f"{cfg[key]}.weight" in contract.state_dict() for key in ("classifier", "first_conv"))
    assert timm.data.resolve_model_data_config(contract)["crop_pct"] == 0.9
    features = contract.forward_features(batch)
    assert features.shape == (1, 17, contract.num_features)
    assert contract.forward_head(features, pre_logits=True).shape == (1, contract.head_hidden_size)
    contract.reset_classifier(0)
    assert contract(batch).shape == (1, contract.num_features)
    contract.reset_classifier(0, "")
    assert contract(batch).shape == (1, 17, contract.num_features)
    contract.reset_classifier(7, "avg")
    assert contract(batch).shape == (1, 7) and contract.num_classes == 7


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_forward_intermediates(contract, output_fmt):
    contract.eval()
    batch = images()
    info = FeatureInfo(contract.feature_info, out_indices=(0, 1, 2))
    final, features = contract.forward_intermediates(batch, output_fmt=output_fmt)
    assert torch.equal(final, contract.forward_features(batch))
    assert len(features) == len(info.channels()) == 3
    for feature, chans, reduction in zip(features, info.channels(), info.reduction(), strict=True):
        side = 16 // reduction
        assert feature.shape == ((2, chans, side, side) if output_fmt == "NCHW" else (2, side * side, chans))
    contract.set_grad_checkpointing()
    checkpointed, _ = contract.forward_intermediates(batch)
    torch.testing.assert_close(final, checkpointed)
    early = contract.forward_intermediates(batch, indices=[0, 1], stop_early=True, intermediates_only=True, output_fmt=output_fmt)
    assert all(torch.equal(a, b) for a, b in zip(early, features, strict=False)) and len(early) == 2
    last, prefix = contract.forward_intermediates(
        batch, indices=1, norm=True, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )[0]
    assert torch.equal(torch.cat([prefix, last], 1), final)


def test_feature_extraction_by_timm(contract):
    extractor = FeatureGetterNet(contract, out_indices=[0, 2])
    assert [tuple(f.shape) for f in extractor(images())] == [(2, 24, 4, 4)] * 2
    assert len(extractor.model.blocks) == 3


def test_prune_intermediate_layers(contract):
    contract.prune_intermediate_layers([0, 1], prune_norm=True)
    assert len(contract.blocks) == 2 and contract(images()).shape == (2, 17, 24)


def test_gradient_checkpointing_changes_no_gradient(contract):
    batch, gradients = images(), []
    for enable in (False, True):
        contract.set_grad_checkpointing(enable)
        contract.zero_grad()
        contract.train()(batch).square().sum().backward()
        gradients.append([p.grad.clone() for p in contract.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_groups_cover_every_parameter_in_order(contract):
    groups = group_parameters(contract, contract.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in contract.named_parameters()}
    assert groups["cls_token"] == groups["fold.proj.weight"] == groups["word_embed.proj.weight"] == 0
    assert groups["blocks.0.fold.proj.weight"] < groups["blocks.1.outer.attn.qk.weight"] < groups["norm.weight"] < groups["head.weight"] + 1


def test_no_weight_decay_on_positions_class_token_biases_and_norms(contract):
    names = {id(p): n for n, p in contract.named_parameters()}
    free, decayed = param_groups_weight_decay(contract, 0.05, no_weight_decay_list=contract.no_weight_decay())
    assert free["weight_decay"] == 0 and {"cls_token", "sentence_position", "word_position"} < {names[id(p)] for p in free["params"]}
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])


def test_torch_compile_has_no_graph_break(contract):
    contract.eval()
    compiled = torch.compile(contract, backend="eager", fullgraph=True)
    batch = images()
    torch.testing.assert_close(compiled(batch), contract(batch))


def test_fx_traces_forward_and_backward(contract):
    traced = torch.fx.symbolic_trace(contract)
    batch = images()
    torch.testing.assert_close(traced.eval()(batch), contract.eval()(batch))
    traced.train()(batch).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript(contract):
    contract.eval()
    batch = images()
    torch.testing.assert_close(torch.jit.script(contract)(batch), contract(batch))


def test_half_precision_keeps_every_tensor_in_its_type(contract):
    assert contract.to(torch.bfloat16)(images().bfloat16()).dtype == torch.bfloat16


# ---- knobs that do not fit


@pytest.mark.parametrize(
    "knobs, message",
    [
        (dict(image_size=18), "image_size=18: 18 is not a multiple of patch_size=4; try 16 or 20"),
        (dict(image_size=(3, 16)), r"image_size=\(3, 16\): 3 is not a multiple of patch_size=4; try 4"),
        (dict(image_size="big"), "image_size='big' is neither"),
        (dict(image_size=16.0), "image_size=16.0 is neither"),
        (dict(words_per_patch=9), r"words_per_patch=9 .* patch_size=4 .*\[1, 4, 16\]"),
        (
            dict(words_per_patch=16),
            r"words_per_patch=16 does not divide outer_dim=24.* set inner_dim, or try words_per_patch from \[1, 4\]",
        ),
        (dict(inner_heads=4), r"inner_heads=4 does not divide inner_dim=6; try one of \[1, 2, 3, 6\]"),
        (dict(outer_heads=5), r"outer_heads=5 does not divide outer_dim=24; try one of \[1, 2, 3, 4, 6, 8, 12, 24\]"),
        (dict(inner_heads=0), "inner_heads=0 is not a whole number of at least 1"),
        (dict(depth=2.5), "depth=2.5 is not a whole number"),
        (dict(tnt_blocks=[0, 1]), r"tnt_blocks=\[0, 1\] .* from 1 to depth=3; try \[1, 3\]"),
        (dict(tnt_blocks=[1, 1]), "distinct"),
        (dict(tnt_blocks=2), "tnt_blocks=2"),
        (dict(position_encoding="patch"), "position_encoding='patch' is not one of 'none', 'sentence', 'word', 'both'"),
        (dict(global_pool="max"), "global_pool='max'"),
        (dict(drop_path_rate=1.0), "drop_path_rate=1.0 is not a rate"),
        (dict(mlp_ratio=0), "mlp_ratio=0"),
        (dict(se="yes"), "se='yes'"),
    ],
)
def test_impossible_combinations_name_the_knob_the_value_and_the_cure(knobs, message):
    with pytest.raises(ValueError, match=message):
        TNT(**{**SMALL, **knobs})
