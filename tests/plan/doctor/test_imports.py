"""Libraries that really fail when they are imported, in a process of their own."""

from pathlib import Path

import pytest

from halfbyte.plan.doctor.imports import SELF_TEST, Imported, Trial, check, runtimes

BROKEN = {
    "fails": ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashes Python (SIGSEGV)"),
    "ends": ("import os; os._exit(3)", "it ends Python (code 3)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_cannot_be_imported_is_told_with_its_reason(name: str, tmp_path: Path):
    source, reason = BROKEN[name]
    (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "talks.py").write_text("print('[1]'); print('hello')")
    imported = Trial(["talks", name], [str(tmp_path)], "").result()
    assert imported.errors == {name: reason}
    [finding] = check(imported)
    assert finding.level == "fault" and finding.value == f"import {name} fails: {reason}"
    assert not list(tmp_path.rglob("*.pyc"))


def test_one_that_does_not_come_back_is_ended(tmp_path: Path):
    (tmp_path / "waits.py").write_text("import time; time.sleep(600)")
    assert "did not come back" in Trial(["waits"], [str(tmp_path)]).result(patience=0.5).errors["waits"]


def test_what_can_be_imported_is_well_and_torch_s_runtime_is_seen():
    imported = Trial(["torch"], self_test="").result()
    assert imported.errors == {}
    assert any("libtorch" in file for file in imported.files)


def test_kernels_that_end_the_process_are_told_and_the_imports_before_them_are_known(tmp_path: Path):
    (tmp_path / "kernels_of_mine.py").write_text(
        "import os, signal\ndef found():\n    os.kill(os.getpid(), signal.SIGILL)\n"
    )
    imported = Trial(["json"], [str(tmp_path)], "kernels_of_mine").result()
    assert imported.errors == {"kernels_of_mine": "it crashes Python (SIGILL)"} and imported.files
    [finding] = check(Imported({SELF_TEST: "it crashes Python (SIGILL)"}))
    assert (finding.what, finding.level) == ("self-test", "fault") and "HALFBYTE_ISA=scalar" in finding.fix


def test_two_openmp_runtimes_are_told_and_of_two_kinds_more_earnestly():
    one, same, other = "/a/torch/lib/libgomp-abc.so.1", "/b/libgomp.so.1", "/c/libiomp5.so"
    assert [finding.level for finding in runtimes([one, "/x/libc.so.6"])] == ["ok"]
    assert [finding.level for finding in runtimes([one, same])] == ["note"]
    [finding] = runtimes([one, other])
    assert finding.level == "warning" and one in finding.value and other in finding.value
    assert list(runtimes([])) == []
