"""Which layers are held in 4 bits: what acts as a linear layer; and how much of a model that is."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import quantize_checkpoint, share_in_4bit
from halfbyte.hf.models.linears import is_linear

FALCON = t.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


class Same(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


class Scaled(Same):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class NoisyInTraining(Same):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.training)


class Router(Same):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class WithScale(Same):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(()))


class Turned(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_acts_as_a_linear_layer_is_one(device: str) -> None:
    attention = nn.MultiheadAttention(8, 2)
    with torch.device(device):
        kinds = [
            (nn.Linear(8, 4), True), (nn.Linear(8, 4, bias=False), True), (Conv1D(4, 8), True), (Same(8), True),
            (Turned(4, 8), True), (Scaled(8), False), (NoisyInTraining(8), False), (Router(8), False),
            (WithScale(8), False), (nn.Bilinear(2, 2, 2), False), (attention.out_proj, False),
            (halfbyte.Linear4bit(8, 8), False),
        ]  # fmt: skip
        assert [is_linear(layer) for layer, _ in kinds] == [expected for _, expected in kinds]


@pytest.mark.parametrize("new", [False, True])
def test_falcon_is_held_in_4_bits(tmp_path: Path, new: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = t.FalconConfig(**FALCON.to_dict() | {"new_decoder_architecture": new, "num_kv_heads": 2, "bias": new})
    dense = t.FalconForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "m")
    copy = quantize_checkpoint(tmp_path / "m", tmp_path / "q")
    assert "opens with halfbyte only: transformers with bitsandbytes leaves FalconLinear dense" in caplog.text
    model, again = halfbyte.load(tmp_path / "m"), halfbyte.load(tmp_path / "q")
    layers = [module for module in model.modules() if isinstance(module, halfbyte.Linear4bit)]
    assert len(layers) == 8 and copy.packed == sum(layer.in_features * layer.out_features for layer in layers)
    assert copy.share == share_in_4bit(model) == share_in_4bit(again) > 0.5
    for name, module in model.named_modules():
        if isinstance(module, halfbyte.Linear4bit):
            dense.get_submodule(name).weight.data.copy_(module.quantized_weight.dequantize(torch.float32))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        wanted, got = dense(input_ids=ids).logits, model(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, got)
    assert ((got - wanted).norm() / wanted.norm()).item() < 0.05  # bf16's roundings


def test_a_layer_that_bitsandbytes_left_dense_without_naming_it_stays_so(tmp_path: Path) -> None:
    config = t.FalconConfig(**FALCON.to_dict() | {"num_hidden_layers": 1})
    torch.manual_seed(0)
    t.FalconForCausalLM(config).save_pretrained(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q")
    whole = halfbyte.load(tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    layer = "transformer.h.0.mlp.dense_4h_to_h"
    for name in [name for name in tensors if name.startswith(layer)]:
        del tensors[name]
    tensors[f"{layer}.weight"] = whole.get_submodule(layer).dequantize()
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    model, ids = halfbyte.load(tmp_path / "q"), torch.arange(9)[None]
    assert type(model.get_submodule(layer)).__name__ == "FalconLinear"
    wanted = whole(input_ids=ids).logits.detach()
    assert torch.allclose(model(input_ids=ids).logits, wanted, atol=0.02 * float(wanted.abs().max()))


def test_nothing_in_4_bits_is_an_error(tiny_model_folder: Path, tmp_path: Path) -> None:
    all_of_it = halfbyte.HalfbyteConfig(skip_modules=["model.layers", "lm_head"])
    rwkv = t.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=32, attention_hidden_size=32)
    resnet = t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2)
    t.RwkvForCausalLM(rwkv).save_pretrained(tmp_path / "rwkv")
    t.ResNetModel(resnet).save_pretrained(tmp_path / "resnet")
    halfbyte.load(tmp_path / "rwkv")
    for folder, config in ((tiny_model_folder, all_of_it), (tmp_path / "resnet", halfbyte.HalfbyteConfig())):
        with pytest.raises(InputError, match="has no linear layer that could be held in 4 bits"):
            halfbyte.load(folder, quantization_config=config)
        with pytest.raises(InputError, match="has no linear layer that could be held in 4 bits"):
            quantize_checkpoint(folder, tmp_path / "q", config)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("experts", [0, 4])
def test_the_share_in_4_bits_is_a_count_and_little_is_said(
    experts: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2048,
    }  # fmt: skip
    config = t.MixtralConfig(**shape, num_local_experts=experts) if experts else t.LlamaConfig(**shape)
    dense = t.AutoModelForCausalLM.from_config(config)
    dense.save_pretrained(tmp_path / "m")
    copy = quantize_checkpoint(tmp_path / "m", tmp_path / "q")
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + max(experts, 1) * 3 * 64 * 128)
    share = linear / sum(p.numel() for p in dense.parameters())
    for folder in ("m", "q"):
        caplog.clear()
        model = halfbyte.load(tmp_path / folder)
        assert share_in_4bit(model) == copy.share == share
        (record,) = [record for record in caplog.records if record.name.startswith("halfbyte")]
        assert record.levelno == logging.WARNING and record.message.startswith(f"Only {share:.0%}".replace("%", " %"))
        assert "is the largest" in record.message and "embed_tokens" in record.message
