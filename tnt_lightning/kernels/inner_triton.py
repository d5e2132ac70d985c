"""The Triton kernels of the inner block, forward and backward, and their launches. Imported when they are first needed.

    middle = words  + attn_scale * (attention(norm1(words)) @ proj_w.T + proj_b)
    out    = middle + mlp_scale  * (gelu(norm2(middle) @ fc1_w.T + fc1_b) @ fc2_w.T + fc2_b)

A program owns TILE consecutive words, that is whole patches, so that attention never leaves the tile. Channels are padded to a power
of two (24 -> 32) by masks alone; weights are read as nn.Linear has them and cast inside. Attention is a batched product over GROUP words
(at least 16, the least that a tensor core takes); heads are told apart by a mask over channels, so that no width of a head (6, 10)
appears as a block's shape. The MLP runs over chunks of its hidden units.

The backward pass is two kernels, the MLP's half and the attention's. Each runs over tiles with its gradients of weights in registers, and
writes them as one row of a (programs, parameters) buffer in float32, which torch then sums: no atomics, the same bits each time. Beyond
`words` they need `middle`, which the forward pass stores.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_lightning.kernels.inner import INTERPRETED

# ---- parts


@triton.jit
def _load_linear(
    weight_ptr, first_in, first_out, dim_in: tl.constexpr, dim_out: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, dtype: tl.constexpr
):
    """The (IN, OUT) tile of an nn.Linear's weight, which lies as (dim_out, dim_in): x @ tile."""
    i = first_in + tl.arange(0, IN)[:, None]
    o = first_out + tl.arange(0, OUT)[None, :]
    return tl.load(weight_ptr + o * dim_in + i, mask=(i < dim_in) & (o < dim_out), other=0.0).to(dtype)


@triton.jit
def _load_vector(ptr, first, length: tl.constexpr, SIZE: tl.constexpr):
    i = first + tl.arange(0, SIZE)
    return tl.load(ptr + i, mask=i < length, other=0.0).to(tl.float32)


@triton.jit
def _load_scale(scale_ptr, rows, row_mask, num_words: tl.constexpr):
    """Stochastic depth: a factor for each patch (0, or 1 / the share that is kept), for each of its words."""
    return tl.load(scale_ptr + rows // num_words, mask=row_mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _normalize(x, dim: tl.constexpr, DIM: tl.constexpr, eps: tl.constexpr):
    """Each row with mean 0 and deviation 1, and 0 in the padding; 1 / deviation."""
    mean = tl.sum(x, axis=1) * (1.0 / dim)
    centered = tl.where((tl.arange(0, DIM) < dim)[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) * (1.0 / dim) + eps)
    return centered * rstd[:, None], rstd


@triton.jit
def _normalize_backward(grad, x_hat, rstd, dim: tl.constexpr):
    mean_grad = tl.sum(grad, axis=1) * (1.0 / dim)
    mean_proj = tl.sum(grad * x_hat, axis=1) * (1.0 / dim)
    return rstd[:, None] * (grad - mean_grad[:, None] - x_hat * mean_proj[:, None])


@triton.jit
def _add_column_sums(sums, x, TILE: tl.constexpr, dtype: tl.constexpr):
    """sums (16, N), whose rows are all alike, += x.sum(axis=0): on the tensor cores, without shuffles and with few registers."""
    return tl.dot(tl.full([16, TILE], 1.0, dtype=dtype), x.to(dtype), sums, input_precision="tf32")


@triton.jit
def _gaussian(x, by_tanh: tl.constexpr, interpreted: tl.constexpr):
    """(cdf, density) of the standard normal: GELU is x * cdf, its derivative cdf + x * density.

    Abramowitz & Stegun 7.1.26, off by less than 1e-7: some 14 instructions, where libdevice's erf takes 35. by_tanh: as in torch's
    F.gelu(approximate="tanh"), off by less than 5e-4, on the hardware's tanh (2^-11 of its value): a quarter of the forward pass's
    instructions less, and no more than products in bfloat16 are off anyway.
    """
    e = tl.exp2(x * x * -0.7213475204444817)
    density = 0.3989422804014327 * e  # not from the tanh, whose error would be multiplied by x^3
    if by_tanh:
        y = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        if interpreted:  # which knows no assembly
            t = 1.0 - 2.0 / (1.0 + tl.exp2(2.885390081777927 * y))
        else:
            t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
        cdf = 0.5 + 0.5 * t
    else:
        r = tl.rsqrt(1.0 + 0.2316418882 * tl.abs(x))  # squared it is a reciprocal, which takes more instructions
        t = r * r
        tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.1274147960) * t * e
        cdf = tl.where(x < 0.0, tail, 1.0 - tail)
    return cdf, density


