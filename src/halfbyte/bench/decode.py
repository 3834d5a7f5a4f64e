"""The run of the decoding benchmark: the same works side by side, each side in a process of its own, in turns.

A machine's speed changes from minute to minute, so the sides take turns with each work, and ratios are taken round by
round. While one side works the others wait, their threads asleep.

- Every side does every work once before the rounds, which does not count: caches are filled and memory is touched.
- In every round the speed of reading memory is measured (:data:`READ_BYTES`, more than any cache holds, by all threads:
  torch's sum of fp32 values, which from a cache is some times as fast), and the peak of arithmetic; the highest count
  for the floor (:mod:`halfbyte.bench.decode_works`).
- llama.cpp is tried with its fused attention and without, and measured in the faster way.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from halfbyte.bench import gguf_file, llama_cpp
from halfbyte.bench.decode_report import DecodeReport, DecodeRow, SideTimes
from halfbyte.bench.decode_sides import Halfbyte, Opened, Process, Transformers
from halfbyte.bench.decode_works import Sizes, Work, floor, step_bytes, works
from halfbyte.bench.process import cpu_only, model_folder
from halfbyte.bench.run import LIBRARIES, circumstances, forced, peak
from halfbyte.bench.works import has_bitsandbytes
from halfbyte.deploy.export import llama_library
from halfbyte.errors import InputError, nearest
from halfbyte.kernels import product_dtype

PEERS = ("bitsandbytes", "bf16", "llama.cpp")
READ_BYTES = 512 * 2**20
CALLS = 5
"""Of a ceiling, of which the fastest counts."""
PEAK_CALLS = 20
ROWS = (1, 4, 16, 64)
MOST_ROWS = 64


def bench_decode(
    model: str = "135m",
    *,
    rows: Sequence[int] = ROWS,
    peers: Sequence[str] = ("bitsandbytes", "bf16"),
    head: str | None = None,
    cache: str | None = None,
    prompt: int = 512,
    history: int = 1000,
    context: int = 64,
    tokens: int = 32,
    adapters: int = 16,
    rounds: int = 5,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> DecodeReport:
    """Measure decoding and return what was found.

    Args:
        model: folder or hub id of a 16-bit model, or a name of :data:`halfbyte.bench.shapes.SHAPES`.
        rows: numbers of conversations that are decoded together.
        peers: of :data:`PEERS`.
        head, cache: of halfbyte, as :func:`halfbyte.generate.decoders.decoder_for` takes them.
        prompt, history, context, tokens, adapters: as in :func:`halfbyte.bench.decode_works.works`.
        rounds: that are counted, 2 or more.
        threads: of every side; None takes torch's number.
        progress: is told what happens.

    Raises:
        InputError: there is no such peer or model, a peer is not installed, or a side refuses its input.
    """
    for name in peers:
        if name not in PEERS:
            raise InputError(f"There is no peer {name!r}{nearest(name, PEERS)}; there is {', '.join(PEERS)}.")
    if max(rows) > MOST_ROWS or max(adapters, 1) > MOST_ROWS:
        raise InputError(f"One step decodes up to {MOST_ROWS} rows; ask for no more.")
    if "bitsandbytes" in peers and not has_bitsandbytes():
        raise InputError("bitsandbytes is not installed: install it, or leave it away.")
    if "llama.cpp" in peers:
        progress("installing llama.cpp, unless it is there")
        llama_cpp.module()
    asked = works(list(rows), prompt=prompt, history=history, context=context, tokens=tokens, adapters=adapters)
    with forced(None, threads), cpu_only(), model_folder(model, progress) as folder, contextlib.ExitStack() as stack:
        if "llama.cpp" in peers:
            gguf_file.check(folder)
        arithmetic, flop, ceiling = peak()
        found = circumstances(arithmetic, (*LIBRARIES, "transformers"))
        if "llama.cpp" in peers:
            found.versions["node-llama-cpp"] = llama_library.PACKAGES[0].rpartition("@")[2]
        sides = _open(folder, peers, head, cache, adapters, asked[0][0], stack, progress)
        memory = torch.ones(READ_BYTES // 4)

        def ceilings() -> tuple[float, float]:
            return READ_BYTES / _fastest(memory.sum, CALLS), flop / _fastest(ceiling.calls[0], PEAK_CALLS)

        measured = _measure(sides, asked, rounds, ceilings, progress)
    return DecodeReport(
        circumstances=found,
        model=Path(model).name,
        head=head or "as trained",
        cache=cache or "as computed",
        rows=measured,
    )


def _open(
    folder: str,
    peers: Sequence[str],
    head: str | None,
    cache: str | None,
    adapters: int,
    first: Work,
    stack: contextlib.ExitStack,
    progress: Callable[[str], None],
) -> dict[str, Opened]:
    """Load every side; the one with adapters is called ``adapters``."""
    wanted: dict[str, Halfbyte | Transformers] = {"halfbyte": Halfbyte(head, cache)}
    if adapters:
        wanted["adapters"] = Halfbyte(head, cache, adapters)
    dense = "bf16" if product_dtype(torch.bfloat16, "cpu") == torch.bfloat16 else "fp32"
    names = {"bitsandbytes": "bitsandbytes", "bf16": dense}
    wanted |= {names[peer]: Transformers(peer == "bitsandbytes") for peer in PEERS[:2] if peer in peers}
    files: dict[str, Path] = {}
    if "llama.cpp" in peers:
        progress("writing the model for llama.cpp")
        files = stack.enter_context(llama_cpp.written(folder, llama_cpp.FORMS))
    sides: dict[str, Opened] = {}
    for name, side in wanted.items():
        progress(f"loading {name}")
        sides[name] = process = Process(side, folder)
        stack.callback(process.end)
    for name, file in files.items():
        progress(f"loading {name}")
        sides[name] = _faster(file, llama_cpp.sizes_in(name, sides["halfbyte"].sizes), first, stack)
    return sides


def _faster(file: Path, sizes: Sizes, work: Work, stack: contextlib.ExitStack) -> llama_cpp.LlamaCpp:
    """Open a file in llama.cpp's two ways, one after the other, and return the faster one."""
    threads = torch.get_num_threads()
    plain = llama_cpp.LlamaCpp(file, sizes, threads)
    try:
        time_of_plain = min(plain.ask(work).seconds for _ in range(3))
    finally:
        plain.end()
    side = llama_cpp.LlamaCpp(file, sizes, threads, flash=True)
    stack.callback(side.end)
    if min(side.ask(work).seconds for _ in range(3)) > time_of_plain:
        side.end()
        side = llama_cpp.LlamaCpp(file, sizes, threads)
        stack.callback(side.end)
    return side


