"""The kernel benchmark at tiny sizes: what it measures, what it reports, what it writes."""

import itertools
import json
import os
import statistics
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from halfbyte import bench, cli, optim
from halfbyte.bench import measure, roofline
from halfbyte.bench.measure import Ring
from halfbyte.bench.report import Circumstances, Report, Row
from halfbyte.bench.works import adamw, dequantize, forward, gradient, quantize
from halfbyte.errors import InputError
from halfbyte.kernels import native, use_provider
from halfbyte.quant import quantize_4bit

MANY = [(100, 100), (8, 100), (64, 128)]
WORKS = [
    forward(3, 128, 64),
    forward(70, 64, 128),
    gradient(33, 96, 128),
    quantize(64, 130),
    dequantize(100, 128),
    adamw("three tensors", MANY),
]
SIDES = {
    "forward": {"halfbyte", "bitsandbytes", "bf16", "fp32"},
    "dx": {"halfbyte", "bitsandbytes", "bf16", "fp32"},
    "quantize": {"halfbyte", "bitsandbytes"},
    "dequantize": {"halfbyte", "bitsandbytes", "bf16"},
    "AdamW 8-bit": {"halfbyte", "bitsandbytes", "fp32"},
}


@pytest.fixture(scope="module", autouse=True)
def _short_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SAMPLE", 0.0005)
        patch.setattr(measure, "PAUSE", 0.0)
        patch.setattr(measure, "RING_CALLS", 2)
        patch.setattr(measure, "RING_BYTES", 2**20)
        yield


@pytest.fixture(scope="module")
def report(_short_samples) -> Report:
    return bench.bench_kernels(WORKS, rounds=3)


def row(seconds: dict[str, list[float]], flop: int = 1, size: int = 1) -> Row:
    rounds = len(seconds["halfbyte"])
    return Row(
        operation="forward", size="", flop=flop, bytes=size, settings={}, seconds=seconds,
        peak_flops=[1000.0] * rounds, copy_bandwidth=[10.0] * rounds,
    )  # fmt: skip


def test_the_works_are_those_of_the_contract():
    names = [work.name for work in bench.kernel_works()]
    large, small = ("4096×4096", "11008×4096"), ("576×576", "1536×576", "576×1536")
    expected = [f"forward {m}×{shape}" for shape in large for m in (1, 4, 16, 64, 512, 2048)]
    expected += [f"forward 2048×{shape}" for shape in small]
    expected += [f"dx 2048×{shape}" for shape in (*large, *small)]
    expected += [f"{operation} {shape}" for operation in ("quantize", "dequantize") for shape in large]
    expected += ["AdamW 8-bit one tensor, 4.2 M", "AdamW 8-bit 420 LoRA tensors, 4.9 M"]
    assert names == expected
    assert {work.operation for work in bench.kernel_works(quick=True)} == {work.operation for work in WORKS}


def test_every_work_is_measured_on_every_side_in_every_round(report):
    assert [row.size for row in report.rows] == [work.size for work in WORKS]
    for row in report.rows:
        assert row.seconds.keys() == SIDES[row.operation]
        assert {len(times) for times in [*row.seconds.values(), row.peak_flops, row.copy_bandwidth]} == {3}
        assert all(second > 0 for times in row.seconds.values() for second in times)
    assert report.rows[0].settings["bitsandbytes"] in ("training path", "evaluation path")


@pytest.mark.parametrize("work", WORKS[:2], ids=lambda work: work.name)
def test_the_sides_of_a_product_compute_the_same(work):
    results = {name: [call() for call in side.calls] for name, side in work.sides().items()}
    for name, bound in (("bitsandbytes", 1e-2), ("bf16", 0.15), ("fp32", 0.15)):  # dense: less what 4 bits cost
        for ours, theirs in zip(results["halfbyte"], itertools.cycle(results[name])):
            assert torch.linalg.norm(theirs.float() - ours.float()) < bound * torch.linalg.norm(ours.float())
    assert results["halfbyte"][0].shape == tuple(int(n) for n in work.size.split("×"))[:2]


def test_the_sides_of_a_gradient_and_of_both_conversions_compute_the_same():
    torch.manual_seed(1)
    for work in (gradient(33, 96, 128), dequantize(96, 128)):
        results = {name: side.calls[0]() for name, side in work.sides().items()}
        ours, theirs = (results[name] for name in ("halfbyte", "bitsandbytes"))
        assert len(results) == len(SIDES[work.operation])
        if work.operation == "dequantize":
            assert torch.linalg.norm(theirs.float() - ours.float()) < 1e-2 * torch.linalg.norm(ours.float())
            assert torch.linalg.norm(results["bf16"] - ours) < 0.15 * torch.linalg.norm(ours)
        else:
            assert ours[0].shape == theirs[0].shape == (33, 128)
    ours, (theirs, _) = (side.calls[0]() for side in quantize(64, 128).sides().values())
    assert torch.equal(ours.packed, theirs)


