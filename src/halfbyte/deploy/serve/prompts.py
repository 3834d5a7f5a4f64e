"""Messages and texts as tokens, and grammars for answers: all that is made of a request before the engine gets it.

This takes milliseconds to seconds and Python's lock, so it is done in threads of its own, few of them. The tokenizer is
a copy: the engine's thread uses the model's at the same time, which the libraries do not promise to bear.
"""

import copy
import threading
from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte.data.control import tools_for
from halfbyte.data.rendering import Thinking
from halfbyte.data.template import Writer
from halfbyte.deploy.serve.errors import ApiError
from halfbyte.deploy.serve.schemas import ChatRequest, CompletionRequest, Message, NamedTool, ObjectFormat, SchemaFormat
from halfbyte.deploy.serve.tools import ToolForm
from halfbyte.errors import InputError
from halfbyte.generate.constraint import Constraint, Constraints
from halfbyte.generate.conversation import encode, encode_source


class Prompts:
    """Makes tokens of requests.

    Args:
        tokenizer: the model's.
        vocab_size: logits of a token.
        stops: tokens that end answers.
        reads_apart: whether the model is an encoder-decoder, which has no conversations.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stops: tuple[int, ...], reads_apart: bool
    ) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._vocab_size, self._stops, self._reads_apart = vocab_size, stops, reads_apart
        self._writers: dict[Thinking | None, Writer] = {}
        self._constraints: Constraints | None = None
        self._lock = threading.Lock()
        if not reads_apart:
            _ = self._writer(None).dialect  # which is found by trials that bound the process's memory: before all else
        self.tool_form = None if reads_apart else ToolForm.of(self._writer(None).template)

    def chat(self, asked: ChatRequest) -> tuple[int, ...]:
        """Return the tokens of a conversation, the generation prompt included.

        Raises:
            InputError, ApiError: the template refuses it.
        """
        messages = [_message(message) for message in asked.messages]
        if self._reads_apart:
            return tuple(
                encode_source([{**turn, "content": turn["content"] or ""} for turn in messages], self._tokenizer)
            )
        tools = None
        if asked.tools and asked.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in asked.tools]
            self._form()
        with self._lock:
            writer = self._writer(_thinking(asked))
            control, to_tokens = tools_for(self._tokenizer, writer.template)
            both = {"messages": messages, "tools": tools}
            source = control.render(both, lambda given: writer.prompt(given["messages"], given["tools"]))
            [tokens] = to_tokens([source])
        return tuple(int(token) for token in tokens.ids)

    def completions(self, asked: CompletionRequest) -> list[tuple[int, ...]]:
        """Return the tokens of each prompt.

        Raises:
            InputError: one is empty.
        """
        given: list[Any] = [asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt)
        if given and isinstance(given[0], int):
            given = [given]
        if not given:
            raise ApiError(400, "The prompt is empty; give at least one character.", param="prompt")
        with self._lock:
            return [tuple(self._text(one) if isinstance(one, str) else one) for one in given]

    def constraint(self, asked: ChatRequest) -> Constraint | None:
        """Return the grammar that an answer must follow.

        Raises:
            InputError, ApiError: it is none.
        """
        forced = asked.tool_choice == "required" or isinstance(asked.tool_choice, NamedTool)
        wanted = asked.response_format
        if not (forced and asked.tools) and not isinstance(wanted, ObjectFormat | SchemaFormat):
            return None
        with self._lock:
            if self._constraints is None:
                self._constraints = Constraints(self._tokenizer, self._vocab_size, self._stops)
        if isinstance(wanted, ObjectFormat):
            return self._constraints.json_object()
        if isinstance(wanted, SchemaFormat):
            schema = wanted.json_schema.schema_
            return self._constraints.json_schema({"type": "object"} if schema is None else schema)
        tools = [tool.function for tool in asked.tools or ()]
        if isinstance(asked.tool_choice, NamedTool):
            tools = [tool for tool in tools if tool.name == asked.tool_choice.function.name]
        return self._constraints.lark(self._form().grammar(tools))

    def decode(self, ids: tuple[int, ...]) -> str:
        """Return the text of a prompt, as ``echo`` gives it."""
        with self._lock:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _text(self, text: str) -> list[int]:
        return encode_source(text, self._tokenizer) if self._reads_apart else encode(text, self._tokenizer)

    def _writer(self, thinking: Thinking | None) -> Writer:
        if thinking not in self._writers:
            self._writers[thinking] = Writer(self._tokenizer, thinking=thinking)
        return self._writers[thinking]

    def _form(self) -> ToolForm:
        if self.tool_form is None:
            raise ApiError(
                400, "The model's chat template has no tools, or writes calls in a form that is not known here.",
                param="tools", code="tools_not_supported",
            )  # fmt: skip
        return self.tool_form


def _thinking(asked: ChatRequest) -> Thinking | None:
    wanted = None if asked.chat_template_kwargs is None else asked.chat_template_kwargs.enable_thinking
    return None if wanted is None else "on" if wanted else "off"


def _message(message: Message) -> dict[str, Any]:
    """Return a message as templates take it."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text or "" for part in content)
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": content or ""}
    if message.name is not None:
        found["name"] = message.name
    if message.role == "assistant" and message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        if message.role != "assistant":
            raise InputError("Only messages of the assistant have tool_calls.")
        found["tool_calls"] = [
            {"id": call.id or "", "type": "function", "function": call.function.model_dump()}
            for call in message.tool_calls
        ]
    if message.role == "tool" and message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found
