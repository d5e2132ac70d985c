"""The inner block, the transformer among the words of a patch, in one operation: where that can be (`fuses`), and the operation (`fused`).

Layer by layer it is some fifteen operations on a few channels, each of which reads and writes all words, and that traffic is what TNT's
time goes to on a GPU; fused it reads and writes the words once. Shapes: words (patches, m, c); all patches of a batch are one dimension.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_lightning.errors import UserError

KERNELS = ("auto", "eager", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, slowly, to be looked into

_logger = logging.getLogger(__name__)


class Parameters(NamedTuple):
    """Of a block, as nn.LayerNorm and nn.Linear hold them; qk_w (2c, c) has the queries' rows first."""

    norm1_w: Tensor
    norm1_b: Tensor
    qk_w: Tensor
    v_w: Tensor
    proj_w: Tensor
    proj_b: Tensor
    norm2_w: Tensor
    norm2_b: Tensor
    fc1_w: Tensor
    fc1_b: Tensor
    fc2_w: Tensor
    fc2_b: Tensor


# ---- the choice


def fuses(words: Tensor, *, num_heads: int, hidden: int, weights: torch.dtype, kernel: str, otherwise: Callable[[], str] = str) -> bool:
    """Whether `fused` computes this block: by kernel="auto" where it can, by "triton" always, or a UserError says why it cannot. Not asked
    of "eager".

    hidden: units of the MLP's hidden layer; weights: the dtype of the parameters; otherwise: what else the caller has against it, or ""
    Where a GPU is left unused by auto, the log says why, once; without a GPU there is nothing to say.
    """
    asked, kind = kernel == "triton", words.device.type
    if kind == "cuda" or (asked and INTERPRETED and kind == "cpu"):
        why = otherwise() or _why_not(words, num_heads, hidden, weights)
    elif asked:
        why = f"the words are on the device {kind}, and the fused kernels are for NVIDIA's GPUs"
    else:
        return False
    if why:
        _refuse(why) if asked else _say(why)
    return not why


def is_recorded(words: Tensor) -> bool:
    """Whether operations are only exported, traced or counted (meta tensors): then they are those of the layers."""
    return isinstance(words, torch.fx.Proxy) or words.is_meta or torch.compiler.is_exporting() or torch.jit.is_tracing()


def refusal(why: str) -> UserError:
    return UserError(f"kernel=triton: {why}; kernel=auto computes such a model layer by layer")


def misfit(*, num_words: int, dim: int, num_heads: int, hidden: int) -> str:
    """Why the fused kernels do not take blocks of this shape, on whatever device; empty where they do."""
    if num_words not in (1, 2, 4, 8, 16, 32, 64):
        return f"{num_words} words in a patch, and the fused kernels take powers of two up to 64"
    if dim > (96 if num_words <= 16 else 64):
        return f"words of {dim} channels, {num_words} in a patch, are too wide for the fused kernels"
    if num_heads > 8 or dim % num_heads:
        return f"{num_heads} inner heads, and the fused kernels take up to 8"
    if hidden > 4 * dim:
        return f"{hidden} hidden units in the MLP, and the fused kernels take up to four for each of the {dim} channels"
    return ""


def _why_not(words: Tensor, num_heads: int, hidden: int, weights: torch.dtype) -> str:
    num_words, dim, dtype = words.shape[1], words.shape[2], _products(words)
    if why := misfit(num_words=num_words, dim=dim, num_heads=num_heads, hidden=hidden):
        return why
    for given in (words.dtype, dtype, weights):
        if given not in (torch.float32, torch.bfloat16, torch.float16):
            return f"numbers of the type {given}, and the fused kernels take float32, bfloat16 and float16"
    if words.device.type == "cpu":  # interpreted
        return ""
    if dtype == torch.float32 and not _tf32():
        return "float32 without TF32 is slow in the fused kernels; torch.set_float32_matmul_precision('high') allows TF32"
    return _unable(words.device.index, num_words, dim, hidden, num_heads, dtype, words.dtype, weights, torch.is_grad_enabled())


