"""What backbones of ours with a class token have in common: timm's contract, as far as it is the same for all of them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnt_lightning.models import knobs

GLOBAL_POOLS = ("token", "avg", "")
STRIDE = "the pixels from one token to the next"


class ClassTokenBackbone(nn.Module):
    """Images (B, in_chans, H, W) -> tokens (B, 1+N, d), the class token first -> logits (B, num_classes).

    A subclass sets image_size, in_chans, num_classes, num_features (d), global_pool, and the modules cls_token and head.
    """

    __jit_unused_properties__ = ["pretrained_cfg", "default_cfg", "head_hidden_size"]

    if TYPE_CHECKING:  # TorchScript reads annotations, and knows no nn.Module among them
        stride: int  # pixels between two of the tokens that come out
        image_size: tuple[int, int]
        in_chans: int
        num_classes: int
        num_features: int
        global_pool: str
        cls_token: nn.Parameter
        head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

    @abstractmethod
    def forward_features(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def positions(self, image_size: tuple[int, int]) -> dict[str, tuple[tuple[int, int], int]]:
        """Position encodings by name at an image size: tokens (down, across), and how many others come before them."""

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1+N, d) -> logits (B, num_classes), or the pooled features (B, d) with pre_logits."""
        if self.global_pool == "token":
            tokens = tokens[:, 0]
        elif self.global_pool == "avg":
            tokens = tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return tokens if pre_logits else self.head(tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def _check(self, images: Tensor) -> None:
        _, chans, height, width = images.shape
        torch._assert(chans == self.in_chans, f"images of {chans} channels do not fit in_chans={self.in_chans}")
        misfit = f"images of {height}x{width} do not fit image_size={self.image_size}; set_input_size() changes it"
        torch._assert(height == self.image_size[0], misfit)
        torch._assert(width == self.image_size[1], misfit)

    def _through(self, block: nn.Module, *inputs: Any) -> Tensor:
        """A block's output; under gradient checkpointing it is computed again in the backward pass."""
        return checkpoint(block, *inputs, use_reentrant=False) if self.grad_checkpointing else block(*inputs)

    def _init_weights(self) -> None:
        """Truncated normals of deviation 0.02; convolutions keep torch's own, as in the official codes."""
        if self.cls_token.is_meta:
            return  # shapes alone are asked for, and to fill them with nothing takes a second
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    # ---- timm's contract

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's tools ask of a model; a subclass adds its first convolution, crop and source."""
        return dict(
            input_size=(self.in_chans, *self.image_size), fixed_input_size=True, pool_size=None, num_classes=self.num_classes,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic", classifier="head",
        )  # fmt: skip

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Take images of another size: positions are resized as timm does (bicubic, antialiased, class token kept)."""
        if img_size is None:
            return
        size = knobs.check_image(img_size, self.stride, what=STRIDE)
        before, now = self.positions(self.image_size), self.positions(size)
        for name, (grid, prefix) in now.items():
            if grid == before[name][0]:
                continue  # an optimizer may have it
            old = getattr(self, name)
            resized = resample_abs_pos_embed(old.detach(), list(grid), list(before[name][0]), num_prefix_tokens=prefix)
            setattr(self, name, nn.Parameter(resized, old.requires_grad) if isinstance(old, nn.Parameter) else resized)
        self.image_size = size

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for num_classes (0: none), and another pooling where one is named."""
        if global_pool is not None:
            knobs.check_choice("global_pool", global_pool, GLOBAL_POOLS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.cls_token
        self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear) and not like.is_meta:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.train(self.training)
