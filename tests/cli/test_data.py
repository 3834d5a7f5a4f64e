"""``halfbyte data`` as its users see it: the table, the page, the files, and that no text of the data gets loose."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from halfbyte import cli
from halfbyte.cli import data as command
from halfbyte.cli.data_terminal import scale
from halfbyte.cli.options import check_words
from halfbyte.data.options import DataOptions
from halfbyte.data.survey import Bin
from halfbyte.data.table import Counts, Tokenized
from halfbyte.errors import InputError

Run = Callable[..., tuple[int, str, str]]
NASTY = (
    "</pre></td></style><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt; &amp; \"'` "
    "\x1b[31mred\x1b]0;title\x07 \x00 \x9b1m \u202eevil\u202c \u2066x\u2069 [bold]:smile:[/] {{ 7*7 }} {% if %}"
)
OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, standard output and standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfbyte", "data", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()  # type: ignore[return-value]

    return run


def rows(path: Path, *pairs: tuple[str, str]) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return rows(tmp_path / "data.jsonl", *((f"say {n}", f"it is {n}") for n in "abcdef"))


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    return rows(
        tmp_path / "<i>nasty\u202e&.jsonl",
        (NASTY, NASTY),
        (NASTY, NASTY),
        ("מה שלומך?", "שלום 👩‍👩‍👧‍👦"),
        (NASTY, "no"),
    )


def test_it_shows_counts_lengths_and_rows_with_what_is_trained_marked(
    run: Run, file: Path, tiny_model_folder: Path
) -> None:
    code, out, err = run(file, "--model", tiny_model_folder, "--samples", 1)
    assert (code, err) == (0, "")
    assert re.search(r"^rows +6 *$", out, re.MULTILINE)
    # <|im_start|>user↵say a<|im_end|>↵<|im_start|>assistant↵ is 1+5+5+1+1+1+10, the answer 7 and its end
    assert re.search(r"^tokens +192 *$", out, re.MULTILINE)
    assert re.search(r"^trained tokens +48 \(25%\) *$", out, re.MULTILINE)
    assert re.search(r"^they end with +“<\|im_end\|>” 100% *$", out, re.MULTILINE)
    assert out.endswith(
        "row 1 of 6 (" + str(file) + ", row 1 (line 1)): 32 tokens, 8 of them trained\n"
        "<|im_start|>user↵\nsay a<|im_end|>↵\n<|im_start|>assistant↵\n⟦it is a<|im_end|>⟧\n"
    )


def test_a_row_and_the_borders_of_tokens_can_be_asked_for(run: Run, file: Path, tiny_model_folder: Path) -> None:
    code, out, _ = run(file, "--model", tiny_model_folder, "--row", 3, "--row", 2, "--tokens")
    assert code == 0
    assert re.findall(r"^row (\d)", out, re.MULTILINE) == ["3", "2"]
    assert "⟦i│t│ │i│s│ │c│<|im_end|>⟧\n" in out


def test_colours_take_the_place_of_brackets(
    run: Run, file: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = run(file, "--model", tiny_model_folder, "--samples", 1)
    assert "⟦" not in out
    assert "\x1b[1;32mit is a\x1b[0m" in out and "\x1b[1;2;32m<|im_end|>\x1b[0m" in out
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = run(file, "--model", tiny_model_folder, "--samples", 1)
    assert "⟦it is a<|im_end|>⟧" in out


@pytest.mark.parametrize("colours", [False, True])
def test_texts_of_the_data_do_nothing_to_a_terminal(
    run: Run, nasty: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, colours: bool
) -> None:
    if colours:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, _ = run(nasty, "--model", tiny_model_folder, "--row", 1, "--row", 3)
    assert code == 0
    own = re.sub(r"\x1b\[[0-9;]*m", "", out) if colours else out
    assert "[31mred" not in out.replace("\\x1b[31mred", "")
    assert not set(own) & set(OVERRIDES + "\x00\x07\x1b\x9b\r")
    assert "\\x1b[31mred\\x1b]0;title\\x07 \\x00 \\x9b1m \\u202eevil\\u202c" in own
    assert "[bold]:smile:[/]" in own
    assert "מה שלומך?" in own and "שלום 👩‍👩‍👧‍👦" in own


class Page(HTMLParser):
    """What a browser would find in a page: tags with their attributes, and the text of what is no style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("style", "pre", "title", "li"):
            self._open = tag
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


