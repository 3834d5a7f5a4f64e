"""What the chat template is told and what it writes; ``test_tokens`` has the claims about answers and stops."""

import functools
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte.data import BadRow, Chat, Completion, Preference, Text, chat_template, fitting, rendering
from halfbyte.data.messages import text_of
from halfbyte.data.template import Draft, Writer, _begin
from halfbyte.errors import InputError

from .templates import (
    CONVERSATIONS,
    RESULT,
    TOOLS,
    answer,
    call,
    template_of,
    tokenizer_for,
    tools_of,
    trl_folder,
    user,
)

NAMED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name else '' }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def trained(draft: Draft) -> list[str]:
    return [draft.text[start:end] for start, end in draft.spans]


def test_the_spans_of_a_draft_are_its_answers_with_their_stops(tokenizer: Any) -> None:
    write = Writer(tokenizer)
    turns = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b")] * 2]
    [chat] = write(Chat("row 1", turns))
    assert trained(chat) == ["b<|im_end|>"] * 2
    [completion] = write(Completion("row 1", "a", "b"))
    assert completion == write(Chat("row 1", turns[:2]))[0]
    [text] = write(Text("row 1", "a text"))
    assert trained(text) == ["a text<|im_end|>"] == [text.text]


def test_what_else_a_message_has_is_there_for_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = NAMED
    turns = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    [draft] = Writer(tokenizer)(Chat("row 1", turns))
    assert draft.text == "<|im_start|>user Ann\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"


@pytest.mark.parametrize(("name", "told"), [("\ud800", "lone surrogate"), ([], "brackets within brackets")])
def test_what_else_a_message_has_may_be_bad_too(tokenizer: Any, name: Any, told: str) -> None:
    tokenizer.chat_template = NAMED
    if isinstance(name, list):
        for _ in range(900):  # as deep as JSON's parser takes it
            name = [name]
    turns = [{"role": "user", "content": "a", "name": name}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match=f"row 7: .*{told}"):
        Writer(tokenizer)(Chat("row 7", turns))


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def answers_of(drafts: list[Draft]) -> list[str]:
    return [answer.removesuffix("<|im_end|>") for draft in drafts for answer in trained(draft)]


def test_which_answers_are_trained_is_the_options_word_unless_a_turn_has_its_own(tokenizer: Any) -> None:
    messages = turns("a", "one", "b", "two", "c", "three")
    every, last = Writer(tokenizer), Writer(tokenizer, train_on="last")
    assert answers_of(every(Chat("row 1", messages))) == ["one", "two", "three"]
    assert answers_of(last(Chat("row 1", messages))) == ["three"]
    assert last(Chat("row 1", messages))[0].text == every(Chat("row 1", messages))[0].text
    messages[3]["train"] = True
    assert answers_of(last(Chat("row 1", messages))) == ["two", "three"]
    messages[5]["train"] = False
    assert answers_of(every(Chat("row 1", messages))) == ["one", "two"]
    assert answers_of(last(Chat("row 1", messages))) == ["two"]
    for message in messages[1::2]:
        message["train"] = False
    with pytest.raises(BadRow, match=r"row 1: all its answers are marked as not to be trained") as told:
        every(Chat("row 1", messages))
    assert told.value.kind == "no answer to train"


def test_a_template_is_not_told_what_is_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = NAMED.replace("m.content }}", "m.content }}{{ m.keys() | join('+') }}")
    messages = turns("a", "one", "b", "two")
    told = Writer(tokenizer)(Chat("row 1", messages))[0].text
    messages[1]["train"] = messages[3]["train"] = True
    assert Writer(tokenizer)(Chat("row 1", messages))[0].text == told and "one" + "role+content" in told


