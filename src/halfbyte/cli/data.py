"""``data``: what will be trained, as a table and samples in the terminal, a page, a picture, or numbers."""

import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.console import bar
from halfbyte.cli.data_page import page
from halfbyte.cli.data_tasks import show_task
from halfbyte.cli.data_terminal import show
from halfbyte.cli.options import flags_of
from halfbyte.data.options import DataOptions
from halfbyte.data.sources import inputs_of
from halfbyte.errors import InputError, check_writable
from halfbyte.files import absolute, whole_file, write_text
from halfbyte.quiet import quiet
from halfbyte.runs.config import TrainConfig

if TYPE_CHECKING:
    from halfbyte.data.prepared import Prepared
    from halfbyte.data.samples import Sample
    from halfbyte.data.survey import Survey

PAGE_SAMPLES = 20
ENDINGS = {"--html": (".html", ".htm"), "--json": (".json",), "--picture": (".png", ".svg")}
"""How the names of the files end that a flag writes."""

Files = Annotated[
    list[str] | None,
    typer.Argument(help="Training data, before all flags: files, folders, globs, hub ids; see docs/data.md."),
]
Samples = Annotated[
    int, typer.Option(min=0, help="Rows to show: the first, one of median length, the longest, then any.")
]
Row = Annotated[list[int] | None, typer.Option(min=1, help="Show this row, from 1, instead; may be given again.")]
Borders = Annotated[bool, typer.Option("--tokens", help="Show the borders of tokens.")]
Html = Annotated[Path | None, typer.Option(dir_okay=False, help="Write all of it as one page.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", allow_dash=True, dir_okay=False, help="Write the numbers as JSON; - prints only them."),
]
Picture = Annotated[Path | None, typer.Option(dir_okay=False, help="Draw how long the rows are: a .png or .svg file.")]


@dataclasses.dataclass(frozen=True)
class Opened:
    """The data as it is trained on, its tokenizer, and what was made of that."""

    data: "Prepared"
    tokenizer: Any
    notes: list[str]


def _opened(options: DataOptions) -> Opened:
    """Make the tables that ``train`` would make of the same options."""
    from halfbyte.data.prepared import equip, give_plain, prepare
    from halfbyte.hf import load_tokenizer
    from halfbyte.train.methods import METHODS

    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    notes = equip(tokenizer, options)
    method = METHODS[options.method]
    with bar("Reading") as reading:
        task = reading.add_task("")
        prepared = prepare(
            options,
            tokenizer,
            method=options.method,
            form=method.form,
            take=functools.partial(method.take, options.method),
            progress=lambda _, done, total: reading.update(task, completed=done, total=total),
        )
    return Opened(prepared, tokenizer, [*notes, *give_plain(tokenizer, prepared)])


def data(
    files: Files = None,
    samples: Samples = 3,
    row: Row = None,
    tokens: Borders = False,
    html: Html = None,
    json_file: Json = None,
    picture: Picture = None,
    **options: Any,
) -> None:
    """Show what will be trained: counts, lengths, duplicates, what is odd, and rows with their trained tokens marked.

    Trained text is coloured, or stands between ⟦ and ⟧ where there are no colours. Fails if nothing would be learnt.
    """
    if picture and picture.suffix.lower() not in ENDINGS["--picture"]:
        raise InputError(f"{picture}: a picture is a .png or a .svg file; name it so.")
    only_json = str(json_file) == "-"
    given = {name: value for name, value in options.items() if value is not None} | ({"data": files} if files else {})
    settings = DataOptions.from_yaml(given.pop("config", None), given, besides=TrainConfig.model_fields)
    _check_targets({"--html": html, "--json": None if only_json else json_file, "--picture": picture}, settings)
    names = [source.path for source in settings.data]
    with quiet():
        opened = _opened(settings)
        for number in row or []:
            if number > len(opened.data.train.rows):
                raise InputError(f"There is no row {number:,}; the data has {len(opened.data.train.rows):,}.")
        if settings.task != "lm":
            if html or picture or tokens:
                raise InputError(
                    f"--html, --picture and --tokens are for language models; with task {settings.task} leave them out."
                )
            show_task(opened, row, samples, json_file)
            return
        found = _survey(opened, settings.max_length)
        chosen = [] if only_json else _samples(opened, row, samples)
        if html:
            write_text(absolute(html), page(found, opened, _samples(opened, row, PAGE_SAMPLES), names, settings.model))
        if picture:
            from halfbyte.data.picture import draw_lengths

            with whole_file(absolute(picture)) as part:
                draw_lengths(found, str(part), form=picture.suffix.lower()[1:])
        numbers = json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) + "\n"
        if json_file and not only_json:
            write_text(absolute(json_file), numbers)
    if only_json:
        typer.echo(numbers, nl=False)
    else:
        show(found, chosen, borders=tokens)


def _check_targets(targets: dict[str, Path | None], settings: DataOptions) -> None:
    """Make sure that each file can be written, and that none takes the place of the data or of some other thing.

    Raises:
        InputError: one cannot, or would.
    """
    given = {flag: absolute(target) for flag, target in targets.items() if target}
    inputs = inputs_of([*settings.data, *(settings.eval_data or ())]) if given else []
    for flag, target in given.items():
        check_writable(target.parent)
        if not target.exists():
            continue
        if any(target.samefile(file) for file in inputs if file.exists()):
            raise InputError(f"{flag} {target} would overwrite the data; name another file.")
        if target.suffix.lower() not in ENDINGS[flag]:
            ends = " or ".join(ENDINGS[flag])
            raise InputError(f"{target} is there already and may be something else; name a new file, or one in {ends}.")


def _survey(opened: Opened, max_length: int) -> "Survey":
    from halfbyte.data.survey import survey

    with bar("Counting") as progress:
        task = progress.add_task("")
        found = survey(
            opened.data.train,
            opened.tokenizer,
            against=opened.data.evaluation,
            max_length=max_length,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    shapes, bad = opened.data.shapes, opened.data.bad
    said = [*opened.notes, *opened.data.said]
    return dataclasses.replace(found, shapes=shapes, bad=bad.counts, first_bad=bad.first, said=said)


def _samples(opened: Opened, numbers: list[int] | None, count: int) -> list["Sample"]:
    from halfbyte.data.samples import choose, row_lengths, sample

    rows = opened.data.train.rows
    return [sample(rows, number, opened.tokenizer) for number in numbers or choose(row_lengths(rows), count)]


def _signature() -> inspect.Signature:
    """Return the command's own parameters, and a flag for each option of the data."""
    own = [p for p in inspect.signature(data).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = [flag for flag in flags_of(DataOptions).parameters.values() if flag.name != "data"]
    return inspect.Signature([*own, *flags])


data.__signature__ = _signature()  # type: ignore[attr-defined]
