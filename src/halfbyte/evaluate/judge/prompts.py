"""What a judge is asked, and how its verdict is read. What is asked is what the paper's files ask (artidoro/qlora,
eval/prompts, after FastChat's), in other words.

    classes   the better answer of two, or none: reasons first, then a last line with 1, 2 or 3 (equally good)
    scores    1 to 10 for each: a first line with two numbers, then reasons

A verdict that is not in its place in this form is none: nothing is made out of what else was written.
"""

import re
from typing import Literal, get_args

from halfbyte.generate.thoughts import Thoughts

Scale = Literal["classes", "scores"]
SCALES: tuple[Scale, ...] = get_args(Scale)
TIE = 3
LOWEST, HIGHEST = 1.0, 10.0

SYSTEM = "You are a careful and fair judge of answers that assistants give."
ASKED = """\
<question>
{question}
</question>

<answer of assistant 1>
{first}
</answer of assistant 1>

<answer of assistant 2>
{second}
</answer of assistant 2>

{task}"""

_GENERAL = """\
Two assistants have answered the question above. Weigh how helpful, how much to the point, how correct and how \
detailed each answer is."""
_CODING = """\
Two assistants were asked to write the program that the question above describes. Look at how each goes about it, how \
its code is built and how well it reads. Does it do what is asked, correctly and without waste? Do its comments say \
clearly and shortly how it works? Does it keep to good practice?"""
_MATH = """\
Two assistants have answered the question above, which is one of mathematics. Solve it yourself first, without their \
answers. Then go through each answer step by step and name the steps that are wrong; the way counts as well as the \
result."""
_FAIR = "Take no sides, and let the order in which the answers stand make no difference."
_CLASS = """\
{weigh} Write down what you find. {fair}
When you are done, end with a line of its own that holds a single number and nothing else: 1 if assistant 1 has \
answered better, 2 if assistant 2 has, 3 if the two answers are equally good."""
_SCORE = """\
{weigh} Give each assistant a score from 1 to 10, where more is better. {fair}
Begin with a line that holds two numbers and nothing else, parted by a blank: the score of assistant 1, then that of \
assistant 2. Explain them in the lines after it."""

KINDS = {"general": _GENERAL, "coding": _CODING, "math": _MATH}
"""What is weighed, by the category of a question; others are general."""


def ask(scale: Scale, question: str, first: str, second: str, category: str = "general") -> str:
    """Return what a judge is asked about two answers."""
    task = _CLASS if scale == "classes" else _SCORE
    told = task.format(weigh=KINDS.get(category, _GENERAL), fair=_FAIR)
    return ASKED.format(question=question, first=first, second=second, task=told)


_DRESS = " \t*_`#>."
"""What a line may have around its verdict: Markdown's marks, and a full stop."""
_CLASS_LINE = re.compile(r"[123]")
_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
_SCORE_LINE = re.compile(rf"{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}")


def class_of(reply: str) -> int | None:
    """Return the verdict of a reply about classes, 1, 2 or 3, or None where its last line is none."""
    lines = _lines(reply)
    last = lines[-1].strip(_DRESS) if lines else ""
    return int(last) if _CLASS_LINE.fullmatch(last) else None


def scores_of(reply: str) -> tuple[float, float] | None:
    """Return the scores of a reply, or None where its first line is not two numbers from 1 to 10."""
    lines = _lines(reply)
    found = _SCORE_LINE.fullmatch(lines[0].strip(_DRESS)) if lines else None
    if found is None:
        return None
    one, other = float(found[1]), float(found[2])
    return (one, other) if all(LOWEST <= score <= HIGHEST for score in (one, other)) else None


def _lines(reply: str) -> list[str]:
    """Return the lines of a reply that hold something, without a judge's thoughts."""
    parts = Thoughts()
    parts.add(reply)
    parts.end()
    return [line for line in parts.answer.splitlines() if line.strip()]
