"""How models come in: quantized while read, mapped, refused."""

import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import quantize_checkpoint
from halfbyte.hf.models import shards

MEASURE = """
import re, sys
import torch, transformers, halfbyte
transformers.utils.logging.disable_progress_bar()
halfbyte.load  # imports
def anonymous():
    return int(re.search(r"Anonymous: +(\\d+)", open("/proc/self/smaps_rollup").read())[1]) / 1024
before = anonymous()
model = halfbyte.load(sys.argv[1])
packed = sum(m.weight.nbytes for m in model.modules() if isinstance(m, halfbyte.Linear4bit)) / 2**20
print(anonymous() - before, packed)
"""


def test_a_4_bit_folder_is_mapped(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8, vocab_size=256
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "q")
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "q"], capture_output=True, text=True, check=True)
    anonymous, packed = map(float, done.stdout.split())
    assert packed == 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096) / 2 / 2**20
    # What is left are Python's objects; none of the 16 MiB of weights is among them.
    assert anonymous < packed / 4, done.stdout


PEAK = """
import sys, threading, time
import halfbyte
from halfbyte.memory import anonymous_memory

small, large = sys.argv[1:]
halfbyte.load(small)
before = peak = anonymous_memory()

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_memory())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
model = halfbyte.load(large)
print(peak - before - sum(x.nbytes for x in model.parameters()))
"""


