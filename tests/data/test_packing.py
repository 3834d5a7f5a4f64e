"""Packing a step: no token lost, few bins, and a forecast that is what the real sampler and packer do."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from halfbyte.choices import IGNORED
from halfbyte.data import Collator, Packer, plan_packing
from halfbyte.data.packing import best_fit_decreasing, divide
from halfbyte.errors import InputError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def some_rows(lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    numbers = random.Random(seed)
    rows = []
    for length in lengths:
        ids = [numbers.randrange(1, 90) for _ in range(length)]
        trained = numbers.randrange(length)
        rows.append({"input_ids": ids, "labels": [IGNORED] * trained + ids[trained:]})
    return rows


def samples_of(batches: list[Any]) -> list[tuple[list[int], list[int]]]:
    """The samples of packed batches, each with its labels."""
    found = []
    for batch in batches:
        starts = (batch["position_ids"][0] == 0).nonzero()[1:, 0]
        parts = [batch[name][0].tensor_split(starts) for name in ("input_ids", "labels", "position_ids")]
        for ids, labels, positions in zip(*parts, strict=True):
            assert positions.tolist() == list(range(len(ids)))
            found.append((ids.tolist(), labels.tolist()))
    return found


@given(LENGTHS, st.integers(1, 80))
def test_bins_hold_each_sample_once_and_no_more_than_they_may(lengths: list[int], tokens: int) -> None:
    bins = best_fit_decreasing(lengths, tokens)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in members) for members in bins)
    assert all(total <= tokens or len(members) == 1 for members in bins for total in [sum(lengths[i] for i in members)])
    if len(sums) > 1:  # what two bins hold would never fit in one
        assert sums[0] + sums[1] > tokens


@given(LENGTHS)
def test_there_are_as_many_bins_as_trl_s_packer_makes(lengths: list[int]) -> None:
    theirs = pack_dataset(Dataset.from_list([{"input_ids": [0] * n} for n in lengths]), 64, "bfd")
    assert len(best_fit_decreasing(lengths, 64)) == len(theirs)


@given(LENGTHS, st.integers(1, 80), st.integers(1, 50))
def test_bins_are_divided_into_as_many_as_are_wanted(lengths: list[int], tokens: int, count: int) -> None:
    bins = best_fit_decreasing(lengths, tokens)
    divided = divide(bins, lengths, count)
    assert len(divided) == max(len(bins), min(count, len(lengths)))
    assert sorted(index for members in divided for index in members) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 5), st.integers(1, 200), st.integers(1, 8))
def test_a_packed_step_has_the_samples_of_the_step(lengths: list[int], batch: int, tokens: int, multiple: int) -> None:
    rows = some_rows(lengths)
    batches = [Collator(0, multiple)(rows[first : first + batch]) for first in range(0, len(rows), batch)]
    packed = Packer(tokens)(batches)
    assert len(packed) <= len(batches)
    most = max(tokens, *(int(one["attention_mask"].sum()) for one in batches))
    assert all(one["input_ids"].shape == (1, one["input_ids"].numel()) for one in packed)
    assert all(one["input_ids"].numel() <= most for one in packed)
    wanted = [(row["input_ids"], [IGNORED, *row["labels"][1:]]) for row in rows]
    assert sorted(samples_of(packed)) == sorted(wanted)
    trained = sum(int((one["labels"][:, 1:] != IGNORED).sum()) for one in batches)
    assert sum(int((one["labels"][:, 1:] != IGNORED).sum()) for one in packed) == trained


def test_a_packed_row_is_what_trl_s_collator_makes_of_it() -> None:
    rows = some_rows([5, 1, 9, 14, 7])
    [packed] = Packer(100)([Collator(0)(rows)])
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    assert packed.keys() == {"input_ids", "labels", "position_ids"}
    for name, values in packed.items():
        assert torch.equal(values, theirs[name]), name


def test_as_many_batches_are_made_as_another_process_needs() -> None:
    batches = [Collator(0)(some_rows([4] * 4)) for _ in range(2)]
    assert len(Packer(100)(batches)) == 1
    packed = Packer(100)(batches, agree=lambda number: number + 2)
    assert sorted(one["input_ids"].numel() for one in packed) == [8, 8, 16]
    assert len(samples_of(packed)) == 8


def test_batches_that_cannot_be_taken_apart_are_refused() -> None:
    batch = Collator(0)(some_rows([3, 5]))
    with pytest.raises(
        InputError, match=r"A batch of input_ids, attention_mask, labels, pixel_values cannot be packed"
    ):
        Packer(10)([batch | {"pixel_values": batch["labels"]}])
    with pytest.raises(InputError, match="not padded on the right alone"):
        Packer(10)([{name: values.flip(1) for name, values in batch.items()}])


def alpaca_like(rows: int) -> list[int]:
    return np.random.default_rng(1).lognormal(np.log(90), 0.8, rows).clip(8, 512).astype(int).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("kind", ["alpaca", "short", "equal"])
def test_the_forecast_is_what_sampler_and_packer_do(kind: str, group_by_length: bool) -> None:
    lengths = {"alpaca": alpaca_like(3000), "short": [20] * 900, "equal": [512] * 300}[kind]
    batch, accumulation = 4, 4
    plan = plan_packing(lengths, batch, accumulation, 512, group_by_length)
    torch.manual_seed(3)
    step = batch * accumulation
    order = get_length_grouped_indices(lengths, step) if group_by_length else torch.randperm(len(lengths)).tolist()
    rows = some_rows(lengths)
    padded = passes = packed = packed_passes = steps = 0
    for first in range(0, len(order), step):
        batches = [
            Collator(0)([rows[index] for index in order[start : start + batch]])
            for start in range(first, min(first + step, len(order)), batch)
        ]
        made = Packer(plan.tokens)(batches)
        assert max(one["input_ids"].numel() for one in made) <= plan.tokens
        steps += 1
        padded += sum(one["input_ids"].numel() for one in batches)
        packed += sum(one["input_ids"].numel() for one in made)
        passes += len(batches)
        packed_passes += len(made)
    assert plan.padded_tokens == pytest.approx(padded / steps, rel=0.03)
    assert plan.packed_tokens == pytest.approx(packed / steps, rel=0.03)
    assert plan.passes == pytest.approx(passes / steps, rel=0.03)
    assert plan.packed_passes == pytest.approx(packed_passes / steps, rel=0.05)
    assert plan.pays == (kind != "equal")


def test_a_plan_asks_for_no_more_room_than_a_step_can_fill() -> None:
    assert plan_packing([20] * 100, 4, 4, 512, True).tokens == 16 * 20
    assert plan_packing([20] * 100, 4, 400, 512, True).tokens == 2000  # all of them
    assert plan_packing([600] * 100, 2, 8, 512, True).tokens == 1200
    assert plan_packing([20], 4, 4, 512, True).tokens == 20
    assert "16 rows a step in 1.0 passes of up to 320 tokens in place of 4.0; 1.00 times" in str(
        plan_packing([20] * 1600, 4, 4, 512, True)
    )
    assert not plan_packing([20] * 100, 1, 1, 512, True).pays
