"""Options that several commands take, and flags made from the fields of a configuration."""

import inspect
import shlex
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from pydantic import BaseModel, ByteSize

from halfbyte import choices
from halfbyte.errors import InputError

Model = Annotated[str, typer.Argument(help="Run folder, adapter folder, model folder or hub id.")]
System = Annotated[
    str | None, typer.Option(help="System prompt, put before the conversation: a text, or a file that holds it.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Greatest length of an answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; more varies the answers.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens with this probability.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed, to draw the same answers again.")]
TopK = Annotated[
    int | None, typer.Option(min=1, help="Draw from so many likeliest tokens.  [default: the model's own]")
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Draw from tokens at least so likely, of the likeliest one's share.  [default: the model's own]",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        min=0.01, max=100, help="Above 1 makes tokens unlikely that stand there already.  [default: the model's]"
    ),
]
FrequencyPenalty = Annotated[
    float, typer.Option(min=-100, max=100, help="Taken from a token's logit each time that the answer holds it.")
]
PresencePenalty = Annotated[
    float, typer.Option(min=-100, max=100, help="Taken from a token's logit if the answer holds it.")
]
Kv = Annotated[
    choices.KvType | None, typer.Option(help="Keep keys and values in 8 bits: half the memory.  [default: as they are]")
]
Head = Annotated[
    choices.HeadType | None, typer.Option(help="Quantize the output head, for speed.  [default: as it is]")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="A further adapter over the same base, as NAME=PATH. For several, give it again."),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Device = Annotated[
    choices.Device,
    typer.Option(help="Where the model runs; auto: on the CUDA GPU if there is one, else on the CPU."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of each side.  [default: torch's]")]
Results = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Folder for the results.  [default: benchmarks/results/<date>-<commit>-<tier>]"),
]

OPTIONAL_VALUES = {"--skip-bad-rows": ("yes", "no", "true", "false", "all")}
"""Options that need no value, and the values that they take; typer has no such thing."""


Config = Annotated[Path | None, typer.Option("--config", help="YAML file with any of the options below.")]


def flags_of(
    model: type[BaseModel], names: Iterable[str] | None = None, tells: bool = False, /, **first: Any
) -> inspect.Signature:
    """Return the parameters of a command: a flag for each field, absent unless given, and others before them.

    Args:
        model: whose fields.
        names: of the fields that get one; None: all.
        tells: whether defaults are told although something comes before.
        **first: the annotations of what comes before, and says what is true where a flag is not given; without any, a
            configuration file, over the fields' own defaults.
    """
    annotations: dict[str, Any] = dict(first) or {"config": Config}
    for name in model.model_fields if names is None else names:
        field = model.model_fields[name]
        default = f"  [default: {field.default}]"
        if (first and not tells) or field.is_required() or field.default is None or (tells and not field.default):
            default = ""
        flag = _flag_type(field.annotation)
        again = " For several, give the flag again." if typing.get_origin(flag) is list else ""
        option = typer.Option(help=f"{field.description}{again}{default}", metavar="<path>" if flag is Path else None)
        annotations[name] = Annotated[(str if flag in (ByteSize, Path) else flag) | None, option]
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if name in first else None,
                annotation=annotation,
            )
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


class DataCommand(typer.core.TyperCommand):
    """A command that takes data: no word is read as data of another kind than the one it stands next to."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, after a look at where the words stand that belong to no option."""
        options = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        takes = {name: not getattr(option, "is_flag", False) for option in options for name in option.opts}
        several = {name for option in options if _takes_names(option) for name in option.opts}
        check_words(args, takes, several, bare="--data" not in takes)
        return super().parse_args(ctx, args)


def _takes_names(option: Any) -> bool:
    """Tell whether an option takes a name, and may be given again for more."""
    return bool(option.multiple and option.type_descriptor.annotation == list[str])


def check_words(arguments: list[str], takes: dict[str, bool], several: set[str], *, bare: bool) -> None:
    """Make sure that words which belong to no option are meant so: in one place, and not behind an option of names.

    Args:
        arguments: of the command line.
        takes: of each option whether it takes a value.
        several: options that may be given again for more names.
        bare: whether data is named without an option.

    Raises:
        InputError: they do not; it says how to write what was perhaps meant.
    """
    words: list[str] = []
    flag = value = ""
    rest = iter(arguments)
    for word in rest:
        if word.startswith("-") and word != "-":
            flag, equals, value = word.partition("=")
            if flag not in takes:
                return  # a mistake that is told elsewhere, or the end of the options
            if takes[flag] and not equals:
                value = next(rest, "")
            continue
        if flag in several:
            first = ", and put training data before all flags" if bare else ""
            again = shlex.join([flag, value, flag, word])
            raise InputError(
                f"{flag} takes one name, but {word!r} stands behind {value!r}; for several write {again}{first}."
            )
        if not bare:
            raise InputError(f"{word!r} belongs to no flag; data is named so: {shlex.join(['--data', word])}.")
        if words and flag != words[0]:
            raise InputError(
                f"Data is named in two places, {words[1]!r} and {word!r}; name all of it before the flags."
            )
        words = words or [flag, word]
