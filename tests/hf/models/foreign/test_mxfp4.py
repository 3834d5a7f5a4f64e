"""gpt-oss as it is published, with experts in MXFP4: against transformers' values, quantized as ever."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import halfbyte
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models.dense import dense_model
from halfbyte.hf.models.foreign.mxfp4 import dequantize

IDS = torch.arange(2, 14)[None]
ABOUT = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""As the published config.json has it."""
STACK = "model.layers.1.mlp.experts.down_proj"


def pack(codes: Tensor) -> Tensor:
    """[..., 32 G] to uint8 [..., G, 16]: of two codes the first is in the lower bits."""
    low, high = codes.unflatten(-1, (-1, 16, 2)).unbind(-1)
    return (low + 16 * high).to(torch.uint8)


def meant(code: int, scale: int) -> float:
    """One value by the standard: E2M1 has sign, two bits of exponent (bias 1), one of mantissa; E8M0 an exponent."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return sign * magnitude * 2.0 ** (scale - 127)


def test_every_code_under_every_scale_is_the_standard_s_value() -> None:
    codes = torch.arange(16).repeat(2).expand(255, 1, 32)
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    values = dequantize(pack(codes.flatten(1)), scales)
    wanted = torch.tensor([[meant(int(code), scale) for code in codes[0, 0]] for scale in range(255)])
    assert torch.equal(values, wanted.bfloat16()) and values.dtype == torch.bfloat16
    assert dequantize(pack(codes[:1].flatten(1)), torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


def test_values_are_transformers_own() -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 2), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(dequantize(blocks, scales).transpose(1, 2), theirs)


def write(folder: Path, **shape: int) -> Path:
    """Random weights in the published layout, and beside them what transformers makes of them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 5} | shape
    config = GptOssConfig(
        **sizes, vocab_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts_per_tok=2, pad_token_id=0, architectures=["GptOssForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        forms = GptOssForCausalLM(config).state_dict()
    packed, dense = {}, {}
    for name, form in forms.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = form.shape
            blocks = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 124, (experts, rows, width // 32), dtype=torch.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            if not shape:
                dense[name] = convert_moe_packed_tensors(blocks, scales)
        else:
            packed[name] = dense[name] = (0.2 * torch.randn(form.shape)).bfloat16()
    for where, tensors, about in (("packed", packed, {"quantization_config": ABOUT}), ("dense", dense, {})):
        config.save_pretrained(folder / where)
        file = folder / where / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | about))
        save_file(tensors, folder / where / "model.safetensors", {"format": "pt"})
    return folder / "packed"


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Put these in the place of those of the last layer's ``down_proj``; None takes it out."""
    file = folder / "model.safetensors"
    held = load_file(file) | {f"{STACK}_{part}": value for part, value in tensors.items()}
    save_file({name: value for name, value in held.items() if value is not None}, file, {"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return write(tmp_path)


@pytest.mark.parametrize("how", [{}, {"quant_type": "int8"}, {"double_quant": False, "compute_dtype": "float32"}])
def test_a_copy_has_the_bytes_of_the_dense_model_s(folder: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    config = HalfbyteConfig(**how)
    copies = [quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-q", config) for name in ("packed", "dense")]
    ours, wanted = (load_file(tmp_path / f"{name}-q" / "model.safetensors") for name in ("packed", "dense"))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert copies[0].packed == copies[1].packed and copies[1].error is None
    assert copies[0].error is not None and 0 < copies[0].error < 0.15


def test_a_folder_is_quantized_anew_once_and_opened(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for how in ({}, {"quant_type": "int8", "compute_dtype": "float32"}):
        config = HalfbyteConfig(**how)
        caplog.clear()
        model = halfbyte.load(folder, quantization_config=config)
        told = [text for text in caplog.messages if "rounded a second time, from another grid (MXFP4), " in text]
        assert len(told) == 1 and f" is opened in {config.quant_type}, " in told[0]
        wanted = halfbyte.load(tmp_path / "dense", quantization_config=config)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, wanted(IDS).logits)
        assert model.name_or_path == str(folder)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("model.safetensors")}
    halfbyte.load(folder)
    assert len(made) == 2 and made == {file: file.stat().st_mtime_ns for file in made}


def test_the_dense_model_is_transformers_own(folder: Path, tmp_path: Path) -> None:
    made, wanted = dense_model(folder), dense_model(tmp_path / "dense")
    assert made.tensors == wanted.tensors
    assert all(torch.equal(made.read(name), wanted.read(name)) for name in wanted.tensors)


@pytest.mark.parametrize("onto", ["quantized", "original"])
def test_an_adapter_is_merged_as_onto_the_dense_model(folder: Path, tmp_path: Path, onto: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(GptOssForCausalLM.from_pretrained(tmp_path / "dense"), config)
    merged = []
    for name in ("packed", "dense"):
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / name)
        adapted.save_pretrained(tmp_path / f"{name}-adapter")
        merge(tmp_path / f"{name}-adapter", tmp_path / f"{name}-merged", onto=onto, to="bf16")
        merged.append(load_file(tmp_path / f"{name}-merged" / "model.safetensors"))
        assert "quantization_config" not in json.loads((tmp_path / f"{name}-merged" / "config.json").read_text())
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][key], value) for key, value in merged[1].items())


SCALES = torch.full((5, 64, 3), 120, dtype=torch.uint8)
BLOCKS = torch.zeros((5, 64, 3, 16), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"scales": None}, r"down_proj_scales is missing in .*, beside .*down_proj_blocks, which is \[5, 64, 3, 16\]"),
        ({"blocks": None}, r"down_proj_blocks is missing in .*, beside .*down_proj_scales, which is \[5, 64, 3\]"),
        (
            {"scales": SCALES[:, :, :2].clone()},
            r"down_proj_blocks is \[5, 64, 3, 16\] and .*_scales is \[5, 64, 2\], but MXFP4 has \[experts, rows, gr",
        ),
        ({"scales": SCALES[0].clone()}, r"_blocks is \[5, 64, 3, 16\] and .*_scales is \[64, 3\], but MXFP4 has"),
        (
            {"scales": SCALES[:4].clone(), "blocks": BLOCKS[:4].clone()},
            r"experts\.down_proj is \[4, 96, 64\] in the checkpoint, but config\.json makes it \[5, 96, 64\]",
        ),
        (
            {"scales": SCALES[:, :, :2].clone(), "blocks": BLOCKS[:, :, :2].clone()},
            r"experts\.down_proj is \[5, 64, 64\] in the checkpoint, but config\.json makes it \[5, 96, 64\]",
        ),
        ({"bias": torch.zeros(5, 65)}, r"down_proj_bias is \[5, 65\] in the checkpoint, but config.json .* \[5, 64\]"),
        ({"blocks": BLOCKS.short()}, "down_proj has blocks in torch.int16 and scales in torch.uint8, but MXFP4's are"),
        ({"scales": SCALES + 135, "blocks": BLOCKS}, r"down_proj\.weight holds nan at \[0, 0\] .*: the model is dam"),
    ],
)
def test_damaged_stacks_are_told(folder: Path, tensors: dict[str, Tensor | None], message: str) -> None:
    change(folder, **tensors)
    with pytest.raises(InputError, match=message):
        halfbyte.load(folder)


def test_a_configuration_that_says_mxfp4_of_a_dense_model_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dense" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match=r"are not in MXFP4, as config\.json says they are: no tensor's name ends in"):
        halfbyte.load(tmp_path / "dense")


MEASURE = """
import sys, threading, time
from pathlib import Path
from halfbyte.hf import quantize_checkpoint
from halfbyte.memory import anonymous_memory

small, large, output = sys.argv[1:]
Path(output).mkdir()
quantize_checkpoint(small, output + "/small")
before = peak = anonymous_memory()

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_memory())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
quantize_checkpoint(large, output + "/large")
print(peak - before)
"""


def test_no_more_than_some_experts_are_in_memory(folder: Path, tmp_path: Path) -> None:
    large = write(tmp_path / "large", hidden_size=512, intermediate_size=512, num_local_experts=64)
    stack = 2 * 64 * 512 * 2 * 512  # bytes in 16 bits
    command = [sys.executable, "-c", MEASURE, str(folder), str(large), str(tmp_path / "made")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0 < int(done.stdout) < stack / 2, int(done.stdout) / stack
