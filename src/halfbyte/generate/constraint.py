"""Answers that follow a JSON schema, a regular expression or a grammar, by the library llguidance (extra ``serve``).

Before each token the grammar says which ones may come next; the others are masked before one is chosen. Stop tokens
are allowed exactly where the grammar may end.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy
from transformers import PreTrainedTokenizerBase

from halfbyte.errors import DecodingError, InputError
from halfbyte.generate.sampling import Allowed

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

INSTALL = "Answers that follow a schema or grammar need llguidance: pip install 'halfbyte[serve]'."
BETWEEN: Any = {"whitespace_pattern": r"\n?[ \t]{0,64}"}
"""What may stand between the parts of JSON: small models go on with empty lines to their end where they may."""
LONGEST_GRAMMAR = 1 << 20
"""Characters of a schema, expression or grammar."""
SHOWN = 300
"""Characters of the library's reason that are told."""


class Constraints:
    """Makes constraints for one tokenizer; takes about a second once, so it is made once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stops: Iterable[int]) -> None:
        """
        Args:
            tokenizer: the model's, one of the library tokenizers.
            vocab_size: logits of a token, at least as many as the tokenizer has tokens.
            stops: tokens that end an answer.

        Raises:
            InputError: llguidance lacks, or the tokenizer is not one that it knows.
        """
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise InputError(INSTALL) from None
        self.stops = tuple(dict.fromkeys(stops))
        size = max(vocab_size, len(tokenizer))
        try:
            self._tokenizer: LLTokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=size, eos_token=list(self.stops) or None
            )
        except (ValueError, TypeError) as error:
            name = type(tokenizer).__name__
            raise InputError(f"Answers cannot be held to a grammar with {name}: {_reason(str(error))}.") from None
        self._matcher = llguidance.LLMatcher
        self.vocab_size = vocab_size

    def json_schema(self, schema: Mapping[str, Any] | bool) -> "Constraint":
        """Return the constraint to JSON that a schema takes.

        Raises:
            InputError: it is no schema, or has what llguidance does not know; told with its reason.
        """
        if not isinstance(schema, Mapping | bool):
            raise InputError(f"The JSON schema is a {type(schema).__name__}; it must be an object.")
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"The JSON schema is not JSON: {error}.") from None
        defaults = BETWEEN if isinstance(schema, Mapping) else None  # true and false have no place for them
        compiled = functools.partial(self._matcher.grammar_from_json_schema, defaults=defaults)
        return self._made("The JSON schema", text, compiled)

    def json_object(self) -> "Constraint":
        """Return the constraint to any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> "Constraint":
        """Return the constraint to what a regular expression matches as a whole.

        Raises:
            InputError: it is none, or has what llguidance does not know (look-around, back references).
        """
        return self._made("The regular expression", pattern, self._matcher.grammar_from_regex)

    def lark(self, grammar: str) -> "Constraint":
        """Return the constraint to what a grammar in Lark's notation derives from ``start``.

        Raises:
            InputError: it is none; told with llguidance's reason.
        """
        return self._made("The grammar", grammar, self._matcher.grammar_from_lark)

    def _made(self, what: str, text: str, compiled: Any) -> "Constraint":
        if not isinstance(text, str):
            raise InputError(f"{what} is a {type(text).__name__}; it must be a text.")
        if len(text) > LONGEST_GRAMMAR:
            raise InputError(f"{what} is {len(text):,} characters long; up to {LONGEST_GRAMMAR:,} are taken.")
        try:
            grammar = compiled(text)
        except (ValueError, TypeError) as error:
            raise InputError(f"{what} cannot be used: {_reason(str(error))}.") from None
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"{what} cannot be used: {_reason(matcher.get_error())}.")
        return Constraint(self, matcher)


class Constraint:
    """A grammar that is ready for use; any number of answers may be held to it."""

    def __init__(self, owner: Constraints, matcher: "LLMatcher") -> None:
        self.vocab_size = owner.vocab_size
        self._owner, self._matcher = owner, matcher

    def begin(self, stops: Iterable[int] = ()) -> "Following":
        """Return the state of one answer that follows the grammar.

        Args:
            stops: tokens that end it beside the model's own.
        """
        return Following(self.vocab_size, self._matcher.deep_copy(), {*self._owner.stops, *stops})


class Following:
    """Where one answer stands in its grammar."""

    def __init__(self, vocab_size: int, matcher: "LLMatcher", stops: set[int]) -> None:
        self._size, self._matcher, self._stops = vocab_size, matcher, sorted(stops)

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self._matcher.is_stopped()

    def mask(self) -> Allowed:
        """Return which tokens may come next: [vocab_size].

        Raises:
            DecodingError: none may, or the grammar has grown too complex; told with llguidance's reason.
        """
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        allowed = numpy.unpackbits(bits, bitorder="little")[: self._size].view(numpy.bool_)
        self._check()
        if self._stops:
            allowed[self._stops] = self._matcher.is_accepting()
        if not allowed.any():
            raise DecodingError("The grammar allows no token of this model here.")
        return allowed

    def add(self, token: int) -> None:
        """Take a token for the answer's next one; one that ends it is not taken.

        Raises:
            DecodingError: the grammar does not allow it.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DecodingError(f"The answer can follow its grammar no further: {_reason(self._matcher.get_error())}.")


def _reason(error: str) -> str:
    """Return the library's reason as part of one sentence."""
    told = error.partition("<state>")[0]  # behind it stands the answer
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    lines = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    text = " ".join(lines[:3]).rstrip(".") or "no reason is given"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
