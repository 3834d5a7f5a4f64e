"""Rows that say which of two answers is preferred, or whether one is good, to examples.

prompt, chosen, rejected     texts, turns, or one turn each (LLaMA-Factory)
conversations, chosen, ...   likewise
chosen, rejected             whole conversations (UltraFeedback) or transcripts (HH-RLHF): what they share is the
                             prompt
prompt, completion, label    one answer, judged (KTO); messages and label: the last answer of a conversation
"""

import itertools
from typing import Any

from halfbyte.data.calls import tools_of
from halfbyte.data.cells import Cells, shown, words
from halfbyte.data.conversations import (
    TRANSCRIPT,
    TURNS,
    as_turns,
    holds_something,
    messages,
    opening,
    system_of,
    transcript,
)
from halfbyte.data.examples import Judged, Message, Preference

PROMPTS = ("prompt", "question", "query", "problem", "instruction", "input", "user", "request")
COMPLETIONS = ("completion", "response", "output", "answer")
CHOSEN = ("chosen", "chosen_messages")
REJECTED = ("rejected", "rejected_messages")
LABELS = ("label", "kto_tag")
HUMAN = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
BOOLEANS = {"true": True, "false": False}
JUDGED = BOOLEANS | dict.fromkeys(("1", "1.0", "yes", "good"), True)
JUDGED |= dict.fromkeys(("0", "0.0", "-1", "-1.0", "no", "bad"), False)
NUMBERED = "of the labels, 1, yes and good were read as good, and 0, -1, no and bad as bad"


def is_judged(cells: Cells) -> bool:
    """Tell whether a row has an answer and whether that is good; a ``label`` of another kind is some class.

    Numbers are classes more often than judgements, so they count beside a prompt and its completion only, and so do
    words other than true and false.
    """
    label = words(cells.peek(cells.find(*LABELS) or "")).strip().casefold()
    if label in BOOLEANS:
        return bool(cells.find(*TURNS) or (cells.find(*PROMPTS) and cells.find(*COMPLETIONS)))
    return label in JUDGED and bool(cells.find("prompt") and cells.find("completion", "response"))


def is_unreadable(cells: Cells) -> bool:
    """Tell whether a row has an answer and a label that is no judgement: it lacks one if other rows have one."""
    if not cells.find(*LABELS) or is_judged(cells):
        return False
    return bool(cells.filled(*TURNS) or (cells.filled(*PROMPTS) and cells.filled(*COMPLETIONS)))


def unreadable(cells: Cells, shape: str) -> Exception:
    """Return the bad row that this one, else of such a shape, is among rows that are judged."""
    name = cells.find(*LABELS) or LABELS[0]
    return cells.bad(
        f"{name} is no judgement",
        f": {cells.called(name)} is {shown(cells.peek(name))}, but in other rows it says whether the answer is good; "
        f"write true or false, or if it is a class, name the format (--format {shape}).",
    )


def judged(cells: Cells) -> Judged:
    """Return a row's answer, and whether it is good.

    Raises:
        BadRow: it cannot be used.
    """
    name = cells.find(*LABELS) or LABELS[0]
    label = cells.get(*LABELS)
    good = JUDGED.get(words(label).strip().casefold())
    if good is None:
        raise cells.bad(
            f"{name} is no judgement",
            f": {cells.called(name)} is {shown(label)}, and must be true or false; write that.",
        )
    if words(label).strip().casefold() not in BOOLEANS:
        cells.note(NUMBERED)
    if not (cells.find(*PROMPTS) and cells.find(*COMPLETIONS)):
        turns = system_of(cells) + messages(cells, cells.find(*TURNS) or "", cells.get(*TURNS))
        last = max((at for at, turn in enumerate(turns) if at and turn["role"] == "assistant"), default=0)
        if not last:
            raise cells.bad("no answer", "has no assistant turn that answers something; remove it.")
        return Judged(cells.where, turns[:last], _checked(cells, turns[last:]), good)
    prompt = _prompt(cells)
    if prompt is None:
        raise _promptless(cells)
    completion = cells.parsed_turns(*COMPLETIONS)
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = as_turns(cells, "prompt", prompt, "user")
        return Judged(cells.where, turns, _checked(cells, as_turns(cells, "completion", completion, "assistant")), good)
    return Judged(cells.where, prompt, cells.answer(*COMPLETIONS), good)


