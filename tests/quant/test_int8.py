"""int8 weights in files: against bitsandbytes' row-wise layers, and their own form there and back."""

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.quant import QuantizedInt8, quantize_int8
from halfbyte.quant.int8 import STATE_INT8

SHAPES = [(7, 96), (40, 33), (1, 1)]


def layer_of_bitsandbytes(weight: Tensor) -> bnb.nn.Linear8bitLt:
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_what_bitsandbytes_saves_and_dequantizes(shape: tuple[int, int]) -> None:
    dense = torch.randn(shape).half()
    theirs = layer_of_bitsandbytes(dense).state_dict()
    assert set(theirs) == {"weight", "SCB", "weight_format"}
    ours = quantize_int8(dense, "row")
    state = ours.state_dict("weight")
    assert state.keys() == theirs.keys()
    for key, value in theirs.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key
    values = bnb.functional.int8_vectorwise_dequant(theirs["weight"], theirs["SCB"])
    back = QuantizedInt8.from_state_dict(theirs, "weight", torch.float32)
    assert back.by_row and back.blocksize == shape[1]
    torch.testing.assert_close(back.dequantize(), values, rtol=3e-7, atol=0)  # three roundings


@pytest.mark.parametrize("blocksize", [32, 64, 100, "row"])
def test_state_dict_and_back_is_the_same_weight(blocksize: int | str) -> None:
    weight = quantize_int8(torch.randn(10, 96).to(torch.bfloat16), blocksize)
    state = weight.state_dict("x.weight")
    back = QuantizedInt8.from_state_dict(state, "x.weight", torch.bfloat16)
    assert (back.blocksize, back.by_row, back.dtype) == (weight.blocksize, weight.by_row, weight.dtype)
    assert back.codes.data_ptr() == weight.codes.data_ptr() and back.absmax.data_ptr() == weight.absmax.data_ptr()
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_bits_and_rows() -> None:
    weight = quantize_int8(torch.randn(64, 128), 64)
    assert weight.bits_per_parameter == 8 + 32 / 64
    part = weight.rows(16, 48)
    assert torch.equal(part.dequantize(), weight.dequantize()[16:48])
    with pytest.raises(ValueError, match="row 1 of 96 values does not begin with a block of 64"):
        quantize_int8(torch.randn(4, 96), 64).rows(1, 2)


def test_damaged_state_dicts_are_told() -> None:
    blocks = quantize_int8(torch.randn(4, 96), 64).state_dict()
    rows = quantize_int8(torch.randn(4, 96), "row").state_dict()
    text = torch.frombuffer(bytearray(b'{"blocksize": 3, "dtype": "float32"}'), dtype=torch.uint8)
    for state, message in [
        ({k: v for k, v in blocks.items() if k != "weight"}, "weight is missing, but an int8 weight"),
        (blocks | {"weight": blocks["weight"].float()}, r"weight is torch.float32 \(4, 96\)"),
        (blocks | {"weight.absmax": torch.zeros(3)}, r"weight.absmax is torch.float32 with 3 values.*with 6"),
        (rows | {"SCB": torch.zeros(4).half()}, "SCB is torch.float16 with 4 values"),
        (rows | {"weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format is 2, an order of bytes"),
        ({"weight": blocks["weight"]}, "comes neither with SCB nor with weight.absmax"),
        (blocks | {f"weight.{STATE_INT8}": text}, "does not describe an int8 weight .blocksize"),
    ]:
        with pytest.raises(InputError, match=message):
            QuantizedInt8.from_state_dict(state)


def test_what_cannot_be_quantized_is_told() -> None:
    for blocksize in (16, 5000, "rows"):
        with pytest.raises(InputError, match="it must be 32 to 4096, or 'row'"):
            quantize_int8(torch.randn(4, 96), blocksize)
    with pytest.raises(InputError, match="holds no value"):
        quantize_int8(torch.randn(0, 4))
