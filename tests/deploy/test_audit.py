"""An audit's figures are those of the files that merging writes, computed here anew with transformers alone."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli import app
from halfbyte.deploy import audit as auditing
from halfbyte.deploy.audit import WAYS, audit, in_fp32
from halfbyte.deploy.audit_report import AuditReport, Measured
from halfbyte.deploy.export.llama_library import library
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.evaluate.fidelity import Reference
from halfbyte.files import cache_folder
from halfbyte.train import TrainConfig, fine_tune
from halfbyte.train.rows import rows_again

CACHE = cache_folder()
"""The user's, before the tests have one of their own."""
ROWS = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in ("one", "two", "tea", "sun", "ice")] * 8


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    config = TrainConfig(
        model=str(tiny_model_folder), data=[folder / "rows.jsonl"], output=folder / "run", max_steps=12, rank=4,
        learning_rate=1e-2, eval_share=0.3, eval_samples=0, lora_dropout=0.0,
    )  # fmt: skip
    return fine_tune(config).output


@pytest.fixture(scope="module")
def report(run: Path) -> AuditReport:
    before = sorted(run.rglob("*"))
    found = audit(run)
    assert sorted(run.rglob("*")) == before
    return found


def of(report: AuditReport, name: str) -> Measured:
    return next(way for way in report.ways if way.name == name)


@torch.no_grad()
def labelled(model: Any, row: Any) -> tuple[Tensor, Tensor]:
    ids, labels = (torch.tensor(row[key]) for key in ("input_ids", "labels"))
    places = [i for i in range(1, len(ids)) if labels[i] != -100]
    logits = model(input_ids=ids.unsqueeze(0)).logits[0]
    return logits[[i - 1 for i in places]].double(), labels[places]


def test_every_way_is_measured(report: AuditReport) -> None:
    assert [way.name for way in report.ways] == ["base", "adapter", *WAYS] and not report.left_out


def test_more_bits_of_llama_cpp_lose_less(run: Path, report: AuditReport) -> None:
    more = audit(run, ways=["gguf-q5_1", "gguf-q4_1"]).ways[2:]
    found = [of(report, "gguf-q8_0"), *more]
    assert 1e-6 < found[0].divergence < found[1].divergence < found[2].divergence
    assert found[0].nbytes and found[1].nbytes and found[0].nbytes > found[1].nbytes


@pytest.mark.parametrize("name", ["bf16", "original-bf16", "nf4-outputs", "nf4-again"])
def test_figures_are_those_of_what_is_written(name: str, run: Path, report: AuditReport, tmp_path: Path) -> None:
    if name == "nf4-again":
        merge(run, tmp_path / "dense")
        halfbyte.hf.quantize_checkpoint(tmp_path / "dense", tmp_path / "merged")
    else:
        onto = "original" if name.startswith("original") else "quantized"
        merge(run, tmp_path / "merged", onto=onto, to="nf4" if name.startswith("nf4") else "bf16")
    if name.startswith("nf4"):
        model = halfbyte.load(tmp_path / "merged").dequantize(torch.float32).float()
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    merge(run, tmp_path / "exact", to="fp32")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32)
    evaluation = rows_again(run).evaluation
    assert evaluation
    divergence, loss, agree, right, count = 0.0, 0.0, 0, 0, 0
    for row in evaluation.rows:
        (p, labels), (q, _) = labelled(exact, row), labelled(model, row)
        divergence += float(kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True))
        loss += float(cross_entropy(q, labels, reduction="sum"))
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        right += int((q.argmax(-1) == labels).sum())
        count += len(labels)
    found = of(report, name)
    assert report.positions == count
    assert found.divergence == pytest.approx(divergence / count, rel=2e-2, abs=1e-5)
    assert found.loss == pytest.approx(loss / count, rel=1e-3)
    assert found.agreement == agree / count and found.accuracy == right / count


def test_the_adapter_keeps_all_and_the_base_nothing(report: AuditReport) -> None:
    adapter, base, exact = of(report, "adapter"), of(report, "base"), of(report, "fp32")
    assert adapter.divergence == 0 and adapter.kept == 1 and adapter.agreement == 1
    assert set(adapter.layers) == {0.0} and base.layers == [1.0, 1.0] and base.kept == 0
    assert base.loss > adapter.loss + 0.5
    assert exact.divergence < 1e-5 and exact.kept == pytest.approx(1, abs=1e-4) and max(exact.layers) < 1e-3


