"""The command line as its users see it: exit codes, the two streams, and that what it says to type works."""

import errno
import functools
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import safetensors
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import halfbyte
from halfbyte import cli
from halfbyte.cli import console
from halfbyte.generate.native_decoder import NativeDecoder
from halfbyte.generate.stream import stream_reply
from halfbyte.generate.transformers_decoder import TransformersDecoder
from halfbyte.plan import doctor
from halfbyte.runs.config import TrainConfig


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
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f'{{"prompt": "say {n}", "completion": "it is {n}"}}\n' for n in "abcdef"))
    return file


@pytest.fixture(scope="module")
def tiny(tiny_model_folder):
    """The tiny model in 4 bits and its tokenizer, as the commands open them."""
    return halfbyte.load(tiny_model_folder), halfbyte.load_tokenizer(tiny_model_folder)


def greedy(tiny, prompt, max_new_tokens):
    """Return the likeliest answer to a rendered prompt, from ``generate`` in one piece."""
    model, tokenizer = tiny
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def test_parsing_imports_neither_torch_nor_transformers():
    script = "import sys; from halfbyte import cli; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"


def test_alone_it_shows_its_commands(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in ("train", "chat", "generate", "quantize", "doctor"))


def test_it_names_its_version(run):
    assert run("--version") == (0, f"halfbyte {halfbyte.__version__}\n", "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_train_has_a_flag_with_help_and_default_for_each_option(run, flag):
    code, out, _ = run("train", flag)
    words = "".join(out.split())
    assert code == 0
    for name, field in TrainConfig.model_fields.items():
        assert re.search(rf"^  --{name.replace('_', '-')}( |$)", out, re.MULTILINE), name
        help = field.description
        if not field.is_required() and field.default is not None:
            help += f"[default: {field.default}]"
        assert "".join(help.split()) in words, name


BAD = {
    "unknown command": (["trian"], r"No such command 'trian'.* 'train'"),
    "unknown flag": (["train", "--learning-rat", "1"], r"No such option: --learning-rat .*--learning-rate"),
    "argument given as an option": (["merge", "{tmp}", "--output", "{tmp}/o"], r"OUTPUT .* halfbyte merge RUN OUTPUT"),
    "flag of another type": (["train", "--rank", "many"], r"'--rank'"),
    "flag out of bounds": (["train", "--model", "m", "--data", "d", "--output", "o", "--rank", "0"], r"'rank'.* 0 "),
    "unknown choice": (["quantize", "m", "o", "--quant-type", "nf5"], r"'nf5' is not one of nf4, fp4.*mean 'nf4'"),
    "option with another value": (["train", "--model", "m", "--data", "d", "--skip-bad-rows", "al"], r"'al'.* 'all'"),
    "missing option": (["train"], r"'model' is missing"),
    "missing argument": (["chat"], r"'\{?model\}?'"),
    "missing configuration": (["train", "--config", "{tmp}/no.yaml"], r"no\.yaml: cannot read"),
    "configuration that is not YAML": (["train", "--config", "{tmp}/bad.yaml"], r"bad\.yaml: .*YAML"),
    "unknown key": (["train", "--config", "{tmp}/key.yaml"], r"key\.yaml: unknown option 'lora_alhpa'.*'lora_alpha'"),
    "missing data": (["train", "--model", "{tiny}", "--data", "{tmp}/no", "--output", "{tmp}/o"], r"'{tmp}/no'"),
    "missing model": (["generate", "{tmp}/no", "--prompt", "x"], r"{tmp}/no"),
    "model to chat with missing": (["chat", "{tmp}/no"], r"{tmp}/no"),
    "model to quantize missing": (["quantize", "{tmp}/no", "{tmp}/o"], r"{tmp}/no"),
    "folder without a model": (["generate", "{tmp}", "--prompt", "x"], r"{tmp}"),
    "damaged model": (["generate", "{tmp}/damaged", "--prompt", "x"], r"{tmp}/damaged"),
    "output that is there": (["quantize", "{tiny}", "{tmp}"], r"{tmp} .*--overwrite"),
    "output that is no model": (["quantize", "{tiny}", "{tmp}", "--overwrite"], r"{tmp} holds no model"),
    "raw with a system prompt": (["generate", "{tiny}", "--prompt", "x", "--raw", "--system", "s"], r"--raw.*--system"),
    "empty raw prompt": (["generate", "{tiny}", "--prompt", "", "--raw"], r"prompt is empty"),
    "seed out of bounds": (["generate", "{tiny}", "--prompt", "x", "--seed", str(2**32)], r"'--seed'.*4294967295"),
    "prompt beyond the context": (["generate", "{tiny}", "--prompt", "x" * 300], r"attends to 256"),
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_sentence_and_exit_code_2(run, tmp_path, tiny_model_folder, arguments, sentence):
    (tmp_path / "bad.yaml").write_text("rank: [1\n")
    (tmp_path / "key.yaml").write_text("lora_alhpa: 16\n")
    (tmp_path / "damaged").mkdir()
    for file in tiny_model_folder.iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes()[:3000])
    places = {"{tmp}": str(tmp_path), "{tiny}": str(tiny_model_folder)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
        sentence = sentence.replace(name, re.escape(place))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"Error: .*{sentence}.*\n", err), err
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["generate", "classify", "train"])
def test_a_gpu_that_is_not_there_is_refused(run, tmp_path, tiny_model_folder, command):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = {
        "generate": [str(tiny_model_folder), "--prompt", "x"],
        "classify": [str(tiny_model_folder), "--text", "x"],
        "train": ["--model", str(tiny_model_folder), "--data", str(tmp_path / "rows.jsonl"), f"--output={tmp_path}/o"],
    }
    code, out, err = run(command, *words[command], "--device", "cuda")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"Error: device is cuda, but .* use device cpu\.\n", err), err
    assert not (tmp_path / "o").exists()


