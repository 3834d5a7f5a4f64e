"""Names and sizes in sentences."""

import pytest

from halfbyte.errors import nearest, size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (-5, "0 B"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1024, "1.00 KiB"),
        (10**9, "954 MiB"),
        (2**30, "1.00 GiB"),
        (int(9.996 * 2**30), "10.0 GiB"),
        (int(99.96 * 2**30), "100 GiB"),
        (5 * 2**40, "5,120 GiB"),
    ],
)
def test_sizes_have_three_digits(count: int, text: str) -> None:
    assert size_text(count) == text


def test_the_nearest_name_is_suggested_if_there_is_one() -> None:
    assert nearest("lora_alhpa", ["lora_alpha", "rank"]) == " (did you mean 'lora_alpha'?)"
    assert nearest("zzz", ["lora_alpha", "rank"]) == ""
