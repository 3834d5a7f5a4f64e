"""Which layers of a model are held in 4 or 8 bits: what acts as a linear layer, without heads and what is read by hand.

A subclass of ``nn.Linear`` (Falcon's) is a linear layer if it acts as one: it is tried on a small input. A router that
returns indices too, or a layer of groups, is not.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte.hf.layers.experts import Experts
from halfbyte.nn import DenseLinear, FrozenLinear, Linear4bit, Linear8bit, QuantizedLinear

# Linear layers whose weight the model (of transformers 5.23) multiplies by hand, or rewrites in evaluation (RWKV), so
# that it has to stay dense: by the ends of their names, and the model's type where the name says too little.
READ_DIRECTLY = ("dt_proj",)
ROUTERS = ("shared_expert_gate", "router.classifier")
"""Linear layers that decide how much an expert counts, by the ends of their names: dense, and adapted by nobody."""
REWRITTEN = {"rwkv": ("attention.output", "feed_forward.value")}


LAYERS: dict[int, type[Linear4bit | Linear8bit]] = {4: Linear4bit, 8: Linear8bit}
"""The layer for so many bits."""


def replace_linears(
    model: nn.Module, skip: list[str], compute_dtype: torch.dtype, packed: set[str] | None = None, bits: int | None = 4
) -> list[str]:
    """Put an empty :class:`Linear4bit` in the place of every linear layer (``nn.Linear``, ``Conv1D``) not in ``skip``.

    In 8 bits it is a :class:`Linear8bit`; without bits a plain ``nn.Linear`` becomes a :class:`DenseLinear`, whose
    weight is where it was.

    Args:
        model: in place.
        skip: names, in the patterns of transformers.
        compute_dtype: of the new layers.
        packed: the weights that a checkpoint holds quantized; of subclasses and of experts only these are replaced,
            since bitsandbytes leaves them dense without naming them. None for a dense checkpoint.
        bits: 4, 8 or None.

    Returns:
        The names of the layers.
    """
    replaced = []
    of_experts = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Experts))
    for name, module in list(model.named_modules()):
        if not should_convert_module(name, skip) or not is_linear(module):
            continue
        if bits is None:
            if type(module) is nn.Linear:
                DenseLinear.taking(module, compute_dtype)
                replaced.append(name)
            continue
        is_of_expert = bool(of_experts) and name.startswith(of_experts)
        if packed is not None and (is_subclass(module) or is_of_expert) and f"{name}.weight" not in packed:
            if is_of_expert:
                DenseLinear.taking(module, compute_dtype)
            continue
        transposed = isinstance(module, Conv1D)
        out_features, in_features = reversed(module.weight.shape) if transposed else module.weight.shape
        layer = LAYERS[bits](
            in_features, out_features, module.bias is not None, compute_dtype=compute_dtype, device="meta"
        )
        layer.bias = module.bias
        layer.transposed = transposed
        layer.requires_grad_(False)
        model.set_submodule(name, layer)
        replaced.append(name)
    return replaced


def left_dense(model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers to leave dense besides what transformers leaves.

    Task heads (all that is outside the base model) are often new and to be trained; some weights are read directly.
    """
    inside = {id(module) for module in model.base_model.modules()}
    by_hand = READ_DIRECTLY + ROUTERS + REWRITTEN.get(model.config.model_type, ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and (id(module) not in inside or name.endswith(by_hand))
    ]


def is_subclass(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that bitsandbytes' integration in transformers (5.23) leaves dense."""
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes what ``nn.Linear`` or ``Conv1D`` does, whatever its class, from nothing else."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear | Conv1D) or isinstance(
        module, FrozenLinear | nn.modules.linear.NonDynamicallyQuantizableLinear
    ):
        return False  # the last is nn.MultiheadAttention's, which reads its weight directly
    own = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return own <= {"weight", "bias"} and all(_acts_as_linear(module, training) for training in (False, True))


