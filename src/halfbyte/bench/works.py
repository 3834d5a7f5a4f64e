"""What is measured: the kernels' works at the sizes of real models, each as halfbyte, bitsandbytes and torch do it.

Sides of a work: ``halfbyte``, through the provider in force; ``bitsandbytes``, if it is installed, in whichever of its
ways is faster there; ``bf16`` and ``fp32``, torch over a dense weight of that dtype (for AdamW, torch's own in the
fastest of its forms). Weights are NF4 in blocks of 64 with double quantization, activations bf16.

Counts are of what a work needs, however it is done: ``flop``, and ``bytes`` read and written once each. A product is
2 M N K flop. For the rest the count only places a point on the roofline, where all of them lie far below the ridge:
1 flop a value to dequantize, 2 to quantize, 18 for AdamW over 8-bit state.

Up to :data:`STREAMED_ROWS` rows weights are read from memory, as in decoding (:mod:`halfbyte.bench.measure`); with
more, arithmetic takes so much longer than reading them that one weight serves all calls. Up to :data:`LOOKED_UP_ROWS`
rows, each value of the weight is looked up once for all of them: ``lookups``.
"""

import copy
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte import kernels, optim
from halfbyte.bench.measure import Call, Ring, fastest, ring_size
from halfbyte.optim.adamw import BLOCKSIZE, SMALLEST_8BIT
from halfbyte.quant import QuantizedWeight, quantize_4bit

STREAMED_ROWS = 64
LOOKED_UP_ROWS = 4
LARGE = ((4096, 4096), (11008, 4096))  # [N, K] of the products in a 7B model
SMALL = ((576, 576), (1536, 576), (576, 1536))  # and in a 135M one
ROWS = (1, 4, 16, 64, 512, 2048)
TRAINED_ROWS = 2048
LORA_OF_135M = 30 * [  # [out, in] of the adapted layers, rank 16
    *((16, 576), (576, 16), (16, 576), (192, 16), (16, 576), (192, 16), (16, 576), (576, 16)),
    *((16, 576), (1536, 16), (16, 576), (1536, 16), (16, 1536), (576, 16)),
]


@dataclasses.dataclass(frozen=True)
class Work:
    """One work.

    Attributes:
        operation: what is done.
        size: on what: the rows M, the weight's shape N×K, or the number of parameters.
        flop: floating-point operations that it needs.
        bytes: bytes that it has to read or write.
        sides: prepares the implementations.
        lookups: 4-bit values that it has to look up, where that may be its ceiling; else 0.
    """

    operation: str
    size: str
    flop: int
    bytes: int
    sides: Callable[[], dict[str, Ring]]
    lookups: int = 0

    @property
    def name(self) -> str:
        return f"{self.operation} {self.size}"


def kernel_works(quick: bool = False) -> list[Work]:
    """Return the works of the benchmark, or with ``quick`` a few of them."""
    if quick:
        return [
            *(forward(rows, 4096, 4096) for rows in (1, 16, 512)),
            gradient(512, 4096, 4096),
            quantize(4096, 4096),
            dequantize(4096, 4096),
            adamw("one tensor", [(2048, 2048)]),
            adamw("420 LoRA tensors", LORA_OF_135M),
        ]
    return [
        *(forward(rows, *shape) for shape in LARGE for rows in ROWS),
        *(forward(TRAINED_ROWS, *shape) for shape in SMALL),
        *(gradient(TRAINED_ROWS, *shape) for shape in (*LARGE, *SMALL)),
        *(quantize(*shape) for shape in LARGE),
        *(dequantize(*shape) for shape in LARGE),
        adamw("one tensor", [(2048, 2048)]),
        adamw("420 LoRA tensors", LORA_OF_135M),
    ]


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def forward(rows: int, out_features: int, in_features: int) -> Work:
    """The product of ``rows`` activations with a weight: ``y[M, N] = x[M, K] Wᵀ``."""
    return Work(
        "forward",
        f"{rows}×{out_features}×{in_features}",
        *_product_counts(rows, out_features, in_features),
        functools.partial(_products, rows, out_features, in_features, _forward_call),
        lookups=out_features * in_features if rows <= LOOKED_UP_ROWS else 0,
    )


def gradient(rows: int, out_features: int, in_features: int) -> Work:
    """The gradient of that product with respect to its input: ``dx[M, K] = dy[M, N] W``."""
    return Work(
        "dx",
        f"{rows}×{out_features}×{in_features}",
        *_product_counts(rows, out_features, in_features),
        functools.partial(_products, rows, out_features, in_features, _gradient_call),
    )


def quantize(out_features: int, in_features: int) -> Work:
    """A bf16 weight to NF4 with double quantization."""
    shape = (out_features, in_features)
    size = 2 * math.prod(shape)

    def sides() -> dict[str, Ring]:
        weights = [_weight(shape) for _ in range(ring_size(size))]
        found = {"halfbyte": Ring([functools.partial(quantize_4bit, weight) for weight in weights])}
        if has_bitsandbytes():
            from bitsandbytes.functional import quantize_4bit as theirs

            options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
            found["bitsandbytes"] = Ring([functools.partial(theirs, weight, **options) for weight in weights])
        return found

    return Work("quantize", _dimensions(shape), 2 * math.prod(shape), size + _packed_bytes(shape), sides)


