"""What a process has of a pass over pairs or judged answers, and what it takes from the others."""

from typing import Any

import pytest
import torch

from halfbyte.choices import IGNORED
from halfbyte.data import JudgedCollator
from halfbyte.data.forms import GOOD
from halfbyte.hf.trainers import shares


def judged(count: int) -> list[dict[str, Any]]:
    """Rows of lengths that differ, all of their tokens different."""
    rows = []
    for i in range(count):
        ids = [100 * i + place for place in range(5 + i % 3)]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (2 + i % 2) + ids[2 + i % 2 :], GOOD: i % 2 == 0})
    return rows


@pytest.mark.parametrize("parts", [[2, 3], [1, 4], [5], [1, 1, 3]])
def test_mismatches_of_divided_rows_are_those_of_one_batch(parts: list[int]) -> None:
    rows, collate = judged(5), JudgedCollator(0, max_length=7)
    whole = collate(rows)
    ids, masks = [], []
    for number, count in enumerate(parts):
        first = sum(parts[:number])
        batch = collate(rows[first : first + count])
        before = collate(rows[: first or None])
        batch = collate.after(batch, collate.row(before, len(before["input_ids"]) - 1))
        for row, mask, trained in zip(
            batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"], strict=True
        ):
            ids.append(row[mask.bool()].tolist())
            masks.append(trained[mask.bool()].tolist())
    expected = [
        (row[mask.bool()].tolist(), trained[mask.bool()].tolist())
        for row, mask, trained in zip(
            whole["KL_input_ids"], whole["KL_attention_mask"], whole["KL_completion_mask"], strict=True
        )
    ]
    assert list(zip(ids, masks, strict=True)) == expected


@pytest.mark.parametrize(("rank", "own"), [(0, 3), (1, 1), (2, 0)])
def test_rows_that_are_repeated_are_cut(rank: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes with passes of three pairs each, of which four are left: the other five are repeated ones."""
    monkeypatch.setattr(shares.distributed, "world_size", lambda: 3)
    monkeypatch.setattr(shares.distributed, "rank", lambda: rank)

    class Trainer(shares.Shared):
        class accelerator:
            class gradient_state:
                end_of_dataloader = True

    trainer = object.__new__(Trainer)
    batch = {"input_ids": torch.arange(6)[:, None], "ref_chosen_logps": torch.arange(3.0), "prompt": ["a", "b", "c"]}
    left = trainer._cut(dict(batch), 4)
    share, kept = left["share of the pass"], max(own, 1)
    assert (share.own, share.total, share.even) == (own, 4, False)
    assert share.weight == pytest.approx(own * 3 / 4)
    assert left["input_ids"].flatten().tolist() == [*range(kept), *range(3, 3 + kept)]  # better answers, then others
    assert left["ref_chosen_logps"].tolist() == [*range(kept)] and left["prompt"] == batch["prompt"][:kept]
    full = trainer._cut(dict(batch), 0)
    assert full["share of the pass"] == shares.Share(3, 9) and full["share of the pass"].weight == 1
    assert torch.equal(full["input_ids"], batch["input_ids"])
