"""What requests may say, by OpenAI's names, and a few by vLLM's (top_k, min_p, repetition_penalty, stop_token_ids).

What is not done is refused by name if it would change the answer; what would not (``user``, ``metadata`` ...) is taken.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from halfbyte.deploy.serve.options import LONGEST_NAME
from halfbyte.generate.sampling import MOST_LOGPROBS, MOST_STOPS

LONGEST_STOP = 4096

Token = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Strict(BaseModel):
    """A JSON object whose names and types are exactly these."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Without(Strict):
    """One that takes no notice of names that it does not know."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Strict):
    """``stream_options``."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Asked(Strict):
    """What chat and completions have in common."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOPS)] | None = None
    n: Count | None = None
    # Without an effect on the answer.
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _tokens(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token in bias or ():
            if not (token.isascii() and token.isdigit() and len(token) <= 9):
                raise ValueError("its names must be token ids")
        return bias

    @model_validator(mode="after")
    def _streamed(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(Without):
    """A part of a message's content."""

    type: str
    text: str | None = None


class CalledFunction(Without):
    """A function that is called, with its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class Call(Without):
    """A call of a function in a message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Without):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    function_call: None = None
    audio: None = None

    @field_validator("content")
    @classmethod
    def _texts(cls, content: str | list[Part] | None) -> str | list[Part] | None:
        for part in content if isinstance(content, list) else ():
            if part.type != "text" or part.text is None:
                raise ValueError(f"parts must be of the type text, and there is {part.type[:40]!r}")
        return content

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self


class FunctionTool(Without):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Strict):
    """The name of one."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema with its name."""

    name: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON as a schema says."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class TemplateOptions(Strict):
    """What the chat template is told."""

    enable_thinking: bool | None = None


class ChatRequest(Asked):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    modalities: list[Literal["text"]] | None = None
    # Without an effect on the answer.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        if self.tool_choice is not None and not self.tools and self.tool_choice != "none":
            raise ValueError("tool_choice is for requests with tools")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in [tool.function.name for tool in self.tools or ()]:
                raise ValueError("tool_choice names a function that is not among the tools")
        named = self.response_format is not None and self.response_format.type != "text"
        if named and self.tools and self.tool_choice != "none":
            raise ValueError("response_format and tools cannot both decide the answer's form; leave one away")
        return self


class CompletionRequest(Asked):
    """``/v1/completions``."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _fits(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be n: no more answers are made than are given")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs go not together: tokens of the prompt have no log-probabilities here")
        return self


class EmbeddingRequest(Strict):
    """``/v1/embeddings``."""

    model: Name
    input: str | list[str] | list[Token] | list[list[Token]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None


class LoadAdapter(Strict):
    """``/v1/load_lora_adapter``, as vLLM has it."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: Literal[False] | None = None


class UnloadAdapter(Strict):
    """``/v1/unload_lora_adapter``."""

    lora_name: Name
    lora_int_id: None = None
