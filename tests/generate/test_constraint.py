"""Constraints against a validator of JSON schemas and Python's regular expressions, over random logits."""

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from halfbyte.errors import DecodingError, InputError
from halfbyte.generate.constraint import Constraint, Constraints
from halfbyte.generate.sampling import Sampler, Sampling, sample

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"const": 7}]}, "minItems": 1, "maxItems": 3}
NESTED = {
    "$defs": {"tree": {"type": "object", "properties": {"v": {"type": "number"}}, "required": ["v"],
                       "additionalProperties": False}},
    "type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}, "required": ["left"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def constraints(tokenizer: PreTrainedTokenizerBase) -> Constraints:
    return Constraints(tokenizer, len(tokenizer) + 3, [tokenizer.eos_token_id])


def written(constraint: Constraint, stop: int, vocab: int, seed: int, most: int = 400) -> list[int] | None:
    """Return an answer drawn from random logits, or None where it has not ended; every stop is one that was allowed."""
    generator, following = torch.Generator().manual_seed(seed), constraint.begin()
    sampler = Sampler(Sampling(temperature=1.0), [], seed)
    for _ in range(most):
        if following.is_finished:
            return sampler.written
        logits = torch.randn(vocab, generator=generator)
        logits[stop] += 4  # so that answers do not go on for ever
        [chosen] = sample(logits[None], [sampler], [following.mask()])
        assert chosen is not None
        if chosen.token == stop:
            return sampler.written
        following.add(chosen.token)
        sampler.add(chosen.token)
    return None


@pytest.mark.parametrize("schema", [PERSON, LIST, NESTED, {"type": "integer"}], ids=["person", "list", "nested", "int"])
def test_answers_are_what_the_schema_takes(
    constraints: Constraints, tokenizer: PreTrainedTokenizerBase, schema: dict[str, Any]
) -> None:
    constraint, ended = constraints.json_schema(schema), 0
    for seed in range(15):
        if (ids := written(constraint, tokenizer.eos_token_id, len(tokenizer) + 3, seed)) is not None:
            jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)
            ended += 1
    assert ended >= 5


def test_any_object_is_an_object(constraints: Constraints, tokenizer: PreTrainedTokenizerBase) -> None:
    ended = [written(constraints.json_object(), tokenizer.eos_token_id, len(tokenizer) + 3, seed) for seed in range(8)]
    found = [json.loads(tokenizer.decode(ids)) for ids in ended if ids is not None]
    assert found and all(isinstance(one, dict) for one in found)


def test_no_answer_is_empty_lines_for_ever(constraints: Constraints, tokenizer: PreTrainedTokenizerBase) -> None:
    [newline], [space] = (tokenizer.encode(text, add_special_tokens=False) for text in "\n ")
    following = constraints.json_object().begin()
    for token in tokenizer.encode('{"a":', add_special_tokens=False):
        following.add(token)
    following.add(newline)
    assert not following.mask()[newline] and following.mask()[space]
    for _ in range(64):
        following.add(space)
    assert not following.mask()[space] and following.mask().any()


@pytest.mark.parametrize("pattern", ["[0-9]{2,4}", "(yes|no)!?", "a*b+", "[a-cé]+(, [a-c]+)*", "[0-9]+\\.[0-9]"])
def test_answers_are_matched_by_the_expression(
    constraints: Constraints, tokenizer: PreTrainedTokenizerBase, pattern: str
) -> None:
    constraint = constraints.regex(pattern)
    ended = [written(constraint, tokenizer.eos_token_id, len(tokenizer) + 3, seed) for seed in range(12)]
    texts = [tokenizer.decode(ids) for ids in ended if ids is not None]
    assert len(texts) >= 5 and all(re.fullmatch(pattern, text) for text in texts)
    assert len(set(texts)) > 1


def test_stops_are_allowed_exactly_where_the_expression_may_end(
    constraints: Constraints, tokenizer: PreTrainedTokenizerBase
) -> None:
    pattern, draw = "(ab|abc){1,3}x?", random.Random(0)
    own, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("q")
    for _ in range(20):
        following, text = constraints.regex(pattern).begin(stops=[other]), ""
        while not following.is_finished:
            mask = following.mask()
            can_end = re.fullmatch(pattern, text) is not None
            assert mask[own] == mask[other] == can_end
            allowed = [token for token in numpy.flatnonzero(mask) if token not in (own, other)]
            assert len(mask) == len(tokenizer) + 3
            if not allowed:
                break
            token = int(draw.choice(allowed))
            following.add(token)
            text += tokenizer.decode([token])
        assert re.fullmatch(pattern, text)


def test_an_expression_that_grows_too_complex_ends_its_answer_with_a_sentence(
    constraints: Constraints, tokenizer: PreTrainedTokenizerBase
) -> None:
    following = constraints.regex("a{0,1000}{1000}").begin()
    [token] = tokenizer.encode("a", add_special_tokens=False)
    with pytest.raises(DecodingError, match=r"can follow its grammar no further: .*too many expressions") as told:
        for _ in range(2000):
            following.mask()
            following.add(token)
    assert "Tokens" not in str(told.value)  # which are the answer


def test_a_grammar_is_followed(constraints: Constraints, tokenizer: PreTrainedTokenizerBase) -> None:
    constraint = constraints.lark('start: "(" inner ")"\ninner: /[0-9]/ | "(" inner ")"')
    for seed in range(8):
        ids = written(constraint, tokenizer.eos_token_id, len(tokenizer) + 3, seed)
        assert ids is not None
        text = tokenizer.decode(ids)
        depth = text.count("(")
        assert depth >= 1 and re.fullmatch(r"\(+[0-9]\)+", text) and text.count(")") == depth


def test_answers_to_one_constraint_do_not_know_of_each_other(constraints: Constraints) -> None:
    constraint = constraints.regex("ab")
    one, other = constraint.begin(), constraint.begin()
    one.add(int(numpy.flatnonzero(one.mask())[0]))
    assert (other.mask() == constraint.begin().mask()).all() and not (one.mask() == other.mask()).all()


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        ("json_schema", {"type": "strin"}, "The JSON schema cannot be used: Invalid type: strin."),
        ("json_schema", {"not": {"type": "string"}}, 'The JSON schema cannot be used: Unimplemented keys: ."not".'),
        ("json_schema", {"$ref": "#/nowhere"}, "The JSON schema cannot be used: .*nowhere"),
        ("json_schema", {"$ref": "http://127.0.0.1/x"}, "The JSON schema cannot be used: .*does not fetch"),
        ("json_schema", [1], "The JSON schema is a list; it must be an object."),
        ("json_schema", {"const": float("nan")}, "The JSON schema is not JSON"),
        ("json_schema", False, "The JSON schema cannot be used: .*Unsatisfiable"),
        ("regex", "(", "The regular expression cannot be used: unclosed group."),
        ("regex", "(?=a)b", "The regular expression cannot be used: look-around.*not supported."),
        ("regex", 3, "The regular expression is a int; it must be a text."),
        ("lark", "start: x", "The grammar cannot be used: .*unknown name"),
        ("lark", "a" * 2**21, "The grammar is 2,097,152 characters long; up to 1,048,576 are taken."),
    ],
)  # fmt: skip
def test_what_is_no_schema_is_refused_with_its_reason(
    constraints: Constraints, kind: str, given: Any, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        getattr(constraints, kind)(given)


def test_a_deep_schema_does_not_take_the_process_down(constraints: Constraints) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(20_000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InputError, match="The JSON schema is not JSON"):
        constraints.json_schema(deep)
