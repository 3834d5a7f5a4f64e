"""Data sets of the Hugging Face hub, and folders that ``datasets`` saved; ``datasets`` reads both."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError, nearest
from halfbyte.hub import PATIENCE, first_line, reason_without

GIVE = "give a file, or a folder of files"


def is_saved(path: Path) -> bool:
    """Tell whether a folder was written by ``save_to_disk``."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_saved(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a folder that ``save_to_disk`` wrote.

    Raises:
        InputError: it is damaged, or ``split`` is missing or not in it.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes datasets and Arrow raise
        raise InputError(f"{path} is no whole folder of datasets ({first_line(error)}); save it again.") from error
    yield from _rows(str(path), _split(str(path), found, split))


def read(repository: str, config: str | None, split: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a data set of the hub, which is downloaded once.

    Args:
        repository: its id.
        config: one of its configurations, or a file in it.
        split: one of its splits; None takes the only one, or ``train``.

    Raises:
        InputError: the hub cannot be reached, or has no such data set, configuration or split.
    """
    yield from _rows(repository, _split(repository, _loaded(repository, config), split))


def fingerprint(repository: str, config: str | None, split: str | None) -> bytes:
    """Return what changes when the data set does.

    Raises:
        InputError: as :func:`read`.
    """
    return str(_split(repository, _loaded(repository, config), split)._fingerprint).encode()


_opened: dict[tuple[str, str | None], Any] = {}


def _loaded(repository: str, config: str | None) -> Any:
    if (repository, config) not in _opened:
        import datasets
        from huggingface_hub import is_offline_mode

        reason: str | None = "the hub is not asked, since HF_HUB_OFFLINE is set"
        if not is_offline_mode():
            reason = reason_without(lambda api: api.dataset_info(repository, timeout=PATIENCE), "data set")
        options: dict[str, Any] = {"data_files": config} if config and "." in config else {"name": config}
        try:
            with offline_if(reason is not None):  # what was downloaded before is opened without the hub
                _opened[repository, config] = datasets.load_dataset(repository, **options)
        except ValueError as error:
            if "BuilderConfig" not in str(error):
                raise InputError(f"The data set {repository} cannot be read: {first_line(error)}.") from error
            known = datasets.get_dataset_config_names(repository)
            raise InputError(
                f"The data set {repository} has no configuration {config!r}{nearest(str(config), known)}; it has "
                f"{', '.join(known)}."
            ) from None
        except (OSError, RuntimeError) as error:
            why = reason or first_line(error)
            raise InputError(f"There is no file or folder {repository}, and {why}; {GIVE}.") from error
        except datasets.exceptions.DatasetsError as error:
            why = first_line(error.__cause__ or error)
            raise InputError(f"The data set {repository} cannot be read: {why}.") from error
    return _opened[repository, config]


@contextlib.contextmanager
def offline_if(wanted: bool) -> Iterator[None]:
    """Have the libraries look into their cache alone: they would go on asking for half a minute."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _split(name: str, found: Any, split: str | None) -> Any:
    if not isinstance(found, Mapping):
        return found
    if split is None:
        split = "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
    if split not in found:
        asked = f"no split {split!r}{nearest(split, found)}" if split else "several splits"
        raise InputError(
            f"{name} has {asked}: {', '.join(found)}; name one behind @, such as {name}@{next(iter(found))}."
        )
    return found[split]


def _rows(name: str, rows: Any) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row
