"""The engine against transformers' ``generate``, and many requests at once against each of them alone."""

import asyncio
import gc
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

import halfbyte
from halfbyte.errors import DecodingError, InputError
from halfbyte.generate import decoder as protocol
from halfbyte.generate.answers import Busy, Closed, Request, Stream
from halfbyte.generate.constraint import Constraints
from halfbyte.generate.engine import Engine
from halfbyte.generate.sampling import Sampling
from halfbyte.generate.transformers_decoder import TransformersDecoder

VOCAB = 258


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def model_of(family: str) -> Any:
    torch.manual_seed(1)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3,
    }  # fmt: skip
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, **ends)).eval()
    if family == "gemma3":
        windows: dict[str, Any] = {
            "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        }  # fmt: skip
        return Gemma3ForCausalLM(Gemma3TextConfig(**shape, **windows, **ends)).eval()
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.3, **ends
    )
    return GPT2LMHeadModel(config).eval()


def with_adapters(model: Any) -> PeftModel:
    names = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn"], "gemma3_text": ["q_proj", "down_proj"]}
    torch.manual_seed(2)
    options: dict[str, Any] = {
        "target_modules": names[model.config.model_type],
        "init_lora_weights": False,
        "fan_in_fan_out": model.config.model_type == "gpt2",
    }
    wrapped = get_peft_model(model, LoraConfig(r=4, **options), adapter_name="red")
    wrapped.add_adapter("blue", LoraConfig(r=2, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter *= 10  # enough to sway the likeliest token
    return wrapped.eval()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed * 7919 + length).randrange(256) for _ in range(length))


def generated(model: Any, ids: Sequence[int], count: int, adapter: str | None = None) -> list[int]:
    """Return what ``generate`` writes, greedily, with an adapter or with none."""
    asked = torch.tensor([list(ids)])
    options = {"attention_mask": torch.ones_like(asked), "max_new_tokens": count, "do_sample": False}
    if not isinstance(model, PeftModel):
        return model.generate(asked, **options)[0, len(ids) :].tolist()
    if adapter is None:
        with model.disable_adapter():
            return model.generate(input_ids=asked, **options)[0, len(ids) :].tolist()
    model.set_adapter(adapter)
    return model.generate(input_ids=asked, **options)[0, len(ids) :].tolist()


def tokens(stream: Stream) -> list[int]:
    return [chosen.token for piece in stream for chosen in piece.chosen]


