"""Whatever a browser names lies in the folders of the page, or is refused."""

from pathlib import Path

import pytest

from halfbyte.deploy.ui.places import Outside, Places, safe_name, uploaded_name
from halfbyte.errors import InputError


@pytest.fixture
def places(tmp_path: Path) -> Places:
    (tmp_path / "root" / "runs" / "one").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "rootlike").mkdir()
    return Places([tmp_path / "root"])


@pytest.mark.parametrize("name", ["runs/one", "./runs/one", "runs/two/../one", "runs/new"])
def test_what_lies_inside_is_found(places: Places, name: str) -> None:
    found = places.inside(name)
    assert found.is_relative_to(places.roots[0]) and places.inside(found) == found


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "runs/../../secret",
        "/etc/passwd",
        "~root/x",
        "~/x",
        "../rootlike",
        "a\0b",
        "",
        "  ",
        "runs/link/x",
        "runs/link",
        "/proc/self/root/etc",
        "x" * 5000,
    ],
)
def test_what_lies_elsewhere_is_refused(places: Places, name: str, tmp_path: Path) -> None:
    (places.runs / "link").symlink_to(tmp_path / "secret")
    with pytest.raises((Outside, OSError)) as refused:
        found = places.inside(name)
        assert not found.exists()  # too long a name is none
        raise Outside("")
    assert "secret" not in str(refused.value) or name in str(refused.value)


def test_what_a_browser_sent_is_data_and_nothing_else(places: Places) -> None:
    for folder in (places.uploads / "0123", places.jobs / "one", places.arriving):
        folder.mkdir(parents=True)
    (places.roots[0] / "link").symlink_to(places.own)
    sent = places.uploads / "0123" / "config.yaml"
    for name in (sent, ".halfbyte-ui/uploads/0123", "link/uploads/0123", places.jobs / "one", ".halfbyte-ui"):
        with pytest.raises(Outside):
            places.inside(name)
    assert places.inside(sent, sent=True) == sent
    with pytest.raises(Outside):
        places.inside(places.jobs / "one", sent=True)


@pytest.mark.parametrize("name", ["a", "My run 1", "电影评论", "naïve-é", "x_y.z"])
def test_names_that_can_be_folders(name: str) -> None:
    assert safe_name(f" {name} ") == name


@pytest.mark.parametrize(
    "name", ["", " ", ".hidden", "..", "a/b", "a\\b", "a\nb", "<b>", 'a"b', "x" * 101, "a\0", "\u202eabc"]
)
def test_names_that_cannot(name: str) -> None:
    with pytest.raises(InputError, match="cannot be a name"):
        safe_name(name)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\rows.csv", "rows.csv"),
        ("", "data"),
        ('a"<b>|.csv', "ab.csv"),
        ("..", "data"),
        ("😀.json", "😀.json"),
        (".hidden.txt", "hidden.txt"),
    ],
)
def test_a_file_that_is_sent_keeps_its_name_as_far_as_it_is_one(given: str, kept: str) -> None:
    assert uploaded_name(given) == kept


def test_a_long_name_keeps_its_ending() -> None:
    assert uploaded_name("数据" * 100 + ".jsonl").endswith(".jsonl") and len(uploaded_name("x" * 500 + ".csv")) <= 100


def test_a_root_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        Places([tmp_path / "file"])
