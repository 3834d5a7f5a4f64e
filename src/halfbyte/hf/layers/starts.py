"""How a LoRA adapter begins, over a base that stays as it is.

PEFT's own initialisations (0.21) that look at the weight do not run over packed ones, and those that begin with another
product than zero take it out of the base. Here the base keeps its bytes, and an adapter opens over them anywhere:

- ``pissa`` (arXiv 2404.02948) and ``olora`` (arXiv 2406.01775) begin with the principal part of the weight, or with the
  first columns of its QR decomposition. That ``s B₀ A₀`` is subtracted in the forward and stays frozen,

      y = x Wᵀ + s dropout(x) Aᵀ Bᵀ - s x A₀ᵀ B₀ᵀ

  (nothing of the last term is dropped, as PEFT drops nothing of the base), and what is saved is plain LoRA of twice
  the rank, ``[A; A₀]`` and ``[B, -B₀]``, which PEFT opens over the same base with the same outputs. The weight is the
  dequantized one, so that a base that lies in 4 bits will do; a layer at a time is dense.
- ``orthogonal`` has ``B A = 0`` with neither of them zero.
- ``loftq`` needs the weight before it is quantized: :mod:`halfbyte.hf.models.loftq`.

Factors are divided by √s each, so that the adapter begins where it should whatever its scale. The weight's length of
DoRA is taken anew.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.nn import FrozenLinear, LowRank
from halfbyte.nn.dora import lengths, squared_lengths
from halfbyte.nn.principal import principal
from halfbyte.options import check_start, is_subtracted

PLAIN = {"default": True, "gaussian": "gaussian"}
"""Those that are PEFT's, and PEFT's word for them."""
OF_WEIGHTS = ("orthogonal", "pissa", "olora")
_NITER = re.compile(r"pissa_niter_(\d{1,2})")
FROZEN = "_start_{}_{}"
"""The frozen factors of a layer, buffers by their letter and the adapter's name, which no file holds as such."""

BEGUN = "_begun"
"""A layer's adapters that began so, by their names: another adapter may come by the name of one that went."""


def initialize(model: PeftModel, name: str, *, adapter: str = "default", seed: int = 0) -> PeftModel:
    """Give a new LoRA adapter the values that it begins with, in place.

    For ``pissa``, ``pissa_niter_N``, ``olora`` and ``orthogonal``; PEFT's LoraConfig takes ``gaussian`` itself, and
    PEFT's ``initialize_lora_eva_weights`` serves ``eva``.

    Args:
        model: what ``get_peft_model`` has returned, over 4-bit weights, its adapter as new.
        name: of the initialisation.
        adapter: which one of the model's adapters.
        seed: of what is random in it.

    Returns:
        The same model.

    Raises:
        InputError: there is no such initialisation, or the adapter has layers that it is not for, or DoRA or a rank
            that does not go with it.
    """
    check_start(name)
    if not name.startswith(OF_WEIGHTS):
        raise InputError(f"initialize is for {', '.join(OF_WEIGHTS)}, not for {name!r}.")
    for path, layer in _layers(model, adapter, name):
        begin(layer, name, adapter=adapter, seed=seed + crc32(path.encode()), path=path)
    if is_subtracted(name):
        save_whole(model)
    return model


