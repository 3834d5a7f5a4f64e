"""Reading and tokenizing a large file: rows a second, and the memory that it takes, the setup of training included.

    python benchmarks/data.py --tokenizer FOLDER                a million rows, 1 GB
    python benchmarks/data.py --tokenizer FOLDER --rows 20000

A file of JSON lines is made first, of conversations with 200 to 900 and 100 to 650 characters of the text in
``pydoc_data``, and removed at the end. Then, timed: ``read_examples`` and ``tokenize``; and what a trainer asks of the
rows before its first step: their lengths, their digest, the order of an epoch by length, its first hundred batches.
Memory is the highest ``RssAnon`` of the process above what it was after the imports and the loading of the tokenizer,
read every 20 ms; pages of mapped files are the system's and do not count.
"""

import argparse
import itertools
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from pydoc_data import topics

import datasets
from transformers import AutoTokenizer

from halfbyte import data, tables
from halfbyte.hf.trainers.sampler import EpochSampler

COLUMNS = "{:28} {:>9} {:>12} {:>16}"


def write_rows(file: Path, rows: int) -> None:
    """Write so many conversations, drawn with the same seed each time."""
    text = " ".join(" ".join(topics.topics.values()).split())
    draw = random.Random(0)

    def some(least: int, most: int) -> str:
        length = draw.randrange(least, most)
        start = draw.randrange(len(text) - length)
        return text[start : start + length]

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            turns = [
                {"role": "user", "content": some(200, 900)},
                {"role": "assistant", "content": some(100, 650)},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")


def anonymous_memory() -> int:
    """The process's anonymous memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Measured:
    """A context: seconds, processor seconds, and the highest anonymous memory while it lasts."""

    def __enter__(self) -> "Measured":
        self.peak = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        self._begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begun[0]
        self.processor_seconds = time.process_time() - self._begun[1]
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, anonymous_memory())


def main() -> None:
    """Make the file, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="a model folder")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, options.rows)
        print(f"{options.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB; {os.cpu_count()} processors, "
              f"{os.getloadavg()[0]:.1f} of them busy")  # fmt: skip
        before = anonymous_memory()
        with Measured() as reading:
            made = data.tokenize(data.read_examples(file), tokenizer, options.max_length)
        with Measured() as setup:
            lengths = tables.lengths(made.rows)
            digest = tables.digest(made.rows)
            order = iter(EpochSampler(lengths, 16, 0))
            collate = data.Collator(tokenizer.pad_token_id)
            for _ in range(100):
                collate(made.rows.__getitems__(list(itertools.islice(order, 16))))
        assert isinstance(made.rows, datasets.Dataset) and digest == made.counts.digest
        print(f"{made.counts.tokens:,} tokens, {made.rows.data.nbytes / 1e6:,.0f} MB on the disk")
        print(COLUMNS.format("", "seconds", "of processor", "MB above before"))
        for name, part in (("reading and tokenizing", reading), ("setup of training", setup)):
            taken = f"{(part.peak - before) / 1e6:.0f}"
            print(COLUMNS.format(name, f"{part.seconds:.1f}", f"{part.processor_seconds:.1f}", taken))
        print(f"{options.rows / reading.seconds:,.0f} rows/s read and tokenized")


if __name__ == "__main__":
    main()
