r"""How a byte-level tokenizer cuts a text before it joins bytes, by llama.cpp's name for it (``tokenizer.ggml.pre``).

llama.cpp (0.5, llama-vocab.cpp) knows a list of such ways by name. Which one a tokenizer has is found by cutting one
text with it and with each way that is known, and comparing the pieces. So it depends on neither the vocabulary nor on
how the tokenizer's file puts its rules, as a digest of token ids does, which llama.cpp's own converter goes by.

Left out are ways that no family written here is known to have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import Sequence as InTurn
from tokenizers.pre_tokenizers import Split

from halfbyte.errors import InputError, nearest

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LED = r"[^\r\n\p{L}\p{N}]?"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Way:
    """A way of cutting.

    Attributes:
        name: llama.cpp's.
        rules: regular expressions whose matches are cut out, one after the other.
        whole: whether a piece that is a token is taken whole (``ignore_merges``).
    """

    name: str
    rules: tuple[str, ...]
    whole: bool = False


WAYS = (
    Way("gpt-2", (_GPT2,)),
    Way("smollm", (r"\p{N}", _GPT2)),
    Way("llama-bpe", (f"{_SHORT}|{_WORD}|\\p{{N}}{{1,3}}{_REST}",), whole=True),
    Way("dbrx", (f"{_SHORT}|{_WORD}|\\p{{N}}{{1,3}}{_REST}",)),
    Way("qwen2", (f"{_SHORT}|{_WORD}|\\p{{N}}{_REST}",)),
    Way(
        "qwen35",
        (f"{_SHORT}|{_LED}[\\p{{L}}\\p{{M}}]+|\\p{{N}}" + _REST.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),),
    ),
    Way("tekken", (f"{_LED}{_UPPER}*{_LOWER}+|{_LED}{_UPPER}+{_LOWER}*|\\p{{N}}{_SLASHED}",), whole=True),
    Way(
        "gpt-4o",
        (f"{_LED}{_UPPER}*{_LOWER}+{_SHORT}?|{_LED}{_UPPER}+{_LOWER}*{_SHORT}?|\\p{{N}}{{1,3}}{_SLASHED}",),
    ),
    Way("deepseek-v3", (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK)),
    Way("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
)
"""Their rules are those of the published tokenizers, by which llama.cpp's were made."""
WITHOUT_MARKS = ("tekken", "gpt-4o")
"""Ways whose rules llama.cpp has without the marks that belong to a letter (tried: Hindi is cut otherwise)."""

OTHERS = (
    "default", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "deepseek-llm", "falcon",
    "mpt", "starcoder", "phi-2", "gigachat", "mellum", "jais", "jais-2", "refact", "command-r", "deepseek-r1-qwen",
    "stablelm2", "olmo", "poro-chat", "glm4", "chatglm-bpe", "viking", "codeshell", "bloom", "gpt3-finnish", "exaone",
    "exaone4", "smaug-bpe", "chameleon", "minerva-7b", "megrez", "llama4", "superbpe", "trillion", "bailingmoe",
    "seed-coder", "hunyuan", "kimi-k2", "grok-2", "granite-docling", "minimax-m2", "a.x-4.0",
)  # fmt: skip
"""Other names that llama.cpp knows, and that may be given."""

PROBE = (
    "Hello World, it's 1 12 123 1234 12345678 tests.\n\n\nI'LL We'Ve DON'T he'd'll  two   three    four\t\ttabs \t "
    "mixed \n \r\n windows\r\n\r\nLines \n\n  indented\n\tcode = foo_bar(x1, y22) + 3.14e-10; // /* a/b */\n"
    "camelCase HTTPServer XMLHttp2Request naïve Ünïcödé e\u0301a\u0308 ﬁ 你好，世界。中文abc混合123テスト カタカナ "
    "한국어 русский العربية १२३ हिन्दी ภาษาไทย 🙂🙃👩‍👩‍👧 ₿$€£ "
    "½²³ ⅷ «quoted» “curly” — dash… #hash @at &amp; <b>html</b>\n"
    "/path/to\n"
    "(a)[b]{c}!!! ??? ... --- === '''code''' 's 't x's\u00a0nbsp\u2003em \u200bzero   "
)
"""What is cut: cases in which the ways differ."""


def way_of(tokenizer: Any, whole: bool) -> str | None:
    """Return llama.cpp's name for how a tokenizer cuts, or None where none is known.

    Args:
        tokenizer: of the package tokenizers.
        whole: its model's ``ignore_merges``.
    """
    if tokenizer.pre_tokenizer is None:
        return None
    cut = _spans(tokenizer.pre_tokenizer)
    return next((way.name for way in WAYS if way.whole == whole and _known(way.rules) == cut), None)


def check_way(name: str) -> None:
    """Check a name that was given.

    Raises:
        InputError: llama.cpp does not know it.
    """
    known = [*(way.name for way in WAYS), *OTHERS]
    if name not in known:
        raise InputError(f"{name!r} is none of llama.cpp's ways of cutting a text{nearest(name, known)} (pre).")


@lru_cache
def _known(rules: tuple[str, ...]) -> Sequence[tuple[int, int]]:
    return _spans(InTurn([Split(Regex(rule), "isolated") for rule in rules]))


def _spans(pre_tokenizer: Any) -> Sequence[tuple[int, int]]:
    return [span for _, span in pre_tokenizer.pre_tokenize_str(PROBE)]
