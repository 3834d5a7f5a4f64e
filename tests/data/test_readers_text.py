"""Encodings, packing and plain text: Python's codecs and packers write what is read here."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from halfbyte.data.examples import BadRow
from halfbyte.data.readers import read_rows
from halfbyte.errors import InputError

# The first article of the Universal Declaration of Human Rights.
ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "emoji": "Free 🕊️ and equal 🤝 in dignity.",
}


def read(path: Path, content: bytes, **options: Any) -> tuple[list[Any], list[str]]:
    path.write_bytes(content)
    said: list[str] = []
    rows = [row for _, row in read_rows(path, said=said, **options)]
    return [row if isinstance(row, BadRow) else row["text"] for row in rows], said


UNICODE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize(
    ("language", "encoding"),
    [*itertools.product(ARTICLE, UNICODE), ("en", "gb18030"), ("zh", "gb18030"), ("de", "cp1252"), ("fr", "cp1252")],
)
def test_encodings_are_found_in_every_script(tmp_path: Path, language: str, encoding: str) -> None:
    text = ARTICLE[language]
    for name, content in (
        ("d.txt", text),
        ("d.jsonl", f'{{"text": "{text}"}}\n'),
        ("d.csv", f'n,text\n1,"{text}"\n'),
    ):
        found, said = read(tmp_path / name, content.encode(encoding))
        assert found == [text], name
        named = {"cp1252": "Windows-1252"}.get(encoding, encoding.removesuffix("-le").removesuffix("-be").upper())
        usual = encoding.startswith("utf-8") or (language == "en" and encoding == "gb18030")  # the same bytes
        assert usual == (not said) and (usual or f"in {named}" in said[0])
        assert read(tmp_path / name, content.encode(encoding), encoding=encoding) == ([text], [])


@pytest.mark.parametrize(
    ("language", "encoding"),
    [("zh", "gb18030"), ("zh-TW", "big5"), ("ja", "euc_jp"), ("ja", "shift_jis"), ("ko", "cp949"), ("ru", "cp1251")],
)
def test_an_encoding_is_found_though_a_line_is_damaged(tmp_path: Path, language: str, encoding: str) -> None:
    text = "人人生而自由,在尊嚴和權利上一律平等。他們賦有理性和良心。" if language == "zh-TW" else ARTICLE[language]
    lines = [f'{{"n": {n}, "text": "{text}"}}\n'.encode(encoding) for n in range(20)]
    lines[3] = lines[3].replace(b'"}', b'\x80\xff"}')  # of these encodings only Windows-1251 has both
    rows, _ = read(tmp_path / "d.jsonl", b"".join(lines))
    assert [row for row in rows if not isinstance(row, BadRow)][:3] == [text] * 3
    assert sum(row == text for row in rows) == 19


def test_of_encodings_that_fit_as_well_windows_1252_is_taken(tmp_path: Path) -> None:
    """In Portuguese letters that are not ASCII stand in pairs; with few words cp1250 is as likely by its letters."""
    rows = [f"{n} Qual é a estação? A estação é o verão; não há informações. Coração, pão, avós." for n in range(20)]
    found, said = read(tmp_path / "d.csv", "\n".join(["text", *(f'"{row}"' for row in rows)]).encode("cp1252"))
    assert found == rows and said == ["d.csv is read as CSV in Windows-1252"]


@pytest.mark.parametrize("given", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_mark_is_no_part_of_the_text_whatever_encoding_is_given(tmp_path: Path, given: str) -> None:
    for content in ("\ufeffa,text\n1,x\n", "a,text\n1,x\n"):
        order = given if given != "utf-16" else "utf-16-le"
        [(_, row)] = _rows(tmp_path, content.encode(order), given)
        assert row == {"a": "1", "text": "x"}


def _rows(folder: Path, content: bytes, encoding: str) -> list[tuple[str, Any]]:
    (folder / "d.csv").write_bytes(content)
    return list(read_rows(folder / "d.csv", encoding=encoding))


def test_ascii_with_control_characters_is_not_taken_for_utf_16(tmp_path: Path) -> None:
    for text in ("a\x01b c\x02d", "text\nab\0\n", "x" * 100 + "\x07" * 10, "\x1b[1mbold\x1b[0m " * 9):
        rows, said = read(tmp_path / "d.txt", text.encode())
        assert not said and (isinstance(rows[0], BadRow) if "\0" in text else rows == [text.strip("\n")])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"hello w\xc3", "is not UTF-8 text (byte 0xc3 in line 1)"),
        (b"one\ntwo \xe4\xbd", "is not UTF-8 text (byte 0xe4 in line 2)"),
        ("äöü\nß".encode()[:-1], "is not UTF-8 text (byte 0xc3 in line 2)"),
        ("äöü äöü\n".encode() + b"caf\xe9 ", "is not UTF-8 text (byte 0xe9 in line 2)"),
    ],
)
def test_half_a_character_is_told_with_its_line(tmp_path: Path, content: bytes, told: str) -> None:
    [row], _ = read(tmp_path / "d.txt", content)
    assert isinstance(row, BadRow) and told in str(row)


SOUND = [{"text": f"naïve {number} ü", "more": "x"} for number in range(9)]
TORN = b"na\xc3ve"


def damaged_forms() -> dict[str, bytes]:
    """A file of each form whose sixth row has a byte that is not UTF-8."""
    lines = [json.dumps(row, ensure_ascii=False) for row in SOUND]
    columns = {name: [row[name] for row in SOUND] for name in SOUND[0]}
    numbered = {str(number): row for number, row in enumerate(SOUND)}
    table = "text,more\n" + "".join(f'"{row["text"]}",x\n' for row in SOUND)
    forms = {
        "lines.jsonl": "\n".join(lines),
        "array.json": f"[{', '.join(lines)}]",
        "data.json": f'{{"version": 1, "data": [{", ".join(lines)}]}}',
        "objects.json": json.dumps(SOUND, ensure_ascii=False, indent=1)[1:-1],
        "columns.json": json.dumps(columns, ensure_ascii=False),
        "numbered.json": json.dumps(numbered, ensure_ascii=False),
        "table.csv": table,
        "table.tsv": table.replace(",", "\t"),
    }
    return {name: text.encode().replace("naïve 5".encode(), TORN + b" 5") for name, text in forms.items()}


@pytest.mark.parametrize("name", damaged_forms())
def test_a_byte_that_is_not_utf_8_costs_one_row(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(damaged_forms()[name])
    rows = [row for _, row in read_rows(tmp_path / name)]
    assert [row.kind if isinstance(row, BadRow) else row for row in rows] == [
        *SOUND[:5], "not UTF-8 text", *SOUND[6:]
    ]  # fmt: skip
    assert "byte 0xc3 in line" in str(rows[5])


@pytest.mark.parametrize("end", ["ü", "€", "🌍"])
@pytest.mark.parametrize("form", ["lines", "array"])
def test_json_that_is_cut_within_a_character_costs_one_row(tmp_path: Path, form: str, end: str) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in SOUND]
    text = ("\n" if form == "lines" else ", ").join([*lines, f'{{"text": "{end}'])
    content = (text if form == "lines" else "[" + text).encode()
    for cut in range(1, len(end.encode())):
        (tmp_path / "d.json").write_bytes(content[:-cut])
        *rows, last = [row for _, row in read_rows(tmp_path / "d.json")]
        assert rows == SOUND and isinstance(last, BadRow)


def test_a_byte_that_is_not_utf_8_costs_one_piece_of_a_text(tmp_path: Path) -> None:
    content = "äöü äöü\n\n".encode() * 3 + TORN + b"\n\n" + "äöü äöü\n\n".encode() * 3
    rows, _ = read(tmp_path / "d.txt", content, split_text=10)
    assert [isinstance(row, BadRow) for row in rows] == [False] * 3 + [True] + [False] * 3
    assert "line 7" in str(rows[3])


def test_names_of_columns_that_are_not_utf_8_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"d.csv is not UTF-8 text \(byte 0xc3 in line 1\)"):
        read(tmp_path / "d.csv", b"te\xc3xt,n\n" + "äöü,ß\n".encode() * 3)


def test_a_word_that_ends_in_windows_1252_is_not_half_a_character(tmp_path: Path) -> None:
    assert read(tmp_path / "d.txt", "un café".encode("cp1252"))[0] == ["un café"]


@pytest.mark.parametrize("encoding", ["utf-99", "rot13", "base64", "zip", "a\0", ""])
def test_what_is_no_encoding_of_text_is_told(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(InputError, match="There is no encoding"):
        read(tmp_path / "d.txt", b"x", encoding=encoding)


def test_a_text_that_is_not_in_the_given_encoding_is_told(tmp_path: Path) -> None:
    for encoding, content in (("ascii", "ä".encode()), ("utf-32", b"abcde"), ("shift_jis", b"\xff\xff")):
        path = tmp_path / "d.txt"
        path.write_bytes(content)
        (_, row), *_ = read_rows(path, encoding=encoding)
        assert isinstance(row, BadRow) and "name its encoding" in str(row)


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd,
}  # fmt: skip


@pytest.mark.parametrize("ending", PACK)
def test_packed_files_of_several_parts_cut_off_and_misnamed(tmp_path: Path, ending: str) -> None:
    pack = PACK[ending]
    parts = [f'{{"text": "{os.urandom(3000).hex()}"}}\n'.encode() for _ in range(4)]
    texts = [part[10:-3].decode() for part in parts]
    whole = pack(parts[0] + parts[1]) + pack(parts[2] + parts[3])
    for name in ("d.jsonl" + ending, "d" + ending, "d.jsonl", "D.JSONL" + ending.upper()):
        assert read(tmp_path / name, whole) == (texts, []), name
    assert read(tmp_path / f"plain.jsonl{ending}", parts[0]) == (texts[:1], [])
    for cut in (len(whole) - 4, len(whole) - 2000, 12):
        with pytest.raises(InputError, match=r"is damaged or cut off: \w+ cannot unpack it .*; fetch it again"):
            read(tmp_path / f"cut.jsonl{ending}", whole[:cut])
    with pytest.raises(InputError, match="holds no rows"):
        read(tmp_path / f"none.jsonl{ending}", pack(b""))
    csv = "Frage;Antwort;text\nä;ö;ü\n".encode("cp1252")
    rows, said = read(tmp_path / f"d.csv{ending}", pack(csv))
    assert rows == ["ü"] and said == [f"d.csv{ending} is read as CSV in Windows-1252 and with ';' between its fields"]


def test_progress_counts_the_bytes_of_the_packed_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(
        gzip.compress(b"".join(b'{"text": "%s"}\n' % os.urandom(1000).hex().encode() for _ in range(5000)))
    )
    told: list[tuple[int, int, int]] = []
    list(read_rows(path, lambda *numbers: told.append(numbers)))
    size = path.stat().st_size
    assert told == sorted(told) and told[-1] == (5000, size, size)
    assert 0 < told[0][1] < size and {total for *_, total in told} == {size}


def test_a_long_line_is_divided_in_linear_time(tmp_path: Path) -> None:
    def seconds(words: int) -> float:
        (tmp_path / "d.txt").write_text("word " * words)
        begin = time.process_time()
        pieces = [row["text"] for _, row in read_rows(tmp_path / "d.txt", split_text=500)]
        assert "".join(pieces) == "word " * words and max(map(len, pieces)) <= 500
        return time.process_time() - begin

    seconds(1000)
    assert seconds(2_000_000) < 60 * max(seconds(200_000), 0.005)  # ten times the text; it was a hundred times the time


def test_pieces_of_a_text_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "d.md").write_text("# One\n\nfirst\n\n\n# Two\n\nsecond\n")
    places = {row["text"]: where.split("(line ")[1] for where, row in read_rows(tmp_path / "d.md", split_text=16)}
    assert places == {"# One\n\nfirst": "1)", "# Two\n\nsecond": "6)"}


@pytest.mark.parametrize("split", [0, -1, "abc", "1.5", ""])
def test_a_wrong_length_of_pieces_is_told(tmp_path: Path, split: Any) -> None:
    with pytest.raises(InputError, match="split_text"):
        read(tmp_path / "d.txt", b"words", split_text=split)


@pytest.mark.parametrize("name", ["program.exe", "program.txt", "program.jsonl", "program.csv"])
def test_a_program_is_no_text_in_an_unknown_encoding(name: str, tmp_path: Path) -> None:
    content = b"MZ\x90\0\3\0\0\0\4\0\0\0\xff\xff\0\0\xb8" + bytes(range(256)) * 20
    with pytest.raises(InputError, match="is no text, and no data file"):
        read(tmp_path / name, content)
