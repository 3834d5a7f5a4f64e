"""JSON in the forms that programs write it, whole and cut off; ``json`` and pandas' forms tell what is right."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import json_rows, json_text
from halfbyte.data.examples import BadRow
from halfbyte.data.readers import read_rows
from halfbyte.errors import InputError

ROWS = [{"prompt": f"p{n}", "completion": f"c{n}\n{{[“🌍", "good": n % 2 == 0, "x": None} for n in range(12)]


def read(folder: Path, content: str, name: str = "d.json") -> list[Any]:
    (folder / name).write_text(content)
    return [row.kind if isinstance(row, BadRow) else row for _, row in read_rows(folder / name)]


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d"])
def test_every_form_gives_the_same_rows(tmp_path: Path, indent: int | None, name: str) -> None:
    columns = columns_of(ROWS)
    for form in (
        ROWS,
        {"data": ROWS},
        {"version": "1", "rows": ROWS, "tags": ["a"]},
        {"schema": {"fields": [{"name": "prompt"}]}, "data": ROWS},  # pandas: orient="table"
        {"other": [{"x": 1}], "data": ROWS},
        columns,
        {key: {str(n): value for n, value in enumerate(values)} for key, values in columns.items()},  # orient="columns"
        {str(n): row for n, row in enumerate(ROWS)},  # orient="index"
    ):
        assert read(tmp_path, json.dumps(form, indent=indent, ensure_ascii=False), name) == ROWS
    for between in ("\n", "", ",\n", "\n\n"):
        assert read(tmp_path, between.join(json.dumps(row, indent=indent) for row in ROWS), name) == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}], "tools": []},
        {"question": "q", "answers": ["a", "b"]},
        {"prompt": {"text": "a"}, "completion": {"text": "b"}},
    ],
)
def test_one_row_alone_is_a_row_and_no_table(tmp_path: Path, row: dict[str, Any]) -> None:
    for text in (json.dumps(row), json.dumps(row, indent=1), json.dumps([row])):
        assert read(tmp_path, text) == read(tmp_path, text + "\n", "d.jsonl") == [row]


def test_one_column_is_a_table(tmp_path: Path) -> None:
    assert read(tmp_path, '{"text": ["a", "b"]}') == [{"text": "a"}, {"text": "b"}]


def test_columns_of_different_lengths_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"different lengths: prompt \(2\) and completion \(1\)"):
        read(tmp_path, '{"prompt": ["a", "b"], "completion": ["c"]}')


@pytest.mark.parametrize("form", ["array", "object", "late"])
@pytest.mark.parametrize("indent", [None, 1])
def test_wherever_json_is_cut_its_whole_rows_are_read(tmp_path: Path, form: str, indent: int | None) -> None:
    """Cut at every place; how many rows are whole before it is known from the text of each row."""
    before = {"array": "", "object": '{"data": ', "late": '{"version": 1, "x": {"y": []}, "rows": '}[form]
    begin, ends = before + "[", []
    for row in ROWS:
        begin += json.dumps(row, indent=indent)
        ends.append(len(begin))
        begin += ", "
    text = begin[:-2] + "]" + ("}" if before else "")
    assert read(tmp_path, text) == ROWS
    for cut in range(ends[0], len(text) - (1 if before else 0), 7):
        whole = sum(end <= cut for end in ends)
        assert read(tmp_path, text[:cut]) == [*ROWS[:whole], "cut off"], text[:cut][-30:]


@pytest.mark.parametrize("begin", ['{"data": [', "[", ""])
@pytest.mark.parametrize("between", [", ", ",\n  ", "\n"])
@pytest.mark.parametrize(
    "damage", [('"p5"', '"p5'), ('"x": null', '"x": null,'), ("null,", "nul,"), ('"good": ', '"good" ')]
)
def test_an_object_that_cannot_be_read_costs_one_row(
    tmp_path: Path, begin: str, between: str, damage: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "PIECE", 100)  # so that the next is looked for in several
    rows = [{**row, "turns": [{"role": "a", "n": n} for n in range(9)]} for row in ROWS]
    texts = [json.dumps(row, indent=1 if begin == "" else None) for row in rows]
    if between == "\n" and begin:
        between = ","
    assert damage[0] in texts[5]
    texts[5] = texts[5].replace(*damage)
    end = {"{": "]}", "[": "]", "": ""}[begin[:1]]
    found = read(tmp_path, begin + between.join(texts) + end)
    assert found == [*rows[:5], "not JSON", *rows[6:]]


@pytest.mark.parametrize("begin", ["[", '{"data": ['])
def test_a_comma_behind_the_last_row_is_left_alone(tmp_path: Path, begin: str) -> None:
    rows = json.dumps(ROWS)[1:-1]
    for comma in (",", " ,\n"):
        assert read(tmp_path, f"{begin}{rows}{comma}]{'}' if '{' in begin else ''}") == ROWS


def test_an_object_behind_which_no_other_is_found_ends_the_array(tmp_path: Path) -> None:
    text = json.dumps({"data": ROWS[:6]}).replace('"p5"', '"p5')
    assert read(tmp_path, text) == [*ROWS[:5], "not JSON"]
    [*_, last] = [row for _, row in read_rows(tmp_path / "d.json")]
    assert "row 6 (line 1)" in str(last) and "5 rows before it are whole" in str(last)


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_one_conversation_whose_first_turn_has_no_role_is_one_row(tmp_path: Path, name: str) -> None:
    row = {name: [{"content": "no role"}, {"role": "assistant", "content": "A"}]}
    assert read(tmp_path, json.dumps(row) + "\n", "d.jsonl") == [row]
    table = {name: [{"text": "a", "id": 1}, {"text": "b", "id": 2}]}
    assert read(tmp_path, json.dumps(table)) == table[name]


@pytest.mark.parametrize("length", [10, 100_000])
def test_lines_are_lines_however_long_the_first_is(
    tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "FIRST", 1000)
    long = {"text": "x" * length}
    for second, found in ((json.dumps(long), long), ('{"te', "not JSON")):
        lines = [json.dumps(long), second, json.dumps({"text": "b"})]
        assert read(tmp_path, "\n".join(lines), "d.jsonl") == [long, found, {"text": "b"}]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('{"text": "a\tb\x01"}', {"text": "a\tb\x01"}),  # control characters, as lenient readers take them
        ('{"n": 1e400}', {"n": float("inf")}),
        ('{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
        ('{"n": -0.0, "n": 2}', {"n": 2}),
        ('\ufeff{"text": "a"}', {"text": "a"}),
        ('{"text": "\\ud83c\\udf0d"}', {"text": "🌍"}),
        ('{"text": "\\ud83c"}', {"text": "\ud83c"}),
        ('{"text": "a"},', {"text": "a"}),
        ("{'text': 'a'}", "not JSON"),
        ('{"text": "a"} {"text": "b"}', "not JSON"),
        ('{"text": "a\0"}', "NUL bytes"),
        ("\0\0\0", "NUL bytes"),
        ("<html>", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ('{"n": ' + "9" * 5000 + "}", "not JSON"),
        ("17", 17),
    ],
)
def test_odd_lines(tmp_path: Path, line: str, value: Any) -> None:
    assert read(tmp_path, f'{{"text": "x"}}\n{line}\n{{"text": "y"}}\n', "d.jsonl") == [
        {"text": "x"}, value, {"text": "y"}
    ]  # fmt: skip


def test_numbers_that_are_none_are_read(tmp_path: Path) -> None:
    [row] = read(tmp_path, '{"a": NaN, "b": -Infinity}\n', "d.jsonl")
    assert row["a"] != row["a"] and row["b"] == -float("inf")


PEAK = """
import sys
from halfbyte.data.readers import read_rows
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
base = peak = anonymous()
rows = 0
for rows, (where, row) in enumerate(read_rows(sys.argv[1]), start=1):
    if rows % 500 == 0:
        peak = max(peak, anonymous())
print(rows, type(row).__name__, (max(peak, anonymous()) - base) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["array", "pretty", "object", "line"])
def test_three_hundred_megabytes_of_truncated_json_need_no_memory(tmp_path: Path, form: str) -> None:
    """Anonymous memory of a process of its own; a row is 1 kB, a piece 1 MB."""
    begin = {"array": "[", "pretty": "[\n", "object": '{"version": 1, "data": [', "line": "[\n"}[form]

    def pieces() -> Iterator[str]:
        yield begin
        for number in range(300_000):
            row = {"prompt": f"What is {number}?", "completion": "words and words " * 60}
            yield json.dumps(row, indent=2 if form == "pretty" else None)
            yield ",\n" if form == "pretty" else ", "
        yield '{"prompt": "torn'

    path = tmp_path / "d.json"
    with path.open("w") as file:
        file.writelines(pieces())
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    rows, last, mebibytes = done.stdout.split()
    path.unlink()
    assert (int(rows), last) == (300_001, "BadRow")
    assert int(mebibytes) < 64
