"""Examples to token ids and labels: the model is trained on the answers and on stopping after them.

For each answer, the model must see in training what it will see in use: the text that the chat template renders for
the conversation so far, with its generation prompt. So each assistant turn is rendered twice, without itself and
with itself, and the answer is what the second text adds to the first, up to and including its stop token (what a
template writes behind that, often a newline, is left away). Answers of one conversation share a row as long as the
template only ever appends; where it rewrites the past (Qwen3 drops the thinking of earlier turns), the next answer
starts a row of its own:

    text     <user>Hi<end>\\n<assistant>Hello<end>\\n<user>Bye<end>\\n<assistant>See you<end>
    labels   ...........................Hello<end>..............................See you<end>

A template's stop token is found by rendering two answers and looking at the end that both have in common; a template
that closes an answer with no token at all gets the tokenizer's end-of-sequence token. Labels never depend on token
ids, so a pad token that is also the stop token does no harm. Rendered chats are tokenized as they are, since a
template writes its own beginning-of-sequence token. Where a token would reach across the border of prompt and answer,
the two are tokenized apart, as they are in use.

A tokenizer without a chat template gets ``chat_template``'s plain one for conversations, while a prompt and its
completion are put together as they are, with an end-of-sequence token; with a chat template they become a user's and
an assistant's turn. A ``text`` is trained on from beginning to end, end-of-sequence token included, in either case.

The first token of a row has nothing before it and is never trained. Left out: tokenizers that are not "fast", because
they cannot say which characters a token stands for.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jinja2
from tokenizers import processors

from halfbyte.choices import IGNORED
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
CHUNK = 1000

Row = dict[str, list[int]]
"""One training sequence: ``input_ids`` and ``labels`` of equal length."""


Offsets = list[tuple[int, int]]
"""For each token, the characters of the text that it stands for: the first, and the one after the last."""


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Rows to train on, and what became of the examples.

    Attributes:
        rows: ``input_ids`` and ``labels`` (``IGNORED`` where not trained), at most ``max_length`` tokens each, each
            with a trained token; in the order of the examples, of which a conversation may take several.
        examples: how many there were.
        truncated: examples that lost tokens to ``max_length``.
        tokens: in all rows.
        trained_tokens: those of them that have a label.
    """

    rows: list[Row]
    examples: int
    truncated: int
    tokens: int
    trained_tokens: int


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A row as text; ``spans`` are the trained characters, ``begin`` the ids that go before the text."""

    text: str
    spans: list[tuple[int, int]]
    begin: list[int] = dataclasses.field(default_factory=list)


def tokenize(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenized:
    """Turn examples into rows of token ids and labels, cut off at the right after ``max_length`` tokens.

    Args:
        examples: from :func:`halfbyte.data.read_examples`.
        tokenizer: a fast one.
        max_length: tokens.
        progress: called with the numbers of examples done and in all.

    Raises:
        InputError: no answer of an example begins within ``max_length``, the chat template cannot write one, or no
            stop token is known.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so answers cannot be told from prompts; "
            "use a model folder with a tokenizer.json."
        )
    write = _Writer(tokenizer)
    rows: list[Row] = []
    truncated = 0
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        drafts = [write(example) for example in chunk]
        tokenized = _rows(tokenizer, [draft for group in drafts for draft in group])
        for example, group in zip(chunk, drafts, strict=True):
            whole = list(itertools.islice(tokenized, len(group)))
            rows.extend(_cut(example.where, whole, max_length))
            truncated += any(len(row["input_ids"]) > max_length for row in whole)
        if progress:
            progress(start + len(chunk), len(examples))
    return Tokenized(
        rows,
        examples=len(examples),
        truncated=truncated,
        tokens=sum(len(row["labels"]) for row in rows),
        trained_tokens=sum(len(row["labels"]) - row["labels"].count(IGNORED) for row in rows),
    )


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's chat template, or else a plain one of ``### Instruction:`` and ``### Response:``.

    The plain one begins with the beginning-of-sequence token if the tokenizer itself begins texts with it, and
    closes each answer with the end-of-sequence token.
    """
    if tokenizer.chat_template:
        template: str = tokenizer.get_chat_template()
        return template
    return ("{{ bos_token }}" if _begin(tokenizer) else "") + PLAIN_TEMPLATE


def decode_trained(tokenizer: "PreTrainedTokenizerBase", row: Row) -> list[str]:
    """Return the trained stretches of a row as texts, special tokens included: what the model learns to write."""
    runs = itertools.groupby(row["labels"], lambda label: label != IGNORED)
    return [tokenizer.decode(list(labels)) for trained, labels in runs if trained]


class _Writer:
    """Writes examples as text with one tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.template = chat_template(tokenizer)
        self.begin = _begin(tokenizer)
        self.endings: tuple[str, str] | None = None

    def __call__(self, example: Example) -> list[_Draft]:
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

    def plain(self, prompt: str, answer: str) -> _Draft:
        text = prompt + answer + self.end()
        return _Draft(text, [(len(prompt), len(text))], self.begin)

    def chat(self, where: str, messages: list[Message]) -> list[_Draft]:
        drafts: list[_Draft] = []
        for index, message in enumerate(messages):
            if index == 0 or message["role"] != "assistant":
                continue
            prompt, answer = self.turn(where, messages[: index + 1])
            spans = [(len(prompt), len(prompt) + len(answer))]
            if drafts and prompt.startswith(drafts[-1].text):
                spans = drafts.pop().spans + spans
            drafts.append(_Draft(prompt + answer, spans))
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


