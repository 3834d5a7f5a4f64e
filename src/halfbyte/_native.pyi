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

class Sum:
    def __init__(
        self, isa: int, rows: int, width: int, type: int, y_type: int, bias: int, y: int, y_stride: int, /
    ) -> None: ...
    def add_weight(
        self,
        x: int,
        stride: int,
        step: int,
        gradient: bool,
        packed: int,
        code: int,
        absmax: int,
        nested_absmax: int,
        nested_code: int,
        nested_blocksize: int,
        offset: float,
        blocksize: int,
        rows: int,
        columns: int,
        /,
    ) -> None: ...
    def add_dense(
        self,
        x: int,
        stride: int,
        step: int,
        gradient: bool,
        values: int,
        type: int,
        rows: int,
        columns: int,
        values_stride: int,
        /,
    ) -> None: ...

def matmul_sums(threads: int, sums: list[Sum], /) -> None: ...
def adamw_32bit(
    isa: int,
    threads: int,
    constants: tuple[float, float, float, float, float, float, float, float],
    types: list[int],
    sizes: list[int],
    params: list[int],
    grads: list[int],
    ms: list[int],
    vs: list[int],
    /,
) -> None: ...
def adamw_8bit(
    isa: int,
    threads: int,
    constants: tuple[float, float, float, float, float, float, float, float],
    types: list[int],
    sizes: list[int],
    params: list[int],
    grads: list[int],
    m_codes: list[int],
    m_absmax: list[int],
    v_codes: list[int],
    v_absmax: list[int],
    code: int,
    code_unsigned: int,
    blocksize: int,
    /,
) -> None: ...
