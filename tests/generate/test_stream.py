"""Streamed answers against ``generate`` and ``decode`` in one piece, on tiny real models."""

import contextlib
import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from halfbyte.errors import InputError
from halfbyte.generate.stream import stream_reply
from halfbyte.kernels import native, provider_for, use_provider

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        ["hello world, how are you?"] * 2,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        **({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | options),
    )
    return LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def writing(model, ids):
    """Make ``ids``, one after the other, the model's likeliest tokens; yields the list of those it has written."""
    written = []

    def script(module, inputs, logits):
        written.append(ids[len(written)])
        logits = torch.zeros_like(logits)
        logits[..., written[-1]] = 100.0
        return logits

    handle = model.lm_head.register_forward_hook(script)
    try:
        yield written
    finally:
        handle.remove()


@pytest.mark.parametrize("seed", range(5))
def test_the_pieces_make_up_what_greedy_generate_decodes_to(tokenizer, seed):
    model = make_model(seed)
    ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    whole = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=stops, pad_token_id=0)
    pieces = list(stream_reply(model, tokenizer, HELLO, max_new_tokens=40))
    assert "".join(pieces) == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(pieces) > 1


def test_a_character_of_several_tokens_comes_in_one_piece(tokenizer):
    text = "a 🦙 né"
    model = make_model()
    with writing(model, [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]):
        pieces = list(stream_reply(model, tokenizer, HELLO))
    assert any("🦙" in piece for piece in pieces)
    assert "".join(pieces) == text


def test_an_answer_cut_within_a_character_still_ends_as_it_decodes(tokenizer):
    ids = tokenizer("a🦙")["input_ids"]
    model = make_model()
    with writing(model, ids):
        pieces = list(stream_reply(model, tokenizer, HELLO, max_new_tokens=len(ids) - 1))
    assert "".join(pieces) == tokenizer.decode(ids[:-1])


def test_a_sentencepiece_tokenizer_keeps_the_indentation_of_each_line():
    vocab = {"<unk>": 0, "</s>": 1, "\n": 2, "▁▁▁": 3, "x": 4, "▁if": 5}
    pieces = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    pieces.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", unk_token="<unk>")
    model = make_model()
    with writing(model, [5, 2, 3, 4, 1]):
        assert "".join(stream_reply(model, tokenizer, "x")) == "if\n   x"


def test_special_tokens_are_not_shown(tokenizer):
    model = make_model()
    start, hi = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer("hello")["input_ids"]
    with writing(model, [start, *hi, start, tokenizer.eos_token_id]):
        assert "".join(stream_reply(model, tokenizer, HELLO)) == "hello"


@pytest.mark.parametrize(
    ("own_stop", "stop"),
    [(None, "<|endoftext|>"), (None, "<|im_end|>"), (17, 17), ([17, 19], 19), ([17, 19], "<|endoftext|>")],
    ids=["tokenizer", "chat template", "model", "model with several", "tokenizer beside the model"],
)
def test_an_answer_ends_at_each_stop_token(tokenizer, own_stop, stop):
    model = make_model(eos_token_id=own_stop)
    stop = tokenizer.convert_tokens_to_ids(stop) if isinstance(stop, str) else stop
    hello = tokenizer("hello")["input_ids"]
    with writing(model, [*hello, stop, *hello * 20]) as written:
        list(stream_reply(model, tokenizer, HELLO))
    assert written == [*hello, stop]


def test_a_text_is_gone_on_with_as_it_stands(tokenizer):
    model = make_model()
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"]), with_kwargs=True
    )
    list(stream_reply(model, tokenizer, "hello wor", max_new_tokens=1))
    assert seen[0].tolist() == [tokenizer("hello wor")["input_ids"]]


def test_a_conversation_without_a_chat_template_gets_the_one_of_training(tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    model = make_model()
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"]), with_kwargs=True
    )
    list(stream_reply(model, plain, HELLO, max_new_tokens=1))
    assert plain.decode(seen[0][0]) == "### Instruction:\nhello\n\n### Response:\n"


def test_closing_the_iterator_stops_the_generation(tokenizer):
    model = make_model()
    with writing(model, tokenizer("a")["input_ids"] * 100) as written:
        reply = stream_reply(model, tokenizer, HELLO, max_new_tokens=100)
        taken = list(itertools.islice(reply, 3))
        reply.close()
        stopped_at = len(written)
    assert len(taken) == 3
    assert stopped_at < 100


def test_an_error_in_the_generation_surfaces(tokenizer):
    model = make_model()
    with writing(model, tokenizer("aa")["input_ids"]), pytest.raises(IndexError):
        list(stream_reply(model, tokenizer, HELLO))


def test_the_provider_in_force_here_is_in_force_in_the_generation(tokenizer):
    if not native.available():
        pytest.skip("there is only one provider here")
    model = make_model()
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(provider_for(torch.device("cpu"))))
    with use_provider("reference"):
        list(stream_reply(model, tokenizer, HELLO, max_new_tokens=2))
        assert seen == [provider_for(torch.device("cpu"))] * 2


def test_one_seed_draws_one_answer_and_others_draw_others(tokenizer):
    model = make_model()

    def draw(seed):
        set_seed(seed)
        return "".join(stream_reply(model, tokenizer, HELLO, max_new_tokens=20, temperature=2.0, top_p=0.95))

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_the_answer_ends_where_the_context_does(tokenizer):
    model = make_model()
    prompt = "a" * 100
    with writing(model, tokenizer("b")["input_ids"] * 200) as written:
        list(stream_reply(model, tokenizer, prompt, max_new_tokens=200))
    assert len(tokenizer(prompt)["input_ids"]) + len(written) == model.config.max_position_embeddings


def test_a_prompt_as_long_as_the_context_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"128 tokens long, .* attends to 128"):
        list(stream_reply(make_model(), tokenizer, "a" * 128))


def test_angles_that_grow_with_the_text_reach_as_far_as_their_factor_says(tokenizer):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model(rope_parameters=rope)
    prompt = "hello world" * 12
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert 20 < ids.shape[1] < 128
    answer = "".join(stream_reply(model, tokenizer, prompt, max_new_tokens=400))
    whole = make_model(rope_parameters=rope).generate(ids, max_length=256, do_sample=False, eos_token_id=None)
    assert whole.shape[1] == 256 and answer == tokenizer.decode(whole[0, ids.shape[1] :])
    with pytest.raises(InputError, match=r"300 tokens long, .* attends to 256"):
        list(stream_reply(model, tokenizer, "a" * 300))


def test_a_conversation_that_the_template_refuses_is_bad_input(tokenizer):
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}a",
    )
    with pytest.raises(InputError, match="no system role"):
        list(stream_reply(make_model(), strict, [{"role": "system", "content": "be kind"}, *HELLO]))


def test_a_model_that_writes_no_text_is_refused(tokenizer):
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(InputError, match="BertForMaskedLM does not generate text"):
        list(stream_reply(BertForMaskedLM(config).eval(), tokenizer, HELLO))