KNOWN = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "bdi", "ul", "li", "table", "tr", "th",
         "td", "picture", "source", "img", "pre", "span", "div"}  # fmt: skip


def test_the_page_lets_no_text_of_the_data_loose(run: Run, nasty: Path, tiny_model_folder: Path) -> None:
    file = nasty.with_name("page.html")
    code, _, err = run(nasty, "--model", tiny_model_folder, "--eval-data", nasty, "--html", file)
    assert (code, err) == (0, "")
    raw = file.read_text(encoding="utf-8")
    page = Page(raw)
    assert {tag for tag, _ in page.tags} <= KNOWN
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    links = [
        link for _, attributes in page.tags for name in ("src", "srcset", "href") if (link := attributes.get(name))
    ]
    assert len(links) == 2 and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not set(raw) & set(OVERRIDES + "\x00\x1b\x07\x9b")
    # what stands in the page is the data, the same but for the escapes
    told = "".join(page.texts["pre"])
    assert "</style><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt; &amp; \"'`" in told
    assert "\\u202eevil" in told and "{{ 7*7 }} {% if %}" in told and "שלום 👩‍👩‍👧‍👦" in told
    assert all(attributes["dir"] == "auto" for attributes in page.of("pre"))


def test_the_page_allows_its_own_style_and_nothing_else(run: Run, file: Path, tiny_model_folder: Path) -> None:
    target = file.with_name("page.html")
    assert run(file, "--model", tiny_model_folder, "--html", target)[0] == 0
    page = Page(target.read_text(encoding="utf-8"))
    (policy,) = [str(tag["content"]) for tag in page.of("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (style,) = page.texts["style"]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'", "style-src": f"'sha256-{digest}'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'",
    }  # fmt: skip
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    for picture in (page.of("img")[0]["src"], page.of("source")[0]["srcset"]):
        svg = base64.b64decode(str(picture).split(",")[1])
        assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")


def test_the_page_shows_rows_duplicates_and_pairs(run: Run, tmp_path: Path, tiny_model_folder: Path) -> None:
    long = "all the same but for one word at the end of it "
    data = rows(tmp_path / "a.jsonl", ("q", long + "x"), ("q", long + "x"), ("q", long + "y"), ("r", "s"))
    evaluation = rows(tmp_path / "b.jsonl", ("r", "s"), ("t", "u"))
    target = tmp_path / "page.html"
    assert run(data, "--model", tiny_model_folder, "--eval-data", evaluation, "--html", target)[0] == 0
    text = target.read_text(encoding="utf-8")
    about = [re.sub("<.*?>", "", line) for line in re.findall(r'<p class="about">.*?</p>', text)]
    assert sum(line.startswith("Row ") for line in about) == 4
    (group,) = [line for line in about if " times, first as row " in line]
    assert group.startswith("2 times, first as row 1 ")
    pairs = [re.findall(r"(?:Rows|and) (\d) ", line) for line in about if line.startswith("Rows ")]
    assert pairs == [["3", "1"], ["1", "3"], ["1", "4"]]  # nearly equal, one prompt, trained on too
    assert any("trained on too: 1 of 2;" in hint for hint in Page(text).texts["li"])
    trained = re.findall(r'<span class="t">(.*?)</span>', text)
    assert {"s", long + "x", long + "y"} <= set(trained)


def test_json_alone_is_all_that_is_printed(run: Run, nasty: Path, tiny_model_folder: Path) -> None:
    code, out, err = run(nasty, "--model", tiny_model_folder, "--json", "-")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["rows"], found["duplicates"]["rows"], found["contradictions"]["rows"]) == (4, 1, 3)
    assert out.isascii()
    target = nasty.with_name("numbers.json")
    code, out, _ = run(nasty, "--model", tiny_model_folder, "--json", target)
    assert code == 0 and "row 1 of 4" in out
    assert json.loads(target.read_text()) == found


def test_the_picture_is_one(run: Run, file: Path, tiny_model_folder: Path) -> None:
    for name in ("a.png", "a.svg"):
        assert run(file, "--model", tiny_model_folder, "--picture", file.with_name(name))[0] == 0
    with Image.open(file.with_name("a.png")) as image:
        assert image.format == "PNG" and image.width > 800 and len(image.convert("RGB").getcolors(1 << 20) or []) > 3
    assert xml.etree.ElementTree.parse(file.with_name("a.svg")).getroot().tag.endswith("svg")


