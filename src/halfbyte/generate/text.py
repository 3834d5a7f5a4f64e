"""Token ids to text as they come.

The joined pieces are the decoded answer exactly, up to a stop string. Each token decodes a window of the last ones and
gives what it added, but for an unfinished character at the end. The window begins anew only where its shorter text is
the end of the longer one, so that what a decoder does at the start of a text (SentencePiece loses a space there) is not
mistaken for text. Text that could begin a stop string is held back until it is one or is none.

One thing is not as decoded: where tokens are single bytes (byte fallback), a run of them that turns out to be no text
decodes to replacement characters as a whole; characters of it that were whole, and given, stay.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_WINDOW = 64
SHORTEST_WINDOW = 16
"""Tokens that are decoded for a new one: as the window grows, and when it has begun anew."""

BYTES = 4
"""Of a character in UTF-8, at most."""


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        """
        Args:
            tokenizer: the model's; special tokens give no text.
            stops: texts that the answer ends before.
        """
        self.is_stopped = False
        """Whether a stop string has been found: nothing more comes."""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that have been taken
        self._text = ""
        self._held = ""

    def add(self, token: int) -> str:
        """Return the text that is certain now: what a token adds, less what is held back."""
        self._window.append(token)
        self._text = self._decode(self._window)
        if len(self._text) <= self._shown or self._text.endswith(UNFINISHED):
            return ""
        new = self._text[self._shown :]
        self._shown = len(self._text)
        if len(self._window) > LONGEST_WINDOW:
            self._begin_anew()
        return self._until_stop(new)

    def end(self) -> str:
        """Return what is left at the answer's end: an unfinished character, and the begin of a stop string."""
        new = self._text[self._shown :]
        self._shown = len(self._text)
        rest = self._until_stop(new)
        if self.is_stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _begin_anew(self) -> None:
        for length in range(SHORTEST_WINDOW, SHORTEST_WINDOW + BYTES):  # one of them begins with a whole character
            window = self._window[-length:]
            text = self._decode(window)
            if text and self._text.endswith(text):
                self._window, self._text, self._shown = window, text, len(text)
                return

    def _until_stop(self, new: str) -> str:
        """Return of held and new text what comes before a stop string, and hold back what could begin one."""
        if not self._stops:
            return new
        if self.is_stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        longest = min(len(text), max(map(len, self._stops)) - 1)
        begins = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops))
        held = next(begins, 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
