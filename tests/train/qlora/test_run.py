"""Runs of qlora.py's command line on a tiny model: losses, files, how they go on, what they answer."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli import app
from halfbyte.data import Collator
from halfbyte.errors import InputError
from halfbyte.nn import Linear4bit
from halfbyte.runs.events import Event, Note, StepMetrics
from halfbyte.train import Interrupted
from halfbyte.train.qlora import data
from halfbyte.train.qlora.arguments import trainer_arguments
from halfbyte.train.qlora.flags import Flags, parse
from halfbyte.train.qlora.mmlu import MmluCallback, read_questions
from halfbyte.train.qlora.outputs import Outputs
from halfbyte.train.qlora.run import qlora
from halfbyte.train.qlora.table import FLAGS

OFFICIAL = Path(__file__).with_name("official")
STATE = {"state.json", "state.safetensors", "trainer_state.json"}


@pytest.fixture
def command(tiny_model_folder: Path, local_file: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command line over forty rows of Alpaca's format."""
    file = local_file("alpaca")

    def words(*more: str, output: str = "out") -> list[str]:
        return [
            "--model_name_or_path", str(tiny_model_folder), "--dataset", str(file), "--dataset_format", "alpaca",
            "--output_dir", str(tmp_path / output), "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1",
            "--gradient_accumulation_steps", "2", "--lora_r", "4", "--learning_rate", "0.01", "--source_max_len", "180",
            *more,
        ]  # fmt: skip

    return words


def run(words: list[str], *listeners: Callable[[Event], None]) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            told.append(event.text)

    return qlora(parse(FLAGS, words), listen, *listeners), told


def dense(model: Any, adapter: Path) -> Any:
    """The same base in fp32 without 4 bits, with the adapter by PEFT."""
    base = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float32)
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    for name, module in base.named_modules():
        if (found := quantized.get(name)) is not None:
            module.weight.data = found.quantized_weight.dequantize(torch.float32)
    return PeftModel.from_pretrained(base, adapter)


