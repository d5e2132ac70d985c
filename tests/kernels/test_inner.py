"""The fused inner block: equal to torch's operations in float64, and in the network to its layers, whatever torch does with them."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.conftest import train
from tnt_lightning import create_model, load_run, load_weights, runs
from tnt_lightning.errors import UserError
from tnt_lightning.kernels import inner
from tnt_lightning.kernels.inner_triton import LAUNCHES, Shape

from .conftest import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = {  # words, channels, heads, hidden units
    "tnt_ti": (16, 12, 2, 48), "tnt_s": (16, 24, 4, 96), "tnt_b": (16, 40, 4, 160), "heads_1": (16, 24, 1, 96), "heads_8": (16, 24, 8, 96),
    "words_64": (64, 6, 2, 24), "words_4": (4, 96, 4, 384), "words_1": (1, 48, 2, 192), "digits": (4, 24, 2, 96), "uneven": (16, 20, 5, 50),
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
    (m, c, heads, hidden), generator = SHAPES[shape], torch.Generator().manual_seed(seed)

    def normal(*size, std=1.0, mean=0.0):
        return (mean + std * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype).double()

    def norm():
        return normal(c, std=0.2, mean=1.0), normal(c, std=0.1)

    linear = [normal(2 * c, c, std=1.5 * c**-0.5), normal(c, c, std=c**-0.5), normal(c, c, std=c**-0.5), normal(c, std=0.1)]
    mlp = [normal(hidden, c, std=c**-0.5), normal(hidden, std=0.1), normal(c, hidden, std=hidden**-0.5), normal(c, std=0.1)]
    parameters = inner.Parameters(*norm(), *linear, *norm(), *mlp)
    kept = [(torch.rand(patches, generator=generator) < 0.7).float() / 0.7 for _ in range(2)]
    return normal(patches, m, c), parameters, normal(patches, m, c), kept, heads


def layers(words, parameters, *, num_heads, eps=1e-5, attn_scale=None, mlp_scale=None):
    """The block by torch's operations."""
    p, (n, m, c) = parameters, words.shape

    def scaled(branch, scale):
        return branch if scale is None else branch * scale[:, None, None].to(branch.dtype)

    a = F.layer_norm(words, (c,), p.norm1_w, p.norm1_b, eps)
    q, k = F.linear(a, p.qk_w).reshape(n, m, 2, num_heads, c // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    v = F.linear(a, p.v_w).reshape(n, m, num_heads, c // num_heads).transpose(1, 2)
    attn = ((q @ k.transpose(-2, -1)) * (c // num_heads) ** -0.5).softmax(dim=-1)
    attended = F.linear((attn @ v).transpose(1, 2).reshape(n, m, c), p.proj_w, p.proj_b)
    words = words + scaled(attended, attn_scale)
    a = F.layer_norm(words, (c,), p.norm2_w, p.norm2_b, eps)
    return words + scaled(F.linear(F.gelu(F.linear(a, p.fc1_w, p.fc1_b)), p.fc2_w, p.fc2_b), mlp_scale)


def fused(words, parameters, *, num_heads, eps=1e-5, attn_scale=None, mlp_scale=None):
    """The block as the network asks for it."""
    fc1 = parameters.fc1_w
    assert inner.fuses(words, num_heads=num_heads, hidden=fc1.shape[0], weights=fc1.dtype, kernel="triton")
    return inner.fused(words, parameters, num_heads=num_heads, eps=eps, attn_scale=attn_scale, mlp_scale=mlp_scale)


def gradients(block, given, dtype, device, parameters_dtype=None, **eps):
    """What a block gives for the words and, from the gradient of that, for the words and each parameter."""
    words, parameters, grad, scales, heads = given
    words = words.to(device, dtype, copy=True).requires_grad_()
    parameters = inner.Parameters(*(p.to(device, parameters_dtype or dtype, copy=True).requires_grad_() for p in parameters))
    attn_scale, mlp_scale = (None, None) if scales is None else (scale.to(device) for scale in scales)
    out = block(words, parameters, num_heads=heads, attn_scale=attn_scale, mlp_scale=mlp_scale, **eps)
    out.backward(grad.to(device, out.dtype))
    return {"out": out.detach(), "words": words.grad, **{name: p.grad for name, p in parameters._asdict().items()}}


def off(found, wanted):
    """The largest error of each, as a share of the largest value; infinite for what is no number, which max() might pass over."""
    return {
        name: ((found[name].double().cpu() - value).abs().max() / value.abs().max().clamp(min=1e-3)).nan_to_num(torch.inf).item()
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("patches, seed, scaled, eps", [(5, 0, True, 1e-5), (7, 1, False, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_out_and_every_gradient_in_float32(shape, patches, seed, scaled, eps):
    *given, scales, heads = drawn(shape, patches, seed)
    given = (*given, scales if scaled else None, heads)
    wanted = gradients(layers, given, torch.float64, "cpu", eps=eps)
    errors = off(gradients(fused, given, torch.float32, DEVICE, eps=eps), wanted)
    assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize(
    "shape, dtype, tiles",
    [(shape, dtype, ("part", "two", "all")[(i + j) % 3]) for i, shape in enumerate(SHAPES) for j, dtype in enumerate(DTYPES)],
)
def test_every_pair_of_shape_type_and_size(shape, dtype, tiles):
    """One patch; a tile and a bit; so many that in the interpreter each program sums over several."""
    m, c, heads, hidden = SHAPES[shape]
    launch = LAUNCHES["inner_forward"][Shape(m, c, hidden, heads, 1e-5, dtype).padded]
    words = {"part": 1, "two": launch.tile + 1, "all": launch.tile * launch.programs_per_sm + 1}[tiles]
    given = drawn(shape, -(-words // m), words, dtype)
    wanted = gradients(layers, given, torch.float64, "cpu")
    errors = off(gradients(fused, given, dtype, DEVICE), wanted)
    assert max(errors.values()) < {torch.float32: EXACT, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype], errors


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["tnt_s", "tnt_b", "words_64", "digits"])
def test_half_precision_is_no_further_off_than_the_layers_are(shape, dtype, mixed):
    given = drawn(shape, 5, 2, dtype)
    wanted = gradients(layers, given, torch.float64, "cpu")
    own = torch.float32 if mixed else dtype
    with torch.autocast(DEVICE, dtype, enabled=mixed):
        computed, twin = (gradients(block, given, own, DEVICE) for block in (fused, layers))
    assert computed["out"].dtype == own and computed["fc1_w"].dtype == own
    found, beside = off(computed, wanted), off(twin, wanted)
    assert max(found.values()) < 1.2 * max(beside.values()), (found, beside)
    assert found["out"] > 0.1 * beside["out"], "the products are in that type"


def test_parameters_may_be_of_another_type_than_the_words():
    given = drawn("tnt_s", 3, 3, torch.bfloat16)
    wanted = gradients(layers, given, torch.float64, "cpu")
    found = gradients(fused, given, torch.float32, DEVICE, torch.bfloat16)
    assert found["out"].dtype == torch.float32 and found["qk_w"].dtype == torch.bfloat16
    assert max(off(found, wanted).values()) < 2e-2


def test_twice_the_same_is_the_same_to_the_bit():
    given = drawn("tnt_s", 9, 4)
    first, again = (gradients(fused, given, torch.float32, DEVICE) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_scores_of_hundreds_overflow_nowhere():
    words, parameters, *rest = drawn("tnt_s", 3, 5)
    given = (words, parameters._replace(qk_w=12 * parameters.qk_w), *rest)
    wanted = gradients(layers, given, torch.float64, "cpu")
    errors = off(gradients(fused, given, torch.float32, DEVICE), wanted)
    assert max(errors.values()) < 100 * EXACT, errors


@pytest.mark.parametrize("shape", ["uneven", "digits", "words_4"])
def test_nothing_is_read_or_written_beyond_what_is_given(shape, monkeypatch):
    edges = []

    def amid(tensor):
        """As `tensor`, in the midst of a larger one that is NaN."""
        whole = torch.full((tensor.numel() + 8192,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        whole[4096:-4096] = tensor.detach().flatten()
        edges.extend([whole[:4096], whole[-4096:]])
        return whole[4096:-4096].view(tensor.shape)

    words, parameters, grad, scales, heads = drawn(shape, 5, 7)
    wanted = gradients(layers, (words, parameters, grad, scales, heads), torch.float64, "cpu")
    words, *given = (amid(tensor.float().to(DEVICE)).requires_grad_() for tensor in (words, *parameters))
    scales = {name: amid(scale.to(DEVICE)) for name, scale in zip(("attn_scale", "mlp_scale"), scales, strict=True)}
    grad = amid(grad.float().to(DEVICE))
    monkeypatch.setattr(torch, "empty_like", lambda like: amid(torch.full_like(like, float("nan"))))
    out = fused(words, inner.Parameters(*given), num_heads=heads, **scales)
    found = torch.autograd.grad(out, [words, *given], grad)
    errors = off(dict(zip(wanted, (out.detach(), *found), strict=True)), wanted)
    assert max(errors.values()) < EXACT, errors
    assert len(edges) == 2 * (16 + 4) and all(edge.isnan().all() for edge in edges), "what they give, and `middle`, lie so, too"


def test_what_does_not_lie_in_order_and_no_words_at_all():
    words, parameters, *_, heads = drawn("tnt_s", 3, 5)
    words, *parameters = (tensor.float().to(DEVICE).requires_grad_() for tensor in (words, *parameters))

    def found(turned):
        out = fused(turned(words), inner.Parameters(*(turned(p) for p in parameters)), num_heads=heads)
        return out, *torch.autograd.grad(out.sum(), [words, *parameters])  # of a sum: one number, for all of them

    def turned(tensor):
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    assert all(torch.equal(a, b) for a, b in zip(found(turned), found(lambda tensor: tensor), strict=True))
    assert fused(words[:0], inner.Parameters(*parameters), num_heads=heads).shape == (0, 16, 24)


@pytest.mark.parametrize("learning", ["words", "parameters"])
def test_what_is_frozen_takes_no_gradient_from_the_others(learning):
    words, parameters, grad, _, heads = drawn("tnt_s", 3, 8)
    wanted = gradients(layers, (words, parameters, grad, None, heads), torch.float64, "cpu")
    words = words.float().to(DEVICE).requires_grad_(learning == "words")
    parameters = inner.Parameters(*(p.float().to(DEVICE).requires_grad_(learning == "parameters") for p in parameters))
    fused(words, parameters, num_heads=heads).backward(grad.float().to(DEVICE))
    found = {"words": words.grad, **{name: p.grad for name, p in parameters._asdict().items()}}
    learned = {name for name, value in found.items() if value is not None}
    assert learned == ({"words"} if learning == "words" else set(inner.Parameters._fields))
    assert max(off(found, {name: wanted[name] for name in learned}).values()) < EXACT


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


def test_maps_and_exports_are_of_the_layers():
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


class Adapted(torch.nn.Linear):
    """Stands for what fine-tuning puts in the place of a layer."""


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda attn: attn.register_forward_hook(lambda *seen: None), "its layers have hooks"),
        (lambda attn: setattr(attn, "proj", Adapted(24, 24, device=DEVICE)), "its linear layers are others than torch's"),
    ],
    ids=["hook", "layer"],
)
def test_layers_that_were_changed_are_not_passed_over(change, why):
    _, fused, images = pair()
    change(fused.blocks[0].inner.attn)
    with pytest.raises(UserError, match=f"^kernel=triton: {why}"):
        fused(images)


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