def test_joined_turns_are_trained_only_if_each_of_them_is(tokenizer: Any) -> None:
    tokenizer.chat_template = ALTERNATING
    messages = [*turns("a", "one"), {"role": "assistant", "content": "more"}, *turns("b", "two")]
    assert answers_of(Writer(tokenizer)(Chat("row 1", messages))) == ["one\n\nmore", "two"]
    messages[2]["train"] = False
    assert answers_of(Writer(tokenizer)(Chat("row 1", messages))) == ["two"]


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('by turns') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
DOUBLING = (
    "{% set n = namespace(text='a' * 1000) %}{% for a in range(60) %}{% set n.text = n.text ~ n.text %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages[0].content.nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% set x = messages.append('a') %}", "unsafe|not safely callable"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "brackets within brackets|itself"),
        ("{{ 1 + messages }}", "unsupported operand"),
        (LOOP + "{% endfor %}{% endfor %}", "runs without end"),
        (LOOP + "{{ 'a' * 99999 }}{% endfor %}{% endfor %}", "runs without end"),
        (DOUBLING, "runs without end"),
        ("{{ 'a' * 10000000000 }}", "takes too much memory"),
        ("{{ messages[0].content * 10000000000 }}", "takes too much memory"),
        ("{% set a = 'a' * 100000000 %}{{ (a ~ a) | list | string }}", "takes too much memory"),
        ("{% if add_generation_prompt %}" + LOOP + "{% endfor %}{% endfor %}{% endif %}{{ messages }}", "without end"),
        ("{{ 'Hello.' }}", "leaves away the question or its answer"),
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "leaves away the question"),
    ],
)
def test_a_template_that_cannot_work_is_told_in_one_line(
    tokenizer: Any, template: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 60 if template == DOUBLING else 0.5)
    monkeypatch.setattr(rendering, "MEMORY", 1 << 28)
    tracing, bounds = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError, match=told) as error:
        Writer(tokenizer, chat_template=template)(Chat("row 1", turns("a", "b")))
    assert not isinstance(error.value, BadRow) and "\n" not in str(error.value)
    assert sys.gettrace() is tracing and resource.getrlimit(resource.RLIMIT_AS) == bounds


def test_what_a_template_leaves_away_of_a_row_makes_it_a_bad_row(tokenizer: Any) -> None:
    tokenizer.chat_template = NAMED.replace("m.content }}", "m.content | replace('secret', '') }}")
    write = Writer(tokenizer)
    assert answers_of(write(Chat("row 1", turns("a", "b")))) == ["b"]
    with pytest.raises(BadRow, match=r"row 2: .* leaves away what a message of the user says \('a secret'\)") as told:
        write(Chat("row 2", turns("a secret", "b")))
    assert told.value.kind == "left away by the chat template"


WAYS = ("tojson", "trim", "replace('\n\n', '\n')")


@pytest.mark.parametrize("word", ['say "a" and \\', "it's\na line", "umlaut ä 😀", "two\n\n\nlines", " \t"])
@pytest.mark.parametrize(
    "form", ["m.content", "m.content | tojson", "m.content | trim", "m.content | replace('\n\n', '\n')"]
)
def test_what_a_template_writes_otherwise_is_not_left_away(tokenizer: Any, form: str, word: str) -> None:
    tokenizer.chat_template = NAMED.replace("m.content", form)
    assert len(Writer(tokenizer)(Chat("row 1", turns(word, "b")))) == 1


def test_what_a_template_forgets_before_a_later_answer_makes_it_a_bad_row_too(tokenizer: Any) -> None:
    forgetting = NAMED.replace("m.content }}", "m.content if loop.revindex < 3 or 'secret' not in m.content }}")
    write = Writer(tokenizer, chat_template=forgetting)
    assert answers_of(write(Chat("row 1", turns("a secret", "b")))) == ["b"]
    with pytest.raises(BadRow, match=r"row 2: .* leaves away what a message of the user says \('a secret'\)"):
        write(Chat("row 2", turns("a secret", "b", "c", "d")))


def test_parts_that_are_no_text_and_calls_without_arguments_in_json_are_bad_rows() -> None:
    write = Writer(tokenizer_for(template_of("qwen3")))
    image = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "a"}]
    for content, found in ((image, "'image'"), ({"city": "Bonn"}, "{'city': 'Bonn'}"), ([3], r"\[3\]"), (7, "7")):
        with pytest.raises(BadRow, match=f"row 1: a message of the user holds {found}, and only text can be"):
            write(Chat("row 1", [{"role": "user", "content": content}, answer("b")]))
    for broken in ("{city: Bonn", "[1]", 3, "[" * 100_000):
        message = call("Bonn")
        message["tool_calls"][0]["function"]["arguments"] = broken
        with pytest.raises(BadRow, match="row 1: it has a tool call without a name, or with arguments that are not"):
            write(Chat("row 1", [user("a"), message, RESULT, answer("b")], tools=TOOLS))
    for broken in ("weather", ["weather"], [{"type": "function"}], [{"function": {"arguments": {}}}]):
        with pytest.raises(BadRow, match="row 1: it has a tool call without a name"):
            write(Chat("row 1", [user("a"), {**answer(""), "tool_calls": broken}], tools=TOOLS))
    [draft] = write(Chat("row 1", [user("a"), {**answer("b"), "tool_calls": [], "reasoning_content": None}]))
    assert [draft] == write(Chat("row 1", turns("a", "b")))


