"""A model as mlx-lm opens it: MLX's names, its affine 4 or 8 bits, or 16 bits as they are.

What ``mlx_lm.convert`` makes of a model (0.32, tried beside it): every matrix whose rows have groups of 64 becomes
three tensors, ``NAME.weight`` (codes), ``NAME.scales`` and ``NAME.biases`` (:mod:`halfbyte.deploy.export.affine`),
embedding and head among them; all else stays in 16 bits; ``config.json`` says ``quantization``. Here tensor by tensor,
so that any size fits in memory.

mlx-lm computes a family by its own code, which knows part of what transformers' configurations can say. What it would
compute otherwise is refused: see :data:`FAMILIES` and :func:`mlx_config`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from halfbyte.choices import Onto
from halfbyte.deploy.card import code, write_card
from halfbyte.deploy.export.affine import AT_ONCE, GROUP_SIZE, Affine, dequantize, quantize
from halfbyte.deploy.folders import write_model
from halfbyte.deploy.merge import form_of
from halfbyte.errors import InputError, named
from halfbyte.hf.models.dense import Dense

BITS = {"4bit": 4, "8bit": 8}
DTYPES = {"fp16": torch.float16}
"""What is not bf16."""


@dataclass(frozen=True)
class Family:
    """What mlx-lm (0.32) has of a family.

    Attributes:
        activations: of its MLP, by transformers' names.
        biases: whether its layers may have biases.
        ropes: the kinds of rotary embedding that it computes as transformers does.
        windows: whether it heeds windows of attention.
        uncapped: settings that it does not know, and that must not be there.
    """

    activations: tuple[str, ...] = ("silu",)
    biases: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    windows: bool = False
    uncapped: tuple[str, ...] = ()


GELU = ("gelu_pytorch_tanh",)
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(biases=True),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(biases=True),
    "Qwen3ForCausalLM": Family(),
    "SmolLM3ForCausalLM": Family(biases=True),
    "Phi3ForCausalLM": Family(ropes=("default",)),
    "GemmaForCausalLM": Family(GELU, ropes=("default",)),  # with GELU itself, not its approximation by tanh
    "Gemma2ForCausalLM": Family(GELU, ropes=("default",)),
    "Gemma3ForCausalLM": Family(GELU, windows=True, uncapped=CAPS),
    "Olmo2ForCausalLM": Family(),
    "Olmo3ForCausalLM": Family(windows=True),
}
"""By architecture: those whose files were opened by mlx-lm and gave transformers' logits (tests)."""
LONG = (
    "The model looks back at most {:,} tokens, and mlx-lm (0.32) lets it look back to the beginning: in longer texts "
    "answers differ."
)


