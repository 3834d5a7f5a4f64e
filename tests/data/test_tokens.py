import copy
import functools
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from halfbyte.choices import IGNORED
from halfbyte.data import Chat, Collator, Completion, Text, Tokenized, chat_template, decode_trained, tokenize
from halfbyte.errors import InputError

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


def learned(tokenizer: PreTrainedTokenizerFast, tokenized: Tokenized) -> list[tuple[list[int], str]]:
    """Take the rows apart: for each trained stretch, the ids before it and the text that it adds to theirs."""
    stretches = []
    for row in tokenized.rows:
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
    tokenized = tokenize([Chat("row 1", messages)], tokenizer, 1000)
    turns = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
    space = " " if template is MISTRAL else ""
    answers = [space + messages[i]["content"] + stop for i in turns]
    stretches = learned(tokenizer, tokenized)
    assert [text for _, text in stretches] == answers
    assert [before for before, _ in stretches] == [prompt_in_use(tokenizer, messages[:i]) for i in turns]
    assert len(tokenized.rows) == (len(turns) if rows_of_their_own else 1)
    assert tokenized.trained_tokens == sum(label >= 0 for row in tokenized.rows for label in row["labels"])
    assert tokenized.tokens == sum(len(row["input_ids"]) for row in tokenized.rows)


@pytest.mark.parametrize("template", [CHATML, LLAMA, GEMMA, MISTRAL])
def test_a_row_is_the_rendered_conversation_up_to_its_last_stop(template: str) -> None:
    tokenizer = tokenizer_with(template)
    messages = conversation("Is it?", "It is", "good?", "positive")
    [row] = tokenize([Chat("row 1", messages)], tokenizer, 1000).rows
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


CONTENT = st.text(ALPHABET, min_size=1, max_size=8)


@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_content_is_trained_to_the_character(contents: list[str], kind: str) -> None:
    tokenizer = tokenizer_with(CHATML, kind)
    messages = conversation(*contents)
    stretches = learned(tokenizer, tokenize([Chat("row 1", messages)], tokenizer, 1000))
    assert [text for _, text in stretches] == [content + "<|im_end|>" for content in contents[1::2]]
    assert stretches[0][0] == prompt_in_use(tokenizer, messages[:1])


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=CONTENT, completion=CONTENT)
@settings(max_examples=300, deadline=None)
def test_without_a_template_a_completion_follows_the_prompt_as_it_is_in_use(
    prompt: str, completion: str, kind: str
) -> None:
    tokenizer = tokenizer_with(None, kind)
    tokenized = tokenize([Completion("row 1", prompt, completion)], tokenizer, 1000)
    assert learned(tokenizer, tokenized) == [(tokenizer(prompt)["input_ids"], completion + "</s>")]


def test_with_a_template_a_completion_is_an_answer_to_its_prompt() -> None:
    tokenizer = tokenizer_with(CHATML)
    rows = tokenize([Completion("row 1", "Is it?", "It is")], tokenizer, 1000).rows
    assert rows == tokenize([Chat("row 1", conversation("Is it?", "It is"))], tokenizer, 1000).rows


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_template_a_conversation_has_the_plain_one_in_training_and_use(kind: str) -> None:
    tokenizer = tokenizer_with(None, kind)
    messages = conversation("Is it?", "It is", "good?", "positive", system="Short.")
    tokenized = tokenize([Chat("row 1", messages)], tokenizer, 1000)
    begin = "<s>" if kind == "sentence_piece" else ""
    [row] = tokenized.rows
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
    assert learned(tokenizer, tokenized) == [(in_use[0], "It is</s>"), (in_use[1], "positive</s>")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [None, CHATML])
def test_of_a_text_all_but_the_first_token_is_trained(template: str | None, kind: str) -> None:
    tokenizer = tokenizer_with(template, kind)
    [row] = tokenize([Text("row 1", "It is good.\n ")], tokenizer, 1000).rows
    assert row["input_ids"] == [*tokenizer("It is good.\n ")["input_ids"], tokenizer.eos_token_id]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_a_template_that_strips_earlier_thoughts_gives_each_answer_a_row_with_its_thought() -> None:
    tokenizer = tokenizer_with(THINKING)
    messages = conversation("a", "<think>x</think>b", "c", "<think>y</think>d", "e", "f", "g", "h")
    tokenized = tokenize([Chat("row 1", messages)], tokenizer, 1000)
    assert [decode_trained(tokenizer, row) for row in tokenized.rows] == [
        ["<think>x</think>b<|im_end|>"],
        ["<think>y</think>d<|im_end|>"],
        ["f<|im_end|>", "h<|im_end|>"],
    ]
    in_use = [prompt_in_use(tokenizer, messages[:i]) for i in (1, 3, 5, 7)]
    assert [before for before, _ in learned(tokenizer, tokenized)] == in_use


def test_an_answer_goes_on_from_the_thought_that_the_generation_prompt_opens() -> None:
    tokenizer = tokenizer_with(OPENING)
    messages = conversation("a", "<think>\nx</think>b")
    tokenized = tokenize([Chat("row 1", messages)], tokenizer, 1000)
    assert learned(tokenizer, tokenized) == [(prompt_in_use(tokenizer, messages[:1]), "x</think>b</s>")]
    for answer in ("b", "\nb"):
        with pytest.raises(InputError, match=r"row 1: .*'\[assistant\]<think>\\n'"):
            tokenize([Chat("row 1", conversation("a", answer))], tokenizer, 1000)