def test_counts_of_a_product_are_those_of_its_tensors():
    work = forward(3, 130, 66)
    weight = quantize_4bit(torch.randn(130, 66))
    stored = [weight.packed, weight.statistics.absmax, weight.statistics.nested.absmax]
    activations = torch.empty(3, 130, dtype=torch.bfloat16), torch.empty(3, 66, dtype=torch.bfloat16)
    assert work.bytes == sum(tensor.nbytes for tensor in (*stored, *activations))
    assert work.flop == 2 * 3 * 130 * 66
    assert gradient(3, 130, 66).bytes == work.bytes
    assert quantize(130, 66).bytes == sum(tensor.nbytes for tensor in stored) + 2 * 130 * 66


def test_counts_of_an_optimizer_step_are_those_of_its_state():
    params = [torch.randn(shape, requires_grad=True) for shape in MANY]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = optim.AdamW(params, state_bits=8)
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert adamw("", MANY).bytes == sum(3 * p.nbytes for p in params) + 2 * sum(tensor.nbytes for tensor in state)


def test_sides_take_turns_and_each_walks_round_its_ring():
    calls = []
    sides = {name: Ring([lambda name=name, i=i: calls.append((name, i)) for i in range(3)]) for name in "abc"}
    seconds = measure.interleaved(sides, rounds=4)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 4)
    assert calls[:9] == [(name, i) for name in "abc" for i in range(3)]  # all memory is touched first
    turns = [name for name, _ in itertools.groupby(name for name, _ in calls[9:])]
    assert turns == list("abc") * 6  # one to learn how long a call takes, one that is not counted, four
    for name in "abc":
        walked = [i for other, i in calls if other == name]
        assert walked == list(itertools.islice(itertools.cycle(range(3)), len(walked)))


def test_the_fastest_way_is_taken():
    slow, fast = Ring([lambda: sum(range(100_000))], "slow"), Ring([lambda: None], "fast")
    assert measure.fastest(slow, fast).setting == "fast"
    assert measure.fastest(fast, slow).setting == "fast"


def test_ratios_are_taken_within_a_round():
    paired = row({"halfbyte": [1.0, 10.0, 2.0], "bf16": [2.0, 40.0, 6.0]})
    assert paired.ratios == {"bf16": (2.5, 3.0, 3.5)}
    assert paired.milliseconds["bf16"] == (4000.0, 6000.0, 23000.0)


def test_the_fraction_is_that_of_the_lower_ceiling():
    arithmetic = row({"halfbyte": [0.5, 0.5]}, flop=250, size=1)  # 0.25 s at 1000 flop/s, 0.1 s at 10 bytes/s
    memory = row({"halfbyte": [0.5, 0.5]}, flop=250, size=4)
    assert (arithmetic.bound, arithmetic.fraction.median) == ("arithmetic", 0.5)
    assert (memory.bound, memory.fraction.median) == ("memory", 0.8)


def test_lookups_are_the_ceiling_where_they_take_longest():
    low = row({"halfbyte": [0.5, 0.5]}, flop=250, size=1).model_copy(update={"lookups": 8, "lookup_rate": [20.0] * 2})
    high = low.model_copy(update={"lookup_rate": [80.0] * 2})
    assert (low.bound, low.fraction.median, low.roof) == ("lookups", 0.8, 625.0)  # 0.4 s
    assert (high.bound, high.fraction.median) == ("arithmetic", 0.5)


@pytest.mark.skipif("avx2" not in native.tiers(), reason="its lookups are probed on the AVX2 tier")
def test_lookups_are_probed_for_products_of_few_rows_of_a_tier_that_has_a_probe(monkeypatch):
    monkeypatch.setenv("HALFBYTE_ISA", "avx2")
    assert native.probe_lookups(3000) == 3 * native.probe_lookups(1000) == 3000 * 64
    report = bench.bench_kernels([forward(4, 64, 128), forward(5, 64, 128)], isa="avx2", threads=1, rounds=2)
    few, more = report.rows
    assert (few.lookups, len(few.lookup_rate)) == (64 * 128, 2)
    assert (more.lookups, more.lookup_rate) == (0, [])
    assert "G values/s" in str(report.table().caption)


def test_measured_ratios_agree_with_measured_medians(report):
    for measured in report.rows:
        ours = measured.seconds["halfbyte"]
        for name, ratio in measured.ratios.items():
            paired = [theirs / own for theirs, own in zip(measured.seconds[name], ours, strict=True)]
            of_medians = statistics.median(measured.seconds[name]) / statistics.median(ours)
            assert min(paired) <= ratio.median <= max(paired)
            assert min(paired) * (1 - 1e-9) <= of_medians <= max(paired) * (1 + 1e-9)