def preference(cells: Cells) -> Preference:
    """Return a row's two answers and their prompt, which may be the beginning that two conversations share.

    Raises:
        BadRow: it cannot be used.
    """
    tools = tools_of(cells)
    prompt = _prompt(cells)
    names = cells.find(*CHOSEN) or "", cells.find(*REJECTED) or ""
    answers = [cells.parsed_turns(name) for name in names]
    if isinstance(answers[0], list) or isinstance(answers[1], list):
        pair = [as_turns(cells, *named, "assistant") for named in zip(names, answers, strict=True)]
        if not all(turns[0]["role"] == "assistant" for turns in pair):  # whole conversations
            return _parted(cells, [[*_missing(cells, turns), *turns] for turns in pair], tools)
        if prompt is None:
            raise _promptless(cells)
        turns = as_turns(cells, "prompt", prompt, "user")
        return _pair(cells, turns, [_checked(cells, answer) for answer in pair], tools)
    texts = [cells.answer(name) for name in names]
    if prompt is None:
        spoken = [transcript(text, HUMAN) for text in texts]
        if not all(len(turns) > 1 and turns[-1]["role"] == "assistant" for turns in spoken):
            raise _promptless(cells)
        cells.note(TRANSCRIPT)
        return _parted(cells, spoken, tools)
    if isinstance(prompt, str) and tools is None:
        _check_different(cells, texts)
        return Preference(cells.where, prompt, *texts)
    if TRANSCRIPT in cells.notes:  # whose prompt ends with a mark, and a blank goes behind that
        texts = [text.removeprefix(" ") for text in texts]
    turns = as_turns(cells, "prompt", prompt, "user")
    return _pair(cells, turns, [[{"role": "assistant", "content": text}] for text in texts], tools)


def _prompt(cells: Cells) -> str | list[Message] | None:
    """Return what stands before the answers: a text, turns where there are any, or None if there is nothing."""
    if not cells.find(*PROMPTS):
        if not cells.find(*TURNS):
            return None
        return opening(cells) + messages(cells, cells.find(*TURNS) or "", cells.get(*TURNS))
    name = cells.find(*PROMPTS) or ""
    prompt = cells.parsed_turns(name)
    if isinstance(prompt, list):
        return opening(cells) + messages(cells, name, prompt)
    parts = [cells.as_text(name, prompt, "")]
    if name != "input" and cells.find("input"):  # LLaMA-Factory's instruction and input
        parts.append(cells.text("input", missing=""))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        return None
    spoken = transcript(text, HUMAN)
    if spoken and spoken[-1] == {"role": "assistant", "content": ""}:
        cells.note(TRANSCRIPT)
        return opening(cells) + spoken[:-1]
    earlier = opening(cells)
    return [*earlier, {"role": "user", "content": text}] if earlier else text


def _missing(cells: Cells, turns: list[Message]) -> list[Message]:
    """Return the system turn that a row has in a column and its conversation has not."""
    return [] if turns[0]["role"] == "system" else system_of(cells)


def _parted(cells: Cells, pair: list[list[Message]], tools: list[dict[str, Any]] | None) -> Preference:
    """Part two conversations into what they share, the prompt, and how each goes on."""
    both = enumerate(itertools.zip_longest(*pair))
    shared = next((at for at, (one, other) in both if one != other), len(pair[0]))
    _check_different(cells, pair)
    if not shared or any(len(turns) == shared or turns[shared]["role"] != "assistant" for turns in pair):
        raise cells.bad(
            "no prompt in common",
            "has a chosen and a rejected conversation that share no prompt; make them differ in the answer only.",
        )
    return _pair(cells, pair[0][:shared], [_checked(cells, turns[shared:]) for turns in pair], tools)


def _pair(
    cells: Cells, prompt: list[Message], answers: list[list[Message]], tools: list[dict[str, Any]] | None
) -> Preference:
    _check_different(cells, answers)
    return Preference(cells.where, prompt, *answers, tools=tools)


def _check_different(cells: Cells, answers: list[Any]) -> None:
    if answers[0] == answers[1]:
        raise cells.bad("answers alike", "has a chosen and a rejected answer that are alike; remove it.")


def _checked(cells: Cells, turns: list[Message]) -> list[Message]:
    """Return an answer, which is seen to hold something."""
    if not any(turn["role"] == "assistant" and holds_something(turn) for turn in turns):
        raise cells.bad("answer is empty", "has an empty answer, so there is nothing to learn from it; remove it.")
    return turns


def _promptless(cells: Cells) -> Exception:
    return cells.bad(
        "no prompt", "has answers without a prompt; fill it in, or name its column (--columns prompt=...)."
    )
