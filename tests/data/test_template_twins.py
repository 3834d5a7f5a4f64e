"""TRL's chat templates: what is trained is what their twins for training mark, but for the differences named here.

TRL ships many models' templates (``NAME.jinja``) and for most a twin (``NAME_training.jinja``) whose ``{% generation
%}`` marks say what is trained. An answer of ours is held, token by token, to the twin's marks in the conversation up to
that answer; the tokens before it to those that generation is given by the model's own template. Where a template
refuses a conversation or leaves part of it away, ``as_taken`` has the same conversation as we say that it is put.
"""

import dataclasses
import functools
import json
import re
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from halfbyte.choices import IGNORED
from halfbyte.data import BadRow, Chat, encode_examples
from halfbyte.data.template import Writer

from .templates import (
    CONVERSATIONS,
    INLINE,
    WITH_TOOLS,
    Message,
    answer,
    system,
    template_of,
    tokenizer_for,
    tools_of,
    trl_folder,
    user,
)

TWINS = sorted(file.stem.removesuffix("_training") for file in trl_folder().glob("*_training.jinja"))


@dataclasses.dataclass(frozen=True)
class Twin:
    """How what we train differs from what a twin marks. None of it is a difference in what the model reads or writes.

    Attributes:
        prompt: marked, but it is the end of the generation prompt: it is there before the model begins.
        behind: marked, but behind the stop token: generation has ended.
        changes: patterns and what is there instead, tried in turn, the first that fits counts.
    """

    prompt: str = ""
    behind: str = ""
    changes: tuple[tuple[str, str], ...] = ()


# The prompt opens a thought, which goes on if the answer's text has one, and else is closed first.
OPENED = (("^<think>\n", ""), ("^", "\n</think>\n\n"))
NEMOTRON = (  # likewise; a plain answer's twin opens and closes the thought by itself
    ("^<think>\n", ""),
    ("^<think></think>\n?(?=<.im_end)", "\n</think>"),
    ("^<think></think>\n?", "\n</think>\n"),
)
NEMOTRON_CLOSE = (("^<think>\n", ""), ("^<think></think>", "</think>"))
# GLM stops at the next turn's <|user|> or <|observation|>; ours at <|endoftext|>, where every tool stops too.
GLM = (("<.(?:user|observation).>$", "<|endoftext|>"),)
# The call stops at the token that hands over to the tool.
DIFFUSION = (("<tool_call.>$", "<tool_call|><|tool_response>"),)

DIFFERENCES = {
    "cohere": Twin(),
    "cohere2": Twin(),
    "deepseek_r1_distill": Twin(prompt="<｜Assistant｜>", changes=OPENED),
    "deepseekv3": Twin(prompt="<｜Assistant｜>", changes=OPENED),
    "diffusion_gemma": Twin(behind="\n", changes=DIFFUSION),
    "gemma": Twin(behind="\n"),
    "gemma3": Twin(behind="\n"),
    "glm4moe": Twin(changes=GLM),
    "gptoss": Twin(prompt="<|start|>assistant"),
    "idefics3": Twin(behind="\n"),
    "lfm2": Twin(behind="\n"),
    "lfm2_v2": Twin(behind="\n"),
    "llama3": Twin(),
    "llava_next": Twin(),
    "muse_glimmer": Twin(prompt="<|start|>assistant"),
    "nemotron_3_5_lightning": Twin(behind="\n", changes=NEMOTRON_CLOSE),
    "nemotron_3_nano": Twin(behind="\n", changes=NEMOTRON),
    "nemotron_3_super": Twin(behind="\n", changes=NEMOTRON),
    "nemotron_3_ultra": Twin(behind="\n", changes=NEMOTRON_CLOSE),
    "phi3": Twin(),
    "phi3_5": Twin(),
    "qwen2_5": Twin(prompt="\n", behind="\n"),
    "qwen2_5_vl": Twin(behind="\n"),
    "qwen3": Twin(behind="\n"),
    "qwen3_5_nothink": Twin(prompt="<think>\n\n</think>\n\n", behind="\n"),
    "qwen3_5_think": Twin(prompt="<think>\n", behind="\n"),
    "qwen3_6": Twin(prompt="<think>\n", behind="\n"),
    "qwen3_8": Twin(prompt="<think>\n", behind="\n"),
    "qwen3_instruct_2507": Twin(behind="\n"),
    "qwen3_vl": Twin(behind="\n"),
    "smolvlm": Twin(behind="\n"),
}

