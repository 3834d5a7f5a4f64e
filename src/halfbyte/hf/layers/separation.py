"""Whether a model keeps the samples of a packed row apart: tried, for it depends on every layer of its family.

Attention does where its mask comes from the positions, as with transformers' (5.23) masks. Layers with a state (Mamba,
RWKV, gated linear attention), convolutions over tokens, and masks or positions that a family makes by itself do not.
So two short samples go through the model one behind the other. What the second gives must have no gradient in the
first, not the smallest, and both must give what they give alone, to rounding (which shows wrong positions).
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.hf.layers import attention
from halfbyte.hf.layers.attention_choice import parts_of
from halfbyte.hf.layers.head import base_of

FIRST, SECOND = 7, 9
"""Tokens of the two samples."""
BALANCE = "the loss that balances experts is a mean over micro-batches"
ROUNDING = 0.02
"""Of a token's logits, by norm: other shapes and other companions among experts round otherwise, in bf16 too."""


def obstacle(model: nn.Module, longest: int) -> str | None:
    """Return why samples cannot be packed into one row of ``model``, as a clause, or None.

    Args:
        model: a causal language model; its mode and torch's random state stay as they are.
        longest: tokens of the longest sample.
    """
    name = type(base_of(model)).__name__
    trained = model.training
    try:
        with torch.random.fork_rng(), attention.masks_built() as built:
            separates = _separates(model)
    except Exception as error:  # whatever a family's forward raises at positions that begin anew
        return f"{name} does not take packed rows ({type(error).__name__})"
    finally:
        model.train(trained)
    if not separates:
        return f"the samples of a packed row would see each other in {name}"
    ways = {part.config._attn_implementation for part in parts_of(model)} - {attention.NAME, None}
    if built or ways or needs_mask(next(model.parameters()).device.type, model.config, longest):
        return f"{name} attends with a whole mask, which would be as large as a packed row is long, squared"
    rope = _growing(model, longest)
    return f"{name}'s positions ({rope}) depend on the longest sample of a batch" if rope else None


def packing_obstacle(model: nn.Module, longest: int) -> str | None:
    """Return why a run over ``model`` would not pack, before there is a trainer, as :func:`obstacle` does."""
    config: Any = model.config
    text = config.get_text_config()
    if hasattr(text, "output_router_logits") and getattr(text, "router_aux_loss_coef", None):
        return BALANCE
    return obstacle(model, longest)


def needs_mask(device: str, config: Any, longest: int) -> bool:
    """Tell whether rows of ``longest`` tokens need a whole mask where ``device`` runs short ones without.

    A GPU attends over segments (:mod:`halfbyte.nn.segments`), in which a sliding window must be no narrower; of other
    devices nothing is known.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return device not in ("cpu", "cuda") or (device == "cuda" and window is not None and longest > window)


def _separates(model: nn.Module) -> bool:
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    words, device = min(config.get_text_config().vocab_size, 1000), next(model.parameters()).device
    samples = [torch.randint(words, (1, length), generator=generator).to(device) for length in (FIRST, SECOND)]
    with torch.no_grad():
        model.eval()
        packed = torch.cat([_logits(model, [sample]) for sample in samples])
        if _differ(_logits(model, samples), packed):
            return False
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embeddings: Any = base_of(model)
    hook = embeddings.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            found = _logits(model.train(), samples)[FIRST:]
            [gradient] = torch.autograd.grad(found.square().sum(), embedded)
    finally:
        hook.remove()
    reach = gradient[0].float().abs()
    return bool(reach[:FIRST].max() == 0) and bool(reach[FIRST:].max() > 0)


def _logits(model: nn.Module, samples: list[Tensor]) -> Tensor:
    """Return fp32 ``[T, V]`` of samples ``[1, L]`` one behind the other."""
    positions = torch.cat([torch.arange(sample.shape[1]) for sample in samples])[None].to(samples[0].device)
    output = model(input_ids=torch.cat(samples, 1), position_ids=positions, use_cache=False)
    found: Tensor = output.logits[0].float()
    return found


def _differ(one: Tensor, two: Tensor) -> bool:
    apart = (one - two).norm(dim=-1) / two.norm(dim=-1).clamp(min=1e-12)
    return not bool((apart < ROUNDING).all())


def _growing(model: nn.Module, longest: int) -> str | None:
    """Return a kind of rotary embedding that changes with the largest position of a batch, if it would here."""
    config: Any = model.config
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
            if longest > original:
                return str(parameters["rope_type"])
    return None