def _products(words: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's, where it is on."""
    device = words.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else words.dtype


# What torch.compile need not look into: the answer stands for as long as the code that was compiled with it. (It asks anew when
# TF32 is allowed or forbidden.)


@torch.compiler.assume_constant_result
def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32  # torch before 2.9


@torch.compiler.assume_constant_result
def _say(why: str) -> bool:
    return _say_once(why)


@functools.cache
def _say_once(why: str) -> bool:
    _logger.info("kernel=auto: the inner transformers are computed layer by layer: %s", why)
    return True


@torch.compiler.assume_constant_result
def _refuse(why: str) -> bool:
    raise refusal(why)


@torch.compiler.assume_constant_result
def _unable(
    index: int, num_words: int, dim: int, hidden: int, num_heads: int, dtype: torch.dtype, words: torch.dtype, weights: torch.dtype,
    training: bool,
) -> str:  # fmt: skip
    return _unable_once(index, num_words, dim, hidden, num_heads, dtype, words, weights, training)


@functools.cache
def _unable_once(
    index: int, num_words: int, dim: int, hidden: int, num_heads: int, dtype: torch.dtype, words: torch.dtype, weights: torch.dtype,
    training: bool,
) -> str:  # fmt: skip
    """Why a GPU cannot run the kernels, as far as that is the GPU's and Triton's doing; empty where it can. Compiles them."""
    gpu = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None or gpu.major < 8:
        return f"{gpu.name} is no NVIDIA GPU of Ampere's generation or a later one"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        from tnt_lightning.kernels import inner_triton

        shape = inner_triton.Shape(num_words, dim, hidden, num_heads, 1e-5, dtype)
        kernels = inner_triton.KERNELS if training else (inner_triton.inner_forward,)
        with torch.cuda.device(index):
            parts = [part for kernel in kernels for part in inner_triton.compiled(kernel, shape, words, weights)]
        needed = max(part.metadata.shared for part in parts)
    except Exception as error:  # Triton's, for which a model that trains eagerly is no reason to fail
        return (
            f"Triton does not compile the fused kernels here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
    if needed > (there := gpu.shared_memory_per_block_optin):
        return f"the fused kernels need {needed:,} bytes of shared memory, and {gpu.name} has {there:,}"
    return ""


# ---- the fused block


def fused(
    words: Tensor,
    parameters: Parameters,
    *,
    num_heads: int,
    eps: float,
    attn_scale: Tensor | None = None,
    mlp_scale: Tensor | None = None,
) -> Tensor:
    """A pre-norm transformer block over words (patches, m, c) -> (patches, m, c), each patch by itself (paper, Eq. 6 and 7).

    Differentiable in words and parameters, where `fuses` says that it can be computed. Products are in autocast's type, sums in float32.
    attn_scale, mlp_scale: (patches,) in float32, what the two residual branches are multiplied by (stochastic depth); both or neither
    """
    needs_grad = torch.is_grad_enabled() and (words.requires_grad or any(p.requires_grad for p in parameters))
    parameters_ = [parameter.contiguous() for parameter in parameters]
    return _inner_block(words.contiguous(), parameters_, attn_scale, mlp_scale, num_heads, eps, _products(words), needs_grad)[0]


@torch.library.custom_op("tnt_lightning::inner_block", mutates_args=())
def _inner_block(
    words: Tensor, parameters: list[Tensor], attn_scale: Tensor | None, mlp_scale: Tensor | None,
    num_heads: int, eps: float, dtype: torch.dtype, store_middle: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, the words between the two halves); the second is for the backward pass, and empty without store_middle."""
    from tnt_lightning.kernels import inner_triton

    shape = inner_triton.Shape(words.shape[1], words.shape[2], parameters[8].shape[0], num_heads, eps, dtype)
    return inner_triton.forward(shape, words, parameters, attn_scale, mlp_scale, store_middle=store_middle)


@_inner_block.register_fake
def _(words, parameters, attn_scale, mlp_scale, num_heads, eps, dtype, store_middle):
    return torch.empty_like(words), torch.empty_like(words) if store_middle else words.new_empty(0)


@torch.library.custom_op("tnt_lightning::inner_block_backward", mutates_args=())
def _inner_block_backward(
    grad_out: Tensor, words: Tensor, middle: Tensor, parameters: list[Tensor], attn_scale: Tensor | None, mlp_scale: Tensor | None,
    num_heads: int, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of the words, those of all parameters in float32, one after the other)."""
    from tnt_lightning.kernels import inner_triton

    shape = inner_triton.Shape(words.shape[1], words.shape[2], parameters[8].shape[0], num_heads, eps, dtype)
    return inner_triton.backward(shape, grad_out.contiguous(), words, middle, parameters, attn_scale, mlp_scale)


@_inner_block_backward.register_fake
def _(grad_out, words, middle, parameters, attn_scale, mlp_scale, num_heads, eps, dtype):
    return torch.empty_like(words), words.new_empty((sum(p.numel() for p in parameters),), dtype=torch.float32)


# How the kernels lay the gradients out: those of the attention's half, then those of the MLP's.
_GRADIENTS = ("qk_w", "v_w", "proj_w", "proj_b", "norm1_w", "norm1_b", "fc1_w", "fc1_b", "fc2_w", "fc2_b", "norm2_w", "norm2_b")


def _setup_context(ctx, inputs, output):
    words, parameters, attn_scale, mlp_scale, ctx.num_heads, ctx.eps, ctx.dtype, _ = inputs
    ctx.save_for_backward(words, output[1], attn_scale, mlp_scale, *parameters)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    words, middle, attn_scale, mlp_scale, *parameters = ctx.saved_tensors
    grad_words, flat = _inner_block_backward(grad_out, words, middle, parameters, attn_scale, mlp_scale, ctx.num_heads, ctx.eps, ctx.dtype)
    like = Parameters(*parameters)._asdict()
    pieces = flat.split([like[name].numel() for name in _GRADIENTS])
    gradients = {name: piece.view_as(like[name]) for name, piece in zip(_GRADIENTS, pieces, strict=True)}  # torch casts, where it has to
    return grad_words, [gradients[name] for name in Parameters._fields], None, None, None, None, None, None


_inner_block.register_autograd(_backward, setup_context=_setup_context)
