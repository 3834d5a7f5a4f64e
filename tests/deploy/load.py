"""A load for the server: clients that stream, of other lengths, adapters and samplings, that hang up, or read slowly.

As a program, it is the soak: python tests/deploy/load.py SECONDS [PICTURE] serves the small model, and draws memory.
"""

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil

MODELS = ("tiny", "red", "blue")


@dataclass
class Seen:
    """What came of a load."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


def greedy_requests(count: int) -> list[dict[str, Any]]:
    """Return requests of different lengths and adapters whose answers are known once they were given alone."""
    random_ = random.Random(5)
    return [
        {
            "model": random_.choice(MODELS),
            "messages": [{"role": "user", "content": "".join(random_.choices("abc de\n", k=random_.randint(1, 600)))}],
            "max_tokens": random_.randint(5, 60),
            "temperature": 0,
        }
        for _ in range(count)
    ]


async def answer(client: openai.AsyncOpenAI, asked: dict[str, Any], slow: float = 0.0) -> str:
    """Return the answer, read as a stream."""
    chunks = await client.chat.completions.create(**asked, stream=True)
    text = ""
    async for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        if slow:
            await asyncio.sleep(slow)
    return text


async def load(url: str, known: dict[int, str], seconds: float, clients: int, seed: int = 0) -> Seen:
    """Let clients ask until the time is up.

    Args:
        url: of the server.
        known: the greedy requests' answers, by their numbers.
        seconds: how long.
        clients: how many at once.
        seed: of what they do.
    """
    seen, until, began = Seen(), time.monotonic() + seconds, time.monotonic()
    requests = greedy_requests(len(known))

    async def one(number: int) -> None:
        random_ = random.Random(seed * 1000 + number)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=20, timeout=300) as client:
            while time.monotonic() < until:
                kind = random_.choices(["greedy", "sampled", "hangs up", "slow", "cut off"], [5, 2, 2, 1, 1])[0]
                place = random_.randrange(len(requests))
                asked = dict(requests[place])
                if kind in ("greedy", "slow"):
                    text = await answer(client, asked, 0.02 if kind == "slow" else 0)
                    if text != known[place]:
                        seen.wrong.append(f"{place}: {text!r} is not {known[place]!r}")
                elif kind == "sampled":
                    more = {"temperature": 1.2, "top_p": 0.9, "frequency_penalty": 0.5, "seed": random_.randrange(99)}
                    await answer(client, asked | more)
                elif kind == "hangs up":
                    chunks = await client.chat.completions.create(**asked | {"max_tokens": 300}, stream=True)
                    for _ in range(random_.randint(0, 5)):
                        with contextlib.suppress(StopAsyncIteration):
                            await anext(chunks)
                    await chunks.close()
                else:
                    with contextlib.suppress(TimeoutError):
                        whole = client.chat.completions.create(**asked | {"max_tokens": 300})
                        await asyncio.wait_for(whole, random_.random() / 5)
                seen.counts[kind] += 1

    async def watch() -> None:
        while time.monotonic() < until:
            seen.memory.append((time.monotonic() - began, psutil.Process().memory_info().rss))
            await asyncio.sleep(max(0.1, seconds / 500))

    await asyncio.gather(watch(), *(one(number) for number in range(clients)))
    return seen


def alone(url: str, count: int) -> dict[int, str]:
    """Return the answers of the greedy requests, each asked alone."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        return {
            number: str(client.chat.completions.create(**asked).choices[0].message.content)
            for number, asked in enumerate(greedy_requests(count))
        }


def growth(memory: list[tuple[float, int]]) -> int:
    """Return by how many bytes the second half's median lies above that of the second quarter."""
    quarter = len(memory) // 4
    early, late = (
        sorted(taken for _, taken in part) for part in (memory[quarter : 2 * quarter], memory[2 * quarter :])
    )
    return late[len(late) // 2] - early[len(early) // 2]


def main(seconds: float, picture: Path) -> None:
    """Run the soak, and draw its memory."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from matplotlib.figure import Figure
    from serving import running, save_adapter, save_model
    from transformers import AutoTokenizer

    from conftest import save_tiny

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = save_model(folder / "base", AutoTokenizer.from_pretrained(save_tiny(folder / "small")))
        names = [
            f"{name}={save_adapter(base, folder / name, number)}" for number, name in enumerate(("red", "blue"), 1)
        ]
        with running(base, name="tiny", adapter=names, access_log="none") as server:
            known = alone(server.url, 24)
            seen = asyncio.run(load(server.url, known, seconds, 32))
            server.wait_idle()
            now = server.service.engine.figures()
            failures = [line for line in server.log if line["event"] == "failure"]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([at / 60 for at, _ in seen.memory], [taken / 2**20 for _, taken in seen.memory])
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", title="32 clients (server and clients)")
    axes.set_ylim(0, 1.1 * max(taken for _, taken in seen.memory) / 2**20)
    figure.savefig(picture)
    print(f"{sum(seen.counts.values()):,} requests: {dict(seen.counts)}; answers by their end: {now.ended}")
    print(f"{len(seen.wrong)} wrong, {len(failures)} failures, memory grew by {growth(seen.memory) / 2**20:.1f} MiB")
    for line in seen.wrong[:5]:
        print(line)
    if seen.wrong or failures or growth(seen.memory) > 64 << 20:
        sys.exit(1)


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "soak.svg"))
