"""A model of ours as lm-eval asks it, against lm-eval's own class over the same weights as dense ones in fp32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.evaluate.estimates import difference
from halfbyte.hf.layers.head import base_of, bind_head

pytest.importorskip("lm_eval", reason="needs lm-eval (halfbyte[eval])")

from lm_eval.models.huggingface import HFLM

from halfbyte.evaluate.tasks.harness import HalfbyteLM
from halfbyte.evaluate.tasks.measured import measure
from halfbyte.evaluate.tasks.named import load

LENGTH = 200
LETTERS = [
    {"question": f"What is {i} + {j}?", "choices": ["A", "B", "C", "D"], "answer": (i * j) % 4}
    for i in range(4) for j in range(3)
]  # fmt: skip
WORDS = [
    {"question": f"Say the word {word}", "choices": [word, f"{word} {word}", "no", "quite another one"], "answer": word}
    for word in ("tree", "sun", "a", "plum")
]
ANSWERED = [{"question": f"Repeat {word}.", "answer": word} for word in ("plum", "tea", "ice")]
TEXTS = [{"text": "The cat sat on the mat. " * count} for count in (1, 3, 12, 30)]
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return halfbyte.load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def adapter(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "swayed"
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder)
    return folder


def opened(path: Path) -> Any:
    model = halfbyte.load(path, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"), device="cpu")
    bind_head(base_of(model))
    return model


@pytest.fixture(scope="module")
def model(adapter: Path) -> Any:
    return opened(adapter)


@pytest.fixture(scope="module")
def dense(adapter: Path, tiny_model_folder: Path) -> dict[str | None, Any]:
    """Base and merged model, dense in fp32."""
    return {
        None: opened(tiny_model_folder).dequantize(torch.float32).float(),
        "default": opened(adapter).merge_and_unload().float().eval(),
    }


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("letters", LETTERS), ("words", WORDS), ("answered", ANSWERED), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rolling.yaml").write_text(ROLLING.format(file=folder / "texts.jsonl"))
    return lambda *names: [str(folder / name) for name in names]


def theirs(model: Any, tokenizer: Any, loaded: Any, **options: Any) -> tuple[Any, Any]:
    # with its cache of logits, windows of two texts that begin alike get the scores of one of them
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=LENGTH, logits_cache=False)
    return measure(lm, loaded, **options)


@pytest.mark.parametrize("side", [None, "default"])
def test_the_numbers_are_those_of_lm_evals_class_over_the_dense_model(
    side: str | None, model: Any, dense: Any, tokenizer: Any, named: Callable[..., list[str]]
) -> None:
    names = named("letters.jsonl", "words.jsonl", "rolling.yaml", "answered.jsonl")
    seen: list[tuple[int, int]] = []
    lm = HalfbyteLM(model, tokenizer, side, LENGTH, lambda done, total: seen.append((done, total)))
    ours, samples = measure(lm, load(names))
    wanted, their_samples = theirs(dense[side], tokenizer, load(names))
    assert [(one.task, one.name) for one in ours] == [(one.task, one.name) for one in wanted]
    assert {one.task for one in ours} == {"letters", "words", "rolling", "answered"}
    for one, other in zip(ours, wanted, strict=True):
        assert one.estimate.value == pytest.approx(other.estimate.value, rel=1e-4), one
        assert one.estimate.stderr == pytest.approx(other.estimate.stderr, rel=1e-3), one
        assert one.rows is not None and one.rows.estimate().value == pytest.approx(one.estimate.value)
    for task, rows in samples.items():
        for row, other in zip(rows, their_samples[task], strict=True):
            assert row["doc"] == other["doc"]
            for [reply], [their] in zip(row["resps"], other["resps"], strict=True):
                if isinstance(reply, tuple):
                    assert reply == (pytest.approx(their[0], abs=2e-3), their[1])
                elif isinstance(reply, float):
                    assert reply == pytest.approx(their, rel=1e-4)
                else:
                    assert reply == their
    assert seen and seen[-1] == (len(ANSWERED), len(ANSWERED))


def test_solved_examples_are_the_same_for_everybody(
    model: Any, dense: Any, tokenizer: Any, named: Callable[..., list[str]]
) -> None:
    [task, shots] = named("letters.jsonl", "words.jsonl")
    lm = HalfbyteLM(model, tokenizer, None, LENGTH)
    for count in (2, 3):
        loaded = load([task], shots=shots, num_fewshot=count)
        one, samples = measure(lm, loaded, limit=4)
        again, same = measure(lm, loaded, limit=4)
        other, their_samples = theirs(dense[None], tokenizer, load([task], shots=shots, num_fewshot=count), limit=4)
        assert samples["letters"] == same["letters"] and one[0].estimate == again[0].estimate
        assert one[0].count == 4
        for row, their in zip(samples["letters"], their_samples["letters"], strict=True):
            assert row["arguments"] == their["arguments"]
            assert row["arguments"][0][0].count("Answer:") == count + 1
        assert one[0].estimate.value == pytest.approx(other[0].estimate.value)


def test_conversations_are_written_with_the_template(
    model: Any, dense: Any, tokenizer: Any, named: Callable[..., list[str]]
) -> None:
    names = named("words.jsonl")
    lm = HalfbyteLM(model, tokenizer, None, LENGTH)
    ours, samples = measure(lm, load(names), apply_chat_template=True)
    wanted, their_samples = theirs(dense[None], tokenizer, load(names), apply_chat_template=True)
    assert samples["words"][0]["arguments"][0][0].startswith("<|im_start|>user\n")
    assert [row["arguments"] for row in samples["words"]] == [row["arguments"] for row in their_samples["words"]]
    assert [one.estimate.value for one in ours] == pytest.approx([one.estimate.value for one in wanted])


def test_texts_that_are_too_long_lose_their_beginning(model: Any, dense: Any, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance

    pairs = [("x" * 300, " end"), ("", "whole"), ("a b ", "c"), ("y" * 198, "zz"), ("y" * 199, "zz")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    ours = HalfbyteLM(model, tokenizer, None, LENGTH).loglikelihood(requests, disable_tqdm=True)
    their = HFLM(pretrained=dense[None], tokenizer=tokenizer, max_length=LENGTH).loglikelihood(requests)
    for one, other in zip(ours, their, strict=True):
        assert one == (pytest.approx(other[0], abs=2e-3), other[1])
    with pytest.raises(InputError, match=r"is 201 tokens long, and 200 are read at most"):
        HalfbyteLM(model, tokenizer, None, LENGTH).loglikelihood(
            [Instance("loglikelihood", {}, ("a", "b" * 201), 0)], disable_tqdm=True
        )


def test_answers_end_where_the_task_says(model: Any, dense: Any, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance

    their = HFLM(pretrained=dense[None], tokenizer=tokenizer, max_length=LENGTH, batch_size=2)
    lm = HalfbyteLM(model, tokenizer, None, LENGTH)
    [whole] = lm.generate_until([Instance("generate_until", {}, ("Once", {"until": [], "max_gen_toks": 30}), 0)])
    assert len(whole) > 10
    stop = whole[4:6]
    requests = [
        Instance("generate_until", {}, (context, {"until": [stop], "max_gen_toks": most}), number)
        for number, (context, most) in enumerate([("Once", 30), ("Twice", 12), ("z" * 400, 30)])
    ]
    ours = lm.generate_until(requests)
    assert ours == their.generate_until(requests) and ours[0] == whole.split(stop)[0]
    drawn = {"until": ["\n"], "do_sample": True, "temperature": 1.5, "max_gen_toks": 20}
    again = [lm.generate_until([Instance("generate_until", {}, ("Once", drawn), 0)]) for _ in range(2)]
    assert again[0] == again[1] != [whole]
    with pytest.raises(InputError, match="wants answers with num_beams"):
        lm.generate_until([Instance("generate_until", {}, ("Once", {"num_beams": 2}), 0)])


def test_the_difference_of_base_and_adapter_is_paired(
    model: Any, tokenizer: Any, named: Callable[..., list[str]]
) -> None:
    loaded = load(named("letters.jsonl"))
    before, after = (measure(HalfbyteLM(model, tokenizer, side, LENGTH), loaded)[0][0] for side in (None, "default"))
    assert before.rows is not None and after.rows is not None
    found = difference(before.rows, after.rows)
    apart = after.rows.sums - before.rows.sums
    assert found.value == pytest.approx(after.estimate.value - before.estimate.value)
    assert found.stderr == pytest.approx(apart.std(ddof=1) / len(apart) ** 0.5)
