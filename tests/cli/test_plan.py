"""``halfbyte plan`` as its users see it: what it prints, the options it says to add, bad input."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as t

from halfbyte import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run ``halfbyte plan`` with stated rates; returns exit code, standard output and standard error."""

    def plan(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfbyte", "plan", *map(str, words), "--stated"])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0), *capfd.readouterr()

    return plan


def test_a_plan_without_data_tells_memory_time_and_what_fits(
    plan: Run, tiny_model_folder: Path, tmp_path: Path
) -> None:
    picture, numbers = tmp_path / "plan.png", tmp_path / "plan.json"
    code, out, _ = plan(tiny_model_folder, "--max-steps", 7, "--picture", picture, "--json", numbers, "--time", "2h")
    assert code == 0
    for text in ("2 Llama layers", "in NF4", "Peak memory", "base model", "7 steps take", "There is room for",
                 "of the 2 h that it may", "stated rates"):  # fmt: skip
        assert text in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    assert found["steps"] == 7 and found["peak_bytes"] == sum(
        size for name, size in found["memory"].items() if name != "base_mapped"
    )


def test_a_mixture_is_told_with_its_experts_and_what_of_it_is_at_work(plan: Run, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_local_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = t.MixtralConfig(hidden_size=64, intermediate_size=96, vocab_size=96, head_dim=16, pad_token_id=0, **sizes)
    config.save_pretrained(tmp_path)
    code, out, err = plan(tmp_path, "--json", tmp_path / "plan.json", "--card", "A100 80GB")
    assert code == 0, err
    found = json.loads((tmp_path / "plan.json").read_text())
    idle = 2 * 6 * 3 * 64 * 96  # layers, experts that a token does not pass, their matrices
    assert found["active_parameters"] == found["parameters"] - idle
    assert "2 Mixtral layers of 8 experts each, 2 for a token, " in out
    assert f"{found['active_parameters']:,} of them at work for a token" in out


def test_a_mixture_whose_first_layer_is_dense_is_told_so(plan: Run, tmp_path: Path) -> None:
    t.Glm4MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=96, pad_token_id=0,
    ).save_pretrained(tmp_path)  # fmt: skip
    code, out, err = plan(tmp_path)
    assert code == 0, err
    assert "3 Glm4Moe layers, 2 of them of 8 experts each, 2 for a token, " in out


def test_one_is_told_as_one(plan: Run, tiny_model_folder: Path, tmp_path: Path) -> None:
    t.LlamaConfig.from_pretrained(tiny_model_folder, num_hidden_layers=1).save_pretrained(tmp_path / "one")
    numbers = tmp_path / "plan.json"
    passes = ("--batch-size", 2, "--gradient-accumulation-steps")
    code, out, _ = plan(tmp_path / "one", *passes, 1, "--max-steps", 1, "--json", numbers)
    assert code == 0
    for text in ("1 Llama layer,", "A step of 2 rows in 1 pass takes", "\n1 step takes"):
        assert text in out
    step = json.loads(numbers.read_text())["step_seconds"]
    assert (
        "there is time for 1 step: --max-steps 1" in plan(tmp_path / "one", *passes, 1, "--time", f"{1.5 * step}s")[1]
    )
    code, out, _ = plan(tmp_path / "one", *passes, 3, "--max-steps", 2)
    assert code == 0 and "A step of 6 rows in 3 passes takes" in out and "\n2 steps take" in out


def test_a_configuration_alone_is_enough(plan: Run, tmp_path: Path) -> None:
    t.Qwen3Config(num_hidden_layers=3, vocab_size=1000).save_pretrained(tmp_path)
    code, out, _ = plan(tmp_path, "--memory", "16GiB", "--card", "RTX 4090")
    assert code == 0
    assert "3 Qwen3 layers" in out and "it may take 16.0 GiB" in out
    assert "On RTX 4090" in out and "an estimate from published figures, not measured" in out


def test_rows_are_looked_at_where_there_are_some(plan: Run, tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "say {n}", "completion": "it is {n}"}}\n' for n in "abcdef"))
    code, out, _ = plan(tiny_model_folder, "--data", rows, "--epochs", 2, "--batch-size", 2)
    assert code == 0 and "2 steps take" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--card", "RTX 4091"), "There is no card 'RTX 4091' in the table (did you mean 'RTX 4090'?)"),
        (("--time", "soon"), "--time is 'soon'; give a time such as 2h"),
        (("--time", "0.0001s"), "One step takes"),
        (("--memory", "1MiB"), "it would fit with --memory"),
        (("--target-modules", "q_prj"), "matches no layer of the model (did you mean 'q_proj'?), which has"),
        (("--loss-type", "hinge"), "option 'loss_type' belongs to method dpo"),
    ],
)
def test_bad_input_is_one_sentence(plan: Run, tiny_model_folder: Path, words: tuple[str, ...], told: str) -> None:
    code, out, err = plan(tiny_model_folder, *words)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and told in err and len(err.strip().splitlines()) == 1


def test_an_unknown_architecture_is_one_sentence(plan: Run, tmp_path: Path) -> None:
    t.GPTNeoXConfig(hidden_size=64, num_attention_heads=4, intermediate_size=64).save_pretrained(tmp_path)
    code, _, err = plan(tmp_path)
    assert code == 2 and "steps are foretold of the families" in err and len(err.strip().splitlines()) == 1


def test_without_a_model_it_says_so(plan: Run) -> None:
    code, _, err = plan()
    assert code == 2 and "There is no model to plan for" in err


@pytest.mark.parametrize(("place", "told"), [(".", "is a directory"), ("rows.jsonl/x", "The plan cannot be written")])
def test_a_file_that_cannot_be_written_is_one_sentence(
    plan: Run, tiny_model_folder: Path, tmp_path: Path, place: str, told: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    for flag in ("--json", "--picture"):
        code, _, err = plan(str(tiny_model_folder), "--stated", flag, str(tmp_path / place))
        assert code == 2 and told in err and len(err.strip().splitlines()) == 1