def test_ways_that_are_known_to_lose_more_do(report: AuditReport) -> None:
    assert of(report, "fp32").divergence < of(report, "bf16").divergence < of(report, "nf4-random").divergence
    assert of(report, "nf4-outputs").divergence < of(report, "nf4-again").divergence
    lines = report.recommendation
    assert [line.partition(" (")[0] for line in lines][:2] == ["In 16 bits: fp16", "In 8 bits: gguf-q8_0"]
    assert lines[2].startswith("In 4 bits: nf4-")


def test_a_row_of_the_terminal_says_what_the_json_says(run: Path, tmp_path: Path) -> None:
    given = ["audit", str(run), "--way", "bf16", "--way", "nf4-random", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["audit.json", "audit.png"]
    found = AuditReport.model_validate_json((tmp_path / "out" / "audit.json").read_text())
    assert [way.name for way in found.ways] == ["base", "adapter", "bf16", "nf4-random"]
    for way in found.ways:
        assert f"{way.loss:.4f}" in result.output
    assert imread(tmp_path / "out" / "audit.png").ndim == 3


def test_another_file_is_measured_on_and_an_adapter_alone_wants_one(
    run: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "say rye", "completion": "rye rye"}) + "\n")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder), LoraConfig(r=2, target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "alone")
    with pytest.raises(InputError, match=r"is no run of halfbyte, so its data are not known; name some \(--data"):
        audit(tmp_path / "alone")
    for folder in (run, tmp_path / "alone"):
        found = audit(folder, data=[str(tmp_path / "other.jsonl")], ways=["bf16"])
        assert found.rows == "other.jsonl" and found.positions < 20
    assert found.ways[2].kept is None  # B is zero: nothing was learnt
    assert "nothing was learnt of them" in found.recommendation[-1]


def test_a_way_that_is_not_possible_is_left_out_with_its_sentence(
    run: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no way 'nf4-output' \(did you mean 'nf4-outputs'\?\)"):
        audit(run, ways=["nf4-output"])
    halfbyte.hf.quantize_checkpoint(tiny_model_folder, tmp_path / "four")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "four")
    adapted.save_pretrained(tmp_path / "alone")
    data = [str(run.parent / "rows.jsonl")]
    found = audit(tmp_path / "alone", data=data, calibration=data)
    assert sorted(found.left_out) == ["nf4-original", "original-bf16", "original-fp16", "original-fp32"]
    assert all("lies in 4 bits itself" in sentence for sentence in found.left_out.values())
    found = audit(tmp_path / "alone", data=data, ways=["original-bf16"], original=tiny_model_folder)
    assert not found.left_out and len(found.ways) == 3


