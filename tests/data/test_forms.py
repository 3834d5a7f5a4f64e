"""The forms of a method's rows: nothing of a text is lost in blocks, pairs and judgements stay together."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from halfbyte import data, tables
from halfbyte.choices import IGNORED
from halfbyte.data.examples import Judged, Preference, Text
from halfbyte.data.samples import preview_lines, sample
from halfbyte.data.survey import survey
from halfbyte.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_full_and_train_each_token_of_each_text_once(length: int, seed: int, tokenizer: Any) -> None:
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list("abcdef"), size)) for size in random.integers(1, 40, 13)]
    rows = data.tokenize((Text(f"row {i}", x) for i, x in enumerate(texts)), tokenizer, length, form="blocks")
    blocks = [(row["input_ids"], row["labels"]) for row in rows.rows]
    assert all(len(ids) == length for ids, _ in blocks[:-1]) and 1 < len(blocks[-1][0]) <= length
    # put together again, leaving away the token that a block begins with where the one before ends within a text
    stream = list(blocks[0][0])
    for (before, _), (ids, _) in itertools.pairwise(blocks):
        goes_on = before[-1] != tokenizer.eos_token_id
        assert not goes_on or ids[0] == before[-1]
        stream += ids[goes_on:]
    whole = [(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts]
    assert stream == [token for ids in whole for token in ids]
    trained = Counter(label for _, labels in blocks for label in labels if label != IGNORED)
    assert trained == Counter(token for ids in whole for token in ids[1:])  # a text's first has nothing before it
    assert all(label in (IGNORED, token) for ids, labels in blocks for token, label in zip(ids, labels, strict=True))
    counts = rows.counts
    assert (counts.examples, counts.truncated, counts.rows) == (13, 0, len(blocks))
    assert counts.trained_tokens == trained.total() and counts.tokens == sum(len(ids) for ids, _ in blocks)
    assert counts.digest == tables.digest(rows.rows)


def pair(where: str = "row", prompt: str = "ab", chosen: str = "cd", rejected: str = "efg") -> Preference:
    return Preference(where, prompt, chosen, rejected)


def answers(tokenizer: Any, row: Any) -> list[str]:
    return data.decode_trained(tokenizer, row)


def test_a_pair_is_one_row_and_a_judgement_stands_beside_its_answer(tokenizer: Any) -> None:
    pairs = data.tokenize([pair()], tokenizer, 64, form="pairs")
    (row,) = pairs.rows
    rejected = {"input_ids": row["rejected_ids"], "labels": row["rejected_labels"]}
    assert answers(tokenizer, row) == ["cd<|im_end|>"] and answers(tokenizer, rejected) == ["efg<|im_end|>"]
    prompt = len(row["labels"]) - 3
    assert row["input_ids"][:prompt] == row["rejected_ids"][:prompt]
    assert pairs.counts.trained_tokens == 3 + 4 and pairs.counts.longest == prompt + 4
    assert pairs.counts.digest == tables.digest(pairs.rows)

    both = [pair(), Judged("row", "ab", "cd", True), Judged("row", [{"role": "user", "content": "ab"}], "efg", False)]
    judged = data.tokenize(both, tokenizer, 64, form="judged")
    assert judged.rows["good"] == [True, False, True, False]
    assert judged.rows["input_ids"] == [row["input_ids"], row["rejected_ids"]] * 2
    assert judged.counts.digest == tables.digest(judged.rows) and judged.counts.chats == 1


def test_answers_are_cut_like_any_and_pairs_of_which_one_is_lost_are_bad(tokenizer: Any) -> None:
    prompt = len(data.tokenize([pair()], tokenizer, 64, form="pairs").rows[0]["labels"]) - 3
    cut = data.tokenize([pair(chosen="cdefgh", rejected="xy")], tokenizer, prompt + 4, form="pairs")
    (row,) = cut.rows
    assert answers(tokenizer, row) == ["cdef"] and cut.counts.truncated == 1  # and no stop is learned there
    for length, sentence in ((prompt, "its prompt alone takes"), (prompt + 1, "alike as they are trained")):
        with pytest.raises(InputError, match=sentence):
            data.tokenize([pair(chosen="cd", rejected="ce")], tokenizer, length, form="pairs")


def test_both_answers_are_shown(tokenizer: Any) -> None:
    pairs = data.tokenize([pair()], tokenizer, 64, form="pairs")
    shown = sample(pairs.rows, 1, tokenizer)
    assert [name for name, _ in shown.parts()] == ["chosen", "rejected"]
    assert shown.trained == pairs.counts.trained_tokens and shown.tokens == pairs.counts.tokens
    text = "\n".join(preview_lines(pairs, tokenizer))
    assert "chosen:\n<|im_start|>user↵\nab<|im_end|>↵\n<|im_start|>assistant↵\n⟦cd<|im_end|>⟧\nrejected:" in text
    assert text.endswith("⟦efg<|im_end|>⟧")
    found = survey(pairs, tokenizer)
    assert found.rejected_lengths is not None and found.rejected_lengths.mean == found.lengths.mean + 1
    judged = data.tokenize([pair()], tokenizer, 64, form="judged")
    assert [name for name, _ in sample(judged.rows, 2, tokenizer).parts()] == ["bad"]
    assert survey(judged, tokenizer).good == 1


def test_collators_mark_answers_and_pad_on_the_right(tokenizer: Any) -> None:
    rows = list(data.tokenize([pair(), pair(chosen="c" * 9)], tokenizer, 64, form="pairs").rows)
    batch = data.PairCollator(7)(rows)
    sequences = [(row["input_ids"], row["labels"]) for row in rows]
    sequences += [(row["rejected_ids"], row["rejected_labels"]) for row in rows]
    for place, (ids, labels) in enumerate(sequences):
        padding = batch["input_ids"].shape[1] - len(ids)
        assert batch["input_ids"][place].tolist() == ids + [7] * padding
        assert batch["attention_mask"][place].tolist() == [1] * len(ids) + [0] * padding
        assert batch["completion_mask"][place].tolist() == [int(x != IGNORED) for x in labels] + [0] * padding


def test_an_answer_to_another_prompt_is_the_one_before_it_in_the_batch(tokenizer: Any, tmp_path: Path) -> None:
    given = [("ab", "cd", True), ("efg", "h", False), ("i", "jkl", True)]
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": p, "completion": c, "label": good}) for p, c, good in given]
    file.write_text("\n".join(lines))
    rows = list(data.tokenize(data.read_examples(file), tokenizer, 64, form="judged").rows)
    batch = data.JudgedCollator(0, 64)(rows)
    assert batch["label"].tolist() == [True, False, True]
    mixed = [Judged("row", prompt, given[place - 1][1], True) for place, (prompt, _, _) in enumerate(given)]
    expected = data.JudgedCollator(0, 64)(list(data.tokenize(mixed, tokenizer, 64, form="judged").rows))
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(batch[f"KL_{name}"], expected[name])
    assert not any(name.startswith("KL") for name in data.JudgedCollator(0, 64, mismatches=False)(rows))
