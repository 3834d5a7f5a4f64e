from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.choices import IGNORED
from halfbyte.data import Collator


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (4, 8), (5, 5)])
@pytest.mark.parametrize("pad", [None, 7])
@pytest.mark.parametrize("kind", [list, lambda ids: np.array(ids, np.int32), torch.tensor])
def test_a_batch_holds_its_rows_and_neither_attends_to_nor_trains_the_padding(
    multiple: int, length: int, pad: int | None, kind: Callable[[list[int]], Any]
) -> None:
    rows = [
        {"input_ids": [1, 2], "labels": [IGNORED, 2]},
        {"input_ids": [3, 7, 7, 5, 7], "labels": [IGNORED, 7, 7, 5, 7]},
    ]
    given = [{name: kind(ids) for name, ids in row.items()} | {"where": "d.jsonl, row 1"} for row in rows]
    batch = Collator(pad, pad_to_multiple_of=multiple)(given)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert {(tensor.shape, tensor.dtype) for tensor in batch.values()} == {((2, length), torch.int64)}
    for index, row in enumerate(rows):
        attended = batch["attention_mask"][index].bool()
        assert attended.tolist() == [True] * len(row["labels"]) + [False] * (length - len(row["labels"]))
        for key, values in row.items():
            assert batch[key][index][attended].tolist() == values
        assert batch["labels"][index][~attended].eq(IGNORED).all()
        assert batch["input_ids"][index][~attended].eq(pad or 0).all()
