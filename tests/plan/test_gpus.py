"""Cards by name, and the formula of GPUs against what others have published."""

import statistics

import pytest

from halfbyte.errors import InputError
from halfbyte.plan import published
from halfbyte.plan.gpus import OURS, card_named, gpu_parts, longest_on


@pytest.mark.parametrize(
    ("text", "name"),
    [("RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("nvidia-a100-80gb", "A100 80GB"), ("l40s", "L40S")],
)
def test_a_card_is_found_however_it_is_written(text: str, name: str) -> None:
    assert card_named(text).name == name


def test_a_card_can_be_described_by_its_sheet() -> None:
    card = card_named("20 GB, 100 TFLOPS, 700GB/s")
    assert (card.memory, card.tflops, card.bandwidth, card.confirmed) == (20, 100, 700, False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("RTX 4080", r"no card 'RTX 4080' in the table \(did you mean 'RTX 40\d0.*'\?\).*as 24GB,165TFLOPS"),
        ("A100", r"several cards 'A100': say A100 40GB or A100 80GB\."),
        ("abacus", r"no card 'abacus' in the table, which has T4.*describe another"),
    ],
)
def test_a_card_that_is_not_known_is_told_with_the_nearest(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        card_named(text)


def test_published_memory_is_met_within_an_eighth_and_mostly_within_a_twentieth() -> None:
    off = [residual for _, residual in published.residuals()]
    assert max(map(abs, off)) < 0.13
    assert statistics.median(map(abs, off)) < 0.06


def test_a_longest_pass_is_the_largest_that_fits() -> None:
    shape = published.llama("8B")
    ranks = published.everywhere(shape, 32)
    tokens = longest_on(24e9, shape, ranks)
    assert sum(gpu_parts(shape, ranks, tokens, OURS).values()) <= 24e9
    assert sum(gpu_parts(shape, ranks, tokens + 1, OURS).values()) > 24e9
    assert longest_on(1e9, shape, ranks) == 0


def test_the_paper_s_models_fit_the_paper_s_cards() -> None:
    assert "33B" in published.fitting(24)
    assert "65B" in published.fitting(48)
    assert "65B" not in published.fitting(24)
