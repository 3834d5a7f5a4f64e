"""Which errors mean that the disk is full."""

import errno
import os

import pytest
from safetensors import SafetensorError

from halfbyte.files import disk_full


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_recognised_by_number_and_in_the_text_of_safetensors(number: int) -> None:
    assert disk_full(OSError(number, os.strerror(number), "file"))
    assert disk_full(SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"))


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), SafetensorError("(os error 2)"), ValueError("28")])
def test_no_other_error_is_taken_for_one(error: Exception) -> None:
    assert not disk_full(error)
