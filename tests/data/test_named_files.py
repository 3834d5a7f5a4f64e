"""Folders, patterns, splits and links: which files a name means, and that what is in the way is told."""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from halfbyte.data import hub, named_files
from halfbyte.data.named_files import SPLITS, files_of
from halfbyte.data.sources import fingerprint, read_source, resolve
from halfbyte.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | None = None) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(f'{{"text": "{name}"}}\n' if content is None else content)


def texts(given: Any, said: list[str] | None = None, **options: Any) -> list[str]:
    return [row["text"] for source in resolve(given) for _, row in read_source(source, said=said, **options)]


def test_the_words_for_splits_are_those_of_datasets() -> None:
    theirs = {word: str(split) for split, words in datasets.data_files.SPLIT_KEYWORDS.items() for word in words}
    assert theirs == SPLITS


def test_a_folder_like_those_of_the_hub_is_read_without_what_is_about_it(folder: Path) -> None:
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"):
        write(f"repo/{name}")
    for about in ("README.md", "dataset_infos.json", ".gitattributes", ".git/x.json", "data/._train.jsonl", "a.png"):
        write(f"repo/{about}", "{}")
    said: list[str] = []
    assert texts("repo", said) == [f"repo/data/train-0000{n}-of-00002.jsonl" for n in range(2)]
    assert said == [f"Not read in {folder}/repo: README.md and a.png"]


def test_splits_of_a_folder_are_said_and_can_be_taken_alone(folder: Path) -> None:
    for name in ("train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "dev.jsonl", "extra-easy.jsonl"):
        write(f"d/{name}")
    said: list[str] = []
    assert len(texts("d", said)) == 5
    assert said == [f"All splits in {folder}/d are read: validation, test and train (one alone: d@train)"]
    assert texts("d@train") == texts({"path": "d", "split": "training"}) == ["d/train/a.jsonl", "d/train/b.jsonl"]
    assert texts("d@validation") == texts("d@dev") == ["d/dev.jsonl"]
    assert texts("d@easy") == ["d/extra-easy.jsonl"]
    assert texts("d@train@2") == [name for name in ("d/train/a.jsonl", "d/train/b.jsonl") for _ in range(2)]
    with pytest.raises(InputError, match=r"no split 'trian' \(did you mean 'train'\?\); it has validation, test and"):
        texts("d@trian")
    with pytest.raises(InputError, match="tell none"):
        write("e/a.jsonl")
        texts("e@train")
    assert len({fingerprint(resolve(name)[0]) for name in ("d", "d@train", "d@test")}) == 3


def test_a_split_of_a_saved_folder_is_named_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_opened", {})
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk("saved")
    assert texts("saved@test") == ["b"] and texts("saved@train@2") == ["a", "a", "b", "b"]


def test_what_cannot_have_a_split_or_a_configuration_is_told() -> None:
    write("a.jsonl")
    for given, told in (
        ({"path": "a.jsonl", "split": "train"}, "is no folder, so it has no split 'train'"),
        ({"path": "*.jsonl", "split": "train"}, "is no folder"),
        ({"path": "a.jsonl", "config": "en"}, "only data sets of the hub"),
        ("a.jsonl@half", "how often a row is taken"),
        ("a.jsonl@-1", "how often a row is taken"),
    ):
        with pytest.raises(InputError, match=told):
            texts(given)


def test_every_file_is_read_once_whatever_links_lead_to_it(folder: Path) -> None:
    write("d/in/a.jsonl")
    (folder / "d" / "in" / "back").symlink_to(folder / "d")
    (folder / "d" / "b.jsonl").symlink_to(folder / "d" / "in" / "a.jsonl")
    write("elsewhere/c.jsonl")
    (folder / "d" / "out").symlink_to(folder / "elsewhere")
    assert texts("d") == ["d/in/a.jsonl", "elsewhere/c.jsonl"]
    assert texts("d/**/*.jsonl") == ["d/in/a.jsonl", "elsewhere/c.jsonl"]
    (folder / "gone.jsonl").symlink_to(folder / "nothing")
    with pytest.raises(InputError, match="is a link to nothing"):
        texts("gone.jsonl")


def test_files_without_an_ending_are_data_if_nothing_else_is() -> None:
    write("out/part-0000")
    write("out/part-0001")
    write("out/_SUCCESS", "")
    said: list[str] = []
    assert texts("out", said) == ["out/part-0000", "out/part-0001"]
    assert said and "_SUCCESS" in said[0]
    write("out/x.jsonl")
    assert texts("out") == ["out/x.jsonl"]


def test_a_folder_may_be_called_like_a_file_and_a_file_like_a_pattern() -> None:
    write("d.jsonl/a.jsonl")
    write("[x].jsonl")
    write("-")
    assert texts("d.jsonl") == ["d.jsonl/a.jsonl"] and texts("[x].jsonl") == ["[x].jsonl"] and texts("./-") == ["-"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("sbu/train.jsonl", r"is not there \(did you mean 'sub'\?\)"),
        ("sbu/train", r"is not there \(did you mean 'sub'\?\)"),  # looks like a hub id, but is nearly sub/train.jsonl
        ("sub/trian", r"is not there \(did you mean 'train.jsonl'\?\)"),
        ("alpcaa", r"no data set 'alpcaa' of QLoRA's paper \(did you mean 'alpaca'\?\)"),
        ("x" * 5000, r"File name too long"),
        ("a\0b", "is not there"),
        ("*.jsnol", "No file is named like"),
        ("su?", "Only folders are named like"),
        (None, "None is no name of data"),
        (5, "5 is no name of data"),
        ([["a.jsonl"]], "is no name of data"),
        ({"path": ["a.jsonl"]}, "is no name of data"),
        ({"path": "sub", "weight": "x"}, "weight 'x' of this source is wrong"),
        ("sub@0", "weight 0.0 of this source is wrong"),
        ("sub@1001", "weight"),
        ("fifo", "is no regular file .a pipe can be given as -"),
        ("/dev/zero", "is no regular file"),
    ],
)
def test_what_is_in_the_way_is_told_at_once_by_reading_and_by_looking_for_changes(given: Any, told: str) -> None:
    write("sub/train.jsonl")
    os.mkfifo("fifo")
    for look in (lambda source: list(read_source(source)), fingerprint):
        with pytest.raises(InputError, match=told) as error:
            for source in resolve(given):
                look(source)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700