ALTERNATING = {"cohere", "cohere2", "gemma", "gemma3"}
"""Refuse two turns of one role in a row, and one of the assistant's at the beginning."""
ONE_ASSISTANT = {*ALTERNATING, "diffusion_gemma"}
"""Refuse two turns of the assistant's in a row, or write them as one."""
ONE_SYSTEM = {"cohere", "deepseek_r1_distill", "gemma3", "gptoss", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"} | {
    "qwen3_8",
    "qwen3_vl",
}
"""Take one system turn, at the beginning."""
WITHOUT_TOOLS = {"cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "lfm2", "llama3"} | {
    "llava_next",
    "phi3",
    "phi3_5",
    "qwen2_5_vl",
    "smolvlm",
}
"""Cannot write a tool call (LFM 2 in its first version: only what tools there are)."""
CALLS_ONLY = {"diffusion_gemma", "muse_glimmer"}
"""Have no place for what is said beside a call that has been answered."""
OWN_THOUGHTS = {
    "diffusion_gemma",
    "glm4moe",
    "gptoss",
    "muse_glimmer",
    "qwen3",
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
} | {
    "nemotron_3_5_lightning",
    "nemotron_3_nano",
    "nemotron_3_super",
    "nemotron_3_ultra",
}
"""Write ``reasoning_content``. The others keep a thought in the answer's text."""
PARTS = {"idefics3", "llava_next", "smolvlm"}
"""Take lists of parts only."""


def as_taken(name: str, conversation: str) -> list[Message]:
    """The conversation in the words that the template takes."""
    messages = CONVERSATIONS[conversation]
    if conversation == "parts" and name not in PARTS:
        messages = CONVERSATIONS["one turn"]
    if conversation == "two assistant turns" and name in ONE_ASSISTANT:
        messages = [messages[0], answer("Answer one.\n\nAnswer two.")]
    if conversation == "two user turns" and name in ALTERNATING:
        messages = [user("Question one?\n\nQuestion two?"), answer("Answer one.")]
    if conversation == "assistant first" and name in ALTERNATING:
        messages = messages[1:]
    if conversation == "system" and name == "gemma":
        messages = [user("Be kind.\n\nQuestion one?"), answer("Answer one.")]
    if conversation == "two system turns" and name in ONE_SYSTEM:
        messages = [system("Be kind.\n\nBe brief."), *messages[2:]]
    if conversation == "two system turns" and name == "gemma":
        messages = [user("Be kind.\n\nBe brief.\n\nQuestion one?"), answer("Answer one.")]
    if conversation == "later system" and name in {*ONE_SYSTEM, "gemma"}:
        messages = [*messages[:3], user("Be brief.\n\nQuestion two?"), messages[5]]
    if conversation == "later system" and name == "gemma":
        messages = [user("Be kind.\n\nQuestion one?"), *messages[2:]]
    if conversation == "calls and texts" and name in CALLS_ONLY:
        messages = CONVERSATIONS["tools"]
    if name in OWN_THOUGHTS and conversation == "inline thoughts":
        messages = CONVERSATIONS["thoughts"]
    if name == "qwen3_5_nothink" and "th" in conversation:
        messages = [bare(message) for message in messages]
    elif name not in OWN_THOUGHTS:
        messages = [inline(message) for message in messages]
    if name in PARTS:
        messages = [in_parts(message) for message in messages]
    return messages


def bare(message: Message) -> Message:
    content = message["content"]
    return {"role": message["role"], "content": content.split("</think>\n\n")[-1] if content else content}


