"""The whole way of the data: tables that are made once, rows held out, bad rows counted or skipped."""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte.data import BadRow, DataOptions, Example, Prepared, Text, prepare
from halfbyte.data.bad_rows import BadRows
from halfbyte.errors import InputError

Prepare = Callable[..., Prepared]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A thousand rows, of which each tenth is like another."""
    file = tmp_path / "rows.jsonl"
    texts = [f"question {n - n % 10 if n % 10 == 1 else n}" for n in range(1000)]
    file.write_text("".join(json.dumps({"instruction": text, "output": "yes"}) + "\n" for text in texts))
    return file


@pytest.fixture
def run(tokenizer: Any, data: Path, cache: Path) -> Prepare:
    def run(take: Any = None, **options: Any) -> Prepared:
        options = {"model": "m", "data": data} | options
        return prepare(DataOptions(**options), tokenizer, method=str(id(take)), take=take)

    return run


def held(prepared: Prepared) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in prepared.train.rows]


def made(cache: Path) -> list[tuple[str, int]]:
    return sorted((str(file), file.stat().st_ino) for file in cache.rglob("rows.arrow"))


def test_what_is_prepared_again_is_the_same_file(run: Prepare, cache: Path) -> None:
    first, files = run(), made(cache)
    again = run()
    assert len(files) == 1 and made(cache) == files
    assert held(again) == held(first) and again.train.counts == first.train.counts


def test_a_changed_byte_is_noticed_though_size_and_time_stay(run: Prepare, data: Path) -> None:
    before, about = held(run()), data.stat()
    data.write_text(data.read_text().replace('question 7"', 'question 8"'))
    os.utime(data, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert data.stat().st_size == about.st_size and data.stat().st_mtime_ns == about.st_mtime_ns
    assert held(run()) != before


def test_a_table_with_a_flipped_byte_is_made_again(run: Prepare, cache: Path) -> None:
    rows = held(run())
    files = [file for file in cache.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 2
    for file in files:
        whole = file.read_bytes()
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert held(run()) == rows
        assert file.read_bytes() == whole


def test_each_option_that_rows_depend_on_makes_a_table_of_its_own(run: Prepare, cache: Path) -> None:
    options: list[dict[str, Any]] = [
        {}, {"max_length": 99}, {"format": "alpaca"}, {"train_on": "last"}, {"parse_special_tokens": True},
        {"eval_share": 0.5}, {"eval_share": 0.5, "seed": 1},
        {"columns": {"prompt": "instruction", "completion": "output"}},
    ]  # fmt: skip
    for given in options:
        run(**given)
    assert len(list(cache.iterdir())) == len(options)
    for given in [{"seed": 1}, {"skip_bad_rows": True}, {"model": "other"}]:  # on these they do not
        run(**given)
    assert len(list(cache.iterdir())) == len(options)


def test_another_template_makes_another_table(run: Prepare, cache: Path, tokenizer: Any) -> None:
    before = tokenizer.chat_template
    run()
    try:
        tokenizer.chat_template = before.replace("\n", "\n\n", 1)
        run()
    finally:
        tokenizer.chat_template = before
    assert len(list(cache.iterdir())) == 2


def test_what_is_held_out_is_a_share_of_the_rows_and_none_of_them_is_trained(run: Prepare, data: Path) -> None:
    everything = Counter(held(run()))
    split = run(eval_share=0.2)
    assert split.evaluation is not None
    out = Counter(tuple(row["input_ids"]) for row in split.evaluation.rows)
    train = Counter(held(split))
    assert train + out == everything and not train & out
    assert 0.15 < out.total() / 1000 < 0.25  # of 900 draws: three standard deviations are 0.04
    assert set(split.evaluation.rows["reference"]) == {"yes"}
    data.write_text("".join(sorted(data.read_text().splitlines(keepends=True), reverse=True)))
    again = run(eval_share=0.2).evaluation
    assert again is not None and Counter(tuple(row["input_ids"]) for row in again.rows) == out
    other = run(eval_share=0.2, seed=1).evaluation
    assert other is not None and Counter(tuple(row["input_ids"]) for row in other.rows) != out


@pytest.mark.parametrize("seed", range(4))
def test_of_few_rows_one_is_held_out_where_chance_holds_out_none(run: Prepare, data: Path, seed: int) -> None:
    rows = [json.dumps({"instruction": f"question {n}", "output": "yes"}) for n in range(3)]
    data.write_text("\n".join([*rows, '{"instruction": "alone"}']) + "\n")
    found = run(eval_share=0.001, seed=seed, skip_bad_rows="all")
    assert found.evaluation is not None and (len(found.train.rows), len(found.evaluation.rows)) == (2, 1)
    assert found.bad.total == 1 and found.skipped is not None and len(found.skipped.read_text().splitlines()) == 1
    data.write_text(rows[0] + "\n")
    with pytest.raises(InputError, match="nothing to evaluate on; name more data"):
        run(eval_share=0.001, seed=seed)


def test_data_for_evaluation_goes_the_same_way(run: Prepare, data: Path, tmp_path: Path) -> None:
    shutil.copy(data, tmp_path / "eval.jsonl")
    both = run(eval_data=tmp_path / "eval.jsonl")
    assert both.evaluation is not None
    assert [row["input_ids"] for row in both.evaluation.rows] == [row["input_ids"] for row in both.train.rows]
    assert both.evaluation.counts.digest == both.train.counts.digest
    with pytest.raises(InputError, match="eval_data and eval_share exclude each other"):
        DataOptions.from_yaml(None, {"model": "m", "data": data, "eval_data": data, "eval_share": 0.5})


def spoil(every: int) -> Callable[[Example | BadRow], Example | BadRow]:
    """Return what makes each so manieth row a bad one, by turns of two kinds."""
    count = itertools.count(1)

    def take(example: Example | BadRow) -> Example | BadRow:
        number = next(count)
        if number % every:
            return example
        return BadRow(example.where, f"kind {number // every % 2}", "is spoilt; mend it.")

    return take


def test_a_run_stops_at_bad_rows_and_says_how_many_of_which_kind(run: Prepare) -> None:
    with pytest.raises(InputError) as told:
        run(take=spoil(20))
    first, *kinds = str(told.value).splitlines()
    assert first.startswith("50 of 1,000 rows cannot be trained on; mend them, or")
    assert [kind.split(":")[0].strip() for kind in kinds] == ["kind 1 (25)", "kind 0 (25)"]
    assert "rows.jsonl, row 20 (line 20) is spoilt; mend it." in kinds[0]


def test_bad_rows_are_left_out_and_written_down_where_that_is_allowed(run: Prepare, cache: Path) -> None:
    rest = run(take=spoil(20), skip_bad_rows=True)
    assert rest.train.counts.examples == 950 and rest.bad.counts == {"kind 1": 25, "kind 0": 25}
    assert rest.skipped is not None
    lines = [json.loads(line) for line in rest.skipped.read_text().splitlines()]
    assert len(lines) == 50 and lines[0]["kind"] == "kind 1" and "row 20 (line 20) is spoilt" in lines[0]["reason"]
    assert len(made(cache)) == 1


def test_over_a_tenth_is_asked_for_by_name(run: Prepare) -> None:
    half = spoil(2)
    with pytest.raises(InputError, match=r"500 of 1,000 rows cannot be trained on.*--skip-bad-rows all"):
        run(take=half, skip_bad_rows=True)
    assert run(take=half, skip_bad_rows="all").train.counts.examples == 500
    with pytest.raises(InputError, match="none is left to train on"):
        run(take=spoil(1), skip_bad_rows="all")


def test_of_many_kinds_the_commonest_three_are_told() -> None:
    bad = BadRows()
    for kind, count in enumerate([1, 5, 3, 4, 2]):
        for row in range(count):
            bad.add(BadRow(f"row {kind}.{row}", f"kind {kind}", "is bad."))
    lines = bad.told().splitlines()
    assert [line.split("(")[0].strip() for line in lines[:3]] == ["kind 1", "kind 3", "kind 2"]
    assert lines[3].strip() == "and 2 more kinds (3 rows)"


def test_data_that_changes_while_it_is_read_is_told_and_nothing_is_kept(run: Prepare, data: Path, cache: Path) -> None:
    def take(example: Example | BadRow) -> Example | BadRow:
        if "row 900 " in example.where:
            with data.open("a") as file:
                file.write('{"instruction": "late", "output": "no"}\n')
        return example

    with pytest.raises(InputError, match="changed while it was read"):
        run(take=take)
    assert not made(cache)


def test_a_failure_keeps_nothing(run: Prepare, cache: Path) -> None:
    def take(example: Example | BadRow) -> Example | BadRow:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(take=take)
    assert not list(cache.iterdir())


def test_without_a_place_to_keep_it_a_table_is_temporary(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    expected = held(run())
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))  # there can be no folder in it
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    rows = run(eval_share=0.5)
    assert rows.evaluation is not None and len(held(rows)) + len(rows.evaluation.rows) == len(expected)
    del rows
    assert not list((tmp_path / "temporary").iterdir())


def test_a_table_that_nobody_used_for_a_month_goes_when_a_new_one_comes(run: Prepare, cache: Path) -> None:
    run()
    [old] = cache.glob("*/used")
    os.utime(old, (0, 0))
    run(max_length=99)
    assert not old.exists() and len(list(cache.iterdir())) == 1


def test_rows_of_a_shape_that_is_not_learned_are_bad_rows(run: Prepare) -> None:
    with pytest.raises(InputError, match="1,000 of 1,000 rows cannot be trained on"):
        run(take=lambda example: example if isinstance(example, Text) else BadRow(example.where, "no text", "is none."))
