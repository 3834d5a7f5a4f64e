"""Rows that say which of two answers is preferred, or whether one is good, to examples."""

import itertools
from typing import Any

from halfbyte.data.cells import Cells
from halfbyte.data.conversations import as_turns, messages, opening, tools_of, transcript
from halfbyte.data.examples import Judged, Message, Preference

PROMPTS = ("prompt", "question", "query", "problem", "instruction", "input", "user", "request")
HUMAN = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}


def is_judged(cells: Cells) -> bool:
    """Tell whether a row has an answer and whether that is good; a ``label`` of another kind is some class."""
    label = cells.row.get("label")
    said = isinstance(label, bool) or (isinstance(label, str) and label.strip().casefold() in ("true", "false"))
    return said and bool(cells.find("prompt") and cells.find("completion", "response"))


def preference(cells: Cells) -> Preference:
    """Return a row's two answers and their prompt, which may be the beginning that two conversations share."""
    chosen, rejected = cells.parsed_turns("chosen"), cells.parsed_turns("rejected")
    tools = tools_of(cells)
    if isinstance(chosen, str) and isinstance(rejected, str) and not cells.find("prompt", *PROMPTS):
        spoken = [transcript(text, HUMAN) for text in (chosen, rejected)]
        if all(len(turns) > 1 and turns[-1]["role"] == "assistant" for turns in spoken):
            return _parted(cells, spoken[0], spoken[1], tools)
        raise cells.bad(
            "no prompt", "has chosen and rejected answers without a prompt; name its column (--columns prompt=...)."
        )
    if isinstance(chosen, list) and isinstance(rejected, list):
        pair = [messages(cells, name, turns) for name, turns in (("chosen", chosen), ("rejected", rejected))]
        prompt = cells.parsed_turns("prompt", *PROMPTS) if cells.find("prompt", *PROMPTS) else None
        if isinstance(prompt, list):
            return Preference(cells.where, messages(cells, "prompt", prompt), *pair, tools=tools)
        if len(pair[0]) > 1:  # whole conversations, the prompt among them
            return _parted(cells, pair[0], pair[1], tools)
        turns = [*opening(cells), {"role": "user", "content": cells.as_text("prompt", prompt)}]
        return Preference(cells.where, turns, *pair, tools=tools)
    prompt = cells.parsed_turns("prompt", *PROMPTS)
    answers = [cells.answer(name) for name in ("chosen", "rejected")]
    earlier = opening(cells)
    if isinstance(prompt, list) or earlier:
        turns = [*earlier, *as_turns(cells, "prompt", prompt, "user")]
        return Preference(
            cells.where, turns, *([{"role": "assistant", "content": text}] for text in answers), tools=tools
        )
    return Preference(cells.where, cells.text("prompt", *PROMPTS), answers[0], answers[1])


def _parted(
    cells: Cells, chosen: list[Message], rejected: list[Message], tools: list[dict[str, Any]] | None
) -> Preference:
    """Part two conversations into what they share, the prompt, and how each goes on."""
    pairs = enumerate(itertools.zip_longest(chosen, rejected))
    shared = next((index for index, (one, other) in pairs if one != other), len(chosen))
    if not shared or shared == min(len(chosen), len(rejected)):
        raise cells.bad(
            "no two answers", "has a chosen and a rejected conversation that share no prompt, or are alike."
        )
    return Preference(cells.where, chosen[:shared], chosen[shared:], rejected[shared:], tools=tools)


def judged(cells: Cells) -> Judged:
    """Return a row's answer, and whether it is good."""
    label = cells.get("label")
    good = label if isinstance(label, bool) else str(label).strip().casefold() == "true"
    prompt, completion = cells.parsed_turns("prompt"), cells.parsed_turns("completion", "response")
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = as_turns(cells, "prompt", prompt, "user"), as_turns(cells, "completion", completion, "assistant")
        return Judged(cells.where, *turns, good)
    return Judged(cells.where, cells.text("prompt"), cells.answer("completion", "response"), good)
