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
text, since a template writes its own beginning-of-sequence token. What else a template can and cannot write is found in
:mod:`halfbyte.data.dialect`, and conversations are fitted to it in :mod:`halfbyte.data.fitting`. A row of which the
template leaves away anything is bad.

A tokenizer without a chat template gets ``chat_template``'s plain one for conversations, while a prompt and its
completion are put together as they are, with an end-of-sequence token; with a chat template they become a user's and
an assistant's turn. A ``text`` is trained on from beginning to end, end-of-sequence token included, in either case.
"""

import dataclasses
import functools
import importlib.util
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from halfbyte.data.dialect import Dialect
from halfbyte.data.examples import BadRow, Chat, Completion, Example, Judged, Message, Preference, Text
from halfbyte.data.fitting import THOUGHTS_DROPPED, UNANSWERED, fit
from halfbyte.data.messages import holds, text_of, words_of
from halfbyte.data.rendering import NO_END, Refused, Renderer, Thinking, TooLong, with_thinking
from halfbyte.errors import InputError, nearest

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
        notes: what was made of the example that its author might not expect.
        plain: characters that are plain text even where they spell a control token.
    """

    text: str
    spans: list[tuple[int, int]]
    begin: list[int] = dataclasses.field(default_factory=list)
    notes: tuple[str, ...] = ()
    plain: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def chat_template(
    tokenizer: "PreTrainedTokenizerBase", override: str | None = None, thinking: Thinking | None = None
) -> str:
    """Return the chat template that is trained with; saved with the adapter, it is the one to use.

    Without a template of its own, the tokenizer gets a plain one of ``### Instruction:`` and ``### Response:``. That
    begins with the beginning-of-sequence token if the tokenizer itself begins texts with it, and closes each answer
    with the end-of-sequence token.

    Args:
        tokenizer: of the model.
        override: takes the place of the tokenizer's: a Jinja file, the name of one of TRL's templates, or Jinja.
        thinking: what the template does if nobody tells it to think or not; None: as it is made.

    Raises:
        InputError: there is no such template, or the tokenizer has several and none of them is the default.
    """
    return with_thinking(_own_template(tokenizer) if override is None else _named_template(override), thinking)


def _own_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    if tokenizer.chat_template:
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise InputError(
                f"The tokenizer has several chat templates ({names}) and none is the default; write one of them to a "
                "file and name that (--chat-template)."
            ) from None
        return template
    return ("{{ bos_token }}" if _begin(tokenizer) else "") + PLAIN_TEMPLATE


def _named_template(name: str) -> str:
    if "{{" in name or "{%" in name:
        return name
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"The chat template {name} is not UTF-8 text; save it as such.") from None
    except OSError as error:
        raise InputError(f"The chat template {name} cannot be read: {error.strerror}.") from None
    known = _trl_templates()
    if name in known:
        return known[name].read_text(encoding="utf-8")
    raise InputError(
        f"There is no chat template {name!r}{nearest(name, known)}: it is neither a file nor the name of one of TRL's, "
        f"which are {', '.join(known)}."
    )


def _trl_templates() -> dict[str, Path]:
    """Return the files of the templates that TRL brings along, by name; TRL need not be imported for that."""
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0], "chat_templates").glob("*.jinja")) if folders else []
    return {file.stem: file for file in files if not file.stem.endswith("_training")}


