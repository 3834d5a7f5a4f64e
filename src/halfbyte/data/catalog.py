"""The data sets of QLoRA's paper (arXiv 2305.14314, section 5 and appendix B.1) by the names that it gives them.

Where they lie is what the authors' script loads (artidoro/qlora, ``make_data_module``); of Vicuna and FLAN v2, which it
leaves to the reader, the copies that are used most.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: what it is, and its source (:class:`halfbyte.data.Source`)."""

    about: str
    source: dict[str, Any]


DATASETS: dict[str, Dataset] = {
    "alpaca": Dataset("52k instructions by text-davinci-003", {"path": "tatsu-lab/alpaca", "split": "train"}),
    "alpaca-clean": Dataset("the same, mended by hand", {"path": "yahma/alpaca-cleaned", "split": "train"}),
    "chip2": Dataset(
        "210k instructions in OIG", {"path": "laion/OIG", "config": "unified_chip2.jsonl", "split": "train"}
    ),
    "self-instruct": Dataset(
        "82k instructions by GPT-3",
        {"path": "yizhongw/self_instruct", "config": "self_instruct", "split": "train"},
    ),
    "hh-rlhf": Dataset(
        "161k preferences; the chosen answers are trained", {"path": "Anthropic/hh-rlhf", "split": "train"}
    ),
    "oasst1": Dataset(
        "9k conversations: the best path of each tree", {"path": "timdettmers/openassistant-guanaco", "split": "train"}
    ),
    "longform": Dataset("24k long answers", {"path": "akoksal/LongForm", "split": "train"}),
    "vicuna": Dataset(
        "ShareGPT's conversations",
        {
            "path": "anon8231489123/ShareGPT_Vicuna_unfiltered",
            "config": "ShareGPT_V3_unfiltered_cleaned_split.json",
            "split": "train",
        },
    ),
    "flan": Dataset("FLAN v2's tasks", {"path": "Muennighoff/flan", "split": "train"}),
}
