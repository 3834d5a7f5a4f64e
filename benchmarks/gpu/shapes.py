"""Models of given shapes with random 4-bit weights made where they lie, and what a step over them takes.

No checkpoint is read and nothing is quantized: the bytes are drawn, and the constants are such that a layer keeps the
variance of what goes through it. The peer (transformers, peft and bitsandbytes) is built over the very same bytes.
"""

import dataclasses
import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gpu.record import Job
from halfbyte import hf, optim
from halfbyte.hf.layers import activations
from halfbyte.hf.layers.attention_choice import choose_attention
from halfbyte.hf.models.linears import replace_linears
from halfbyte.kernels import Nested, Statistics
from halfbyte.nn import Linear4bit
from halfbyte.nn.cross_entropy import GPU_CHUNK
from halfbyte.quant import QuantizedWeight, codebook

BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight in NF4 with double quantization."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes: layers, channels, those of the MLP, heads, heads of keys, vocabulary, tied head."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool = False

    def config(self) -> LlamaConfig:
        """Return transformers' configuration."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            max_position_embeddings=8192, tie_word_embeddings=self.tied, use_cache=False, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )  # fmt: skip

    def linears(self) -> list[tuple[int, int]]:
        """Return (out, in) of a layer's linear layers."""
        keys = self.width // self.heads * self.key_heads
        attention = [(self.width, self.width), (keys, self.width), (keys, self.width), (self.width, self.width)]
        return [*attention, (self.inner, self.width), (self.inner, self.width), (self.width, self.inner)]

    def tiny(self) -> "Shape":
        """Return the same in so small that a CPU takes a step in a blink."""
        return dataclasses.replace(
            self, name=f"{self.name} (tiny)", layers=2, width=64, inner=128, heads=4,
            key_heads=max(4 * self.key_heads // self.heads, 1), vocabulary=300,
        )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("135M", 30, 576, 1536, 9, 3, 49152, tied=True),  # SmolLM2
        Shape("1B", 16, 2048, 8192, 32, 8, 128256, tied=True),  # Llama 3.2
        Shape("7B", 32, 4096, 11008, 32, 32, 32000),  # Llama
        Shape("8B", 32, 4096, 14336, 32, 8, 128256),  # Llama 3.1
        Shape("33B", 60, 6656, 17920, 52, 52, 32000),
        Shape("65B", 80, 8192, 22016, 64, 64, 32000),
    )
}


def shape(name: str, job: Job) -> Shape:
    """Return a shape, small where the job is."""
    return SHAPES[name].tiny() if job.tiny else SHAPES[name]


