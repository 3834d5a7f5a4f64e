"""A frozen base divided over processes: each holds a part of every layer, and gathers the layer when it runs (FSDP2).

It is for GPUs that cannot hold the base. What is divided is the weights that our linear layers hold in the decoder
layers, nearly all of a model; each decoder layer is a unit of torch's ``fully_shard``, the one that accelerate (1.15)
calls for its FSDP of version 2:

    forward, backward      the layer's bytes are gathered from all N processes, used, and given back
    between                each process holds 1/N of them

The bytes of a 4-bit or 8-bit weight are gathered as a bf16 view of them, as bitsandbytes' ``quant_storage`` has it for
QLoRA under FSDP: before torch 2.13 ``fully_shard`` takes no integers. Nothing computes with the view, and nothing casts
it (no mixed precision is asked of FSDP), so the bytes that come back are those that went. Block constants, norms,
embeddings and the head stay whole in each process.

Why not through accelerate's plugin, which calls the same function: it would divide the adapter too, whose factors,
optimizer state (8 bits, paged) and checkpoints are whole here, and make the head a unit of its own, which our loss
reads without calling it. The adapter stays with DistributedDataParallel, as without FSDP, so a run goes on with or
without it, and with another number of processes.

All processes must run the model at the same time, as often.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.choices import Sharding
from halfbyte.errors import InputError
from halfbyte.hf.layers.head import base_of
from halfbyte.nn import FrozenLinear, QuantizedLinear

AT_ONCE = 3
"""Layers that a GPU may hold whole at a time: one that runs, one that comes, one that goes."""


def shard(model: nn.Module, how: Sharding, device: torch.device) -> None:
    """Divide the base of ``model`` over all processes of the run, in place.

    Args:
        model: with its adapter, ready to train, the same in all processes; in memory or mapped, on a CPU.
        how: ``full_shard`` gives a layer back after its forward and gathers it again for its backward;
            ``shard_grad_op`` keeps it in between, which sends half as much and holds all of the base during a step.
        device: where it is to run; whole, there is never more than one layer on it.

    Raises:
        InputError: the model has no decoder layers of transformers.
    """
    base: Any = base_of(model)
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not any(True for _ in _divided(layers)):
        raise InputError(
            f"fsdp divides decoder layers of transformers, and {type(base).__name__} has none that are held as ours; "
            "leave it out."
        )
    for linear in _divided(layers):
        if isinstance(linear, QuantizedLinear):
            linear.hold_bytes_as(torch.bfloat16)
    divided = {linear.weight for linear in _divided(layers)}
    whole = {parameter for parameter in model.parameters() if parameter not in divided}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        layer.to(device)
        fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=how == "full_shard")
    _place(model, layers, device)
    # The unit around them has no weights of its own: it is what tells the layers of each other, to gather in advance.
    fully_shard(base.base_model, mesh=mesh, ignored_params=whole)
    if getattr(base, "hf_device_map", None):
        base.hf_device_map = {"": str(device)}
    # torch (2.13) fears for in-place operations on what the base returns, which is a view; there are none
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the base of ``model`` is divided, so that all processes have to run it together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of the layers that are whole at a time while a step runs."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return AT_ONCE * max((sum(x.weight.numel() * x.weight.itemsize for x in _divided([y])) for y in layers), default=0)


def _divided(layers: list[GradientCheckpointingLayer]) -> Iterator[FrozenLinear]:
    """Yield the linear layers whose weights are divided."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, FrozenLinear) and not module.weight.requires_grad:
                yield module


def _place(model: nn.Module, layers: list[GradientCheckpointingLayer], device: torch.device) -> None:
    """Bring to ``device`` what is not in ``layers``; parameters that are tied stay so."""
    there = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) in there:
            continue
        if isinstance(module, FrozenLinear):
            module.to(device)
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
