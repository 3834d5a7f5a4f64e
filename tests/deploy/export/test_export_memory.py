"""An export takes the memory of a few tensors, also where one tensor is most of the model: its embedding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from halfbyte.hf.models.quantize_files import quantize_checkpoint

ROWS, WIDTH = 65_536, 1024
EMBEDDING = 4 * ROWS * WIDTH
"""Bytes of the embedding in fp32; it lies in half of that."""
SCRIPT = """
import sys, threading, time
from pathlib import Path
from halfbyte.deploy.export.exporting import export
from halfbyte.memory import anonymous_memory

small, model, output, form, to = sys.argv[1:]
export(small, Path(output) / "small", format=form, to=to)
before = peak = anonymous_memory()

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_memory())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
export(model, Path(output) / "large", format=form, to=to)
print(peak - before)
"""


def write(folder: Path, rows: int, tokenizer: PreTrainedTokenizerBase) -> Path:
    config = LlamaConfig(
        vocab_size=rows, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=1, num_attention_heads=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    dense = folder / "dense"
    LlamaForCausalLM(config).bfloat16().save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    quantize_checkpoint(dense, folder / "4bit")
    return folder / "4bit"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "to", "most"),
    [
        ("hf", "bf16", 0.5),  # mapped; what the disk's cache gives back is not counted
        ("mlx", "4bit", 0.75),  # codes and what rounding them takes, some rows at a time
        ("gguf", "q4_0", 1.6),  # in fp32, and codes
    ],
)
def test_the_largest_tensor_is_not_there_several_times(
    form: str, to: str, most: float, tiny_model_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    small, large = (write(tmp_path / str(rows), rows, tokenizer) for rows in (len(tokenizer), ROWS))
    command = [sys.executable, "-c", SCRIPT, str(small), str(large), str(tmp_path), form, to]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0 < int(done.stdout) < most * EMBEDDING, int(done.stdout) / EMBEDDING