def test_the_files_hold_the_report(report, tmp_path):
    report.write(tmp_path)
    text = (tmp_path / "kernels.json").read_text()
    assert Report.model_validate_json(text) == report
    first = json.loads(text)["rows"][0]
    assert first["ratios"]["bf16"] == list(report.rows[0].ratios["bf16"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kernels.json", "roofline.png"]
    picture = imread(tmp_path / "roofline.png")
    assert min(picture.shape[:2]) > 500
    assert 0.01 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5


def test_a_point_stands_at_its_fraction_of_the_roof(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(roofline.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    points = [
        roofline.Point("AdamW", "", 2.0, 0.5),
        roofline.Point("forward", "", 400.0, 1.25),
        roofline.Point("forward", "", 4.0, 0.5, roof=80e9),
    ]
    roofline.draw(points, 1e12, 3e10, "", tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert [mark.get_offsets()[0].tolist() for mark in axes.collections] == [[2.0, 30.0], [400.0, 1250.0], [4.0, 40.0]]
    assert axes.get_ylim()[1] > 1250


def test_numbers_in_the_picture_keep_clear_of_points_and_of_each_other(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(roofline.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    points = [roofline.Point("forward", str(i), 50.0 + i % 3, 0.4 * (1 + i // 3 / 50)) for i in range(9)]
    roofline.draw(points, 1e12, 3e10, "", tmp_path / "x.png")
    axes = drawn[0].axes[0]
    places = axes.transData.transform([text.xy for text in axes.texts])
    centres = [place + drawn[0].dpi / 72 * np.array(text.xyann) for place, text in zip(places, axes.texts, strict=True)]
    assert [text.get_text() for text in axes.texts] == [str(i) for i in range(1, 10)]
    others = [np.delete([*centres, *places], i, axis=0) for i in range(len(centres))]
    nearest = min(np.linalg.norm(other - centre, axis=1).min() for centre, other in zip(centres, others, strict=True))
    assert nearest > 8 * drawn[0].dpi / 72


def test_circumstances_name_machine_tier_threads_and_versions(report):
    found = report.circumstances
    assert (found.tier, found.threads) == (
        native.tier() if native.available() else "reference",
        torch.get_num_threads(),
    )
    assert found.versions["torch"] == torch.__version__
    assert found.versions["bitsandbytes"]
    assert found.spincount == os.environ.get("GOMP_SPINCOUNT")
    assert found.machine and found.machine in report.title
    folder = bench.default_folder(report).name
    assert folder.endswith(f"-{found.tier}") and found.date[:10] in folder and (found.commit or "") in folder


@pytest.mark.parametrize("tier", native.tiers())
def test_a_tier_is_forced_for_the_run_alone(tier):
    before, threads = dict(os.environ), torch.get_num_threads()
    forced = bench.bench_kernels([WORKS[0]], isa=tier, threads=1, rounds=2)
    assert (forced.circumstances.tier, forced.circumstances.threads) == (tier, 1)
    assert (dict(os.environ), torch.get_num_threads()) == (before, threads)


@pytest.mark.skipif(not native.available(), reason="there is no native provider here")
@pytest.mark.parametrize("tier", native.tiers())
def test_a_probe_does_the_same_arithmetic_in_every_round(tier, monkeypatch):
    monkeypatch.setenv("HALFBYTE_ISA", tier)
    assert native.probe(3000) == 3 * native.probe(1000) > 1000
    assert native.probed_arithmetic()


def test_an_unknown_tier_is_bad_input():
    with pytest.raises(InputError, match=r"no tier 'scaler'.*did you mean 'scalar'"):
        bench.bench_kernels([], isa="scaler")


def test_it_runs_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for measured in bench.bench_kernels(WORKS, rounds=2).rows:
        assert measured.seconds.keys() == SIDES[measured.operation] - {"bitsandbytes"}


def test_it_runs_without_native_kernels():
    with use_provider("reference"):
        found = bench.bench_kernels(WORKS[:1], rounds=2)
    assert found.circumstances.tier == "reference"
    assert "torch" in found.circumstances.arithmetic


def test_the_command_prints_the_table_and_writes_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "kernel_works", lambda quick: WORKS[:2] if quick else WORKS)
    result = CliRunner().invoke(cli.app, ["bench", "kernels", "--quick", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "3×128×64" in result.stdout and "70×64×128" in result.stdout and str(tmp_path) in result.stdout
    written = Report.model_validate_json((tmp_path / "kernels.json").read_text())
    assert isinstance(written.circumstances, Circumstances)
    assert len(written.rows) == 2
