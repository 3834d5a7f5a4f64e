"""What is exported for mlx-lm, it opens and computes as transformers computes the same weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from safetensors.torch import load_file

from halfbyte.deploy.export import affine
from halfbyte.deploy.export.exporting import export
from halfbyte.deploy.export.mlx import FAMILIES
from halfbyte.errors import InputError

SIDE = Path(__file__).with_name("mlx_side.py")
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 259, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": 256, "pad_token_id": 257, "initializer_range": 0.2,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
BOTH = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
KINDS = [f"{'sliding' if i % 3 else 'full'}_attention" for i in range(1, 7)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": THETA}),
    "llama, tied, biased": (
        "Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3}
    ),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, head size": ("Llama", {"head_dim": 32, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": THETA}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": THETA}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": THETA}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "rope_parameters": THETA}),
    "phi3": ("Phi3", {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}),
    "gemma": ("Gemma", {"head_dim": 32, "rope_parameters": THETA}),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 48, "rope_parameters": THETA}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "num_hidden_layers": 6, "layer_types": KINDS, "sliding_window": 8, "rope_parameters": BOTH},
    ),
    "olmo2": ("Olmo2", {"rope_parameters": THETA}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 6, "layer_types": KINDS, "sliding_window": 8}),
}  # fmt: skip
IDS = torch.randint(5, 250, (2, 40), generator=torch.Generator().manual_seed(1))
needs_mlx = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import mlx_lm"], capture_output=True).returncode != 0,
    reason="mlx-lm is not for this system",
)


def saved(
    name: str, options: dict[str, Any], folder: Path, tiny_model_folder: Path, dtype: Any = torch.bfloat16
) -> Any:
    """Save a small model with all its values random, and the tiny model's tokenizer."""
    config = getattr(t, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**SHAPE | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(t, f"{name}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.2, mean=0.0 if "Gemma" in name else 1.0)
    model.to(torch.bfloat16).save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)


def by_mlx_lm(*arguments: Any) -> None:
    told = subprocess.run([sys.executable, str(SIDE), *map(str, arguments)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def as_transformers(folder: Path, source: Path, bits: int | None) -> Any:
    """The source's model in fp32, with the weights that the folder holds."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        stem = name.removesuffix("scales")
        held = affine.Affine(tensors.pop(f"{stem}weight"), tensors.pop(name), tensors.pop(f"{stem}biases"))
        tensors[f"{stem}weight"] = affine.dequantize(held, bits or 4)
    model = t.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors = {name: x.float() for name, x in tensors.items()}
    lacking = model.load_state_dict(tensors, strict=False)
    assert not lacking.unexpected_keys and set(lacking.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def test_each_family_that_is_offered_is_tried() -> None:
    assert {f"{name}ForCausalLM" for name, _ in CASES.values()} == set(FAMILIES)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The folder with a model and an export of each case, and the logits that mlx-lm has for it."""
    folder = tmp_path_factory.mktemp("mlx")
    for case, about in CASES.items():
        saved(*about, folder / case, tiny_model_folder)
        export(folder / case, folder / f"{case} mlx", format="mlx")
    np.save(folder / "ids.npy", IDS.numpy())
    by_mlx_lm("logits", folder / "ids.npy", *(folder / f"{case} mlx" for case in CASES))
    return folder


@needs_mlx
@pytest.mark.parametrize("case", CASES)
def test_its_logits_are_those_of_transformers(case: str, opened: Path) -> None:
    with torch.no_grad():
        expected = as_transformers(opened / f"{case} mlx", opened / case, 4)(IDS).logits
    found = torch.from_numpy(np.load(opened / f"{case} mlx.npy"))
    # mlx-lm's Gemma has GELU as it is, not its approximation by tanh
    bound = (1e-3 if case == "gemma" else 2e-4) * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=bound)


@needs_mlx
def test_the_files_are_those_that_mlx_lm_makes_of_the_merged_model(
    tmp_path: Path, tiny_model_folder: Path, adapted: Any
) -> None:
    saved("Llama", {"tie_word_embeddings": True}, tmp_path / "base", tiny_model_folder)
    adapter = adapted(tmp_path / "base")
    export(adapter, tmp_path / "hf", format="hf")
    kinds = {"4bit": 4, "8bit": 8, "bf16": 16}
    by_mlx_lm("convert", tmp_path / "hf", *(x for to, bits in kinds.items() for x in (tmp_path / f"its {to}", bits)))
    for to in kinds:
        export(adapter, tmp_path / to, format="mlx", to=to)
        ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in (to, f"its {to}"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
        told, its = (json.loads((tmp_path / name / "config.json").read_text()) for name in (to, f"its {to}"))
        assert told.get("quantization") == its.get("quantization")
    export(adapter, tmp_path / "fp16", format="mlx", to="fp16")
    assert {x.dtype for x in load_file(tmp_path / "fp16" / "model.safetensors").values()} == {torch.float16}


@needs_mlx
@pytest.mark.slow
def test_a_real_chat_model_answers_as_transformers_over_the_same_weights(tmp_path: Path, smollm2: Path) -> None:
    export(smollm2, tmp_path / "mlx", format="mlx")
    model = as_transformers(tmp_path / "mlx", smollm2, 4)
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "mlx")
    asked = [{"role": "user", "content": "Tell me why the sky is blue."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
    np.save(tmp_path / "ids.npy", ids.numpy())
    by_mlx_lm("answer", tmp_path / "ids.npy", tmp_path / "mlx", 48)
    assert np.load(tmp_path / "mlx.npy").tolist()[: len(expected)] == expected.tolist() and len(expected) > 8


def test_what_mlx_lm_computes_otherwise_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    refused: dict[str, tuple[str, dict[str, Any]]] = {
        "the activation gelu": ("Llama", {"hidden_act": "gelu"}),
        "kind dynamic": ("Llama", {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}}),
        "biases": ("Qwen3", {"attention_bias": True}),
        "final_logit_softcapping 30.0": ("Gemma3", {"final_logit_softcapping": 30.0}),
        "at uneven distances": (
            "Gemma3", {"num_hidden_layers": 4, "layer_types": [KINDS[i] for i in (0, 2, 2, 0)]}
        ),
        "these are: Gemma2ForCausalLM": ("StableLm", {}),
        "groups of 64": ("Llama", {"hidden_size": 32, "intermediate_size": 80}),
    }  # fmt: skip
    for number, (message, (name, options)) in enumerate(refused.items()):
        saved(name, options, tmp_path / str(number), tiny_model_folder)
        with pytest.raises(InputError, match=message):
            export(tmp_path / str(number), tmp_path / "out", format="mlx")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    export(tmp_path / str(number), tmp_path / "out", format="mlx", to="bf16")


def test_a_window_that_mlx_lm_does_not_heed_is_told(tmp_path: Path, tiny_model_folder: Path) -> None:
    for number, (name, options, told) in enumerate([
        ("Mistral", {"sliding_window": 32}, True),
        ("Mistral", {"sliding_window": 256}, False),
        ("Qwen2", {"sliding_window": 32, "use_sliding_window": False}, False),
        ("Qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, True),
    ]):  # fmt: skip
        saved(name, options, tmp_path / str(number), tiny_model_folder)
        made = export(tmp_path / str(number), tmp_path / f"{number} mlx", format="mlx")
        assert bool(made.notes) == told == ("32 tokens" in (made.folder / "README.md").read_text())