def _acts_as_linear(module: nn.Linear | Conv1D, training: bool) -> bool:
    """Try the forward of ``module`` over small weights in its place."""
    inputs, outputs = 3, 5
    transposed = isinstance(module, Conv1D)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        for shape in ((2, 4, inputs), (outputs, inputs), (outputs,))
    )
    small = copy.copy(module)
    held = weight.T if transposed else weight
    small.__dict__ |= {
        "_parameters": {"weight": held, "bias": bias if module.bias is not None else None},
        "in_features": inputs, "out_features": outputs, "nx": inputs, "nf": outputs, "training": training,
    }  # fmt: skip
    wanted = nn.functional.linear(x, weight, bias if module.bias is not None else None)
    try:
        y = type(module).forward(small, x.clone())
    except Exception:  # foreign code over other sizes: whatever it raises, it is not a linear layer
        return False
    return isinstance(y, torch.Tensor) and y.shape == wanted.shape and torch.allclose(y, wanted, atol=1e-5)


def not_linear(model: nn.Module) -> list[str]:
    """Return the names of layers that PEFT (0.21) takes for linear ones by their class, though they act otherwise.

    They are routers that return indices too (Llama 4, Phi-3.5-MoE): not to be adapted (``exclude_modules``), nor is
    what decides by one value how much a shared expert counts, or a layer whose weight the dense model reads directly
    (Jamba's ``dt_proj``): there an adapter over it does nothing.
    """
    return [
        name
        for name, module in model.named_modules()
        if name.endswith(READ_DIRECTLY + ROUTERS)
        or (is_subclass(module) and not isinstance(module, FrozenLinear) and not is_linear(module))
    ]


def share_in_4bit(model: nn.Module) -> float:
    """Return which part of a model's weights is held in 4 bits, counted by values, without adapters."""
    return _share(model, Linear4bit)


def share_quantized(model: nn.Module) -> float:
    """Return which part of a model's weights is held in 4 or 8 bits, counted by values, without adapters."""
    return _share(model, QuantizedLinear)


def bits_of(model: nn.Module) -> int | None:
    """Return how many bits the model's quantized weights are held in, or None where there are none."""
    kinds = {type(module) for module in model.modules()}
    return next((bits for bits, layer in LAYERS.items() if layer in kinds), None)


def describe_base(model: nn.Module) -> str:
    """Return what a model's weights are held in, for a run's log: ``83% of them in 4 bits``."""
    bits = bits_of(model)
    if bits is None:
        dtypes = {module.weight.dtype for module in model.modules() if isinstance(module, DenseLinear)}
        return f"all of them dense, in {' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
    again = getattr(model, "rounded_again", None)  # of another's number format (hf/models/converted.py)
    return f"{share_quantized(model):.0%} of them in {bits} bits{f', {again}' if again else ''}"


def largest_dense(model: nn.Module) -> str:
    """Return the name of the largest weight that is not quantized."""
    dense = _counts(model, QuantizedLinear)[1]
    return max(dense, key=lambda name: dense[name])


def dense_stacks(model: nn.Module) -> list[str]:
    """Return the names of stacks of experts that were not taken apart, so that nothing of them is quantized."""
    return [name for name, x in model.named_parameters() if x.ndim == 3 and "expert" in name]


def _share(model: nn.Module, kind: type[QuantizedLinear]) -> float:
    packed, dense = _counts(model, kind)
    return packed / max(packed + sum(dense.values()), 1)


def _counts(model: nn.Module, kind: type[QuantizedLinear]) -> tuple[int, dict[str, int]]:
    """Return how many values are in layers of this ``kind``, and how many each other parameter has."""
    layers = [module for module in model.modules() if isinstance(module, kind)]
    weights = {id(layer.weight) for layer in layers}
    dense = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in weights and ".lora_" not in name and ".modules_to_save." not in name
    }
    return sum(layer.in_features * layer.out_features for layer in layers), dense