def test_the_folder_is_the_scripts_and_its_losses_are_those_of_a_dense_model(
    command: Callable[..., list[str]], tmp_path: Path, tiny_model_folder: Path
):
    words = command("--do_eval", "--eval_dataset_size", "6", "--evaluation_strategy", "steps", "--eval_steps", "2")
    figures, told = run(words)
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir() if not path.name.startswith(".")} == {
        "checkpoint-2", "checkpoint-4", "completed", "train_results.json", "eval_results.json", "all_results.json",
        "metrics.json", "trainer_state.json", "config.yaml", "run.json", "metrics.jsonl",
    }  # fmt: skip
    assert {path.name for path in (output / "checkpoint-4/adapter_model").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json",
    }  # fmt: skip
    everything = json.loads((output / "all_results.json").read_text())
    parts = [json.loads((output / f"{part}_results.json").read_text()) for part in ("train", "eval")]
    assert everything == parts[0] | parts[1]
    assert json.loads((output / "metrics.json").read_text()) == {"run_name": str(output), **everything} == figures
    assert {"train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"} <= set(everything)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4
    assert everything["train_loss"] == pytest.approx(sum(losses) / 4)
    assert losses[-1] < losses[0]
    assert any("6 examples for evaluation" in line for line in told)

    flags = parse(FLAGS, words)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    prepared = data.prepare(data.read(flags.but(do_eval=True)), tokenizer, flags.but(do_eval=True))
    quantized = halfbyte.load(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    oracle = dense(quantized, output / "checkpoint-4/adapter_model").eval()
    assert prepared.evaluation is not None
    total = count = 0.0
    for row in prepared.evaluation.rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        trained = int((labels[:, 1:] != -100).sum())
        total += oracle(input_ids=ids, labels=labels).loss.item() * trained
        count += trained
    assert everything["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_steps_are_those_of_a_plain_loop_over_a_dense_model(
    command: Callable[..., list[str]], tmp_path: Path, tiny_model_folder: Path
):
    """Four rows a step, all there are: PEFT, torch's AdamW and the script's loss of one batch."""
    quantized = halfbyte.load(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    adapter = tmp_path / "out/checkpoint-7/adapter_model"
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), lora).save_pretrained(adapter)
    words = command(
        "--max_train_samples", "4", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"
    )
    words += ["--optim", "adamw_torch", "--learning_rate", "0.003", "--weight_decay", "0.1", "--max_grad_norm", "0.3"]
    run(words)
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]

    model = dense(quantized, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    flags = parse(FLAGS, words)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    rows = list(data.tokenize(data.read(flags).train, tokenizer, flags))
    batch = Collator(tokenizer.pad_token_id)([row.rows[0] for row in rows])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.003, weight_decay=0.1)
    expected = []
    for _ in range(4):
        loss = model(**batch).loss
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=2e-4)
    assert expected[3] < expected[0] - 0.01


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(command: Callable[..., list[str]], tmp_path: Path):
    more = ["--lora_dropout", "0.1", "--save_total_limit", "3"]
    run(command(*more, output="whole"))

    def interrupt(event: Event) -> None:
        if (
            isinstance(event, StepMetrics) and event.step == 2
        ):  # heard after the step has ended, so the next one is the last
            os.kill(os.getpid(), signal.SIGINT)

    words = command(*more, output="parts")
    with pytest.raises(Interrupted):
        run(words, interrupt)
    assert not (tmp_path / "parts/completed").exists()
    _, told = run(words)
    assert any("Found a previous checkpoint" in line for line in told)
    one, other = (load_file(tmp_path / name / "checkpoint-4/adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [
        [entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
        for path in (tmp_path / "whole/trainer_state.json", tmp_path / "parts/trainer_state.json")
    ]
    assert logs[0] == logs[1]
    with pytest.raises(InputError, match=r"learning_rate: 0\.01 → 0\.5"):
        (tmp_path / "parts/completed").unlink()
        run([*words, "--learning_rate", "0.5"])


@pytest.mark.slow
def started(words: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "halfbyte", "qlora", *words, *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(command: Callable[..., list[str]], tmp_path: Path):
    words = ["--gradient_accumulation_steps", "1", "--per_device_train_batch_size"]
    for output, *more in (("one", "4"), ("two", "2", "--processes", "2")):
        done = started(command(*words, *more, output=output))
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("The results are in") == 1
    one, two = (
        [json.loads(line)["loss"] for line in text.splitlines() if '"kind":"step"' in line]
        for text in ((tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two"))
    )
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-4)
    names = [{file.name for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]


def test_an_adapter_alone_is_trained_on_from_step_0(command: Callable[..., list[str]], tmp_path: Path):
    run(command(output="first"))
    folder = tmp_path / "second/checkpoint-4"
    shutil.copytree(tmp_path / "first/checkpoint-4/adapter_model", folder / "adapter_model")
    words = command("--max_steps", "1", "--learning_rate", "1e-12", output="second")
    with pytest.raises(InputError, match=r"holds an adapter with lora_r 4, and --lora_r is 8"):
        run([*words, "--lora_r", "8"])
    weights = folder / "adapter_model/adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="Pickled weights"):
        run(words)
    weights.with_suffix(".bin").rename(weights)
    _, told = run(words)
    assert any("training begins at step 0" in line for line in told)
    before, after = (load_file(folder / "adapter_model" / "adapter_model.safetensors"),
                     load_file(tmp_path / "second/checkpoint-1/adapter_model/adapter_model.safetensors"))  # fmt: skip
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
    assert any(tensor.abs().max() > 0 for name, tensor in before.items() if "lora_B" in name)
    outputs = Outputs(tmp_path / "second")
    assert outputs.last_checkpoint() == tmp_path / "second/checkpoint-1"
    outputs.completed.unlink()
    assert outputs.last_checkpoint() == tmp_path / "second/checkpoint-1"  # with its state
    (tmp_path / "second/checkpoint-1/state.json").unlink()
    assert outputs.last_checkpoint() == tmp_path / "second/checkpoint-4"


def test_an_adapter_is_evaluated_and_trained_on_over_its_own_base_alone(
    command: Callable[..., list[str]], tiny_model_folder: Path, tmp_path: Path
):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    words = command("--model_name_or_path", str(base), "--max_steps", "2")
    run(words)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    told = r"the base model's files are others \(of 20 tensors model.layers.0.mlp.up_proj.weight holds other values\)"
    with pytest.raises(InputError, match=told):
        run([*words, "--do_train", "False", "--do_eval", "True", "--eval_dataset_size", "4"])
    (tmp_path / "out/completed").unlink()
    with pytest.raises(InputError, match=told):
        run([*words, "--max_steps", "4"])


def test_what_is_completed_is_not_trained_again_unless_asked_for(command: Callable[..., list[str]], tmp_path: Path):
    words = command()
    run(words)
    weights = (tmp_path / "out/checkpoint-4/adapter_model.safetensors").read_bytes()
    figures, told = run(words)
    assert figures == {"run_name": str(tmp_path / "out")}
    assert any("already completed" in line for line in told)
    assert (tmp_path / "out/checkpoint-4/adapter_model.safetensors").read_bytes() == weights
    assert (tmp_path / "out/train_results.json").exists()
    run([*words, "--max_steps", "2", "--overwrite_output_dir"])
    assert not (tmp_path / "out/checkpoint-4").exists()
    assert (tmp_path / "out/checkpoint-2/adapter_model").is_dir()


@pytest.mark.slow
def test_the_last_step_is_saved_and_older_ones_go(command: Callable[..., list[str]], tmp_path: Path):
    run(command("--max_steps", "5", "--save_total_limit", "1"))
    checkpoints = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-5"]
    run(command("--max_steps", "3", "--save_strategy", "no", output="unsaved"))
    assert [path.name for path in (tmp_path / "unsaved").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.slow
def test_the_best_model_is_the_one_that_is_left(command: Callable[..., list[str]], tmp_path: Path):
    more = ["--do_eval", "--eval_dataset_size", "6", "--evaluation_strategy", "steps", "--eval_steps", "2"]
    figures, _ = run(command(*more, "--load_best_model_at_end", "True", "--learning_rate", "0.5"))
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    assert figures["eval_loss"] == pytest.approx(losses[best])
    again, _ = run(command(*more, "--load_best_model_at_end", "True", "--do_train", "no"))
    assert again["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_answers_are_those_of_the_model_alone(command: Callable[..., list[str]], tmp_path: Path):
    run(command())
    more = ["--do_train", "False", "--do_predict", "--predict_with_generate", "--eval_dataset_size", "7"]
    words = command(*more, "--max_new_tokens", "5", "--min_new_tokens", "5", "--per_device_eval_batch_size", "3")
    figures, _ = run(words)
    assert {"predict_runtime", "predict_samples_per_second", "predict_steps_per_second"} <= set(figures)
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    model = halfbyte.load(
        tmp_path / "out/checkpoint-4/adapter_model",
        quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"),
    )
    tokenizer = AutoTokenizer.from_pretrained(words[1])
    for row in rows:
        assert row["length"] == len(row["input"]) + len(row["output"])
        ids = tokenizer(row["input"], return_tensors="pt", add_special_tokens=False).input_ids[:, :180]
        answer = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        assert row["prediction_with_input"] == text.strip()
        assert row["prediction"] == text.replace(row["input"], "").strip()


def test_mmlu_is_the_likeliest_letter(tiny_model_folder: Path, tmp_path: Path):
    subjects = ["law", "law", "art", "art", "art"]
    questions = [{"input": f"Question {i}?" * (i + 1), "output": "ABCDA"[i], "subject": subjects[i]} for i in range(5)]
    file = tmp_path / "zero_shot_mmlu_val.json"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    words = ["--do_eval", "--do_mmlu_eval", "--mmlu_dataset", "mmlu-zs", "--per_device_eval_batch_size", "2"]
    flags: Flags = parse(FLAGS, [*words, "--mmlu_source_max_len", "40"])
    read = read_questions(flags, tmp_path)
    assert read == questions
    assert read_questions(flags.but(max_mmlu_samples=2), tmp_path) == questions[:2]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = halfbyte.load(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    trainer = type("Trainer", (), {"model": model})()
    results = MmluCallback(trainer, read, tokenizer, flags, print).measure()

    letters = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "ABCD"]
    right, surprises = [], []
    for question in questions:
        ids = tokenizer(question["input"], add_special_tokens=False).input_ids[:40]
        answer = [letters["ABCD".index(question["output"])], tokenizer.eos_token_id]
        logits = model(torch.tensor([ids + answer])).logits[0]
        right.append("ABCD"[int(logits[len(ids) - 1, letters].argmax())] == question["output"])
        surprises += [-logits[len(ids) - 1 + i].log_softmax(0)[token].item() for i, token in enumerate(answer)]
    assert results["mmlu_loss"] == pytest.approx(np.mean(surprises), rel=1e-4)
    assert results["mmlu_eval_accuracy_law"] == np.mean(right[:2])
    assert results["mmlu_eval_accuracy"] == pytest.approx((np.mean(right[:2]) + np.mean(right[2:])) / 2)
    with pytest.raises(InputError, match="five_shot_mmlu_val"):
        read_questions(flags.but(mmlu_dataset="mmlu"), tmp_path)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "five_shot_mmlu_val"),
        (["--mmlu_dataset", "mmlu", "--mmlu_split", "test"], "five_shot_mmlu_test"),
        (["--mmlu_dataset", "mmlu-zs"], "zero_shot_mmlu_val"),
    ],
)
def test_mmlu_is_read_from_the_file_that_the_script_reads(words: list[str], name: str, tmp_path: Path):
    question = {"subject": "law", "input": "The following ...\n\nWho?\nAnswer: A\n\nWhom?\nAnswer:", "output": "B"}
    (tmp_path / f"{name}.json").write_text(json.dumps(question) + "\n")
    assert read_questions(parse(FLAGS, ["--do_eval", "--do_mmlu_eval", *words]), tmp_path) == [question]
    (tmp_path / f"{name}.json").write_text(json.dumps(question | {"output": "E"}) + "\n")
    with pytest.raises(InputError, match="is no question of MMLU"):
        read_questions(parse(FLAGS, ["--do_eval", "--do_mmlu_eval", *words]), tmp_path)


def test_flags_of_the_trainer_reach_it(command: Callable[..., list[str]], tmp_path: Path):
    more = ["--optim", "adamw_torch", "--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--data_seed", "5"]
    run(command(*more, "--logging_steps", "2", "--bf16", "--gradient_checkpointing", "--group_by_length", "no"))
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    # the rate that step n was made with: half-way up after one of two warm-up steps, half-way down the cosine
    assert rates == pytest.approx([0.005, 0.005])
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2, 4]


def test_epochs_count_where_there_are_no_steps():
    flags = parse(FLAGS, ["--max_steps", "0", "--num_train_epochs", "2"])
    arguments = trainer_arguments(flags, Path("out"))
    assert (arguments.max_steps, arguments.num_train_epochs) == (-1, 2)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--do_eval"], "eval_dataset_size is 1024"),
        (["--dataset_format", "self-instruct"], "no column 'prompt'"),
        (["--load_best_model_at_end", "--do_eval"], "do not fit together.* Save strategy: "),
        (["--report_to", "nobody"], "do not fit together"),
        (["--lora_modules", "nothing_like_it"], "^--lora_modules 'nothing_like_it' matches no layer"),
        (["--lora_r", "64"], r"^--lora_r 64 is larger than the layer \S+, of 16 by 32; take a rank of at most 16\.$"),
        (["--source_max_len", "300", "--target_max_len", "1", "--dataset", "LONG"], "The longest row of the data"),
        (["--do_eval", "--eval_dataset_size", "3", "--do_mmlu_eval"], "five_shot_mmlu_val.json"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    more: list[str], told: str, command: Callable[..., list[str]], local_file: Callable[..., Path], tmp_path: Path
):
    if "LONG" in more:
        long = tmp_path / "long.jsonl"
        long.write_text((json.dumps({"instruction": "a" * 400, "output": "b"}) + "\n") * 20)
        more = [str(long) if word == "LONG" else word for word in more]
    with pytest.raises(InputError, match=told) as error:
        run(command(*more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_configuration_and_one_sentence_for_what_is_wrong(command: Callable[..., list[str]]):
    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["qlora", *words])

    printed = call("--to-yaml", *command("--run_name", "x"))
    assert printed.exit_code == 0
    assert "rank: 4" in printed.stdout
    assert "No counterpart: --run_name" in printed.stderr
    wrong = call("--lora_alpah", "3")
    assert isinstance(wrong.exception, InputError)
    assert str(wrong.exception) == "qlora has no flag --lora_alpah (did you mean '--lora_alpha'?)."
    assert not wrong.stdout
    shown = call("--help")
    assert shown.exit_code == 0
    assert "--max_memory_MB" in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize("form", ["alpaca", "chip2", "self-instruct", "hh-rlhf", "oasst1", "input-output"])
def test_the_papers_script_runs_on_each_format(
    form: str, tiny_model_folder: Path, local_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands = json.loads((OFFICIAL / "commands.json").read_text())
    words = [word for pair in commands["guanaco"] + commands["finetune_guanaco_7b"] for word in pair.split(" ")]
    file = local_file(form, 60)
    changed = {
        "--model_name_or_path": str(tiny_model_folder), "--dataset": str(file), "--output_dir": str(tmp_path / "out"),
        "--max_steps": "3", "--eval_steps": "2", "--eval_dataset_size": "8", "--gradient_accumulation_steps": "2",
        "--lora_r": "4", "--dataloader_num_workers": "1", "--target_max_len": "100",
    }  # fmt: skip
    for name, value in changed.items():
        words[words.index(name) + 1] = value
    if form != "input-output":
        words += ["--dataset_format", form]
    questions = tmp_path / "data/mmlu/five_shot_mmlu_val.json"
    questions.parent.mkdir(parents=True)
    lines = [{"input": f"Which {i}?", "output": "ABCD"[i % 4], "subject": "law"} for i in range(6)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    figures, _ = run(words)
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert figures["eval_loss"] > 0
    assert any("mmlu_eval_accuracy" in entry for entry in log)
    assert (tmp_path / "out/checkpoint-3/adapter_model/adapter_model.safetensors").is_file()
    assert (tmp_path / "out/completed").exists()
