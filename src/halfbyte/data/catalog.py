"""The data sets of QLoRA's paper (arXiv 2305.14314, section 5 and appendix B.1) by the names that it gives them.

Where they lie is what the authors' script loads (artidoro/qlora, ``make_data_module``). Vicuna's data was never
released and FLAN v2 is left to the reader there; here they are the copies that are used most. The script trains the
texts of ``chip2`` as prompt and answer, those of ``oasst1`` and of ``hh-rlhf`` whole, the user's words too; here
conversations become turns of the model's own template, and answers are trained: ``format: text`` trains whole texts.
"""

import dataclasses
from typing import Any

from halfbyte.data.cells import plain


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
        about: what it is.
        hub: its id on the Hugging Face hub.
        config: its configuration there, or one file of it.
        format: the shape that its rows have, a key of :data:`halfbyte.data.shapes.FORMATS`; they tell it themselves.
        columns: of its rows.
        licence: as its page says; empty if that says nothing.
        split: what is trained on.
    """

    about: str
    hub: str
    format: str
    columns: tuple[str, ...]
    licence: str = ""
    config: str | None = None
    split: str = "train"

    @property
    def source(self) -> dict[str, Any]:
        """Its source (:class:`halfbyte.data.Source`)."""
        named = {"path": self.hub, "config": self.config, "split": self.split}
        return {key: value for key, value in named.items() if value is not None}


DATASETS: dict[str, Dataset] = {
    "alpaca": Dataset(
        "52k instructions by text-davinci-003", "tatsu-lab/alpaca", "alpaca",
        ("instruction", "input", "output", "text"), "CC BY-NC 4.0",
    ),
    "alpaca-clean": Dataset(
        "the same, mended by hand", "yahma/alpaca-cleaned", "alpaca", ("output", "input", "instruction"), "CC BY 4.0"
    ),
    "chip2": Dataset(
        "210k instructions in OIG", "laion/OIG", "transcript", ("text", "metadata"), "Apache 2.0",
        config="unified_chip2.jsonl",
    ),
    "self-instruct": Dataset(
        "82k instructions by GPT-3", "yizhongw/self_instruct", "completion", ("prompt", "completion"), "Apache 2.0",
        config="self_instruct",
    ),
    "hh-rlhf": Dataset(
        "161k preferences; the chosen answers are trained", "Anthropic/hh-rlhf", "preference",
        ("chosen", "rejected"), "MIT",
    ),
    "oasst1": Dataset(
        "9k conversations: the best path of each tree", "timdettmers/openassistant-guanaco", "transcript", ("text",),
        "Apache 2.0",
    ),
    "longform": Dataset(
        "24k long answers", "akoksal/LongForm", "question", ("input", "output", "source", "subset"), "MIT"
    ),
    "vicuna": Dataset(
        "ShareGPT's conversations", "anon8231489123/ShareGPT_Vicuna_unfiltered", "messages", ("id", "conversations"),
        "Apache 2.0", config="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    "flan": Dataset("FLAN v2's tasks", "Muennighoff/flan", "question", ("inputs", "targets", "task")),
}  # fmt: skip


def find(name: str) -> Dataset | None:
    """Return the data set of a name, whatever its case, ``-`` and ``_``; None if there is none."""
    return next((found for known, found in DATASETS.items() if plain(known) == plain(name)), None)