def test_a_template_that_drops_the_answers_is_refused() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}<|eot|>{% endfor %}"
    with pytest.raises(InputError, match=r"row 1: .* does not write this answer"):
        tokenize([Chat("row 1", conversation("a", "b"))], tokenizer_with(template), 1000)


def test_whitespace_behind_the_stop_token_is_not_trained_even_if_it_is_an_added_token() -> None:
    tokenizer = copy.deepcopy(tokenizer_with(GEMMA))
    tokenizer.add_tokens(["\n"])
    [row] = tokenize([Chat("row 1", conversation("a", "b"))], tokenizer, 1000).rows
    assert decode_trained(tokenizer, row) == ["b<|eot|>"]


def test_a_template_that_refuses_a_conversation_is_quoted() -> None:
    with pytest.raises(InputError, match=r"row 3: .* refuses this conversation: no system role"):
        tokenize([Chat("row 3", conversation("a", "b", system="s"))], tokenizer_with(GEMMA), 1000)


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
        tokenize([example], tokenizer_with(template, eos=None), 1000)
    tokenize([Chat("row 1", conversation("a", "b"))], tokenizer_with(CHATML, eos=None), 1000)  # has its own


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="ByT5Tokenizer is not a fast tokenizer"):
        tokenize([Text("row 1", "a")], ByT5Tokenizer(), 1000)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"row 1 is empty"):
        tokenize([Text("row 1", "")], tokenizer_with(None), 1000)


def test_what_exceeds_max_length_is_cut_off_at_the_right_and_counted() -> None:
    tokenizer = tokenizer_with(CHATML)
    examples = [Chat(f"row {n}", conversation("a", "b" * 3 * n, "c", "d")) for n in range(1, 5)]
    whole = tokenize(examples, tokenizer, 1000)
    assert (whole.examples, whole.truncated) == (4, 0)
    lengths = [len(row["labels"]) for row in whole.rows]
    for limit in range(lengths[0] - 8, lengths[-1] + 2):
        cut = tokenize(examples, tokenizer, limit)
        assert cut.truncated == sum(length > limit for length in lengths)
        assert cut.rows == [{key: values[:limit] for key, values in row.items()} for row in whole.rows]


def test_an_answer_wholly_beyond_max_length_is_refused_with_the_lengths() -> None:
    tokenizer = tokenizer_with(CHATML)
    messages = conversation("x " * 50, "answer")
    prompt = len(prompt_in_use(tokenizer, messages[:1]))
    short = Chat("row 1", conversation("a", "b"))
    assert tokenize([short, Chat("row 2", messages)], tokenizer, prompt + 1).truncated == 1
    with pytest.raises(InputError, match=rf"row 2: its prompt alone takes {prompt} tokens, .* max_length {prompt} "):
        tokenize([short, Chat("row 2", messages)], tokenizer, prompt)


def test_a_later_answer_beyond_max_length_in_a_row_of_its_own_is_left_away_and_counted() -> None:
    tokenizer = tokenizer_with(THINKING)
    example = Chat("row 1", conversation("a", "<think>x</think>b", "c " * 50, "d"))
    tokenized = tokenize([example], tokenizer, 50)
    assert [decode_trained(tokenizer, row) for row in tokenized.rows] == [["<think>x</think>b<|im_end|>"]]
    assert (tokenized.examples, tokenized.truncated) == (1, 1)


def test_rows_keep_the_order_of_the_examples_and_progress_is_told() -> None:
    tokenizer = tokenizer_with(None)
    told: list[tuple[int, int]] = []
    rows = tokenize([Text("", f"It is {n}") for n in range(2500)], tokenizer, 10, lambda *n: told.append(n)).rows
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [f"It is {n}</s>" for n in range(2500)]
    assert told[-1] == (2500, 2500) and told == sorted(set(told))


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (4, 8), (5, 5)])
@pytest.mark.parametrize("pad", [None, 7])
def test_a_batch_holds_its_rows_and_neither_attends_to_nor_trains_the_padding(
    multiple: int, length: int, pad: int | None
) -> None:
    rows = [
        {"input_ids": [1, 2], "labels": [IGNORED, 2]},
        {"input_ids": [3, 7, 7, 5, 7], "labels": [IGNORED, 7, 7, 5, 7]},
    ]
    batch = Collator(pad, pad_to_multiple_of=multiple)(rows)
    assert {(tensor.shape, tensor.dtype) for tensor in batch.values()} == {((2, length), torch.int64)}
    for index, row in enumerate(rows):
        attended = batch["attention_mask"][index].bool()
        assert attended.tolist() == [True] * len(row["labels"]) + [False] * (length - len(row["labels"]))
        for key, values in row.items():
            assert batch[key][index][attended].tolist() == values
        assert batch["labels"][index][~attended].eq(IGNORED).all()
        assert batch["input_ids"][index][~attended].eq(pad or 0).all()
