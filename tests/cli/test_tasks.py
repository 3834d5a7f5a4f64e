"""Classification and sequence-to-sequence on the command line: data, train, classify, generate, and what is refused."""

import io
import json
import sys

import pytest

from halfbyte import cli

ROWS = [
    {"text": f"{'very ' * (i % 3)}{'good' if i % 2 else 'bad'} {i}", "label": ["no", "yes"][i % 2]} for i in range(20)
]


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line in this process; returns exit code, standard output and standard error."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_a_classifier_from_its_data_to_the_classes_of_new_texts(run, rows, task_folder, tmp_path):
    folder = tmp_path / "run"
    common = ["--model", task_folder("bert"), "--task", "classify"]
    code, out, err = run("data", rows, *common, "--samples", "1")
    assert code == 0, err
    assert "no     10        50.0%" in out and "row 1 of 20" in out and "bad 0</s> → no" in out
    code, out, _ = run("data", rows, *common, "--json", "-")
    assert code == 0 and json.loads(out)["classes"] == {"no": 10, "yes": 10}
    code, out, err = run("data", rows, *common, "--tokens")
    assert code == 2 and "are for language models" in err

    code, out, err = run(
        "train",
        *common,
        "--data",
        rows,
        "--output",
        folder,
        "--preset",
        "quick",
        "--max-steps",
        "3",
        "--eval-share",
        "0.3",
    )
    assert code == 0, err
    assert "Classes: no 10, yes 10" in err and "accuracy" in err and "Matthews" in err
    assert "rows/s" in out and f"classify {folder} --text" in out and "chat" not in out

    code, out, err = run("classify", folder, "--text", "good", "--text", "so\nbad")
    assert code == 0 and "is new" not in err
    label, share, text = out.splitlines()[1].split("\t")
    assert label in ("no", "yes") and 0.5 <= float(share) <= 1 and text == "so bad"
    code, out, _ = run("classify", folder, rows, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["text"] for line in lines] == [row["text"] for row in ROWS]
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
    code, alone, _ = run("classify", folder, "-", "--batch-size", "1", stdin=f"{lines[3]['text']}\n\n")
    assert code == 0 and alone.split("\t")[0] == lines[3]["label"]

    code, _, err = run("generate", folder, "--prompt", "a")
    assert code == 2 and "does not generate text" in err and "use classify" in err
    code, out, err = run("chat", folder)
    assert code == 2 and "does not generate text" in err and "use classify" in err and not out


def test_what_classify_refuses(run, task_folder, tiny_model_folder, rows):
    for arguments, sentence in (
        ([task_folder("bert")], "takes a file of texts or --text, one of the two"),
        ([task_folder("bert"), rows, "--text", "a"], "takes a file of texts or --text, one of the two"),
        ([task_folder("bert"), rows, "--text-pair", "a"], "--text-pair belongs to one --text"),
        ([tiny_model_folder, "--text", "a"], "LlamaForCausalLM does not classify; give a run that was trained with"),
        ([task_folder("bert"), rows.with_name("none.jsonl")], "none.jsonl"),
    ):
        code, out, err = run("classify", *arguments)
        assert (code, out) == (2, "") and sentence in err and "Traceback" not in err


@pytest.mark.slow
def test_a_sequence_to_sequence_run_answers_a_prompt_and_does_not_chat(run, task_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i}?", "target": "b"}) + "\n" for i in range(8)))
    folder = tmp_path / "run"
    code, out, err = run("data", file, "--model", task_folder("t5"), "--task", "seq2seq", "--samples", "1")
    assert code == 0 and "tokens of its target" in out and "0?</s> → b</s>" in out
    code, out, err = run(
        "train", "--model", task_folder("t5"), "--task", "seq2seq", "--data", file, "--output", folder, "--preset",
        "quick", "--max-steps", "25", "--learning-rate", "0.03", "--eval-data", file, "--batch-size", "8",
    )  # fmt: skip
    assert code == 0, err
    assert "ROUGE-L" in err and "exact match" in err and "8 examples: 24 tokens to read, 16 to write" in err
    assert "generate" in out and "chat" not in out
    code, out, err = run("generate", folder, "--prompt", "3?")
    assert code == 0 and out == "b\n" and "template" not in err
    code, _, err = run("chat", folder)
    assert code == 2 and "has no conversation; use generate" in err
    code, _, err = run("generate", folder, "--prompt", " ")
    assert code == 2 and "The prompt is empty" in err


def test_an_unknown_task_is_told(run, rows, task_folder):
    code, _, err = run("train", "--model", task_folder("bert"), "--task", "clasify", "--data", rows, "--output", "x")
    assert code == 2 and "'classify'" in err
