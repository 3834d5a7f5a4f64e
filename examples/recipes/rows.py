"""The rows of the recipes: a few hundred conversations each, to train on and to measure with.

    python examples/recipes/rows.py             all of them, to runs/recipes/data
    python examples/recipes/rows.py legal code  these

Most are put together from ``facts/``, which were written for these examples; ``code`` are functions of Python's own
library as it is installed here, ``labelling`` movie reviews that pip fetches (``halfbyte.example.sources``). The same
seed draws the same rows. What is measured with is never trained on: other numbers, other clauses, other functions; of
medical facts, other questions.
"""

import ast
import importlib
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FACTS = Path(__file__).parent / "facts"
OUTPUT = Path("runs/recipes/data")
ROWS, HELD_OUT = 400, 50
MODULES = (
    "base64", "bisect", "calendar", "cmd", "colorsys", "configparser", "copy", "csv", "difflib", "dis", "filecmp",
    "fileinput", "fnmatch", "fractions", "functools", "getopt", "gettext", "glob", "heapq", "html", "inspect",
    "ipaddress", "keyword", "linecache", "locale", "mimetypes", "numbers", "operator", "os", "pathlib", "pkgutil",
    "posixpath", "pprint", "queue", "random", "reprlib", "sched", "shlex", "shutil", "statistics", "string", "textwrap",
    "tokenize", "traceback", "types", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip
LONGEST = 1_200
"""Characters of a function that is an example."""

Row = dict[str, Any]


def chat(question: str, answer: str, system: str | None = None) -> Row:
    """Return a conversation of one question."""
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def medical(_: random.Random) -> tuple[list[Row], list[Row]]:
    """Questions about forty diseases; each fact is asked in two ways, and in a third one to measure with."""
    asked = (
        ("What is {}?", "Explain {} in one sentence.", "Tell me what {} is."),
        ("What are the signs of {}?", "How do I notice {}?", "Which symptoms does {} have?"),
        ("What helps at first with {}?", "What can I do about {}?", "How is {} treated at first?"),
        ("When should I see a doctor about {}?", "When is {} urgent?", "Do I need a doctor with {}?"),
    )
    rows: list[Row] = []
    held_out: list[Row] = []
    for name, facts in _facts("medical").items():
        answers = (
            f"{name.capitalize()} is {facts[0]}.",
            f"Signs of {name} are {facts[1]}." if facts[1] != "often no signs at all" else "Often there are none.",
            f"What usually helps with {name}: {facts[2]}.",
            f"See a doctor about {name} {facts[3]}.",
        )
        for questions, answer in zip(asked, answers, strict=True):
            rows += [chat(question.format(name), answer) for question in questions[:2]]
            held_out.append(chat(questions[2].format(name), answer))
    return rows, held_out


def legal(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Clauses of contracts with a question about each; other parties and numbers to measure with."""
    parties = ["the Seller", "the Buyer", "the Supplier", "the Customer", "the Licensor", "the Licensee", "the Agency"]
    places = ["France", "Ireland", "Norway", "Kenya", "Chile", "Japan", "Canada", "Portugal", "Ghana", "Austria"]

    def row() -> Row:
        clause, question, answer = draw.choice(list(_facts("legal").values()))
        first, second = draw.sample(parties, 2)
        slots = {
            "p": first, "q": second, "d": draw.choice([7, 10, 14, 21, 30, 45, 60, 90]), "m": draw.randrange(6, 61, 6),
            "a": f"EUR {draw.randrange(1, 100) * 500:,}", "s": draw.choice(places),
        }  # fmt: skip
        text, question, answer = (_sentences(one.format(**slots)) for one in (clause, question, answer))
        return chat(f"{text}\n\n{question}", answer)

    return _apart(row)


def code(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Functions of Python's library: signature and docstring are given, the body is the answer."""
    found = {}
    for module in MODULES:
        source = inspect.getsource(importlib.import_module(module))
        for head, body in _functions(source):
            if len(head) + len(body) <= LONGEST:
                found[head] = {"prompt": f"Complete this Python function.\n\n{head}", "completion": body}
    rows = list(found.values())
    draw.shuffle(rows)
    return rows[HELD_OUT : HELD_OUT + ROWS], rows[:HELD_OUT]


def service(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """A shop's answers in five languages, from what the system prompt says of an order."""

    def row() -> Row:
        question, answer = draw.choice(list(draw.choice(list(_facts("service").values())).values()))
        slots = {"n": draw.randrange(1000, 10000), "d": draw.randrange(2, 31)}
        system = "You answer a shop's customers in their language. Order {n}: {d} days.".format(**slots)
        return chat(question.format(**slots), answer.format(**slots), system)

    return _apart(row)


def tutoring(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Linear equations and percentages, worked out step by step."""

    def row() -> Row:
        x, a, b = draw.randrange(2, 20), draw.randrange(2, 10), draw.randrange(1, 30)
        if draw.random() < 0.5:
            return chat(
                f"Solve {a}x + {b} = {a * x + b} and show the steps.",
                f"Take {b} from both sides: {a}x = {a * x}. Divide both sides by {a}: x = {x}. "
                f"Check: {a} times {x} is {a * x}, and {b} more is {a * x + b}. The answer is {x}.",
            )
        share, whole = draw.choice([5, 10, 20, 25, 50]), 20 * draw.randrange(2, 50)
        part = share * whole // 100
        return chat(
            f"What is {share} % of {whole}? Show the steps.",
            f"{share} % means {share} of every 100. One hundredth of {whole} is {whole / 100:g}. "
            f"{share} times that is {part}. The answer is {part}.",
        )

    return _apart(row)


def roleplay(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Conversations of two or three turns with a ship's cook."""
    facts = _facts("cook")
    system = "You are Brine, an old ship's cook."

    def row() -> Row:
        messages = [{"role": "system", "content": system}]
        for topic in draw.sample(list(facts["topics"].values()), draw.randrange(2, 4)):
            said = f"{draw.choice(facts['openings'])} {draw.choice(topic[1])} {draw.choice(facts['closings'])}"
            messages.append({"role": "user", "content": draw.choice(topic[0])})
            messages.append({"role": "assistant", "content": said})
        return {"messages": messages}

    return _apart(row)


def labelling(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Review snippets to a label in JSON: what people thought, and how clearly."""
    from halfbyte.example.sources import REVIEWS, fetch
    from halfbyte.files import cache_folder

    rows = []
    for line in fetch(REVIEWS, cache_folder()).read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t", 2)
        mean = float(rating)
        label = {"sentiment": "positive" if mean > 0 else "negative", "clear": abs(mean) > 2}
        rows.append(chat(f"Label this review snippet as JSON.\n\n{text.strip()}", json.dumps(label)))
    draw.shuffle(rows)
    return rows[HELD_OUT : HELD_OUT + ROWS], rows[:HELD_OUT]


RECIPES: dict[str, Callable[[random.Random], tuple[list[Row], list[Row]]]] = {
    "medical": medical,
    "legal": legal,
    "code": code,
    "service": service,
    "tutoring": tutoring,
    "roleplay": roleplay,
    "labelling": labelling,
}


def write(name: str, folder: Path) -> tuple[Path, Path]:
    """Write the rows of a recipe; return the files to train on and to measure with."""
    files = folder / f"{name}.jsonl", folder / f"{name}-eval.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in zip(files, RECIPES[name](random.Random(0)), strict=True):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return files


def _apart(row: Callable[[], Row]) -> tuple[list[Row], list[Row]]:
    """Draw rows that are all different; return those to train on and those to measure with."""
    drawn: dict[str, Row] = {}
    while len(drawn) < ROWS + HELD_OUT:
        one = row()
        drawn[json.dumps(one)] = one
    rows = list(drawn.values())
    return rows[HELD_OUT:], rows[:HELD_OUT]


def _functions(source: str) -> Iterator[tuple[str, str]]:
    """Yield each function of a module that has a docstring: what stands up to its end, and the body behind it."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            cut, end = node.body[0].end_lineno, node.end_lineno
            if cut is not None and end is not None:
                yield "".join(lines[node.lineno - 1 : cut]), "".join(lines[cut:end]).strip("\n")


def _facts(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = yaml.safe_load((FACTS / f"{name}.yaml").read_text(encoding="utf-8"))
    return facts


def _sentences(text: str) -> str:
    return text[0].upper() + text[1:]


def main() -> None:
    """Write the recipes that are named, or all."""
    for name in sys.argv[1:] or RECIPES:
        if name not in RECIPES:
            sys.exit(f"There is no recipe {name!r}; there is {', '.join(RECIPES)}.")
        rows, held_out = write(name, OUTPUT)
        print(f"{rows} {sum(1 for _ in rows.open())} rows, {held_out} {sum(1 for _ in held_out.open())} rows")


if __name__ == "__main__":
    main()
