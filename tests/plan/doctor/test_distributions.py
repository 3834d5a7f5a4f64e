"""Installations that are really broken: folders of distributions as pip leaves them, and what is said of each."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from halfbyte.plan.doctor import distributions
from halfbyte.plan.doctor.finding import Finding

ROOT = ["torch>=2.7", "peft>=0.21,<0.22", "ray>=2; extra == 'ray'", "old; python_version < '3'"]


def install(home: Path, name: str, version: str, requires: Sequence[str] = (), files: Sequence[str] = ()) -> None:
    """Put a distribution into a folder, with its files and their sizes."""
    folder = home / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {one}" for one in requires),
    ]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    record = []
    for file in files:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text("x = 1\n")
        record.append(f"{file},sha256=x,6")
    (folder / "RECORD").write_text("\n".join([*record, f"{folder.name}/RECORD,,"]) + "\n")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    install(tmp_path, "halfbyte", "0.2.0", ROOT)
    install(tmp_path, "torch", "2.9.0", ["sympy>=1.13"], ["torch/__init__.py", "torch/nn.py"])
    install(tmp_path, "sympy", "1.14")
    install(tmp_path, "peft", "0.21.2", ["torch>=1.13", "accelerate[extras]>=1"], ["peft/__init__.py"])
    install(tmp_path, "accelerate", "1.12", ["rich; extra == 'extras'"])
    install(tmp_path, "rich", "13")
    return tmp_path


def bad(home: Path) -> list[Finding]:
    return [finding for finding in distributions.check([str(home)]) if finding.level != "ok"]


def remove(home: Path, name: str) -> None:
    [folder] = home.glob(f"{name}-*.dist-info")
    folder.rename(home / f"{name}.gone")


def test_a_whole_installation_is_well_and_versions_are_told(home: Path):
    assert bad(home) == []
    assert Finding("torch", "2.9.0") in distributions.check([str(home)])


@pytest.mark.parametrize(
    ("name", "owner", "wish"),
    [("torch", "halfbyte", "torch>=2.7"), ("sympy", "torch", "sympy>=1.13"), ("rich", "accelerate", "rich")],
)
def test_what_is_missing_is_told_however_far_down_it_is_needed(home: Path, name: str, owner: str, wish: str):
    remove(home, name)
    [finding] = bad(home)
    assert (finding.what, finding.level, finding.fix) == (name, "fault", f"pip install '{wish}'")
    assert finding.value == f"is not installed, and {owner} needs {wish}"


def test_a_version_that_halfbyte_was_not_made_for_is_a_fault_and_one_further_down_a_warning(home: Path):
    remove(home, "peft")
    install(home, "peft", "0.20.0", ["torch>=1.13"])
    [finding] = bad(home)
    assert (finding.what, finding.level) == ("peft", "fault")
    assert finding.value == "is 0.20.0, and halfbyte needs peft<0.22,>=0.21"
    remove(home, "sympy")
    install(home, "sympy", "1.12")
    assert [(one.what, one.level) for one in bad(home)] == [("peft", "fault"), ("sympy", "warning")]


def test_an_optional_library_counts_only_where_it_is_there(home: Path):
    install(home, "ray", "1.13")
    [finding] = bad(home)
    assert (finding.what, finding.level) == ("ray", "warning")


def test_files_that_are_gone_or_cut_off_are_named(home: Path):
    (home / "torch/nn.py").unlink()
    [finding] = bad(home)
    assert (finding.what, finding.level) == ("files", "fault")
    assert finding.value == "1 file of torch not there (torch/nn.py)"
    assert finding.fix == "pip install --force-reinstall --no-deps torch==2.9.0"
    (home / "torch/nn.py").write_text("x = 1\n")
    (home / "peft/__init__.py").write_text("x =")
    [finding] = bad(home)
    assert finding.level == "warning" and "1 file of peft of another size" in finding.value


def test_two_versions_in_one_folder_and_pip_s_leftovers_are_told(home: Path):
    install(home, "peft", "0.19.0")
    (home / "~orch").mkdir()
    found = {finding.what: finding for finding in bad(home)}
    assert "0.19.0 and 0.21.2" in found["installed twice"].value
    assert found["leftovers"].fix == f"rm -r {home / '~orch'}"


def test_a_file_that_stands_before_a_library_is_told(home: Path, tmp_path_factory: pytest.TempPathFactory):
    here = tmp_path_factory.mktemp("here")
    (here / "torch.py").write_text("")
    found = [one for one in distributions.check([str(here), str(home)]) if one.level != "ok"]
    assert [one.what for one in found] == ["shadowed"]
    assert str(here / "torch.py") in found[0].value


def test_a_folder_of_sources_without_metadata_is_told(tmp_path: Path):
    [finding] = bad(tmp_path)
    assert (finding.what, finding.level) == ("halfbyte", "note")