def _measure(
    sides: Mapping[str, Opened],
    asked: Sequence[tuple[Work, bool]],
    rounds: int,
    ceilings: Callable[[], tuple[float, float]],
    progress: Callable[[str], None],
) -> list[DecodeRow]:
    """Let the sides take turns."""
    turns = [
        (work, {"halfbyte": sides["adapters"]} if adapted else {n: s for n, s in sides.items() if n != "adapters"})
        for work, adapted in asked
    ]
    times = {(work, name): SideTimes() for work, doing in turns for name in doing}
    bandwidths, peaks = [], []
    for turn in range(rounds + 1):
        for work, doing in turns:
            for name, side in doing.items():
                progress(f"round {turn} of {rounds}: {work.name}, {name}")
                took = side.ask(work)
                if turn:
                    times[work, name].seconds.append(took.seconds)
                    times[work, name].processor_seconds.append(took.processor_seconds)
        bandwidth, peak_flops = ceilings()
        bandwidths.append(bandwidth)
        peaks.append(peak_flops)
    phases = {}
    for work, doing in turns:
        ours = doing["halfbyte"]
        if work.kind == "decode" and isinstance(ours, Process):
            progress(f"a profiled round: {work.name}")
            phases[work] = ours.phases(work)
        for name, side in doing.items():
            own = times[work, name]
            own.step_bytes = step_bytes(work, side.sizes)
            own.floor_seconds = floor(work, side.sizes, max(bandwidths), max(peaks))
    return [
        DecodeRow(
            name=work.name,
            kind=work.kind,
            texts=work.rows,
            adapters=work.adapters,
            tokens=work.counted,
            read_bandwidth=bandwidths,
            peak_flops=peaks,
            sides={name: times[work, name] for name in doing},
            phases=phases.get(work, {}),
        )
        for work, doing in turns
    ]


def _fastest(call: Callable[[], object], calls: int) -> float:
    times = [time.perf_counter()]
    for _ in range(calls):
        call()
        times.append(time.perf_counter())
    return min(end - begin for begin, end in itertools.pairwise(times))
