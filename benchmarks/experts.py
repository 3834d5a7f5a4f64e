"""The products of a mixture's experts beside those of a dense layer of the same active size.

    python benchmarks/experts.py                          gate and up of Qwen3-30B-A3B's width, 4 × 512 tokens
    python benchmarks/experts.py --width 4096 --inner 14336 --of 8:2

``grouped`` is what ``Experts`` do for a stack: each token's rows, taken by expert, through its experts' 4-bit weights
with LoRA of rank 16 on each. ``dense`` is ``lora_linear`` over a weight with as many values as a token's experts
have, with one adapter. Both sides take turns; told are medians over the rounds, and flop of the base products alone
over the time, in which taking rows and adding their gradients count for ``grouped``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from halfbyte.nn import LowRank, Projection, lora_linear
from halfbyte.nn.experts import StackedLowRank, experts_linear, routes_of, take_rows
from halfbyte.quant import quantize_4bit

RANK = 16


def sides(args: argparse.Namespace, experts: int, chosen: int) -> dict[str, Callable[[], tuple[float, float]]]:
    """Return what each side does once, as seconds of forward and backward."""
    width, inner, tokens = args.width, args.inner, args.tokens

    def weight(rows: int) -> Any:
        return quantize_4bit(torch.randn(rows, width) * 0.02)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(shape).requires_grad_()

    weights = {number: [weight(inner), weight(inner)] for number in range(experts)}
    stacked = StackedLowRank(factor(experts, RANK, width), factor(experts, RANK, 2 * inner), 2.0)
    wide = [weight(inner * chosen) for _ in range(2)]
    low_rank = LowRank(factor(RANK, width), factor(inner * chosen, RANK), 2.0)
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    index = torch.rand(tokens, experts).topk(chosen).indices
    gradients = torch.randn(tokens * chosen, 2 * inner).bfloat16(), torch.randn(tokens, inner * chosen).bfloat16()

    def grouped() -> tuple[float, float]:
        begun = time.perf_counter()
        routes = routes_of(index, experts)
        y = experts_linear(take_rows(x, routes), routes, weights, None, [stacked])
        between = time.perf_counter()
        y.backward(gradients[0])
        return between - begun, time.perf_counter() - between

    def dense() -> tuple[float, float]:
        begun = time.perf_counter()
        ys = lora_linear(x, [Projection(one, None, [low_rank]) for one in wide])
        between = time.perf_counter()
        torch.autograd.backward(ys, [gradients[1]] * 2)
        return between - begun, time.perf_counter() - between

    return {"grouped": grouped, "dense": dense}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768, help="rows of gate, and of up, of an expert")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--of", nargs="+", default=["8:2", "16:2", "64:4", "128:8"], metavar="EXPERTS:CHOSEN")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| experts, chosen, rows of each | forward, GFLOP/s | dense | of it | backward | dense | of it |")
    print("|---" * 7 + "|")
    for experts, chosen in (map(int, of.split(":")) for of in args.of):
        both = sides(args, experts, chosen)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
        for number in range(args.rounds + 1):
            for name, side in both.items():
                seconds = side()
                if number:  # the first touches the memory
                    taken[name].append(seconds)
        flop = 4 * args.tokens * chosen * args.width * args.inner
        cells = []
        for way in (0, 1):
            rates = {name: [flop / one[way] / 1e9 for one in found] for name, found in taken.items()}
            ratios = [ours / theirs for ours, theirs in zip(rates["grouped"], rates["dense"], strict=True)]
            cells += [f"{statistics.median(rates[name]):.0f}" for name in both] + [f"{statistics.median(ratios):.2f}"]
        print(f"| {experts}, {chosen}, {args.tokens * chosen // experts} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
