"""PVT, the Pyramid Vision Transformer (arXiv 2102.12122, version 1), which the paper sets TNT beside (Tables 4, 5, 10).

Four stages, each at half the resolution of the one before. In a stage every token attends to keys and values of a map that a strided
convolution has reduced. Throughout: B images; in stage s h x w tokens of `widths[s]` channels, after the strides 4, 8, 16 and 32.

Architecture and parameter names are those of the official code (https://github.com/whai362/PVT, classification/pvt.py), whose weights
load by their names. That was not tried with the released files.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_, use_fused_attn
from torch import Tensor, nn

from tnt_lightning.errors import UserError
from tnt_lightning.models import knobs
from tnt_lightning.models.contract import GLOBAL_POOLS, STRIDE, ClassTokenBackbone

STRIDES = (4, 2, 2, 2)  # of each stage's patch embedding


class PatchEmbed(nn.Module):
    """Map (B, in_chans, H, W) -> tokens (B, H/stride * W/stride, dim): a convolution over patches, then LayerNorm (eps 1e-5)."""

    def __init__(self, *, stride: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=stride, stride=stride)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    """Attention of tokens (B, T, dim), T = h*w, to keys and values of the map after a convolution of kernel and stride `reduction`.

    With reduction 1 there is no convolution, and the tokens need not form a map (the class token is one of them).
    """

    def __init__(self, dim: int, *, num_heads: int, qkv_bias: bool, drop_rate: float, attn_drop_rate: float, reduction: int):
        super().__init__()
        self.num_heads, self.reduction = num_heads, reduction
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike the blocks' own

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        b, t, dim = x.shape
        head_dim = dim // self.num_heads
        q = self.q(x).reshape(b, t, self.num_heads, head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
        reduced = x
        if self.reduction > 1:
            reduced = self.sr(x.transpose(1, 2).reshape(b, dim, *grid))  # (B, dim, h/reduction, w/reduction)
            reduced = self.norm(reduced.flatten(2).transpose(1, 2))
        k, v = self.kv(reduced).reshape(b, -1, 2, self.num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            x = self.attn_drop(((q @ k.transpose(-2, -1)) * head_dim**-0.5).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, t, dim)))


class Block(nn.Module):
    """Pre-norm transformer block over (B, T, dim); LayerNorm eps 1e-6."""

    def __init__(self, dim: int, *, mlp_ratio: float, drop_rate: float, drop_path_rate: float, **attention: Any):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, drop_rate=drop_rate, **attention)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop_rate)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PVT(ClassTokenBackbone):
    """Pyramid Vision Transformer: images (B, in_chans, H, W) -> logits (B, num_classes). Defaults are PVT-Small.

    image_size: pixels, one number or (height, width); a multiple of 32
    widths, depths, heads, mlp_ratios: channels, blocks, attention heads and MLP ratio of each of the four stages
    reductions: kernel and stride of the convolution over keys and values in each stage; 1 in the last, which has the class token
    drop_rate: dropout after positions, projections and in MLPs; attn_drop_rate: of attention maps;
    drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first
    global_pool: "token" (the class token), "avg" (mean of the last stage's other tokens) or "" (no pooling: logits for each token)

    The class keeps timm's contract for backbones. ValueError, with values that would do, for knobs that do not fit each other.
    """

    stride = prod(STRIDES)

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: Literal["token", "avg", ""] = "token",
    ):
        super().__init__()
        knobs.check_whole(in_chans=in_chans)
        knobs.check_whole(lowest=0, highest=2**24, num_classes=num_classes)
        for name, values in dict(widths=widths, depths=depths, heads=heads, reductions=reductions, mlp_ratios=mlp_ratios).items():
            knobs.check_stages(name, values, len(STRIDES), highest=1_000 if name in ("depths", "mlp_ratios") else knobs.LARGEST)
        for width, count in zip(widths, heads, strict=True):
            if width % count:
                raise UserError(f"heads={list(heads)}: {count} does not divide {width} of widths={list(widths)}")
        if reductions[-1] != 1:
            raise UserError(f"reductions={list(reductions)}: the last stage has the class token and is not reduced; try 1 there")
        if not isinstance(qkv_bias, bool):
            raise UserError(f"qkv_bias={qkv_bias!r} is neither true nor false")
        knobs.check_choice("global_pool", global_pool, GLOBAL_POOLS)
        knobs.check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)

        self.image_size = knobs.check_image(image_size, self.stride, what=STRIDE)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, widths[-1]
        self.global_pool = global_pool

        rates: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        before = in_chans
        positions = self.positions(self.image_size).items()
        for stage, (stride, width, (position, (grid, prefix))) in enumerate(zip(STRIDES, widths, positions, strict=True), start=1):
            if min(grid) < reductions[stage - 1]:
                raise UserError(
                    f"image_size={image_size}: the map of {grid[0]}x{grid[1]} in stage {stage} is smaller than the {reductions[stage - 1]} "
                    "pixels that its reduction takes; raise it, or lower reductions"
                )
            self.add_module(f"patch_embed{stage}", PatchEmbed(stride=stride, in_chans=before, dim=width))
            self.register_parameter(position, nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1], width)))
            blocks = [
                Block(
                    width, num_heads=heads[stage - 1], mlp_ratio=mlp_ratios[stage - 1], reduction=reductions[stage - 1],
                    qkv_bias=qkv_bias, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=next(rates),
                )
                for _ in range(depths[stage - 1])
            ]  # fmt: skip
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
            before = width
        self.pos_drop = nn.Dropout(drop_rate)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, widths[-1]))
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()

        for name in sorted(self.no_weight_decay()):  # a set has no order, and a seed draws them in turn
            trunc_normal_(self.get_parameter(name), std=0.02)
        self._init_weights()

    def positions(self, image_size: tuple[int, int]) -> dict[str, tuple[tuple[int, int], int]]:
        sizes = [(image_size[0] // stride, image_size[1] // stride) for stride in accumulate(STRIDES, mul)]
        return {f"pos_embed{stage}": (grid, int(stage == len(STRIDES))) for stage, grid in enumerate(sizes, start=1)}

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens of the last stage (B, 1 + H/32 * W/32, widths[-1]), class token first."""
        self._check(images)
        x = images
        for stage, (position, (grid, prefix)) in enumerate(self.positions(self.image_size).items(), start=1):
            x = getattr(self, f"patch_embed{stage}")(x)  # (B, h*w, width)
            if prefix:  # in the last stage
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = self.pos_drop(x + getattr(self, position))
            for block in getattr(self, f"block{stage}"):
                x = self._through(block, x, grid)
            if not prefix:
                x = x.transpose(1, 2).reshape(len(x), -1, *grid)  # (B, h*w, width) -> (B, width, h, w)
        return self.norm(x)

    # ---- timm's contract

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return super().pretrained_cfg | dict(
            crop_pct=0.875, first_conv="patch_embed1.proj", paper_ids="arXiv:2102.12122", paper_name="Pyramid Vision Transformer"
        )

    def no_weight_decay(self) -> set[str]:
        """As in TNT's recipe; the official code decays the positions."""
        return {"cls_token", *self.positions(self.image_size)}

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^patch_embed1|^pos_embed1",
            blocks=[
                (r"^block(\d+)\.(\d+)", None),
                (r"^(?:patch_embed|pos_embed)(\d+)", (0,)),
                (r"^cls_token", (len(STRIDES), 0)),
                (r"^norm", (99999,)),
            ],
        )
