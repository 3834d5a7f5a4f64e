"""``chat`` and ``generate``."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from halfbyte import choices
from halfbyte.cli.console import fail, notes, status
from halfbyte.cli.options import Device, MaxNewTokens, Model, RemoteCode, Seed, System, Temperature, TopP
from halfbyte.errors import InputError
from halfbyte.quiet import quiet


def chat(
    model: Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Talk to a model. /reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer."""
    with opened(model, seed, trust_remote_code, device) as (loaded, tokenizer):
        from halfbyte.generate import check_generates, stream_reply

        check_generates(loaded)
        if loaded.config.is_encoder_decoder:
            raise InputError(f"{model} turns one text into another and has no conversation; use generate --prompt.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
        opening = _opening(loaded, tokenizer, system)
        messages = list(opening)
        notes.print("Ctrl-C stops an answer; /reset forgets the conversation; /quit or Ctrl-D ends.", style="dim")
        while (line := _read_line()) not in (None, "/quit"):
            if line == "/reset":
                messages = list(opening)
                notes.print("The conversation is forgotten.", style="dim")
                continue
            if line.startswith("/"):
                notes.print(f"There is no {line}; there is /reset and /quit.", style="dim", markup=False)
                continue
            if not line:
                continue
            question = {"role": "user", "content": line}
            reply = stream_reply(
                loaded,
                tokenizer,
                [*messages, question],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
            )
            try:
                answer = _print_stream(reply)
            except InputError as error:
                fail(str(error))
                continue
            if answer:
                messages += [question, {"role": "assistant", "content": answer}]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The question; - reads it from standard input.")],
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the prompt as it stands, without a template.")] = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Answer one prompt on standard output."""
    if raw and system is not None:
        raise InputError("--raw takes the prompt as it stands, without --system; give one of the two.")
    text = _standard_input() if prompt == "-" else prompt
    with opened(model, seed, trust_remote_code, device) as (loaded, tokenizer):
        from halfbyte.generate import stream_reply

        for piece in stream_reply(
            loaded,
            tokenizer,
            text if raw else [*_opening(loaded, tokenizer, system), {"role": "user", "content": text}],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        ):
            typer.echo(piece, nl=False)
    typer.echo()


@contextlib.contextmanager
def opened(
    path: str, seed: int | None, trust_remote_code: bool, device: choices.Device = "auto"
) -> Iterator[tuple[Any, Any]]:
    """Yield a model and its tokenizer, the libraries silent meanwhile."""
    with quiet():
        with status(f"Loading {path}"):
            import transformers

            from halfbyte.hf import describe_base, load, load_tokenizer

            if seed is not None:
                transformers.set_seed(seed)
            tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
            loaded = load(path, trust_remote_code=trust_remote_code, device=device)
        if notes.is_terminal:  # else nobody watches, and loading has warned of less than half
            notes.print(f"The weights: {describe_base(loaded)}.", style="dim")
        yield loaded, tokenizer


def _standard_input() -> str:
    if sys.stdin is None:
        raise InputError("--prompt - reads the prompt from standard input, but that is closed.")
    return sys.stdin.read()


def _read_line() -> str | None:
    """Return what the user types next, or None at the end."""
    while sys.stdin is not None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            notes.print("\n/quit or Ctrl-D ends.", style="dim")
    return None


def _opening(model: Any, tokenizer: Any, system: str | None) -> list[dict[str, str]]:
    """Return what a conversation begins with."""
    if not tokenizer.chat_template and not model.config.is_encoder_decoder:
        notes.print("The model has no chat template; a plain one is used.", style="dim")
    return [] if system is None else [{"role": "system", "content": system}]


def _print_stream(pieces: Iterator[str]) -> str:
    """Print the pieces as they come, until the end or Ctrl-C; return what was printed."""
    printed = ""
    try:
        for piece in pieces:
            printed += piece
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        notes.print(" (stopped)", style="dim", end="")
    typer.echo()
    return printed
