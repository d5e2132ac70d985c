"""TNT, Transformer in Transformer (arXiv 2103.00112), with every knob that the paper turns.

An image is cut into N patches, the visual sentences, and each patch into m sub-patches, its visual words. Throughout:
B images, N sentences an image, m words a sentence (`words_per_patch`), c channels a word (`inner_dim`), d channels a
sentence (`outer_dim`). Words have the shape (B*N, m, c), sentences (B, 1+N, d) with the class token first.

The architecture is that of the official code, where it and the paper's text differ too.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_, use_fused_attn
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnt_lightning.errors import UserError
from tnt_lightning.kernels import inner
from tnt_lightning.models import knobs
from tnt_lightning.models.contract import GLOBAL_POOLS, ClassTokenBackbone

POSITION_ENCODINGS = ("none", "sentence", "word", "both")


class Explanation(NamedTuple):
    """What `TNT.explain` saw in the chosen blocks, by block number (from 1, as the paper counts).

    inner: attention among the words of a sentence, (B*N, inner_heads, m, m), rows (queries) sum to 1; TNT blocks only
    outer: attention among the sentences, (B, outer_heads, 1+N, 1+N), class token first
    words: the words as they leave the block, (B*N, m, c)
    sentences: the sentences as they leave the block, (B, 1+N, d), before the final LayerNorm

    Sentence j of image i is row i*N + j of what has B*N rows; words run row by row through their patch.
    """

    inner: dict[int, Tensor]
    outer: dict[int, Tensor]
    words: dict[int, Tensor]
    sentences: dict[int, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention (paper, Eq. 2) over tokens (B, T, dim); queries and keys share one matrix, as in the official code."""

    def __init__(self, dim: int, *, num_heads: int, qkv_bias: bool, drop_rate: float, attn_drop_rate: float, fused_attn: bool):
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = fused_attn
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Attended tokens (B, T, dim). A list as `maps` receives the attention map, (B, num_heads, T, T), as used."""
        b, t, dim = x.shape
        head_dim = dim // self.num_heads
        q, k = self.qk(x).reshape(b, t, 2, self.num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, head_dim)
        v = self.v(x).reshape(b, t, self.num_heads, head_dim).transpose(1, 2)
        if self.fused_attn and maps is None:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = self.attn_drop(((q @ k.transpose(-2, -1)) * head_dim**-0.5).softmax(dim=-1))
            if maps is not None:
                maps.append(attn)
            x = attn @ v
        x = x.transpose(1, 2).reshape(b, t, dim)  # (B, heads, T, head_dim) -> (B, T, dim)
        return self.proj_drop(self.proj(x))


class SqueezeExcite(nn.Module):
    """Channel weights from the mean token (paper, Table 12): (B, T, dim) -> (B, T, dim); the official code's layer, a quarter wide."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduce = nn.Linear(dim, dim // 4)
        self.expand = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.expand(F.relu(self.reduce(self.norm(x.mean(dim=1, keepdim=True)))))
        return x * weights.tanh()