def random_weight(out_features: int, in_features: int, generator: torch.Generator) -> QuantizedWeight:
    """Return an NF4 weight of random codes on the generator's device, of variance about ``1 / in``."""
    device, count = generator.device, out_features * in_features
    code, blocks = codebook("nf4", device), -(-count // 64)
    packed = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, device=device, generator=generator)
    size = float(1 / (math.sqrt(in_features) * codebook("nf4", "cpu").square().mean().sqrt()))
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device, generator=generator)
    nested_absmax = torch.full((-(-blocks // 256),), size / 4, device=device)
    statistics = Statistics(absmax, code, 64, Nested(nested_absmax, codebook("dynamic", device), 256, size))
    return QuantizedWeight(packed, statistics, torch.Size((out_features, in_features)), "nf4", torch.bfloat16)


def empty(sizes: Shape) -> Any:
    """Return transformers' model without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(sizes.config(), dtype=torch.bfloat16)


def _fill(model: Any, generator: torch.Generator) -> None:
    """Give everything that is not quantized values on the generator's device."""
    device = generator.device
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            values = values.fill_(1) if parameter.ndim == 1 else values.normal_(0, 0.02, generator=generator)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    model.tie_weights()


def base(sizes: Shape, device: torch.device, seed: int = 0) -> Any:
    """Return the model with our layers over random weights."""
    model, generator = empty(sizes), torch.Generator(device).manual_seed(seed)
    replace_linears(model, ["lm_head"], torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.set_quantized_weight(random_weight(module.out_features, module.in_features, generator))
    _fill(model, generator)
    choose_attention(model)
    return model


def adapted(model: Any, rank: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """Put LoRA on every linear layer but the head, its values drawn where the model lies."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    device = model.model.embed_tokens.weight.device
    model = get_peft_model(model, lora, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        if "lora_" in name:
            values = torch.zeros(parameter.shape, dtype=dtype, device=device)
            if "lora_A" in name:
                values.uniform_(-1, 1, generator=generator).div_(math.sqrt(parameter.shape[1]))
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(values))
    return model.train()


def ours(sizes: Shape, job: Job, rank: int, *, recompute: bool, model: Any = None) -> tuple[Any, optim.AdamW]:
    """Return our model, ready, and its optimizer with 8-bit state."""
    model = hf.prepare(adapted(model or base(sizes, job.device), rank))
    layers = sizes.layers
    activations.apply(model, activations.Policy(0, layers * recompute, layers * (not recompute), 0, 0))
    return model, optim.AdamW(trained(model), lr=1e-3, state_bits=8)


def peer(sizes: Shape, job: Job, rank: int, *, recompute: bool, over: Any) -> tuple[Any, Any]:
    """Return transformers' model over the bytes of our base ``over``, adapted by peft, in its fastest setting.

    That is: bf16 adapters and no autocast, no ``prepare_model_for_kbit_training`` (which makes norms and head fp32),
    bitsandbytes' AdamW8bit; with Liger's kernels in this one model where they are installed.
    """
    from bitsandbytes.nn import Linear4bit as TheirLinear
    from bitsandbytes.nn import Params4bit
    from bitsandbytes.optim import AdamW8bit

    model = empty(sizes)
    owned = dict(over.named_modules())
    for name, module in list(model.named_modules()):
        mine = owned.get(name)
        if isinstance(mine, Linear4bit):
            layer = TheirLinear(mine.in_features, mine.out_features, False, torch.bfloat16, device="meta")
            state = mine.quantized_weight.state_dict("weight")
            packed = state.pop("weight")
            layer.weight = Params4bit.from_prequantized(packed, state, device=job.device, module=layer)
            layer.quant_state = layer.weight.quant_state
            model.set_submodule(name, layer)
        elif module is not model and not list(module.children()):
            for part, _ in list(module.named_parameters(recurse=False)):
                setattr(module, part, getattr(mine, part))
    model.model.rotary_emb = over.model.rotary_emb
    model.tie_weights()
    model.is_loaded_in_4bit = True
    if job.on_gpu and importlib.util.find_spec("liger_kernel"):
        _with_liger(model)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = adapted(model, rank, dtype=torch.bfloat16)
    return model, AdamW8bit(trained(model), lr=1e-3, weight_decay=0.0)


def _with_liger(model: Any) -> None:
    """Liger's kernels in this model; the classes that it also replaces in transformers' module are put back."""
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    before = dict(vars(module))
    patch = importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama
    try:
        patch(rope=False, model=model)
    finally:
        vars(module).update(before)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tokens(sizes: Shape, rows: int, length: int, device: torch.device, seed: int = 2) -> torch.Tensor:
    """Return random tokens, ``[rows, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, sizes.vocabulary, (rows, length), generator=generator).to(device)


def step(model: Any, optimizer: Any, batches: list[torch.Tensor]) -> float:
    """Take an optimizer step over micro-batches and return their mean loss."""
    total = 0.0
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(trained(model), 0.3)
    optimizer.step()
    optimizer.zero_grad()
    return total


def predicted(sizes: Shape, rank: int, rows: int, length: int, *, recompute: bool) -> int:
    """Return the bytes that a step of ours should take at its peak, without the context.

    The base in 4.127 bits, embeddings and head in 16; of each trained value the fp32 weight, its gradient and 2.03
    bytes of state; activations in bf16, of all layers or of one, and its recomputed copy, and every layer's input; the
    largest weight dense, twice; fp32 sums of a gradient; a chunk of the head.
    """
    count = rows * length
    linears = sizes.linears()
    in_4_bits = sizes.layers * sum(n * k for n, k in linears) * BITS / 8
    dense = 2 * sizes.vocabulary * sizes.width * (1 if sizes.tied else 2)
    lora = sizes.layers * rank * sum(n + k for n, k in linears) * (4 + 4 + 2.03)
    keys = linears[1][0]
    layer = 2 * count * (2 * sizes.width + 2 * sizes.width + 2 * keys + 2 * sizes.inner + 7 * rank)
    inputs = 2 * count * sizes.width
    kept = sizes.layers * inputs + 2 * layer if recompute else sizes.layers * layer + layer
    products = 2 * 2 * max(n * k for n, k in linears) + 2 * 4 * count * sizes.width
    head = 4 * 4 * min(GPU_CHUNK, count * sizes.vocabulary) + 3 * 4 * count * sizes.width
    return round(in_4_bits + dense + lora + kept + max(products, head))
