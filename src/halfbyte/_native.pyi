"""The extension built from csrc/bindings.cpp: `isa` counts in tiers(), tensors are addresses, types of contract.h."""

def tiers() -> list[str]: ...
def use_openmp(parallel: int) -> None: ...
def probe(isa: int, threads: int, rounds: int, /) -> int: ...
def probed_arithmetic(isa: int, /) -> str: ...
def quantize_4bit(
    isa: int,
    threads: int,
    x: int,
    type: int,
    n: int,
    blocksize: int,
    code: int,
    packed: int,
    absmax: int,
    /,
) -> None: ...
def quantize_8bit(
    isa: int,
    threads: int,
    x: int,
    type: int,
    n: int,
    blocksize: int,
    code: int,
    size: int,
    codes: int,
    absmax: int,
    /,
) -> None: ...
def dequantize_4bit(
    isa: int,
    threads: int,
    packed: int,
    code: int,
    absmax: int,
    nested_absmax: int,
    nested_code: int,
    nested_blocksize: int,
    offset: float,
    n: int,
    blocksize: int,
    out: int,
    type: int,
    /,
) -> None: ...
def dequantize_8bit(
    isa: int,
    threads: int,
    codes: int,
    code: int,
    size: int,
    absmax: int,
    n: int,
    blocksize: int,
    out: int,
    type: int,
    /,
) -> None: ...
def multiplies(isa: int, /) -> bool: ...
def matmul_4bit(
    isa: int,
    threads: int,
    gradient: bool,
    x: int,
    rows: int,
    type: int,
    packed: int,
    code: int,
    absmax: int,
    nested_absmax: int,
    nested_code: int,
    nested_blocksize: int,
    offset: float,
    blocksize: int,
    out_features: int,
    in_features: int,
    bias: int,
    y: int,
    /,
) -> None: ...
