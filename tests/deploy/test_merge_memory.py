"""A merge takes the memory of a few tensors: here less than a third of what the model is in 16 bits."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

LAYERS, WIDTH, INNER = 14, 2048, 8192
TENSOR = 4 * WIDTH * INNER
"""Bytes of the largest tensor in fp32."""
LIMIT = 9 * TENSOR
"""What a merge may take over what a small one has left, beside files that are mapped: these the system takes back.

torch has 4.75 at once: the base's weight, the sum, B A, magnitudes and marks, with which PEFT looks for infinities.
What the allocator keeps of what was freed comes to it, up to 7.5 as it was seen.
"""
SCRIPT = """
import sys
from halfbyte.deploy.merge import merge

for adapter, output in zip(sys.argv[2::2], sys.argv[3::2]):
    merge(adapter, output, onto=sys.argv[1])
    print("merged", flush=True)
    sys.stdin.readline()
"""


def anonymous(pid: int) -> int:
    """Bytes of memory that a process has and no file holds; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")), 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model whose layers are alike, a file each."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=16,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

    shapes = {f"self_attn.{letter}_proj": (WIDTH, WIDTH) for letter in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    layer = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    layer |= {f"{name}_layernorm.weight": torch.ones(WIDTH).bfloat16() for name in ("input", "post_attention")}
    heads = {"model.embed_tokens.weight": random(1024, WIDTH), "lm_head.weight": random(1024, WIDTH)}
    parts = {"heads.safetensors": heads | {"model.norm.weight": torch.ones(WIDTH).bfloat16()}}
    for n in range(LAYERS):
        parts[f"layer-{n}.safetensors"] = {f"model.layers.{n}.{name}": x for name, x in layer.items()}
    for name, tensors in parts.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    names = {key: name for name, tensors in parts.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    adapter = folder.parent / "adapter"
    LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
        base_model_name_or_path=str(folder),
    ).save_pretrained(adapter)  # fmt: skip
    lora = {}
    for n in range(LAYERS):
        for path, (rows, columns) in {"self_attn.q_proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, INNER)}.items():
            stem = f"base_model.model.model.layers.{n}.{path}"
            lora |= {
                f"{stem}.lora_A.weight": random(8, columns).float(),
                f"{stem}.lora_B.weight": random(rows, 8).float(),
            }
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    yield folder
    shutil.rmtree(folder.parent)


@pytest.mark.slow
@pytest.mark.parametrize("onto", ["quantized", "original"])
def test_a_model_three_times_as_large_as_the_memory_is_merged(
    onto: str, base: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert size > 3 * LIMIT
    adapter = base.parent / "adapter"
    small = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), LoraConfig(task_type="CAUSAL_LM"))
    small.save_pretrained(tmp_path / "small")
    folders = [tmp_path / "small", tmp_path / "small merged", adapter, tmp_path / "merged"]
    command = [sys.executable, "-c", SCRIPT, onto, *map(str, folders)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "merged\n"
        before = peak = anonymous(process.pid)
        process.stdin.write("\n\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.001)
    assert process.returncode == 0
    assert TENSOR < peak - before < LIMIT, (peak - before) / TENSOR
    name = f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"
    merged = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert abs(merged["metadata"]["total_size"] - size) < 1 << 20

    def tensor(folder: Path, file: str, key: str) -> Tensor:
        with safe_open(folder / file, framework="pt") as tensors:
            return tensors.get_tensor(key)

    found = tensor(tmp_path / "merged", merged["weight_map"][name], name).double()
    weight = tensor(base, f"layer-{LAYERS - 1}.safetensors", name).double()
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (tensor(adapter, "adapter_model.safetensors", f"{stem}.lora_{letter}.weight").double() for letter in "AB")
    exact = weight + 2 * b @ a
    if onto == "original":
        assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    else:
        assert 0.05 < float((found - exact).norm() / exact.norm()) < 0.15  # NF4's rounding
    shutil.rmtree(tmp_path)
