"""``classify``."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.console import notes
from halfbyte.cli.options import Device, Model, RemoteCode
from halfbyte.cli.talk import opened
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from halfbyte.generate import Named

LINES = (".txt", ".text", "")
"""Endings of files with a text a line."""

File = Annotated[
    str | None,
    typer.Argument(help="File of texts: one a line (.txt, or - for standard input), or rows as in training."),
]
Text = Annotated[list[str] | None, typer.Option(help="A text to classify; may be given again.")]
Pair = Annotated[str | None, typer.Option(help="The second text, of a model that was trained on pairs.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object a line, with all probabilities.")]
Batch = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]


def classify(
    model: Model,
    file: File = None,
    text: Text = None,
    text_pair: Pair = None,
    as_json: Json = False,
    batch_size: Batch = 32,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Name the class of texts: for each a line with the class, its probability and the text."""
    if (file is None) == (text is None):
        raise InputError("classify takes a file of texts or --text, one of the two.")
    if text_pair is not None and (text is None or len(text) > 1):
        raise InputError("--text-pair belongs to one --text; for more pairs give a file with two columns.")
    texts = iter([(one, text_pair) for one in text]) if text else _texts_of(file or "")
    if (first := next(texts, None)) is None:
        raise InputError(f"{file} holds no text; write one a line.")
    texts = itertools.chain([first], texts)
    with opened(model, None, trust_remote_code, device) as (loaded, tokenizer):
        from halfbyte.generate import classify_texts

        cut = 0
        for named in classify_texts(loaded, tokenizer, texts, batch_size=batch_size):
            cut += named.cut
            typer.echo(_line(named, as_json))
    if cut:
        notes.print(f"{cut:,} texts were longer than the model reads; their ends had no part in this.", style="dim")


def _texts_of(file: str) -> Iterator[tuple[str, str | None]]:
    if file == "-" or Path(file).suffix.lower() in LINES:
        if file == "-" and sys.stdin is None:
            raise InputError("- reads texts from standard input, but that is closed.")
        try:
            whole = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as UTF-8 text ({error}); give a file of texts.") from None
        yield from ((line, None) for line in whole.splitlines() if line.strip())
        return
    from halfbyte.data.classes import labelled_of
    from halfbyte.data.examples import BadRow
    from halfbyte.data.sources import read_source, resolve

    for source in resolve(file):
        for example in labelled_of(read_source(source), with_labels=False):
            if isinstance(example, BadRow):
                raise example
            yield example.text, example.pair


def _line(named: "Named", as_json: bool) -> str:
    text, pair = named.text
    if as_json:
        about = {"text": text} | ({} if pair is None else {"text_pair": pair})
        return json.dumps(about | {"label": named.label, "probabilities": named.probabilities}, ensure_ascii=False)
    shown = " ".join(f"{text} | {pair}".split() if pair else text.split())
    return f"{named.label}\t{named.probabilities[named.label]:.3f}\t{shown}"
