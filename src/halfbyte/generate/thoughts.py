"""Thoughts and answer of what a thinking model writes, parted as it comes.

A thought stands before the answer, between ``<think>`` and ``</think>`` as Qwen's and DeepSeek's models write it, or
another pair of tags of :data:`TAGS`; where the generation prompt has opened it, the first tag is not written. What may
be the beginning of a tag is held back until it is one or is none. Parts are pairs: whether it is a thought, and text.
"""

import re

TAGS = ("think", "thought", "thinking", "reasoning")
_OPEN = re.compile(rf"<({'|'.join(TAGS)})>\s*\Z")
_FIRST = re.compile(rf"\s*<({'|'.join(TAGS)})>")
_OPENING = tuple(f"<{tag}>" for tag in TAGS)

Part = tuple[bool, str]


def opened_by(prompt: str) -> str | None:
    """Return the tag that a prompt opens at its end, or None."""
    found = _OPEN.search(prompt)
    return found[1] if found else None


class Thoughts:
    """Parts one answer.

    Args:
        tag: the tag that the prompt has opened, or None.

    Attributes:
        thought: so far, without tags.
        answer: so far.
    """

    def __init__(self, tag: str | None = None) -> None:
        self.thought = self.answer = ""
        self._tag = tag
        self._held = ""
        self._is_answer = False

    def add(self, text: str) -> list[Part]:
        """Return what a further text adds for certain."""
        if self._is_answer:
            return self._answered(text)
        self._held += text
        if self._tag is None:
            found = _FIRST.match(self._held)
            if not found:
                begun = self._held.lstrip()
                if not begun or any(tag.startswith(begun) for tag in _OPENING):
                    return []
                self._is_answer = True
                return self._answered(self._taken())
            self._tag, self._held = found[1], self._held[found.end() :]
        close = f"</{self._tag}>"
        thought, is_closed, rest = self._held.partition(close)
        if is_closed:
            self._held, self._is_answer = "", True
            return [*self._thought(thought), *self._answered(rest)]
        kept = next((n for n in range(len(close) - 1, 0, -1) if close.startswith(self._held[-n:])), 0)
        kept = min(kept, len(self._held))
        thought, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return self._thought(thought)

    def end(self) -> list[Part]:
        """Return what was held back."""
        rest = self._taken()
        return self._answered(rest) if self._is_answer or self._tag is None else self._thought(rest)

    def _taken(self) -> str:
        held, self._held = self._held, ""
        return held

    def _thought(self, text: str) -> list[Part]:
        if not self.thought:
            text = text.lstrip("\n")
        self.thought += text
        return [(True, text)] if text else []

    def _answered(self, text: str) -> list[Part]:
        if not self.answer and self._tag is not None:
            text = text.lstrip("\n")  # what stands between a thought and its answer belongs to neither
        self.answer += text
        return [(False, text)] if text else []
