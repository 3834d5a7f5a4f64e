"""A contest judged by our own server and by a stand-in that answers well, nonsense, or fails in the middle."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judging import StandIn, stand_in
from serving import Running

from halfbyte import cli
from halfbyte.deploy.contest import Contest, hold, questions_in
from halfbyte.errors import InputError
from halfbyte.evaluate.judge import endpoint
from halfbyte.evaluate.judge.elo import elo
from halfbyte.evaluate.judge.prompts import ask
from halfbyte.evaluate.judge.summary import games_of

QUESTIONS = [
    {"question_id": 11, "text": "Name a colour.", "category": "general"},
    {"question_id": 12, "text": "Write a loop.", "category": "coding"},
    {"question_id": 13, "text": "What is 2 + 2?", "category": "math"},
]
ANSWERS = {"long": "It is a very long answer, to be sure", "short": "yes", "middle": "a few words"}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.delenv(endpoint.KEY, raising=False)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    def write(name: str, rows: list[Any]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("questions.jsonl", QUESTIONS)
    for name, text in ANSWERS.items():
        rows = [{"question_id": row["question_id"], "generation": f"{text} {row['question_id']}"} for row in QUESTIONS]
        write(f"{name}.jsonl", rows[::-1])
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        code: Any = exit.value.code
        return code or 0, *capfd.readouterr()

    return run


def longer(body: dict[str, Any]) -> str:
    """Prefer the longer answer, as judges do."""
    first, second = (
        re.search(rf"<answer of assistant {n}>\n(.*?)\n</answer", body["messages"][1]["content"], re.DOTALL)[1]
        for n in (1, 2)
    )
    return f"The longer one.\n{1 if len(first) > len(second) else 2}"


def command(files: Path, served: StandIn, *names: str, output: str = "out") -> list[Any]:
    contestants = [f"{name}={files / name}.jsonl" for name in names or ANSWERS]
    given = ["--endpoint", served.url, "--output", files / output, "--orders", 200]
    return ["evaluate", "judge", files / "questions.jsonl", *contestants, *given]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def test_everybody_meets_everybody_in_both_orders(files: Path, run: Callable[..., Any]) -> None:
    with stand_in(longer) as served:
        code, out, err = run(*command(files, served))
        assert code == 0, err
        assert len(served.asked) == 3 * 3 * 2
        assert {body["model"] for body in served.asked} == {"wise"}
        assert {(body["temperature"], body["max_tokens"]) for body in served.asked} == {(0.0, 1024)}
        prompts = {body["messages"][1]["content"] for body in served.asked}
        assert ask("classes", "Write a loop.", f"{ANSWERS['long']} 12", "yes 12", "coding") in prompts
        assert ask("classes", "Write a loop.", "yes 12", f"{ANSWERS['long']} 12", "coding") in prompts
    lines = lines_of(files / "out" / "judgements.jsonl")
    summary = json.loads((files / "out" / "judged.json").read_text())
    assert [one["name"] for one in summary["ratings"]] == ["long", "middle", "short"]
    ordered = sorted(lines, key=lambda line: [line["question"], [*ANSWERS].index(line["first"])])
    assert len({(line["question"], line["first"], line["second"]) for line in ordered}) == 18
    assert all(pair["agreed"] == pair["both_orders"] == 3 for pair in summary["pairs"])
    assert summary["first"] == 0.5 and summary["unreadable"] == 0
    wanted = elo(games_of(lines, list(ANSWERS)), 3, orders=20_000)
    for one in summary["ratings"]:
        assert one["rating"] == pytest.approx(wanted[[*ANSWERS].index(one["name"])].mean, abs=4)
    assert "Elo ratings" in out and "50.0% of the verdicts" in out
    code, out, err = run(
        "evaluate", "elo", files / "out" / "judgements.jsonl", "--orders", 200, "--json", files / "elo.json"
    )
    assert code == 0, err
    again = json.loads((files / "elo.json").read_text())
    assert [one["name"] for one in again["ratings"]] == ["long", "middle", "short"]


def test_an_endpoint_that_fails_in_the_middle_is_gone_on_with_where_it_was(
    files: Path, run: Callable[..., Any]
) -> None:
    count = iter(range(1000))

    def failing(body: dict[str, Any]) -> str | tuple[int, str]:
        return longer(body) if next(count) < 5 else (500, "error 500")

    with stand_in(failing) as served:
        code, out, err = run(*command(files, served), "--concurrency", 1)
        assert (code, out) == (2, "") and "error 500" in err
        assert re.search(
            r"5 judgements of 18 are in .*judgements.jsonl; the same command goes on", err.replace("\n", " ")
        )
        assert len(served.asked) == 5 + 1 + endpoint.RETRIES
        assert sorted(file.name for file in (files / "out").iterdir()) == ["judgements.jsonl"]
        before = (files / "out" / "judgements.jsonl").read_bytes()
        served.asked.clear()
        served.answer = longer
        code, _, err = run(*command(files, served), "--concurrency", 3)
        assert code == 0, err
        assert len(served.asked) == 13
        after = (files / "out" / "judgements.jsonl").read_bytes()
        assert after.startswith(before) and after.count(b"\n") == 18
        served.asked.clear()
        assert run(*command(files, served))[0] == 0 and not served.asked
        (files / "out" / "judgements.jsonl").write_bytes(after[:-30])
        assert run(*command(files, served))[0] == 0 and len(served.asked) == 1


def test_a_judge_that_answers_nonsense_is_counted_and_not_asked_again(files: Path, run: Callable[..., Any]) -> None:
    def odd(body: dict[str, Any]) -> str:
        return "I like both." if "2 + 2" in body["messages"][1]["content"] else longer(body)

    with stand_in(odd) as served:
        code, out, err = run(*command(files, served))
        assert code == 0, err
        assert "6 of 18 replies hold no verdict" in out
        kept = [line for line in lines_of(files / "out" / "judgements.jsonl") if line["verdict"] is None]
        assert len(kept) == 6 and all(line["reply"] == "I like both." for line in kept)
        served.asked.clear()
        assert run(*command(files, served))[0] == 0 and not served.asked
        served.answer = lambda _: ""
        code, out, _ = run(*command(files, served, output="mute"))
        assert code == 0 and "18 of 18 replies hold no verdict" in out


def test_scores_are_relative_to_the_first_one(files: Path, run: Callable[..., Any]) -> None:
    def scoring(body: dict[str, Any]) -> str:
        text = body["messages"][1]["content"]
        first, second = (10 if ANSWERS["long"] in part else 5 for part in text.split("</answer of assistant 1>"))
        return f"{first} {second}\nbecause"

    with stand_in(scoring) as served:
        code, out, err = run(*command(files, served), "--scale", "scores")
        assert code == 0, err
        assert len(served.asked) == 3 * 2 * 2  # the others do not meet each other
    summary = json.loads((files / "out" / "judged.json").read_text())
    assert summary["baseline"] == "long"
    assert {one["name"]: one["relative"] for one in summary["scores"]} == {"long": None, "short": 0.5, "middle": 0.5}
    assert "50.0% ± 0.0%" in out


def test_our_own_server_judges(files: Path, served: Running) -> None:
    """A tiny model of random weights writes no verdict: that is counted, and told."""
    contest = Contest(
        questions=str(files / "questions.jsonl"),
        contestants=[f"{name}={files / name}.jsonl" for name in ("long", "short")],
        endpoint=served.url, judge="tiny", judge_tokens=8, limit=2, orders=10,
    )  # fmt: skip
    seen: list[tuple[str, int, int]] = []
    summary, folder = hold(contest, files / "out", progress=lambda *told: seen.append(told))
    lines = lines_of(folder / "judgements.jsonl")
    assert len(lines) == summary.judgements == 4 and summary.unreadable == sum(
        line["verdict"] is None for line in lines
    )
    assert {line["finish"] for line in lines} <= {"stop", "length"}
    assert [told[1:] for told in seen if told[0] == "judgements"] == [(n, 4) for n in range(5)]
    replies = {}
    for line in lines:
        words = {row["question_id"]: row["text"] for row in QUESTIONS}
        first, second = (f"{ANSWERS[line[side]]} {line['question']}" for side in ("first", "second"))
        kind = {row["question_id"]: row["category"] for row in QUESTIONS}[int(line["question"])]
        prompt = ask("classes", words[int(line["question"])], first, second, kind)
        replies[prompt] = line["reply"]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    from halfbyte.evaluate.judge.prompts import SYSTEM

    for prompt, reply in replies.items():
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        answer = served.post("/v1/chat/completions", body | {"messages": messages}).json()
        assert answer["choices"][0]["message"]["content"] == reply


def test_models_answer_themselves_and_go_on(base: Path, adapters: Path, files: Path) -> None:
    with stand_in(longer) as judge:
        contest = Contest(
            questions=str(files / "questions.jsonl"),
            contestants=[f"plain={base}", f"red={adapters / 'red'}", f"file={files / 'short.jsonl'}"],
            endpoint=judge.url, max_new_tokens=6, orders=10,
        )  # fmt: skip
        summary, folder = hold(contest, files / "out")
        assert summary.judgements == 18
        assert sorted(file.name for file in folder.iterdir()) == [
            "answers-plain.jsonl", "answers-red.jsonl", "judged.json", "judgements.jsonl",
        ]  # fmt: skip
        plain, red = (lines_of(folder / f"answers-{name}.jsonl") for name in ("plain", "red"))
        assert [line["generated"] for line in plain] != [line["generated"] for line in red]
        said = {body["messages"][1]["content"] for body in judge.asked}
        assert ask("classes", "Name a colour.", plain[0]["generated"], red[0]["generated"]) in said
        whole = (folder / "answers-plain.jsonl").read_bytes()
        (folder / "answers-plain.jsonl").write_bytes(whole[: whole.index(b"\n") + 1])
        judge.asked.clear()
        hold(contest, files / "out")
        assert (folder / "answers-plain.jsonl").read_bytes() == whole and not judge.asked


def test_newer_models_call_the_limit_otherwise(files: Path, run: Callable[..., Any]) -> None:
    def newer(body: dict[str, Any]) -> str | tuple[int, str]:
        if "max_tokens" in body:
            return 400, "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'."
        return longer(body)

    with stand_in(newer) as served:
        code, _, err = run(*command(files, served), "--concurrency", 1)
        assert code == 0, err
        assert len(served.asked) == 19 and served.asked[-1]["max_completion_tokens"] == 1024


def test_the_key_is_read_from_the_environment(
    files: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoint.KEY, "secret")
    with stand_in(lambda _: (401, "no such key")) as served:
        served.models = ["a", "b"]
        code, _, err = run(*command(files, served))
        assert code == 2 and "has a and b; name the one that judges with --judge" in err
        code, _, err = run(*command(files, served), "--judge", "a")
        assert code == 2 and f"lets nobody in without its key (no such key); put it into {endpoint.KEY}" in err
        assert set(served.keys) == {"Bearer secret"} and "secret" not in err
    assert not (files / "out").exists()


def test_what_is_wrong_is_one_sentence_and_leaves_nothing(files: Path, run: Callable[..., Any]) -> None:
    (files / "few.jsonl").write_text(json.dumps({"question_id": 11, "text": "x"}) + "\n")
    (files / "odd.jsonl").write_text(json.dumps({"question_id": 11, "apples": 1}) + "\n")
    (files / "twice.jsonl").write_text((json.dumps({"id": 1, "text": "x"}) + "\n") * 2)
    long, short = (f"{name}={files / name}.jsonl" for name in ("long", "short"))
    with stand_in(longer) as served:
        url = served.url
        rest = ["--endpoint", url, "--output", files / "out"]
        questions = files / "questions.jsonl"
        cases: list[tuple[list[Any], str]] = [
            ([questions, long, *rest], "takes two contestants or more"),
            ([questions, long, long, *rest], "Two contestants are called 'long'"),
            ([questions, long, "short", *rest], "'short' is no contestant; write NAME=FILE"),
            ([questions, long, short, *rest, "--baseline", "lang"], "is no contestant (did you mean 'long'?)"),
            (
                [questions, long, f"few={files / 'few.jsonl'}", *rest],
                "has no answer to 2 questions of 3 (the first: 12)",
            ),
            (
                [questions, long, f"odd={files / 'odd.jsonl'}", *rest],
                "holds no answer; it needs a text in one of the columns generated,",
            ),
            ([questions, long, f"no={files / 'no.jsonl'}", *rest], "no.jsonl"),
            ([questions, long, f"no={files / 'nowhere'}", *rest], "There is no folder"),
            ([files / "none.jsonl", long, short, *rest], "none.jsonl"),
            ([files / "twice.jsonl", long, short, *rest], "has the name 1, as another question has"),
            ([questions, long, short, *rest, "--judge", "wize"], "no model 'wize' (did you mean 'wise'?)"),
            (
                [questions, long, short, "--endpoint", "ftp://x", "--output", files / "out"],
                "is no address of an endpoint",
            ),
        ]
        served.answer = lambda body: (404, "unknown") if body["model"] == "wize" else longer(body)
        for words, told in cases:
            code, out, err = run("evaluate", "judge", *words)
            assert (code, out) == (2, ""), (words, err)
            assert told in " ".join(err.split()), (told, err)
            assert err.startswith("Error: ") and not (files / "out").exists(), words
    code, out, err = run("evaluate", "judge", questions, long, short, *rest)
    assert (code, out) == (2, "") and f"Nobody answers at {url}" in err and "halfbyte serve MODEL" in err
    assert not (files / "out").exists()


def test_judgements_of_others_are_told_apart(files: Path, run: Callable[..., Any]) -> None:
    with stand_in(longer) as served:
        assert run(*command(files, served, "long", "short"))[0] == 0
        served.asked.clear()
        assert run(*command(files, served))[0] == 0  # one more contestant: only what is new is asked
        assert len(served.asked) == 12
        for change in (["--judge-temperature", 0.5], ["--judge-tokens", 7]):
            code, _, err = run(*command(files, served), *change)
            assert code == 2 and "by another judge or with other options" in " ".join(err.split())
        answers = files / "short.jsonl"
        answers.write_text(answers.read_text().replace("yes", "no"))
        code, _, err = run(*command(files, served))
        assert code == 2 and "judgements of other answers" in " ".join(err.split())
        (files / "out" / "judgements.jsonl").write_text('{"apples": 1}\n')
        code, _, err = run(*command(files, served))
        assert code == 2 and "line 1 is no judgement" in err


def test_an_endpoint_of_another_kind_is_told(files: Path, run: Callable[..., Any]) -> None:
    with stand_in(longer) as served:
        served.lists_models = False
        code, _, err = run(*command(files, served))
        assert code == 2 and "does not tell what models it has" in err
        assert run(*command(files, served), "--judge", "any")[0] == 0


def test_people_may_judge_too(files: Path, run: Callable[..., Any]) -> None:
    verdicts = [("a", "b", 1), ("b", "a", 2), ("a", "b", 3)]
    text = "\n".join(
        json.dumps({"question": n, "first": one, "second": other, "verdict": verdict})
        for n, (one, other, verdict) in enumerate(verdicts)
    )
    (files / "people.jsonl").write_text(text)  # no newline at its end
    code, _, err = run("evaluate", "elo", files / "people.jsonl", "--json", files / "elo.json")
    assert code == 0, err
    found = json.loads((files / "elo.json").read_text())
    assert found["judgements"] == 3 and found["ratings"][0]["name"] == "a"
    code, _, err = run("evaluate", "elo", files / "nobody.jsonl")
    assert code == 2 and "cannot be read as a file of judgements" in err


def test_a_conversation_is_a_question_with_all_its_turns(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": "Who?"}) + "\n")
    questions, rows = questions_in(str(tmp_path / "q.jsonl"))
    assert [(question.name, question.text) for question in questions] == [
        ("1", "user: Hi\n\nassistant: Hello\n\nuser: Why?"), ("2", "Who?"),
    ]  # fmt: skip
    assert len(rows) == 2
    with pytest.raises(InputError, match="takes two contestants"):
        hold(Contest(questions="q", contestants=["a=b"], endpoint="http://x"), tmp_path / "out")
