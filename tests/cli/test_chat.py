"""The chat's commands, and what is shown in a terminal."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte import cli
from halfbyte.cli.chat_screen import MarkdownScreen, PlainScreen, last_block, markdown, shown
from halfbyte.generate.stream import stream_reply


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def adapters(tiny_model_folder, tmp_path_factory):
    made = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        made[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(made[name])
    return made


def answers(folder, tokens, *conversations):
    """Return the likeliest answers of a model opened by itself."""
    model, tokenizer = halfbyte.load(folder), halfbyte.load_tokenizer(folder)
    return ["".join(stream_reply(model, tokenizer, turns, max_new_tokens=tokens)) for turns in conversations]


def user(text):
    return {"role": "user", "content": text}


def test_adapters_are_switched_and_compared_in_one_conversation(run, tiny_model_folder, adapters):
    options = ["--max-new-tokens", 12, "--temperature", 0]
    for name, folder in adapters.items():
        options += ["--adapter", f"{name}={folder}"]
    [base] = answers(tiny_model_folder, 12, [user("hello")])
    [one], [two] = (answers(folder, 12, [user("hello")]) for folder in adapters.values())
    assert len({base, one, two}) == 3
    lines = [
        "/adapter none",
        "hello",
        "/reset",
        "/adapter one",
        "hello",
        "/compare",
        "/reset",
        "/adapter two",
        "hello",
        "/reset",
    ]
    code, out, err = run("chat", tiny_model_folder, *options, stdin="\n".join([*lines, "/adapter none", "hello", ""]))
    assert (code, out) == (0, f"{base}\n{one}\n[base]\n{base}\n\n[one]\n{one}\n\n{two}\n{base}\n")
    assert err.count("The adapter one answers; there is also two.") == 2 and "The base answers" in err
    code, out, _ = run("chat", adapters["one"], *options[:4], "--adapter", f"two={adapters['two']}", stdin="hello\n")
    assert (code, out) == (0, f"{one}\n")


def test_what_is_typed_changes_the_conversation(run, tiny_model_folder, tmp_path):
    def turns(*texts):
        roles = ("user", "assistant")
        return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]

    kind = {"role": "system", "content": "be kind"}
    [hello, and_, block] = answers(tiny_model_folder, 8, turns("hello"), [kind, user("and?")], turns("a\n\n b\nc"))
    file, prompt = tmp_path / "talk.jsonl", tmp_path / "system.txt"
    prompt.write_text("be kind\n")
    typed = [
        "hello", "/retry", "/undo", f"/system {prompt}", "and?", f"/save {file}", f"/save {file}", "/reset",
        "/system none", f"/load {file}", "/undo", "and?", "/reset", "/system none", '"""', "a", "", " b", "c", '"""',
        "/undo", "a\\", "\\", " b\\", "c",
    ]  # fmt: skip
    options = ["--max-new-tokens", 8, "--temperature", 0]
    code, out, err = run("chat", tiny_model_folder, *options, stdin="\n".join(typed) + "\n")
    assert (code, out) == (0, "".join(f"{text}\n" for text in (hello, hello, and_, and_, block, block)))
    assert json.loads(file.read_text()) == {"messages": [kind, *turns("and?", and_)]}
    assert "Forgotten: hello" in err and f"2 turns from {file}" in err and "Error" not in err


def test_a_file_of_data_that_was_loaded_is_not_written_over(run, tiny_model_folder, tmp_path):
    rows = [{"messages": [user("hello"), {"role": "assistant", "content": "hi"}]}] * 2
    for name, text in (("rows", "\n".join(map(json.dumps, rows))), ("columns", json.dumps(rows[0] | {"source": "x"}))):
        (file := tmp_path / f"{name}.jsonl").write_text(text)
        code, _, err = run("chat", tiny_model_folder, stdin=f"/load {file}\n/save {file}\n")
        assert code == 0 and "is there already" in err and file.read_text() == text


def test_what_cannot_be_done_is_told_and_the_chat_goes_on(run, tiny_model_folder, tmp_path):
    (tmp_path / "there").write_text("x")
    typed = {
        "/tempreature 3": "There is no /tempreature",
        "/set temprature 1": "did you mean 'temperature'?",
        "/set temperature hot": "temperature takes a number",
        "/set temperature -1": "temperature is -1.0",
        "/set top_k 0": "top_k is 0",
        "/set top-k many": "top_k takes a whole number",
        "/adapter terse": "There is no adapter 'terse'; there is none",
        "/compare": "There is no adapter to compare",
        "/retry": "There is no question yet",
        "/save": "/save needs the name of a file",
        f"/save {tmp_path}/x": "There is no turn yet",
        f"/load {tmp_path}/no.jsonl": "no.jsonl",
        "hello": None,
        f"/save {tmp_path}/there": "is there already",
        f"/save {tmp_path}/there/x": "cannot be written",
    }
    code, _, err = run("chat", tiny_model_folder, "--max-new-tokens", 2, stdin="\n".join(typed) + "\n/stats\n/help\n")
    told = re.findall(r"^ ?.*?Error: (.*)$", err, re.MULTILINE)
    expected = [about for about in typed.values() if about]
    assert code == 0 and len(told) == len(expected), err
    for about, sentence in zip(expected, told, strict=True):
        assert about in sentence
    assert "through transformers" in err and "/adapter [NAME|none]" in err
    assert (tmp_path / "there").read_text() == "x"


@pytest.mark.parametrize(
    ("options", "about"),
    [
        (["--adapter", "x"], "write NAME=PATH"),
        (["--adapter", "a1={one}", "--adapter", "a1={two}"], "Two adapters are called 'a1'"),
        (["--adapter", "a1={tmp}"], "is no adapter"),
        (["--kv", "int4"], "int8"),
        (["--kv", "int8"], "decodes through transformers"),
    ],
)
def test_bad_options_are_one_sentence(run, tiny_model_folder, adapters, tmp_path, options, about):
    given = [option.format(tmp=tmp_path, **adapters) for option in options]
    code, out, err = run("chat", tiny_model_folder, *given)
    assert (code, out) == (2, "") and about in err and "Traceback" not in err


TEXT = """# A title

