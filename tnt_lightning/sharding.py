"""`trainer=fsdp`: weights, gradients, their average and the optimizer's state, shared out among the devices by torch's `fully_shard`.

Lightning's strategy of the name `fsdp` is of the first generation, which neither clips gradients by their norm nor keeps an average; its
strategy for the second one leaves the sharding to the model, which here knows nothing of it.
"""

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tnt_lightning.errors import UserError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Sharded(ModelParallelStrategy):
    """Each device holds a part of every tensor, and has a block whole only while it computes it.

    A checkpoint is whole and one file, as under any other strategy: another one, or another number of devices, goes on with it.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.shard(self.model)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """By the parameters' places in the optimizer's groups, as torch numbers them; nothing but on the first rank."""
        assert self.model is not None
        state: Any = get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer), options=WHOLE)
        place = {name: number for number, name in enumerate(name for group in state.get("param_groups", ()) for name in group["params"])}
        return _renamed(state, place) if state else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path, map_location="cpu", weights_only=True)
        load(self.model, checkpoint["state_dict"])
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            name = dict(enumerate(names[parameter] for group in optimizer.param_groups for parameter in group["params"]))
            named = _renamed(state, name)
            set_optimizer_state_dict(self.model, optimizer, named, options=StateDictOptions(full_state_dict=True, strict=False))
            for parameter in list(optimizer.state):  # torch makes a state for each, also for what was not trained yet
                if names[parameter] not in named["state"]:
                    del optimizer.state[parameter]
        return checkpoint

    def shard(self, module: nn.Module) -> None:
        """A LightningModule's backbone, in place; what else it holds is small and whole on every device."""
        backbone: Any = module.backbone
        if not isinstance(backbone, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            # The outermost too is given back after the forward pass, which in a validation no backward pass follows.
            for block in [*_blocks(backbone), backbone]:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        module.to(self.root_device)


def _renamed(state: dict[str, Any], key: dict[Any, Any]) -> dict[str, Any]:
    """The state of an optimizer, whose parameters have other keys."""
    groups = [{**group, "params": [key[old] for old in group["params"]]} for group in state["param_groups"]]
    return {"state": {key[old]: values for old, values in state["state"].items()}, "param_groups": groups}


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: a list's or a sequence's children that are alike."""
    found = []
    for child in network.children():
        parts = list(child.children())
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(parts) > 1 and len({type(part) for part in parts}) == 1:
            found += [part for part in parts if any(True for _ in part.parameters())]
        else:
            found += _blocks(child)
    return found


def refuse(network: nn.Module) -> None:
    """UserError for a network whose state is not in its parameters alone."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise UserError(
            "trainer.strategy=fsdp: the model keeps running statistics (BatchNorm), which would be another on each device; "
            "trainer.strategy=ddp holds them together"
        )


def part(tensor: Tensor) -> Tensor:
    """What this device holds of a tensor: a part, which may be empty, where it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(module: nn.Module) -> dict[str, Any]:
    """The state of a sharded module in the first rank's memory; nothing on the others, which all have to ask."""
    return get_model_state_dict(module, options=WHOLE)


def load(module: nn.Module, state: dict[str, Any]) -> None:
    """A whole state, which every rank has, into a sharded module."""
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