@triton.jit
def _channels_of(head: tl.constexpr, head_dim: tl.constexpr, DIM: tl.constexpr):
    c = tl.arange(0, DIM)[None, None, :]
    return (c >= head * head_dim) & (c < (head + 1) * head_dim)


@triton.jit
def _attention(q, k_t, num_words: tl.constexpr, GROUP: tl.constexpr):
    """softmax(q @ k_t) within each patch, of q that carry the scale and log2(e)."""
    s = tl.dot(q, k_t, input_precision="tf32")
    if num_words < GROUP:  # several patches in a group
        t = tl.arange(0, GROUP) // num_words
        s = tl.where((t[:, None] == t[None, :])[None, :, :], s, -1.0e30)
    p = tl.exp2(s - tl.max(s, axis=2, keep_dims=True))
    return p * (1.0 / tl.sum(p, axis=2, keep_dims=True))


@triton.jit
def _store_linear_grad(ptr, grad_t, first_in, first_out, dim_in: tl.constexpr, dim_out: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr):
    i = first_in + tl.arange(0, IN)[:, None]
    o = first_out + tl.arange(0, OUT)[None, :]
    tl.store(ptr + o * dim_in + i, grad_t, mask=(i < dim_in) & (o < dim_out))


@triton.jit
def _store_column_sums(ptr, sums, first, length: tl.constexpr, SIZE: tl.constexpr):
    i = first + tl.arange(0, SIZE)[None, :]
    first_row = (tl.arange(0, 16) == 0)[:, None]
    tl.store(ptr + i + tl.zeros([16, 1], dtype=tl.int32), sums, mask=first_row & (i < length))


# ---- forward