class Writer:
    """Writes examples as text with one tokenizer's chat template: each as one draft or several.

    Args:
        tokenizer: of the model.
        chat_template: in the place of the tokenizer's: see :func:`chat_template`.
        thinking: what the template is told of thoughts; None: nothing, so it does as it does by default.
        train_on: which answers of a conversation are trained; a message's own ``train`` wins.

    Attributes:
        template: the chat template.

    Raises:
        InputError: there is no such template, or (with the first conversation) it can write none.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template: str | None = None,
        thinking: Thinking | None = None,
        train_on: Literal["all", "last"] = "all",
    ) -> None:
        self.tokenizer = tokenizer
        self.template = _chat_template(tokenizer, chat_template, thinking)
        self.begin = _begin(tokenizer)
        self._has_template = bool(chat_template or tokenizer.chat_template)
        self._thinking: Thinking | None = thinking
        self._train_on = train_on

    @functools.cached_property
    def dialect(self) -> Dialect:
        """What the template can write."""
        return Dialect(Renderer(self.tokenizer, self.template), self._thinking, self.tokenizer.eos_token)

    def __call__(self, example: Example) -> list[Draft]:
        """Return the rows of an example.

        Raises:
            BadRow: the template cannot write it, or no answer in it is to be trained.
            InputError: no stop token is known, or the template can write no conversation.
        """
        match example:
            case Chat(where, messages):
                return self.chat(where, messages, example.tools)
            case Completion(where, prompt, completion) if self._has_template:
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                return self.chat(where, turns)
            case Completion(_, prompt, completion):
                return [self.plain(prompt, completion)]
            case Text(_, text):
                return [self.plain("", text)]
            case Preference():
                return list(self.preference(example)[1:])
            case Judged(_, prompt, completion):
                return [self._behind(example, prompt, completion, None)]
            case _:
                raise TypeError(f"{type(example).__name__} is not written as one text")

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """Return what generation starts from, as in training.

        Raises:
            InputError: the template cannot write the conversation.
        """
        try:
            try:
                dialect = self.dialect
            except InputError:  # nothing can be trained with it, but perhaps it writes prompts
                return Renderer(self.tokenizer, self.template).trial(messages, tools, prompt=True)
            fitted, _ = fit(dialect, messages, tools)
            return dialect.render(fitted, tools, prompt=True)
        except Refused as error:
            sentence = str(error).replace(" (--chat-template)", "")  # an option where models are trained
            raise InputError(f"The conversation cannot be written: {sentence}") from error
        except TooLong:
            raise InputError(NO_END) from None

    def preference(self, example: Preference) -> tuple[str, Draft, Draft]:
        """Return the prompt of two answers, and each of them behind it with itself trained.

        Raises:
            BadRow: the template cannot write one of them, or not as one row behind one prompt.
            InputError: as when called.
        """
        answers = (example.chosen, example.rejected)
        chosen, rejected = (self._behind(example, example.prompt, answer, example.tools) for answer in answers)
        prompt, other = (draft.text[: draft.spans[0][0]] for draft in (chosen, rejected))
        if prompt != other:
            raise _scattered(example)
        return prompt, chosen, rejected

    def _behind(
        self,
        example: Example,
        prompt: str | list[Message],
        answer: str | list[Message],
        tools: list[dict[str, Any]] | None,
    ) -> Draft:
        """Return an answer behind its prompt, trained alone."""
        if isinstance(prompt, str) and isinstance(answer, str):
            drafts = self(Completion(example.where, prompt, answer))
        else:
            before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            behind = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            turns = [{**message, "train": False} for message in before]
            drafts = self.chat(example.where, turns + [{**message, "train": True} for message in behind], tools)
        if len(drafts) != 1:
            raise _scattered(example)
        return drafts[0]

    def plain(self, prompt: str, answer: str) -> Draft:
        """Return a prompt and an answer as they are, with a stop."""
        text = prompt + answer + self.end()
        return Draft(text, [(len(prompt), len(text))], self.begin)

    def chat(self, where: str, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[Draft]:
        """Return the rows of a conversation."""
        try:
            fitted, notes = fit(self.dialect, messages, tools)
            answers = self._trained(fitted)
            if any("train" in message for message in fitted):
                fitted = [{key: value for key, value in message.items() if key != "train"} for message in fitted]
            drafts = self._drafts(fitted, answers, tools)
            if fitted[-1]["role"] != "assistant":
                notes.append(UNANSWERED)
            notes += self._check_whole(fitted, answers, drafts)
        except Refused as error:
            raise BadRow(where, error.kind, f": {error}") from error
        if notes:
            drafts[0] = dataclasses.replace(drafts[0], notes=tuple(notes))
        return drafts

    def _trained(self, messages: list[Message]) -> list[int]:
        """Return the places of the answers that are trained."""
        answers = [at for at, message in enumerate(messages) if at and message["role"] == "assistant"]
        if not answers:
            raise Refused("no answer", "no turn of the assistant's answers anything, so there is nothing to learn.")
        chosen = []
        for at in answers:
            train = messages[at].get("train")
            if train if train is not None else self._train_on == "all" or at == answers[-1]:
                chosen.append(at)
        last = messages[answers[-1]]
        if not chosen and self._train_on == "last" and not (text_of(last).strip() or last.get("tool_calls")):
            raise Refused("last answer is empty", "its last answer is empty, so there is nothing to learn from it.")
        if not chosen:
            raise Refused("no answer to train", "all its answers are marked as not to be trained; leave the row away.")
        return chosen

    def _drafts(self, messages: list[Message], answers: list[int], tools: list[dict[str, Any]] | None) -> list[Draft]:
        dialect = self.dialect
        drafts: list[Draft] = []
        whole = ""
        if len(answers) > 1 and dialect.appends:
            whole = dialect.render(messages[: answers[-1] + 1], tools)
        for at in answers:
            prompt = dialect.render(messages[:at], tools, prompt=True)
            answer = self._standing(whole, prompt, messages[at])
            if answer is None:
                prompt, answer = dialect.after(prompt, messages[: at + 1], tools)
            spans = [(len(prompt), len(prompt) + len(answer))]
            if drafts and prompt.startswith(drafts[-1].text):
                spans = drafts.pop().spans + spans
            drafts.append(Draft(prompt + answer, spans))
        return drafts

    def _standing(self, whole: str, prompt: str, message: Message) -> str | None:
        """Return an answer of nothing but text, if it stands behind its prompt in the whole conversation."""
        if not whole.startswith(prompt) or message.keys() - {"role", "content"}:
            return None
        lead, stop = self.dialect.frame
        content = text_of(message)
        answers = (lead + text + stop for text in (content, content.strip()))
        return next((answer for answer in answers if whole.startswith(answer, len(prompt))), None)

    def _check_whole(self, messages: list[Message], answers: list[int], drafts: list[Draft]) -> list[str]:
        """Look for what the template has left away; return a note if it was nothing but thoughts."""
        texts = [draft.text for draft in reversed(drafts)]
        for message in messages[: answers[-1] + 1]:
            content = message["content"]
            if isinstance(content, str) and content in texts[0] and "tool_calls" not in message:
                continue
            there = texts if message["role"] == "assistant" else texts[:1]
            for word in words_of(message):
                if not any(holds(text, word) for text in there):
                    raise Refused(
                        "left away by the chat template",
                        f"the model's chat template leaves away what a message of the {message['role']} says "
                        f"({reprlib.repr(word)}); change the row, or take another template (--chat-template).",
                    )
        thoughts = [messages[at]["reasoning_content"].strip() for at in answers if "reasoning_content" in messages[at]]
        return [] if all(any(thought in text for text in texts) for thought in thoughts) else [THOUGHTS_DROPPED]

    def end(self) -> str:
        """Return the end-of-sequence token."""
        if self.tokenizer.eos_token is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token, so the model would never learn to stop; "
                "set eos_token in its tokenizer_config.json."
            )
        token: str = self.tokenizer.eos_token
        return token


def _scattered(example: Example) -> BadRow:
    both = isinstance(example, Preference)
    what = "both answers behind one prompt; make each" if both else "the answer behind its prompt in one row; make it"
    kind = "answers without a prompt in common" if both else "answer without a prompt of its own"
    return BadRow(example.where, kind, f": the model's chat template does not write {what} one turn.")


_chat_template = chat_template
"""Under a name that no argument has."""


def _begin(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the beginning-of-sequence id if the tokenizer puts it before a text of its own accord."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
