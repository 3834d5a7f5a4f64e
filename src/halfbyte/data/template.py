"""A conversation as text, with the characters that are trained: the answers and the stops behind them.

For each answer, the model must see in training what it will see in use: the text that the chat template renders for
the conversation so far, with its generation prompt. So each assistant turn is rendered twice, without itself and
with itself, and the answer is what the second text adds to the first, up to and including its stop token (what a
template writes behind that, often a newline, is left away). Answers of one conversation share a row as long as the
template only ever appends; where it rewrites the past (Qwen3 drops the thinking of earlier turns), the next answer
starts a row of its own:

    text     <user>Hi<end>\\n<assistant>Hello<end>\\n<user>Bye<end>\\n<assistant>See you<end>
    spans    ...........................Hello<end>..............................See you<end>

A template's stop token is found by rendering two answers and looking at the end that both have in common; a template
that closes an answer with no token at all gets the tokenizer's end-of-sequence token. A rendered chat is the whole
text, since a template writes its own beginning-of-sequence token.

A tokenizer without a chat template gets ``chat_template``'s plain one for conversations, while a prompt and its
completion are put together as they are, with an end-of-sequence token; with a chat template they become a user's and
an assistant's turn. A ``text`` is trained on from beginning to end, end-of-sequence token included, in either case.
"""

import dataclasses
from typing import TYPE_CHECKING

import jinja2

from halfbyte.data.formats import Chat, Completion, Example, Message, Text
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}### Instruction:\n{% elif message.role == 'assistant' %}### Response:\n{% endif %}"
    "{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A row as text.

    Attributes:
        text: of the row.
        spans: the trained characters: of each stretch the first, and the one after the last.
        begin: token ids that go before the text.
    """

    text: str
    spans: list[tuple[int, int]]
    begin: list[int] = dataclasses.field(default_factory=list)


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's chat template, or else a plain one of ``### Instruction:`` and ``### Response:``.

    The plain one begins with the beginning-of-sequence token if the tokenizer itself begins texts with it, and
    closes each answer with the end-of-sequence token.
    """
    if tokenizer.chat_template:
        template: str = tokenizer.get_chat_template()
        return template
    return ("{{ bos_token }}" if _begin(tokenizer) else "") + PLAIN_TEMPLATE


class Writer:
    """Writes examples as text with one tokenizer's chat template: each as one draft or several."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.template = chat_template(tokenizer)
        self.begin = _begin(tokenizer)
        self.endings: tuple[str, str] | None = None

    def __call__(self, example: Example) -> list[Draft]:
        match example:
            case Chat(where, messages):
                return self.chat(where, messages)
            case Completion(where, prompt, completion) if self.tokenizer.chat_template:
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                return self.chat(where, turns)
            case Completion(_, prompt, completion):
                return [self.plain(prompt, completion)]
            case Text(_, text):
                return [self.plain("", text)]
            case _:
                raise TypeError(f"{type(example).__name__} is not written as one text")

    def plain(self, prompt: str, answer: str) -> Draft:
        text = prompt + answer + self.end()
        return Draft(text, [(len(prompt), len(text))], self.begin)

    def chat(self, where: str, messages: list[Message]) -> list[Draft]:
        drafts: list[Draft] = []
        for index, message in enumerate(messages):
            if index == 0 or message["role"] != "assistant":
                continue
            prompt, answer = self.turn(where, messages[: index + 1])
            spans = [(len(prompt), len(prompt) + len(answer))]
            if drafts and prompt.startswith(drafts[-1].text):
                spans = drafts.pop().spans + spans
            drafts.append(Draft(prompt + answer, spans))
        return drafts

    def turn(self, where: str, messages: list[Message]) -> tuple[str, str]:
        """Return the prompt for the last message, and that message with its stop token, as the model writes it."""
        tail, stop = self.endings = self.endings or self.find_endings(where)
        prompt = self.render(where, messages[:-1], add_generation_prompt=True)
        text = self.render(where, messages)
        if text.startswith(prompt) and text[len(prompt) :].endswith(tail):
            return prompt, text[len(prompt) : len(text) - len(tail)] + stop
        # The generation prompt may open a thought that the template strips from a written answer (DeepSeek-R1): the
        # answer goes on from there if the data has the thought.
        opening = prompt[_shared(prompt, self.render(where, messages[:-1])) :]
        content = messages[-1]["content"]
        for start in range(len(opening)):
            if opening[start:].strip() and content.startswith(opening[start:]):
                return prompt, content[len(opening) - start :] + stop
        raise InputError(
            f"{where}: the model's chat template asks for an answer with {opening!r}, but does not write this answer "
            "so; begin the answers in the data as this ends, or change the template."
        )

    def find_endings(self, where: str) -> tuple[str, str]:
        """Return what the template writes after an answer, and its beginning up to the last special token."""
        question = {"role": "user", "content": "Is it?"}
        yes, no = (self.render(where, [question, {"role": "assistant", "content": word}]) for word in ("yes", "no"))
        tail = yes[len(yes) - _shared(yes[::-1], no[::-1]) :]
        special = [token for token in self.tokenizer.get_added_vocab() if token.strip() and token in tail]
        length = max((tail.rfind(token) + len(token) for token in special), default=0)
        return tail, tail[:length] or self.end()

    def render(self, where: str, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"{where}: the model's chat template refuses this conversation: {error}") from error
        except RecursionError as error:
            raise InputError(f"{where}: a message has brackets within brackets, too many to be written.") from error
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InputError(f"{where}: a message holds half of a character (a lone surrogate).") from None
        return text

    def end(self) -> str:
        if self.tokenizer.eos_token is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token, so the model would never learn to stop; "
                "set eos_token in its tokenizer_config.json."
            )
        token: str = self.tokenizer.eos_token
        return token


def _shared(one: str, other: str) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _begin(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the beginning-of-sequence id if the tokenizer puts it before a text of its own accord."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
