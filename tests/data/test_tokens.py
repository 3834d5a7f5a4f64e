import copy
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte.choices import IGNORED
from halfbyte.data import BadRow, Chat, Completion, Example, Text, chat_template, decode_trained, encode_examples
from halfbyte.errors import InputError

Rows = list[dict[str, list[int]]]

# Templates in the manner of well-known models, each with the stop that closes its answers.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|turn|>model{{ '\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|eot|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (  # an earlier turn's thought is stripped
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
OPENING = (  # every thought is stripped, and the generation prompt opens one
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{{ '\n' }}{% endif %}"
)
UNCLOSED = (  # nothing closes an answer
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<|turn|>", "<|user|>", "<|assistant|>", "<|system|>"]
ALPHABET = "ab .:\n\té😀<|>[]"
CORPUS = [  # enough of each pair of characters that tokens of several grow from them, also across words and lines
    "Is it good? It is good, it is. Answer: positive\n\n### Response:\nnegative\n[user] assistant system",
    *("".join(letters) * 2 for letters in itertools.product(ALPHABET, repeat=3)),
]


@functools.cache
def byte_level() -> str:
    """GPT-2's kind: byte-level pieces, whose offsets leave away leading spaces, and no token before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@functools.cache
def sentence_piece() -> str:
    """Llama's kind: a space before a text, bytes for unknown characters, ``<s>`` before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((line for text in CORPUS for line in text.split("\n")), trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


KINDS = {"byte_level": byte_level, "sentence_piece": sentence_piece}


@functools.cache
def tokenizer_with(template: str | None, kind: str = "byte_level", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(KINDS[kind]()), bos_token="<s>", eos_token=eos, pad_token="</s>"
    )
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def rows_of(examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast, max_length: int = 1000) -> Rows:
    """The rows of all examples as plain lists."""
    rows = [row for encoded in encode_examples(examples, tokenizer, max_length) for row in encoded.rows]
    assert all(values.dtype == np.int32 for row in rows for values in row.values())
    return [{name: values.tolist() for name, values in row.items()} for row in rows]


def truncated(examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[bool]:
    return [encoded.truncated for encoded in encode_examples(examples, tokenizer, max_length)]


def learned(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> list[tuple[list[int], str]]:
    """Take the rows apart: for each trained stretch, the ids before it and the text that it adds to theirs."""
    stretches = []
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        trained = [label != IGNORED for label in labels] + [False]
        start = 0
        for i in range(1, len(trained)):
            if trained[i] and not trained[i - 1]:
                start = i
            if trained[i - 1] and not trained[i]:
                before = tokenizer.decode(ids[:start])
                stretches.append((ids[:start], tokenizer.decode(ids[:i])[len(before) :]))
    return stretches


def prompt_in_use(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    """What generation is given."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


CONVERSATIONS = [
    conversation("Is it good?", "positive"),
    conversation("Is it?", "It is\n\ngood.", "Not bad 😀?", "é 日本", "And?", "<b>x</b>"),
    conversation("Is it?", "negative", system="Answer in one word."),
    [{"role": "assistant", "content": "Hi, what is it?"}, *conversation("a", "b")],
    conversation("a", "", "b", "c", "and a question that nobody answers"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize(
    ("template", "stop", "rows_of_their_own"),
    [
        (CHATML, "<|im_end|>", False),
        (LLAMA, "<|eot|>", False),
        (GEMMA, "<|eot|>", False),
        (MISTRAL, "</s>", False),
        (PHI, "<|eot|>\n</s>", True),
        (UNCLOSED, "</s>", True),
    ],
)
def test_exactly_the_answers_and_their_stops_are_trained_after_the_prompts_of_use(
    template: str, stop: str, rows_of_their_own: bool, messages: list[dict[str, str]], kind: str
) -> None:
    if template is GEMMA and messages[0]["role"] != "user":
        return  # refused, as the model's own template does
    tokenizer = tokenizer_with(template, kind)
    rows = rows_of([Chat("row 1", messages)], tokenizer)
    turns = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
    space = " " if template is MISTRAL else ""
    answers = [space + messages[i]["content"] + stop for i in turns]
    stretches = learned(tokenizer, rows)
    assert [text for _, text in stretches] == answers
    assert [before for before, _ in stretches] == [prompt_in_use(tokenizer, messages[:i]) for i in turns]
    assert len(rows) == (len(turns) if rows_of_their_own else 1)


@pytest.mark.parametrize("template", [CHATML, LLAMA, GEMMA, MISTRAL])
def test_a_row_is_the_rendered_conversation_up_to_its_last_stop(template: str) -> None:
    tokenizer = tokenizer_with(template)
    messages = conversation("Is it?", "It is", "good?", "positive")
    [row] = rows_of([Chat("row 1", messages)], tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


CONTENT = st.text(ALPHABET, min_size=1, max_size=8)


@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6))
@settings(max_examples=200)
def test_any_content_is_trained_to_the_character(contents: list[str], kind: str) -> None:
    tokenizer = tokenizer_with(CHATML, kind)
    messages = conversation(*contents)
    stretches = learned(tokenizer, rows_of([Chat("row 1", messages)], tokenizer))
    assert [text for _, text in stretches] == [content + "<|im_end|>" for content in contents[1::2]]
    assert stretches[0][0] == prompt_in_use(tokenizer, messages[:1])


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=CONTENT, completion=CONTENT)
@settings(max_examples=300)
def test_without_a_template_a_completion_follows_the_prompt_as_it_is_in_use(
    prompt: str, completion: str, kind: str
) -> None:
    tokenizer = tokenizer_with(None, kind)
    rows = rows_of([Completion("row 1", prompt, completion)], tokenizer)
    assert learned(tokenizer, rows) == [(tokenizer(prompt)["input_ids"], completion + "</s>")]


def test_with_a_template_a_completion_is_an_answer_to_its_prompt() -> None:
    tokenizer = tokenizer_with(CHATML)
    rows = rows_of([Completion("row 1", "Is it?", "It is")], tokenizer)
    assert rows == rows_of([Chat("row 1", conversation("Is it?", "It is"))], tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_template_a_conversation_has_the_plain_one_in_training_and_use(kind: str) -> None:
    tokenizer = tokenizer_with(None, kind)
    messages = conversation("Is it?", "It is", "good?", "positive", system="Short.")
    rows = rows_of([Chat("row 1", messages)], tokenizer)
    begin = "<s>" if kind == "sentence_piece" else ""
    [row] = rows
    assert tokenizer.decode(row["input_ids"]) == (
        f"{begin}Short.\n\n### Instruction:\nIs it?\n\n### Response:\nIt is</s>\n\n"
        "### Instruction:\ngood?\n\n### Response:\npositive</s>"
    )
    in_use = [
        tokenizer.apply_chat_template(
            messages[:i], chat_template=chat_template(tokenizer), add_generation_prompt=True, return_dict=False
        )
        for i in (2, 4)
    ]
    assert learned(tokenizer, rows) == [(in_use[0], "It is</s>"), (in_use[1], "positive</s>")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [None, CHATML])
def test_of_a_text_all_but_the_first_token_is_trained(template: str | None, kind: str) -> None:
    tokenizer = tokenizer_with(template, kind)
    [row] = rows_of([Text("row 1", "It is good.\n ")], tokenizer)
    assert row["input_ids"] == [*tokenizer("It is good.\n ")["input_ids"], tokenizer.eos_token_id]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_a_template_that_strips_earlier_thoughts_gives_each_answer_a_row_with_its_thought() -> None:
    tokenizer = tokenizer_with(THINKING)
    messages = conversation("a", "<think>x</think>b", "c", "<think>y</think>d", "e", "f", "g", "h")
    rows = rows_of([Chat("row 1", messages)], tokenizer)
    assert [decode_trained(tokenizer, row) for row in rows] == [
        ["<think>x</think>b<|im_end|>"],
        ["<think>y</think>d<|im_end|>"],
        ["f<|im_end|>", "h<|im_end|>"],
    ]
    in_use = [prompt_in_use(tokenizer, messages[:i]) for i in (1, 3, 5, 7)]
    assert [before for before, _ in learned(tokenizer, rows)] == in_use


def test_an_answer_goes_on_from_the_thought_that_the_generation_prompt_opens() -> None:
    tokenizer = tokenizer_with(OPENING)
    messages = conversation("a", "<think>\nx</think>b")
    rows = rows_of([Chat("row 1", messages)], tokenizer)
    assert learned(tokenizer, rows) == [(prompt_in_use(tokenizer, messages[:1]), "x</think>b</s>")]
    for answer in ("b", "\nb"):  # without a thought, it closes the one that the prompt opens
        rows = rows_of([Chat("row 1", conversation("a", answer))], tokenizer)
        assert learned(tokenizer, rows) == [(prompt_in_use(tokenizer, messages[:1]), f"\n</think>\n\n{answer}</s>")]


def test_a_template_that_drops_the_answers_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}{% endif %}<|eot|>{% endfor %}"
    )
    with pytest.raises(InputError, match=r"leaves away the question or its answer"):
        rows_of([Chat("row 1", conversation("a", "b"))], tokenizer_with(template))


def test_whitespace_behind_the_stop_token_is_not_trained_even_if_it_is_an_added_token() -> None:
    tokenizer = copy.deepcopy(tokenizer_with(GEMMA))
    tokenizer.add_tokens(["\n"])
    [row] = rows_of([Chat("row 1", conversation("a", "b"))], tokenizer)
    assert decode_trained(tokenizer, row) == ["b<|eot|>"]


def test_a_template_that_refuses_a_conversation_is_quoted() -> None:
    template = GEMMA.replace("messages[0].role == 'system'", "'secret' in messages[0].content")
    [encoded] = encode_examples([Chat("row 3", conversation("secret", "b"))], tokenizer_with(template), 1000)
    assert re.search("row 3: .* refuses this conversation: no system role", str(encoded.bad))


@pytest.mark.parametrize(
    ("template", "example"),
    [
        (None, Text("row 1", "a")),
        (None, Completion("row 1", "a", "b")),
        (None, Chat("row 1", conversation("a", "b"))),
        (UNCLOSED, Chat("row 1", conversation("a", "b"))),
    ],
)
def test_a_tokenizer_that_knows_no_stop_token_is_refused(template: str | None, example: Text) -> None:
    with pytest.raises(InputError, match="never learn to stop"):
        rows_of([example], tokenizer_with(template, eos=None))
    rows_of([Chat("row 1", conversation("a", "b"))], tokenizer_with(CHATML, eos=None))  # has its own


def test_a_text_of_which_nothing_is_left_to_train_is_a_bad_row() -> None:
    [encoded] = encode_examples([Text("row 1", "")], tokenizer_with(None), 1000)
    assert encoded.rows == [] and isinstance(encoded.bad, BadRow)
    assert (encoded.bad.where, encoded.bad.kind) == ("row 1", "nothing to train on")


def test_bad_rows_are_passed_on_in_their_place() -> None:
    bad = BadRow("row 2", "answer is empty", ": there is no answer.")
    rows = list(encode_examples([Text("row 1", "a"), bad, Text("row 3", "b")], tokenizer_with(None), 1000))
    assert [encoded.example.where for encoded in rows] == ["row 1", "row 2", "row 3"]
    assert [encoded.bad for encoded in rows] == [None, bad, None]
    assert [len(encoded.rows) for encoded in rows] == [1, 0, 1]


def test_what_exceeds_max_length_is_cut_off_at_the_right_and_told() -> None:
    tokenizer = tokenizer_with(CHATML)
    examples = [Chat(f"row {n}", conversation("a", "b" * 3 * n, "c", "d")) for n in range(1, 5)]
    whole = rows_of(examples, tokenizer)
    assert truncated(examples, tokenizer, 1000) == [False] * 4
    lengths = [len(row["labels"]) for row in whole]
    for limit in range(lengths[0] - 8, lengths[-1] + 2):
        assert truncated(examples, tokenizer, limit) == [length > limit for length in lengths]
        cut = rows_of(examples, tokenizer, limit)
        assert cut == [{key: values[:limit] for key, values in row.items()} for row in whole]


def test_an_answer_wholly_beyond_max_length_is_a_bad_row_that_tells_the_lengths() -> None:
    tokenizer = tokenizer_with(CHATML)
    messages = conversation("x " * 50, "answer")
    prompt = len(prompt_in_use(tokenizer, messages[:1]))
    examples = [Chat("row 1", conversation("a", "b")), Chat("row 2", messages)]
    assert truncated(examples, tokenizer, prompt + 1) == [False, True]
    [row] = rows_of(examples[1:], tokenizer)
    first, second = encode_examples(examples, tokenizer, prompt)
    assert not first.bad and second.bad and not second.rows
    assert (second.bad.where, second.bad.kind) == ("row 2", "answer beyond max_length")
    assert f"its prompt alone takes {prompt} tokens, so with max_length {prompt} " in str(second.bad)
    needed = int(re.search(r"\((\d+) would hold all of it\)", str(second.bad))[1])  # type: ignore[index]
    assert needed == len(row["labels"])
    assert [truncated(examples[1:], tokenizer, limit) for limit in (needed, needed - 1)] == [[False], [True]]


def test_an_answer_that_is_cut_does_not_train_the_stop_token() -> None:
    tokenizer = tokenizer_with(CHATML)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    example = Chat("row 1", conversation("a", "b" * 30))
    [whole] = rows_of([example], tokenizer)
    assert stop in whole["labels"]
    for limit in range(len(whole["labels"]) - 3, len(whole["labels"])):
        [row] = rows_of([example], tokenizer, limit)
        assert stop not in row["labels"]


def test_a_huge_text_is_tokenized_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(CHATML)
    examples = [
        Text("row 1", "Is it good? " * 2_000),
        Chat("row 2", conversation("a", "It is good. " * 2_000)),
        Chat("row 3", conversation("It is good. " * 2_000, "a")),
        Chat("row 4", conversation("a", "b")),
    ]
    whole = list(encode_examples(examples, tokenizer, 100))
    monkeypatch.setattr("halfbyte.data.tokens.LONG", 1_000)
    clipped = list(encode_examples(examples, tokenizer, 100))
    for one, other in zip(whole, clipped, strict=True):
        assert one.truncated == other.truncated
        assert (one.bad and one.bad.kind) == (other.bad and other.bad.kind)
        assert [row["labels"].tolist() for row in one.rows] == [row["labels"].tolist() for row in other.rows]
    longest = max(map(len, tokenizer.get_vocab()))
    assert all(
        sum(one.lengths) <= 100 * longest < sum(other.lengths) for one, other in zip(clipped[:3], whole, strict=False)
    )
    assert whole[3].lengths == clipped[3].lengths


def test_lengths_prompts_and_trained_tokens_are_there_to_be_counted() -> None:
    tokenizer = tokenizer_with(THINKING)
    messages = conversation("a", "<think>x</think>b", "c " * 9, "d")
    [whole] = encode_examples([Chat("row 1", messages)], tokenizer, 1000)
    prompts = [len(prompt_in_use(tokenizer, messages[:i])) for i in (1, 3)]
    answers = [len(row["labels"]) - prompt for row, prompt in zip(whole.rows, prompts, strict=True)]
    assert (whole.prompts, whole.trained) == (prompts, answers)
    [cut] = encode_examples([Chat("row 1", messages)], tokenizer, prompts[0] + 1)
    assert (cut.prompts, cut.trained) == (prompts[:1], [1])
    assert cut.lengths == whole.lengths == tuple(len(row["labels"]) for row in whole.rows)


def test_a_later_answer_beyond_max_length_in_a_row_of_its_own_is_left_away_and_told() -> None:
    tokenizer = tokenizer_with(THINKING)
    example = Chat("row 1", conversation("a", "<think>x</think>b", "c " * 50, "d"))
    [encoded] = encode_examples([example], tokenizer, 50)
    assert [decode_trained(tokenizer, row) for row in encoded.rows] == [["<think>x</think>b<|im_end|>"]]
    assert encoded.truncated


def test_examples_keep_their_order_and_are_read_little_by_little() -> None:
    tokenizer = tokenizer_with(None)
    read = 0

    def endless() -> Iterator[Text]:
        nonlocal read
        while True:
            yield Text(f"row {read}", f"It is {read}")
            read += 1

    for number, encoded in enumerate(itertools.islice(encode_examples(endless(), tokenizer, 30), 20_000)):
        assert encoded.example.where == f"row {number}"
        assert tokenizer.decode(encoded.rows[0]["input_ids"]) == f"It is {number}</s>"
    assert read < 40_000


def test_an_error_comes_from_the_examples_or_their_texts_alike() -> None:
    def broken() -> Iterator[Text]:
        yield from (Text("", "It is") for _ in range(10_000))
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        list(encode_examples(broken(), tokenizer_with(None), 10))
    texts = [*(Text("", "It is") for _ in range(10_000)), Chat("row 10001", conversation("a", "b"))]
    with pytest.raises(InputError, match="never"):
        list(encode_examples(texts, tokenizer_with("{{ raise_exception('never') }}"), 10))
