"""Tokenizing conversations, beside what the ``tokenizers`` library alone takes for the same texts.

    python benchmarks/tokens.py --tokenizer FOLDER              20,000 conversations, 20 MB of JSON lines, nine rounds
    python benchmarks/tokens.py --tokenizer FOLDER --file rows.jsonl

Both sides take turns, round after round. ``halfbyte`` reads the lines of a file of conversations, writes each with the
tokenizer's chat template, tokenizes, labels, and cuts to ``max_length``: ``json.loads`` and ``encode_examples``.
``tokenizers`` is ``encode_batch`` over the texts that the template made of them, in lists of some 1 MB: the least that
tokenizing can cost, since every character goes through it. The table shows megabytes of the JSON file in a second, of
the clock's and of the processor's (all threads together), the medians over the rounds, and the ratio within a round.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from data import write_rows  # beside this file
from halfbyte.data import Chat, encode_examples
from halfbyte.data.template import Writer

MAX_LENGTH = 1024
CHUNK = 1 << 20


def timed(work: Callable[[], int]) -> tuple[float, float, int]:
    """Return seconds, processor seconds, and what ``work`` returns."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - processor, result


def main() -> None:
    """Make the file, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="a model folder")
    parser.add_argument("--file", type=Path, help="JSON lines with messages, in the place of made ones")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or Path(folder) / "rows.jsonl"
        if not options.file:
            write_rows(file, options.rows)
        size = file.stat().st_size / 1e6

        def examples() -> list[Chat]:
            with file.open(encoding="utf-8") as lines:
                return [Chat(f"row {n}", json.loads(line)["messages"]) for n, line in enumerate(lines)]

        def ours() -> int:
            with file.open(encoding="utf-8") as lines:
                chats = (Chat(f"row {n}", json.loads(line)["messages"]) for n, line in enumerate(lines))
                encoded = encode_examples(chats, tokenizer, MAX_LENGTH)
                return sum(sum(one.lengths) for one in encoded)

        write = Writer(tokenizer)
        lists: list[list[str]] = [[]]
        length = 0
        for text in (draft.text for chat in examples() for draft in write(chat)):
            if length > CHUNK:
                lists.append([])
                length = 0
            lists[-1].append(text)
            length += len(text)

        def alone() -> int:
            backend = tokenizer.backend_tokenizer
            return sum(len(one) for texts in lists for one in backend.encode_batch(texts, add_special_tokens=False))

        sides = {"halfbyte": ours, "tokenizers": alone}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        tokens = {name: 0 for name in sides}
        for number in range(options.rounds + 1):
            for name, work in sides.items():
                seconds, processor, tokens[name] = timed(work)
                if number:
                    taken[name].append((seconds, processor))
    print(f"{size:.1f} MB, {tokens['halfbyte']:,} tokens ({tokens['tokenizers']:,} by tokenizers alone); "
          f"{os.cpu_count()} processors, {os.getloadavg()[0]:.1f} of them busy at the end")  # fmt: skip
    print(f"{'':12}{'MB/s':>8}{'MB/s of processor':>20}")
    for name, times in taken.items():
        clock, processor = (statistics.median(size / pair[i] for pair in times) for i in (0, 1))
        print(f"{name:12}{clock:8.1f}{processor:20.1f}")
    pairs = list(zip(taken["halfbyte"], taken["tokenizers"], strict=True))
    clock, processor = (statistics.median(other[i] / own[i] for own, other in pairs) for i in (0, 1))
    print(f"halfbyte reaches {clock:.0%} of tokenizers' speed by the clock, {processor:.0%} by processor time")


if __name__ == "__main__":
    main()
