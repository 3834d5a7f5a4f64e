"""Rows as qlora.py makes them: against what it does, written down plainly, on local files of each format."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from halfbyte.errors import InputError
from halfbyte.train.qlora import data
from halfbyte.train.qlora.flags import Flags, parse
from halfbyte.train.qlora.formats import DATASETS, FORMATS, pair_of, source_of
from halfbyte.train.qlora.table import FLAGS

from . import plain


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    loaded = AutoTokenizer.from_pretrained(tiny_model_folder)
    loaded.bos_token = "<|im_start|>"
    return loaded


def flags_for(file: Path, form: str, *words: str) -> Flags:
    named = [] if form == "input-output" else ["--dataset_format", form]
    return parse(FLAGS, ["--dataset", str(file), *named, *words])


@pytest.mark.parametrize(
    ("form", "ending"),
    [
        *((form, ".jsonl") for form in ("alpaca", "chip2", "self-instruct", "hh-rlhf", "oasst1")),
        ("chip2", ".csv"),
        ("self-instruct", ".tsv"),
    ],
)
def test_rows_and_labels_are_the_scripts(form: str, ending: str, tokenizer: Any, local_file: Callable[..., Path]):
    file = local_file(form, name=f"rows{ending}")
    words = ["--do_eval", "--eval_dataset_size", "7", "--max_eval_samples", "5", "--max_train_samples", "25"]
    words += ["--source_max_len", "30", "--target_max_len", "11", "--seed", "3"]
    for more in ([], ["--train_on_source"]):
        flags = flags_for(file, form, *words, *more)
        rows = data.read(flags)
        prepared = data.prepare(rows, tokenizer, flags)
        for ours, pairs in zip((prepared.train, prepared.evaluation), plain.parts(flags, form), strict=True):
            assert ours is not None
            assert len(ours.rows) == len(pairs)
            for row, pair in zip(ours.rows, pairs, strict=True):
                assert (row["input_ids"], row["labels"]) == plain.ids_and_labels(pair, tokenizer, flags)
        assert prepared.train.counts.truncated > 0


def test_input_and_output_columns_are_read_as_they_stand(local_file: Callable[..., Path]):
    flags = flags_for(local_file("input-output"), "input-output", "--seed", "9")
    pairs, _ = plain.parts(flags, "input-output")
    ours = data.read(flags).train
    assert [row.pair for row in ours] == pairs
    assert len(ours) == 36


def test_prediction_sources_are_the_scripts(tokenizer: Any, local_file: Callable[..., Path]):
    file = local_file("alpaca")
    words = ["--do_predict", "--predict_with_generate", "--do_train", "no", "--eval_dataset_size", "9"]
    flags = flags_for(file, "alpaca", *words, "--source_max_len", "200")
    ours = data.source_ids([row.pair for row in data.read(flags).held_out], tokenizer, 200)
    _, pairs = plain.parts(flags, "alpaca")
    assert [ids for ids, _ in ours] == [plain.source(pair, tokenizer, flags) for pair in pairs] and len(pairs) == 9


PLACES = {
    "alpaca": ("tatsu-lab/alpaca", None),
    "alpaca-clean": ("yahma/alpaca-cleaned", None),
    "chip2": ("laion/OIG", "unified_chip2.jsonl"),
    "self-instruct": ("yizhongw/self_instruct", "self_instruct"),
    "hh-rlhf": ("Anthropic/hh-rlhf", None),
    "longform": ("akoksal/LongForm", None),
    "oasst1": ("timdettmers/openassistant-guanaco", None),
}
"""Where the script loads each data set from: the repository, and the configuration or file in it."""


def test_every_data_set_of_the_script_lies_where_it_loads_it():
    assert set(PLACES) == set(DATASETS)
    for dataset, place in PLACES.items():
        source = source_of(dataset)
        assert (source.path, source.config, source.split) == (*place, "train")


def test_a_tokenizer_without_bos_adds_none(tiny_model_folder: Path):
    bare = AutoTokenizer.from_pretrained(tiny_model_folder)
    [(ids, cut)] = data.source_ids([{"input": "ab"}], bare, 5)
    assert bare.decode(ids) == "ab"
    assert not cut


def test_llama_gets_the_control_tokens_of_its_configuration(tiny_model_folder: Path):
    bare = AutoTokenizer.from_pretrained(tiny_model_folder)
    start, end = bare.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    bare.eos_token = None
    config = types.SimpleNamespace(eos_token_id=[end], bos_token_id=start)
    said = data.equip(bare, config, "huggyllama/llama-7b")
    assert (bare.bos_token, bare.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(said) == 2
    bare.eos_token = None
    with pytest.raises(InputError, match="no eos token"):
        data.equip(bare, config, "gpt")


@pytest.mark.parametrize(
    ("form", "row", "told"),
    [
        ("alpaca", {"prompt": "a", "completion": "b"}, "--dataset_format self-instruct would fit"),
        ("input-output", {"instruction": "a", "output": "b"}, "--dataset_format alpaca would fit"),
        ("input-output", {"input": "a", "output": None}, "column 'output' should be text, and is NoneType"),
        ("chip2", {"text": "<human>: hello"}, "holds no answer"),
        ("oasst1", ["a"], "no column 'text'"),
    ],
)
def test_a_row_of_another_format_is_told_with_its_place(form: str, row: Any, told: str):
    assert form in FORMATS
    with pytest.raises(InputError) as error:
        pair_of("rows.jsonl, line 3", row, form)
    assert str(error.value).startswith("rows.jsonl, line 3")
    assert told in str(error.value)


def test_too_few_rows_to_hold_any_out_are_told(local_file: Callable[..., Path]):
    file = local_file("alpaca", 20)
    with pytest.raises(InputError, match="18 rows, and eval_dataset_size is 1024"):
        data.read(flags_for(file, "alpaca", "--do_eval"))
    assert np.unique(data.split(20, 0.1, 0, "")[0]).size == 18