BAD = {
    "row that is not there": (["{file}", "--row", "7"], r"no row 7; the data has 6\."),
    "row 0": (["{file}", "--row", "0"], r"'--row'"),
    "picture of another kind": (["{file}", "--picture", "{tmp}/a.jpg"], r"a\.jpg: .*\.png or a \.svg"),
    "page that cannot be written": (["{file}", "--html", "{file}/page.html"], r"data\.jsonl is a file"),
    "page that is a folder": (["{file}", "--html", "{tmp}"], r"'--html'.* is a directory"),
    "no data": ([], r"files"),
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_sentence_and_nothing_is_written(
    run: Run, file: Path, tiny_model_folder: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    given = [argument.replace("{tmp}", str(tmp_path)).replace("{file}", str(file)) for argument in arguments]
    target = tmp_path / "numbers.json"
    code, out, err = run(*given, "--model", tiny_model_folder, "--json", target)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"Error: .*{sentence}.*\n", err, re.IGNORECASE), err
    assert sorted(tmp_path.iterdir()) == [file]


def test_it_fails_where_nothing_would_be_learnt(
    run: Run, file: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = command._opened(DataOptions(model=str(tiny_model_folder), data=str(file)))
    untrained = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, -100]], "where": ["row 1"]})
    made = Tokenized(untrained, Counts(rows=1, tokens=2, longest=2))
    nothing = dataclasses.replace(opened, data=dataclasses.replace(opened.data, train=made))
    monkeypatch.setattr(command, "_opened", lambda _: nothing)
    code, out, err = run(file, "--model", tiny_model_folder, "--html", file.with_name("page.html"))
    assert (code, out) == (2, "")
    assert re.fullmatch(r"Error: Nothing would be learnt: none of the 2 tokens .*\n", err)
    assert not file.with_name("page.html").exists()


def test_one_long_line_is_shown_without_its_middle(run: Run, tmp_path: Path, tiny_model_folder: Path) -> None:
    data = rows(tmp_path / "long.jsonl", ("q", "x" * 100_000))
    code, out, _ = run(data, "--model", tiny_model_folder, "--max-length", 5000)
    assert code == 0
    assert re.search(r"⟦x+⟧ … 4,600 tokens left out … ⟦x+⟧\n$", out)
    assert "Examples cut at max_length 5,000: 1;" in out


def test_no_sample_is_no_sample(run: Run, file: Path, tiny_model_folder: Path) -> None:
    code, out, _ = run(file, "--model", tiny_model_folder, "--samples", 0)
    assert code == 0 and "⟦" not in out and "row 1 of" not in out


@pytest.mark.parametrize("width", [20, 40, 80, 160])
def test_the_scale_stands_under_its_blocks(width: int) -> None:
    bins = [Bin(1, 9, 0, 0), *(Bin(10 * n, 10 * n + 9, n, 9 - n) for n in range(1, 9)), Bin(90, 90, 0, 0)]
    rows, trained, labels = (line[len("tokens a row ") :] for line in scale(bins, width))
    wide = len(rows) // 8
    assert rows == "".join(block * wide for block in "▁▂▃▄▅▆▇█")
    assert trained == rows[::-1]
    for label in re.finditer(r"\d+", labels):
        assert label.start() % wide == 0 and int(label[0]) == 10 * (label.start() // wide + 1)
    assert labels.startswith("10") and len(labels) <= width - 13


def test_pairs_are_shown_with_both_answers_also_by_the_method_of_a_run(
    run: Run, tiny_model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "say", "chosen": "good", "rejected": "not so good"}))
    config = tmp_path / "train.yaml"
    config.write_text(f"method: dpo\nmodel: {tiny_model_folder}\ndata: {file}\noutput: o\nbeta: 0.2\n")
    page = tmp_path / "page.html"
    for arguments in ([file, "--model", tiny_model_folder, "--method", "dpo"], ["--config", config, "--html", page]):
        code, out, err = run(*arguments)
        assert code == 0, err
        assert (
            "chosen:" in out and "⟦good<|im_end|>⟧" in out and "rejected:" in out and "⟦not so good<|im_end|>⟧" in out
        )
    written = page.read_text()
    assert written.index(">chosen<") < written.index(">rejected<")
    code, _, err = run(file, "--model", tiny_model_folder, "--method", "text")
    assert code == 2 and "is a Preference, but method text learns from Text rows" in err