@triton.jit
def inner_forward(
    words_ptr, out_ptr, middle_ptr, norm1_w_ptr, norm1_b_ptr, qk_w_ptr, v_w_ptr, proj_w_ptr, proj_b_ptr, norm2_w_ptr, norm2_b_ptr,
    fc1_w_ptr, fc1_b_ptr, fc2_w_ptr, fc2_b_ptr, attn_scale_ptr, mlp_scale_ptr, num_tokens,
    dim: tl.constexpr, hidden: tl.constexpr, num_heads: tl.constexpr, num_words: tl.constexpr, eps: tl.constexpr,
    has_scale: tl.constexpr, store_middle: tl.constexpr, dtype: tl.constexpr,
    DIM: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, by_tanh: tl.constexpr, interpreted: tl.constexpr,
):  # fmt: skip
    head_dim: tl.constexpr = dim // num_heads
    q_scale: tl.constexpr = 1.4426950408889634 / head_dim**0.5
    cols = tl.arange(0, DIM)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TILE), tl.num_programs(0)):
        rows = tile * TILE + tl.arange(0, TILE)
        row_mask = rows < num_tokens
        offsets = rows.to(tl.int64)[:, None] * dim + cols
        mask = row_mask[:, None] & (cols < dim)
        x = tl.load(words_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

        x_hat, _ = _normalize(x, dim, DIM, eps)
        a = (x_hat * _load_vector(norm1_w_ptr, 0, dim, DIM)[None, :] + _load_vector(norm1_b_ptr, 0, dim, DIM)[None, :]).to(dtype)
        q = tl.dot(a, _load_linear(qk_w_ptr, 0, 0, dim, dim, DIM, DIM, dtype), input_precision="tf32")
        k = tl.dot(a, _load_linear(qk_w_ptr + dim * dim, 0, 0, dim, dim, DIM, DIM, dtype), input_precision="tf32")
        v = tl.dot(a, _load_linear(v_w_ptr, 0, 0, dim, dim, DIM, DIM, dtype), input_precision="tf32")
        q = tl.reshape((q * q_scale).to(dtype), [TILE // GROUP, GROUP, DIM])
        k_t = tl.permute(tl.reshape(k.to(dtype), [TILE // GROUP, GROUP, DIM]), [0, 2, 1])
        v = tl.reshape(v.to(dtype), [TILE // GROUP, GROUP, DIM])
        o = tl.zeros([TILE // GROUP, GROUP, DIM], dtype=dtype)
        for head in tl.static_range(num_heads):
            channels = _channels_of(head, head_dim, DIM)
            p = _attention(tl.where(channels, q, 0.0), k_t, num_words, GROUP)
            o = tl.where(channels, tl.dot(p.to(dtype), v, input_precision="tf32").to(dtype), o)
        attended = tl.dot(
            tl.reshape(o, [TILE, DIM]), _load_linear(proj_w_ptr, 0, 0, dim, dim, DIM, DIM, dtype), input_precision="tf32"
        )  # fmt: skip
        attended += _load_vector(proj_b_ptr, 0, dim, DIM)[None, :]
        if has_scale:
            attended *= _load_scale(attn_scale_ptr, rows, row_mask, num_words)
        middle = x + attended
        if store_middle:
            tl.store(middle_ptr + offsets, middle.to(middle_ptr.dtype.element_ty), mask=mask)

        middle_hat, _ = _normalize(middle, dim, DIM, eps)
        a = (middle_hat * _load_vector(norm2_w_ptr, 0, dim, DIM)[None, :] + _load_vector(norm2_b_ptr, 0, dim, DIM)[None, :]).to(dtype)
        update = tl.zeros([TILE, DIM], dtype=tl.float32)
        for chunk in tl.static_range(0, hidden, CHUNK):
            w1 = _load_linear(fc1_w_ptr, 0, chunk, dim, hidden, DIM, CHUNK, dtype)
            w2 = _load_linear(fc2_w_ptr, chunk, 0, hidden, dim, CHUNK, DIM, dtype)
            u = tl.dot(a, w1, input_precision="tf32") + _load_vector(fc1_b_ptr, chunk, hidden, CHUNK)[None, :]
            cdf, _ = _gaussian(u, by_tanh, interpreted)
            update = tl.dot((u * cdf).to(dtype), w2, update, input_precision="tf32")
        update += _load_vector(fc2_b_ptr, 0, dim, DIM)[None, :]
        if has_scale:
            update *= _load_scale(mlp_scale_ptr, rows, row_mask, num_words)
        tl.store(out_ptr + offsets, (middle + update).to(out_ptr.dtype.element_ty), mask=mask)


# ---- backward


@triton.jit
def inner_mlp_backward(
    middle_ptr, grad_out_ptr, grad_middle_ptr, partials_ptr, norm2_w_ptr, norm2_b_ptr, fc1_w_ptr, fc1_b_ptr, fc2_w_ptr,
    mlp_scale_ptr, num_tokens,
    dim: tl.constexpr, hidden: tl.constexpr, num_words: tl.constexpr, eps: tl.constexpr, has_scale: tl.constexpr, dtype: tl.constexpr,
    DIM: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, TILE: tl.constexpr,
    of_words: tl.constexpr, of_weights: tl.constexpr, by_tanh: tl.constexpr, interpreted: tl.constexpr,
):  # fmt: skip
    """of_words: grad_middle; of_weights: those of fc1_w, fc1_b, fc2_w, in the program's row of (fc1_w, fc1_b, fc2_w, fc2_b, norm2_w,
    norm2_b), of which the last three come with those of the words. Alone, those of the weights are of a share of the hidden units."""
    first = 0
    if not of_words:
        first = tl.program_id(1) * (NUM_CHUNKS * CHUNK)
    cols = tl.arange(0, DIM)[None, :]
    grad_w1 = ()
    grad_w2 = ()
    grad_b1 = ()
    for _ in tl.static_range(NUM_CHUNKS if of_weights else 0):
        grad_w1 = grad_w1 + (tl.zeros([CHUNK, DIM], dtype=tl.float32),)
        grad_w2 = grad_w2 + (tl.zeros([CHUNK, DIM], dtype=tl.float32),)
        grad_b1 = grad_b1 + (tl.zeros([16, CHUNK], dtype=tl.float32),)
    grad_b2 = tl.zeros([16, DIM], dtype=tl.float32)
    grad_norm_w = tl.zeros([16, DIM], dtype=tl.float32)
    grad_norm_b = tl.zeros([16, DIM], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TILE), tl.num_programs(0)):
        rows = tile * TILE + tl.arange(0, TILE)
        row_mask = rows < num_tokens
        offsets = rows.to(tl.int64)[:, None] * dim + cols
        mask = row_mask[:, None] & (cols < dim)
        middle = tl.load(middle_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad_update = tl.load(grad_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        norm_w = _load_vector(norm2_w_ptr, 0, dim, DIM)[None, :]
        middle_hat, rstd = _normalize(middle, dim, DIM, eps)
        a = (middle_hat * norm_w + _load_vector(norm2_b_ptr, 0, dim, DIM)[None, :]).to(dtype)
        if has_scale:
            grad_update *= _load_scale(mlp_scale_ptr, rows, row_mask, num_words)
        g = grad_update.to(dtype)
        grad_a = tl.zeros([TILE, DIM], dtype=tl.float32)
        new_w1 = ()
        new_w2 = ()
        new_b1 = ()
        for c in tl.static_range(NUM_CHUNKS):
            chunk = first + c * CHUNK
            w1 = _load_linear(fc1_w_ptr, 0, chunk, dim, hidden, DIM, CHUNK, dtype)
            w2 = _load_linear(fc2_w_ptr, chunk, 0, hidden, dim, CHUNK, DIM, dtype)
            u = tl.dot(a, w1, input_precision="tf32") + _load_vector(fc1_b_ptr, chunk, hidden, CHUNK)[None, :]
            cdf, density = _gaussian(u, by_tanh, interpreted)
            grad_u = tl.dot(g, tl.trans(w2), input_precision="tf32") * (cdf + u * density)
            grad_u = grad_u.to(dtype)
            if of_weights:
                activated = (u * cdf).to(dtype)
                new_b1 = new_b1 + (_add_column_sums(grad_b1[c], grad_u, TILE, dtype),)
                new_w1 = new_w1 + (tl.dot(tl.trans(grad_u), a, grad_w1[c], input_precision="tf32"),)
                new_w2 = new_w2 + (tl.dot(tl.trans(activated), g, grad_w2[c], input_precision="tf32"),)
            if of_words:
                grad_a = tl.dot(grad_u, tl.trans(w1), grad_a, input_precision="tf32")
        grad_w1 = new_w1
        grad_w2 = new_w2
        grad_b1 = new_b1
        if of_words:
            grad_b2 = _add_column_sums(grad_b2, g, TILE, dtype)
            grad_norm_w = _add_column_sums(grad_norm_w, grad_a * middle_hat, TILE, dtype)
            grad_norm_b = _add_column_sums(grad_norm_b, grad_a, TILE, dtype)
            # Once more from the cache: kept since above, it would take registers.
            grad_out = tl.load(grad_out_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            grad_middle = grad_out + _normalize_backward(grad_a * norm_w, middle_hat, rstd, dim)
            tl.store(grad_middle_ptr + offsets, grad_middle.to(grad_middle_ptr.dtype.element_ty), mask=mask)

    base = partials_ptr + tl.program_id(0).to(tl.int64) * (hidden * (2 * dim + 1) + 3 * dim)
    for c in tl.static_range(NUM_CHUNKS if of_weights else 0):
        chunk = first + c * CHUNK
        _store_linear_grad(base, tl.trans(grad_w1[c]), 0, chunk, dim, hidden, DIM, CHUNK)
        _store_column_sums(base + hidden * dim, grad_b1[c], chunk, hidden, CHUNK)
        _store_linear_grad(base + hidden * (dim + 1), grad_w2[c], chunk, 0, hidden, dim, CHUNK, DIM)
    if of_words:
        base += hidden * (2 * dim + 1)
        _store_column_sums(base, grad_b2, 0, dim, DIM)
        _store_column_sums(base + dim, grad_norm_w, 0, dim, DIM)
        _store_column_sums(base + 2 * dim, grad_norm_b, 0, dim, DIM)


@triton.jit
def inner_attention_backward(
    words_ptr, grad_middle_ptr, grad_words_ptr, partials_ptr, norm1_w_ptr, norm1_b_ptr, qk_w_ptr, v_w_ptr, proj_w_ptr,
    attn_scale_ptr, num_tokens,
    dim: tl.constexpr, num_heads: tl.constexpr, num_words: tl.constexpr, eps: tl.constexpr, has_scale: tl.constexpr, dtype: tl.constexpr,
    DIM: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, of_words: tl.constexpr, of_weights: tl.constexpr,
):  # fmt: skip
    """of_words: grad_words; of_weights: those of the matrices, in the program's row of (qk_w, v_w, proj_w, proj_b, norm1_w, norm1_b), of
    which the last three come with those of the words. Alone, those of the weights are of one of the four matrices of the queries,
    keys, values and the projection."""
    head_dim: tl.constexpr = dim // num_heads
    scale: tl.constexpr = 1.0 / head_dim**0.5
    log2_e: tl.constexpr = 1.4426950408889634
    cols = tl.arange(0, DIM)[None, :]
    which = tl.program_id(1)
    if of_words and of_weights:
        grad_wq = tl.zeros([DIM, DIM], dtype=tl.float32)
        grad_wk = tl.zeros([DIM, DIM], dtype=tl.float32)
        grad_wv = tl.zeros([DIM, DIM], dtype=tl.float32)
        grad_wp = tl.zeros([DIM, DIM], dtype=tl.float32)
    if not of_words:
        grad_w = tl.zeros([DIM, DIM], dtype=tl.float32)
    grad_bp = tl.zeros([16, DIM], dtype=tl.float32)
    grad_norm_w = tl.zeros([16, DIM], dtype=tl.float32)
    grad_norm_b = tl.zeros([16, DIM], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TILE), tl.num_programs(0)):
        rows = tile * TILE + tl.arange(0, TILE)
        row_mask = rows < num_tokens
        offsets = rows.to(tl.int64)[:, None] * dim + cols
        mask = row_mask[:, None] & (cols < dim)
        x = tl.load(words_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad_attended = tl.load(grad_middle_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        norm_w = _load_vector(norm1_w_ptr, 0, dim, DIM)[None, :]
        x_hat, rstd = _normalize(x, dim, DIM, eps)
        a = (x_hat * norm_w + _load_vector(norm1_b_ptr, 0, dim, DIM)[None, :]).to(dtype)
        wq = _load_linear(qk_w_ptr, 0, 0, dim, dim, DIM, DIM, dtype)
        wk = _load_linear(qk_w_ptr + dim * dim, 0, 0, dim, dim, DIM, DIM, dtype)
        wv = _load_linear(v_w_ptr, 0, 0, dim, dim, DIM, DIM, dtype)
        wp = _load_linear(proj_w_ptr, 0, 0, dim, dim, DIM, DIM, dtype)
        q = tl.reshape((tl.dot(a, wq, input_precision="tf32") * (scale * log2_e)).to(dtype), [TILE // GROUP, GROUP, DIM])
        k = tl.reshape(tl.dot(a, wk, input_precision="tf32").to(dtype), [TILE // GROUP, GROUP, DIM])
        v = tl.reshape(tl.dot(a, wv, input_precision="tf32").to(dtype), [TILE // GROUP, GROUP, DIM])
        if has_scale:
            grad_attended *= _load_scale(attn_scale_ptr, rows, row_mask, num_words)
        g = grad_attended.to(dtype)
        grad_o = tl.reshape(tl.dot(g, tl.trans(wp), input_precision="tf32").to(dtype), [TILE // GROUP, GROUP, DIM])

        k_t = tl.permute(k, [0, 2, 1])
        v_t = tl.permute(v, [0, 2, 1])
        o = tl.zeros([TILE // GROUP, GROUP, DIM], dtype=dtype)
        grad_q = tl.zeros([TILE // GROUP, GROUP, DIM], dtype=dtype)
        grad_k = tl.zeros([TILE // GROUP, GROUP, DIM], dtype=dtype)
        grad_v = tl.zeros([TILE // GROUP, GROUP, DIM], dtype=dtype)
        for head in tl.static_range(num_heads):  # q carries scale * log2(e): grad_k is without log2(e), grad_q takes the scale
            channels = _channels_of(head, head_dim, DIM)
            p = _attention(tl.where(channels, q, 0.0), k_t, num_words, GROUP)
            grad_p = tl.dot(tl.where(channels, grad_o, 0.0), v_t, input_precision="tf32")
            grad_s = p * (grad_p - tl.sum(grad_p * p, axis=2, keep_dims=True))
            p = p.to(dtype)
            grad_s = grad_s.to(dtype)
            grad_s_t = tl.permute(grad_s, [0, 2, 1])
            o = tl.where(channels, tl.dot(p, v, input_precision="tf32").to(dtype), o)
            grad_v = tl.where(channels, tl.dot(tl.permute(p, [0, 2, 1]), grad_o, input_precision="tf32").to(dtype), grad_v)
            grad_q = tl.where(channels, (tl.dot(grad_s, k, input_precision="tf32") * scale).to(dtype), grad_q)
            grad_k = tl.where(channels, (tl.dot(grad_s_t, q, input_precision="tf32") * (1.0 / log2_e)).to(dtype), grad_k)
        grad_q = tl.reshape(grad_q, [TILE, DIM])
        grad_k = tl.reshape(grad_k, [TILE, DIM])
        grad_v = tl.reshape(grad_v, [TILE, DIM])
        if of_words and of_weights:
            a_t = tl.trans(a)
            grad_wp = tl.dot(tl.trans(tl.reshape(o, [TILE, DIM])), g, grad_wp, input_precision="tf32")
            grad_wq = tl.dot(a_t, grad_q, grad_wq, input_precision="tf32")
            grad_wk = tl.dot(a_t, grad_k, grad_wk, input_precision="tf32")
            grad_wv = tl.dot(a_t, grad_v, grad_wv, input_precision="tf32")
        if not of_words:
            into = tl.where(which == 3, tl.reshape(o, [TILE, DIM]), a)
            out_of = tl.where(which == 0, grad_q, tl.where(which == 1, grad_k, tl.where(which == 2, grad_v, g)))
            grad_w = tl.dot(tl.trans(into), out_of, grad_w, input_precision="tf32")
        if of_words:
            grad_a = tl.dot(grad_q, tl.trans(wq), input_precision="tf32")
            grad_a = tl.dot(grad_k, tl.trans(wk), grad_a, input_precision="tf32")
            grad_a = tl.dot(grad_v, tl.trans(wv), grad_a, input_precision="tf32")
            grad_bp = _add_column_sums(grad_bp, g, TILE, dtype)
            grad_norm_w = _add_column_sums(grad_norm_w, grad_a * x_hat, TILE, dtype)
            grad_norm_b = _add_column_sums(grad_norm_b, grad_a, TILE, dtype)
            # Once more from the cache, as above.
            grad_middle = tl.load(grad_middle_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            grad_words = grad_middle + _normalize_backward(grad_a * norm_w, x_hat, rstd, dim)
            tl.store(grad_words_ptr + offsets, grad_words.to(grad_words_ptr.dtype.element_ty), mask=mask)

    base = partials_ptr + tl.program_id(0).to(tl.int64) * (4 * dim * dim + 3 * dim)
    if of_words and of_weights:
        _store_linear_grad(base, grad_wq, 0, 0, dim, dim, DIM, DIM)
        _store_linear_grad(base + dim * dim, grad_wk, 0, 0, dim, dim, DIM, DIM)
        _store_linear_grad(base + 2 * dim * dim, grad_wv, 0, 0, dim, dim, DIM, DIM)
        _store_linear_grad(base + 3 * dim * dim, grad_wp, 0, 0, dim, dim, DIM, DIM)
    if not of_words:
        _store_linear_grad(base + which * dim * dim, grad_w, 0, 0, dim, dim, DIM, DIM)
    if of_words:
        base += 4 * dim * dim
        _store_column_sums(base, grad_bp, 0, dim, DIM)
        _store_column_sums(base + dim, grad_norm_w, 0, dim, DIM)
        _store_column_sums(base + 2 * dim, grad_norm_b, 0, dim, DIM)


# ---- launches


class Launch(NamedTuple):
    """tile: words that a program takes at a time; programs_per_sm: as many as run beside each other on a multiprocessor
    apart: the gradients of the words and of the weights in launches of their own, as together they do not fit into the registers
    """

    tile: int
    num_warps: int
    programs_per_sm: int
    apart: bool = False


# By the padded width of a word, from what ptxas says of registers and spills (experiments/speed/); not tuned on a GPU.
LAUNCHES = {
    "inner_forward": {16: Launch(64, 4, 8), 32: Launch(64, 4, 8), 64: Launch(64, 4, 4), 128: Launch(32, 8, 2)},
    "inner_mlp_backward": {16: Launch(64, 4, 4), 32: Launch(64, 4, 2), 64: Launch(64, 8, 1), 128: Launch(32, 8, 1, True)},
    "inner_attention_backward": {16: Launch(64, 4, 4), 32: Launch(64, 4, 2), 64: Launch(32, 8, 1), 128: Launch(16, 8, 1, True)},
}
KERNELS = (inner_forward, inner_mlp_backward, inner_attention_backward)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Shape(NamedTuple):
    """What a kernel is compiled for: m words of c channels in a patch, the MLP's hidden units, heads, and the dtype of the products."""

    num_words: int
    dim: int
    hidden: int
    num_heads: int
    eps: float
    dtype: torch.dtype

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))


def parts(kernel: Any, shape: Shape, **flags: bool) -> list[tuple[dict[str, Any], int]]:
    """The launches that a kernel takes: constants of each, and how many programs share out the gradients of a tile."""
    launch, group = LAUNCHES[kernel.__name__][shape.padded], max(16, shape.num_words)
    chunk = min(32, max(16, triton.next_power_of_2(shape.hidden)))
    chunks, few = triton.cdiv(shape.hidden, chunk), 2  # of hidden units, and as many as a program has the gradients of
    constants = {
        **shape._asdict(), **flags, "dtype": DTYPES[shape.dtype], "DIM": shape.padded, "GROUP": group, "CHUNK": chunk,
        "TILE": max(launch.tile, group), "NUM_CHUNKS": chunks, "of_words": True, "of_weights": True,
        "by_tanh": shape.dtype == torch.bfloat16, "interpreted": INTERPRETED,
    }  # fmt: skip
    found = [(constants, 1)]
    if launch.apart:
        shares = 4 if kernel is inner_attention_backward else triton.cdiv(chunks, few)
        found = [({**constants, "of_weights": False}, 1), ({**constants, "of_words": False, "NUM_CHUNKS": few}, shares)]
    options = {"num_warps": launch.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    return [({**{name: one[name] for name in kernel.arg_names if name in one}, **options}, shares) for one, shares in found]


def _programs(kernel: Any, shape: Shape, device: torch.device, num_tokens: int) -> int:
    launch = LAUNCHES[kernel.__name__][shape.padded]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    tiles = triton.cdiv(num_tokens, max(launch.tile, shape.num_words))
    return max(1, min(tiles, multiprocessors * launch.programs_per_sm))


def _launch(kernel: Any, shape: Shape, programs: int, tensors: list[Tensor], num_tokens: int, **flags: bool) -> None:
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # Triton launches on the current one
        for constants, shares in parts(kernel, shape, **flags):
            kernel[(programs, shares)](*tensors, num_tokens, **constants)


def compiled(kernel: Any, shape: Shape, words: torch.dtype, weights: torch.dtype) -> list[Any]:
    """The parts of a kernel as training launches them, compiled for the current device; what one needs stands in its `metadata`."""
    flags = {name: True for name in ("has_scale", "store_middle") if name in kernel.arg_names}
    like_words = {"words_ptr", "out_ptr", "middle_ptr", "grad_out_ptr", "grad_middle_ptr", "grad_words_ptr"}
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    types = [words if name in like_words else torch.float32 if "scale" in name or "partials" in name else weights for name in pointers]
    return [kernel.warmup(*types, 1 << 20, grid=(1,), **constants) for constants, _ in parts(kernel, shape, **flags)]


def forward(
    shape: Shape, words: Tensor, parameters: list[Tensor], attn_scale: Tensor | None, mlp_scale: Tensor | None, *, store_middle: bool
) -> tuple[Tensor, Tensor]:
    """(out, middle), of words (patches, m, c) that lie contiguously; middle is empty unless it is to be stored."""
    out = torch.empty_like(words)
    middle = torch.empty_like(words) if store_middle else words.new_empty(0)
    num_tokens = words.shape[0] * words.shape[1]
    scales = [words if attn_scale is None else attn_scale, words if mlp_scale is None else mlp_scale]
    tensors = [words, out, middle if store_middle else words, *parameters, *scales]
    programs = _programs(inner_forward, shape, words.device, num_tokens)
    _launch(inner_forward, shape, programs, tensors, num_tokens, has_scale=attn_scale is not None, store_middle=store_middle)
    return out, middle


def backward(
    shape: Shape, grad_out: Tensor, words: Tensor, middle: Tensor, parameters: list[Tensor], attn_scale: Tensor | None,
    mlp_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(grad_words, gradients of all parameters in float32, one after the other): qk_w, v_w, proj_w, proj_b, norm1_w, norm1_b, fc1_w,
    fc1_b, fc2_w, fc2_b, norm2_w, norm2_b."""
    norm1_w, norm1_b, qk_w, v_w, proj_w, _, norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, _ = parameters
    grad_middle, grad_words = torch.empty_like(words), torch.empty_like(words)
    num_tokens, c, hidden = words.shape[0] * words.shape[1], shape.dim, shape.hidden

    def partials(kernel: Any, size: int) -> Tensor:
        return words.new_empty((_programs(kernel, shape, words.device, num_tokens), size), dtype=torch.float32)

    of_mlp = partials(inner_mlp_backward, hidden * (2 * c + 1) + 3 * c)
    of_attention = partials(inner_attention_backward, 4 * c * c + 3 * c)
    scale = words if mlp_scale is None else mlp_scale
    tensors = [middle, grad_out, grad_middle, of_mlp, norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, scale]
    _launch(inner_mlp_backward, shape, len(of_mlp), tensors, num_tokens, has_scale=mlp_scale is not None)
    scale = words if attn_scale is None else attn_scale
    tensors = [words, grad_middle, grad_words, of_attention, norm1_w, norm1_b, qk_w, v_w, proj_w, scale]
    _launch(inner_attention_backward, shape, len(of_attention), tensors, num_tokens, has_scale=attn_scale is not None)
    return grad_words, torch.cat([of_attention.sum(0), of_mlp.sum(0)])