def test_what_cannot_be_opened_again_is_left_out_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers opens no GGUF of OLMo 2, which llama.cpp computes."""
    opened = auditing._opened

    def fails(folder: Path, *others: Any) -> Any:
        if list(folder.glob("*.gguf")):
            raise InputError("It is not supported yet.")
        return opened(folder, *others)

    monkeypatch.setattr(auditing, "_opened", fails)
    found = audit(run, positions=50)
    assert found.left_out["gguf-q8_0"] == found.left_out["gguf-q4_0"] == "It is not supported yet."
    assert "bf16" in {way.name for way in found.ways}


def test_an_adapter_with_a_value_that_is_none_is_refused_at_once(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "adapter_model.safetensors")
    first = next(iter(weights))
    weights[first] = torch.full_like(weights[first], float("nan"))
    save_file(weights, tmp_path / "nan" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lora_A.* holds nan"):
        audit(tmp_path / "nan")


@pytest.fixture(scope="module")
def wide(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learnt nothing, over a base of rows as others' formats want them."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = halfbyte.load_tokenizer(tiny_model_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "alone")
    return folder / "alone"


def test_mlx_is_opened_as_what_its_codes_stand_for(run: Path, wide: Path) -> None:
    data = [str(run.parent / "rows.jsonl")]
    exact, eight, four = audit(wide, data=data, ways=["fp32", "mlx-8bit", "mlx-4bit"]).ways[2:]
    assert exact.divergence < eight.divergence < four.divergence < 1 and eight.divergence < 0.01


@pytest.mark.slow
@pytest.mark.skipif(find_spec("auto_round") is None, reason="needs auto-round (halfbyte[autoround])")
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_the_forms_of_gptq_and_awq_are_opened(name: str, run: Path, wide: Path) -> None:
    data = [str(run.parent / "rows.jsonl")]
    eight, found = audit(wide, data=data, calibration=data, ways=["gguf-q8_0", name]).ways[2:]
    assert found.name == name and found.nbytes and eight.divergence < found.divergence < 2
    assert found.layers[0] < 50  # as a base that was read wrong would not be


@pytest.mark.slow
@pytest.mark.skipif(library() is None, reason="needs llama.cpp's library in the cache")
def test_k_quants_are_opened(run: Path, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.deploy.export.llama_library.cache_folder", lambda: CACHE)
    data = [str(run.parent / "rows.jsonl")]
    six, four = audit(wide, data=data, ways=["gguf-q6_k", "gguf-q4_k_m"]).ways[2:]
    assert 0 < six.divergence < four.divergence < 1


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_classifiers_and_models_of_two_stacks(family: str, task_folder: Callable[[str], Path], tmp_path: Path) -> None:
    task = "classify" if family == "bert" else "seq2seq"
    rows = (
        [{"text": f"{word} is here", "label": word} for word in ("sun", "rain")] * 10
        if task == "classify"
        else [{"input": f"say {word}", "output": word} for word in ("sun", "rain")] * 10
    )
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = TrainConfig(
        model=str(task_folder(family)), task=task, data=[tmp_path / "rows.jsonl"], output=tmp_path / "run", max_steps=6,
        rank=4, learning_rate=1e-2, eval_samples=0, lora_dropout=0.0,
    )  # fmt: skip
    fine_tune(config)
    found = audit(tmp_path / "run")
    names = [way.name for way in found.ways]
    assert ("nf4-outputs" in names) == (family == "bert") and "nf4-random" in names and "bf16" in names
    assert found.ways[2].divergence < 1e-5 and found.elsewhere == 0
    if family == "t5":
        assert "2 stacks of layers" in found.left_out["nf4-outputs"]
    else:
        merge(tmp_path / "run", tmp_path / "merged", to="fp32")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        table = rows_again(tmp_path / "run").train.rows
        right = sum(
            int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) == int(row["labels"][0])
            for row in table
        )
        assert found.ways[2].accuracy == right / len(table)


def test_in_fp32_a_model_has_its_weights_and_no_rounding_between(run: Path) -> None:
    model, rows = in_fp32(halfbyte.load(run)), rows_again(run).train.rows
    again = Reference(model, [rows[0]]).compare(model)
    assert again.divergence == 0 and again.agreement == 1
    exact = halfbyte.load(run).merge_and_unload().float().eval()
    assert Reference(exact, [rows[0]]).compare(model).divergence < 1e-4


def test_rows_of_any_lengths_are_read_together_as_each_alone(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    other.model.layers[1].mlp.up_proj.weight.data *= 1.3
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 200, 31, 2, 250, 250, 77, 9)  # one group of three, and others
    ids = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
    together = Reference(model, rows).compare(other)
    alone = [Reference(model, [row]).compare(other) for row in rows]
    count = sum(one.positions for one in alone)
    assert together.positions == count == sum(lengths) - len(lengths)
    for name in ("divergence", "loss", "agreement", "accuracy"):
        mean = sum(getattr(one, name) * one.positions for one in alone) / count
        assert getattr(together, name) == pytest.approx(mean, rel=1e-4), name
    assert together.apart == pytest.approx(
        [sum(parts) for parts in zip(*(one.apart for one in alone), strict=True)], rel=1e-3
    )


def test_a_model_with_code_of_its_own_is_audited_where_that_is_allowed(
    own_code: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = own_code(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    config = TrainConfig(
        model=str(base), data=[tmp_path / "rows.jsonl"], output=tmp_path / "run", max_steps=4, rank=4,
        learning_rate=1e-2, lora_dropout=0.0, sample_prompts=[], trust_remote_code=True,
    )  # fmt: skip
    run = fine_tune(config).output
    ways = ("bf16", "nf4-outputs", "nf4-again")
    with pytest.raises(InputError, match=r"comes with code of its own; .* \(--trust-remote-code\)"):
        audit(run, ways=ways)
    report = audit(run, ways=ways, trust_remote_code=True)
    assert of(report, "bf16").kept == pytest.approx(1, abs=0.05)
    assert of(report, "nf4-outputs").divergence < of(report, "nf4-again").divergence
