"""Keep libraries' log lines and progress bars away from a program that has a display of its own."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

TALKATIVE = ("bitsandbytes", "huggingface_hub", "trl")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, datasets, trl, bitsandbytes and the hub meanwhile, but for errors and bars of downloads."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    import datasets
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    dataset_bars = not datasets.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    enable_progress_bars()  # of downloads
    try:
        with warnings.catch_warnings():
            # what one library says to another about names of the next version
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if dataset_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