def test_a_fresh_program_says_nothing_else_while_it_imports(tmp_path):
    script = "from halfbyte.cli import main; main()"
    command = [sys.executable, "-c", script, "generate", str(tmp_path / "no"), "--prompt", "x"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (2, "")
    assert re.fullmatch(r"Error: [^\n]+\n", told.stderr), told.stderr


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/metrics.jsonl"),
    safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["the system's error", "safetensors' error"])
def test_a_full_disk_gets_one_sentence_and_exit_code_2(run, monkeypatch, error):
    monkeypatch.setattr(doctor, "line", lambda: (_ for _ in ()).throw(error))
    code, out, err = run("doctor", "--line")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"Error: The disk is full.*\n", err)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), PermissionError(errno.EACCES, "not allowed")])
def test_any_other_error_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(doctor, "line", lambda: (_ for _ in ()).throw(error))
    monkeypatch.setattr(sys, "argv", ["halfbyte", "doctor", "--line"])
    with pytest.raises(type(error)):
        cli.main()


def test_signals_are_afterwards_as_they_were(run):
    before = signal.getsignal(signal.SIGTERM)
    run("--version")
    run("doctor", "--nonsense")
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_elsewhere_is_told_with_exit_code_130(run, monkeypatch):
    monkeypatch.setattr(doctor, "line", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("doctor", "--line") == (130, "", "Interrupted.\n")


def started(*arguments, **options):
    """Run the command line as a program of its own; returns exit code, standard output and standard error."""
    command = [sys.executable, "-c", "from halfbyte.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, **options)
    return done.returncode, done.stdout, done.stderr


def test_arguments_that_are_no_text_are_told():
    code, out, err = started("generate", "m", "--prompt", b"caf\xe9")
    assert (code, out) == (2, b"")
    assert re.fullmatch(rb"Error: The argument 'caf\\udce9' is not UTF-8 text; .*\n", err)


def test_a_working_directory_that_is_gone_is_told(tmp_path):
    script = f"cd {tmp_path}/a && rmdir ../a && {sys.executable} -c 'from halfbyte.cli import main; main()' doctor"
    (tmp_path / "a").mkdir()
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: The working directory is gone; change to one that is there.\n"


def test_a_reader_that_has_gone_is_quiet_with_the_shells_exit_code():
    script = f"{sys.executable} -c 'from halfbyte.cli import main; main()' train --help; echo $? >&2"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        reader.stdout.close()
        assert reader.stderr.read() == "141\n"


def test_answers_that_the_terminal_cannot_hold_are_printed_with_question_marks(run, monkeypatch, tmp_path):
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", latin)
    monkeypatch.setattr(doctor, "line", lambda: "für 漢")
    run("doctor", "--line")
    latin.flush()
    assert latin.buffer.getvalue() == b"f\xfcr ?\n"


def test_standard_input_may_be_closed_or_hold_what_is_no_text(tiny_model_folder):
    program = [sys.executable, "-c", "from halfbyte.cli import main; main()"]
    generate = shlex.join([*program, "generate", str(tiny_model_folder), "--prompt", "-", "--max-new-tokens", "2"])
    told = subprocess.run(["sh", "-c", f"{generate} <&-"], capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (2, "")
    assert "standard input, but that is closed" in told.stderr
    told = subprocess.run(["sh", "-c", generate], input=b"caf\xe9", capture_output=True)
    assert (told.returncode, told.stdout) == (2, b"")
    assert b"Error: The prompt is not UTF-8 text: '\\udce9' at character 3" in told.stderr


FOUND = [
    doctor.Finding("threads", "2 of 2 cores"),
    doctor.Finding("huge pages", "the system grants none", "It costs some percent.", "echo madvise", "note"),
    doctor.Finding("kernels", "reference", "They are slow.", "pip install .", "warning"),
]
FAULT = doctor.Finding("torch", "is not installed", "Nothing works.", "pip install torch", "fault")


def test_doctor_prints_each_finding_with_why_and_what_to_paste(run, monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda: FOUND)
    assert run("doctor") == (
        0,
        "threads          2 of 2 cores\n"
        "huge pages       note: the system grants none\n"
        "                 It costs some percent.\n"
        "                 → echo madvise\n"
        "kernels          warning: reference\n"
        "                 They are slow.\n"
        "                 → pip install .\n\n1 warning, 1 note.\n",
        "",
    )
    monkeypatch.setattr(doctor, "report", lambda: [*FOUND, FAULT])
    code, out, err = run("doctor")
    assert (code, err) == (1, "") and out.endswith("\n1 fault, 1 warning, 1 note.\n")
    monkeypatch.setattr(doctor, "report", lambda: FOUND[:1])
    assert run("doctor")[1].endswith("\nNothing is wrong.\n")
    assert run("doctor", "--line") == (0, f"{doctor.line()}\n", "")


def test_doctor_s_findings_are_a_list_of_json_of_one_form(run, monkeypatch, tiny_model_folder):
    monkeypatch.setattr(doctor, "report", lambda: [*FOUND, FAULT])
    code, out, err = run("doctor", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)[-1] == {
        "what": "torch",
        "value": "is not installed",
        "why": "Nothing works.",
        "fix": "pip install torch",
        "level": "fault",
    }
    code, out, err = run("doctor", tiny_model_folder, "--json")
    assert {tuple(sorted(one)) for one in json.loads(out)} == {("fix", "level", "value", "what", "why")}
    assert code == any(one["level"] == "fault" for one in json.loads(out))


def test_doctor_tells_a_model_a_run_a_script_and_a_notebook_apart(run, tiny_model_folder, tmp_path):
    code, out, _ = run("doctor", tiny_model_folder)
    assert code == 0 and "2 LlamaDecoderLayer: fused" in out
    script = tmp_path / "a.py"
    script.write_text("import nothing_of_that_name\n")
    code, out, _ = run("doctor", script)
    assert code == 1 and "line 1: nothing_of_that_name is not installed" in out
    cells = [{"cell_type": "code", "source": ["!ls\n", "import nothing_of_that_name"], "metadata": {}}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    code, out, _ = run("doctor", tmp_path / "a.ipynb")
    assert code == 1 and "cell 1, line 2: nothing_of_that_name is not installed" in out
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    code, out, _ = run("doctor", tmp_path / "run")
    assert code == 0 and "broken off after 0 steps" in out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing.py", None, "There is no script"),
        ("a.py", b"print 'x'\n", "is not Python that could be run"),
        ("a.py", b"\xff\xfe", "is not UTF-8"),
        ("a.ipynb", b"{", "is not a notebook"),
        ("a.txt", b"x", "is neither a script"),
        ("nowhere/model", None, "There is no folder"),
        ("", None, "is no run folder"),
    ],
)
def test_what_doctor_cannot_look_at_is_one_sentence(run, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run("doctor", tmp_path / name)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and said in err


def test_doctor_s_line_is_of_this_machine(run, tiny_model_folder):
    code, _, err = run("doctor", "--line", tiny_model_folder)
    assert code == 2 and "--line is of this machine" in err


def test_generate_prints_the_likeliest_answer_and_nothing_else(run, tiny, tiny_model_folder):
    expected = greedy(tiny, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", 24)
    assert run("generate", tiny_model_folder, "--prompt", "hello", "--max-new-tokens", 24) == (0, f"{expected}\n", "")


def test_generate_reads_the_prompt_from_standard_input(run, tiny_model_folder):
    given = run("generate", tiny_model_folder, "--prompt", "hello", "--max-new-tokens", 8)
    assert run("generate", tiny_model_folder, "--prompt", "-", "--max-new-tokens", 8, stdin="hello") == given


def test_generate_puts_the_system_prompt_first(run, tiny, tiny_model_folder):
    prompt = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    options = ["--prompt", "hello", "--system", "be kind", "--max-new-tokens", 24]
    assert run("generate", tiny_model_folder, *options)[1] == greedy(tiny, prompt, 24) + "\n"


def test_generate_raw_goes_on_with_the_prompt_as_it_stands(run, tiny_model_folder, tmp_path):
    # in fp32, where no two logits are as near as rounding
    config = halfbyte.HalfbyteConfig(compute_dtype=torch.float32)
    halfbyte.hf.quantize_checkpoint(tiny_model_folder, tmp_path / "m", config)
    opened = halfbyte.load(tmp_path / "m"), halfbyte.load_tokenizer(tmp_path / "m")
    options = ["--prompt", "hello wor", "--raw", "--max-new-tokens", 24]
    assert run("generate", tmp_path / "m", *options)[1] == greedy(opened, "hello wor", 24) + "\n"


def test_generate_draws_the_same_answer_again_with_the_same_seed(run, tiny_model_folder):
    options = ["--prompt", "hello", "--max-new-tokens", 16, "--temperature", 2]
    one, again, other = (run("generate", tiny_model_folder, *options, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == again != other


def test_a_model_without_a_chat_template_says_so_beside_the_answer(run, tiny_model_folder, tmp_path):
    for file in tiny_model_folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, _, err = run("generate", tmp_path, "--prompt", "hello", "--max-new-tokens", 2)
    assert (code, err) == (0, "The model has no chat template; a plain one is used.\n")
    assert run("generate", tmp_path, "--prompt", "hello", "--raw", "--max-new-tokens", 2)[2] == ""


def test_chat_remembers_the_turns_until_it_is_reset(run, tiny, tiny_model_folder):
    def answer(*turns):
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
        return "".join(stream_reply(*tiny, messages, max_new_tokens=12))

    first = answer("hello")
    second = answer("hello", first, "and?")
    assert second != answer("and?")
    code, out, err = run(
        *("chat", tiny_model_folder, "--max-new-tokens", 12, "--temperature", 0),
        stdin="hello\n\nand?\n/rset\n/reset\nand?\n",
    )
    assert (code, out) == (0, f"{first}\n{second}\n{answer('and?')}\n")
    assert "There is no /rset" in err


def test_chat_ends_with_quit(run, tiny_model_folder):
    code, out, _ = run("chat", tiny_model_folder, stdin="/quit\nhello\n")
    assert (code, out) == (0, "")


def _passed(self, function, step, *arguments):
    return function(functools.partial(step, self), *arguments)


def test_an_interrupt_in_chat_stops_the_answer_and_not_the_program(run, tiny_model_folder, monkeypatch):
    steps = []

    def interrupting(step, *arguments):
        steps.append(len(steps))
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        if len(steps) >= 5:
            time.sleep(0.02)  # the tiny model would have said all before a signal is heard
        return step(*arguments)

    for decoder in (NativeDecoder, TransformersDecoder):
        monkeypatch.setattr(decoder, "step", functools.partialmethod(_passed, interrupting, decoder.step))
    options = ["--max-new-tokens", 150, "--temperature", 0]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts things behind it
    try:
        code, _, err = run("chat", tiny_model_folder, *options, stdin="hello\n/nonsense\n")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 0
    assert 5 <= len(steps) < 149
    assert "(stopped)" in err
    assert "There is no /nonsense" in err


def test_chat_goes_on_after_a_question_that_is_too_long(run, tiny_model_folder):
    code, out, err = run("chat", tiny_model_folder, "--max-new-tokens", 2, stdin="x" * 300 + "\nhello\n")
    assert code == 0
    assert "attends to 256" in err
    assert out


def test_quantize_says_how_small_the_model_became(run, tiny_model_folder, tmp_path):
    code, out, err = run("quantize", tiny_model_folder, tmp_path / "out", "--quant-type", "fp4", "--no-double-quant")
    assert (code, err) == (0, "")
    parameters = sum(tensor.numel() for tensor in load_file(tiny_model_folder / "model.safetensors").values())
    bits = 8 * (tmp_path / "out/model.safetensors").stat().st_size / parameters
    assert f" {bits:.2f} bits for each of {parameters:,} parameters" in out
    weight = halfbyte.load(tmp_path / "out").model.layers[0].mlp.up_proj.quantized_weight
    assert weight.statistics.nested is None
    command = shlex.split(out.splitlines()[-1])
    assert run(*command[1:], "--max-new-tokens", 2, stdin="hello\n")[0] == 0


def test_train_takes_a_file_and_flags_and_ends_with_commands_that_work(run, tiny_model_folder, tmp_path, data):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny_model_folder}\ndata: {data}\nrank: 3\nlora_alpha: 5\nbatch_size: 2\n")
    output = tmp_path / "a run"
    code, out, err = run(
        *("train", "--config", file, "--output", output, "--lora-alpha", 7, "--max-steps", 2, "--no-double-quant")
    )
    assert code == 0
    assert "6 examples" in err
    written = yaml.safe_load((output / "config.yaml").read_text())
    given = {"rank": 3, "lora_alpha": 7, "batch_size": 2, "max_steps": 2, "double_quant": False, "blocksize": 64}
    assert {name: written[name] for name in given} == given
    chat, generate = (shlex.split(line)[1:] for line in out.splitlines()[-2:])
    assert (chat[0], generate[0]) == ("chat", "generate")
    assert run(*chat, "--max-new-tokens", 2, stdin="hello\n")[0] == 0
    code, answer, err = run(*generate, "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    assert answer
    code, out, err = run("train", "--config", file, "--output", output)
    assert (code, out) == (2, "")
    assert "already holds a run" in err


def test_an_interrupt_in_training_says_how_to_go_on(run, tiny_model_folder, tmp_path, data):
    output = tmp_path / "run"
    metrics = output / "metrics.jsonl"

    def interrupt():
        for _ in range(1000):
            if metrics.exists() and metrics.read_text().count('"kind":"step"') >= 2:
                return os.kill(os.getpid(), 2)
            time.sleep(0.02)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    flags = ["--rank", 2, "--max-steps", 20, "--batch-size", 1, "--gradient-accumulation-steps", 1]
    code, out, err = run("train", "--model", tiny_model_folder, "--data", data, "--output", output, *flags)
    watcher.join()
    assert (code, out) == (130, "")
    assert "interrupted" in err
    resume = shlex.split(err.splitlines()[-1])[1:]
    assert run(*resume)[0] == 0
    told = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [event["step"] for event in told if event["kind"] == "step"] == list(range(1, 21))


def test_paths_with_a_tilde_are_the_users(run, monkeypatch, tiny_model_folder, tmp_path, data):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "m").symlink_to(tiny_model_folder)
    flags = ["--rank", 2, "--max-steps", 1, "--batch-size", 1, "--gradient-accumulation-steps", 1]
    assert run("train", "--model", "~/m", "--data", "~/data.jsonl", "--output", "~/run", *flags)[0] == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert [written[name] for name in ("model", "data", "output")] == [
        str(tmp_path / name) for name in ("m", "data.jsonl", "run")
    ]
    assert run("generate", "~/run", "--prompt", "x", "--max-new-tokens", 1)[0] == 0
    assert run("quantize", "~/m", "~/q")[0] == 0
    assert run("chat", "~/q")[0] == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_program_is_named_as_it_was_started(run, monkeypatch, tiny_model_folder, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["venv/bin/halfbyte"])
    assert console.command("chat", "a b") == "venv/bin/halfbyte chat 'a b'"
    (tmp_path / "halfbyte").write_text("#!/bin/sh\n")
    (tmp_path / "halfbyte").chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "halfbyte")])
    assert console.command("chat") == "halfbyte chat"


def test_without_a_terminal_progress_is_lines(monkeypatch, capsys):
    monkeypatch.setattr(console, "notes", Console(file=sys.stderr))
    monkeypatch.setattr(console, "EVERY", 0.0)
    with console.bar("Merging", "{task.description}") as progress:
        task = progress.add_task("weights")
        progress.update(task, completed=1, total=1272)
        progress.update(task, completed=120)
    assert re.fullmatch(
        r"Merging weights: 1 of 1,272\nMerging weights: 120 of 1,272, .+ left\n", capsys.readouterr().err
    )
    monkeypatch.setattr(console, "EVERY", 60.0)
    with console.bar("Merging") as progress:
        progress.update(progress.add_task(""), completed=1, total=2)
    assert capsys.readouterr().err == ""
