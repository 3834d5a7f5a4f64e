"""A file of prompts answered into another one: each gets the answer that it gets alone, in order, after any end."""

import io
import json
import re
import sys

import jsonschema
import pytest

import halfbyte
from halfbyte import cli
from halfbyte.evaluate.references import reference_scores
from halfbyte.files import append
from halfbyte.generate.stream import stream_reply
from halfbyte.runs.config import TrainConfig
from halfbyte.train import fine_tune

ROWS = [
    {"id": 7, "prompt": "hello", "completion": "it is so"},
    {"id": 8, "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "and?"}]},
    {"id": 9, "instruction": "do it", "input": "now", "output": ""},
    {"id": 10, "question": "why?", "answer": "so", "score": 0.5},
    {"id": 11, "text": "once"},
]
TURNS = [
    [{"role": "user", "content": "hello"}],
    ROWS[1]["messages"],
    [{"role": "user", "content": "do it\n\nnow"}],
    [{"role": "user", "content": "why?"}],
    [{"role": "user", "content": "once"}],
]


@pytest.fixture
def run(monkeypatch, capfd):
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


@pytest.fixture(scope="module")
def expected(tiny_model_folder):
    model, tokenizer = halfbyte.load(tiny_model_folder), halfbyte.load_tokenizer(tiny_model_folder)
    return ["".join(stream_reply(model, tokenizer, turns, max_new_tokens=10)) for turns in TURNS]


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_each_row_gets_the_answer_that_it_gets_alone(run, tiny_model_folder, rows, expected, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["generate", tiny_model_folder, "--prompts", rows, "--max-new-tokens", 10]
    code, printed, err = run(*command, "--out", out)
    assert (code, printed) == (0, "")
    lines = lines_of(out.read_text())
    assert [line["generated"] for line in lines] == expected
    own = [{name: value for name, value in line.items() if name not in ("generated", "generation")} for line in lines]
    assert own == ROWS
    assert [line["generation"]["row"] for line in lines] == [1, 2, 3, 4, 5]
    scored = reference_scores([expected[0], expected[3]], ["it is so", "so"])
    assert [line["generation"].get("rouge_l") is None for line in lines] == [False, True, True, False, True]
    assert f"ROUGE-L {scored['rouge_l']:.3f}" in err and "over 2 rows with a reference" in err
    assert "5 rows answered" in err
    code, printed, _ = run(*command)
    assert code == 0 and lines_of(printed) == lines


def test_a_file_is_gone_on_with_wherever_it_ends(run, tiny_model_folder, rows, tmp_path):
    out, part = tmp_path / "out.jsonl", tmp_path / "part.jsonl"
    command = ["generate", tiny_model_folder, "--prompts", rows, "--max-new-tokens", 6, "--temperature", 2]
    command += ["--samples", 2, "--seed", 3]
    assert run(*command, "--out", out)[0] == 0
    whole = out.read_bytes()
    [first, second] = lines_of(out.read_text())[0]["generated"]
    assert first != second
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for end in (0, 5, ends[1], ends[1] + 40, ends[3] - 1, len(whole)):
        part.write_bytes(whole[:end])
        code, _, err = run(*command, "--out", part)
        assert code == 0 and part.read_bytes() == whole, err
        done = sum(place <= end for place in ends)
        assert (f"{done} row{'' if done == 1 else 's'} of 5 are answered" in err) == (done > 0)
        assert f"{5 - done} row{'' if done == 4 else 's'} answered" in err


def test_an_interrupt_leaves_whole_lines_and_says_how_to_go_on(run, tiny_model_folder, rows, tmp_path, monkeypatch):
    out, count = tmp_path / "out.jsonl", []

    def interrupted(path, line):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(line)
        append(path, line)

    monkeypatch.setattr("halfbyte.evaluate.answered.append", interrupted)
    code, _, err = run("generate", tiny_model_folder, "--prompts", rows, "--out", out, "--max-new-tokens", 4)
    assert code == 130 and "2 rows of 5 are answered" in err and "the same command goes on" in err.replace("\n", " ")
    assert len(lines_of(out.read_text())) == 2


def test_bad_rows_are_told_with_their_places_before_anything_is_written(run, tiny_model_folder, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    bad = ['{"apples": 1}', '{"prompt": "', json.dumps({"prompt": "x" * 300}), '{"prompt": "a", "generated": "b"}']
    file.write_text("".join(f'{{"prompt": "say {n}"}}\n' for n in range(4)) + "\n".join(bad) + "\n")
    command = ["generate", tiny_model_folder, "--prompts", file, "--out", out, "--max-new-tokens", 2]
    code, printed, err = run(*command)
    assert (code, printed, out.exists()) == (2, "", False)
    assert "4 of 8 rows cannot be answered" in err and "row 5" in err and "row 6" in err and "attends to 256" in err
    code, _, err = run(*command, "--skip-bad-rows")
    assert code == 2 and "more than 10%" in err and not out.exists()
    code, _, err = run(*command, "--skip-bad-rows", "all")
    assert code == 0 and "4 rows left out" in err and "row 5" in err
    assert [line["generation"]["row"] for line in lines_of(out.read_text())] == [1, 2, 3, 4]


def test_what_does_not_fit_together_is_one_sentence(run, tiny_model_folder, rows, tmp_path):
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    few = ["--max-new-tokens", 2]
    assert run("generate", tiny_model_folder, "--prompts", rows, "--out", out, *few)[0] == 0
    before = out.read_bytes()
    other.write_text("".join(json.dumps(row | {"id": 0}) + "\n" for row in ROWS))
    note, schema, folder = tmp_path / "note", tmp_path / "schema.json", tmp_path / "folder"
    note.write_text("mine, without an end")
    schema.write_text('{"type": 3}')
    folder.mkdir()
    cases = [
        ([], "was given no prompt"),
        (["hello", "--prompts", rows], "more than one of"),
        (["hello", "--prompt", "x"], "more than one of"),
        (["hello", "--samples", 2], "belong to a file of prompts"),
        (["hello", "--columns", "prompt=a"], "belong to a file of prompts"),
        (["--prompts", rows, "--columns", "a"], "--columns must be pairs such as prompt=question"),
        (["--prompts", rows, "--columns", "promt=a"], "columns names 'promt' (did you mean 'prompt'?)"),
        (["--prompts", rows, "--out", out, "--max-new-tokens", 3], "holds answers of another model or other options"),
        (["--prompts", other, "--out", out, *few], "another row 1 than there is now"),
        (["--prompts", rows, "--out", rows], "is the file of prompts itself"),
        (["--prompts", rows, "--out", other], "line 1 is no answer that generate has written"),
        (["--prompts", rows, "--out", note], "holds no answers that generate has written"),
        (["--prompts", rows, "--out", folder], "is a folder"),
        (["--prompts", rows, "--out", tmp_path / "no" / "out"], "There is no folder"),
        (["--prompts", tmp_path / "no.jsonl"], "no.jsonl"),
        (["x", "--json-schema", tmp_path / "no.json"], "cannot be read"),
        (["x", "--json-schema", note], "is no JSON"),
        (["x", "--json-schema", schema], "The JSON schema cannot be used"),
        (["x", "--regex", "("], "The regular expression cannot be used"),
        (["x", "--regex", "a", "--json-schema", schema], "one of the two"),
    ]
    for options, about in cases:
        code, printed, err = run("generate", tiny_model_folder, *options)
        assert (code, printed) == (2, "") and about in err and err.count("\n") == 1, (options, err)
    assert out.read_bytes() == before and note.read_text() == "mine, without an end"


@pytest.fixture(scope="module")
def trained(tiny_model_folder, tmp_path_factory):
    """A run whose rows had columns of their own, and were made of a template in a second file."""
    folder = tmp_path_factory.mktemp("columns")
    (folder / "faq.csv").write_text("Frage;Antwort\n" + "why?;so\n" * 4)
    (folder / "words.jsonl").write_text('{"en": "dog", "de": "Hund"}\n' * 4)
    words = {"path": folder / "words.jsonl", "columns": {"completion": "de"}, "template": "Translate {en}:"}
    options = {"model": str(tiny_model_folder), "data": [folder / "faq.csv", words], "max_steps": 1}
    options |= {
        "columns": {"prompt": "Frage", "completion": "Antwort"},
        "batch_size": 2,
        "rank": 4,
        "sample_prompts": "none",
    }
    run = fine_tune(TrainConfig(**options, output=folder / "run")).output
    for file in ("faq.csv", "words.jsonl"):
        (folder / file).unlink()  # what was trained on need not be there any more
    return run


def test_rows_are_read_by_the_columns_of_the_run_or_by_those_that_are_given(run, trained, tmp_path):
    asked = [{"Frage": "why?"}, {"en": "dog"}, {"prompt": "why?"}, {"Frage": "why?", "Antwort": "so"}]
    own, ours, out = tmp_path / "own.jsonl", tmp_path / "ours.jsonl", tmp_path / "out.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in asked))
    ours.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("why?", "Translate dog:", "why?", "why?")))
    answers = []
    for file in (own, ours):
        code, printed, err = run("generate", trained, "--prompts", file, "--max-new-tokens", 6)
        assert code == 0, err
        answers.append([line["generated"] for line in lines_of(printed)])
    assert answers[0] == answers[1] and len(answers[0]) == 4
    other = tmp_path / "other.jsonl"
    other.write_text('{"Fr": "why?", "An": "so"}\n')
    command = ["generate", trained, "--prompts", other, "--max-new-tokens", 6]
    code, _, err = run(*command)
    assert code == 2 and "say which is which (--columns prompt=" in err
    code, printed, err = run(*command, "--columns", "prompt=Fr,completion=An", "--out", out)
    assert code == 0 and "over 1 row with a reference" in err
    assert lines_of(out.read_text())[0]["generated"] == answers[0][0]
    code, _, err = run(*command, "--columns", "prompt=An", "--out", out)
    assert code == 2 and "holds answers of another model or other options" in err
    (trained / "config.yaml").write_text("{")
    assert run(*command, "--columns", "prompt=Fr")[0] == 0 and run("generate", trained, "--prompts", ours)[0] == 0


def test_answers_follow_a_schema_or_an_expression(run, tiny_model_folder, rows, tmp_path):
    schema = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
    schema["additionalProperties"] = False
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    options = ["--prompts", rows, "--max-new-tokens", 60, "--temperature", 1, "--seed", 1]
    code, printed, _ = run("generate", tiny_model_folder, *options, "--json-schema", file)
    assert code == 0
    for line in lines_of(printed):
        if line["generation"]["finish"] == "stop":
            jsonschema.validate(json.loads(line["generated"]), schema)
        else:
            assert line["generated"].startswith("{")  # blanks without end
    code, printed, _ = run("generate", tiny_model_folder, "hello", "--regex", "(yes|no), [0-9]{3}")
    assert code == 0 and re.fullmatch(r"(yes|no), [0-9]{3}\n", printed)


def test_a_text_file_has_a_prompt_a_line_and_raw_goes_on_with_it(run, tiny_model_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("hello wor\n\nonce\n")
    code, printed, _ = run("generate", tiny_model_folder, "--prompts", file, "--raw", "--max-new-tokens", 8)
    alone = [
        run("generate", tiny_model_folder, text, "--raw", "--max-new-tokens", 8)[1] for text in ("hello wor", "once")
    ]
    assert code == 0 and [f"{line['generated']}\n" for line in lines_of(printed)] == alone