def test_the_data_is_never_overwritten(run: Run, file: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    held_out = rows(tmp_path / "held-out.json", ("say x", "it is x"))
    link = tmp_path / "link.html"
    link.symlink_to(file)
    before = file.read_bytes(), held_out.read_bytes()
    for flag, target in (("--html", file), ("--json", file), ("--json", held_out), ("--html", link)):
        code, out, err = run(file, "--model", tiny_model_folder, "--eval-data", held_out, flag, target)
        assert (code, out, err) == (2, "", f"Error: {flag} {target} would overwrite the data; name another file.\n")
    assert run(tmp_path / "*.jsonl", "--model", tiny_model_folder, "--json", file)[0] == 2
    assert (file.read_bytes(), held_out.read_bytes()) == before


def test_a_file_of_another_kind_is_not_overwritten(
    run: Run, file: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    for flag in ("--html", "--json"):
        code, out, err = run(file, "--model", tiny_model_folder, flag, thesis)
        assert (code, out) == (2, "") and err.startswith(
            f"Error: {thesis} is there already and may be something else; "
        )
    assert thesis.read_text() == "years of work"
    page = tmp_path / "page.htm"
    page.write_text("an earlier one")
    assert run(file, "--model", tiny_model_folder, "--html", page)[0] == 0
    assert "<html" in page.read_text()


def test_a_file_behind_evaluation_data_is_not_taken_for_training_data(
    run: Run, file: Path, tiny_model_folder: Path
) -> None:
    for arguments in (
        (file, "--eval-data", "b", "c d"),
        ("--eval-data=b", "c d", "--row", 1),
        ("--eval-data", "b", "c d"),
    ):
        code, out, err = run(*arguments, "--model", tiny_model_folder)
        assert (code, out) == (2, "")
        assert err == (
            "Error: --eval-data takes one name, but 'c d' stands behind 'b'; for several write --eval-data b "
            "--eval-data 'c d', and put training data before all flags.\n"
        )
    code, _, err = run(file, "--model", tiny_model_folder, "other.jsonl")
    assert code == 2 and err.endswith("and 'other.jsonl'; name all of it before the flags.\n")
    assert run("--tokens", "--model", tiny_model_folder, file, file)[0] == 0


def test_of_judged_answers_supervised_training_takes_the_good_ones(
    run: Run, tmp_path: Path, tiny_model_folder: Path
) -> None:
    file = tmp_path / "judged.jsonl"

    def write(*labels: bool) -> None:
        lines = [{"prompt": f"say {n}", "completion": f"it is {n}", "label": good} for n, good in enumerate(labels)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(True, False, False, True, False)
    code, out, err = run(file, "--model", tiny_model_folder)
    assert (code, err) == (0, "") and re.search(r"^rows +2 *$", out, re.MULTILINE)
    assert "Left out, 3 rows whose answers are judged bad (method kto learns from them too)" in out
    code, out, _ = run(file, "--model", tiny_model_folder, "--method", "kto")
    assert code == 0 and "Left out" not in out
    write(False, False)
    code, out, err = run(file, "--model", tiny_model_folder)
    assert (code, out) == (2, "")
    assert err.startswith("Error: There is nothing to train on:\nLeft out, 2 rows whose answers are judged bad (")


def test_that_the_model_has_no_chat_template_is_said_before_the_rows(
    run: Run, tmp_path: Path, file: Path, tiny_model_folder: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_folder, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": None}))
    sentence = "! The model has no chat template; a plain one is taken and saved with the adapter\n"
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.write_text(json.dumps({"messages": turns}))
    code, out, _ = run(chat, "--model", bare)
    assert code == 0 and sentence in out.partition("row 1 of 1")[0]
    for data, model in ((file, bare), (chat, tiny_model_folder)):
        code, out, _ = run(data, "--model", model)
        assert code == 0 and "chat template" not in out


def test_train_says_how_several_files_are_named() -> None:
    takes = {"--data": True, "--model": True, "--resume": False}
    for arguments in (["--data", "a", "b"], ["--model", "m", "--data=a", "b", "--resume"]):
        with pytest.raises(InputError, match=r"'b' stands behind 'a'; for several write --data a --data b[.]$"):
            check_words(arguments, takes, {"--data"}, bare=False)
    with pytest.raises(InputError, match=r"'a' belongs to no flag; data is named so: --data a[.]$"):
        check_words(["a", "--model", "m"], takes, {"--data"}, bare=False)
    check_words(["--data", "a", "--data", "-", "--resume"], takes, {"--data"}, bare=False)
