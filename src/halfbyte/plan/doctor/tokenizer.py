"""Whether a tokenizer, its chat template and its control tokens are those of a model that can be trained to answer."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.data.control import control_tokens
from halfbyte.data.stops import check_tokenizer, choose_pad, trained_stop
from halfbyte.data.template import Writer, chat_template
from halfbyte.errors import InputError, named
from halfbyte.hf import load_tokenizer
from halfbyte.plan.doctor.finding import Finding, looked, told

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files of which transformers makes a fast tokenizer, each time, with the package sentencepiece."""


@dataclass(frozen=True)
class About:
    """What of a model a tokenizer has to fit.

    Attributes:
        path: of the model, as the user says it.
        folder: its files.
        rows: of the embedding; None where that is not known.
        ends: the tokens at which its generation settings stop.
        eos: of its configuration.
        is_chat: whether it writes on what it reads, so that it can be trained on conversations.
    """

    path: str
    folder: Path
    rows: int | None
    ends: tuple[int, ...]
    eos: tuple[int, ...]
    is_chat: bool


def opened(about: About, trust_remote_code: bool, findings: list[Finding]) -> Any:
    """Return the tokenizer, or None where there is none that can be opened, which is a finding."""
    pieces = [name for name in SENTENCEPIECE if (about.folder / name).is_file()]
    needs = pieces and not (about.folder / "tokenizer.json").is_file()
    if needs and importlib.util.find_spec("sentencepiece") is None:
        findings.append(
            Finding(
                "tokenizer",
                f"{named(pieces)} without tokenizer.json, and sentencepiece is not installed",
                "The tokenizer is made of that file each time, by the package sentencepiece.",
                "pip install sentencepiece",
                "fault",
            )
        )
    try:
        return load_tokenizer(about.path, trust_remote_code=trust_remote_code)
    except InputError as error:
        value = str(error)
    except Exception as error:  # of a damaged tokenizer.json the tokenizers library raises bare Exception
        value = f"The tokenizer of {about.path} cannot be opened: {told(error)}"
    findings.append(
        Finding(
            "tokenizer",
            value,
            "Without its tokenizer a model can neither be trained nor asked.",
            "Take another GGUF file, or the folder that it was made from."
            if about.path.endswith(".gguf")
            else "Copy tokenizer.json and tokenizer_config.json from the model's source.",
            "fault",
        )
    )
    return None


def check(tokenizer: Any, about: About) -> list[Finding]:
    """Return what is found of a tokenizer."""
    kind = "" if tokenizer.is_fast else ", a slow one"
    findings = [Finding("tokenizer", f"{type(tokenizer).__name__}{kind}, {len(tokenizer):,} tokens")]
    if not tokenizer.is_fast:
        findings[0] = Finding(
            "tokenizer",
            findings[0].value,
            "It is written in Python: making data ready takes ten times as long or more.",
            "Copy tokenizer.json from the model's source, if it has one.",
            "note",
        )
    findings += looked("embedding rows", lambda: _rows(tokenizer, about))
    if about.is_chat:
        findings += looked("chat template", lambda: _template(tokenizer))
        findings += looked("stop tokens", lambda: _stops(tokenizer, about))
    findings += looked("pad token", lambda: _pad(tokenizer, about))
    return findings


