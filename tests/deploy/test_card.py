"""A merged run's card: what hubs read of it, its figures against the run's own, and nothing of this machine's paths."""

import json
from pathlib import Path

import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from halfbyte.deploy.audit import audit
from halfbyte.deploy.card import licence_of
from halfbyte.deploy.merge import merge
from halfbyte.runs.config import TrainConfig
from halfbyte.train import fine_tune


def parts(folder: Path) -> tuple[dict[str, object], str]:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_run_s_card_tells_what_it_came_to_and_no_paths(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}) + "\n" for n in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "held.jsonl").write_text("".join(rows[:2]))
    run = fine_tune(
        TrainConfig.from_yaml(
            None,
            {
                "model": str(tiny_model_folder), "data": [str(tmp_path / "rows.jsonl")], "preset": "quick",
                "eval_data": str(tmp_path / "held.jsonl"), "output": str(tmp_path / "run"), "max_steps": 3, "rank": 4,
                "sample_prompts": ["say ```\n# a"], "max_new_tokens": 4,
            },
        )
    ).output  # fmt: skip
    merge(run, tmp_path / "my-model")
    head, body = parts(tmp_path / "my-model")
    assert head == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["qlora", "lora", "halfbyte"]
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary[key]["loss"] for key in ("evaluation_before", "evaluation"))
    line = next(line for line in body.splitlines() if line.startswith("| loss"))
    assert [float(cell) for cell in line.split("|")[2:4]] == [round(float(f"{x:.4g}"), 6) for x in (before, after)]
    assert "`rows.jsonl`: 8 examples of" in body and "2 held out" in body and "rank: 4" in body
    assert "````\nsay ```\n# a\n````" in body and "merged onto the quantized weights" in body
    assert 'pipeline("text-generation", model="my-model")' in body
    assert str(tmp_path) not in body and str(tiny_model_folder.parent) not in body and "it is a" not in body
    assert "it is a" not in (tmp_path / "my-model" / "config.json").read_text()


def test_an_adapter_without_a_run_has_a_card_too_and_the_base_s_licence(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (base / "LICENSE").write_text("words")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", onto="original")
    head, body = parts(tmp_path / "merged")
    assert head["license"] == "apache-2.0" and "The base's licence is in `LICENSE`." in body
    assert (tmp_path / "merged" / "LICENSE").read_text() == "words" and "# Base" not in body
    for text in ("no head", "---\nlicense: [a, b]\n---\n", "---\n: : :\n---\n", "---\nlicense: 'a b\\n#'\n---\n"):
        (base / "README.md").write_text(text)
        assert licence_of(base) is None


def test_what_the_audit_found_of_this_way_stands_in_the_card(tiny_model_folder: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_model_folder)
    adapted.save_pretrained(tmp_path / "adapter")
    rows = [json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}) + "\n" for n in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    report = audit(tmp_path / "adapter", data=[str(tmp_path / "rows.jsonl")], ways=["bf16"])
    (tmp_path / "adapter" / "audit").mkdir()
    report.write(tmp_path / "adapter" / "audit" / "audit.json")
    for to, is_there in (("bf16", True), ("fp16", False)):
        merge(tmp_path / "adapter", tmp_path / to, to=to)
        _, body = parts(tmp_path / to)
        found = [line for line in body.splitlines() if line.startswith("| this model")]
        assert found == ([f"| this model | {report.ways[2].loss:.4f} | {report.ways[2].accuracy:.1%} | "
            f"{report.ways[2].divergence:.4f} | {report.ways[2].agreement:.1%} |"] if is_there else [])  # fmt: skip
        assert ("## Evaluation" in body) == is_there and str(tmp_path) not in body
    (tmp_path / "adapter" / "audit" / "audit.json").write_text("{")
    merge(tmp_path / "adapter", tmp_path / "damaged")
    assert "## Evaluation" not in parts(tmp_path / "damaged")[1]