def begin(
    layer: LoraLinear, name: str, *, adapter: str, seed: int, path: str = "a layer", as_peft: bool = False
) -> None:
    """Give the new ``adapter`` of one layer over a frozen weight what :func:`initialize` gives each; see there.

    What is subtracted changes the layer alone: :func:`save_whole` is for the model, when all have begun.

    Args:
        path: of the layer, for the sentences.
        as_peft: let olora begin as PEFT's does, with ``B = Q`` and ``A = R`` whatever the scale.
    """
    if is_subtracted(name) and layer.lora_variant.get(adapter):
        raise InputError(f"init_lora_weights {name!r} does not go with use_dora; choose one of them.")
    rank = layer.r[adapter]
    if name == "orthogonal":
        if rank % 2:
            raise InputError(f"init_lora_weights 'orthogonal' needs an even rank, and {path} has rank {rank}.")
        set_factors(layer, adapter, *_orthogonal(layer.out_features, layer.in_features, rank, seed))
        return
    if rank > min(layer.out_features, layer.in_features):
        raise InputError(
            f"init_lora_weights {name!r} has no more directions than a layer is wide, and rank {rank} is larger than "
            f"{path}, of {layer.out_features} by {layer.in_features}; take a lower rank."
        )
    b, a = _of_weight(layer.base_layer.dequantize(torch.float32), rank, name, seed)
    root = 1.0 if as_peft and name == "olora" else math.sqrt(layer.scaling[adapter])
    set_factors(layer, adapter, a / root, b / root)
    _freeze(layer, adapter, a / root, b / root)


