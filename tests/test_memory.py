"""What there is to take and what was taken, against the system's own numbers and made-up control groups."""

import numpy as np
import psutil
import pytest

from halfbyte import memory

V2_HIERARCHY = {"memory.max": "max\n", "a/memory.max": "3000\n", "a/b/memory.max": "max\n"}
V1_HIERARCHY = {"memory/memory.limit_in_bytes": "9000\n", "memory/a/b/memory.limit_in_bytes": "5000\n"}


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/a/b\n", V2_HIERARCHY, 3000),
        ("0::/\n", {"memory.max": "700\n"}, 700),
        ("0::/other\n", V2_HIERARCHY, None),
        ("9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n", V1_HIERARCHY, 5000),
        ("4:memory:/not/mounted/here\n", V1_HIERARCHY, 9000),
        ("4:cpu:/a/b\n", V1_HIERARCHY, None),
        ("", V2_HIERARCHY, None),
    ],
)
def test_the_lowest_limit_on_the_way_to_the_root_counts(tmp_path, membership, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.cgroup_memory_limit(membership, tmp_path) == limit


def test_anonymous_memory_grows_by_what_is_allocated_and_touched():
    before = memory.anonymous_memory()
    block = np.ones(2**27, dtype=np.uint8)
    grown = memory.anonymous_memory() - before
    assert block.nbytes * 0.9 < grown < block.nbytes * 1.5


def test_what_is_free_is_less_than_the_machine_has():
    assert 0 < memory.free_memory() < psutil.virtual_memory().total


def test_resident_memory_is_what_the_system_says_and_has_mapped_files_in_it(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(2**26))
    before = memory.resident_memory()
    mapped = np.memmap(file, np.uint8, "r")
    assert int(mapped.sum()) == 0
    now = memory.resident_memory()
    assert 0.9 * 2**26 < now - before < 1.5 * 2**26
    assert now == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
