"""A causal language model's output head through :func:`halfbyte.nn.linear_cross_entropy`.

:func:`bind_head` gives a model a forward that, where only the label's probability is wanted, evaluates the head at
positions with a label alone and never holds their logits:

- called with ``labels=`` while training, it returns the loss, and ``logits`` is None, as with Liger's kernels;
- called with ``fused_lm_head=True``, it returns TRL's ``FusedCausalLMOutput``. TRL's trainers (1.16:
  ``trl.trainer.utils.add_fused_lm_head``) bind a forward of their own in ``__init__``, which without Triton evaluates
  the head at every position, twice; ours takes its place. (Its closure also holds the model: a deep copy of the model
  would compute with the weights of the original.)

The loss that balances experts, where a router's logits are asked for, is the function beside the model's class.

Anything else goes to the forward that was there before, or TRL's: evaluation, generation, a head that is no linear
layer or that has an adapter, a temperature. A head in 4 or 8 bits is expanded a chunk at a time.

Which families it serves: those whose logits are ``cap tanh(scale W h / cap)``, scale and cap being in the
configuration under a name known here. That is not believed but tried: before its first use the model's own forward runs
over three made-up hidden states, without its layers, and logits and loss must agree. If not, its own forward stays.
"""

import functools
import inspect
import math
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)

from halfbyte.choices import IGNORED
from halfbyte.nn import DenseLinear, Linear4bit, Linear8bit, QuantizedLinear, Scores, linear_cross_entropy
from halfbyte.quant import QuantizedInt8, QuantizedWeight

PLAIN = (nn.Linear, DenseLinear, Linear4bit, Linear8bit)
"""Layers whose forward is known to be the product with their weight."""
BALANCE = "load_balancing_loss_func"
PROBED_LOGIT = 20.0
"""The largest logit of the trial: a soft cap of 30 shows in it."""


@dataclass(frozen=True)
class Head:
    """How a family makes logits of ``W h``: first ``scale``, then the soft ``cap``, if any."""

    scale: float
    cap: float | None


class _Rows(NamedTuple):
    """A linear layer whose weight ``[V, H]`` is put together anew in each step."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def bind_head(model: PreTrainedModel) -> None:
    """Give ``model`` the forward described in this file's head, once; :func:`unbind_head` takes it away."""
    trl_s = _closure_of_trl_s(vars(model).get("forward"))
    if trl_s is not None:
        if trl_s["temperature"] != 1 or trl_s["cast_lm_head_to_fp32"]:
            return
        model.forward = trl_s["original_forward"]
        if getattr(model.forward, "__func__", None) is type(model).forward:
            del model.forward
    if not _is_bound(model):
        # an attribute, so that a copy of the model has its own; several where others bound theirs between ours
        befores = vars(model).setdefault("_halfbyte_befores", [])
        place = len(befores)
        befores.append(vars(model).get("forward"))

        # generate() and PEFT read the arguments from the signature
        @functools.wraps(type(model).forward)
        def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            output = _scored(self, args, kwargs)
            if output is not None:
                return output
            if kwargs.get("fused_lm_head"):
                return _answered_by_trl(self, args, kwargs)
            before = vars(self)["_halfbyte_befores"][place]
            return type(self).forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)

        forward.halfbyte = True  # type: ignore[attr-defined]
        model.forward = types.MethodType(forward, model)


def unbind_head(model: PreTrainedModel) -> None:
    """Undo :func:`bind_head`, if it was the last to bind a forward."""
    if _is_bound(model):
        before = vars(model)["_halfbyte_befores"].pop()
        del model.forward
        if before is not None:
            model.forward = before


def base_of(model: nn.Module) -> nn.Module:
    """Return the model below PEFT's wrapper, if there is one."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def _is_bound(model: PreTrainedModel) -> bool:
    return hasattr(vars(model).get("forward"), "halfbyte")


def _closure_of_trl_s(forward: Any) -> Mapping[str, Any] | None:
    """Return what the forward that TRL bound has in its closure, or None if ``forward`` is another one."""
    utils, function = sys.modules.get("trl.trainer.utils"), getattr(forward, "__func__", None)
    if utils is None or function is None or function.__code__ not in utils.add_fused_lm_head.__code__.co_consts:
        return None
    return inspect.getclosurevars(function).nonlocals


def _answered_by_trl(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let TRL's forward answer this call."""
    from trl.trainer.utils import add_fused_lm_head

    ours = model.forward
    del model.forward
    try:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
        return model.forward(*args, **kwargs)
    finally:
        model.forward = ours