class TransformerBlock(nn.Module):
    """Pre-norm transformer block over (B, T, dim) (paper, Eq. 1): attention, then an MLP, each on a residual branch.

    Drop path is drawn for each entry of the first dimension: a patch in the inner transformer, an image in the outer.
    kernel: "eager", or what may compute the block instead of its layers: see `TNT`; for a short and narrow inner block only
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        fused_attn: bool,
        se: bool = False,
        kernel: str = "eager",
    ):
        super().__init__()
        self.kernel = kernel
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, fused_attn=fused_attn
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop_rate)
        self.se = SqueezeExcite(dim) if se else None
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        if not torch.jit.is_scripting() and self.kernel != "eager" and maps is None and self._fuses(x):
            return self._fused(x)
        x = x + self.drop_path(self.attn(self.norm1(x), maps))
        update = self.mlp(self.norm2(x))
        if self.se is not None:
            update = update + self.se(update)
        return x + self.drop_path(update)

    @torch.jit.unused
    def _fuses(self, words: Tensor) -> bool:
        if inner.is_recorded(words):
            return False
        weight = self.mlp.fc1.weight
        heads, hidden, dtype = self.attn.num_heads, weight.shape[0], weight.dtype
        return inner.fuses(words, num_heads=heads, hidden=hidden, weights=dtype, kernel=self.kernel, otherwise=self.unlike_the_kernels)

    def unlike_the_kernels(self) -> str:
        """What the layers of this block do that the fused kernels would not; empty where they compute the same."""
        linear = (self.attn.qk, self.attn.v, self.attn.proj, self.mlp.fc1, self.mlp.fc2)
        if any(type(layer) is not nn.Linear for layer in linear):
            return "its linear layers are others than torch's"
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in (self.norm1, self.attn, self.norm2, self.mlp, *linear)):
            return "its layers have hooks"
        if self.attn.qk.bias is not None:
            return "qkv_bias=true is not in the fused kernels"
        if self.attn.attn_drop.p or self.attn.proj_drop.p:
            return "dropout (drop_rate, attn_drop_rate) is not in the fused kernels"
        return ""

    @torch.jit.unused
    def _fused(self, words: Tensor) -> Tensor:
        mlp: Any = self.mlp
        parameters = inner.Parameters(
            self.norm1.weight, self.norm1.bias, self.attn.qk.weight, self.attn.v.weight, self.attn.proj.weight, self.attn.proj.bias,
            self.norm2.weight, self.norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        )  # fmt: skip
        scales: list[Tensor | None] = [None, None]
        if self.training and isinstance(self.drop_path, DropPath):  # drawn twice, as the layers do
            kept = torch.ones(words.shape[0], device=words.device)
            scales = [self.drop_path(kept), self.drop_path(kept)]
        return inner.fused(words, parameters, num_heads=self.attn.num_heads, eps=self.norm1.eps, attn_scale=scales[0], mlp_scale=scales[1])


class Fold(nn.Module):
    """The words of a sentence, concatenated and projected to its width (paper, Eq. 8): (B*N, m, c) -> (B, N, d)."""

    def __init__(self, *, words_per_patch: int, inner_dim: int, outer_dim: int, bias: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(words_per_patch * inner_dim)
        self.proj = nn.Linear(words_per_patch * inner_dim, outer_dim, bias=bias)
        self.norm2 = nn.LayerNorm(outer_dim)

    def forward(self, words: Tensor, num_sentences: int) -> Tensor:
        flat = words.reshape(-1, num_sentences, words.shape[1] * words.shape[2])  # (B*N, m, c) -> (B, N, m*c)
        return self.norm2(self.proj(self.norm1(flat)))


class TNTBlock(nn.Module):
    """One TNT block (paper section 2.2, Eq. 6-10): words attend inside their sentence, then sentences attend to each other.

    Shapes: words (B*N, m, c), sentences (B, 1+N, d) with the class token first; both come back in the same shapes.
    The sentences never flow back into the words. `maps` receives the inner, then the outer attention map.
    """

    def __init__(self, *, inner: TransformerBlock, fold: Fold, outer: TransformerBlock):
        super().__init__()
        self.inner = inner
        self.fold = fold
        self.outer = outer

    def forward(self, words: Tensor, sentences: Tensor, maps: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        words = self.inner(words, maps)
        update = self.fold(words, sentences.shape[1] - 1)
        sentences = sentences + F.pad(update, (0, 0, 1, 0))  # (B, N, d) -> (B, 1+N, d), zero for the class token
        return words, self.outer(sentences, maps)


class PlainBlock(nn.Module):
    """A block without an inner transformer (paper, Table 5, TNT-S-1 to -4): the words pass by, the sentences attend."""

    def __init__(self, *, outer: TransformerBlock):
        super().__init__()
        self.outer = outer

    def forward(self, words: Tensor, sentences: Tensor, maps: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return words, self.outer(sentences, maps)


class WordEmbed(nn.Module):
    """Images (B, in_chans, H, W) -> words (B*N, m, c): cut into patches, then one 7x7 convolution inside each patch.

    Each patch is padded on its own, so that no word sees another sentence. The stride is patch_size / sqrt(m): with 4
    words in a patch of 16 it is 8, and a convolution 7 wide steps over one pixel in eight, as the official code does.
    """

    def __init__(self, *, patch_size: int, words_per_patch: int, in_chans: int, inner_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, inner_dim, kernel_size=7, stride=patch_size // isqrt(words_per_patch), padding=3)

    def forward(self, images: Tensor) -> Tensor:
        b, chans, height, width = images.shape
        p = self.patch_size
        patches = images.reshape(b, chans, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        words = self.proj(patches.reshape(-1, chans, p, p))  # (B*N, in_chans, p, p) -> (B*N, c, sqrt(m), sqrt(m))
        return words.flatten(2).transpose(1, 2)


class TNT(ClassTokenBackbone):
    """Transformer in Transformer: images (B, in_chans, H, W) -> logits (B, num_classes). Defaults are TNT-S (paper, Table 1).

    image_size: pixels, one number or (height, width); a multiple of patch_size
    patch_size: side of a visual sentence in pixels
    words_per_patch: m, a square whose root divides patch_size
    outer_dim, inner_dim: d and c; inner_dim=None is the paper's rule c = d / m
    outer_heads, inner_heads: attention heads of the outer and the inner transformer
    depth: number of blocks; tnt_blocks: which of them (from 1) have an inner transformer, None for all (Table 5)
    mlp_ratio: hidden width of both transformers' MLPs
    position_encoding: "none", "sentence", "word" or "both" (Table 6)
    se: squeeze-and-excitation on the outer MLPs (Table 12)
    drop_rate: dropout after positions, projections and in MLPs; attn_drop_rate: of attention maps;
    drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first
    global_pool: "token" (the class token), "avg" (mean of the sentences) or "" (no pooling: logits for each token)
    kernel: how the inner transformers are computed, no part of the network. "eager": layer by layer; "triton": each in one fused kernel
    for NVIDIA's GPUs (bf16, fp16, TF32), UserError where that cannot be; "auto": fused where it can be, else layer by layer, and on a
    GPU the log says why once. Attention maps, dropout, qkv_bias, and what is exported or scripted are always layer by layer.

    The class keeps timm's contract for backbones, so timm's tools work on it. ValueError, with values that would do,
    for knobs that do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        words_per_patch: int = 16,
        outer_dim: int = 384,
        inner_dim: int | None = None,
        outer_heads: int = 6,
        inner_heads: int = 4,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        tnt_blocks: Sequence[int] | None = None,
        position_encoding: Literal["none", "sentence", "word", "both"] = "both",
        se: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = False,
        global_pool: Literal["token", "avg", ""] = "token",
        kernel: Literal["auto", "eager", "triton"] = "auto",
    ):
        super().__init__()
        knobs.check_whole(
            patch_size=patch_size, in_chans=in_chans, outer_dim=outer_dim, outer_heads=outer_heads, inner_heads=inner_heads
        )  # fmt: skip
        knobs.check_whole(highest=1_000, depth=depth)
        knobs.check_whole(highest=knobs.LARGEST**2, words_per_patch=words_per_patch)
        knobs.check_whole(lowest=0, highest=2**24, num_classes=num_classes)
        knobs.check_words(words_per_patch, patch_size)
        if inner_dim is None:
            if outer_dim % words_per_patch:
                fits = [m for m in knobs.word_counts(patch_size) if outer_dim % m == 0]
                raise UserError(
                    f"words_per_patch={words_per_patch} does not divide outer_dim={outer_dim}, so that inner_dim has no whole value; "
                    f"set inner_dim, or try words_per_patch from {fits}"
                )
            inner_dim = outer_dim // words_per_patch
        knobs.check_whole(inner_dim=inner_dim)
        knobs.check_heads("inner", inner_heads, inner_dim)
        knobs.check_heads("outer", outer_heads, outer_dim)
        knobs.check_choice("position_encoding", position_encoding, POSITION_ENCODINGS)
        knobs.check_choice("global_pool", global_pool, GLOBAL_POOLS)
        knobs.check_choice("kernel", kernel, inner.KERNELS)
        knobs.check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        knobs.check_mlp_ratio(mlp_ratio, min(inner_dim, outer_dim))
        for name, value in (("se", se), ("qkv_bias", qkv_bias)):
            if not isinstance(value, bool):
                raise UserError(f"{name}={value!r} is neither true nor false")
        if se and outer_dim < 4:
            raise UserError(f"se=True needs outer_dim of at least 4, not {outer_dim}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = self.stride = patch_size
        self.global_pool = global_pool
        self.num_features = self.embed_dim = outer_dim
        self.image_size = knobs.check_image(image_size, patch_size)
        num_sentences = self.grid_size[0] * self.grid_size[1]

        self.word_embed = WordEmbed(patch_size=patch_size, words_per_patch=words_per_patch, in_chans=in_chans, inner_dim=inner_dim)
        self.fold = Fold(words_per_patch=words_per_patch, inner_dim=inner_dim, outer_dim=outer_dim, bias=True)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, outer_dim))
        self.word_position, self.sentence_position = None, None
        if position_encoding in ("word", "both"):
            self.word_position = nn.Parameter(torch.zeros(1, words_per_patch, inner_dim))
        if position_encoding in ("sentence", "both"):
            self.sentence_position = nn.Parameter(torch.zeros(1, 1 + num_sentences, outer_dim))
        self.position_drop = nn.Dropout(drop_rate)

        with_words = knobs.check_blocks(tnt_blocks, depth)
        blocks: list[TNTBlock | PlainBlock] = []
        for number, drop_path in enumerate(calculate_drop_path_rates(drop_path_rate, depth), start=1):
            shared: dict[str, Any] = dict(
                mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path
            )
            outer = TransformerBlock(outer_dim, num_heads=outer_heads, fused_attn=use_fused_attn(), se=se, **shared)
            if number in with_words:
                # Words: m tokens of a few channels a head, where the fused attention of torch is slower than the plain one.
                among_words = TransformerBlock(inner_dim, num_heads=inner_heads, fused_attn=False, kernel=kernel, **shared)
                if kernel == "triton":
                    hidden = int(inner_dim * mlp_ratio)
                    shape = dict(num_words=words_per_patch, dim=inner_dim, num_heads=inner_heads, hidden=hidden)
                    if why := inner.misfit(**shape) or among_words.unlike_the_kernels():
                        raise inner.refusal(why)
                fold = Fold(words_per_patch=words_per_patch, inner_dim=inner_dim, outer_dim=outer_dim, bias=False)
                blocks.append(TNTBlock(inner=among_words, fold=fold, outer=outer))
            else:
                blocks.append(PlainBlock(outer=outer))
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=outer_dim, reduction=patch_size) for i in range(depth)]

        self.norm = nn.LayerNorm(outer_dim)
        self.head = nn.Linear(outer_dim, num_classes) if num_classes else nn.Identity()
        for position in (self.cls_token, self.sentence_position, self.word_position):
            if position is not None:
                trunc_normal_(position, std=0.02)
        self._init_weights()

    @property
    def grid_size(self) -> tuple[int, int]:
        """Sentences down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def positions(self, image_size: tuple[int, int]) -> dict[str, tuple[tuple[int, int], int]]:
        grid = (image_size[0] // self.stride, image_size[1] // self.stride)
        return {} if self.sentence_position is None else {"sentence_position": (grid, self.num_prefix_tokens)}

    # ---- forward

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Words and sentences as they enter the first block (paper, Eq. 3-5)."""
        self._check(images)
        words = self.word_embed(images)
        if self.word_position is not None:
            words = words + self.word_position
        sentences = self.fold(words, self.grid_size[0] * self.grid_size[1])
        sentences = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), sentences], dim=1)  # (B, N, d) -> (B, 1+N, d)
        if self.sentence_position is not None:
            sentences = sentences + self.sentence_position
        return words, self.position_drop(sentences)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, 1+N, d), class token first."""
        words, sentences = self._embed(images)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                words, sentences = checkpoint(block, words, sentences, use_reentrant=False)
            else:
                words, sentences = block(words, sentences)
        return self.norm(sentences)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """timm's contract: (final tokens, features of the chosen blocks), each (B, d, H/p, W/p) as NCHW or (B, N, d) as NLC.

        indices: an int n takes the last n blocks, a list takes blocks by index (from 0, negative from the end).
        """
        knobs.check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        taken, last = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        words, sentences = self._embed(x)
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                words, sentences = checkpoint(block, words, sentences, use_reentrant=False)
            else:
                words, sentences = block(words, sentences)
            if index in taken:
                tokens = self.norm(sentences) if norm else sentences
                prefix, features = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    features = features.transpose(1, 2).reshape(x.shape[0], -1, *self.grid_size).contiguous()
                intermediates.append((features, prefix) if return_prefix_tokens else features)
            if stop_early and index == last:
                break
        if intermediates_only:
            return intermediates
        return self.norm(sentences), intermediates

    def explain(self, images: Tensor, blocks: Sequence[int] | None = None) -> tuple[Tensor, Explanation]:
        """Logits, and what the chosen blocks (from 1; None for all) attended to and produced: see `Explanation`.

        In evaluation mode the logits are those of `forward`, up to rounding where that uses fused attention.
        """
        chosen = set(range(1, len(self.blocks) + 1)) if blocks is None else set(blocks)
        if out := sorted(chosen - set(range(1, len(self.blocks) + 1))):
            raise UserError(f"blocks={out}: this model has the blocks 1 to {len(self.blocks)}")
        seen = Explanation({}, {}, {}, {})
        words, sentences = self._embed(images)
        for number, block in enumerate(self.blocks, start=1):
            if number not in chosen:
                words, sentences = block(words, sentences)
                continue
            maps: list[Tensor] = []
            words, sentences = block(words, sentences, maps)
            seen.outer[number] = maps[-1]
            if len(maps) == 2:
                seen.inner[number] = maps[0]
            seen.words[number], seen.sentences[number] = words, sentences
        return self.forward_head(self.norm(sentences)), seen

    # ---- timm's contract

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """With the recipe's normalisation and crop (paper, Table 3)."""
        return super().pretrained_cfg | dict(
            mean=(0.5,) * self.in_chans, std=(0.5,) * self.in_chans, crop_pct=0.9, first_conv="word_embed.proj",
            paper_ids="arXiv:2103.00112", paper_name="Transformer in Transformer",
        )  # fmt: skip

    def no_weight_decay(self) -> set[str]:
        return {name for name in ("cls_token", "sentence_position", "word_position") if getattr(self, name) is not None}

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^cls_token|^sentence_position|^word_position|^word_embed|^fold",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the chosen intermediates do not need; gives their indices."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None) -> None:
        """Take images of another size, as above; the words fix the patches."""
        if patch_size not in (None, self.patch_size):
            raise UserError(f"patch_size={patch_size}: the words of a trained model fix its patches at {self.patch_size}")
        if img_size is not None:
            super().set_input_size(knobs.check_image(img_size, self.patch_size))
