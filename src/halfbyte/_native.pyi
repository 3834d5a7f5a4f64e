"""
The native kernels, built from csrc/. Nothing is checked here: halfbyte.kernels does that.

`isa` counts in tiers(). Tensors are addresses; 0 is none, where there may be none. A `type` is that
of values: 0 fp32, 1 bf16, 2 fp16. `absmax` is fp32, one per block. Sizes, strides and steps are in values.
"""

from collections.abc import Sequence

def tiers() -> list[str]:
    """
    Return the instruction-set tiers that this build and this chip have, best first.
    """

def use_openmp(parallel: int) -> None:
    """
    Share work out by the GOMP_parallel at this address from now on; 0: over threads of the extension's own.
    """

def tell_bus_error(text: str, code: int) -> None:
    """
    Write this and end the process with this code when a mapped file cannot be read any more, from now on.
    """

def probe(isa: int, threads: int, rounds: int) -> int:
    """
    Run the tier's fastest arithmetic in registers; return the additions and multiplications done.
    """

def probe_lookups(isa: int, threads: int, rounds: int) -> int:
    """
    Run the tier's lookups of 4-bit values in registers; return the values found.

    0 where the tier has no such loop.
    """

def probed_arithmetic(isa: int) -> str:
    """Return what probe() runs, in words."""

def quantize_4bit(
    isa: int, threads: int, x: int, type: int, n: int, blocksize: int, code: int, packed: int, absmax: int
) -> None:
    """
    Quantize n values to the nearest of the sixteen in `code`, two to a byte, the first in the high half.
    """

def quantize_8bit(
    isa: int, threads: int, x: int, type: int, n: int, blocksize: int, code: int, size: int, codes: int, absmax: int
) -> None:
    """
    Quantize n values to the nearest of the `size` in `code`, which ascend.
    """

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
) -> None:
    """
    Undo quantize_4bit.

    With `nested_absmax` the scale of a block is nested_code[absmax] nested_absmax + offset, `absmax` being bytes.
    """

def dequantize_8bit(
    isa: int, threads: int, codes: int, code: int, size: int, absmax: int, n: int, blocksize: int, out: int, type: int
) -> None:
    """Undo quantize_8bit."""

def multiplies(isa: int) -> bool:
    """Return whether the tier has products."""

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
) -> None:
    """
    y[rows, out] = x Wᵀ + bias, or with `gradient` y[rows, in] = x W, for a 4-bit W[out, in].
    """

class Sum:
    """
    y[rows, width] = bias + a sum of products, rounded once.

    A term is x Wᵀ, or with `gradient` x W, for a W[rows, columns]; `stride` and `step` lead to x's next row and value.
    """

    def __init__(
        self, isa: int, rows: int, width: int, type: int, y_type: int, bias: int, y: int, y_stride: int, as_many: bool
    ) -> None:
        """A sum without terms; `type` is that of every x."""

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
    ) -> None:
        """Add a term with a 4-bit weight, given as to dequantize_4bit."""

    def add_bytes(
        self,
        x: int,
        stride: int,
        step: int,
        gradient: bool,
        codes: int,
        absmax: int,
        blocksize: int,
        rows: int,
        columns: int,
    ) -> None:
        """
        Add a term with a weight in signed bytes: codes times absmax / 127 of their block.
        """

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
    ) -> None:
        """Add a term with a dense matrix."""

def matmul_sums(threads: int, sums: Sequence[Sum]) -> None:
    """Compute all these sums in one parallel region."""

def attends(isa: int) -> bool:
    """Return whether the tier has attention."""

def attention(
    isa: int,
    threads: int,
    sizes: tuple[int, int, int, int, int, int],
    type: int,
    ranges: int,
    scale: float,
    cap: float,
    q: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    v: tuple[int, int, int, int],
    out: tuple[int, int, int, int],
    lse: int,
) -> None:
    """
    Softmax attention over the keys [begin, end) of each query: int32 `ranges` [batches, queries, 2].

    `sizes`: batches, heads, key/value heads, queries, keys, values of a head. q, k, v, out: address,
    and strides of batch, head and row. `cap` 0: none. `lse`: fp32 [batches, heads, queries].
    """

