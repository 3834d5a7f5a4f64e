"""What ``chat``, ``generate`` and ``classify`` share: a model opened, how answers are drawn."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import choices
from halfbyte.cli.console import notes, status
from halfbyte.errors import InputError
from halfbyte.quiet import quiet

if TYPE_CHECKING:
    from halfbyte.generate.sampling import Sampling


@contextlib.contextmanager
def opened(
    path: str,
    seed: int | None,
    trust_remote_code: bool,
    device: choices.Device = "auto",
    adapters: list[str] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Yield a model and its tokenizer, the libraries silent meanwhile.

    Args:
        path: a run, an adapter, or a model.
        seed: of what draws from global generators.
        trust_remote_code: run code that comes with the model.
        device: where it runs.
        adapters: further adapters over its base, as ``NAME=PATH``.
    """
    named = named_adapters(adapters or [])
    with quiet():
        with status(f"Loading {path}"):
            import transformers

            from halfbyte.hf import add_adapter, describe_base, load, load_tokenizer

            if seed is not None:
                transformers.set_seed(seed)
            tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
            loaded = load(path, trust_remote_code=trust_remote_code, device=device)
            for name, folder in named.items():
                loaded, remark = add_adapter(loaded, folder, name)
                if remark:
                    notes.print(remark, style="dim", markup=False, soft_wrap=True)
        if notes.is_terminal:  # else nobody watches, and loading has warned of less than half
            notes.print(f"The weights: {describe_base(loaded)}.", style="dim")
        yield loaded, tokenizer


def named_adapters(words: list[str]) -> dict[str, str]:
    """Return name and path of each ``NAME=PATH``.

    Raises:
        InputError: a word is none, or two have one name.
    """
    found: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise InputError(f"--adapter {word!r} names no adapter; write NAME=PATH, as in --adapter terse=runs/terse.")
        if name in found:
            raise InputError(f"Two adapters are called {name!r}; give each a name of its own.")
        found[name] = path
    return found


def adapter_of(model: Any) -> str | None:
    """Return the name of the adapter that a model answers with, or None for the base; before there is an engine."""
    from peft import PeftModel

    return str(model.active_adapter) if isinstance(model, PeftModel) else None


def sampling_of(model: Any, **given: Any) -> "Sampling":
    """Return how answers are drawn: as given, and where that is None as the model's own settings say."""
    from halfbyte.generate.sampling import Sampling
    from halfbyte.generate.stream import own_options

    return Sampling(**own_options(model) | {name: value for name, value in given.items() if value is not None})


def system_text(given: str | None) -> str | None:
    """Return a system prompt: what a file of that name holds, or the text itself.

    Raises:
        InputError: there is such a file, but it is no UTF-8 text.
    """
    if given is None or "\n" in given:
        return given
    try:
        is_file = Path(given).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, for instance
        is_file = False
    return read_text(Path(given).expanduser()).strip() if is_file else given


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        InputError: it cannot be read as UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}); name another file.") from None


def say_template(model: Any, tokenizer: Any) -> None:
    """Say that conversations are written with a plain template, where the model has none of its own."""
    if not tokenizer.chat_template and not model.config.is_encoder_decoder:
        notes.print("The model has no chat template; a plain one is used.", style="dim")
