"""Rows as data sets publish them, by the columns and forms that their pages document; the texts are made up.

Besides: forms of one conversation give one example, TRL's own conversions being the oracle where it has one, and rows
that went through an Arrow table (which fills missing columns with nulls) stay what they were.
"""

import copy
import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import extract_prompt

from halfbyte.data import (
    BadRow,
    Chat,
    Completion,
    Example,
    Judged,
    Message,
    Preference,
    Text,
    calls,
    catalog,
    conversations,
    preferences,
    shapes,
    trees,
)
from halfbyte.data.formats import examples_of


def read(row: Any, **options: Any) -> Example | BadRow:
    [example] = examples_of([("row", row)], **options)
    return example


def turns(*texts: str, system: str | None = None) -> list[Message]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def chat(*texts: str, system: str | None = None) -> Chat:
    return Chat("row", turns(*texts, system=system))


def share(*pairs: tuple[str, str], **more: Any) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} | more for role, text in pairs]


Q, A, B = "How far is the moon?", "About 384,000 km.", "Ask somebody else."
HH = "\n\nHuman: {}\n\nAssistant: {}"
PUBLISHED: dict[str, tuple[dict[str, Any], Example, str, set[str]]] = {
    "tatsu-lab/alpaca": (
        {"instruction": Q, "input": "", "output": A, "text": f"Below is ...\n\n### Response:\n{A}"},
        chat(Q, A), "alpaca", {"text"},
    ),
    "yahma/alpaca-cleaned": (
        {"output": A, "input": "Answer in km.", "instruction": Q}, chat(f"{Q}\n\nAnswer in km.", A), "alpaca", set(),
    ),
    "laion/OIG": (
        {"text": f"<human>: {Q}\n<bot>: {A}", "metadata": {"source": "unified_chip2"}}, chat(Q, A), "transcript",
        {"metadata"},
    ),
    "yizhongw/self_instruct": (
        {"prompt": f"{Q}\n\nOutput:", "completion": f" {A}"}, Completion("row", f"{Q}\n\nOutput:", f" {A}"),
        "completion", set(),
    ),
    "Anthropic/hh-rlhf": (
        {"chosen": HH.format(Q, A), "rejected": HH.format(Q, B)},
        Preference("row", turns(Q), turns("", A)[1:], turns("", B)[1:]), "preference", set(),
    ),
    "timdettmers/openassistant-guanaco": (
        {"text": f"### Human: {Q}### Assistant: {A}### Human: Sure?### Assistant: Yes."},
        chat(Q, A, "Sure?", "Yes."), "transcript", set(),
    ),
    "akoksal/LongForm": (
        {"input": Q, "output": A, "source": "Wikipedia", "subset": "wikipedia"}, chat(Q, A), "question",
        {"source", "subset"},
    ),
    "anon8231489123/ShareGPT_Vicuna_unfiltered": (
        {"id": "QWJhYvA_0", "conversations": share(("human", Q), ("gpt", A))}, chat(Q, A), "messages", {"id"},
    ),
    "Muennighoff/flan": ({"inputs": Q, "targets": A, "task": "wiki_qa"}, chat(Q, A), "question", {"task"}),
    "Trelis/openassistant-guanaco-EOS": (
        {"text": f"### Human: {Q}### Assistant: {A}### Human:"}, chat(Q, A), "transcript", set(),
    ),
    "databricks/databricks-dolly-15k": (
        {"instruction": Q, "context": "The moon orbits.", "response": A, "category": "closed_qa"},
        chat(f"{Q}\n\nThe moon orbits.", A), "alpaca", {"category"},
    ),
    "Open-Orca/OpenOrca": (
        {"id": "flan.1", "system_prompt": "Be short.", "question": Q, "response": A},
        chat(Q, A, system="Be short."), "question", {"id"},
    ),
    "Open-Orca/SlimOrca": (
        {"conversations": [{"from": "system", "value": "Be short.", "weight": None},
                           {"from": "human", "value": Q, "weight": 0.0}, {"from": "gpt", "value": A, "weight": 1.0}]},
        Chat("row", [*turns(Q, system="Be short."), {"role": "assistant", "content": A, "train": True}]), "messages",
        set(),
    ),
    "openai/gsm8k": ({"question": Q, "answer": "384 * 1000 = <<384*1000=384000>>\n#### 384000"},
                     chat(Q, "384 * 1000 = <<384*1000=384000>>\n#### 384000"), "question", set()),
    "hendrycks/competition_math": (
        {"problem": Q, "level": "Level 1", "type": "Algebra", "solution": A}, chat(Q, A), "question", {"level", "type"},
    ),
    "AI-MO/NuminaMath-1.5": (
        {"problem": Q, "solution": f"{A} So 384000.", "answer": "384000"}, chat(Q, f"{A} So 384000."), "question",
        {"answer"},
    ),
    "rajpurkar/squad": (
        {"id": "1", "title": "Moon", "context": "It is far.", "question": Q,
         "answers": {"text": [A], "answer_start": [6]}}, chat(f"It is far.\n\n{Q}", A), "question", {"id", "title"},
    ),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": Q, "prompt_id": "f0e", "messages": turns(Q, A, "Sure?", "Yes.")}, chat(Q, A, "Sure?", "Yes."),
        "messages", {"prompt", "prompt_id"},
    ),
    "stingning/ultrachat": ({"id": "0", "turns": [Q, A, "Sure?", "Yes."]}, chat(Q, A, "Sure?", "Yes."), "messages",
                            {"id"}),
    "GAIR/lima": ({"conversations": [Q, A], "source": "wikihow"}, chat(Q, A), "messages", {"source"}),
    "LDJnr/Capybara": (
        {"source": "Airoboros", "conversation": [{"input": Q, "output": A}, {"input": "Sure?", "output": "Yes."}]},
        chat(Q, A, "Sure?", "Yes."), "messages", {"source"},
    ),
    "fnlp/moss-003-sft": (
        {"conversation_id": 1, "category": "Brainstorming", "conversation": [{"human": Q, "assistant": A}]},
        chat(Q, A), "messages", {"conversation_id", "category"},
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": Q, "prompt_id": "1", "chosen": turns(Q, A), "rejected": turns(Q, B), "messages": turns(Q, A),
         "score_chosen": 8.0, "score_rejected": 2.0},
        Preference("row", turns(Q), turns("", A)[1:], turns("", B)[1:]), "preference",
        {"prompt_id", "messages", "score_chosen", "score_rejected"},
    ),
    "Intel/orca_dpo_pairs": (
        {"system": "Be short.", "question": Q, "chosen": A, "rejected": B},
        Preference("row", turns(Q, system="Be short."), turns("", A)[1:], turns("", B)[1:]), "preference", set(),
    ),
    "llamafactory, alpaca with two answers": (
        {"instruction": Q, "input": "In km.", "chosen": A, "rejected": B},
        Preference("row", f"{Q}\n\nIn km.", A, B), "preference", set(),
    ),
    "llamafactory, sharegpt with two answers": (
        {"conversations": share(("human", Q)), "chosen": share(("gpt", A))[0], "rejected": share(("gpt", B))[0]},
        Preference("row", turns(Q), turns("", A)[1:], turns("", B)[1:]), "preference", set(),
    ),
    "llamafactory, kto": (
        {"messages": turns(Q, A), "label": False}, Judged("row", turns(Q), turns("", A)[1:], False), "unpaired", set(),
    ),
    "trl-lib/kto-mix-14k": (
        {"prompt": turns(Q), "completion": turns("", A)[1:], "label": True},
        Judged("row", turns(Q), turns("", A)[1:], True), "unpaired", set(),
    ),
    "abisee/cnn_dailymail": ({"article": "Long.", "highlights": "Short.", "id": "42"}, chat("Long.", "Short."),
                             "question", {"id"}),
    "knkarthick/samsum": ({"id": "1", "dialogue": "A: Hi\r\nB: Ho", "summary": "They greet."},
                          chat("A: Hi\r\nB: Ho", "They greet."), "question", {"id"}),
    "allenai/c4": ({"text": A, "timestamp": "2019-04-25", "url": "https://x"}, Text("row", A), "text",
                   {"timestamp", "url"}),
    "a crawl of news": ({"title": "Moon", "content": A, "url": "https://x"}, Text("row", A), "text", {"title", "url"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_are_recognised(name: str) -> None:
    row, expected, shape, unused = PUBLISHED[name]
    counts: Counter[str] = Counter()
    example = read(row, counts=counts)
    assert example == expected and counts == {shape: 1}
    assert isinstance(example, Example) and {*example.unused} == unused
    assert read(row, format=shape) == expected


@pytest.mark.parametrize("name", catalog.DATASETS)
def test_the_catalog_says_what_the_rows_of_a_data_set_are(name: str) -> None:
    known = catalog.DATASETS[name]
    row, _, shape, _ = PUBLISHED[known.hub]
    assert known.format == shape in shapes.FORMATS and {*row} == {*known.columns}
    assert catalog.find(name.upper().replace("-", "_")) is known and catalog.find(name + "x") is None
    assert known.source["path"] == known.hub and known.source["split"] == "train"


def test_rows_of_all_shapes_in_one_arrow_table_stay_what_they_were() -> None:
    """Columns that a row lacks become nulls there, and so do keys of its turns."""
    rows = [row for row, *_ in PUBLISHED.values() if all(isinstance(value, str) for value in row.values())]
    columns = dict.fromkeys(key for row in rows for key in row)
    table = pa.Table.from_pylist([dict.fromkeys(columns) | row for row in rows]).to_pylist()
    assert len(rows) > 10 and len(columns) > 15
    for row, back in zip(rows, table, strict=True):
        example, alone = read(back), read(row)
        assert example == alone
        assert isinstance(example, Example) and isinstance(alone, Example)
        assert sorted(example.unused) == sorted(alone.unused) and example.notes == alone.notes
    talks = [turns(Q, A), [turns(Q)[0] | {"name": "Ann"}, {"role": "assistant", "content": A, "weight": 1}]]
    back = pa.Table.from_pylist([{"messages": talk, "text": None} for talk in talks] + [{"text": A}]).to_pylist()
    assert [read(row) for row in back] == [read({"messages": talk}) for talk in talks] + [Text("row", A)]
    assert all(example.notes == () for row in back if isinstance(example := read(row), Example))


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
TALKS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4).map(lambda pairs: turns(*sum(pairs, ())))


@given(TALKS, TEXTS)
def test_one_conversation_is_one_example_in_all_its_forms(talk: list[Message], system: str) -> None:
    opening = [{"role": "system", "content": system}]
    texts = [turn["content"] for turn in talk]
    questions, answers = texts[0::2], texts[1::2]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = share(*((names[turn["role"]], turn["content"]) for turn in opening + talk))
    expected = Chat("row", opening + talk)
    pairs = list(zip(questions, answers, strict=True))
    for row in (
        {"messages": opening + talk},
        {"conversations": shared},
        {"messages": json.dumps(opening + talk)},
        {"conversations": repr(shared)},  # as pandas writes it into CSV
        {"messages": talk, "system": system},
        {"messages": {"role": [t["role"] for t in opening + talk], "content": [t["content"] for t in opening + talk]}},
        {"system": system, "turns": texts},
        {"system": system, "conversation": [{"input": q, "output": a} for q, a in pairs]},
        {"instruction": questions[-1], "output": answers[-1], "system": system, "history": pairs[:-1]},
        {"prompt": opening + talk[:-1], "completion": talk[-1:]},
        {"prompt": opening + talk[:-1], "completion": talk[-1]["content"]},
    ):  # fmt: skip
        example = read(row)
        assert example == expected, row
    judged = read({"messages": opening + talk, "label": True})
    assert judged == Judged("row", opening + talk[:-1], talk[-1:], True)


@given(TALKS, TEXTS)
def test_two_conversations_are_parted_as_trl_does_it(talk: list[Message], other: str) -> None:
    rejected = [*talk[:-1], {"role": "assistant", "content": other}]
    example = read({"chosen": talk, "rejected": rejected})
    if other == talk[-1]["content"]:
        assert isinstance(example, BadRow) and example.kind == "answers alike"
        return
    parts = extract_prompt({"chosen": copy.deepcopy(talk), "rejected": copy.deepcopy(rejected)})
    assert example == Preference("row", parts["prompt"], parts["chosen"], parts["rejected"])
    assert read({"prompt": parts["prompt"], "chosen": parts["chosen"], "rejected": parts["rejected"]}) == example
    assert read({"prompt": talk[0]["content"], "chosen": talk, "rejected": rejected}) == example
    assert read({"messages": talk[:-1], "chosen": talk[-1], "rejected": rejected[-1]}) == example


@given(TALKS, st.sampled_from([preferences.HUMAN, shapes.OIG, shapes.GUANACO]))
def test_a_transcript_is_the_conversation_that_was_written_down(talk: list[Message], marks: dict[str, str]) -> None:
    talk = [turn | {"content": turn["content"].replace(":", ";").rstrip("\n") or "x"} for turn in talk]
    names = {role: mark for mark, role in marks.items()}
    text = "".join(f"{names[turn['role']]} {turn['content']}" for turn in talk)
    assert conversations.transcript(text, marks) == talk


def test_hh_answers_behind_a_transcript_of_the_prompt() -> None:
    """As TRL's copies of HH-RLHF have it: the prompt ends with the mark of the assistant."""
    expected = Preference("row", turns("Hi", "Hey", Q), turns("", A)[1:], turns("", B)[1:])
    prompt = HH.format("Hi", "Hey") + f"\n\nHuman: {Q}\n\nAssistant:"
    assert read({"prompt": prompt, "chosen": f" {A}", "rejected": f" {B}"}) == expected
    whole = {name: HH.format("Hi", "Hey") + HH.format(Q, text) for name, text in (("chosen", A), ("rejected", B))}
    assert read(whole) == expected


def test_calls_in_the_answer_are_calls_where_the_row_has_tools() -> None:
    """As in xLAM's data: JSON texts of the tools and of the calls."""
    tool = {"name": "distance", "description": "To a body.", "parameters": {"to": {"type": "str"}}}
    call = {"name": "distance", "arguments": {"to": "moon"}}
    row = {"id": 1, "query": Q, "answers": json.dumps([call]), "tools": json.dumps([tool])}
    example = read(row)
    said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert example == Chat("row", [*turns(Q), said], tools=[{"type": "function", "function": tool}])
    assert isinstance(example, Chat) and calls.CALLS in example.notes
    assert read({"query": Q, "answers": json.dumps([call])}) == chat(Q, json.dumps([call]))


def test_open_assistants_messages_are_read_as_the_hub_has_them() -> None:
    """Flat, with nulls, a root's rank null, one message deleted; from CSV all of it as text."""
    tree = "6ab24d72"
    columns = ("message_id", "parent_id", "text", "role", "rank", "deleted", "message_tree_id")
    table = [
        (tree, None, Q, "prompter", None, False), ("a1", tree, B, "assistant", 1, False),
        ("a0", tree, A, "assistant", 0, False), ("ax", tree, "Spam", "assistant", None, True),
        ("p0", "a0", "Sure?", "prompter", 0, False), ("z", "p0", "Yes.", "assistant", None, False),
    ]  # fmt: skip
    rows = [dict(zip(columns, (*row, tree), strict=True)) for row in table]
    expected = chat(Q, A, "Sure?", "Yes.")
    texts = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    for written in (rows, texts):
        [example] = examples_of([(f"row {n}", row) for n, row in enumerate(written)])
        assert isinstance(example, Chat) and example.messages == expected.messages and example.where == "row 0"
        assert trees.BEST in example.notes
    named = list(examples_of([(f"row {n}", row) for n, row in enumerate(rows)], format="text"))
    assert named == [Text(f"row {n}", row["text"]) for n, row in enumerate(rows)]
