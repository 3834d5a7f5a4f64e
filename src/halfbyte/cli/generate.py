"""``generate``: one prompt answered on standard output, or a file of prompts answered into another."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from halfbyte.cli.generate_rows import Settings, answer_file, named_columns
from halfbyte.cli.options import (
    Device,
    FrequencyPenalty,
    Head,
    Kv,
    MaxNewTokens,
    MinP,
    Model,
    PresencePenalty,
    RemoteCode,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
)
from halfbyte.cli.talk import adapter_of, opened, read_text, sampling_of, say_template, system_text
from halfbyte.errors import DecodingError, InputError

if TYPE_CHECKING:
    from halfbyte.generate.constraint import Constraint
    from halfbyte.generate.engine import Engine

Thinking = Annotated[Literal["on", "off"] | None, typer.Option(help="Whether the chat template asks for thoughts.")]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The question; - reads it from standard input.")] = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", help="The same as a flag.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File of rows as in training, answers may lack; .txt: a prompt a line; -.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON lines with the answers; goes on with what it holds.  [default: standard output]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Answers to each row.")] = 1,
    skip_bad_rows: Annotated[
        Literal["yes", "no", "true", "false", "all"] | None,
        typer.Option(help="Leave out rows that cannot be answered, up to a tenth of them; all: however many."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="The rows' own columns: prompt=question.  [default: a run's, in rows that have them]"),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that answers follow (needs halfbyte[serve]).")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that answers follow, likewise.")] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the prompt as it stands, without a template.")] = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    seed: Seed = None,
    thinking: Thinking = None,
    kv: Kv = None,
    head: Head = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Answer one prompt on standard output, or a file of them, many at once."""
    given = [text for text in (prompt, prompt_option, prompts) if text is not None]
    if len(given) != 1:
        what = "no prompt" if not given else "more than one of PROMPT, --prompt and --prompts"
        raise InputError(f"generate was given {what}; give one prompt, or a file of them with --prompts.")
    if raw and system is not None:
        raise InputError("--raw takes the prompt as it stands, without --system; give one of the two.")
    if prompts is None and (out or samples > 1 or skip_bad_rows or columns):
        raise InputError(
            "--out, --samples, --skip-bad-rows and --columns belong to a file of prompts; give --prompts FILE."
        )
    if json_schema is not None and regex is not None:
        raise InputError("An answer follows --json-schema or --regex, one of the two.")
    named = None if prompts is None else named_columns(model, columns)
    opening, schema = system_text(system), None if json_schema is None else _schema(json_schema)
    text = _standard_input() if given[0] == "-" and prompts is None else given[0]
    with contextlib.ExitStack() as stack:
        loaded, tokenizer = stack.enter_context(opened(model, seed, trust_remote_code, device))
        from halfbyte.evaluate.answered import TOGETHER
        from halfbyte.generate import check_generates
        from halfbyte.generate.engines import engine_over

        check_generates(loaded)
        if not raw:
            say_template(loaded, tokenizer)
        answering = adapter_of(loaded)
        sampling = sampling_of(
            loaded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            seed=seed,
        )
        engine = stack.enter_context(engine_over(loaded, tokenizer, kv=kv, head=head, most_waiting=TOGETHER))
        constraint = _constraint(engine, schema, regex)
        settings = Settings(
            model,
            opening,
            raw,
            sampling,
            constraint,
            (schema, regex),
            samples,
            thinking,
            (kv, head),
            answering,
            named,
        )
        if prompts is not None:
            answer_file(engine, loaded, prompts, out, settings, skip_bad_rows or "no")
        else:
            _answer(engine, loaded, text, settings)


def _answer(engine: "Engine", model: Any, text: str, settings: Settings) -> None:
    """Print the answer to one prompt as it comes."""
    prompt: str | list[dict[str, Any]] = text
    if not settings.raw:
        opening = [] if settings.system is None else [{"role": "system", "content": settings.system}]
        prompt = [*opening, {"role": "user", "content": text}]
    try:
        for piece in engine.submit(settings.asking.request(engine.tokenizer, model, prompt)):
            typer.echo(piece.text, nl=False)
    except DecodingError as error:
        typer.echo()
        raise InputError(str(error)) from error
    typer.echo()


def _constraint(engine: "Engine", schema: Any, regex: str | None) -> "Constraint | None":
    if schema is None and regex is None:
        return None
    from halfbyte.generate.constraint import Constraints

    constraints = Constraints(engine.tokenizer, engine.decoder.vocab_size, engine.stops)
    return constraints.regex(regex) if regex is not None else constraints.json_schema(schema)


def _schema(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is no JSON ({error}); give a file with a JSON schema.") from None


def _standard_input() -> str:
    if sys.stdin is None:
        raise InputError("--prompt - reads the prompt from standard input, but that is closed.")
    return sys.stdin.read()
