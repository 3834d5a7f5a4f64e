"""Digests, lengths and places of any table: against plain Python over its rows."""

import itertools
import random
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from halfbyte import tables

ROWS: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "text": "a", "score": 0.5, "turns": [{"role": "user"}]},
    {"input_ids": [], "labels": [], "text": None, "score": 1.5, "turns": []},
    {"input_ids": [4], "labels": [-100], "text": "é", "score": -2.0, "turns": [{"role": "x"}, {"role": None}]},
    {"input_ids": [1, 2], "labels": [1, 2], "text": "", "score": 0.0, "turns": [{"role": "y"}]},
]


def dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def divided(sizes: list[int]) -> datasets.Dataset:
    """The rows, in parts of these sizes."""
    whole = dataset(ROWS).data.table.combine_chunks()
    starts = [0, *itertools.accumulate(sizes)]
    return datasets.Dataset(pa.concat_tables([whole.slice(a, b - a) for a, b in itertools.pairwise(starts)]))


@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [0, 3, 1], [2, 2]])
def test_the_digest_is_the_same_however_a_table_is_divided_or_chosen(sizes: list[int]) -> None:
    expected = tables.digest(dataset(ROWS))
    assert tables.digest(divided(sizes)) == expected
    assert tables.digest(dataset(ROWS[::-1]).select([3, 2, 1, 0])) == expected
    assert tables.digest(dataset(ROWS).with_format("numpy")) == expected
    assert tables.digest(dataset([row | {"where": f"row {n}"} for n, row in enumerate(ROWS)])) == expected


def test_the_digest_is_another_after_any_change() -> None:
    def changed(row: int, **values: Any) -> list[dict[str, Any]]:
        return [*ROWS[:row], ROWS[row] | values, *ROWS[row + 1 :]]

    variants = [
        ROWS,
        ROWS[:-1],
        [*ROWS[1:], ROWS[0]],
        changed(0, input_ids=[1, 2, 4]),
        changed(0, labels=[-100, -100, 3]),
        changed(1, input_ids=[0]),
        changed(1, text=""),
        changed(2, score=-0.0),
        changed(2, turns=[{"role": "x"}]),
        changed(3, input_ids=[1], labels=[2, 2]),
        changed(3, text="b"),
        [{("ids" if name == "labels" else name): value for name, value in row.items()} for row in ROWS],
        [{name: value for name, value in row.items() if name != "text"} for row in ROWS],
    ]
    # the same values in a row, divided otherwise
    variants.append([{"x": [1, 2]}, {"x": [3]}])
    variants.append([{"x": [1]}, {"x": [2, 3]}])
    variants.append([{"x": [[1, 2], []]}])
    variants.append([{"x": [[1], [2]]}])
    variants.append([{"x": ["a", "b"]}])
    variants.append([{"x": ["a\nb"]}])
    assert len({tables.digest(dataset(rows)) for rows in variants}) == len(variants)


def test_rows_that_are_made_as_they_are_read_have_a_digest_and_lengths_too() -> None:
    def double(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"input_ids": [torch.tensor(ids, dtype=torch.int64).repeat(2) for ids in batch["input_ids"]]}

    made = dataset(ROWS).with_transform(double)
    doubled = [{"input_ids": row["input_ids"] * 2} for row in ROWS]
    assert tables.digest(made) == tables.digest(doubled) != tables.digest(dataset(ROWS))
    assert tables.lengths(made).tolist() == [6, 0, 2, 4]
    strange = [{"input_ids": [1], "what": object}]  # no type of Arrow's
    assert tables.digest(strange) == tables.digest(strange) != tables.digest([{"input_ids": [1], "what": int}])


def test_lengths_are_those_of_the_lists() -> None:
    for rows in (dataset(ROWS), divided([1, 3]), dataset(ROWS).select([2, 0])):
        assert tables.lengths(rows).tolist() == [len(ids) for ids in rows["input_ids"]]
        assert isinstance(tables.lengths(rows), np.ndarray)
    assert tables.lengths(dataset(ROWS).select([])).tolist() == []


def test_samples_are_found_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PART", 7)
    draw = random.Random(0)
    rows = [[draw.randrange(2) for _ in range(draw.randrange(1, 6))] for _ in range(50)]
    samples = [*rows[::-1], [0, 1, 2], [0] * 9, []]
    expected = [rows.index(sample) if sample in rows else None for sample in samples]
    assert tables.places(dataset([{"input_ids": row} for row in rows]), samples) == expected
    named = dataset([{"input_ids": row, "where": f"row {n}"} for n, row in enumerate(rows)])
    assert tables.places(named, samples) == [None if n is None else f"row {n}" for n in expected]
    assert tables.places(named.select(range(49, -1, -1)), [rows[49]]) == ["row 49"]
