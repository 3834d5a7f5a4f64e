"""The 4-bit weight, bit for bit against bitsandbytes' definition (its torch backend), and its form in files."""

import itertools
import json
import math
from collections.abc import Callable, Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default import ops as definition
from torch import Tensor

from halfbyte.choices import TYPES_4BIT
from halfbyte.errors import InputError
from halfbyte.kernels import providers, use_provider
from halfbyte.quant import QuantizedWeight, codebook, quantize_4bit

SHAPES = [(64, 64), (33, 65), (7, 3), (1000, 160), (1, 1), (130,), (3, 5, 50)]

# bitsandbytes' CPU library does not take the nearest 8-bit code: tests/kernels/test_bitsandbytes.py says how far it is.
EXACT = [name for name in providers() if name != "bitsandbytes"]


@pytest.fixture(params=EXACT, autouse=True)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every claim of this file holds for every provider that is exact."""
    with use_provider(request.param):
        yield request.param


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearest_8bit(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' definition for statistics: its torch backend's 8-bit quantization."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    if len(x) % 256:
        scaled[-1] = blocks[-1] / absmax[-1].clamp(min=1e-38)
        absmax[-1] = absmax[-1].clamp(min=1e-38)
    codes = torch.bucketize(scaled.clamp(-1, 1).view(-1)[: len(x)], (code[:-1] + code[1:]) / 2)
    return codes.to(torch.uint8), absmax


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_codes_and_constants_are_bitsandbytes(quant_type: str, dtype: torch.dtype, blocksize: int) -> None:
    for shape in SHAPES:
        x = random(shape, dtype)
        ours = quantize_4bit(x, quant_type, blocksize, double_quant=False)
        packed, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        assert torch.equal(ours.packed, packed), shape
        assert torch.equal(ours.statistics.absmax, state.absmax), shape


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nested_statistics_follow_the_definition(quant_type: str) -> None:
    for shape in SHAPES:
        x = random(shape, torch.float32)
        plain = quantize_4bit(x, quant_type, double_quant=False)
        ours = quantize_4bit(x, quant_type, double_quant=True)
        nested = ours.statistics.nested
        assert nested is not None
        offset = plain.statistics.absmax.mean()
        codes, absmax = nearest_8bit(plain.statistics.absmax - offset, bnb.create_dynamic_map())
        assert nested.offset == offset.item()
        assert torch.equal(ours.statistics.absmax, codes)
        assert torch.equal(nested.absmax, absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_values_follow_the_definition(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        ours = quantize_4bit(random(shape, dtype), quant_type, 64, double_quant)
        absmax = ours.statistics.absmax
        if nested := ours.statistics.nested:
            spread = nested.absmax.repeat_interleave(256)[: len(absmax)]
            absmax = bnb.create_dynamic_map()[absmax.long()] * spread + nested.offset
        code = bnb.get_4bit_type(quant_type, "cpu")
        with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its torch backend; its text counts here
            expected = definition._dequantize_4bit_compute(ours.packed.view(-1), absmax, code, 64, shape, dtype)
        assert torch.equal(ours.dequantize().view(-1), expected.view(-1)), shape


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_own_cpu_library_agrees_where_it_follows_its_definition(double_quant: bool) -> None:
    x = random((96, 128), torch.bfloat16)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    key = "weight"
    theirs = {key: packed} | {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}
    opened = QuantizedWeight.from_state_dict(theirs, key)
    assert torch.equal(opened.dequantize(), bnb.dequantize_4bit(packed, state))


def test_the_departures_of_bitsandbytes_cpu_library_are_counted(record_property: Callable[..., None]) -> None:
    # Its 8-bit quantizer looks values up in a table of 65,536 entries, so that some codes are not the nearest ...
    x = random((2048, 1024), torch.float32)
    ours = quantize_4bit(x, "nf4", double_quant=True)
    _, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    share = (ours.statistics.absmax != state.absmax).float().mean().item()
    assert 0 < share < 0.01
    record_property("8-bit codes of bitsandbytes' CPU library that are not the nearest", share)
    # ... and its dequantization mixes up blocks when a row is not a multiple of the block (AVX-512 machines only).
    x = random((64, 160), torch.float32)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    ours = quantize_4bit(x, "nf4", double_quant=False)
    departed = (bnb.dequantize_4bit(packed, state) - ours.dequantize()).norm() / ours.dequantize().norm()
    record_property("its relative error on rows of 160 values", departed.item())
    right = codebook("nf4")[torch.stack([packed >> 4, packed & 15], 1).view(-1).long()]
    assert torch.equal(ours.dequantize().view(-1), right * state.absmax.repeat_interleave(64))


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_per_parameter_are_the_papers(double_quant: bool, bits: float) -> None:
    weight = quantize_4bit(torch.zeros(512, 256) + 1, double_quant=double_quant)
    assert weight.bits_per_parameter == bits
    assert round(bits, 3) in (4.5, 4.127)


@pytest.mark.parametrize("quant_type", TYPES_4BIT)
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_and_back_is_the_same_weight(quant_type: str, double_quant: bool) -> None:
    weight = quantize_4bit(random((33, 65), torch.bfloat16), quant_type, 64, double_quant)
    again = QuantizedWeight.from_state_dict(weight.state_dict("a.weight"), "a.weight")
    assert (again.shape, again.dtype, again.quant_type) == (weight.shape, weight.dtype, quant_type)
    assert torch.equal(again.dequantize(), weight.dequantize())
    first, second = weight.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_state_dict_has_bitsandbytes_keys_and_text() -> None:
    x = random((64, 128), torch.float32)
    for double_quant in (False, True):
        ours = quantize_4bit(x, "nf4", 64, double_quant).state_dict("w")
        _, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
        theirs = state.as_dict(packed=True)
        assert set(ours) == {"w"} | {f"w.{key}" for key in theirs}
        key = "quant_state.bitsandbytes__nf4"
        assert json.loads(bytes(ours[f"w.{key}"].numpy())) == json.loads(bytes(theirs[key].numpy()))
        assert bytes(ours[f"w.{key}"].numpy()) == bytes(theirs[key].numpy())


def test_other_storage_dtypes_hold_the_same_bytes() -> None:
    weight = quantize_4bit(random((64, 64), torch.float32))
    for dtype in (torch.bfloat16, torch.float32):
        state = weight.state_dict()
        state["weight"] = state["weight"].view(-1).view(dtype).view(-1, 1)
        assert torch.equal(QuantizedWeight.from_state_dict(state).packed, weight.packed)


def test_damaged_files_are_told() -> None:
    state = quantize_4bit(random((64, 64), torch.float32)).state_dict("layer.weight")
    for key in ("layer.weight.absmax", "layer.weight.nested_absmax", "layer.weight.quant_map"):
        with pytest.raises(InputError, match=f"{key} is missing"):
            QuantizedWeight.from_state_dict({k: v for k, v in state.items() if k != key}, "layer.weight")
    with pytest.raises(InputError, match=r"1024 packed bytes.*needs 2048"):
        QuantizedWeight.from_state_dict(state | {"layer.weight": state["layer.weight"][:1024]}, "layer.weight")
    with pytest.raises(InputError, match=r"32 block constants.*needs 64"):
        short = {"layer.weight.absmax": state["layer.weight.absmax"][:32]}
        QuantizedWeight.from_state_dict(state | short, "layer.weight")
    with pytest.raises(InputError, match="not a 4-bit weight"):
        QuantizedWeight.from_state_dict({"layer.weight": torch.zeros(4)}, "layer.weight")


DAMAGED_STATES = {
    "not JSON": (b"\x00\xff\x17", "nf4 does not describe a 4-bit weight .*JSON"),
    "cut off": (None, "nf4 does not describe a 4-bit weight .*JSON"),
    "a list": (b"[1, 2]", "does not describe"),
    "no block size": ({"blocksize": ...}, "blocksize: Field required"),
    "a block size of zero": ({"blocksize": 0}, "blocksize: .*greater than or equal to 32"),
    "a block size in words": ({"blocksize": "64"}, "blocksize: .*integer"),
    "an unknown type": ({"quant_type": "nf3"}, "quant_type: .*'nf4'"),
    "an unknown dtype": ({"dtype": "load"}, "dtype: .*'bfloat16'"),
    "a shape that is no list": ({"shape": 64}, "shape: .*array"),
    "a negative shape": ({"shape": [-64, -64]}, r"shape\.0: .*greater than 0"),
    "no offset": ({"nested_offset": ...}, "nested_blocksize and nested_offset come together"),
    "an offset that is no number": ({"nested_offset": None}, "nested_offset: .*number"),
}


@pytest.mark.parametrize("damage", DAMAGED_STATES)
def test_a_damaged_quant_state_is_told_by_name(damage: str) -> None:
    state = quantize_4bit(random((64, 64), torch.float32)).state_dict("layer.weight")
    key = "layer.weight.quant_state.bitsandbytes__nf4"
    text = bytes(state[key].numpy())
    change, message = DAMAGED_STATES[damage]
    if isinstance(change, dict):
        about = {name: value for name, value in (json.loads(text) | change).items() if value is not ...}
        text = json.dumps(about).encode()
    else:
        text = text[: len(text) // 2] if change is None else change
    with pytest.raises(InputError, match=f"^layer.weight.*{message}.*damaged"):
        QuantizedWeight.from_state_dict(state | {key: torch.tensor(list(text), dtype=torch.uint8)}, "layer.weight")


def test_statistics_of_another_dtype_or_size_are_told() -> None:
    state = quantize_4bit(random((64, 64), torch.float32)).state_dict("layer.weight")
    for name, tensor, message in [
        ("absmax", torch.zeros(64), "absmax is torch.float32, .*torch.uint8"),
        ("nested_absmax", torch.zeros(1, dtype=torch.float16), "nested_absmax is torch.float16"),
        ("nested_absmax", torch.zeros(2), "2 constants of block constants.*needs 1"),
        ("quant_map", torch.zeros(15), "15 table values.*needs 16"),
        ("quant_map", torch.zeros(16).half(), "quant_map is torch.float16"),
        ("nested_quant_map", torch.zeros(255), "255 second table values.*needs 256"),
    ]:
        with pytest.raises(InputError, match=message):
            QuantizedWeight.from_state_dict(state | {f"layer.weight.{name}": tensor}, "layer.weight")


def test_bad_arguments_are_told() -> None:
    x = torch.zeros(8, 8)
    for arguments, message in [
        ({"quant_type": "nf3"}, "'nf3'.*did you mean 'nf4'"),
        ({"blocksize": 16}, "blocksize is 16.*32 to 4096"),
        ({"blocksize": 8192}, "blocksize is 8192"),
    ]:
        with pytest.raises(InputError, match=message):
            quantize_4bit(x, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no value"):
        quantize_4bit(torch.zeros(0, 8))
    with pytest.raises(TypeError, match="float64"):
        quantize_4bit(x.double())


def test_nf4_error_is_smaller_than_other_formats_on_normal_values() -> None:
    # The paper's claim behind Table 2: on normally distributed weights NF4 loses least.
    x = random((512, 512), torch.float32)
    error = {name: (quantize_4bit(x, name).dequantize() - x).square().mean().item() for name in TYPES_4BIT}
    assert min(error, key=error.__getitem__) == "nf4", error


def test_every_block_size_is_taken() -> None:
    x = random((50, 77), torch.float32)
    for blocksize, quant_type in itertools.product((32, 33, 96, 100, 1000, 4096), ("nf4", "fp4")):
        with use_provider("reference"):
            expected = quantize_4bit(x, quant_type, blocksize)
        got = quantize_4bit(x, quant_type, blocksize)
        assert torch.equal(got.packed, expected.packed)
        assert torch.equal(got.dequantize(), expected.dequantize())


def test_golden_vectors() -> None:
    # Worked by hand from the published tables: the value that is nearest, a tie to the lower code.
    x = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.1, -0.1, 0.03, 0.0])
    nf4 = quantize_4bit(x, "nf4", double_quant=False)
    assert nf4.packed.view(-1).tolist() == [0xF0, 0xC2, 0x86, 0x77]
    fp4 = quantize_4bit(x, "fp4", double_quant=False)
    assert fp4.packed.view(-1).tolist() == [0x3B, 0x5D, 0x6E, 0x10]
    # Blocks of one size: what is left of each constant is exactly zero, which is code 127 of the signed map
    # (bitsandbytes' CPU library gives another code), and rows of 160 values, on which it mixes up blocks.
    equal = quantize_4bit(torch.full((64, 160), 0.5))
    assert set(equal.statistics.absmax.tolist()) == {127}
    assert torch.equal(equal.dequantize(), torch.full((64, 160), 0.5))


@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_of_a_weight_are_rows_of_its_dense_form(double_quant: bool) -> None:
    weight = quantize_4bit(torch.randn(37, 512, generator=torch.Generator().manual_seed(0)), "nf4", 64, double_quant)
    dense = weight.dequantize()
    for first, last in [(0, 37), (0, 32), (32, 37), (32, 33), (0, 1)]:
        rows = weight.rows(first, last)
        assert rows.shape == (last - first, 512) and torch.equal(rows.dequantize(), dense[first:last])
        assert rows.packed.untyped_storage().data_ptr() == weight.packed.untyped_storage().data_ptr()


def test_rows_that_begin_within_a_block_are_refused() -> None:
    weight = quantize_4bit(torch.randn(40, 30), "nf4", 64, False)
    assert torch.equal(weight.rows(32, 40).dequantize(), weight.dequantize()[32:])
    with pytest.raises(ValueError, match=r"row 1 of 30 values does not begin with a block of 64"):
        weight.rows(1, 40)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_shows_in_its_block_s_constant(value: float, dtype: torch.dtype) -> None:
    """Whoever quantizes a model looks at constants alone. Every place in a block: vector tiers hold it in lanes."""
    for blocksize, place in [*((64, i) for i in range(64)), (100, 199), (4096, 4095), (32, 63)]:
        x = random((8192,), dtype)
        x[place] = value
        single = quantize_4bit(x, "nf4", blocksize, double_quant=False).statistics.absmax
        spoiled = torch.zeros(len(single), dtype=torch.bool)
        spoiled[place // blocksize] = True
        assert torch.equal(~single.isfinite(), spoiled)
        nested = quantize_4bit(x, "nf4", blocksize).statistics.nested
        assert nested is not None and not math.isfinite(nested.offset)
