"""What a user calls data, and the rows that it means."""

import gzip
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from halfbyte.data import BadRow, DataOptions, Source, hub, named_files
from halfbyte.data.catalog import DATASETS
from halfbyte.data.sources import fingerprint, read_source, resolve
from halfbyte.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with data of several kinds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_opened", {})
    for name, count in (("a", 3), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{n}"}}\n' for n in range(count)))
    return tmp_path


def texts(given: Any, **options: Any) -> list[str]:
    return [row["text"] for source in resolve(given) for _, row in read_source(source, **options)]


A, B = ["a0", "a1", "a2"], ["b0", "b1"]


def test_files_folders_patterns_and_several_of_them(folder: Path) -> None:
    (folder / "in").mkdir()
    shutil.move("b.jsonl", "in/b.jsonl")
    (folder / "in" / "c.csv").write_text("text\nc0\n")
    assert texts("a.jsonl") == texts(str(folder / "a.jsonl")) == A
    assert texts(["a.jsonl", "in"]) == [*A, *B, "c0"]
    assert texts(str(folder)) == [*A, *B, "c0"]
    assert texts("in/*.csv") == ["c0"] and texts("**/*.jsonl") == [*A, *B]


def test_paths_are_absolute_so_that_a_run_goes_on_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    found = resolve(["a.jsonl", "~/b.jsonl@2", {"path": "*.jsonl", "weight": 0.5}])
    assert [source.path for source in found] == [str(folder / name) for name in ("a.jsonl", "b.jsonl", "*.jsonl")]
    assert [source.weight for source in found] == [1, 2, 0.5]
    assert resolve(found) == found


def test_of_a_source_the_first_rows_alone_can_be_taken(folder: Path) -> None:
    assert texts({"path": "a.jsonl", "max_rows": 2}) == ["a0", "a1"]
    assert texts({"path": "*.jsonl", "max_rows": 4}) == [*A, "b0"]
    assert texts({"path": "a.jsonl", "max_rows": 2, "weight": 2}) == ["a0", "a0", "a1", "a1"]
    assert texts({"path": "a.jsonl", "max_rows": 10**9}) == A
    with pytest.raises(InputError, match="max_rows 0 of this source is wrong"):
        resolve({"path": "a.jsonl", "max_rows": 0})


@pytest.mark.parametrize("weight", [0.3, 1, 2, 2.5])
def test_a_weight_is_how_often_a_row_is_taken(folder: Path, weight: float) -> None:
    (folder / "many.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(2000)))
    counts = Counter(texts(f"many.jsonl@{weight}"))
    assert {counts[str(n)] for n in range(2000)} == {int(weight), -int(-weight // 1)}
    assert counts.total() / 2000 == pytest.approx(weight, abs=0.0006)
    assert Counter(texts(f"many.jsonl@{weight}")) == counts
    if weight % 1:
        assert Counter(texts(f"many.jsonl@{weight}", seed=1)) != counts


def test_a_part_of_few_rows_is_as_large_as_the_weight_says_and_is_told(folder: Path) -> None:
    (folder / "few.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(100)))
    drawn = set()
    for seed in range(20):
        said: list[str] = []
        [source] = resolve("few.jsonl@0.3")
        found = [row["text"] for _, row in read_source(source, seed=seed, said=said)]
        assert len(found) == 30 and said == [f"{folder / 'few.jsonl'}@0.3: 30 of 100 rows"]
        drawn.update(found)
    assert len(drawn) > 95  # any row may be among them
    said = []
    assert len([*read_source(resolve("few.jsonl@2.25")[0], said=said)]) == 225
    assert said == [f"{folder / 'few.jsonl'}@2.25: 225 from 100 rows"]
    assert len([*read_source(resolve("few.jsonl@2")[0], said=said)]) == 200 and len(said) == 1


def test_a_file_that_is_called_like_a_weight_is_that_file(folder: Path) -> None:
    shutil.copy("a.jsonl", "a.jsonl@0.5")
    assert resolve("a.jsonl@0.5")[0].weight == 1 and texts("a.jsonl@0.5") == A


def test_what_is_in_a_folder_and_no_data_is_said(folder: Path) -> None:
    for name in ("README.md", "photo.png", ".hidden.jsonl"):
        (folder / name).write_text("x")
    said: list[str] = []
    assert texts(".", said=said) == [*A, *B]
    assert said == [f"Not read in {folder}: README.md and photo.png"]
    (folder / "notes").mkdir()
    (folder / "notes" / "one.md").write_text("# One\n\nText.\n")
    assert texts("notes") == ["# One\n\nText."]


def test_plain_text_is_divided_where_it_can_be(folder: Path) -> None:
    words = "\n\n".join("word " * n + "end." for n in range(1, 40))
    (folder / "book.txt").write_text(words)
    assert texts("book.txt") == [words]
    pieces = texts("book.txt", split_text=200)
    assert max(map(len, pieces)) <= 200 and len(pieces) > 10
    assert "".join("".join(pieces).split()) == "".join(words.split())
    assert all(piece.endswith(("end.", "word ")) for piece in pieces)


@pytest.mark.parametrize(
    ("encoding", "text", "said"),
    [
        ("utf-8", "Grüße, мир, 世界 🌍", None),
        ("utf-8-sig", "Grüße", None),
        ("utf-16", "Grüße, 世界", "in UTF-16"),
        ("utf-16-le", "plain words only, but two bytes each", "in UTF-16"),
        ("utf-16-be", "plain words only, but two bytes each", "in UTF-16"),
        ("utf-32", "Grüße", "in UTF-32"),
        ("cp1252", "Ça va – très bien, «merci»! Größe", "in Windows-1252"),
        ("cp1252", "naïve", "in Windows-1252"),
        ("gb18030", "今天天气很好，我们去公园散步吧。", "in GB18030"),
        ("gb18030", "The word 你好 means hello", "in GB18030"),
        ("cp1251", "Сегодня хорошая погода, и мы пойдём гулять в парк вместе с друзьями.", "cp1251"),
    ],
)
def test_encodings_are_found_and_said(folder: Path, encoding: str, text: str, said: str | None) -> None:
    (folder / "words.csv").write_bytes(f"text,n\n{text.replace(',', ';')},1\n".encode(encoding))
    told: list[str] = []
    assert texts("words.csv", said=told) == [text.replace(",", ";")]
    assert (said is None and not told) or (said is not None and said in told[0])
    assert texts("words.csv", encoding=encoding) == [text.replace(",", ";")]


def test_an_encoding_that_comes_late_in_a_file_is_found(folder: Path) -> None:
    (folder / "late.csv").write_bytes(b"text\n" + b"plain\n" * 600_000 + "très\n".encode("cp1252"))
    assert texts("late.csv")[-1] == "très"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found_among_texts_that_hold_the_others(folder: Path, delimiter: str) -> None:
    import csv

    rows = [["a; b, c | d\t e", f"line {n}\nand, more"] for n in range(20)]
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["text", "other"], *rows])
    assert [[row["text"], row["other"]] for _, row in read_source(resolve("t.csv")[0])] == rows


def test_excels_first_line_names_the_delimiter(folder: Path) -> None:
    (folder / "t.csv").write_text("sep=;\r\ntext;n\r\na,b,c;1\r\n")
    assert [row for row in read_source(resolve("t.csv")[0])] == [
        (f"{folder}/t.csv, row 1 (line 3)", {"text": "a,b,c", "n": "1"})
    ]


def test_standard_input_is_read_once_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_files, "_spooled", [])
    stream = io.TextIOWrapper(io.BytesIO(gzip.compress(b'{"text": "piped"}\n')))
    monkeypatch.setattr("sys.stdin", stream)
    assert texts("-") == texts("-") == ["piped"]
    assert fingerprint(resolve("-")[0]) == fingerprint(resolve("-")[0])


def test_folders_that_datasets_saved_are_read_with_their_splits(folder: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "s0"}, {"text": "s1"}])
    rows.save_to_disk("one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk("two")
    datasets.DatasetDict({"x": rows, "y": rows}).save_to_disk("three")
    assert texts("one") == texts("two") == ["s0", "s1"]
    assert texts({"path": "two", "split": "test"}) == ["s1"]
    with pytest.raises(InputError, match=r"several splits: x, y"):
        texts("three")
    with pytest.raises(InputError, match=r"no split 'tset' \(did you mean 'test'\?\): train, test"):
        texts({"path": "two", "split": "tset"})
    (folder / "two" / "train" / "state.json").write_text("{")
    with pytest.raises(InputError, match="no whole folder of datasets"):
        texts("two")


def test_hub_ids_are_told_from_paths() -> None:
    [source] = resolve("user/name:config@split")
    assert source == Source(path="user/name", config="config", split="split") and source.is_hub
    [source] = resolve("user/name@0.3")
    assert source == Source(path="user/name", weight=0.3)
    assert not resolve("user/name.jsonl")[0].is_hub and not resolve("./user/name")[0].is_hub
    assert not resolve("a.jsnol")[0].is_hub
    assert all(resolve(name) == [Source(**known.source)] for name, known in DATASETS.items())


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached_is_asked_once_and_the_libraries_look_into_their_cache_alone(
    monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    asked: list[str] = []
    seen: list[tuple[bool, bool]] = []

    def dataset_info(_: Any, name: str, **__: Any) -> None:
        asked.append(name)
        raise OSError("no network")

    def load_dataset(*_: Any, **__: Any) -> None:
        seen.append((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise ConnectionError("not in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    why = "is not asked, since HF_HUB_OFFLINE is set" if offline else r"cannot be reached \(no network\)"
    with pytest.raises(InputError, match=rf"no file or folder user/name, and the hub {why}; give a file, or a folder"):
        fingerprint(resolve("user/name")[0])
    assert asked == ([] if offline else ["user/name"]) and seen == [(True, True)]
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is offline


def test_what_goes_wrong_beside_the_network_is_not_told_as_a_matter_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fingerprint(resolve("user/name")[0])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "data is empty"),
        ([], "names nothing"),
        ("none.jsonl", "is not there"),
        ("a.jsonnl", r"is not there \(did you mean 'a.jsonl'\?\)"),
        ("none/", "is not there"),
        ("*.xyz", "No file is named like"),
        ("empty", "is empty"),
        ("pictures", r"holds only p.png; data files end in .jsonl"),
        ("pictures/p.png", "no kind of data file"),
        ({"weight": 2}, "has no path"),
        ({"path": "a.jsonl", "wieght": 2}, "'wieght' .did you mean 'weight'"),
        ("fifo", "is no regular file"),
        ("/dev/null", "is no regular file"),
        ("loop", "cannot be looked at .Too many levels of symbolic links"),
    ],
)
def test_what_is_no_data_is_told_in_one_sentence(folder: Path, given: Any, told: str) -> None:
    (folder / "empty").mkdir()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "p.png").write_bytes(b"\x89PNG")
    os.mkfifo("fifo")
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(InputError, match=told) as error:
        texts(given)
    assert "\n" not in str(error.value)


def test_wrong_options_of_data_are_told_with_their_name(folder: Path) -> None:
    for options, told in [
        ({"data": {"path": "a.jsonl", "weight": 0}}, "weight"),
        ({"data": "a.jsonl", "columns": "prompt"}, "prompt=question"),
        ({"data": "a.jsonl", "skip_bad_rows": "some"}, "skip_bad_rows"),
        ({"data": "a.jsonl", "eval_share": 1}, "eval_share"),
        ({"data": [{"path": "a.jsonl", "split_txt": 1}]}, "split_text"),
    ]:
        with pytest.raises(InputError, match=told):
            DataOptions.from_yaml(None, {"model": "m"} | options)


def test_every_byte_counts_for_the_fingerprint(folder: Path) -> None:
    found = {fingerprint(source) for source in resolve(["a.jsonl", "b.jsonl", "a.jsonl@2", "."])}
    assert len(found) == 4
    before = fingerprint(resolve(".")[0])
    (folder / "c.jsonl").write_text("{}")
    assert fingerprint(resolve(".")[0]) != before


def test_a_torn_row_is_a_bad_row_and_the_others_are_read(folder: Path) -> None:
    (folder / "torn.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": "c"}\n{"te')
    rows = [row for _, row in read_source(resolve("torn.jsonl")[0])]
    assert [row if isinstance(row, dict) else row.kind for row in rows] == [
        {"text": "a"}, "not JSON", {"text": "c"}, "not JSON"
    ]  # fmt: skip
    array = json.dumps([{"text": "x" * 50}] * 1000)
    (folder / "torn.json").write_text(array[: len(array) // 2])
    rows = [row for _, row in read_source(resolve("torn.json")[0])]
    whole = array[: len(array) // 2].count("}")
    assert rows[:-1] == [{"text": "x" * 50}] * whole
    assert isinstance(rows[-1], BadRow) and f"{whole:,} rows before it are whole" in str(rows[-1])