def test_what_stands_behind_the_last_answer_is_left_out_and_said(tokenizer: Any) -> None:
    [draft] = Writer(tokenizer)(Chat("row 1", turns("a", "b", "c")))
    assert draft.text.endswith("b<|im_end|>") and draft.notes == (fitting.UNANSWERED,)


def test_a_system_text_that_nobody_answers_yet_is_the_question() -> None:
    prompts = writer_of("gemma").prompt([{"role": "system", "content": "Be kind."}])
    assert prompts == "<bos><start_of_turn>user\nBe kind.<end_of_turn>\n<start_of_turn>model\n"


def test_a_second_call_that_the_template_does_not_write_makes_a_bad_row() -> None:
    both = {**call("Bonn"), "tool_calls": [*call("Bonn")["tool_calls"], *call("Ulm")["tool_calls"]]}
    example = Chat("row 1", [user("a"), both, RESULT, RESULT, answer("b")], tools=TOOLS)
    with pytest.raises(BadRow, match=r"leaves away what a message of the assistant says \('Ulm'\)"):
        Writer(tokenizer_for(template_of("gptoss")))(example)
    assert "Ulm" in trained(Writer(tokenizer_for(template_of("qwen3")))(example)[0])[0]


def test_arguments_in_json_text_are_the_object(tokenizer: Any) -> None:
    given, text = call("Bonn"), call("Bonn")
    text["tool_calls"][0]["function"]["arguments"] = '{"city": "Bonn"}'
    for name in ("qwen3", "deepseekv3", "llama3_1"):
        write = Writer(tokenizer_for(template_of(name)))
        one, other = (write(Chat("row 1", [user("a"), message, RESULT, answer("b")])) for message in (given, text))
        assert one == other


def test_tools_that_the_template_cannot_tell_of_are_said_beside_calls_and_else_bad() -> None:
    drafts = Writer(tokenizer_for(template_of("deepseekv3")))(
        Chat("row 1", [user("a"), call("Bonn"), RESULT, answer("b")], tools=TOOLS)
    )
    assert drafts[0].notes == (fitting.NO_TOOLS,)
    with pytest.raises(BadRow, match="row 1: it has tools, but the model's chat template cannot tell the model of any"):
        Writer(tokenizer_for(template_of("phi3")))(Chat("row 1", turns("a", "b"), tools=TOOLS))


def test_what_a_template_cannot_write_is_called_what_it_is(tokenizer: Any) -> None:
    write = Writer(tokenizer_for(template_of("phi3")))
    with pytest.raises(BadRow, match="row 1: it has results of tools, which the model's chat template cannot write"):
        write(Chat("row 1", [user("a"), RESULT, answer("b")]))
    with pytest.raises(BadRow, match="row 1: it has tool calls, which the model's chat template cannot write"):
        write(Chat("row 1", [user("a"), call("Bonn"), RESULT, answer("b")]))
    messages = turns("a", "one", "b", "")
    messages[3]["train"] = False
    with pytest.raises(BadRow, match="row 1: its last answer is empty, so there is nothing to learn from it"):
        Writer(tokenizer, train_on="last")(Chat("row 1", messages))


BASES = sorted(file.stem for file in trl_folder().glob("*.jinja") if not file.stem.endswith("_training"))


@pytest.mark.parametrize("name", BASES)
def test_generation_is_given_what_stands_before_an_answer_in_training(name: str) -> None:
    write = writer_of(name)
    compared = 0
    for conversation, messages in CONVERSATIONS.items():
        tools = tools_of(conversation)
        try:
            drafts = write(Chat("row 1", messages, tools=tools))
        except BadRow as bad:
            assert bad.kind == "tool calls that the chat template cannot write"
            continue
        prompts = [draft.text[:start] for draft in drafts for start, _ in draft.spans]
        at = [at for at, message in enumerate(messages) if at and message["role"] == "assistant"]
        if len(at) == len(prompts):  # else two of them became one
            assert [write.prompt(messages[:index], tools) for index in at] == prompts, conversation
            compared += 1
    assert compared >= len(CONVERSATIONS) - 3