def _scored(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the output for this call, or None if it is not one for this head."""
    inputs = dict(zip(_parameters(type(model)), args, strict=False)) | kwargs  # type: ignore[arg-type]
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    fused = inputs.pop("fused_lm_head", False)
    if (labels is None and shifted is None) or not (fused or model.training):
        return None
    count = inputs.pop("num_items_in_batch", None)
    whole = not isinstance(keep := inputs.pop("logits_to_keep", 0), Tensor) and keep == 0
    balanced = _wants_router_logits(model, inputs)
    if not whole or inputs.pop("return_dict", None) is False or (balanced and _experts_of(model) is None):
        return None
    head = head_of(model)
    if head is None:
        return None

    inputs["use_cache"] = bool(inputs.get("use_cache")) and not fused
    if balanced:
        inputs["output_router_logits"] = True
    outputs = _backbone(model)(**inputs)
    hidden = outputs.last_hidden_state
    if shifted is None:
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        width = labels.shape[1] - 1
    else:
        width = shifted.shape[1]
    scores, mask = _score(_layer_of(model), head, hidden, shifted)
    trained = mask.sum()
    loss = -scores.log_prob.sum() / (trained.clamp(min=1) if count is None else count)
    aux_loss = None
    if balanced:
        balance = vars(sys.modules[type(model).__module__])[BALANCE]
        aux_loss = balance(outputs.router_logits, *_experts_of(model), inputs.get("attention_mask"))
        said = model.config.get_text_config() if fused else model  # TRL writes it into the one, families read the other
        loss = loss + getattr(said, "router_aux_loss_coef", 0.0) * aux_loss
    if not fused:
        told: dict[str, Any] = {"aux_loss": aux_loss, "router_logits": outputs.router_logits} if balanced else {}
        return (MoeCausalLMOutputWithPast if balanced else CausalLMOutputWithPast)(
            loss=loss,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **told,
        )
    from trl.trainer.utils import FusedCausalLMOutput  # takes seconds to import, and only TRL's trainers ask for it

    mask = mask[:, :width]

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(mask.shape).masked_scatter(mask, x)

    return FusedCausalLMOutput(
        loss=loss,
        log_probs=spread(scores.log_prob),
        entropy=spread(scores.entropy),
        log_sum_sq_probs=spread(scores.log_sum_squares),
        mean_logits=spread(scores.mean_logit),
        is_top1=spread(scores.top == shifted.to(mask.device)[:, :width][mask]),
        label_mask=mask,
        aux_loss=aux_loss,
    )


def _score(layer: nn.Linear | _Rows, head: Head, hidden: Tensor, labels: Tensor) -> tuple[Scores, Tensor]:
    """Score ``labels`` ``[B, L]`` at ``hidden`` ``[B, L, H]`` where there are any, and say where: bool ``[B, L]``."""
    hidden, labels = hidden.to(layer.weight.device), labels.to(layer.weight.device)
    weight: Tensor | QuantizedWeight | QuantizedInt8 = layer.weight
    if isinstance(layer, QuantizedLinear):
        hidden, weight = hidden.to(layer.compute_dtype or hidden.dtype), layer.quantized_weight
    mask = labels != IGNORED
    positions = mask.view(-1).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
    targets = labels.reshape(-1).index_select(0, positions)
    return linear_cross_entropy(rows, weight, targets, layer.bias, scale=head.scale, cap=head.cap), mask


def _wants_router_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    configured = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(inputs.get("output_router_logits", configured))


def _experts_of(model: PreTrainedModel) -> Any:
    """Return how many experts there are, and how many a token has, as TRL (1.16) finds them; None where it does not."""
    if BALANCE not in vars(sys.modules[type(model).__module__]):
        return None
    config = model.config.get_text_config()
    found = tuple(getattr(config, name, None) for name in ("num_experts", "num_experts_per_tok"))
    return None if None in found else found


@functools.cache
def _parameters(cls: type[PreTrainedModel]) -> tuple[str, ...]:
    """The names of the forward's arguments, in order, without self."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def head_of(model: PreTrainedModel) -> Head | None:
    """Return how ``model`` makes its logits, or None if that is not known or its head is not a plain linear layer."""
    layer = _layer_of(model)
    if not isinstance(layer, _Rows) and (
        type(layer) not in PLAIN or type(layer.weight) is not nn.Parameter or _is_hooked(layer)
    ):
        return None
    if not hasattr(model, "_halfbyte_head"):
        model._halfbyte_head = _tried(model, layer)
    known: Head | None = model._halfbyte_head
    return known


def _layer_of(model: PreTrainedModel) -> Any:
    """Return the output layer, or what PEFT's wrappers (0.21) put in its place.

    That is the copy of ``modules_to_save`` that its forward would choose, or the weight with the rows of
    ``trainable_token_indices`` replaced, where head and embeddings are tied.
    """
    layer = model.get_output_embeddings()
    if type(layer) not in (ModulesToSaveWrapper, TrainableTokensWrapper, TrainableTokensLayer) or _is_hooked(layer):
        return layer
    names = layer.active_adapters
    if type(layer) is ModulesToSaveWrapper:
        if layer.disable_adapters or not names or any(name not in layer.modules_to_save for name in names):
            return layer.original_module
        return layer.modules_to_save[names[0]]
    tokens = layer.token_adapter if type(layer) is TrainableTokensWrapper else layer
    if tokens.disable_adapters or tokens.merged or not names:
        return tokens.base_layer
    return _Rows(tokens.get_merged_weights(names), getattr(tokens.base_layer, "bias", None))


def _backbone(model: PreTrainedModel) -> nn.Module:
    """Return the base model; Llama 4's text model (transformers 5.23) declares another name than it has."""
    base: nn.Module = model.base_model
    held = getattr(model, "model", None)
    return held if base is model and isinstance(held, PreTrainedModel) else base


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _configured(config: Any) -> Head:
    """Scale and cap by the names that they have in transformers 5 (the same ones that TRL 1.16 reads)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        divides = config.model_type != "hyperclovax"
        scale = 1.0 if scaling is None else 1 / scaling if divides else scaling
    return Head(float(scale), getattr(config, "final_logit_softcapping", None))


def _tried(model: PreTrainedModel, layer: nn.Linear | _Rows) -> Head | None:
    """What the configuration says, if the model's own forward agrees on three hidden states with logits up to 20."""
    if model.config.is_encoder_decoder or _backbone(model) is model:
        return None
    head = _configured(model.config.get_text_config())
    generator = torch.Generator().manual_seed(0)
    weight = layer.weight
    # of a tied copy that PEFT has made, in_features and out_features are exchanged
    rows, width = (layer.out_features, layer.in_features) if isinstance(layer, QuantizedLinear) else weight.shape
    hidden = torch.randn(1, 3, width, generator=generator, dtype=torch.float32).to(weight.device, model.dtype)
    labels = torch.randint(rows, (1, 3), generator=generator).to(weight.device)
    # the model's own dropout may run: random numbers that a run would miss which goes on
    with torch.no_grad(), torch.random.fork_rng(), torch.autocast(weight.device.type, enabled=False):
        largest = float(layer(hidden).abs().max())
        if not 0 < largest < math.inf:
            return None
        hidden *= PROBED_LOGIT / largest
        known = _parameters(type(model))  # type: ignore[arg-type]
        without = {"output_router_logits": False} if "output_router_logits" in known else {}
        try:
            with _returning(_backbone(model), hidden):
                own = type(model).forward(model, input_ids=torch.zeros_like(labels), labels=labels, **without)
            scores, _ = _score(layer, head, hidden, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED))
        except Exception:  # a forward that needs more than ids and hidden states, or 4-bit rows that share a block
            return None
        z = head.scale * layer(hidden).float()
        z = z if head.cap is None else head.cap * torch.tanh(z / head.cap)
        loss = -scores.log_prob.mean()
    # each rounds to the dtype of the head, after other steps
    bound = 0.02 * float(z.abs().max())
    same = own.logits.shape == z.shape and torch.allclose(own.logits.float(), z, rtol=0.02, atol=bound)
    return head if same and torch.allclose(own.loss.float(), loss, rtol=0.02, atol=bound) else None


class _Lenient(BaseModelOutputWithPastAndCrossAttentions):
    """What any family's head reads of its layers' output: None, but for the hidden states."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _returning(backbone: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let ``backbone`` return ``hidden``, whatever it is given."""
    before = vars(backbone).get("forward")
    backbone.forward = lambda *_, **__: _Lenient(last_hidden_state=hidden)
    try:
        yield
    finally:
        del backbone.forward
        if before is not None:
            backbone.forward = before