def inline(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    word = message["content"].split()[1].strip(".")
    return answer(INLINE.format(word, word))


def in_parts(message: Message) -> Message:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


@functools.cache
def writer(name: str) -> Writer:
    return Writer(tokenizer_for(template_of(name)))


def marked(name: str, messages: list[Message], tools: Any) -> str:
    """What the twin marks of the last message."""
    twin = (trl_folder() / f"{name}_training.jinja").read_text(encoding="utf-8")
    names = tokenizer_for(template_of(name)).special_tokens_map
    [text], [spans] = render_jinja_template(
        [messages], tools=tools, chat_template=twin, return_assistant_tokens_mask=True, **names
    )
    joined = [list(spans[0])]
    for start, end in spans[1:]:
        if start == joined[-1][1]:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return text[slice(*joined[-1])]


def expected(name: str, messages: list[Message], tools: Any) -> str:
    """What the twin marks of the last message, but for the differences."""
    ways = DIFFERENCES[name]
    if name == "deepseekv3":  # the twin drops a thought, which ours trains like DeepSeek-R1's
        before, content = messages[-2]["role"], messages[-1]["content"]
        thought = content.removeprefix("<think>\n")[: -len(bare(messages[-1])["content"])] if "think" in content else ""
        text = marked(name, [*messages[:-1], {**messages[-1], "content": bare(messages[-1])["content"]}], tools)
        if before == "tool":  # the prompt ends in this, and opens no thought
            return text.removeprefix("<｜tool▁outputs▁end｜>")
        text = text.rpartition(ways.prompt)[2]
        return (thought or "\n</think>\n\n") + text
    text = marked(name, messages, tools)
    if messages[-2]["role"] == "assistant" and ways.prompt.strip():  # the marks of both turns touch each other
        text = ways.prompt + text.rpartition(ways.prompt)[2]
    hands_over = name == "diffusion_gemma" and "tool_calls" in messages[-1]
    assert text.startswith(ways.prompt) and (text.endswith(ways.behind) or hands_over)
    text = text.removeprefix(ways.prompt).removesuffix(ways.behind)
    if messages[-2]["role"] == "tool" and name == "diffusion_gemma":
        text = "<|turn>model\n" + text  # after a result the prompt opens no turn of the model's
    for pattern, replacement in ways.changes:
        changed, count = re.subn(pattern, replacement, text, count=1, flags=re.DOTALL)
        if count:
            return changed
    return text


def in_use(name: str, conversation: str) -> list[Message]:
    """The conversation as the model's own template takes it."""
    messages = as_taken(name, conversation)
    if conversation in ("thought", "thoughts", "one of two thinks") and name.startswith("deepseek"):
        return CONVERSATIONS[conversation]  # as_taken puts thoughts into the text for the twin
    if name == "deepseekv3" and conversation in WITH_TOOLS:  # wants JSON text; the twin makes it itself
        [tool_call] = messages[1]["tool_calls"]
        function = {**tool_call["function"], "arguments": json.dumps(tool_call["function"]["arguments"])}
        return [messages[0], {**messages[1], "tool_calls": [{**tool_call, "function": function}]}, *messages[2:]]
    return messages


def test_no_twin_is_left_out() -> None:
    assert set(TWINS) == set(DIFFERENCES) and len(TWINS) == 31


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TWINS)
def test_answers_are_trained_as_the_twin_marks_them_behind_the_prompts_of_use(name: str, conversation: str) -> None:
    tokenizer, tools = tokenizer_for(template_of(name)), tools_of(conversation)
    example = Chat("row 1", CONVERSATIONS[conversation], tools=tools)
    if conversation in WITH_TOOLS and name in WITHOUT_TOOLS:
        with pytest.raises(BadRow, match="row 1: it has tool calls, which the model's chat template cannot write"):
            writer(name)(example)
        return
    messages = as_taken(name, conversation)
    turns = [at for at, message in enumerate(messages) if at and message["role"] == "assistant"]
    used = in_use(name, conversation)
    wanted = []
    for at in turns:
        prompt = tokenizer.apply_chat_template(used[:at], tools=tools, tokenize=False, add_generation_prompt=True)
        text = expected(name, messages[: at + 1], tools)
        wanted.append((tokenizer.encode(prompt), tokenizer.encode(text)))
    [encoded] = encode_examples([example], tokenizer, 100_000)
    assert encoded.bad is None
    assert [stretch for row in encoded.rows for stretch in stretches(row)] == wanted


def stretches(row: Any) -> list[tuple[list[int], list[int]]]:
    """For each trained stretch of a row, the ids before it and its own."""
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    borders = [at for at in range(1, len(ids)) if (labels[at] == IGNORED) != (labels[at - 1] == IGNORED)] + [len(ids)]
    return [(ids[:start], ids[start:end]) for start, end in zip(borders[::2], borders[1::2], strict=True)]
