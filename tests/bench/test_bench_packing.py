"""The benchmark of packing at tiny sizes: that its sides take the same steps, and what is reported of them."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from rich.console import Console

from halfbyte.bench import packing, shapes
from halfbyte.bench.packing_report import FULL, PackedSide, PackingReport, PackingRow
from halfbyte.bench.report import Circumstances

TINY = (128, 192, 2, 4, 2, 32, 300)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Leave the libraries' logging as it was: a side silences it."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def test_the_steps_that_are_measured_are_spread_over_an_epoch_sorted_by_length() -> None:
    group, steps = 4, 5
    lengths = packing.instruction_lengths(4 * packing.EPOCH * group, 512)
    assert min(lengths) >= packing.LEAST and max(lengths) <= 512
    assert sorted(lengths)[len(lengths) // 2] == pytest.approx(packing.MEDIAN, rel=0.1)
    taken = packing.spread_steps(lengths, group, steps)
    whole = [taken[first : first + group] for first in range(0, len(taken), group)]
    assert len(whole) == packing.WARM_UP + steps
    counted = sorted(sum(step) for step in whole[packing.WARM_UP :])
    assert all(sum(step) >= counted[-1] for step in whole[: packing.WARM_UP])
    assert counted[0] < counted[-1] / 4  # short steps as well as long ones
    assert sum(counted) / steps == pytest.approx(group * sum(lengths) / len(lengths), rel=0.25)


def test_ratios_are_taken_round_by_round() -> None:
    def side(seconds: list[float], processor: list[float]) -> PackedSide:
        return PackedSide(seconds=seconds, processor_seconds=processor, losses=[1.0], passes=[1, 1], peak_bytes=None)

    circumstances = Circumstances(
        machine="m", cores=2, memory_gib=1, load=0, tier="scalar", arithmetic="a", threads=1, versions={}, date="2026",
        commit=None, changed=False,
    )  # fmt: skip
    full = PackingRow(name=FULL, tokens=[100, 100], padded_tokens=[100, 100], sides={"padded": side([1, 2], [2, 2])})
    sides = {"packed": side([0.5, 1.0], [1, 1]), "padded": side([1.0, 1.5], [2, 2])}
    short = PackingRow(name="short", tokens=[50, 25], padded_tokens=[60, 60], sides=sides)
    report = PackingReport(
        circumstances=circumstances, model="m", batch=2, accumulation=1, length=50, rank=1, rows=[full, short]
    )
    assert full.gain is None and short.gain is not None and short.gain.median == pytest.approx((2 + 1.5) / 2)
    assert report.of_full["short"]["packed"].median == pytest.approx((100 / 100 + 25 / 50) / 2)
    assert report.of_full_by_processor["short"]["padded"].median == pytest.approx((25 / 50 + 12.5 / 50) / 2)


@pytest.mark.slow
def test_packed_and_padded_sides_take_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    shapes.write_model("tiny", tmp_path / "model")
    report = packing.bench_packing(
        str(tmp_path / "model"), batch=2, accumulation=2, length=300, rank=4, steps=2, threads=1
    )
    full, *rows = report.rows
    assert full.name == FULL and [*full.sides] == ["padded"] and full.tokens == [4 * 300] * 2
    for row in rows:
        packed, padded = row.sides["packed"], row.sides["padded"]
        assert packed.losses == pytest.approx(padded.losses, rel=2e-3)  # bf16
        assert len(packed.losses) == packing.WARM_UP + 2 and len(packed.seconds) == 2
        assert all(each > 0 for each in packed.processor_seconds)
        assert sum(packed.passes) < sum(padded.passes) == 4
        assert all(tokens <= more for tokens, more in zip(row.tokens, row.padded_tokens, strict=True))
    report.write(tmp_path)
    assert json.loads((tmp_path / "packing.json").read_text())["of_full"].keys() == {row.name for row in rows}
    Console(file=io.StringIO(), width=200).print(report.table())