@functools.cache
def writer_of(name: str) -> Writer:
    return Writer(tokenizer_for(template_of(name)))


STOPS = {"gemma4": "<turn|>", "lfm2_2_5": "<|im_end|>", "llama3": "<|eot_id|>"}
THOUGHT_OF = {"lfm2": "<think>{}</think>", "gemma": "<|channel>thought\n{}\n<channel|>"}


@pytest.mark.parametrize("name", [name for name in BASES if name.startswith(("gemma4", "lfm2_2", "llama3_"))])
def test_templates_without_a_twin_train_the_answer_and_its_stop(name: str) -> None:
    stop = next(stop for start, stop in STOPS.items() if name.startswith(start))
    write = writer_of(name)
    for conversation in ("one turn", "several", "system", "empty answer", "parts", "two user turns", "later system"):
        messages = CONVERSATIONS[conversation]
        words = [text_of(message) for message in messages if message["role"] == "assistant"]
        assert [text for draft in write(Chat("row 1", messages)) for text in trained(draft)] == [
            word + stop for word in words
        ]
    [draft] = write(Chat("row 1", CONVERSATIONS["thought"]))
    own = name.startswith("lfm2") or name == "gemma4_v5"
    lead = (
        THOUGHT_OF[name[:4] if name[:4] == "lfm2" else "gemma"].format("Thought one.")
        if own
        else ("<think>\nThought one.\n</think>\n\n")
    )
    assert trained(draft) == [lead + "Answer one." + stop]


def test_a_long_conversation_is_written_as_turn_by_turn() -> None:
    messages = turns(*(f"{'question' if at % 2 else ' answer'} {at}\n" for at in range(1, 21)))
    for name in BASES:
        write = Writer(tokenizer_for(template_of(name)))
        at_once = write(Chat("row 1", messages))
        write.dialect.__dict__["appends"] = False
        assert write(Chat("row 1", messages)) == at_once


def test_an_answer_is_trained_behind_a_past_that_its_template_writes_otherwise_afterwards() -> None:
    messages = [user("a"), {**call("Bonn"), "reasoning_content": "Hm."}, RESULT, answer("b")]
    drafts = writer_of("gptoss")(Chat("row 1", messages))
    hm = "<|channel|>analysis<|message|>Hm.<|end|>"
    assert [text for draft in drafts for text in trained(draft)] == [
        f'{hm}<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{{"city": "Bonn"}}<|call|>',
        "<|channel|>final<|message|>b<|return|>",
    ]
    in_use = tokenizer_for(template_of("gptoss")).apply_chat_template(
        messages[:3], tokenize=False, add_generation_prompt=True
    )
    assert drafts[-1].text.startswith(in_use) and hm in in_use


