"""Files to rows: against ``json`` and ``csv`` over whole files, and bad files in one sentence with the line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data import json_text
from halfbyte.data.examples import BadRow
from halfbyte.data.readers import read_rows
from halfbyte.errors import InputError, named

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NUMBERS = st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path) -> list[Any]:
    """The rows; a bad one is raised."""
    rows = [row for _, row in read_rows(path)]
    for row in rows:
        if isinstance(row, BadRow):
            raise row
    return rows


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_every_kind_of_file_gives_back_the_rows_written_to_it(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    in_csv = [row for row in rows if any(row.values()) and "\0" not in row["prompt"] + row["completion"]]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(in_csv)
    if in_csv:
        assert rows_of(folder / "rows.csv") == in_csv
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "rows.parquet")
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as stream:
        stream.write_table(table)
    for path in (
        write(folder, "rows.jsonl", "\ufeff" + lines),
        write(folder, "rows.ndjson", lines),
        write(folder, "put-together.jsonl", lines.replace("\r\n\r\n", "\n\ufeff")),
        write(folder, "array.json", "\ufeff" + json.dumps(rows, indent=1)),
        write(folder, "data.json", json.dumps({"data": rows, "tags": []})),
        write(folder, "late.json", json.dumps({"tags": ["a"], "data": rows, "x": {"y": [1]}})),
        write(folder, "one-list.json", json.dumps({"version": 1, "train": rows})),
        write(folder, "array.csv.jsonl", json.dumps(rows)),
        write(folder, "one-after-the-other.jsonl", "\n".join(json.dumps(row, indent=2) for row in rows)),
        write(folder, "columns.json", json.dumps({key: [row[key] for row in rows] for key in rows[0]})),
        write(folder, "rows.jsonl.gz", gzip.compress(lines.encode())),
        write(folder, "rows.jsonl.bz2", bz2.compress(lines.encode())),
        write(folder, "rows.jsonl.zst", pa.Codec("zstd").compress(lines.encode(), asbytes=True)),
        write(folder, "utf-16.jsonl", lines.encode("utf-16")),
        write(folder, "lines.JSON" if len(rows) > 1 else "lines.JSONL", lines),
        write(folder, "rows.jsonl.xz", lzma.compress(lines.encode())),
        folder / "rows.parquet",
        folder / "rows.arrow",
    ):
        assert rows_of(path) == rows, path


@pytest.mark.parametrize("piece", [1, 7, 64])
@given(rows=st.lists(VALUES, min_size=1, max_size=6), indent=st.none() | st.integers(0, 2), escaped=st.booleans())
@settings(max_examples=150)
def test_json_read_in_pieces_is_what_json_reads_at_once(
    tmp_path_factory: pytest.TempPathFactory, piece: int, rows: list[Any], indent: int | None, escaped: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=escaped)
    path = write(tmp_path_factory.mktemp("pieces"), "rows.json", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "PIECE", piece)
        assert rows_of(path) == json.loads(text)


@pytest.mark.parametrize("piece", [1, 5, 1000])
@given(
    rows=st.lists(VALUES, min_size=1, max_size=4), at=st.integers(0, 300), character=st.sampled_from('[]{}:,"\\\nx1e ')
)
@settings(max_examples=200)
def test_broken_json_is_refused_where_json_refuses_it(
    tmp_path_factory: pytest.TempPathFactory, piece: int, rows: list[Any], at: int, character: str
) -> None:
    text = json.dumps(rows, indent=1)
    text = f"[{text[1:at]}{character}{text[at + 1 :]}"
    path = write(tmp_path_factory.mktemp("broken"), "rows.json", text)
    try:
        whole = json.loads(text, strict=False)
    except json.JSONDecodeError:
        whole = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "PIECE", piece)
        if whole:
            assert rows_of(path) == whole
        else:
            with pytest.raises(InputError) as caught:
                rows_of(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_more_of_a_json_file_is_held_than_a_row_and_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "PIECE", 1000)
    path = write(tmp_path, "rows.json", json.dumps([{"text": "x" * 50}] * 1000))
    source = json_text.Json(path, io.StringIO(path.read_text()))
    longest = max(len(source._piece) for _ in source.elements())
    assert longest < 3000


def test_no_more_of_a_parquet_file_is_held_than_a_few_of_its_groups(tmp_path: Path) -> None:
    rows = pa.table({"text": [random.Random(n).randbytes(500).hex() for n in range(1000)]})
    with pq.ParquetWriter(tmp_path / "d.parquet", rows.schema) as file:
        for _ in range(40):  # a group of 1 MB each
            file.write_table(rows)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_rows(tmp_path / "d.parquet")]
    assert len(held) == 40_000 and max(held) < 12 << 20


def test_a_row_knows_its_number_and_line(tmp_path: Path) -> None:
    lines = write(tmp_path, "d.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    table = write(tmp_path, "d.csv", 'text,n\n"a\nb",1\n\nc,2\n')
    array = write(tmp_path, "d.json", '[{"text": "a"},\n {"text":\n "b"},{"text": "c"}]')
    inner = write(tmp_path, "e.json", '{"x": [],\n"data":\n[{"text": "a"}\n,{"text": "b"}]}')
    expected = {lines: [1, 3], table: [2, 5], array: [1, 2, 3], inner: [3, 4]}
    for path, numbers in expected.items():
        places = [f"{path}, row {row} (line {line})" for row, line in enumerate(numbers, start=1)]
        assert [where for where, _ in read_rows(path)] == places


DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("d.jsonl", "", ["holds no rows"]),
        ("d.jsonl", "\n  \n", ["holds no rows"]),
        ("d.json", " ", ["holds no rows"]),
        ("d.json", "[]", ["holds no rows"]),
        ("d.json", '{"tags": ["a"], "data": []}', ["holds no rows"]),
        ("d.csv", "", ["holds no rows"]),
        ("d.csv", "text\n", ["one line only", "names of columns"]),
        ("d.xyz", "hello", ["d.xyz", ".jsonl, .ndjson, .json, .csv"]),
        ("d.jsonl", b"PK\x03\x04", ["is an archive or a sheet (zip, xlsx); unpack it"]),
        ("d.csv", b"\xd0\xcf\x11\xe0", ["Microsoft Office; save it as CSV"]),
        ("d.txt", b"%PDF-1.7", ["is a PDF"]),
        ("d.parquet", "a", ["no Parquet file"]),
        ("d.parquet", b"PAR1aaaaaaaaPAR1", ["no whole Parquet file"]),
        ("d.arrow", b"ARROW1\0\0aaaaaaa", ["no whole Arrow file"]),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-20], ["damaged or cut off: gzip"]),
        ("d.jsonl", '{"text": "a"}\n\n{"text": \n', ["row 2 (line 3) is not JSON", "column"]),
        (
            "d.jsonl",
            '{"text": "a"}\n{"text": "b',
            ["(line 2) is not JSON: Unterminated string starting at column 10", "may be cut off"],
        ),
        ("d.jsonl", '{"text": "a"}\n\0\0\0', ["(line 2) holds NUL bytes"]),
        ("d.jsonl", '{"text": "a"}\n{"text": "\0"}\n', ["(line 2) holds NUL bytes"]),
        ("d.csv", "text\na\nb\0\n", ["row 2 (line 3) holds NUL bytes"]),
        ("d.txt", "\0" * 64, ["row 1 (line 1) holds NUL bytes"]),
        ("d.jsonl", f'{{"text": "a"}}\n{{"text": {DEEP}}}', ["(line 2) has brackets within brackets"]),
        ("d.jsonl", f'{{"text": "a"}}\n{{"text": {HUGE}}}', ["(line 2) has a number with too many digits"]),
        ("d.json", f'[{{"text": "a"}},\n{{"text": {DEEP}}}]', ["line 2 has brackets within brackets"]),
        ("d.json", f'[{{"text": "a"}},\n{{"text": {HUGE}}}]', ["line 2 has a number with too many digits"]),
        (
            "d.json",
            '[{"text": "a"},\n {"text" "b"}]',
            ["line 2 is not JSON", "column 10", "1 row before it is whole"],
        ),
        ("d.json", '[{"text": "a"}\n', ["cut off here"]),
        ("d.json", '[{"text": "a"},\n{"text": "b', ["row 2 (line 2)", "cut off", "1 row before it is whole"]),
        ("d.json", '[{"text": "a"},\n]\n[', ["line 3 is not JSON: Extra data at column 1"]),
        ("d.json", '{"data": [{"text": "a"}],\n}', ["line 2", "property name enclosed in double quotes"]),
        ("d.json", '{"data": [{"text": "a"}],\n"b" 1}', ["line 2 is not JSON: Expecting ':' delimiter at column 5"]),
        ("d.json", '{"a": [], "b": []}', ["holds no rows"]),
        ("d.json", '{"a": [{"x": 1}], "b": [{"x": 2}]}', ["lists a and b", "'data'"]),
        ("d.jsonl", '{"text": "äöü"}\n{"text": "'.encode() + b'\xff"}', ["not UTF-8", "0xff in line 2", "--encoding"]),
        ("d.json", '[{"text": "äöü"},\n\n{"text": "'.encode() + b'\xe9t"}]', ["not UTF-8", "0xe9 in line 3"]),
        ("d.csv", "text\näöü\n".encode() + b"\xfcber\n", ["not UTF-8", "0xfc in line 3"]),
        ("d.jsonl", '{"text": "äö"}\n{"text": "ü'.encode()[:-1], ["not UTF-8", "0xc3 in line 2"]),
        ("d.csv", 'prompt,completion\n"a\nb",c\nd\n', ["row 2 (line 4)", "1 fields", "header names 2"]),
        ("d.csv", "prompt,completion\na,b,c\n", ["row 1 (line 2)", "3 fields"]),
        ("d.csv", 'text\na\n"b\n', ["row 2 (line 3) is not CSV", "never ends"]),
        ("d.csv", "a,b,a\n1,2,3\n", ["the column 'a' more than once"]),
        ("d.csv", "word " * 30 + ",An apple\nx,y\n", ["where the names of columns should be"]),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: str | bytes, told: list[str]
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        rows_of(path)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    assert [part for part in told if part not in sentence] == []


BROKEN = {
    "a byte that UTF-8 has not": (
        "d.jsonl", '{"text": "äöü"}\n{"text": "'.encode() + b'\xff"}\n{"text": "a"}\n', 2, "0xff",
    ),
    "a letter of another encoding": ("d.json", '[{"text": "äöü"},\n\n{"text": "'.encode() + b'\xe9t"},\n{"text": "a"}]',
                                     3, "0xe9"),
    "objects one behind the other": (
        "d.json", '{"text":\n"äöü"}\n{"text": "'.encode() + b'\xe9t"}\n{"text": "a"}', 3, "0xe9",
    ),
    "a field": ("d.csv", "text\näöü\n".encode() + b"\xfcber\na\n", 3, "0xfc"),
    "two bytes a letter": (
        "d.jsonl",
        '{"text": "äöü"}\n{"text": "'.encode("utf-16") + b"\x00\xd8" + '"}\n{"text": "a"}\n'.encode("utf-16-le"),
        2, "0x00",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "line", "byte"), BROKEN.values(), ids=BROKEN.keys())
def test_a_row_that_is_not_of_the_encoding_costs_that_row_alone(
    tmp_path: Path, name: str, content: bytes, line: int, byte: str
) -> None:
    (_, first), (where, bad), (_, last) = read_rows(write(tmp_path, name, content))
    assert (first, last) == ({"text": "äöü"}, {"text": "a"})
    assert isinstance(bad, BadRow) and bad.kind in ("not UTF-8 text", "not UTF-16 text")
    assert where.endswith(f"row 2 (line {line})") and str(bad).startswith(where)
    assert byte in str(bad) and "--encoding" in str(bad)


@pytest.mark.parametrize("cut", range(1, 12))
@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_file_that_is_cut_off_anywhere_gives_its_whole_rows(tmp_path: Path, form: str, cut: int) -> None:
    rows = [{"text": "汉字很多"}, {"text": "第二行"}, {"text": "第三行的字"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = "".join(f"{line}\n" for line in lines) if form == "lines" else f"[{', '.join(lines)}]"
    found = [value for _, value in read_rows(write(tmp_path, "d.json", content.encode()[: -cut - 2]))]
    assert found[:2] == rows[:2]
    assert len(found) == 3 and isinstance(found[2], BadRow)


def test_a_comma_behind_the_last_element_is_no_damage(tmp_path: Path) -> None:
    assert [value for _, value in read_rows(write(tmp_path, "d.json", '[{"text": "a"},\n{"text": "b"},\n]'))] == [
        {"text": "a"}, {"text": "b"},
    ]  # fmt: skip


@pytest.mark.parametrize("packed", ["", "gz", "bz2", "xz"])
def test_an_archive_is_told_to_be_unpacked(tmp_path: Path, packed: str) -> None:
    path = write(tmp_path, "d.jsonl", '{"text": "a"}\n')
    archive = tmp_path / f"d.tar.{packed}"
    with tarfile.open(archive, f"w:{packed}") as file:
        file.add(path)
    with pytest.raises(InputError, match=r"d\.tar\.\w* is an archive \(tar\); unpack it"):
        rows_of(archive)


def test_a_missing_file_and_a_folder_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match=r"The data file .* is (not there|a folder)"):
            read_rows(path)


def test_the_names_of_columns_stay_on_one_line_and_are_not_too_many() -> None:
    assert named(["a"]) == "a"
    assert named(["a", "b c", "", "x\ny", "\ud800"]) == "a, b c, '', 'x\\ny' and '\\ud800'"
    assert named([str(n) for n in range(100)]).endswith("10, 11 and 88 more")
    assert len(named(["x" * 1000])) == 60


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_progress_counts_rows_and_bytes_up_to_all_of_them(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"It is {n}"} for n in range(4500)]
    contents = {
        "d.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "d.json": json.dumps({"version": 1, "data": rows}),
        "d.csv": "text\n" + "".join(f"{row['text']}\n" for row in rows),
    }
    path = write(tmp_path, name, contents[name])
    told: list[tuple[int, int, int]] = []
    assert len(list(read_rows(path, lambda *numbers: told.append(numbers)))) == 4500
    size = path.stat().st_size
    assert [rows for rows, _, _ in told] == [1000, 2000, 3000, 4000, 4500]
    assert told == sorted(told) and told[-1] == (4500, size, size) and {total for *_, total in told} == {size}
