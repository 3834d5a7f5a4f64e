"""What ``halfbyte serve`` takes, and its limits; the flags are made of these fields. Imports no torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import ByteSize, Field, model_validator

from halfbyte.deploy.address import is_loopback
from halfbyte.errors import InputError
from halfbyte.options import Options

MOST_ADAPTERS = 256
"""That are loaded at one time."""
LONGEST_NAME = 256
"""Characters of a name of a model."""
MOST_INPUTS = 2048
"""Texts of one request for embeddings, as OpenAI has it."""
PATIENCE = 30.0
"""Seconds that a client has to send a request's head, and its body."""
STALLED = 300.0
"""Seconds after which a client that takes nothing more of its answer is let go."""
HEARTBEAT = 15.0
"""Seconds without a token after which a stream sends a comment, so that nobody in between closes it."""


class ServeOptions(Options):
    """Where and for whom to serve, and what requests may take."""

    adapter: list[str] = Field(default=[], description="NAME=PATH: an adapter over the same base, asked for as NAME.")
    name: str | None = Field(default=None, description="What the model is called; without it as its folder or hub id.")
    host: str = Field(default="127.0.0.1", description="Address to listen at; any but this machine's own needs a key.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen at; 0 takes a free one.")
    api_key: str | None = Field(
        default=None,
        description="Key that clients must send; the list of processes shows it, a file does not.",
    )
    api_key_file: Path | None = Field(default=None, description="File of keys, one a line; any of them will do.")
    adapter_folder: list[str] = Field(
        default=[],
        description="Folder under which /v1/load_lora_adapter may take adapters; without it that is off.",
    )
    memory: ByteSize | None = Field(
        default=None,
        gt=0,
        description="For keys and values, as 2GB; without it half of what is free after loading.",
    )
    max_waiting: int = Field(
        default=64, ge=1, description="Answers that may wait for memory or a place in the batch; more get 429."
    )
    max_body: ByteSize = Field(default=ByteSize(4 << 20), gt=0, description="Greatest body of a request.")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Longest prompt; without it what the model attends to."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Longest answer that may be asked for; without it what the model attends to."
    )
    default_tokens: int = Field(default=1024, ge=1, description="Longest answer of a chat that asks for no length.")
    max_choices: int = Field(default=16, ge=1, description="Answers to one request (n times its prompts).")
    kv: Literal["int8"] | None = Field(default=None, description="What keys and values are held in: int8.")
    head: Literal["int8", "nf4"] | None = Field(
        default=None, description="What the output head is held in, for speed: int8 or nf4."
    )
    grace: float = Field(
        default=30.0, ge=0, description="Seconds that answers have to end in, after the first Ctrl-C or SIGTERM."
    )
    access_log: str = Field(default="-", description="File for a JSON line a request; - for standard error, or none.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; auto: on the CUDA GPU if there is one, else on the CPU."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("api_key and api_key_file are two ways for the same: give one of them")
        if not self.is_local and self.api_key is None and self.api_key_file is None:
            raise ValueError(
                f"host {self.host} is reached from other machines, so a key is needed: give --api-key-file, or "
                "--api-key, or serve on 127.0.0.1"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

    def keys(self) -> tuple[str, ...]:
        """Return the keys that clients may send; none: no key is asked for.

        Raises:
            InputError: the file cannot be read or holds none, or a key is not printable ASCII without spaces.
        """
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"The keys in {self.api_key_file} cannot be read: {error}.") from None
            keys = tuple(line.strip() for line in lines if line.strip())
            if not keys:
                raise InputError(f"The file {self.api_key_file} holds no key; write one a line.")
        else:
            keys = () if self.api_key is None else (self.api_key,)
        for key in keys:
            if not (key.isascii() and key.isprintable()) or " " in key or not key:
                raise InputError("A key must be of printable ASCII characters without spaces; take another one.")
        return keys

    def adapters(self) -> dict[str, Path]:
        """Return the adapters by name.

        Raises:
            InputError: one is not written as NAME=PATH, or a name stands twice.
        """
        found: dict[str, Path] = {}
        for word in self.adapter:
            name, equals, path = word.partition("=")
            if not (name.strip() and equals and path):
                raise InputError(f"--adapter {word} is wrong; write NAME=PATH, the folder of a run or adapter.")
            if name in found:
                raise InputError(f"Two adapters are named {name}; name one of them otherwise.")
            found[name] = Path(path).expanduser()
        return found