@dataclass
class _Error:
    """How far quantized weights are from what they were, ``‖W' − W‖ / ‖W‖`` over all of them."""

    apart: float = 0.0
    size: float = 0.0
    count: int = 0

    def add(self, weight: Tensor, made: Affine, bits: int) -> None:
        rows = max(1, AT_ONCE // weight.shape[1])
        for w, *parts in zip(*(torch.split(x, rows) for x in (weight, *made)), strict=True):
            w = w.float()
            self.apart += float((dequantize(Affine(*parts), bits) - w).square().sum())
            self.size += float(w.square().sum())
        self.count += 1


def dtype_of(to: str) -> torch.dtype:
    """Return what values that are not quantized are in."""
    return DTYPES.get(to, torch.bfloat16)


def write_mlx(
    model: Dense, output: Path, onto: Onto, to: str, progress: Callable[[int, int], None] | None = None
) -> int:
    """Write a dense model for mlx-lm.

    Args:
        model: of the dtype that :func:`dtype_of` gives.
        output: as :func:`halfbyte.deploy.folders.free_folder` gives it.
        onto: which weights an adapter was added to.
        to: ``4bit``, ``8bit``, ``bf16`` or ``fp16``.
        progress: called with tensors done and tensors in all.

    Returns:
        The bytes of all tensors.

    Raises:
        InputError: mlx-lm has no such model, the folder is in use, the disk has no room, or a value is not finite.
    """
    config = mlx_config(model)
    bits = BITS.get(to)
    packed = {name for name, (_, shape, _) in model.tensors.items() if bits and _has_groups(shape)}
    if bits and not packed:
        raise InputError(
            f"No layer's rows have groups of {GROUP_SIZE} values, which MLX's {bits} bits are made of; take --to bf16."
        )
    error = _Error()

    def make(name: str) -> dict[str, Tensor]:
        x, target = model.read(name), model.tensors[name].target
        if bits is None or name not in packed:
            return {target: x}
        made = quantize(x, bits)
        error.add(x, made, bits)
        stem = target.removesuffix("weight")
        return {target: made.codes, f"{stem}scales": made.scales, f"{stem}biases": made.biases}

    def finish(folder: Path) -> None:
        if bits:
            quantization = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
            config.update(quantization=quantization, quantization_config=quantization)
        config["dtype"] = str(dtype_of(to)).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        in_bits = f"MLX's {bits} bits (affine, groups of {GROUP_SIZE})" if bits else f"{to} for MLX"
        lost = math.sqrt(error.apart / max(error.size, 1e-30))
        told = {}
        if bits and error.count == len(packed):
            told["Quantization"] = (
                f"Each of the {len(packed)} quantized matrices was rounded to the nearest code, embedding and head "
                f"among them: `‖W' − W‖ / ‖W‖` over all of them is {lost:.1%}. What that does to answers was not "
                "measured."
            )
        if window := unheeded_window(model):
            told["Long texts"] = LONG.format(window)
        write_card(
            folder, model.adapter, model.base.named, model.base.folder, f"{form_of(model)}, in {in_bits}",
            use=_use(folder.name), library="mlx", quantized=bool(bits), tags=["mlx"],
            sections=told,
        )  # fmt: skip

    sizes = {name: _size(shape, dtype, bits if name in packed else None)
             for name, (_, shape, dtype) in model.tensors.items()}  # fmt: skip
    about = {"format": "mlx", "onto": onto, "to": to}
    return write_model(model, output, about, sizes=sizes, make=make, finish=finish, progress=progress)


def dense_state(folder: Path) -> tuple[dict[str, Tensor], Any]:
    """Return what the weights of a folder in MLX's form stand for, and the configuration of the dense model."""
    form = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization"]
    held = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    state = {name: x for name, x in held.items() if not name.endswith((".scales", ".biases"))}
    for name, codes in state.items():
        stem = name.removesuffix("weight")
        if f"{stem}scales" in held:
            weight = Affine(codes, held[f"{stem}scales"], held[f"{stem}biases"])
            state[name] = dequantize(weight, form["bits"], form["group_size"])
    config = AutoConfig.from_pretrained(folder)
    for key in ("quantization", "quantization_config"):
        config.__dict__.pop(key, None)
    return state, config


def _has_groups(shape: torch.Size) -> bool:
    return len(shape) == 2 and shape[1] % GROUP_SIZE == 0


def _size(shape: torch.Size, dtype: torch.dtype, bits: int | None) -> int:
    values = math.prod(shape)
    return values * dtype.itemsize if bits is None else values * bits // 8 + 2 * values // GROUP_SIZE * dtype.itemsize


def mlx_config(model: Dense) -> dict[str, Any]:
    """Return the configuration as mlx-lm reads it.

    transformers leaves out what is its own default, and has rotary settings in ``rope_parameters`` since version 5;
    mlx-lm has other defaults, and reads for most families what stood there before. So all is written, in both forms.

    Raises:
        InputError: mlx-lm has no such family, or computes it otherwise.
    """
    family = FAMILIES.get(model.architecture)
    if family is None:
        raise InputError(
            f"{model.architecture} is not exported to MLX; these are: {named(sorted(FAMILIES))}. Take --format hf, and "
            "try mlx_lm.convert on that."
        )
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    config["architectures"] = [model.architecture]
    if model.architecture == "Gemma3ForCausalLM":
        types = config["layer_types"]
        config["sliding_window_pattern"] = 1 + types.index("full_attention") if "full_attention" in types else 6
    _check(model, family, config)
    rope = config.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    config["rope_theta"] = whole["rope_theta"]
    config["rope_scaling"] = None
    if "partial_rotary_factor" in whole:
        config["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if whole.get("rope_type", "default") != "default":
        rest = {key: value for key, value in whole.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config["rope_scaling"] = rest | {"type": whole["rope_type"]}
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return config


def unheeded_window(model: Dense) -> int | None:
    """Return how many tokens a model looks back where mlx-lm lets it look back to the beginning, or None."""
    config = model.config
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    applies = "sliding_attention" in types if types else getattr(config, "use_sliding_window", True)
    if FAMILIES[model.architecture].windows or not window or not applies:
        return None
    return int(window) if window < config.max_position_embeddings else None


def _check(model: Dense, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse what mlx-lm would compute otherwise."""
    wrong = []
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in family.activations:
        wrong.append(f"the activation {activation}")
    rope = config.get("rope_parameters") or {}
    for kind in {one.get("rope_type", "default") for one in (rope.values() if "full_attention" in rope else [rope])}:
        if kind not in family.ropes:
            wrong.append(f"rotary embeddings of the kind {kind}")
    if not family.biases and any(planned.target.endswith(".bias") for planned in model.tensors.values()):
        wrong.append("biases")
    wrong += [f"{key} {config[key]}" for key in family.uncapped if config.get(key) is not None]
    if model.architecture == "Gemma3ForCausalLM":
        types, every = config["layer_types"], config["sliding_window_pattern"]
        if types != ["full_attention" if i % every == 0 else "sliding_attention" for i in range(1, len(types) + 1)]:
            wrong.append("layers of full attention at uneven distances")
    if wrong:
        raise InputError(
            f"mlx-lm (0.32) computes {model.architecture} without {named(wrong)}, which this model has; take another "
            "format."
        )


def _use(name: str) -> str:
    lines = [
        "from mlx_lm import generate, load", "", f"model, tokenizer = load({json.dumps(name)})",
        'asked = [{"role": "user", "content": "Your question"}]',
        "prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)",
        "print(generate(model, tokenizer, prompt))",
    ]  # fmt: skip
    install = "On a Mac with Apple silicon `pip install mlx-lm`, elsewhere `pip install 'mlx-lm[cpu]'`:"
    return f"{install}\n\n{code('python', chr(10).join(lines))}"
