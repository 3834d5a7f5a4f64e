"""The server with OpenAI's own client: what is asked for is what comes, as ``generate`` has it."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema
import openai
import pytest
from serving import Running, running
from transformers import AutoTokenizer

import halfbyte
from halfbyte.deploy.serve.answering import merged
from halfbyte.deploy.serve.log import Record
from halfbyte.deploy.serve.tools import ToolForm
from halfbyte.generate import stream_reply
from halfbyte.generate.answers import Piece, Stream

MESSAGES: list[Any] = [{"role": "user", "content": "Who are you?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "maxLength": 8}},
                "required": ["place"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


def ask(client: openai.OpenAI, **more: Any) -> Any:
    options = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(**options | more)


def test_a_greedy_answer_is_that_of_generate(client: openai.OpenAI, base: Path) -> None:
    model, tokenizer = halfbyte.load(base), AutoTokenizer.from_pretrained(base)
    expected = "".join(stream_reply(model, tokenizer, MESSAGES, max_new_tokens=24))
    answer = ask(client)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    tokens = len(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, 24)
    text = client.completions.create(model="tiny", prompt="Once upon", temperature=0, max_tokens=9)
    assert text.choices[0].text == "".join(stream_reply(model, tokenizer, "Once upon", max_new_tokens=9))


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    whole = ask(client)
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_log_probabilities_name_the_tokens_of_the_answer(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 24
    assert bytes(byte for token in tokens for byte in token.bytes).decode(errors="replace") == (
        answer.choices[0].message.content
    )
    for token in tokens:  # greedy: the likeliest one
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].logprob == token.logprob <= 0
        assert len(token.top_logprobs) == 3
    chunks = list(ask(client, logprobs=True, stream=True))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert [token.logprob for token in streamed] == [token.logprob for token in tokens]
    text = client.completions.create(model="tiny", prompt="ab", logprobs=2, max_tokens=5, temperature=0)
    found = text.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 5
    assert all(len(top) == 2 for top in found.top_logprobs) and found.text_offset[0] == 0


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    three = ask(client, n=3, seed=7, temperature=1)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert three.usage.completion_tokens == 72
    assert ask(client, seed=7, temperature=1).choices[0].message.content == texts[0]
    assert [choice.message.content for choice in ask(client, n=3, seed=7, temperature=1).choices] == texts
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, seed=7, temperature=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_prompts_of_a_completion_are_answered_in_their_order(client: openai.OpenAI) -> None:
    alone = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in ("one", "two")
    ]
    both = client.completions.create(model="tiny", prompt=["one", "two"], n=2, max_tokens=6, temperature=0, echo=True)
    texts = [choice.text for choice in both.choices]
    assert texts == [f"one{alone[0]}", f"one{alone[0]}", f"two{alone[1]}", f"two{alone[1]}"]
    assert both.usage.prompt_tokens == 6 and both.usage.completion_tokens == 24
    ids = [ord("o") - 33, 1, 2]
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=2).usage.prompt_tokens == 3


def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    text = ask(client).choices[0].message.content
    stop = text[9:12]
    answer = ask(client, stop=["never there", stop]).choices[0]
    assert answer.message.content == text[: text.find(stop)] and answer.finish_reason == "stop"
    biased = ask(client, logit_bias={"5": 100}, max_tokens=3, logprobs=True).choices[0]
    assert len({token.token for token in biased.logprobs.content}) == 1
    ended = ask(client, logit_bias={"5": 100}, extra_body={"stop_token_ids": [5]}, logprobs=True).choices[0]
    assert (ended.message.content, ended.finish_reason, ended.logprobs.content) == ("", "stop", [])


def test_an_answer_follows_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = ask(client, response_format=form, max_tokens=200).choices[0]
    jsonschema.validate(json.loads(answer.message.content), schema)
    assert answer.finish_reason == "stop"
    bias = {str(ord("}") - 33): 20}
    anything = ask(client, response_format={"type": "json_object"}, max_tokens=300, logit_bias=bias).choices[0]
    assert isinstance(json.loads(anything.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_of_a_tool_is_read_from_the_answer(client: openai.OpenAI, choice: Any) -> None:
    options = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    answer = ask(client, **options).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    [call] = answer.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), TOOLS[0]["function"]["parameters"])
    chunks = list(ask(client, **options, stream=True))
    streamed = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert [one.function.arguments for one in streamed] == [call.function.arguments]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert ask(client, messages=turns, tools=TOOLS).choices[0].message.content


def test_of_several_calls_the_first_alone_is_taken_where_none_may_be_beside_it() -> None:
    text = "".join(f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>\n' for name in ("one", "two"))
    for parallel, expected in ((True, ["one", "two"]), (False, ["one"])):
        said, calls = ToolForm("hermes", parallel).read(f"Well. {text}")
        assert (said, [call["function"]["name"] for call in calls]) == ("Well.", expected)


def test_adapters_are_models_with_answers_of_their_own(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "red", "blue"]
    assert client.models.retrieve("red").model_dump()["parent"] == "tiny"
    answers = {name: ask(client, model=name).choices[0].message.content for name in ("tiny", "red", "blue")}
    assert len(set(answers.values())) == 3
    with pytest.raises(openai.NotFoundError, match=r"did you mean 'blue'.*tiny, red and blue") as caught:
        ask(client, model="bluee")
    assert caught.value.code == "model_not_found"


def test_many_answers_at_once_by_the_asynchronous_client(served: Running, client: openai.OpenAI) -> None:
    alone = ask(client).choices[0].message.content

    async def stream(asking: openai.AsyncOpenAI) -> str:
        chunks = await asking.chat.completions.create(
            model="tiny", messages=MESSAGES, temperature=0, max_tokens=24, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as asking:
            return await asyncio.gather(*(stream(asking) for _ in range(12)))

    assert asyncio.run(all_of_them()) == [alone] * 12


def test_a_client_that_hangs_up_frees_its_row(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served.service.engine
    step = engine.decoder.step

    def slow(*arguments: Any) -> Any:
        time.sleep(0.005)  # as a model that is worth serving: the tiny one would have said all before anybody hears
        return step(*arguments)

    monkeypatch.setattr(engine.decoder, "step", slow)
    with served.client(timeout=httpx.Timeout(30)) as client:
        chunks = ask(client, stream=True, max_tokens=900, logit_bias={"256": -100})
        for _ in range(3):
            next(chunks)
        assert engine.figures().rows == 1
        before = engine.figures()
        chunks.close()
        served.wait_idle(5)
    after = engine.figures()
    assert after.ended["cancelled"] == before.ended.get("cancelled", 0) + 1
    assert after.tokens_written - before.tokens_written < 100  # some 0.4 s
    for number in range(1, 4):  # a client that runs out of patience
        # long enough for a busy machine to have begun, and far from the 4.5 s that 900 tokens take
        with served.client(timeout=1) as client, pytest.raises(openai.APITimeoutError):
            ask(client, max_tokens=900, n=8, logit_bias={"256": -100})
        wanted, until = after.ended["cancelled"] + 8 * number, time.monotonic() + 5
        while engine.figures().ended["cancelled"] < wanted and time.monotonic() < until:
            time.sleep(0.01)
        assert engine.figures().ended["cancelled"] == wanted
        served.wait_idle(5)
    assert engine.figures().ended.get("length", 0) == after.ended.get("length", 0)


@pytest.mark.parametrize("turns", range(8))
def test_a_hang_up_at_the_moment_of_a_piece_is_heard(served: Running, turns: int) -> None:
    piece = Piece((), "text")

    async def hang_up() -> None:
        stream = Stream(1, lambda: None)

        async def read() -> None:
            async with contextlib.aclosing(merged(served.service, [stream], Record("", "", "", ""))) as pieces:
                async for _ in pieces:
                    pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.01)
        stream.put(piece, stream.usage)
        for _ in range(turns):  # of the loop, on the piece's way
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading], timeout=5)
        assert reading.cancelled()

    asyncio.run(hang_up())


def test_a_full_queue_is_told_and_the_client_asks_again(base: Path) -> None:
    with running(base, name="tiny", max_waiting=1, memory="400KB", access_log="none") as server:
        long = {"max_tokens": 900, "logit_bias": {"256": -100}}
        with server.client() as client:
            first = ask(client, stream=True, **long)
            next(iter(first))
            second = ask(client, stream=True, **long)
            time.sleep(0.05)
            assert server.service.engine.figures().waiting == 1
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client, **long)
            assert caught.value.response.headers["retry-after"] == "1"
            assert caught.value.code == "rate_limit_exceeded"
            first.close(), second.close()
        began = server.service.engine.figures().refused
        with server.client() as filling, server.client(max_retries=9) as client, ThreadPoolExecutor(1) as apart:
            streams = [ask(filling, stream=True, **long) for _ in range(2)]
            patient = apart.submit(ask, client, max_tokens=2)
            while server.service.engine.figures().refused == began:
                time.sleep(0.01)
            for stream in streams:
                stream.close()
            assert patient.result().choices[0].finish_reason == "length"  # after 429, by trying again