def attention_backward(
    isa: int,
    threads: int,
    sizes: tuple[int, int, int, int, int, int],
    type: int,
    ranges: int,
    scale: float,
    cap: float,
    q: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    v: tuple[int, int, int, int],
    out: tuple[int, int, int, int],
    lse: int,
    dout: tuple[int, int, int, int],
    dq: tuple[int, int, int, int],
    dk: tuple[int, int, int, int],
    dv: tuple[int, int, int, int],
) -> None:
    """
    The gradients of attention, written to dq, dk and dv; all else as there.
    """

class Decoder:
    """
    All layers of a decoder, whose next tokens one call computes (csrc/decode.h).

    Layers are added in order; what is added to a place belongs to the last of them: 0 queries, keys and values,
    1 output, 2 gate and up, 3 down, 4 the head.
    """

    def __init__(
        self,
        isa: int,
        type: int,
        cache: int,
        widths: Sequence[int],
        activation: int,
        scale: float,
        cap: float,
        embedding_factor: float,
        logit_factor: float,
        logit_cap: float,
    ) -> None:
        """
        `widths`: width, heads, key/value heads, values of a head, inner width, vocabulary. `cache`: a type, or 3 int8.
        """

    def set_embedding(self, values: int, type: int, rows: int, columns: int) -> None:
        """The table that tokens are looked up in."""

    def add_layer(
        self, norms: Sequence[tuple[int, float, bool, bool] | None], whole_norms: bool, window: int, angles: int
    ) -> None:
        """
        Add a layer. Norms: before and after attention, before and after the MLP, of queries, of keys; each None or
        fp32 weight, eps, rounded, centered. `window` 0: none; `angles` -1: none.
        """

    def set_mixture(
        self,
        experts: int,
        chosen: int,
        sigmoid: bool,
        normalized: bool,
        factor: float,
        bias: int,
        groups: int,
        groups_kept: int,
        shared: bool,
        shared_gate: bool,
    ) -> None:
        """
        Give the last layer a mixture of so many experts, the shared one included.
        """

    def set_last_norm(self, norm: tuple[int, float, bool, bool] | None) -> None:
        """The norm before the head."""

    def add_weight(
        self,
        place: int,
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
    ) -> None:
        """Add a 4-bit weight, given as to dequantize_4bit."""

    def add_bytes(self, place: int, codes: int, absmax: int, blocksize: int, rows: int, columns: int) -> None:
        """Add a weight in signed bytes."""

    def add_dense(self, place: int, values: int, rows: int, columns: int) -> None:
        """Add a dense weight of the decoder's type."""

    def set_bias(self, place: int, bias: int) -> None:
        """The fp32 bias of all weights of a place."""

    def add_adapter(self) -> int:
        """Add an adapter without parts; return its number."""

    def clear_adapter(self, adapter: int) -> None:
        """Take all parts from an adapter."""

    def set_factor_a(self, adapter: int, layer: int, place: int, a: int, rank: int) -> None:
        """Set all A of a place, one below the other, times their scaling."""

    def add_factor_b(
        self, adapter: int, layer: int, place: int, first: int, width: int, rank: int, b: int, rescale: int, bias: int
    ) -> None:
        """
        Add Bᵀ [rank, width] for the columns from `first` on; fp32 `rescale` and `bias` may be 0.
        """

    def page_bytes(self) -> int:
        """Return the size of a page of the cache."""

    def profile(self, on: bool) -> None:
        """
        Take the processor time of the phases of each step from now on, or no more.
        """

    def at(self) -> int:
        """
        Return the address of the number of the layer that a step is at, int64.
        """

    def advise(self, on: bool) -> None:
        """
        Tell the system of all experts of a layer as soon as they are chosen from now on, or no more.
        """

    def chosen(self) -> list[list[int]]:
        """Return of each layer the experts that the last step chose."""

    def phase_times(self) -> list[tuple[int, int]]:
        """
        Return it for each kind of phase, in nanoseconds: in its items, in waiting for those of other threads.
        """

    def step(
        self,
        threads: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        pages: Sequence[int],
        adapters: Sequence[int],
        tables: Sequence[tuple[int, int, int]],
        logits: int,
    ) -> None:
        """
        Write the fp32 logits [rows, vocabulary] of the token after each of these.

        `pages`: of each row the address of the addresses of its pages. Rows of one adapter (-1: none) follow each
        other. `tables`: fp32 cosines and sines [positions, size], and size.
        """

