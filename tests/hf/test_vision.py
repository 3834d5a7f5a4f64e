"""Models that see: text layers are fused, all else runs as it is, and losses and gradients are plain PEFT's in fp32."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import halfbyte
from halfbyte.hf import describe_layers

IMAGE = 150
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def some_ids() -> Tensor:
    """Two rows of 14 tokens with an image of four tokens in each."""
    ids = torch.randint(3, 140, (2, 14), generator=torch.Generator().manual_seed(1))
    ids[:, 3:7] = IMAGE
    return ids


def gemma3() -> tuple[Any, Any, dict[str, Tensor]]:
    """Whose text attends to an image's tokens in both directions."""
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    text = TEXT | windows | {"head_dim": 16, "query_pre_attn_scalar": 16}
    config = t.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "token_type_ids": (some_ids() == IMAGE).long()}
    return t.Gemma3ForConditionalGeneration, config, inputs


def idefics3() -> tuple[Any, Any, dict[str, Tensor]]:
    text = t.LlamaConfig(**TEXT)
    config = t.Idefics3Config(text_config=text, vision_config=VISION, image_token_id=IMAGE, scale_factor=2)
    return t.Idefics3ForConditionalGeneration, config, {"pixel_values": torch.randn(2, 1, 3, 16, 16)}


def qwen2_vl() -> tuple[Any, Any, dict[str, Tensor]]:
    """With positions in three dimensions."""
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = t.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=151,
        vision_start_token_id=148,
        vision_end_token_id=149,
    )
    inputs = {
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (some_ids() == IMAGE).int(),
    }
    return t.Qwen2VLForConditionalGeneration, config, inputs


PATHS = {
    gemma3: "fused: 2 Gemma3 layers; unfused: SiglipEncoderLayer is not known",
    idefics3: "fused: 2 Llama layers; unfused: Idefics3EncoderLayer is not known",
    qwen2_vl: "unfused: Qwen2VLDecoderLayer is not known; unfused: Qwen2VLVisionBlock is not known",
}


@pytest.mark.parametrize("family", PATHS, ids=lambda family: family.__name__)
def test_loss_and_gradients_are_plain_peft_s(family: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls, config, inputs = family()
    cls(config).save_pretrained(tmp_path)
    quantization = halfbyte.HalfbyteConfig(compute_dtype=torch.float32)
    base = halfbyte.load(tmp_path, quantization_config=quantization, dtype=torch.float32)
    assert type(base) is cls
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    dense.set_attn_implementation("eager")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ours, theirs = get_peft_model(base, lora), get_peft_model(dense, lora)
    adapters = {name: value for name, value in ours.state_dict().items() if "lora_" in name}
    assert not theirs.load_state_dict(adapters, strict=False).unexpected_keys
    halfbyte.prepare_for_training(ours)
    assert describe_layers(ours) == PATHS[family]

    ids, mask = some_ids(), torch.ones(2, 14, dtype=torch.int64)
    mask[0, 11:] = 0
    batch = inputs | {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids == IMAGE, -100)}
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    (loss, got), (wanted, expected) = (step(model, batch) for model in (ours, theirs))
    assert abs(loss - wanted) < 1e-5 * wanted
    assert got.keys() == expected.keys() and any("vision" in name or "visual" in name for name in got)
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    loss = model.train()(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
