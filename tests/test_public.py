"""The public surface is a list, each name on it is there, and importing the package costs nothing."""

import subprocess
import sys

import pytest

import halfbyte


def test_every_public_name_is_there_and_the_list_is_sorted() -> None:
    assert halfbyte.__all__ == sorted(halfbyte.__all__)
    for name in halfbyte.__all__:
        assert getattr(halfbyte, name) is not None
        assert name in dir(halfbyte)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'halfbyte' has no attribute 'lood'"):
        _ = halfbyte.lood


def test_packages_are_attributes_and_torch_comes_when_it_is_needed() -> None:
    program = (
        "import sys, halfbyte; assert 'torch' not in sys.modules; halfbyte.InputError; "
        "assert 'torch' not in sys.modules; assert halfbyte.quant.codebook('nf4')[7] == 0; "
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
