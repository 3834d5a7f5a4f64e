"""Adapters on experts that PEFT made, merged and audited, against PEFT's own merge over the 4-bit base's values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import halfbyte
from halfbyte.choices import Onto
from halfbyte.deploy.audit import audit
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf.models.base_weights import BaseWeights
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.verify import verify
from halfbyte.train.rows import rows_again

FP32 = halfbyte.HalfbyteConfig(compute_dtype="float32")
ROWS = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in ("one", "two", "tea", "sun", "ice")]
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_local_experts": 4,
    "num_experts": 4, "initializer_range": 0.1,
}  # fmt: skip


class Case(NamedTuple):
    """An adapter's folder, its base's, rows, and what PEFT makes of base and adapter, in fp32."""

    adapter: Path
    base: Path
    rows: Path
    theirs: Any


@pytest.fixture(params=["Mixtral", "Qwen3Moe", "GptOss"])
def case(
    request: pytest.FixtureRequest,
    tiny_model_folder: Path,
    tmp_path: Path,
    give_values: Callable[[nn.Module, nn.Module], None],
) -> Case:
    tokenizer = t.AutoTokenizer.from_pretrained(tiny_model_folder)
    torch.manual_seed(0)
    more = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = getattr(t, f"{request.param}Config")(**SHAPE | more)
    dense = t.AutoModelForCausalLM.from_config(config).float().eval()
    base, folder, rows = (tmp_path / name for name in ("base", "adapter", "rows.jsonl"))
    dense.save_pretrained(base)
    tokenizer.save_pretrained(base)
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(dense, LoraConfig(r=3, target_modules=["q_proj"], target_parameters=stacks))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    (folder / "base_format.json").write_text('{"quant_type": "nf4", "compute_dtype": "float32"}')
    dense = adapted.unload()
    give_values(halfbyte.load(base, quantization_config=FP32), dense)
    theirs = PeftModel.from_pretrained(dense, folder).merge_and_unload().eval()
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return Case(folder, base, rows, theirs)


def opened(folder: Path) -> Any:
    return t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_in_bf16_each_weight_is_peft_s_sum_rounded_once(case: Case, tmp_path: Path) -> None:
    merge(case.adapter, tmp_path / "merged")
    assert verify(tmp_path / "merged").faults == 0
    wanted = case.theirs.state_dict()
    for name, x in opened(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(x, wanted[name], rtol=2**-8, atol=1e-6, msg=name)
        if "experts" in name:
            assert (x != wanted[name].bfloat16().float()).float().mean() < 1e-2  # sums in another order round elsewhere


@torch.no_grad()
def test_in_4_bits_it_is_verified_and_becomes_dense_again(case: Case, tmp_path: Path) -> None:
    ids = torch.arange(60, 78).view(2, 9)
    wanted = case.theirs(ids).logits
    without = halfbyte.load(case.base, quantization_config=FP32)(ids).logits
    merge(case.adapter, tmp_path / "merged", to="nf4", rounding="outputs", data=[str(case.rows)])
    assert verify(tmp_path / "merged").faults == 0
    merged = halfbyte.load(tmp_path / "merged", quantization_config=FP32)
    held = [name for name, module in merged.named_modules() if isinstance(module, halfbyte.Linear4bit)]
    assert sum(".experts." in name for name in held) in (2 * 4 * 3, 2 * 4 * 2)
    found = merged(ids).logits
    assert (found - wanted).norm() < (without - wanted).norm()
    merged.dequantize(torch.float32).save_pretrained(tmp_path / "dense")
    assert (opened(tmp_path / "dense")(ids).logits - found).norm() <= 1e-5 * found.norm()


@torch.no_grad()
def test_an_audit_s_figures_are_those_of_peft_s_sum(case: Case, tmp_path: Path) -> None:
    report = audit(case.adapter, data=[str(case.rows)], ways=["fp32", "bf16"])
    base, adapter, fp32, bf16 = report.ways
    merge(case.adapter, tmp_path / "merged")
    rows = [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows_of(case)]
    places = sum(int((labels[1:] != -100).sum()) for _, labels in rows)

    def labelled(model: Any) -> tuple[Tensor, Tensor]:
        logits = [model(ids[None]).logits[0, :-1][labels[1:] != -100] for ids, labels in rows]
        return torch.cat(logits).double(), torch.cat([labels[1:][labels[1:] != -100] for _, labels in rows])

    wanted, labels = labelled(case.theirs)
    rounded, _ = labelled(opened(tmp_path / "merged"))
    away = kl_div(rounded.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    assert report.positions == places and adapter.loss == pytest.approx(float(cross_entropy(wanted, labels)), rel=1e-4)
    assert bf16.divergence == pytest.approx(float(away), rel=0.05, abs=1e-6)
    assert abs(fp32.divergence) < 1e-6 and max(fp32.layers) < 1e-3 and base.layers == [1.0, 1.0]


def rows_of(case: Case) -> Any:
    return rows_again(case.adapter, [str(case.rows)], False).train.rows


@pytest.mark.parametrize(
    ("kind", "more", "lost"),
    [
        ("DeepseekV4", {"q_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 32}, "model.norm.weight"),
        ("LongcatFlash", {"num_layers": 1, "expert_ffn_hidden_size": 32, "zero_expert_num": 1}, "experts.down_proj"),
    ],
)
def test_a_model_whose_tensors_are_no_files_tensors_is_not_merged_from_files(
    kind: str, more: dict[str, Any], lost: str, tmp_path: Path
) -> None:
    latent = {"num_key_value_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "n_routed_experts": 4, "moe_topk": 2}
    config = getattr(t, f"{kind}Config")(**SHAPE | latent | {"vocab_size": 64, "pad_token_id": 0} | more)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ways: tuple[Onto, ...] = ("quantized", "original")
    for onto in ways:
        with pytest.raises(
            InputError, match=rf"{lost} from one tensor of its files, but .* call merge_and_unload\(\)\.$"
        ):
            BaseWeights(locate(tmp_path), onto, FP32, torch.float32)
