"""What a backbone costs: parameters, and FLOPs as the paper counts them (multiply-accumulates)."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tnt_lightning.errors import UserError
from tnt_lightning.models.tnt import TNT


class Parameters(NamedTuple):
    """live: what is trained. paper: what the paper's tables count.

    The official code carries a frozen tensor `outer_tokens` of (1, N, d) that no forward pass reads; the paper counts it
    (0.075 M for TNT-S at 224). It exists in no model here. For other backbones the two are equal.
    """

    live: int
    paper: int


def parameters(model: nn.Module) -> Parameters:
    live = sum(p.numel() for p in model.parameters())
    unused = model.grid_size[0] * model.grid_size[1] * model.embed_dim if isinstance(model, TNT) else 0
    return Parameters(live, live + unused)


def flops(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one image of input_size (channels, height, width), without weights or data.

    UserError where the model does not take such images. Attention is counted as its two matrix products: the fused kernels are not
    seen by torch's counter on every device.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    for module in shadow.modules():
        if hasattr(module, "fused_attn"):  # timm's name, and ours
            module.fused_attn = False  # type: ignore[assignment]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            shadow(torch.empty(1, *input_size, device="meta"))
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(model, TNT) and "overflow" not in str(error):  # it has checked its sizes, but for what torch can count
                raise
            chans, height, width = input_size
            raise UserError(
                f"image_size: the model does not take {chans} x {height} x {width} pixels ({str(error).splitlines()[0]})"
            ) from error
    return counter.get_total_flops() // 2
