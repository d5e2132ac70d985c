"""The fused inner block: equal to the reference in float64, and in the network equal to its layers, whatever torch does with them."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.conftest import train
from tnt_lightning import create_model, load_run, load_weights, runs
from tnt_lightning.kernels import inner

from .conftest import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = {  # words, channels, heads
    "tnt_ti": (16, 12, 2), "tnt_s": (16, 24, 4), "tnt_b": (16, 40, 4), "heads_1": (16, 24, 1), "heads_3": (16, 24, 3),
    "heads_8": (16, 24, 8), "words_64": (64, 6, 2), "words_4": (4, 96, 4), "digits": (4, 24, 2), "words_1": (1, 48, 2),
}  # fmt: skip
EXACT = 1e-5 if INTERPRETED else 5e-3  # of float32: the interpreter has no TF32, of which a GPU's products are

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def drawn(shape, patches, seed, dtype=torch.float64):
    """Words, parameters, the gradient that comes back, and the two scales of stochastic depth, in float64 and exact in `dtype`."""
    (m, c, heads), generator = SHAPES[shape], torch.Generator().manual_seed(seed)

    def normal(*size, std=1.0, mean=0.0):
        return (mean + std * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype).double()

    def norm():
        return normal(c, std=0.2, mean=1.0), normal(c, std=0.1)

    linear = [normal(2 * c, c, std=1.5 * c**-0.5), normal(c, c, std=c**-0.5), normal(c, c, std=c**-0.5), normal(c, std=0.1)]
    mlp = [normal(4 * c, c, std=c**-0.5), normal(4 * c, std=0.1), normal(c, 4 * c, std=0.5 * c**-0.5), normal(c, std=0.1)]
    parameters = inner.Parameters(*norm(), *linear, *norm(), *mlp)
    kept = [(torch.rand(patches, generator=generator) < 0.7).float() / 0.7 for _ in range(2)]
    return normal(patches, m, c), parameters, normal(patches, m, c), kept, heads


def gradients(block, given, dtype, device, parameters_dtype=None, **kernel):
    """What a block gives for the words and, from the gradient of that, for the words and each parameter."""
    words, parameters, grad, scales, heads = given
    words = words.to(device, dtype, copy=True).requires_grad_()
    parameters = inner.Parameters(*(p.to(device, parameters_dtype or dtype, copy=True).requires_grad_() for p in parameters))
    attn_scale, mlp_scale = (None, None) if scales is None else (scale.to(device) for scale in scales)
    out = block(words, parameters, num_heads=heads, attn_scale=attn_scale, mlp_scale=mlp_scale, **kernel)
    out.backward(grad.to(device, out.dtype))
    return {"out": out.detach(), "words": words.grad, **{name: p.grad for name, p in parameters._asdict().items()}}


def off(found, wanted):
    """The largest error of each, as a share of the largest value."""
    return {
        name: ((found[name].double().cpu() - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("patches, seed, scaled", [(5, 0, True), (7, 1, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_out_and_every_gradient_in_float32(shape, patches, seed, scaled):
    *given, scales, heads = drawn(shape, patches, seed)
    given = (*given, scales if scaled else None, heads)
    wanted = gradients(inner.reference, given, torch.float64, "cpu")
    errors = off(gradients(inner.inner_block, given, torch.float32, DEVICE, kernel="triton"), wanted)
    assert max(errors.values()) < EXACT, errors


@pytest.mark.slow
@pytest.mark.parametrize("patches", [1, 3, 33])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_grid(shape, dtype, seed, patches):
    given = drawn(shape, patches, seed, dtype)
    wanted = gradients(inner.reference, given, torch.float64, "cpu")
    errors = off(gradients(inner.inner_block, given, dtype, DEVICE, kernel="triton"), wanted)
    assert max(errors.values()) < {torch.float32: EXACT, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype], errors


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["tnt_s", "tnt_b", "words_64", "digits"])
def test_half_precision_is_no_further_off_than_the_layers_are(shape, dtype, mixed):
    given = drawn(shape, 5, 2, dtype)
    wanted = gradients(inner.reference, given, torch.float64, "cpu")
    own = torch.float32 if mixed else dtype
    with torch.autocast(DEVICE, dtype, enabled=mixed):
        fused = gradients(inner.inner_block, given, own, DEVICE, kernel="triton")
        layers = gradients(inner.reference, given, own, DEVICE)
    assert fused["out"].dtype == own and fused["fc1_w"].dtype == own
    found, beside = off(fused, wanted), off(layers, wanted)
    assert max(found.values()) < 1.2 * max(beside.values()), (found, beside)


def test_parameters_may_be_of_another_type_than_the_words():
    given = drawn("tnt_s", 3, 3, torch.bfloat16)
    wanted = gradients(inner.reference, given, torch.float64, "cpu")
    found = gradients(inner.inner_block, given, torch.float32, DEVICE, torch.bfloat16, kernel="triton")
    assert found["out"].dtype == torch.float32 and found["qk_w"].dtype == torch.bfloat16
    assert max(off(found, wanted).values()) < 2e-2


def test_twice_the_same_is_the_same_to_the_bit():
    given = drawn("tnt_s", 9, 4)
    first, again = (gradients(inner.inner_block, given, torch.float32, DEVICE, kernel="triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_words_that_do_not_lie_in_order_and_none_at_all():
    words, parameters, *_, heads = drawn("tnt_s", 3, 5)
    words, parameters = words.float().to(DEVICE), inner.Parameters(*(p.float().to(DEVICE) for p in parameters))
    turned = words.transpose(1, 2).contiguous().transpose(1, 2)
    straight = inner.inner_block(words, parameters, num_heads=heads, kernel="triton")
    assert torch.equal(inner.inner_block(turned, parameters, num_heads=heads, kernel="triton"), straight)
    assert inner.inner_block(words[:0], parameters, num_heads=heads, kernel="triton").shape == (0, 16, 24)


def test_the_operator_keeps_torchs_rules():
    words, parameters, _, scales, heads = drawn("digits", 3, 6)
    words = words.float().to(DEVICE).requires_grad_()
    parameters = [p.float().to(DEVICE).requires_grad_() for p in parameters]
    scales = [scale.to(DEVICE) for scale in scales]
    torch.library.opcheck(
        inner._inner_block,
        (words, parameters, *scales, heads, 1e-5, torch.float32, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


# ---- in the network

SMALL = dict(image_size=32, depth=2, outer_dim=96, inner_dim=24, outer_heads=3, num_classes=5)  # 4 patches an image


def pair(**knobs):
    """A network and its twin by the fused kernels."""
    torch.manual_seed(0)
    layers = create_model("tnt_s", **SMALL, **knobs, kernel="eager").to(DEVICE)
    fused = create_model("tnt_s", **SMALL, **knobs, kernel="triton").to(DEVICE)
    with torch.no_grad():
        for parameter in layers.parameters():  # biases start at zero, which would hide a mistake
            parameter.add_(0.05 * torch.randn_like(parameter))
    fused.load_state_dict(layers.state_dict())
    return layers, fused, torch.randn(3, 3, 32, 32, device=DEVICE)


def learned(model, images):
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(images)
    logits.square().mean().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_close(found, wanted, tolerance=None):
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= (tolerance or 2 * EXACT) * max(1e-2, b.abs().max())


@pytest.mark.parametrize("name, twin", [("tnt_s", "tnt_s_patch16_224"), ("tnt_b", "tnt_b_patch16_224")])
def test_logits_and_gradients_equal_timms(tmp_path, name, twin):
    torch.manual_seed(0)
    theirs = timm.create_model(twin, img_size=32, depth=1).eval().to(DEVICE)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = create_model(name, image_size=32, depth=1, kernel="triton").eval().to(DEVICE)
    load_weights(ours, tmp_path / "timm.pth", exact=True)
    images = torch.randn(2, 3, 32, 32, device=DEVICE)
    logits = {model: model(images) for model in (theirs, ours)}
    for found in logits.values():
        F.cross_entropy(found, torch.tensor([3, 7], device=DEVICE)).backward()
    torch.testing.assert_close(logits[ours], logits[theirs], rtol=EXACT, atol=EXACT)
    torch.save({n: p.grad for n, p in theirs.named_parameters()}, tmp_path / "gradients.pth")
    wanted = create_model(name, image_size=32, depth=1)  # its parameters become timm's gradients, by our names
    load_weights(wanted, tmp_path / "gradients.pth")
    found = [parameter.grad.cpu() for parameter in ours.parameters()]
    assert_close(found, [parameter.detach() for parameter in wanted.parameters()])


@pytest.mark.parametrize("training", [False, True])
def test_the_network_equals_its_layers_stochastic_depth_included(training):
    layers, fused, images = pair(drop_path_rate=0.5)
    layers.train(training)
    fused.train(training)
    wanted = learned(layers, images)
    assert_close(learned(fused, images), wanted)
    if training:
        torch.manual_seed(2)
        assert (fused(images) - wanted[0]).abs().max() > 0.01, "another seed drops other branches"


def test_it_is_the_fused_operator_that_runs():
    _, fused, images = pair()
    with torch.profiler.profile() as seen:
        fused(images).sum().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["tnt_lightning::inner_block"] == counts["tnt_lightning::inner_block_backward"] == SMALL["depth"]


def test_maps_hooks_and_exports_are_of_the_layers():
    layers, fused, images = pair()
    layers.eval()
    fused.eval()
    logits, seen = fused.explain(images)
    wanted = layers.explain(images)
    assert torch.equal(logits, wanted[0]) and all(torch.equal(seen.inner[n], wanted[1].inner[n]) for n in (1, 2))
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(fused, images)
    for program in (torch.export.export(fused, (images,)).module(), torch.fx.symbolic_trace(fused), traced):
        assert "inner_block" not in str(program.graph)
        torch.testing.assert_close(program(images), layers(images))
    widths = []
    auto = create_model("tnt_s", **SMALL).to(DEVICE).eval()
    auto.blocks[0].inner.attn.register_forward_hook(lambda module, given, out: widths.append(out.shape[-1]))
    auto(images)
    assert widths == [24]


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
def test_torch_compile_has_no_graph_break(mixed):
    _, fused, images = pair(drop_path_rate=0.5)
    fused.eval()
    compiled = torch.compile(fused, backend="inductor" if DEVICE == "cuda" else "aot_eager", fullgraph=True)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
        assert_close(learned(compiled, images), learned(fused, images), 3e-2 if mixed else None)
        fused.train()
        assert learned(compiled, images)[0].isfinite().all()


def test_gradient_checkpointing_changes_no_gradient():
    _, fused, images = pair(drop_path_rate=0.5)
    wanted = learned(fused.train(), images)
    fused.set_grad_checkpointing()
    assert_close(learned(fused, images), wanted)


def test_an_average_and_a_copy_have_the_kernel_too():
    _, fused, images = pair()
    fused.eval()
    average = AveragedModel(fused, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(fused)
    with torch.no_grad():
        for other in (average, copy.deepcopy(fused)):
            assert torch.equal(other(images), fused(images))


def test_ddp_takes_its_gradients(tmp_path):
    layers, fused, images = pair()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(fused)
        assert_close(learned(parallel, images), learned(layers, images))
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_by_the_kernels_goes_on_and_is_loaded_without_them(tmp_path):
    few = ("+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1", "data.batch_size=8")
    result = train(tmp_path / "run", "kernel=triton", "model.depth=1", "trainer.precision=32-true", *few)
    assert result["steps"] == 2
    config = runs.config_of(tmp_path / "run")
    assert config["kernel"] == config["model"]["kernel"] == "triton"
    assert train(tmp_path / "run", "kernel=eager", "model.depth=1", "trainer.precision=32-true", *few) == result
    backbone = load_run(tmp_path / "run")
    assert {block.inner.kernel for block in backbone.blocks} == {"auto"}
    assert backbone(torch.randn(2, 1, 8, 8)).shape == (2, 10)