A *text* with <b>tags</b> and
two lines.

- one
- two

```python
x = [1]

y = 2
```

| a | b |
|---|---|
| 1 | 2 |

The end of `it`."""


def screen_of(height=12):
    file = io.StringIO()
    return MarkdownScreen(Console(file=file, force_terminal=True, width=60, height=height, color_system=None)), file


def left_of(drawn, width=60):
    """Return what a terminal shows in the end, by the few controls that are drawn with."""
    lines, row, column = [""], 0, 0
    for found in re.finditer(r"\x1b\[(\??\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)", drawn):
        number, control, start, newline, text = found.groups()
        if control == "A":
            row = max(0, row - int(number or 1))
        elif control == "K":
            lines[row] = ""
        elif start:
            column = 0
        elif newline:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_answer_that_comes_in_pieces_is_drawn_like_one_that_is_there(monkeypatch, size):
    monkeypatch.setattr("halfbyte.cli.chat_screen.SECONDS", 0)
    screen, file = screen_of()
    screen.begin()
    for place in range(0, len(TEXT), size):
        screen.add(TEXT[place : place + size])
    screen.end()
    whole = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    whole.print(markdown(TEXT))
    expected = [line.rstrip() for line in whole.file.getvalue().splitlines()]
    drawn = left_of(file.getvalue())
    assert [line for line in drawn if line] == [line for line in expected if line]
    assert "A text with <b>tags</b> and" in drawn and "two lines." in drawn


def test_no_more_is_drawn_anew_than_the_screen_has(monkeypatch):
    monkeypatch.setattr("halfbyte.cli.chat_screen.SECONDS", 0)
    screen, file = screen_of(height=8)
    screen.begin()
    text = "```\n" + "".join(f"line {n}\n" for n in range(40)) + "```"
    for place in range(0, len(text), 5):
        screen.add(text[place : place + 5])
    screen.end()
    assert max(re.findall(r"(?:\x1b\[1A\x1b\[2K)+", file.getvalue()), key=len).count("1A") < 8
    assert [line.strip() for line in left_of(file.getvalue()) if line.strip()] == [f"line {n}" for n in range(40)]


def test_only_the_last_block_is_left_open():
    assert last_block("one\n\ntwo") == 5 and last_block("one\ntwo") == 0 and last_block("") == 0
    assert last_block("# a\n\n```\nx\n\ny\n") == 5
    assert shown("a\x1b[2J\x07b\n\tc\x9b1") == "a␛[2J␇b\n\tc�1"


def test_no_terminal_obeys_what_a_model_writes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    screen = PlainScreen()
    screen.add("a\x1b[2J")
    screen.columns({"base": "b\x1b[2J"}, is_last=True)
    assert capsys.readouterr().out == "a␛[2J[base]\nb␛[2J\n\n"


def test_a_remark_beside_a_pipe_is_a_line(capsys):
    screen = PlainScreen()
    screen.add("a")
    screen.end("cut")
    assert capsys.readouterr() == ("a\n", " (cut)\n")


def test_a_terminal_gets_editing_markdown_and_history(tiny_model_folder, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "halfbyte", "chat", str(tiny_model_folder), "--max-new-tokens", "3"]
    variables = os.environ | {"TERM": "xterm", "HALFBYTE_CACHE": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    variables.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables, close_fds=True)
    os.close(theirs)
    seen = b""

    def wait(what):
        nonlocal seen
        end = time.monotonic() + 120
        while what not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096)
        seen = seen[seen.index(what) + len(what) :]

    try:
        wait(b"> ")
        os.write(ours, b"/he\t\n")  # completed
        wait(b"Tell what there is")
        wait(b"> ")
        os.write(ours, b"\x1b[200~one\ntwo\x1b[201~\n")  # pasted
        wait(b"> ")
        os.write(ours, b"/undo\n")
        wait(b"Forgotten: one two")
        wait(b"> ")
        os.write(ours, b"/qui\x7fit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
    history = tmp_path / "chat_history"
    assert "/help" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_thoughts_go_to_standard_error_or_are_hidden(run, tiny_model_folder, tmp_path):
    for file in tiny_model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = tmp_path / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    )
    assert template.read_text().endswith("<think>{% endif %}")
    [thought] = answers(tmp_path, 12, [user("hello")])
    options = ["chat", tmp_path, "--max-new-tokens", 12, "--temperature", 0]
    code, out, err = run(*options, stdin="hello\n")
    assert (code, out) == (0, "\n") and thought.strip() in err
    code, out, err = run(*options, "--thinking", "hide", stdin="hello\n")
    assert (code, out) == (0, "\n") and thought.strip() not in err
