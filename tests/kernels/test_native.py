"""Each native tier that this chip has, against the reference, bit for bit."""

import itertools
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.kernels import Nested, Statistics, Weight4bit, native, reference
from halfbyte.quant import codebook

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [1, 7, 48, 64, 4096]
COUNTS = [0, 1, 63, 64, 4097, 12351]
# Beside real tables some whose outer midpoints lie at and beyond what scaled values reach.
CODES_4BIT = {"nf4": codebook("nf4"), "fp4": codebook("fp4"), "wide": torch.arange(16) - 7.5}
CODES_8BIT = {
    "dynamic": codebook("dynamic"),
    "dynamic_unsigned": codebook("dynamic_unsigned"),
    "two": torch.tensor([-0.5, 0.25]),
    "seventy-seven": (torch.arange(77) - 38.5) / 8,
}


def midpoints(code: Tensor) -> Tensor:
    values = code.sort().values
    return (values[:-1] + values[1:]) / 2


def on_midpoints(code: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Values that scale to a midpoint or a neighbour of it, in blocks whose largest magnitude is a power of two."""
    middle = midpoints(code)
    x = middle[torch.randint(len(middle), (n,), generator=generator)]
    step = torch.randint(-1, 2, (n,), generator=generator)
    x = torch.where(step < 0, torch.nextafter(x, x - 1), torch.where(step > 0, torch.nextafter(x, x + 1), x))
    x[::7] = 1.0
    return x * 0.25


def mixed(code: Tensor, n: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(n, generator=generator)
    return x * 10.0 ** torch.randint(-45, 39, (n,), generator=generator)


def hurt(code: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Infinities, NaN and zeros of both signs, some blocks left whole."""
    x = torch.randn(n, generator=generator)
    specials = torch.tensor([float("inf"), float("-inf"), float("nan"), -float("nan"), 0.0, -0.0])
    where = torch.rand(n, generator=generator) < 0.01
    return torch.where(where, specials[torch.randint(6, (n,), generator=generator)], x)


Maker = Callable[[Tensor, int, torch.Generator], Tensor]
INPUTS: dict[str, Maker] = {
    "normal": lambda code, n, generator: torch.randn(n, generator=generator),
    "on midpoints": on_midpoints,
    "all magnitudes": mixed,
    "subnormal": lambda code, n, generator: torch.randn(n, generator=generator) * 1e-40,
    "hurt": hurt,
    "zeros": lambda code, n, generator: torch.zeros(n),
    "all equal": lambda code, n, generator: torch.full((n,), -0.3),
}


needs_native = pytest.mark.skipif(not native.available(), reason="the package was installed without its extension")


@pytest.fixture(params=native.tiers())
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)
    assert native.tier() == request.param
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(got: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, except that one NaN is as good as another."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    if got.is_floating_point():
        bits = torch.int32 if got.dtype == torch.float32 else torch.int16
        got, expected = (torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(bits) for x in (got, expected))
    return torch.equal(got, expected)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_compiler_means_native_kernels() -> None:
    if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        assert native.available(), "there is a C++ compiler, but the package was installed without its extension"


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", CODES_4BIT)
def test_4bit_codes_and_statistics_are_the_reference_s(tier: str, name: str, kind: str) -> None:
    code = CODES_4BIT[name]
    for seed, (dtype, blocksize, n) in enumerate(itertools.product(DTYPES, BLOCKSIZES, COUNTS)):
        x = INPUTS[kind](code, n, seeded(seed)).to(dtype)
        packed, absmax = native.quantize_4bit(x, code, blocksize)
        expected_packed, expected_absmax = reference.quantize_4bit(x, code, blocksize)
        assert same(packed, expected_packed) and same(absmax, expected_absmax), (dtype, blocksize, n)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", CODES_8BIT)
def test_coded_bytes_and_statistics_are_the_reference_s(tier: str, name: str, kind: str) -> None:
    code = CODES_8BIT[name]
    for seed, (dtype, blocksize, n) in enumerate(itertools.product(DTYPES, BLOCKSIZES, COUNTS)):
        x = INPUTS[kind](code, n, seeded(seed)).to(dtype)
        codes, absmax = native.quantize_coded(x, code, blocksize)
        expected_codes, expected_absmax = reference.quantize_coded(x, code, blocksize)
        assert same(codes, expected_codes) and same(absmax, expected_absmax), (dtype, blocksize, n)


def scales(blocks: int, generator: torch.Generator) -> Tensor:
    """Plausible scales and some that overflow, vanish or are not finite."""
    absmax = torch.rand(blocks, generator=generator) * 10.0 ** torch.randint(-40, 39, (blocks,), generator=generator)
    absmax[::5] = torch.rand(len(absmax[::5]), generator=generator)
    absmax[3::11] = float("inf")
    absmax[4::11] = float("nan")
    return absmax


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("nested_blocksize", [None, 256, 7], ids="nested {}".format)
def test_4bit_values_are_the_reference_s(tier: str, out: torch.dtype, nested_blocksize: int | None) -> None:
    for seed, (blocksize, n) in enumerate(itertools.product(BLOCKSIZES, COUNTS)):
        generator = seeded(seed)
        blocks = -(-n // blocksize)
        packed = torch.randint(256, (-(-n // 2),), dtype=torch.uint8, generator=generator)
        if nested_blocksize is None:
            statistics = Statistics(scales(blocks, generator), CODES_4BIT["nf4"], blocksize)
        else:
            absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator)
            groups = scales(-(-blocks // nested_blocksize), generator)
            nested = Nested(groups, CODES_8BIT["dynamic"], nested_blocksize, offset=0.1)
            statistics = Statistics(absmax, CODES_4BIT["fp4"], blocksize, nested)
        weight = Weight4bit(packed, statistics, (n,))
        assert same(native.dequantize_4bit(weight, out), reference.dequantize_4bit(weight, out)), (blocksize, n)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("name", CODES_8BIT)
def test_coded_values_are_the_reference_s(tier: str, name: str, out: torch.dtype) -> None:
    code = CODES_8BIT[name]
    for seed, (blocksize, n) in enumerate(itertools.product(BLOCKSIZES, COUNTS)):
        generator = seeded(seed)
        codes = torch.randint(len(code), (n,), dtype=torch.uint8, generator=generator)
        absmax = scales(-(-n // blocksize), generator)
        got = native.dequantize_coded(codes, absmax, code, blocksize, out)
        assert same(got, reference.dequantize_coded(codes, absmax, code, blocksize, out)), (blocksize, n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16bit_value_is_read_as_torch_reads_it(tier: str, dtype: torch.dtype) -> None:
    # Blocks of one value: the statistics are the magnitudes themselves.
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    _, absmax = native.quantize_4bit(x, CODES_4BIT["nf4"], 1)
    assert same(absmax, x.float().abs())
    # A vector tier takes blocks of 32: the value and 31 zeros.
    padded = torch.zeros(65536, 32, dtype=dtype)
    padded[:, 13] = x
    _, absmax = native.quantize_4bit(padded, CODES_4BIT["nf4"], 32)
    assert same(absmax, x.float().abs())


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_values_are_rounded_to_16_bits_as_torch_rounds_them(tier: str, out: torch.dtype) -> None:
    # Every value of the type, the middle between it and the next, and both neighbours of that, through `absmax` and a
    # table of ones.
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(out).float()
    values = values[values.isfinite()].sort().values
    middles = (values[:-1].double() + values[1:].double()).div(2).float()
    absmax = torch.cat([values, middles, torch.nextafter(middles, middles - 1), torch.nextafter(middles, middles + 1)])
    codes = torch.zeros(32 * len(absmax), dtype=torch.uint8)
    weight = Weight4bit(codes[: len(codes) // 2], Statistics(absmax, torch.ones(16), 32), (len(codes),))
    from_4bit = native.dequantize_4bit(weight, out)
    from_8bit = native.dequantize_coded(codes, absmax, torch.ones(256), 32, out)
    for got in (from_4bit, from_8bit):
        assert same(got.view(-1, 32)[:, 5], absmax.to(out))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_bytes_may_lie_at_any_address(tier: str, shift: int) -> None:
    def moved(x: Tensor) -> Tensor:
        """A copy whose address is ``shift`` beyond one that is aligned for it."""
        room = bytearray(x.nbytes + 64)
        start = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % 16 + shift
        copy = torch.frombuffer(room, dtype=x.dtype, count=x.numel(), offset=start)
        assert copy.data_ptr() % 16 == shift
        copy.view(torch.uint8).copy_(x.view(torch.uint8))
        return copy

    n, generator = 5003, seeded(0)
    code, code_8bit = CODES_4BIT["nf4"], CODES_8BIT["dynamic"]
    x = torch.randn(n, generator=generator).bfloat16()
    packed, absmax = native.quantize_4bit(moved(x), moved(code), 64)
    expected_packed, expected_absmax = reference.quantize_4bit(x, code, 64)
    assert same(packed, expected_packed) and same(absmax, expected_absmax)

    absmax_codes, nested_absmax = reference.quantize_coded(absmax, code_8bit, 256)
    nested = Nested(nested_absmax, code_8bit, 256, 0.5)
    plain = Weight4bit(packed, Statistics(absmax_codes, code, 64, nested), (n,))
    nested = Nested(moved(nested_absmax), moved(code_8bit), 256, 0.5)
    elsewhere = Weight4bit(moved(packed), Statistics(moved(absmax_codes), moved(code), 64, nested), (n,))
    got = native.dequantize_4bit(elsewhere, torch.bfloat16)
    assert same(got, reference.dequantize_4bit(plain, torch.bfloat16))


@pytest.mark.parametrize("blocksize", [64, 5, 200_000])
def test_the_number_of_threads_changes_no_byte(tier: str, blocksize: int, threads: Callable[[int], None]) -> None:
    n = 400_001
    x = torch.randn(n, generator=seeded(1))
    code, code_8bit = CODES_4BIT["nf4"], CODES_8BIT["dynamic"]

    def everything() -> list[Tensor]:
        packed, absmax = native.quantize_4bit(x, code, blocksize)
        codes, absmax_8bit = native.quantize_coded(x, code_8bit, blocksize)
        weight = Weight4bit(packed, Statistics(absmax, code, blocksize), (n,))
        values = native.dequantize_4bit(weight, torch.bfloat16)
        values_8bit = native.dequantize_coded(codes, absmax_8bit, code_8bit, blocksize, torch.float32)
        return [packed, absmax, codes, absmax_8bit, values, values_8bit]

    threads(1)
    alone = everything()
    for count in (2, 3, 5):
        threads(count)
        assert all(same(got, expected) for got, expected in zip(everything(), alone, strict=True))


@needs_native
def test_a_default_dtype_or_device_changes_no_result() -> None:
    x = torch.randn(100, generator=seeded(2))
    expected = reference.quantize_4bit(x, CODES_4BIT["nf4"], 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = native.quantize_4bit(x, CODES_4BIT["nf4"], 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@needs_native
@pytest.mark.parametrize("name", [*sorted({"amx", "avx512", "avx2", "neon"} - {*native.tiers()}), "avx51", "Scalar"])
def test_forcing_a_tier_that_is_not_there_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", name)
    with pytest.raises(InputError, match=f"HALFBYTE_ISA is '{name}'.* scalar"):
        native.tier()
    with pytest.raises(InputError, match=f"HALFBYTE_ISA is '{name}'.* scalar"):
        native.quantize_4bit(torch.zeros(64), CODES_4BIT["nf4"], 64)


@needs_native
def test_the_best_tier_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALFBYTE_ISA", raising=False)
    assert native.tier() == native.tiers()[0]
    assert native.tiers()[-1] == "scalar"
