"""Rows of qlora.py's data part: against the script's own functions, on local files of each format."""

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, set_seed

from halfbyte.errors import InputError
from halfbyte.train.qlora import data
from halfbyte.train.qlora.flags import Flags, parse
from halfbyte.train.qlora.formats import DATASETS, FORMATS, pair_of, source_of
from halfbyte.train.qlora.table import FLAGS

OFFICIAL = Path(__file__).with_name("official")


def script() -> dict[str, Any]:
    """The script's data part."""
    names: dict[str, Any] = {
        "copy": copy, "torch": torch, "transformers": transformers, "pad_sequence": pad_sequence, "pd": pd,
        "dataclass": dataclass, "Sequence": Sequence, "Dict": dict, "Dataset": datasets.Dataset,
        "load_dataset": datasets.load_dataset, "IGNORE_INDEX": -100,
    }  # fmt: skip
    names |= {name: getattr(__import__("os.path", fromlist=["x"]), name) for name in ("exists", "join", "isdir")}
    names["os"] = __import__("os")
    exec((OFFICIAL / "script.txt").read_text(), names)
    return names


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    loaded = AutoTokenizer.from_pretrained(tiny_model_folder)
    loaded.bos_token = "<|im_start|>"
    return loaded


def flags_for(file: Path, form: str, *words: str) -> Flags:
    named = [] if form == "input-output" else ["--dataset_format", form]
    return parse(FLAGS, ["--dataset", str(file), *named, *words])


def official(flags: Flags, tokenizer: Any) -> dict[str, Any]:
    args = types.SimpleNamespace(**flags)
    set_seed(args.seed)
    return script()["make_data_module"](tokenizer, args)


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
        module = official(flags, tokenizer)
        rows = data.read(flags)
        prepared = data.prepare(rows, tokenizer, flags)
        for ours, theirs in ((prepared.train, module["train_dataset"]), (prepared.evaluation, module["eval_dataset"])):
            assert ours is not None
            assert len(ours.rows) == len(theirs)
            for i in range(len(theirs)):
                batch = module["data_collator"]([theirs[i]])
                assert ours.rows[i]["input_ids"] == batch["input_ids"][0].tolist()
                assert ours.rows[i]["labels"] == batch["labels"][0].tolist()
        assert prepared.train.counts.truncated > 0


def test_input_and_output_columns_are_read_as_they_stand(tokenizer: Any, local_file: Callable[..., Path]):
    flags = flags_for(local_file("input-output"), "input-output", "--seed", "9")
    theirs = official(flags, tokenizer)["train_dataset"]
    ours = data.read(flags).train
    assert [row.pair for row in ours] == [{name: row[name] for name in ("input", "output")} for row in theirs]
    assert len(ours) == 36


def test_prediction_sources_are_the_scripts(tokenizer: Any, local_file: Callable[..., Path]):
    file = local_file("alpaca")
    words = ["--do_predict", "--predict_with_generate", "--do_train", "no", "--eval_dataset_size", "9"]
    flags = flags_for(file, "alpaca", *words, "--source_max_len", "200")
    module = official(flags, tokenizer)
    ours = data.source_ids([row.pair for row in data.read(flags).held_out], tokenizer, 200)
    for (ids, _), row in zip(ours, module["predict_dataset"], strict=True):
        assert ids == module["data_collator"]([row])["input_ids"][0].tolist()


def test_every_data_set_of_the_script_lies_where_it_loads_it():
    asked: list[tuple[Any, ...]] = []

    def load_dataset(repository: str, name: str | None = None, data_files: str | None = None) -> Any:
        asked.append((repository, name or data_files))
        raise LookupError

    for dataset in DATASETS:
        names = script() | {"load_dataset": load_dataset}
        exec((OFFICIAL / "script.txt").read_text(), names)
        names["load_dataset"] = load_dataset
        args = types.SimpleNamespace(**parse(FLAGS, ["--dataset", dataset]))
        with pytest.raises(LookupError):
            names["make_data_module"](None, args)
        source = source_of(dataset)
        assert asked[-1] == (source.path, source.config)
        assert source.split == "train"


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
