"""A conversation reads what is new in it, drops what has no room, and answers as the same prompt does alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import halfbyte
from halfbyte.errors import InputError
from halfbyte.generate.conversation import encode
from halfbyte.generate.decoder import PAGE
from halfbyte.generate.decoders import decoder_for
from halfbyte.generate.dialogue import Dialogue
from halfbyte.generate.engine import Engine
from halfbyte.generate.native_decoder import NativeDecoder
from halfbyte.generate.sampling import Sampling
from halfbyte.kernels import can_decode

pytestmark = pytest.mark.skipif(not can_decode(), reason="no native products")
POSITIONS = 512


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("native")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.2,
            bos_token_id=None, eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    return halfbyte.load(folder)


@pytest.fixture
def engine(model: object, tokenizer: PreTrainedTokenizerFast) -> Iterator[Engine]:
    decoder = decoder_for(model, keep_decoded=True)
    assert isinstance(decoder, NativeDecoder)
    with Engine(decoder, tokenizer, memory=64 << 20) as engine:
        yield engine


def dialogue_of(engine: Engine, **options: object) -> Dialogue:
    return Dialogue(engine, **({"sampling": Sampling(max_new_tokens=40)} | options))


def test_a_further_turn_reads_only_what_is_new(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    talk = dialogue_of(engine, system="be kind")
    answer = "it is so " * 20
    first = talk.ask("why? " * 30)
    first.stream.text()
    talk.keep("why? " * 30, answer)
    said = encode([*talk.whole(), {"role": "user", "content": "and?"}], tokenizer)
    with dialogue_of(engine).ask("x").stream as other:  # a text that has nothing to do with it
        other.text()
    second = talk.ask("and?")
    second.stream.text()
    # of what is the same as in the first prompt, whole pages are held: another answer was written behind it
    shared = first.stream.usage.prompt // PAGE * PAGE
    assert (second.stream.usage.prompt, second.stream.usage.cached) == (len(said), shared)
    talk.keep("and?", "no")
    third = talk.ask("so?")
    third.stream.text()
    assert third.stream.usage.cached == second.stream.usage.prompt  # behind its last whole page too
    assert engine.figures().tokens_cached == shared + third.stream.usage.cached


def test_written_tokens_are_not_read_again(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    talk = dialogue_of(engine, sampling=Sampling(max_new_tokens=150, logit_bias=dict.fromkeys(range(65, 70), 100.0)))
    first = talk.ask("why?")
    answer = first.stream.text()
    assert len(answer) == 150 and set(answer) <= set(map(chr, range(33, 127)))
    talk.keep("why?", answer)
    second = talk.ask("and?")
    second.stream.text()
    whole = first.stream.usage.prompt + len(answer) - 1  # the last token was written, and not read by the model
    assert second.stream.usage.cached == whole


def test_the_oldest_turns_go_when_the_context_is_full(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    talk = dialogue_of(engine, system="be kind", sampling=Sampling(max_new_tokens=200))
    for number in range(5):
        talk.keep(f"question {number} " + "x" * 60, f"answer {number}")
    reply = talk.ask("now?")
    reply.stream.cancel()
    assert reply.dropped % 2 == 0 and 0 < reply.dropped < 10 and reply.read == 10 - reply.dropped
    assert len(talk.messages) == 10 and talk.first == reply.dropped
    kept = [
        {"role": "system", "content": "be kind"},
        *talk.messages[reply.dropped :],
        {"role": "user", "content": "now?"},
    ]
    assert reply.stream.usage.prompt == len(encode(kept, tokenizer)) <= POSITIONS - POSITIONS // 4
    talk.keep("now?", "yes")
    again = talk.ask("and now?")
    again.stream.cancel()
    assert again.dropped == 0  # there is room for some turns now
    with pytest.raises(InputError, match=r"The question alone is .* attends to 512"):
        talk.ask("x" * 600)
    assert talk.first == reply.dropped and len(talk.messages) == 12


def test_undo_reset_and_load(engine: Engine) -> None:
    talk = dialogue_of(engine, system="be kind")
    assert talk.undo() is None
    talk.keep("a", "b", "hm")
    talk.keep("c", "d")
    assert talk.undo() == "c" and [turn["content"] for turn in talk.whole()] == ["be kind", "a", "b"]
    assert talk.messages[-1]["reasoning_content"] == "hm"
    whole = talk.whole()
    talk.reset()
    assert talk.whole() == whole[:1]
    other = dialogue_of(engine)
    other.load(whole)
    assert other.whole() == whole and other.system == "be kind"


def test_one_seed_gives_one_conversation_and_answers_again_differ(
    model: object, tokenizer: PreTrainedTokenizerFast
) -> None:
    def answers(seed: int) -> list[str]:
        # a decoder of its own, as a new process has: what another conversation left is not bitwise what is read
        with Engine(decoder_for(model, keep_decoded=True), tokenizer, memory=64 << 20) as engine:
            talk = dialogue_of(engine, seed=seed, sampling=Sampling(temperature=2.0, max_new_tokens=20))
            return [talk.ask("why?").stream.text() for _ in range(2)]

    one, again, other = answers(1), answers(1), answers(2)
    assert one == again != other and one[0] != one[1]