def stops_of(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that a chat template writes around turns, of which the model must have learnt something."""
    try:
        template = chat_template(tokenizer)
    except InputError:
        return {}
    written = [token for token in control_tokens(tokenizer, template) if token in template]
    found = {tokenizer.convert_tokens_to_ids(token): token for token in written}
    stop = trained_stop(tokenizer)
    if stop is not None:
        found[stop] = tokenizer.convert_ids_to_tokens(stop)
    return {token: text for token, text in found.items() if isinstance(token, int)}


def _rows(tokenizer: Any, about: About) -> Iterator[Finding]:
    if about.rows is None:
        return
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= about.rows}
    if not beyond:
        return
    listed = [f"{token} ({beyond[token]})" for token in sorted(beyond, key=lambda token: beyond[token])]
    yield Finding(
        "embedding rows",
        f"the tokenizer has tokens beyond the {about.rows:,} rows of the embedding: {named(listed)}",
        "A row of data with such a token ends training with an index error; tokens were added without the model.",
        f"halfbyte train --new-tokens '{listed[0].rpartition(' ')[0]}' ...  # trains rows for them; or take the "
        "model's own tokenizer",
        "fault",
    )


def _template(tokenizer: Any) -> Iterator[Finding]:
    if not tokenizer.chat_template:
        yield Finding(
            "chat template",
            "none",
            "Conversations are then written with '### Instruction:' and '### Response:', which the model does not "
            "know; what serves the model elsewhere needs the same template.",
            "halfbyte train --chat-template chatml ...  # a name of TRL's, or a Jinja file",
            "note",
        )
        return
    try:
        dialect = Writer(tokenizer).dialect
        ways = [f"ends answers with {trained!r}"] if (trained := _text(tokenizer, trained_stop(tokenizer))) else []
        ways += ["takes tools"] if dialect.takes_tools else []
        yield Finding("chat template", ", ".join(ways) or "writes conversations")
    except InputError as error:
        yield Finding(
            "chat template",
            str(error),
            "No conversation can be trained on with it.",
            "halfbyte train --chat-template chatml ...  # a name of TRL's, or a Jinja file",
            "fault",
        )


def _stops(tokenizer: Any, about: About) -> Iterator[Finding]:
    if tokenizer.eos_token is None:
        yield Finding(
            "stop tokens",
            "the tokenizer names no end-of-sequence token (eos_token)",
            "Where the chat template writes none either, the model never learns to stop.",
            'Add "eos_token": "..." to tokenizer_config.json, as the model\'s source has it.',
            "warning",
        )
    named_ends = (*about.ends, *about.eos)
    for index in sorted(set(named_ends)):
        if about.rows is not None and not 0 <= index < about.rows:
            yield Finding(
                "stop tokens",
                f"generation is to end at token {index}, and the embedding has {about.rows:,} rows",
                "That token is never generated, so answers end at the limit of their length.",
                "Put the right eos_token_id into generation_config.json and config.json.",
                "fault",
            )
    own = tokenizer.eos_token_id
    if own is not None and named_ends and own not in named_ends and trained_stop(tokenizer) == own:
        yield Finding(
            "stop tokens",
            f"the tokenizer ends with {tokenizer.eos_token!r} ({own}), the model's settings with "
            f"{named(repr(_text(tokenizer, index) or index) for index in sorted(set(named_ends)))}",
            "What goes by generation_config.json alone does not stop at the end of an answer.",
            f'Set "eos_token_id": [{", ".join(map(str, sorted({own, *named_ends})))}] in generation_config.json; '
            "halfbyte stops at each.",
            "warning",
        )
    for sentence in check_tokenizer(tokenizer, list(about.ends)):
        yield Finding("stop tokens", sentence, level="note")


def _pad(tokenizer: Any, about: About) -> Iterator[Finding]:
    pad = tokenizer.pad_token
    if pad is None:
        sentence = choose_pad(tokenizer, about.rows)
        yield Finding(
            "pad token",
            f"{sentence or 'none'}",
            "halfbyte does not look at what is padded; other trainers ask for one.",
            f"tokenizer.pad_token = {tokenizer.pad_token!r}  # elsewhere" if sentence else "",
            "note",
        )
    elif pad == tokenizer.eos_token:
        yield Finding(
            "pad token",
            f"{pad!r}, which is the end-of-sequence token too",
            "Trainers that leave padding out of the labels by its id leave the end of each answer out with it, and the "
            "model does not learn to stop. halfbyte goes by places, not by ids.",
            "Elsewhere, take a token of its own for padding: tokenizer.pad_token = '<|pad|>' or a reserved one",
            "note",
        )


def _text(tokenizer: Any, index: int | None) -> str:
    return "" if index is None else str(tokenizer.convert_ids_to_tokens(index) or "")
