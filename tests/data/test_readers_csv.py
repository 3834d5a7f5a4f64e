"""CSV as people's programs write it, and as it comes out of accidents; ``csv`` writes what is read here."""

import csv
import io
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from halfbyte.data import csv_rows
from halfbyte.data.examples import BadRow
from halfbyte.data.readers import read_rows
from halfbyte.errors import InputError


def read(folder: Path, content: str | bytes, name: str = "d.csv") -> tuple[list[Any], list[str]]:
    """The values of the rows, of bad ones their kinds; and what was said."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    said: list[str] = []
    rows = [row for _, row in read_rows(path, said=said)]
    return [row.kind if isinstance(row, BadRow) else list(row.values()) for row in rows], said


CELLS = st.text(st.sampled_from("ab ,;\t|\"'\n\\é世"), max_size=12)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6),
    ends=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
@settings(max_examples=60)
def test_what_csv_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, delimiter: str, rows: list[tuple[str, ...]], ends: str, quoting: Any
) -> None:
    rows = [row for row in rows if any(row)]
    assume(rows and not any('\\"' in cell or cell.endswith("\\") for row in rows for cell in row))
    # The header and a row of one word each say which delimiter it is, whatever the others hold.
    written = [["prompt", "completion", "system"], ["a", "b", "c"], *map(list, rows)]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=ends, quoting=quoting).writerows(written)
    found, _ = read(tmp_path_factory.mktemp("csv"), text.getvalue())
    assert found == written[1:]


def test_texts_in_tabs_without_quoting_keep_their_quotation_marks(tmp_path: Path) -> None:
    cells = [['"Stop', 'he said "no"'], ['"All"', "x"], ['5" screen', '"'], *[["a", "b"]] * 30]
    written = "".join("\t".join(row) + "\n" for row in [["one", "two"], *cells])
    found, said = read(tmp_path, written, "news.tsv")
    assert found == cells
    assert said == ["news.tsv is read as CSV with quotation marks as part of the fields"]


def test_a_quotation_mark_late_in_a_file_of_tabs_is_part_of_its_field(tmp_path: Path) -> None:
    plain = [["a", "b"]] * 300
    found, _ = read(tmp_path, "one\ttwo\n" + "a\tb\n" * 300 + '"late\tb\n' + "a\tb\n" * 300, "d.tsv")
    assert found == [*plain, ['"late', "b"], *plain]


def test_backslashes_before_quotation_marks_are_understood_and_said(tmp_path: Path) -> None:
    found, said = read(tmp_path, 'a,b\n"He said \\"hi, you\\"",x\n"c","d"\n')
    assert found == [['He said "hi, you"', "x"], ["c", "d"]]
    assert said == ["d.csv is read as CSV with backslashes before quotation marks"]


@pytest.mark.parametrize("damage", ['"x,3', 'y,"3'])
@pytest.mark.parametrize("again", [0, 10, 60])
def test_a_quotation_mark_that_never_ends_costs_one_row(tmp_path: Path, damage: str, again: int) -> None:
    rows = ["1,2"] * 5 + [damage] + ["4,5"] * again + ([damage] if again else []) + ["6,7"] * 5
    found, _ = read(tmp_path, "a,b\n" + "\n".join(rows) + "\n")
    assert found == [row.split(",") if row != damage else "not CSV" for row in rows]


def test_a_damaged_field_of_many_lines_is_one_bad_row(tmp_path: Path) -> None:
    """Its lines are no rows by themselves, so none of them is taken for one."""
    found, _ = read(tmp_path, 'a,b\n1,2\n"first line\nsecond line\nsaid "no",3\n4,5\n')
    assert found == [["1", "2"], "not CSV", ["4", "5"]]


def test_a_mark_that_never_ends_does_not_bring_the_file_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_rows, "LONGEST_ROW", 100_000)
    path = tmp_path / "d.csv"
    path.write_text('a,b\n"x,3\n' + f"{'some words ' * 100},others\n" * 20_000)  # 22 MB
    tracemalloc.start()
    try:
        rows = sum(not isinstance(row, BadRow) for _, row in read_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 20_000
    assert peak < 8 << 20


def test_what_holds_nothing_is_no_row(tmp_path: Path) -> None:
    found, _ = read(tmp_path, "a,b\n\n1,2\n,\n3,4,,\n\n,,,\n")
    assert found == [["1", "2"], ["3", "4"]]


def test_a_field_has_no_limit_whoever_set_one(tmp_path: Path) -> None:
    csv.field_size_limit(1000)
    found, _ = read(tmp_path, f"a,b\n{'x' * 1_000_000},{'y' * 150_000}\n")
    assert [len(cell) for cell in found[0]] == [1_000_000, 150_000]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("a,b\r1,2\r3,4\r", [["1", "2"], ["3", "4"]]),
        ('a,b\r\n"x\r\ny",2\r\n', [["x\r\ny", "2"]]),
        ("a,b\n1,2", [["1", "2"]]),
        ("\ufeffa,b\n1,2\n", [["1", "2"]]),
        ('"sep=;"\na;b\n1,2;3\n', [["1,2", "3"]]),
        ("sep=|\na|b\n1|2\n", [["1", "2"]]),
        ("text\nHello, world\nHello\n", ["number of fields", ["Hello"]]),
        ("text\nHello; world\nHello\n", [["Hello; world"], ["Hello"]]),
        ("n;text\n1;3,5\n2;4,5\n3;5,5\n", [["1", "3,5"], ["2", "4,5"], ["3", "5,5"]]),
        ("a,b\n1,2\na,b\n3,4\n", [["1", "2"], "header again", ["3", "4"]]),
        ("a,b\n1\n1,2,3\n4,5\n", ["number of fields", "number of fields", ["4", "5"]]),
        ("\n\na,b\n1,2\n", [["1", "2"]]),
    ],
)
def test_odd_files_of_csv(tmp_path: Path, content: str, found: list[Any]) -> None:
    assert read(tmp_path, content)[0] == found


def test_every_row_knows_its_line_behind_blank_lines_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('sep=;\na;b\n\n1;2\n"x\ny";3\n"z;3\n4;5\n')
    places = [(where.split("(line ")[1].rstrip(")"), isinstance(row, BadRow)) for where, row in read_rows(path)]
    assert places == [("4", False), ("5", False), ("7", True), ("8", False)]


def test_a_file_without_a_header_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seems to have no header"):
        read(tmp_path, "I liked it,positive\nIt was dull,negative\n" + "Good,positive\nBad,negative\n" * 5)
    with pytest.raises(InputError, match="where the names of columns should be"):
        read(tmp_path, f"{'word ' * 30},An apple\nx,y\n")


TABLE = "question\tanswer\nWho?\tI.\nWhat, then?\tNothing.\n"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("d", TABLE, "CSV with tabs between its fields"),
        ("d.dat", TABLE.replace("\t", ";"), "CSV with ';' between its fields"),
        ("d.txt", TABLE, "CSV with tabs between its fields"),
        ("d", 'a,b\n"x\ny",2\n', "CSV"),
        ("d.txt", '{"a": "x", "b": "y"}\n{"a": "z", "b": ""}\n', "JSON"),
        ("d.csv", '{"a": "x", "b": "y"}\n', "JSON"),
        ("d.csv", '[\n {"a": "x", "b": "y"}]', "JSON"),
        ("d.txt", '{\n  "a": "x",\n "b": "y"}\n', "JSON"),
        ("d.txt", "[1] A note.\n", None),
        ("d.txt", "One, two;\nthree, four;\nfive, six.\n", None),
        ("d.txt", "\tOne\n\ttwo\n\tthree\n", None),
        ("d.md", TABLE, None),
        ("d.md", '{"a": "x"}\n', None),
        ("d.txt", "{x} is not JSON\n", None),
    ],
)
def test_what_a_file_holds_counts_and_then_its_name(tmp_path: Path, name: str, content: str, kind: str | None) -> None:
    found, said = read(tmp_path, content, name)
    assert said == ([f"{name} is read as {kind}"] if kind else [])
    assert (found == [[content.strip("\n")]]) == (kind is None) and len(found[0]) == (2 if kind else 1)


def test_a_text_of_no_kind_is_told(tmp_path: Path) -> None:
    for content in ("Hello, world\n", "a,b\n1,2,3\n4\n", "text\nhello\n"):
        with pytest.raises(InputError, match="holds JSON or a table"):
            read(tmp_path, content, "d")