def dequantize(out_features: int, in_features: int) -> Work:
    """That weight back to bf16; torch's side is a copy of the dense weight."""
    shape = (out_features, in_features)
    size = 2 * math.prod(shape)

    def sides() -> dict[str, Ring]:
        count, dense = ring_size(size), _weight(shape)
        weights = _copies(quantize_4bit(dense), count)
        found = {"halfbyte": Ring([functools.partial(weight.dequantize, torch.bfloat16) for weight in weights])}
        if has_bitsandbytes():
            from bitsandbytes.functional import dequantize_4bit as theirs

            layers = _copies(_bitsandbytes_linear(dense), count)
            found["bitsandbytes"] = Ring(
                [functools.partial(theirs, layer.weight.data, layer.weight.quant_state) for layer in layers]
            )
        found["bf16"] = Ring([weight.clone for weight in _copies(dense, count)])
        return found

    return Work("dequantize", _dimensions(shape), math.prod(shape), size + _packed_bytes(shape), sides)


def adamw(name: str, shapes: Sequence[tuple[int, int]]) -> Work:
    """One step of AdamW with 8-bit state over fp32 parameters of these shapes."""
    counts = [math.prod(shape) for shape in shapes]

    def sides() -> dict[str, Ring]:
        options = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

        def side(kind: Callable[..., Any], setting: str = "", **more: Any) -> Ring:
            copies = [_parameters(shapes) for _ in range(ring_size(8 * sum(counts)))]
            return Ring([kind(params, **options, **more).step for params in copies], setting)

        found = {"halfbyte": side(optim.AdamW, state_bits=8)}
        if has_bitsandbytes():
            from bitsandbytes.optim import AdamW8bit

            found["bitsandbytes"] = side(AdamW8bit)
        found["fp32"] = fastest(*(side(torch.optim.AdamW, form, **{form: True}) for form in ("fused", "foreach")))
        return found

    return Work(
        "AdamW 8-bit", f"{name}, {sum(counts) / 1e6:.1f} M", 18 * sum(counts), sum(map(_step_bytes, counts)), sides
    )


def _products(
    rows: int, out_features: int, in_features: int, as_call: Callable[[Callable[[Tensor], Tensor], Tensor], Call]
) -> dict[str, Ring]:
    """Return the sides of a forward product, or of its gradient."""
    shape = (out_features, in_features)
    x, dense = torch.randn(rows, in_features, dtype=torch.bfloat16), _weight(shape)

    def count(bytes_: int) -> int:
        return ring_size(bytes_) if rows <= STREAMED_ROWS else 1

    def ours(weight: QuantizedWeight) -> Call:
        return as_call(lambda x: kernels.matmul_4bit(x, weight), x)

    def torchs(weight: Tensor) -> Call:
        return as_call(lambda x: F.linear(x, weight), x.to(weight.dtype))

    few = count(_packed_bytes(shape))
    found = {"halfbyte": Ring([ours(weight) for weight in _copies(quantize_4bit(dense), few)])}
    if has_bitsandbytes():
        layers = _copies(_bitsandbytes_linear(dense), 2 * few)
        ways = [Ring([as_call(layer.train(), x) for layer in layers[:few]], "training path")]
        if as_call is _forward_call:
            ways.append(Ring([as_call(layer.eval(), x) for layer in layers[few:]], "evaluation path"))
        found["bitsandbytes"] = fastest(*ways)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weight = dense.to(dtype)
        found[name] = Ring([torchs(w) for w in _copies(weight, count(weight.nbytes))])
    return found


def _forward_call(function: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    return functools.partial(function, x)


def _gradient_call(function: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    x = x.detach().requires_grad_()
    y = function(x)
    return functools.partial(torch.autograd.grad, y, x, torch.randn_like(y), retain_graph=True)


def _bitsandbytes_linear(weight: Tensor) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, blocksize=64, compress_statistics=True, quant_type="nf4")
    return layer.to("cpu")


def _weight(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16) / math.sqrt(shape[1])


def _parameters(shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _copies(thing: Any, count: int) -> list[Any]:
    return [copy.deepcopy(thing) for _ in range(count)]


def _packed_bytes(shape: tuple[int, int]) -> int:
    """Return the bytes of a doubly quantized 4-bit weight: codes, 8-bit constants, fp32 ones."""
    blocks = math.ceil(math.prod(shape) / 64)
    return math.ceil(math.prod(shape) / 2) + blocks + 4 * math.ceil(blocks / 256)


def _product_counts(rows: int, out_features: int, in_features: int) -> tuple[int, int]:
    activations = 2 * rows * (out_features + in_features)
    return 2 * rows * out_features * in_features, activations + _packed_bytes((out_features, in_features))


def _step_bytes(count: int) -> int:
    """Return the bytes of one AdamW step over ``count`` parameters: all but the gradient is read and written."""
    state = 8 * count if count < SMALLEST_8BIT else 2 * count + 8 * math.ceil(count / BLOCKSIZE)
    return 4 * count + 2 * (4 * count + state)


def _dimensions(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"