def set_factors(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> None:
    """Let ``adapter`` be ``s B A``, and the weight's length that of the sum where it is trained (DoRA)."""
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(a)
        layer.lora_B[adapter].weight.copy_(b)
        if adapter in layer.lora_magnitude_vector:
            weight = layer.base_layer.frozen_weight
            whole = LowRank(a.float(), b.float(), layer.scaling[adapter])
            layer.lora_magnitude_vector[adapter].weight.copy_(lengths(weight, squared_lengths(weight), whole))


@torch.no_grad()
def begin_lengths(model: PeftModel, adapter: str = "default") -> None:
    """Let DoRA begin with the lengths that the frozen weights have; PEFT's are rounded to the weights' 16 bits."""
    for layer in model.modules():
        over_ours = isinstance(layer, LoraLinear) and isinstance(layer.base_layer, FrozenLinear)
        if over_ours and adapter in layer.lora_magnitude_vector:
            set_factors(layer, adapter, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)


def starts_of(layer: LoraLinear, names: list[str]) -> list[LowRank]:
    """Return what is subtracted for the adapters ``names`` of a layer, as terms that are added."""
    begun = vars(layer).get(BEGUN, {})
    return [
        LowRank(
            getattr(layer, FROZEN.format("a", name)), getattr(layer, FROZEN.format("b", name)), -layer.scaling[name]
        )
        for name in names
        if name in begun and begun[name] is layer.lora_A[name]
    ]


def subtracted(layer: LoraLinear, names: list[str], x: Tensor) -> Tensor | None:
    """Return the sum of :func:`starts_of` for ``x [..., in]``, or None where there are none."""
    return summed(starts_of(layer, names), x)


def summed(terms: Sequence[LowRank], x: Tensor) -> Tensor | None:
    """Return ``Σ s x Aᵀ Bᵀ`` of the ``terms`` for ``x [..., in]``, in its dtype; None where there are none."""
    parts = [s * nn.functional.linear(nn.functional.linear(x.to(a), a), b) for a, b, s in terms]
    return sum(parts[1:], parts[0]).to(x.dtype) if parts else None


def has_starts(model: nn.Module) -> bool:
    """Whether anything of ``model`` subtracts what its adapter began with."""
    return any(starts_of(layer, [*layer.lora_A]) for layer in model.modules() if isinstance(layer, LoraLinear))


def untrained(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the factors that are still what is subtracted for them, so that they change nothing."""
    for layer in (layer for layer in model.modules() if isinstance(layer, LoraLinear)):
        for name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            if any(torch.equal(a, term.a) and torch.equal(b, term.b) for term in starts_of(layer, [name])):
                yield from (a, b)


def _layers(model: PeftModel, adapter: str, name: str) -> Iterator[tuple[str, LoraLinear]]:
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        if not isinstance(layer, LoraLinear) or not isinstance(layer.base_layer, FrozenLinear):
            base, path = type(layer.get_base_layer()).__name__, path.removeprefix("base_model.model.")
            raise InputError(
                f"init_lora_weights {name!r} is for frozen linear layers, and {path} ({base}) is none; leave it out "
                f"with exclude_modules {path.rsplit('.', 1)[-1]}, or take the default."
            )
        yield path, layer


def _of_weight(weight: Tensor, rank: int, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return the part of a dense weight with which the adapter begins, ``B [out, rank]`` and ``A [rank, in]``."""
    if name == "olora":
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]
    iterations = _NITER.fullmatch(name)
    return principal(weight, rank, int(iterations[1]) if iterations else None, seed)


def _orthogonal(out: int, width: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B`` with ``B A = 0``, as PEFT (0.21) draws them in ``LoraLayer.orthogonal_init``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    q, _ = torch.linalg.qr(normal(rank, rank))
    return (normal(width, rank // 2) @ q[0::2]).T / 10, normal(out, rank // 2) @ q[1::2] / 10


def _freeze(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> None:
    for letter, factor in (("a", a), ("b", b)):
        layer.register_buffer(FROZEN.format(letter, adapter), factor.clone(), persistent=False)
    vars(layer).setdefault(BEGUN, {})[adapter] = layer.lora_A[adapter]


def make_room(model: PeftModel, adapter: str = "default") -> None:
    """Let the layers subtract nothing yet: :func:`split` brings the factors of a checkpoint."""
    for _, layer in _layers(model, adapter, "pissa"):
        _freeze(layer, adapter, torch.zeros_like(layer.lora_A[adapter].weight), layer.lora_B[adapter].weight.detach())
    save_whole(model)


def split(model: PeftModel, weights: Mapping[str, Tensor], adapter: str = "default") -> dict[str, Tensor]:
    """Return the tensors of an adapter file as ``model`` has them; what was frozen in them goes to its place.

    Args:
        model: with what it subtracts, or room for it.
        weights: by PEFT's names in files.
        adapter: whose they are.
    """
    taken = dict(weights)
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLinear) or not starts_of(layer, [adapter]):
            continue
        rank, names = layer.r[adapter], (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
        if not all(name in taken for name in names) or taken[names[0]].shape[0] != 2 * rank:
            continue
        a, b = (taken[name] for name in names)
        taken[names[0]], taken[names[1]] = a[:rank].contiguous(), b[:, :rank].contiguous()
        _freeze(layer, adapter, a[rank:], -b[:, rank:])
    return taken


class Whole:
    """PEFT's ``save_pretrained`` for a model that subtracts what its adapters began with: as LoRA of twice the rank."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if kwargs.get("path_initial_model_for_weight_conversion"):
            raise InputError(
                "The adapter is saved as plain LoRA already, twice as high in rank: leave "
                "path_initial_model_for_weight_conversion out."
            )
        state = dict(kwargs.pop("state_dict", None) or model.state_dict())
        configs = dict(model.peft_config)
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLinear):
                for name in layer.lora_A:
                    for a, b, _ in starts_of(layer, [name]):
                        keys = [f"{path}.lora_{letter}.{name}.weight" for letter in "AB"]
                        state[keys[0]] = torch.cat([state[keys[0]], a.to(state[keys[0]])])
                        state[keys[1]] = torch.cat([state[keys[1]], -b.to(state[keys[1]])], dim=1)
                        configs[name] = _doubled(model.peft_config[name])
        before, model.peft_config = model.peft_config, configs
        try:
            return type(model).save_pretrained(model, *args, state_dict=state, **kwargs)
        finally:
            model.peft_config = before


def _doubled(config: LoraConfig) -> LoraConfig:
    """Return ``config`` for twice the rank and the same scale."""
    config, times = copy.deepcopy(config), math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= times
    config.rank_pattern = {key: rank * 2 for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: alpha * times for key, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights = True
    return config


def save_whole(model: PeftModel) -> None:
    """Let ``model`` save adapters that subtract what they began with as plain LoRA."""
    model.save_pretrained = Whole(model)
