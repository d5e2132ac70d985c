"""T2T-ViT_t (arXiv 2101.11986), Tokens-to-Token with transformers as its token stages, which the paper sets TNT beside (Table 4).

Overlapping patches are unfolded three times, each time over the tokens of the stage before; a ViT follows. Throughout: B images, N
tokens an image after all strides (16), d channels a token (`embed_dim`).

Architecture and parameter names are those of the official code (https://github.com/yitu-opensource/T2T-ViT, models/t2t_vit.py), whose
weights load by their names. That was not tried with the released files.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp, calculate_drop_path_rates, trunc_normal_, use_fused_attn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tnt_lightning.errors import UserError
from tnt_lightning.models import knobs
from tnt_lightning.models.contract import GLOBAL_POOLS, STRIDE, ClassTokenBackbone


class TokenAttention(nn.Module):
    """Attention of one head that narrows its tokens: (B, T, dim) -> (B, T, token_dim). The residual is of the values: v + proj(...).

    Scaled by dim^-1/2, the width of what comes in, as in the official code.
    """

    def __init__(self, dim: int, *, token_dim: int):
        super().__init__()
        self.scale = dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False)
        self.proj = nn.Linear(token_dim, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # each (B, 1, T, token_dim)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return (v + self.proj(x)).squeeze(1)


class TokenTransformer(nn.Module):
    """A token stage: (B, T, dim) -> (B, T, token_dim)."""

    def __init__(self, dim: int, *, token_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, token_dim=token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Images (B, in_chans, H, W) -> tokens (B, H/16 * W/16, embed_dim)."""

    def __init__(self, *, in_chans: int, token_dim: int, embed_dim: int):
        super().__init__()
        self.attention1 = TokenTransformer(in_chans * 7 * 7, token_dim=token_dim)
        self.attention2 = TokenTransformer(token_dim * 3 * 3, token_dim=token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        b, _, height, width = images.shape
        x = F.unfold(images, kernel_size=7, stride=4, padding=2).transpose(1, 2)  # (B, H/4 * W/4, 49 * in_chans)
        x = self.attention1(x).transpose(1, 2).reshape(b, -1, height // 4, width // 4)
        x = F.unfold(x, kernel_size=3, stride=2, padding=1).transpose(1, 2)  # (B, H/8 * W/8, 9 * token_dim)
        x = self.attention2(x).transpose(1, 2).reshape(b, -1, height // 8, width // 8)
        return self.project(F.unfold(x, kernel_size=3, stride=2, padding=1).transpose(1, 2))


def sinusoid(positions: int, dim: int) -> Tensor:
    """(1, positions, dim): at position p and channel j the angle p / 10000^(2 floor(j/2) / dim), its sine on even j, its cosine on odd."""
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class T2TViT(ClassTokenBackbone):
    """Tokens-to-Token ViT: images (B, in_chans, H, W) -> logits (B, num_classes). Defaults are T2T-ViT_t-14.

    image_size: pixels, one number or (height, width); a multiple of 16
    embed_dim, depth, num_heads, mlp_ratio: of the ViT behind the token stages; token_dim: channels of their tokens
    drop_rate: dropout after positions, projections and in MLPs; attn_drop_rate: of attention maps; drop_path_rate: stochastic depth of
    the last block, rising linearly from 0 at the first. All of them of the ViT alone
    global_pool: "token" (the class token), "avg" (mean of the other tokens) or "" (no pooling: logits for each token)

    The positions are a fixed sinusoid: a buffer, and no parameter. The class keeps timm's contract for backbones. ValueError, with values
    that would do, for knobs that do not fit each other.
    """

    stride = 16
    pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        token_dim: int = 64,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: Literal["token", "avg", ""] = "token",
    ):
        super().__init__()
        knobs.check_whole(in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads, token_dim=token_dim)
        knobs.check_whole(highest=1_000, depth=depth)
        knobs.check_whole(lowest=0, highest=2**24, num_classes=num_classes)
        if embed_dim % num_heads:
            raise UserError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}; try one of {knobs.divisors(embed_dim)}")
        knobs.check_mlp_ratio(mlp_ratio, embed_dim, usual=3)
        if not isinstance(qkv_bias, bool):
            raise UserError(f"qkv_bias={qkv_bias!r} is neither true nor false")
        knobs.check_choice("global_pool", global_pool, GLOBAL_POOLS)
        knobs.check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)

        self.image_size = knobs.check_image(image_size, self.stride, what=STRIDE)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, embed_dim
        self.global_pool = global_pool

        self.tokens_to_token = TokensToToken(in_chans=in_chans, token_dim=token_dim, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        ((rows, columns), prefix) = self.positions(self.image_size)["pos_embed"]
        self.register_buffer("pos_embed", sinusoid(prefix + rows * columns, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, proj_drop=drop_rate, attn_drop=attn_drop_rate, drop_path=rate,
                norm_layer=nn.LayerNorm,
            )
            for rate in rates
        )  # fmt: skip
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        self._init_weights()

    def positions(self, image_size: tuple[int, int]) -> dict[str, tuple[tuple[int, int], int]]:
        return {"pos_embed": ((image_size[0] // self.stride, image_size[1] // self.stride), 1)}

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, 1+N, d), class token first."""
        self._check(images)
        x = self.tokens_to_token(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, d) -> (B, 1+N, d)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = self._through(block, x)
        return self.norm(x)

    # ---- timm's contract

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return super().pretrained_cfg | dict(crop_pct=0.9, first_conv=None, paper_ids="arXiv:2101.11986", paper_name="Tokens-to-Token ViT")

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r"^cls_token|^tokens_to_token", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])
