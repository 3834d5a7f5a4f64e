"""Options that several commands take, and flags made from the fields of a configuration."""

import inspect
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ByteSize

Model = Annotated[str, typer.Argument(help="Run folder, adapter folder, model folder or hub id.")]
System = Annotated[str | None, typer.Option(help="System prompt, put before the conversation.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Greatest length of an answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; more varies the answers.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens with this probability.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed, to draw the same answers again.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of each side.  [default: torch's]")]
Results = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Folder for the results.  [default: benchmarks/results/<date>-<commit>-<tier>]"),
]

OPTIONAL_VALUES = {"--skip-bad-rows": ("yes", "no", "true", "false", "all")}
"""Options that need no value, and the values that they take; typer has no such thing."""


def flags_of(model: type[BaseModel]) -> inspect.Signature:
    """Return the parameters of a command: a configuration file, and a flag for each field, absent unless given."""
    config = Annotated[Path | None, typer.Option("--config", help="YAML file with any of the options below.")]
    annotations: dict[str, Any] = {"config": config}
    for name, field in model.model_fields.items():
        default = "" if field.is_required() or field.default is None else f"  [default: {field.default}]"
        flag = _flag_type(field.annotation)
        option = typer.Option(help=f"{field.description}{default}", metavar="<path>" if flag is Path else None)
        annotations[name] = Annotated[(str if flag in (ByteSize, Path) else flag) | None, option]
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )


def _flag_type(annotation: Any) -> Any:
    """Return the type of a field's flag: that of the field, but text for what the field itself reads from text."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        bare = (typing.get_args(m)[0] if typing.get_origin(m) is Annotated else m for m in typing.get_args(annotation))
        members = [member for member in bare if member is not type(None)]
        if len(members) > 1 and members[0] in (bool, int):
            return str
        return _flag_type(members[0])
    if typing.get_origin(annotation) is list:
        return list[str]
    return str if typing.get_origin(annotation) is dict else annotation


def complete(arguments: list[str]) -> list[str]:
    """Give each option of ``OPTIONAL_VALUES`` that stands alone the value ``yes``.

    A word behind it is its value, unless it begins with a dash or names something that is there.
    """
    whole = []
    for place, argument in enumerate(arguments):
        following = arguments[place + 1 : place + 2]
        alone = argument in OPTIONAL_VALUES and not (following and _is_value(following[0], OPTIONAL_VALUES[argument]))
        whole.append(f"{argument}=yes" if alone else argument)
    return whole


def _is_value(word: str, values: tuple[str, ...]) -> bool:
    return word in values or (word.isalnum() and not Path(word).exists())