SWITCHED = ["glm4moe", "nemotron_3_nano", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"]


@pytest.mark.parametrize("thinking", ["on", "off"])
@pytest.mark.parametrize("name", SWITCHED)
def test_a_saved_template_thinks_or_not_as_in_training_unless_it_is_told_otherwise(name: str, thinking: Any) -> None:
    tokenizer = tokenizer_for(template_of(name))
    saved = chat_template(tokenizer, thinking=thinking)
    texts = {}
    for switch in (True, False):
        texts[switch] = tokenizer.apply_chat_template(
            turns("a"), tokenize=False, add_generation_prompt=True, enable_thinking=switch
        )
        again = tokenizer.apply_chat_template(
            turns("a"), chat_template=saved, tokenize=False, add_generation_prompt=True, enable_thinking=switch
        )
        assert again == texts[switch]
    assert texts[True] != texts[False]
    wanted = texts[thinking == "on"]
    in_use = tokenizer.apply_chat_template(turns("a"), chat_template=saved, tokenize=False, add_generation_prompt=True)
    [draft] = Writer(tokenizer, thinking=thinking)(Chat("row 1", turns("a", "b")))
    assert in_use == wanted == draft.text[: draft.spans[0][0]]


@pytest.mark.parametrize("name", SWITCHED)
def test_thoughts_are_trained_with_thinking_on_and_left_out_and_said_with_thinking_off(name: str) -> None:
    example = Chat("row 1", CONVERSATIONS["thoughts"])
    on = Writer(tokenizer_for(template_of(name)), thinking="on")(example)
    texts = [text for draft in on for text in trained(draft)]
    assert "Thought one." in texts[0] and "Thought two." in texts[1] and not on[0].notes
    off = Writer(tokenizer_for(template_of(name)), thinking="off")(example)
    assert not any("Thought" in draft.text for draft in off) and off[0].notes == (fitting.THOUGHTS_OFF,)


def test_a_wish_for_thoughts_that_the_template_cannot_fulfil_is_refused() -> None:
    with pytest.raises(InputError, match=r"every answer begins with a thought .* cannot be off"):
        Writer(tokenizer_for(template_of("deepseekv3")), thinking="off")(Chat("row 1", turns("a", "b")))
    stripping = NAMED.replace("m.content }}", "m.content.split('</think>')[-1] }}")
    with pytest.raises(InputError, match="has no place for thoughts, so thinking cannot be on"):
        Writer(tokenizer_for(stripping), thinking="on")(Chat("row 1", turns("a", "b")))


def test_another_template_is_a_file_a_name_or_jinja(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(NAMED, encoding="utf-8")
    assert chat_template(tokenizer, str(file)) == NAMED == chat_template(tokenizer, NAMED)
    assert chat_template(tokenizer, "qwen3") == template_of("qwen3")
    [draft] = Writer(tokenizer, chat_template=str(file))(Completion("row 1", "a", "b"))
    assert draft.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    with pytest.raises(InputError, match=r"no chat template 'qwen33' \(did you mean 'qwen3'\?\)"):
        chat_template(tokenizer, "qwen33")
    with pytest.raises(InputError, match="no chat template 'qwen3_training'"):
        chat_template(tokenizer, "qwen3_training")
    file.write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        chat_template(tokenizer, str(file))


def test_of_several_templates_the_default_is_taken(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": NAMED, "rag": "{{ documents }}"}
    assert chat_template(tokenizer) == NAMED
    tokenizer.chat_template = {"rag": "{{ documents }}", "plain": NAMED}
    with pytest.raises(InputError, match=r"several chat templates \(plain, rag\) and none is the default"):
        chat_template(tokenizer)


def test_a_completion_has_the_given_template_even_without_one_of_the_model(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    [plain] = Writer(tokenizer)(Completion("row 1", "a", "b"))
    assert plain.text == "ab<|im_end|>"
    [draft] = Writer(tokenizer, chat_template=NAMED)(Completion("row 1", "a", "b"))
    assert draft.text.startswith("<|im_start|>user\na")


def test_of_a_preference_both_answers_stand_behind_the_prompt_of_use(tokenizer: Any) -> None:
    write, before = Writer(tokenizer), turns("a", "b", "c")
    prompt, chosen, rejected = write.preference(Preference("row 1", before, [answer("good")], [answer("bad")]))
    assert prompt == tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    assert (chosen.text, rejected.text) == (prompt + "good<|im_end|>", prompt + "bad<|im_end|>")
    assert (trained(chosen), trained(rejected)) == (["good<|im_end|>"], ["bad<|im_end|>"])
    text = write.preference(Preference("row 1", "a", "good", "bad"))
    turn = write.preference(Preference("row 1", turns("a"), [answer("good")], [answer("bad")]))
    assert text == turn
    with pytest.raises(BadRow, match=r"row 1: .* does not write both answers behind one prompt"):
        write.preference(Preference("row 1", before, [user("d"), answer("good")], [answer("bad")]))


def test_a_template_that_always_asks_for_the_next_answer_does_not_have_that_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    )  # as Llama 3's first
    turns = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b")] * 2]
    [draft] = Writer(tokenizer)(Chat("row 1", turns))
    assert trained(draft) == ["b<|im_end|>"] * 2
    assert draft.text.endswith("<|im_start|>assistant\nb<|im_end|>") and draft.text.count("assistant") == 2


def test_a_tokenizer_that_has_no_token_for_a_letter_has_no_beginning_either() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    few = Tokenizer(models.BPE(vocab={"<s>": 0, "b": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=few, bos_token="<s>")
    assert tokenizer("a")["input_ids"] == []
    assert _begin(tokenizer) == []