class Watched(TransformersDecoder):
    """A decoder that notes its calls, holds to its budget, and fails when it is told to."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.calls: list[tuple[str, int]] = []
        self.before_step: Any = lambda: None
        self.fails_at: int | None = None  # a token
        self.most_held = 0

    def _look(self) -> None:
        self.most_held = max(self.most_held, self.bytes_held)
        assert self.budget is None or self.bytes_held <= self.budget

    def begin(self, ids: Sequence[int], adapter: str | None) -> Any:
        found = super().begin(ids, adapter)
        self._look()
        return found

    def read(self, sequence: Any, ids: Sequence[int]) -> torch.Tensor:
        assert 1 <= len(ids) <= protocol.PIECE
        assert self.reads_apart or sequence.length % protocol.PIECE == 0
        self.calls.append(("read", len(ids)))
        if self.fails_at in ids:
            raise RuntimeError("it broke in reading")
        logits = super().read(sequence, ids)
        self._look()
        return logits

    def step(self, sequences: Sequence[Any], tokens: Sequence[int]) -> torch.Tensor:
        assert 1 <= len(sequences) <= self.rows
        self.before_step()
        self.calls.append(("step", len(sequences)))
        if self.fails_at in tokens:
            raise RuntimeError("it broke in a step")
        logits = super().step(sequences, tokens)
        self._look()
        return logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_greedy_answers_are_those_of_generate_whatever_goes_on_beside_them(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of(family)
    asked = [prompt(length, seed) for seed, length in enumerate([1, 3, 40, 255, 256, 257, 600, 17])]
    with Engine(TransformersDecoder(model, rows=3), tokenizer) as engine:
        first = [
            engine.submit(Request(ids, Sampling(max_new_tokens=12 + place))) for place, ids in enumerate(asked[:4])
        ]
        head = [next(first[0]) for _ in range(5)]  # the others join while this one goes on
        late = [engine.submit(Request(ids, Sampling(max_new_tokens=9))) for ids in asked[4:]]
        gone = engine.submit(Request(prompt(30), Sampling(max_new_tokens=500)))
        gone.cancel()
        found = [tokens(stream) for stream in [*first, *late]]
    found[0] = [chosen.token for piece in head for chosen in piece.chosen] + found[0]
    expected = [generated(model, ids, 12 + place if place < 4 else 9) for place, ids in enumerate(asked)]
    assert found == expected
    assert [stream.finish for stream in [*first, *late, gone]] == ["length"] * 8 + ["cancelled"]
    assert len({tuple(one) for one in found}) == len(found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_each_row_has_its_own_adapter(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = with_adapters(model_of(family))
    names = ["red", None, "blue", "red", None]
    ids = prompt(20)
    decoder = TransformersDecoder(model)
    assert decoder.adapters == ("red", "blue")
    with Engine(decoder, tokenizer) as engine:
        streams = [engine.submit(Request(ids, Sampling(max_new_tokens=10), adapter=name)) for name in names]
        found = [tokens(stream) for stream in streams]
    assert model.active_adapter == "red" and model.get_model_status().enabled is True
    assert found == [generated(model, ids, 10, name) for name in names]
    assert len({tuple(one) for one in found}) == 3


def test_each_row_has_its_own_adapter_over_four_bits(tiny_model_folder: Path) -> None:
    base, tokenizer = halfbyte.load(tiny_model_folder), AutoTokenizer.from_pretrained(tiny_model_folder)
    model = halfbyte.prepare(with_adapters(base))
    ids = tuple(tokenizer("Who is it?")["input_ids"])
    with Engine(TransformersDecoder(model), tokenizer) as engine:
        streams = [
            engine.submit(Request(ids, Sampling(max_new_tokens=10), adapter=name)) for name in ("blue", None, "red")
        ]
        found = [tokens(stream) for stream in streams]
    assert found == [generated(model, ids, 10, name) for name in ("blue", None, "red")]
    assert len({tuple(one) for one in found}) == 3


def mixed(draw: random.Random) -> Request:
    """Return any request; some share long prefixes."""
    length = draw.choice([1, 2, 9, 60, 255, 256, 300, 520])
    ids = prompt(length, draw.randrange(3))
    if length > 256 and draw.random() < 0.5:
        ids = prompt(512)[:length] if length < 512 else prompt(512) + ids[512:]
    options: dict[str, Any] = {"max_new_tokens": draw.randrange(1, 14), "seed": draw.randrange(1000)}
    if draw.random() < 0.7:
        options |= {"temperature": draw.choice([0.5, 1.0, 2.0]), "top_p": draw.choice([1.0, 0.9]),
                    "top_k": draw.choice([None, 20]), "repetition_penalty": draw.choice([1.0, 1.2])}  # fmt: skip
    if draw.random() < 0.3:
        options |= {"frequency_penalty": 0.5, "logit_bias": {7: 3.0}, "stop_ids": (7, 8, 9)}
    return Request(ids, Sampling(**options), adapter=draw.choice(["red", "blue", None]))


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40))])
def test_under_any_load_each_answer_is_the_one_that_its_request_gets_alone(
    seed: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    draw, model = random.Random(seed), with_adapters(model_of("llama"))
    requests = [mixed(draw) for _ in range(30)]
    cut = {place: draw.randrange(0, 6) for place in range(30) if draw.random() < 0.25}  # these are cancelled
    decoder = Watched(model, rows=draw.choice([2, 5, 16]))
    found: dict[int, list[int]] = {}
    memory = 3 * decoder.bytes_of(560)

    def ask(places: Sequence[int]) -> None:
        for place in places:
            time.sleep(draw.random() / 200)
            stream = engine.submit(requests[place])
            found[place] = []
            for piece in stream:
                found[place] += [chosen.token for chosen in piece.chosen]
                if len(found[place]) >= cut.get(place, 1000):
                    stream.cancel()
            assert stream.usage.written >= len(found[place]) and stream.usage.prompt == len(requests[place].ids)
            assert stream.finish in (("cancelled", "length", "stop") if place in cut else ("length", "stop"))

    with Engine(decoder, tokenizer, memory=memory) as engine:
        threads = [threading.Thread(target=ask, args=(range(start, 30, 6),)) for start in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        figures = engine.figures()
    assert figures.rows == figures.waiting == figures.bytes_reserved == 0
    assert sum(figures.ended.values()) == 30
    assert decoder.most_held <= memory
    for place, request in enumerate(requests):
        with Engine(TransformersDecoder(model), tokenizer) as alone:
            expected = tokens(alone.submit(request))
        count = len(found[place]) if place in cut else None
        assert found[place] == expected[:count]


def test_no_two_pieces_of_prompts_are_read_between_two_steps(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = Watched(model_of("llama"))
    with Engine(decoder, tokenizer) as engine:
        going = engine.submit(Request(prompt(5), Sampling(max_new_tokens=60)))
        next(going)
        long = [engine.submit(Request(prompt(900, seed), Sampling(max_new_tokens=5))) for seed in range(2)]
        assert [len(tokens(stream)) for stream in [going, *long]] == [59, 5, 5]
    kinds = [kind for kind, _ in decoder.calls]
    reads = [place for place, kind in enumerate(kinds) if kind == "read"]
    assert len(reads) == 1 + 2 * 4
    assert all(kinds[place + 1] == "step" for place in reads)


def test_a_request_that_is_cancelled_frees_its_row_within_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = Watched(model_of("llama"), rows=1)
    with Engine(decoder, tokenizer) as engine:
        gone = engine.submit(Request(prompt(5), Sampling(max_new_tokens=900)))
        waits = engine.submit(Request(prompt(6), Sampling(max_new_tokens=2)))
        next(gone)
        before = sum(kind == "step" for kind, _ in decoder.calls)
        gone.cancel()
        assert len(tokens(waits)) == 2
        assert gone.finish == "cancelled"
        steps = sum(kind == "step" for kind, _ in decoder.calls)
        assert gone.usage.written <= before + 3 and steps <= before + 4
        gone.cancel()  # does nothing
        unread = engine.submit(Request(prompt(900), Sampling(max_new_tokens=50)))
        unread.cancel()
        assert len(tokens(engine.submit(Request(prompt(6), Sampling(max_new_tokens=2))))) == 2
        assert engine.figures().ended == {"cancelled": 2, "length": 2}


def test_a_full_queue_refuses_and_goes_on(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder, gate = Watched(model_of("llama"), rows=1), threading.Event()
    decoder.before_step = gate.wait
    with Engine(decoder, tokenizer, most_waiting=2) as engine:
        request = Request(prompt(5), Sampling(max_new_tokens=3))
        streams = [engine.submit(request) for _ in range(3)]
        with pytest.raises(Busy, match="2 requests wait already"):
            engine.submit(request)
        assert (engine.figures().waiting, engine.figures().rows, engine.figures().refused) == (2, 1, 1)
        streams[1].cancel()  # leaves the queue at once
        streams.append(engine.submit(request))
        gate.set()
        assert [len(tokens(stream)) for stream in streams] == [3, 0, 3, 3]


def test_what_can_never_be_answered_is_refused_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    model = with_adapters(model_of("llama"))
    decoder = TransformersDecoder(model)
    with Engine(decoder, tokenizer, memory=decoder.bytes_of(100)) as engine:
        for request, sentence in [
            (Request(()), "The prompt is empty"),
            (Request(prompt(1024)), "The prompt is 1024 tokens long, but the model attends to 1024: shorten it."),
            (Request((3, VOCAB)), f"The prompt holds token {VOCAB}, but the model has {VOCAB}."),
            (Request((3, -1)), "The prompt holds token -1"),
            (
                Request((3,), adapter="reds"),
                r"There is no adapter 'reds' \(did you mean 'red'\?\); there is red, blue.",
            ),
            (Request((3,), Sampling(stop_ids=(999,))), "stop_ids names token 999"),
            (Request((3,), constraint=Constraints(tokenizer, 300, [0]).regex("a")), "is for 300 tokens, but"),
            (Request(prompt(60), Sampling(max_new_tokens=41)), "prompt of 60 tokens and an answer of up to 41 take"),
        ]:
            with pytest.raises(InputError, match=sentence):
                engine.submit(request)
        assert len(tokens(engine.submit(Request(prompt(60), Sampling(max_new_tokens=40))))) == 40
    with pytest.raises(InputError, match="do not hold two tokens"):
        Engine(TransformersDecoder(model), tokenizer, memory=10)


def test_requests_wait_until_memory_is_free(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = Watched(model_of("llama"))
    memory = decoder.bytes_of(100)
    with Engine(decoder, tokenizer, memory=memory) as engine:
        requests = [Request(prompt(30, seed), Sampling(max_new_tokens=18)) for seed in range(7)]
        streams = [engine.submit(request) for request in requests]
        assert all(len(tokens(stream)) == 18 for stream in streams)
    assert max(count for kind, count in decoder.calls if kind == "step") == 2
    assert decoder.most_held <= memory


def test_an_error_ends_the_requests_concerned_and_the_engine_lives(tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of("llama")
    decoder, ids = Watched(model), prompt(9)
    with Engine(decoder, tokenizer) as engine:
        expected = tokens(engine.submit(Request(ids, Sampling(max_new_tokens=8))))
        unseen = next(token for token in range(256) if token not in (*ids, *expected))
        decoder.fails_at = unseen
        bad = engine.submit(Request((unseen, 1)))
        with pytest.raises(RuntimeError, match="it broke in reading"):
            list(bad)
        assert bad.finish == "error" and list(bad) == []
        forced = Sampling(max_new_tokens=8, logit_bias={unseen: 100.0})
        streams = [engine.submit(Request(ids, forced))]
        with pytest.raises(RuntimeError, match="it broke in a step"):
            list(streams[0])
        assert tokens(engine.submit(Request(ids, Sampling(max_new_tokens=8)))) == expected
        assert engine.figures().ended == {"length": 2, "error": 2} and engine.figures().rows == 0
        assert decoder.bytes_held == 0


def test_logits_that_are_not_numbers_end_their_request_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = torch.nan
    ids = tuple(token for token in prompt(12) if token != 200)
    with Engine(TransformersDecoder(model), tokenizer) as engine:
        good = engine.submit(Request(ids, Sampling(max_new_tokens=20, logit_bias={200: -100.0})))
        bad = engine.submit(Request((5, 200), Sampling(temperature=1.0)))
        with pytest.raises(DecodingError, match="The model's logits are not numbers here"):
            list(bad)
        assert len(tokens(good)) == 20


def test_closing_ends_everything(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Engine(TransformersDecoder(model_of("llama"), rows=1), tokenizer)
    streams = [engine.submit(Request(prompt(5), Sampling(max_new_tokens=1000))) for _ in range(3)]
    next(streams[0])
    engine.close()
    engine.close()
    assert [stream.finish for stream in streams] == ["cancelled"] * 3
    assert list(streams[2])[-1].finish == "cancelled"
    with pytest.raises(Closed):
        engine.submit(Request((1,)))


def test_a_prefix_that_was_read_is_not_read_again(tokenizer: PreTrainedTokenizerBase) -> None:
    model = with_adapters(model_of("llama"))
    decoder, shared = Watched(model), prompt(520)
    options = Sampling(max_new_tokens=6)
    with Engine(decoder, tokenizer) as engine:
        first = engine.submit(Request(shared, options, adapter="red"))
        answer = tokens(first)
        again = engine.submit(Request(shared, options, adapter="red"))
        assert tokens(again) == answer
        turn = (*shared, *answer, *prompt(20))
        second = engine.submit(Request(turn, options, adapter="red"))
        found = tokens(second)
        other = engine.submit(Request(turn, options, adapter="blue"))
        tokens(other)
        exact = engine.submit(Request(shared[:512], options, adapter="red"))
        tokens(exact)
        assert [stream.usage.cached for stream in (first, again, second, other, exact)] == [0, 512, 512, 0, 256]
        assert engine.figures().tokens_cached == 512 + 512 + 256
    with Engine(TransformersDecoder(model), tokenizer) as engine:
        assert tokens(engine.submit(Request(turn, options, adapter="red"))) == found


def test_what_an_engine_is_called_for_happens_between_two_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    model = with_adapters(model_of("llama"))
    decoder = Watched(model)
    with Engine(decoder, tokenizer) as engine:
        going = engine.submit(Request(prompt(5), Sampling(max_new_tokens=40), adapter="red"))
        next(going)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        engine.call(lambda: model.add_adapter("green", config))
        green = engine.submit(Request(prompt(5), Sampling(max_new_tokens=5), adapter="green"))
        found, late = tokens(green), tokens(going)
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 / 0)
        assert engine.call(lambda: threading.current_thread().name) == "halfbyte-engine"
        assert len(late) == 39 and len(found) == 5
    assert late == generated(model, prompt(5), 40, "red")[1:]
    with pytest.raises(Closed):
        engine.call(lambda: None)


def test_adapters_that_are_off_stay_off(tokenizer: PreTrainedTokenizerBase) -> None:
    model = with_adapters(model_of("llama"))
    with model.disable_adapter():
        decoder = TransformersDecoder(model)
        assert decoder.active is None
        with Engine(decoder, tokenizer) as engine:
            found = tokens(engine.submit(Request(prompt(9), Sampling(max_new_tokens=9), adapter="red")))
        assert model.get_model_status().enabled is False
    assert found == generated(model, prompt(9), 9, "red")


def test_an_answer_that_has_ended_holds_no_memory(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = Watched(model_of("llama"))
    with Engine(decoder, tokenizer) as engine:
        stream = engine.submit(Request(prompt(200), Sampling(max_new_tokens=9)))
        tokens(stream)
        held = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.shape[-2:] == (208, 8)]
        assert decoder.bytes_held == 0 and not held


def test_the_answer_ends_at_stops_and_at_the_context_s_end(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = TransformersDecoder(model_of("llama"))
    ids = prompt(10)
    with Engine(decoder, tokenizer) as engine:
        whole = tokens(engine.submit(Request(ids, Sampling(max_new_tokens=30))))
        at = next(place for place in range(2, 30) if whole[place] not in whole[:place])
        stream = engine.submit(Request(ids, Sampling(max_new_tokens=30, stop_ids=(whole[at],))))
        pieces = list(stream)
        assert [chosen.token for piece in pieces for chosen in piece.chosen] == whole[: at + 1]
        assert stream.finish == pieces[-1].finish == "stop" and stream.usage.written == at + 1
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(whole[:at])
        end = engine.submit(Request(prompt(1000), Sampling(max_new_tokens=500)))
        assert len(tokens(end)) == 24 and end.finish == "length"
        forced = {tokenizer.convert_tokens_to_ids("a"): 100.0}
        text = engine.submit(Request(ids, Sampling(max_new_tokens=30, logit_bias=forced, stop=("aaa",))))
        assert text.text() == "" and text.finish == "stop" and text.usage.written == 3
    with Engine(decoder, tokenizer, stops=[whole[at]]) as engine:
        assert tokens(engine.submit(Request(ids, Sampling(max_new_tokens=30)))) == whole[: at + 1]


def test_an_answer_follows_its_constraint_and_tells_log_probabilities(tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of("llama")
    constraints = Constraints(tokenizer, VOCAB, [tokenizer.eos_token_id])
    with Engine(TransformersDecoder(model), tokenizer, stops=[tokenizer.eos_token_id]) as engine:
        options = Sampling(temperature=1.0, logprobs=2, max_new_tokens=20, seed=4)
        constraint = constraints.regex("(yes|no), [0-9]{3}")
        streams = [engine.submit(Request(prompt(9, n), options, constraint=constraint)) for n in range(3)]
        free = engine.submit(Request(prompt(9), options))
        for place, stream in enumerate(streams):
            pieces = list(stream)
            chosen = [one for piece in pieces for one in piece.chosen]
            text = "".join(piece.text for piece in pieces)
            assert text.startswith(("yes, ", "no, ")) and text[-3:].isdigit() and stream.finish == "stop"
            written = torch.tensor([[*prompt(9, place), *(one.token for one in chosen)]])
            own = model(written).logits.detach()[0, 8:-1].log_softmax(-1)
            for one, row in zip(chosen, own, strict=True):
                assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
                assert [token for token, _ in one.top] == row.topk(2).indices.tolist()
        assert len(tokens(free)) == 20


def test_streams_are_read_from_asyncio_without_polling(tokenizer: PreTrainedTokenizerBase) -> None:
    model, requests = model_of("llama"), [Request(prompt(n + 1), Sampling(max_new_tokens=10)) for n in range(12)]
    decoder = Watched(model)

    async def answer(request: Request) -> list[int]:
        return [chosen.token async for piece in engine.submit(request) for chosen in piece.chosen]

    async def hang_up() -> Stream:
        with engine.submit(Request(prompt(4), Sampling(max_new_tokens=900))) as stream:
            await asyncio.wait_for(anext(aiter(stream)), 60)
            raises = asyncio.ensure_future(fails())
            await raises
        return stream

    async def fails() -> None:
        decoder.fails_at = 256
        with pytest.raises(RuntimeError, match="it broke"):
            async for _ in engine.submit(Request((256,))):
                pass

    async def everything() -> tuple[list[list[int]], Stream]:
        found = await asyncio.gather(*map(answer, requests))
        return found, await hang_up()

    with Engine(decoder, tokenizer) as engine:
        found, gone = asyncio.run(everything())
        assert tokens(engine.submit(requests[0])) == found[0]  # the loop is closed; the engine goes on
        assert gone.finish == "cancelled"
    assert found == [generated(model, request.ids, 10) for request in requests]


def test_a_reader_that_is_gone_with_its_loop_does_no_harm(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder, gate = Watched(model_of("llama")), threading.Event()
    decoder.before_step = gate.wait
    with Engine(decoder, tokenizer) as engine:
        stream = engine.submit(Request(prompt(4), Sampling(max_new_tokens=5)))

        async def first_two() -> None:
            await anext(aiter(stream))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(aiter(stream)), 0.05)

        asyncio.run(first_two())
        gate.set()
        assert len(tokens(stream)) == 4


@pytest.fixture
def source_model(task_folder: Any) -> Iterator[tuple[Any, Any]]:
    from transformers import AutoModelForSeq2SeqLM

    folder = task_folder("bart")
    yield (
        AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


def test_an_encoder_decoder_answers_as_generate_does(source_model: tuple[Any, Any]) -> None:
    model, tokenizer = source_model
    sources = [tuple(tokenizer(text)["input_ids"]) for text in ("a", "Who is it?", "x" * 100)]
    decoder = TransformersDecoder(model)
    budget = 2 * decoder.bytes_of(130)
    watched = Watched(model)
    with Engine(watched, tokenizer, stops=[1], memory=budget) as engine:
        streams = [engine.submit(Request(ids, Sampling(max_new_tokens=20))) for ids in sources]
        found = [tokens(stream) for stream in streams]
    for ids, answer in zip(sources, found, strict=True):
        whole = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=1)[0, 1:].tolist()
        assert answer == whole
