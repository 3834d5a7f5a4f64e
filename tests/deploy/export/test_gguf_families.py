"""Every family's GGUF file is the model: the real llama.cpp gives transformers' logits, and its greedy tokens.

All is fp32 with a file of f32 (the cache and attention too). With one of f16, llama.cpp rounds the activations that a
matrix is multiplied by to fp16.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from llama import opened
from made_tokenizers import bytes_cut
from made_tokenizers import save as save_words
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

import halfbyte
from halfbyte.deploy.export.gguf import export_gguf
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig
from halfbyte.hf.layers.families import FAMILIES
from halfbyte.hf.models.configs import config_at
from halfbyte.hf.models.dense import dense_model
from halfbyte.hf.models.foreign.gguf import GgufCheckpoint
from halfbyte.hf.models.foreign.gguf_mixture import gguf_tensors
from halfbyte.hf.models.gguf_form.family import FORMS
from halfbyte.hf.models.gguf_form.mixtures import config_of
from halfbyte.hf.models.gguf_form.splits import WAYS
from halfbyte.hf.models.gguf_scale import scaled_by
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.quantize_files import skeleton_of
from halfbyte.nn import QuantizedLinear

F32, F16, TABLE = 1e-4, 3e-2, 3e-3
"""Bounds of the largest difference over the logits' standard deviation; with GELU, which llama.cpp has in a table."""
TOKENS = 60
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 256,
    "pad_token_id": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)], "rope_theta": 10000.0,
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SCALED = {
    "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 0.5,
}  # fmt: skip
OSS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
FOUR = {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128}
TOLD = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 32,
}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama with a head of its own": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("Llama", {"head_dim": 32}),
    "llama 3's positions": ("Llama", {"rope_parameters": LLAMA3}),
    "linear positions": ("Llama", {"rope_parameters": LINEAR}),
    "dynamic positions": ("Llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn with a factor": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "yarn with scales": ("Llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", {"sliding_window": 256, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4}),
    "qwen2 moe": (
        "Qwen2Moe",
        {**EXPERTS, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
    ),
    "qwen3 moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {**EXPERTS, "num_key_value_heads": 4, "norm_topk_prob": False}),
    "granite moe": ("GraniteMoe", {"num_local_experts": 6, "num_experts_per_tok": 2, **SCALED}),
    "granite moe with a shared expert": (
        "GraniteMoeShared",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 64, **SCALED},
    ),
    "gpt-oss": ("GptOss", {**OSS, "rope_parameters": YARN}),
    "gpt-oss in another round": ("GptOss", {**OSS, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}),
    "glm 4.5": ("Glm4Moe", {**TOLD, "use_qk_norm": True, "attention_bias": True, "head_dim": 32}),
    "glm 4.5 air": ("Glm4Moe", {**TOLD, "first_k_dense_replace": 2, "norm_topk_prob": False}),
    "dots1": ("Dots1", {**TOLD, "head_dim": 32, "num_key_value_heads": 4, "layer_types": ["full_attention"] * 4}),
    "llama 4": ("Llama4Text", {**FOUR, "num_hidden_layers": 5}),
    "llama 4 with dense layers": (
        "Llama4Text", {**FOUR, "interleave_moe_layer_step": 2, "rope_parameters": LLAMA3, "num_experts_per_tok": 2},
    ),
    "deepseek v2": ("DeepseekV2", {**TOLD, **LATENT, "topk_method": "greedy", "n_shared_experts": 2}),
    "deepseek v2 lite": ("DeepseekV2", {**TOLD, **LATENT, "q_lora_rank": None, "num_hidden_layers": 27}),
    "deepseek v3": ("DeepseekV3", {**TOLD, **LATENT}),
    "deepseek v3 with groups": ("DeepseekV3", {**TOLD, **LATENT, "n_group": 4, "topk_group": 2}),
    "deepseek v3 with yarn": (
        "DeepseekV3", {**TOLD, **LATENT, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "phi3": ("Phi3", {}),
    "phi4": ("Phi3", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}}),
    # llama.cpp goes by the context that it makes room for, here 256 tokens, transformers by the text, here some 60.
    "phi3 with long positions": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "phi3 with short positions": (
        "Phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 256, "max_position_embeddings": 1024},
    ),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {**GEMMA, "sliding_window": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window": 16, "num_hidden_layers": 7}),
    "gemma3 in another round": (
        "Gemma3", {**GEMMA, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma3 without windows": ("Gemma3", {**GEMMA, "layer_types": ["full_attention"] * 4}),
    "gemma3 with windows alone": (
        "Gemma3", {**GEMMA, "sliding_window": 16, "layer_types": ["sliding_attention"] * 4},
    ),
    "gemma3 with long positions": (
        "Gemma3",
        {
            **GEMMA, "sliding_window": 16, "num_hidden_layers": 6, "final_logit_softcapping": 30.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "olmo": ("Olmo", {"clip_qkv": 1.0}),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}),
    "olmo2, tied": ("Olmo2", {"tie_word_embeddings": True}),
    "olmo3": ("Olmo3", {"sliding_window": 16}),
    "olmo3 with yarn": (
        "Olmo3",
        {
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 0.5,
        },
    ),
}  # fmt: skip
QUICK = ("llama",)
TIPPING = ("glm", "deepseek")
"""Families whose experts weigh alike, so that where fp16's rounding makes one the last that is chosen, logits jump."""


def configured(family: str, options: dict[str, Any]) -> Any:
    """The configuration of a small model."""
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    return config(**{**SHAPE, "vocab_size": 264, **options})


def save(name: str, folder: Path, tokenizer: Path) -> PreTrainedModel:
    """A model of random weights, wide enough that logits are far from each other."""
    family, options = MODELS[name]
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(configured(family, options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, x in model.named_parameters():
            values = torch.randn(x.shape, generator=generator)
            if x.ndim > 1:
                x.copy_(values * (0.5 if "embed" in path else 1.2 / x.shape[-1] ** 0.5))
            else:
                x.copy_(0.2 * values + (1.0 if "norm" in path and "Gemma" not in family else 0.0))
        for path, x in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                x.copy_(0.2 * torch.randn(x.shape, generator=generator))
    model.eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: list[int]) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found.float()


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.std())


IDS = torch.randint(0, 256, (TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()


def test_every_family_that_is_fused_is_tried() -> None:
    tried = {family for family, _ in MODELS.values()}
    assert {family.name for family in FAMILIES.values()} <= tried
    kinds = {getattr(transformers, f"{x}TextConfig" if x == "Gemma3" else f"{x}Config").model_type for x in tried}
    assert kinds == set(FORMS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_llama_cpp_computes_the_model(name: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    model = save(name, tmp_path / "model", tiny_model_folder)
    wanted = logits(model, IDS)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="f32")
    assert set(copy.kinds) == {"f32"}
    with opened(copy.file) as llama:
        assert llama.rows == 264
        found = llama.logits(IDS)
    assert apart(found, wanted) < (TABLE if "gemma" in name else F32)

    if name.startswith(TIPPING):
        return
    half = export_gguf(tmp_path / "model", tmp_path / "half", to="f16")
    with torch.no_grad():
        for path, x in model.named_parameters():
            if x.ndim > 1 and not path.endswith("gate.weight"):  # routers stay f32
                x.copy_(x.half())
    with opened(half.file) as llama:
        greedy(llama, model, IDS[:40], 32)


def greedy(llama: Any, model: nn.Module, ids: list[int], count: int) -> None:
    """Both go on with the same tokens, except where a logit is nearer to the next one than the bound."""
    same = 0
    for _ in range(count):
        wanted = logits(model, ids)[-1]
        found = llama.logits(ids)[-1]
        assert apart(found, wanted) < F16
        first, second = wanted.topk(2).values.tolist()
        if first - second > 2 * F16 * float(wanted.std()):
            assert int(found.argmax()) == int(wanted.argmax())
            same += 1
        ids = [*ids, int(wanted.argmax())]
    assert same >= count / 2


@pytest.mark.parametrize("to", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["llama with biases", "gemma2", "qwen3", "phi3"])
def test_our_reader_gives_the_file_s_values_back_bit_for_bit(
    name: str, to: Any, tmp_path: Path, tiny_model_folder: Path
) -> None:
    model = save(name, tmp_path / "model", tiny_model_folder)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to=to)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    read = GgufCheckpoint(copy.file, skeleton)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[to]
    names = [key for key in model.state_dict() if key != "lm_head.weight" or not model.config.tie_word_embeddings]
    assert sorted(read.names) == sorted(names)
    for key in names:
        x = model.state_dict()[key]
        wanted = x if x.ndim == 1 else x.to(dtype).float()
        if x.ndim == 1 and name.startswith("gemma"):
            wanted = (x + 1) - 1  # as the file's fp32 has it
        assert torch.equal(read.read(key), wanted), key


MIXTURES = [
    name
    for name, (family, options) in MODELS.items()
    if FORMS[configured(family, options).model_type].experts and options.get("rope_parameters") is not LLAMA3
]
UNSAID = {"_name_or_path", "architectures", "dtype", "transformers_version"}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_read_again_bit_for_bit_with_its_configuration(
    name: str, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    model = save(name, tmp_path / "model", tiny_model_folder)
    wanted = dense_model(tmp_path / "model", dtype=torch.float32)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="f32")
    config = config_at(locate(copy.file), False)
    ours, theirs = config.to_dict(), model.config.to_dict()
    unsaid = UNSAID | (
        {"n_group", "topk_group"} if "v2" in name else {"rope_parameters"} if name == "gpt-oss" else set()
    )
    if theirs.get("head_dim") is None:
        unsaid |= {"head_dim"}
    assert {key: ours[key] for key in ours if key not in unsaid and ours[key] != theirs.get(key)} == {}
    read = gguf_tensors(copy.file, skeleton_of(config, torch.float32))
    targets = {planned.target: name for name, planned in wanted.tensors.items()}
    assert sorted(read.names) == sorted(targets)
    for target, key in targets.items():
        assert read.form(target).shape == wanted.tensors[key].shape
        assert torch.equal(read.read(target), wanted.read(key)), key


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("llama 4 with dense layers", "none", None, r"^\S+ is a llama4 with a factor for each frequency"),
        ("deepseek v3", "attention.key_length_mla", None, "before llama.cpp took kv_b_proj apart"),
        ("deepseek v2", "expert_group_count", 4, "chosen in groups, or weighed to a sum of 1, after a softmax"),
    ],
)
def test_what_is_not_read_of_a_mixture_is_told(
    name: str, key: str, value: int | None, message: str, tmp_path: Path, tiny_model_folder: Path
) -> None:
    save(name, tmp_path / "model", tiny_model_folder)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="f16")
    reader = GGUFReader(copy.file)
    fields: dict[str, Any] = dict(reader.fields)
    fields.pop(f"deepseek2.{key}", None)
    if value is not None:
        fields[f"deepseek2.{key}"] = SimpleNamespace(contents=lambda: value)
    with pytest.raises(InputError, match=message):
        config_of(copy.file, fields, frozenset(tensor.name for tensor in reader.tensors))


@pytest.mark.parametrize("name", ["qwen2 moe", "qwen3 moe"])
def test_a_mixture_that_transformers_reads_is_what_it_makes_of_it(
    name: str, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the family's usual width of experts, which transformers takes whatever a file says."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    family, options = MODELS[name]
    usual = {key: value for key, value in options.items() if not key.endswith("_size")} | {"num_hidden_layers": 1}
    monkeypatch.setitem(MODELS, name, (family, usual))
    save(name, tmp_path / "model", tiny_model_folder)
    file = export_gguf(tmp_path / "model", tmp_path / "out", to="q8_0").file
    config = config_at(locate(file), False)
    read = gguf_tensors(file, skeleton_of(config, torch.float32))
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )  # fmt: skip
    for key, x in theirs.state_dict().items():
        if ".experts." not in key:
            wanted = [(key, x)]
        else:
            layers = ("gate_proj", "up_proj") if key.endswith("gate_up_proj") else ("down_proj",)
            path = key.rpartition(".")[0]
            wanted = [
                (f"{path}.{number}.{layer}.weight", part)
                for number, rows in enumerate(x)
                for layer, part in zip(layers, rows.chunk(len(layers)), strict=True)
            ]
        for target, part in wanted:
            assert torch.equal(read.read(target), part), target


def test_gpt_oss_s_own_positions_are_written_with_a_note_and_read_again(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenAI has them, whose ramp llama.cpp rounds."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(MODELS, "own", ("GptOss", OSS | {"rope_parameters": None, "max_position_embeddings": 131072}))
    model = save("own", tmp_path / "model", tiny_model_folder)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="q8_0")
    assert any("ends of YaRN's ramp" in note for note in copy.notes)
    assert config_at(locate(copy.file), False).rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("to", ["bf16", "q8_0", "q4_0"])
def test_of_a_stack_an_expert_is_expanded_to_what_the_package_gguf_makes_of_it(
    to: Any, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    save("gpt-oss in another round", tmp_path / "model", tiny_model_folder)
    dense = dense_model(tmp_path / "model", dtype=torch.float32)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to=to)
    read = gguf_tensors(copy.file, skeleton_of(config_at(locate(copy.file), False), torch.float32))
    held = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(copy.file).tensors}
    sizes = {"bf16": 2**-8, "q8_0": 0.01, "q4_0": 0.15}
    for number in range(4):
        found = read.read(f"model.layers.1.mlp.experts.{number}.gate_up_proj.weight")
        assert torch.equal(found[0::2], held["blk.1.ffn_gate_exps.weight"][number])
        assert torch.equal(found[1::2], held["blk.1.ffn_up_exps.weight"][number])
        targets = {planned.target: name for name, planned in dense.tensors.items()}
        for target in (f"model.layers.1.mlp.experts.{number}.{x}" for x in ("gate_up_proj.weight", "down_proj.bias")):
            wanted = dense.read(targets[target])
            error = float((read.read(target) - wanted).norm() / wanted.norm())
            assert error <= (0.0 if target.endswith("bias") else sizes[to])


@pytest.mark.parametrize(
    "name", [name for name, (family, _) in MODELS.items() if family in ("Qwen3", "Gemma2", "Gemma3")]
)
def test_what_transformers_does_not_read_of_a_file_is_as_the_model_has_it(
    name: str, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide heads of Qwen 3, and by what Gemma's queries are scaled, which transformers takes to be 256."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    model = save(name, tmp_path / "model", tiny_model_folder)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="f32")
    for _ in range(2):  # the second time it is what was kept
        text = config_at(locate(copy.file), False).get_text_config()
        for key in ("head_dim", "query_pre_attn_scalar"):
            assert getattr(text, key, None) == getattr(model.config.get_text_config(), key, None)


@pytest.mark.parametrize(
    ("family", "layers", "width", "heads", "size", "scalar"),
    [("gemma2", 46, 4608, 32, 128, 144), ("gemma3_text", 62, 5376, 32, 128, 168), ("gemma2", 26, 2304, 8, 256, 256)],
)
def test_queries_are_scaled_as_googles_configurations_say(
    family: str, layers: int, width: int, heads: int, size: int, scalar: int
) -> None:
    """Gemma 2 27B, Gemma 3 27B, Gemma 2 2B."""
    config = transformers.AutoConfig.for_model(
        family, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, head_dim=size
    )
    assert scaled_by(config) == scalar


@pytest.mark.filterwarnings("ignore:.*rounded a second time")
def test_the_file_opens_in_halfbyte_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    tokenizer = bytes_cut(WAYS[0])
    model = AutoModelForCausalLM.from_pretrained(save_words(tokenizer, tmp_path / "model"), dtype=torch.bfloat16)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="bf16")
    opened_again = halfbyte.load(copy.file, quantization_config=HalfbyteConfig(quant_type="int8"))
    assert apart(logits(opened_again, IDS), logits(model, IDS)) < 0.2
    again = halfbyte.load_tokenizer(copy.file)
    for text in ("Hello world, it's 12", "<|im_start|>user\nhi<|im_end|>"):
        assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.filterwarnings("ignore:.*rounded a second time")
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt-oss in another round", "deepseek v3"])
def test_a_mixture_opens_in_halfbyte_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts are chosen, since at the edge of the choice a small error makes another one."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    family, options = MODELS[name]
    count = options.get("n_routed_experts") or options.get("num_local_experts") or options["num_experts"]
    tokenizer = bytes_cut(WAYS[0])
    tokenizer.save_pretrained(tmp_path / "words")
    options = options | {"num_experts_per_tok": count, "vocab_size": len(tokenizer)}
    monkeypatch.setitem(MODELS, name, (family, options))
    model = save(name, tmp_path / "model", tmp_path / "words")
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="bf16")
    again = halfbyte.load_tokenizer(copy.file)
    for text in ("Hello world, it's 12", "<|im_start|>user\nhi<|im_end|>"):
        assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    opened_again = halfbyte.load(copy.file, quantization_config=HalfbyteConfig(quant_type="int8"))
    assert type(opened_again) is type(model)
    assert sum(isinstance(module, QuantizedLinear) for module in opened_again.modules()) > 3 * count
    found, wanted = logits(opened_again, IDS), logits(model, IDS)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a family": ("GPTNeoX", {}, "gpt_neox model is not written as GGUF; deepseek_v2, "),
    "experts": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False}, "its norm_topk_prob is False, and True is taken"),
    "layers without experts": (
        "Qwen2Moe", {**EXPERTS, "decoder_sparse_step": 2}, "not all of its layers have experts",
    ),
    "weights that sum to 1": ("Olmoe", {**EXPERTS, "norm_topk_prob": True}, "its norm_topk_prob is True, and False"),
    "grouped keys": ("Olmoe", {**EXPERTS, "norm_topk_prob": False}, "it has 2 heads of keys, and 4 are taken"),
    "clipping": ("Olmoe", {**EXPERTS, "num_key_value_heads": 4, "clip_qkv": 3.0}, r"\(clip_qkv 3.0\)"),
    "a mixer": ("Phimoe", {"num_local_experts": 4}, "A phimoe model is not written as GGUF"),
    "a gate": ("GptOss", {**OSS, "swiglu_limit": 5.0}, "its swiglu_alpha and swiglu_limit are 1.702 and 5.0"),
    "no windows": ("GptOss", {**OSS, "layer_types": ["full_attention"] * 4}, "none of its layers sees a window"),
    "queries of one matrix": ("DeepseekV2", {**TOLD, **LATENT, "q_lora_rank": None}, "is taken not to be Lite"),
    "groups by their best": (
        "DeepseekV2", {**TOLD, **LATENT, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
        "its topk_method is group_limited_greedy",
    ),
    "chunks": ("Llama4Text", {**FOUR, "attention_chunk_size": 16}, "its attention_chunk_size is 16, and 8192 is taken"),
    "layers of experts": ("Llama4Text", {**FOUR, "moe_layers": [0]}, r"its moe_layers is \[0\], and"),
    "halves": ("DeepseekV3", {**TOLD, **LATENT, "rope_interleave": False}, "turns halves"),
    "two mscales": (
        "DeepseekV3", {**TOLD, **LATENT, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        "no other mscale of YaRN than mscale_all_dim for deepseek2",
    ),
    "biases of queries": ("DeepseekV3", {**TOLD, **LATENT, "attention_bias": True}, "deepseek2 has no place for"),
    "an activation": ("Llama", {"hidden_act": "relu"}, "its activation is 'relu'"),
    "a scale": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100, and 32"),
    "no soft caps": ("Gemma2", {**GEMMA, "attn_logit_softcapping": None}, "no soft caps"),
    "layers": (
        "Gemma3", {**GEMMA, "layer_types": ["full_attention", "sliding_attention"] * 2}, "a window follow no rule",
    ),
    "no positions": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 1]}, "not every fourth"),
    "llama 3's positions": ("Qwen2", {"rope_parameters": LLAMA3}, "no positions of the type llama3 for qwen2"),
    "yarn in gemma": (
        "Gemma3",
        {
            **GEMMA, "rope_parameters": {
                "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "no positions of the type yarn for gemma3",
    ),
    "betas": (
        "Llama", {"rope_parameters": YARN | {"beta_slow": 2.0}}, "no other betas of YaRN than 32 and 1 for llama",
    ),
    "biases": ("Qwen3", {"attention_bias": True}, "qwen3 has no place for model.layers.0.self_attn.k_proj.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options, message = REFUSED[name]
    monkeypatch.setitem(MODELS, name, (family, options))
    save(name, tmp_path / "model", tiny_model_folder)
    with pytest.raises(InputError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "out", to="f16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(("name", "options"), [("Mistral", {}), ("Qwen2", {"use_sliding_window": True}), ("Phi3", {})])
def test_a_window_that_llama_cpp_does_not_look_at_is_said(
    name: str, options: dict[str, Any], tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"max_window_layers": 0} if name == "Qwen2" else {}
    monkeypatch.setitem(MODELS, "windowed", (name, {"sliding_window": 16, **options, **more}))
    save("windowed", tmp_path / "model", tiny_model_folder)
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="f16")
    assert "layers see 16 tokens: beyond 16 tokens its answers differ" in copy.notes[0]
    assert copy.notes[0] in (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_classifies_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 258})
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="LlamaForSequenceClassification is no language model"):
        export_gguf(tmp_path / "model", tmp_path / "out")


def test_the_text_part_of_a_model_that_sees_images_is_written(tmp_path: Path, tiny_model_folder: Path) -> None:
    text = {**SHAPE, **GEMMA, "vocab_size": 258, "sliding_window": 16}
    seeing = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=seeing, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for path, x in model.named_parameters():
            if x.ndim > 1 and "language_model" in path:
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(path))) / x.shape[1] ** 0.5)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "model")
    copy = export_gguf(tmp_path / "model", tmp_path / "out", to="f32")
    assert any("sees images is left out" in note for note in copy.notes)
    with opened(copy.file) as llama:
        assert apart(llama.logits(IDS), logits(model, IDS)) < TABLE


def test_the_bound_would_show_a_wrong_file(tmp_path: Path, tiny_model_folder: Path) -> None:
    """What the tests of families compare moves far beyond their bound where rows are not in llama.cpp's order."""
    model = save("llama", tmp_path / "model", tiny_model_folder)
    wanted = logits(model, IDS)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        weight = other.model.layers[3].self_attn.q_proj.weight
        weight.copy_(weight.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64))
    assert apart(logits(other, IDS), wanted) > 20 * F32