def adamw_32bit(
    isa: int,
    threads: int,
    constants: tuple[float, float, float, float, float, float, float, float],
    types: Sequence[int],
    sizes: Sequence[int],
    params: Sequence[int],
    grads: Sequence[int],
    ms: Sequence[int],
    vs: Sequence[int],
) -> None:
    """
    An AdamW step over many tensors with fp32 moments.

    `constants`: 1 - lr decay, beta1, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^step), eps, -lr / (1 - beta1^step).
    """

def adamw_8bit(
    isa: int,
    threads: int,
    constants: tuple[float, float, float, float, float, float, float, float],
    types: Sequence[int],
    sizes: Sequence[int],
    params: Sequence[int],
    grads: Sequence[int],
    m_codes: Sequence[int],
    m_absmax: Sequence[int],
    v_codes: Sequence[int],
    v_absmax: Sequence[int],
    code: int,
    code_unsigned: int,
    blocksize: int,
) -> None:
    """
    The same with moments in 8 bits: m in the 256 values of `code`, v in those of `code_unsigned`.

    Both ascend.
    """

def rms_norm(
    isa: int,
    threads: int,
    type: int,
    count: int,
    width: int,
    x: tuple[int, int],
    residual: tuple[int, int],
    weight: int,
    eps: float,
    offset: float,
    rounded: bool,
    h: int,
    y: int,
    scale: int,
) -> None:
    """
    y = (offset + weight) h scale, h = x + residual, scale = 1 / sqrt(mean(h²) + eps) of each row, fp32.

    x and residual: address and stride; without a residual h is not written. `rounded`: h scale is
    rounded to the type before the weight multiplies it.
    """

def rms_norm_gradient(
    isa: int,
    threads: int,
    type: int,
    count: int,
    width: int,
    dy: tuple[int, int],
    h: tuple[int, int],
    dh: tuple[int, int],
    weight: int,
    scale: int,
    offset: float,
    dx: int,
) -> None:
    """
    The gradient of rms_norm by x, plus `dh`, if there is one, which comes down to h from elsewhere.
    """

def rms_norm_weight_gradient(
    isa: int,
    threads: int,
    type: int,
    count: int,
    width: int,
    dy: tuple[int, int],
    h: tuple[int, int],
    scale: int,
    dweight: int,
) -> None:
    """The gradient of rms_norm by the weight, fp32."""

def gated(
    isa: int,
    threads: int,
    type: int,
    count: int,
    width: int,
    activation: int,
    gate: tuple[int, int],
    up: tuple[int, int],
    y: int,
) -> None:
    """
    y = activation(gate) up, activation 0 SiLU, 1 GELU by tanh. gate and up: address and stride.
    """

def gated_gradient(
    isa: int,
    threads: int,
    type: int,
    count: int,
    width: int,
    activation: int,
    dy: tuple[int, int],
    gate: tuple[int, int],
    up: tuple[int, int],
    dgate: int,
    dup: int,
    stride: int,
) -> None:
    """The gradients of gated; `stride` is that of both."""

def rotary(
    isa: int,
    threads: int,
    type: int,
    fp32_angles: bool,
    inverse: bool,
    shape: Sequence[int],
    strides: Sequence[int],
    x: int,
    cos: int,
    sin: int,
    turned: int,
    angle_strides: Sequence[int],
    y: int,
) -> None:
    """
    Turn the first `turned` values of each head of x, [samples, length, heads, size], and copy the rest.

    cos and sin: [samples, length, turned], of the same strides, fp32 or as x. `inverse`: turn back.
    """

def fold_softmax(
    isa: int,
    threads: int,
    logits: int,
    type: int,
    rows: int,
    width: int,
    labels: int,
    first: int,
    scale: float,
    cap: float,
    gradient: bool,
    state: Sequence[int],
) -> None:
    """
    Take the columns [first, first + width) of the logits into the softmax of each row.

    `state`: the members of RunningSoftmax, in order. `labels`: int64, of the whole vocabulary. `cap` 0: none.
    `gradient`: the logits become exp(z - m) z', as in kernels/reference.py.
    """

def exp(isa: int, x: int, n: int, y: int) -> None:
    """y = exp(x) for n fp32 values."""

def sigmoid(isa: int, x: int, n: int, y: int) -> None:
    """y = sigmoid(x) for n fp32 values."""

def tanh(isa: int, x: int, n: int, y: int) -> None:
    """y = tanh(x) for n fp32 values."""