def _rows(tokenizer: "PreTrainedTokenizerBase", drafts: list[_Draft]) -> Iterator[Row]:
    together = _encode(tokenizer, [draft.text for draft in drafts])
    cuts = [
        [start for start, _ in draft.spans if start and _merges(draft.text, offsets, start)]
        for draft, (_, offsets) in zip(drafts, together, strict=True)
    ]
    apart = _encode_apart(tokenizer, [(draft.text, at) for draft, at in zip(drafts, cuts, strict=True) if at])
    for draft, (ids, offsets), at in zip(drafts, together, cuts, strict=True):
        if at:
            ids, offsets = next(apart)
        labels = [IGNORED] * len(ids)
        for start, end in draft.spans:
            first = _first_behind(offsets, start)
            last = bisect.bisect_left(offsets, end, lo=first, key=lambda token: token[0])
            labels[first:last] = ids[first:last]
        labels = [IGNORED] * len(draft.begin) + labels
        yield {"input_ids": draft.begin + ids, "labels": [IGNORED, *labels[1:]]}


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[tuple[list[int], Offsets]]:
    if not texts:
        return []
    # The post-processor adds nothing here, but it may take the spaces from the characters that a token stands for.
    backend = tokenizer.backend_tokenizer
    post_processor, backend.post_processor = backend.post_processor, processors.Sequence([])
    try:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    finally:
        backend.post_processor = post_processor
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _first_behind(offsets: Offsets, position: int) -> int:
    """Return the index of the first token that reaches beyond ``position``."""
    return bisect.bisect_right(offsets, position, key=lambda token: token[1])


def _merges(text: str, offsets: Offsets, start: int) -> bool:
    """Tell whether a prompt that ends at ``start`` may have other tokens here than when it stands alone.

    Either one token covers its end and the beginning of the answer, or it ends in several whitespace characters, of
    which pre-tokenizers of GPT-2's kind keep the last for the word that follows.
    """
    return offsets[_first_behind(offsets, start)][0] < start or text[max(start - 2, 0) : start].isspace()


def _encode_apart(
    tokenizer: "PreTrainedTokenizerBase", texts: list[tuple[str, list[int]]]
) -> Iterator[tuple[list[int], Offsets]]:
    """Encode each text in pieces, cut at its positions: as in use, where the prompt comes without the answer."""
    rows = [
        [(start, text[start:end]) for start, end in itertools.pairwise([0, *cuts, len(text)])] for text, cuts in texts
    ]
    pieces = [piece for row in rows for _, piece in row]
    # Some tokenizers (Llama 2) put a space before a text; behind a newline they don't, if that stays by itself.
    plain = iter(_encode(tokenizer, pieces))
    behind = iter(_encode(tokenizer, ["\n" + piece for row in rows for start, piece in row if start]))
    for row in rows:
        ids: list[int] = []
        offsets: Offsets = []
        for start, _ in row:
            piece_ids, places = next(plain)
            shift = start
            if start:
                behind_ids, behind_places = next(behind)
                first = _first_behind(behind_places, 1)
                if behind_places[first][0] >= 1:
                    piece_ids, places, shift = behind_ids[first:], behind_places[first:], start - 1
            ids += piece_ids
            offsets += [(left + shift, right + shift) for left, right in places]
        yield ids, offsets


def _cut(where: str, rows: list[Row], max_length: int) -> list[Row]:
    """Cut the rows of one example to ``max_length`` and leave away those that have no trained token left."""
    cut = [{key: values[:max_length] for key, values in row.items()} for row in rows]
    kept = [row for row in cut if row["labels"].count(IGNORED) < len(row["labels"])]
    if not kept:
        labels = rows[0]["labels"]
        prompt = next((index for index, label in enumerate(labels) if label != IGNORED), None)
        if prompt is None:
            raise InputError(f"{where} is empty: there is nothing to train on.")
        raise InputError(
            f"{where}: its prompt alone takes {prompt} tokens, so with max_length {max_length} nothing of the answer "
            "is left to train on; raise max_length or shorten the prompt."
        )
    return kept