def stacks(folder: Path, kind: str, width: int) -> Path:
    """A model of one layer with 32 experts, in stacks under the model's own names, as gpt-oss publishes them."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64, num_local_experts=32, num_experts_per_tok=2, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["GptOss", "Mixtral"])
def test_no_stack_of_experts_is_in_memory_beside_the_4_bit_model(kind: str, tmp_path: Path) -> None:
    small, large = stacks(tmp_path / "small", kind, 64), stacks(tmp_path / "large", kind, 768)
    stack = 2 * 32 * 768 * 2 * 768  # bytes in 16 bits
    assert max(x.nbytes for x in load_file(large / "model.safetensors").values()) == stack
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < stack / 4, int(done.stdout) / stack


def test_no_user_object_is_changed(tiny_model_folder: Path) -> None:
    config = halfbyte.HalfbyteConfig()
    before = dict(vars(config))
    AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config)
    assert vars(config) == before


def test_the_model_is_never_marked_as_bitsandbytes(tiny_model_folder: Path) -> None:
    model = halfbyte.load(tiny_model_folder)
    assert not getattr(model, "is_loaded_in_4bit", False)
    assert model.config.quantization_config.quant_method == "halfbyte"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compute_dtype_is_what_stays_dense(tiny_model_folder: Path, dtype: torch.dtype) -> None:
    model = halfbyte.load(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {torch.uint8, dtype}


def test_an_fp32_4_bit_folder_leaves_no_fp32_behind(tiny_model_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(str(tiny_model_folder), tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    wide = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in tensors.items()}
    save_file(wide, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    model = halfbyte.load(tmp_path / "q")
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}


def test_shards_are_written_and_opened(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(str(tiny_model_folder), tmp_path / "one")
    monkeypatch.setattr(shards, "SHARD_BYTES", 8192)
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(str(tiny_model_folder), tmp_path / "many", progress=lambda *at: seen.append(at))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and seen[-1][0] == seen[-1][1] == len(seen)
    merged = {key: value for file in files for key, value in load_file(file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert merged.keys() == whole.keys() and all(torch.equal(merged[key], whole[key]) for key in whole)
    ids = torch.arange(6)[None]
    logits = [halfbyte.load(tmp_path / name)(input_ids=ids).logits for name in ("one", "many")]
    assert torch.equal(*logits)


def test_a_folder_without_or_with_a_broken_tokenizer_is_told_in_a_whole_sentence(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_model_folder / "config.json", folder)
    with pytest.raises(
        InputError, match=r"^The folder .*model holds no tokenizer; copy tokenizer\.json .*into it\.$"
    ) as error:
        halfbyte.load_tokenizer(folder)
    assert error.value.__cause__ is not None
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"^The tokenizer of .*model cannot be opened: "):
        halfbyte.load_tokenizer(folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"hidden_size": None}))
    with pytest.raises(InputError, match=r"config\.json cannot be used: .*'hidden_size'.* expected int, got NoneType"):
        halfbyte.load_tokenizer(folder)


def test_a_quantized_copy_brings_its_tokenizer(tiny_model_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(str(tiny_model_folder), tmp_path / "q")
    text = "<|im_start|>user\nhello<|im_end|>"
    ours, source = (halfbyte.load_tokenizer(path) for path in (tmp_path / "q", tiny_model_folder))
    assert ours(text).input_ids == source(text).input_ids
    assert ours.chat_template == source.chat_template


def test_what_cannot_be_opened_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    weightless = tmp_path / "weightless"
    shutil.copytree(tiny_model_folder, weightless)
    (weightless / "model.safetensors").unlink()
    strange = tmp_path / "strange"
    shutil.copytree(tiny_model_folder, strange)
    (strange / "config.json").write_text("{")
    for path, message in [
        (tmp_path / "missing", "There is no folder"),
        (tmp_path / "empty", "holds neither config.json nor"),
        (tmp_path / "file", "is a file"),
        (broken, r"broken/model\.safetensors cannot be read .* damaged or incomplete"),
        (weightless, r"holds no weights of a model: neither model\.safetensors nor pytorch_model\.bin is there"),
        (strange, r"strange/config\.json cannot be read \(.*line 1.*\): it is not JSON"),
    ]:
        with pytest.raises(InputError, match=message) as told:
            halfbyte.load(path)
        assert "\n" not in str(told.value)


def test_what_cannot_be_quantized_is_told_and_leaves_nothing(tiny_model_folder: Path, tmp_path: Path) -> None:
    source = str(tiny_model_folder)
    quantize_checkpoint(source, tmp_path / "q")
    with pytest.raises(InputError, match="is there already"):
        quantize_checkpoint(source, tmp_path / "q")
    with pytest.raises(InputError, match="quantized already"):
        quantize_checkpoint(str(tmp_path / "q"), tmp_path / "r")
    with pytest.raises(InputError, match="would be the model itself; choose one of nf4"):
        quantize_checkpoint(source, tmp_path / "r", halfbyte.HalfbyteConfig(quant_type="none"))
    with pytest.raises(InputError, match="is the model's own"):
        quantize_checkpoint(source, source, overwrite=True)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="damaged or incomplete"):
        quantize_checkpoint(str(broken), tmp_path / "r")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "q"]


def test_what_a_killed_process_left_is_put_right_before_the_output_is_looked_at(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "q")
    part = tmp_path / f".q.{uuid.uuid4().hex}.part"  # killed between the two renames of a swap
    part.mkdir()
    (part / "q.lock").touch()
    (tmp_path / "q").rename(part / "q.old")
    with pytest.raises(InputError, match="is there already"):
        quantize_checkpoint(tiny_model_folder, tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    halfbyte.load(tmp_path / "q")


def test_an_interrupted_quantization_leaves_nothing(tiny_model_folder: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(tiny_model_folder), tmp_path / "q", progress=stop)
    assert not list(tmp_path.iterdir())


def test_overwriting_replaces_the_folder(tiny_model_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(str(tiny_model_folder), tmp_path / "q")
    (tmp_path / "q" / "extra").write_text("x")
    fp4 = halfbyte.HalfbyteConfig(quant_type="fp4", double_quant=False)
    quantize_checkpoint(str(tiny_model_folder), tmp_path / "q", fp4, overwrite=True)
    assert not (tmp_path / "q" / "extra").exists()
    about = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert about["bnb_4bit_quant_type"] == "fp4" and about["bnb_4bit_use_double_quant"] is False
    layer = next(m for m in halfbyte.load(tmp_path / "q").modules() if isinstance(m, halfbyte.Linear4bit))
    assert layer.quant_type == "fp4" and not layer.quantized_weight.double_quant


def test_a_configuration_that_does_not_fit_the_weights_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(str(tiny_model_folder), tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"].append("mlp.gate_proj")
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError,
        match=r"mlp\.gate_proj\.weight is 4-bit in the checkpoint, but .* makes it dense: llm_int8_skip_modules",
    ):
        halfbyte.load(tmp_path / "q")


def test_dequantize_gives_a_dense_model(tiny_model_folder: Path) -> None:
    model = halfbyte.load(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    ids = torch.arange(6)[None]
    logits = model(input_ids=ids).logits
    dense = model.dequantize()
    assert not any(isinstance(module, halfbyte.Linear4bit) for module in dense.modules())
    torch.testing.assert_close(dense(input_ids=ids).logits, logits)