AS_NOBODY = """
import os, sys
from halfbyte.data.sources import fingerprint, read_source, resolve
from halfbyte.errors import InputError
import halfbyte.data.trees, xxhash
if os.getuid() == 0:
    os.setuid(65534)
for name in sys.argv[1:]:
    for look in (fingerprint, lambda source: list(read_source(source))):
        try:
            for source in resolve(name):
                look(source)
        except InputError as error:
            print(error)
"""


def test_what_may_not_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        os.chmod(place, 0o755)
        monkeypatch.chdir(place)
        write("closed/a.jsonl")
        write("secret.jsonl")
        write("partly/a.jsonl")
        write("partly/in/a.jsonl")
        for name in ("closed", "secret.jsonl", "partly/in"):
            os.chmod(name, 0)
        names = [f"{place}/{name}" for name in ("closed/a.jsonl", "closed", "secret.jsonl", "partly", "closed/*.jsonl")]
        try:
            done = subprocess.run([sys.executable, "-c", AS_NOBODY, *names], capture_output=True, text=True, check=True)
        finally:
            for name in ("closed", "secret.jsonl", "partly/in"):
                os.chmod(name, 0o755)
            monkeypatch.undo()
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(names) and all("Permission denied" in line for line in lines), done.stdout


def test_a_weight_takes_whole_trees_of_messages() -> None:
    """A tree's messages are rows of their own: drawn one by one they would be torn trees."""
    lines = []
    for tree in range(200):
        for name, parent, role in (("q", None, "prompter"), ("a", "q", "assistant")):
            above = f'"{parent}{tree}"' if parent else "null"
            lines.append(
                f'{{"message_id": "{name}{tree}", "parent_id": {above}, "text": "x", "role": "{role}", '
                f'"message_tree_id": "q{tree}"}}'
            )
    write("trees.jsonl", "\n".join(lines))
    for weight, count in ((0.5, 100), (2, 400)):
        rows = [row for _, row in read_source(resolve(f"trees.jsonl@{weight}")[0])]
        assert abs(len(rows) - count) <= (40 if weight < 1 else 0)
        assert all(len(row["prompt"]["replies"]) == 1 for row in rows)


def test_without_contents_a_fingerprint_sees_size_and_time_alone(folder: Path) -> None:
    write("a.jsonl", "one\n")
    [source] = resolve("a.jsonl")
    quick, whole = fingerprint(source, contents=False), fingerprint(source)
    before = (folder / "a.jsonl").stat()
    write("a.jsonl", "two\n")
    os.utime("a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(source, contents=False) == quick and fingerprint(source) != whole
    os.utime("a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert fingerprint(source, contents=False) != quick


def test_standard_input_is_called_so_and_has_one_fingerprint_in_every_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for _ in range(2):
        monkeypatch.setattr(named_files, "_spooled", [])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n')))
        [source] = resolve("-")
        assert [where for where, _ in read_source(source)] == ["standard input, row 1 (line 1)"]
        found.append(fingerprint(source))
    assert found[0] == found[1]


def test_a_standard_input_that_is_empty_closed_or_too_large_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(stream: Any) -> str:
        monkeypatch.setattr(named_files, "_spooled", [])
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(InputError) as error:
            texts("-")
        return str(error.value)

    class Full(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(28, "No space left on device")

    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    assert given(io.TextIOWrapper(io.BytesIO())) == "standard input holds no rows."
    assert "is closed" in given(None) and "is closed" in given(closed)
    assert "No space left on device); set TMPDIR" in given(io.TextIOWrapper(Full()))


def test_files_of_names_what_it_finds_in_the_order_of_paths(folder: Path) -> None:
    for name in ("b/x.csv", "a/y.jsonl", "c.parquet", "z.txt"):
        write(f"d/{name}", "")
    found = files_of(str(folder / "d"))
    assert [str(file.relative_to(folder / "d")) for file in found.files] == ["a/y.jsonl", "b/x.csv", "c.parquet"]
    assert found.said == [f"Not read in {folder}/d: z.txt"]


def test_a_data_set_of_the_hub_that_is_damaged_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from ValueError("no such column\nx")

    monkeypatch.setattr(hub, "_opened", {})
    monkeypatch.setattr(hub, "reason_without", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(InputError, match="The data set user/name cannot be read: no such column"):
        texts("user/name")
