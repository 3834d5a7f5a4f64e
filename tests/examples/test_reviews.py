"""The ratings file and what is drawn from it."""

from pathlib import Path

import pytest

from halfbyte import InputError
from halfbyte.data import Chat, read_examples
from halfbyte.example.reviews import QUESTION, Snippet, read_snippets, split, write_chats


def test_clear_ratings_become_answers_and_the_others_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "ratings.txt"
    file.write_bytes(
        "1\t2.26666666667\tA caf\N{LATIN SMALL LETTER E WITH ACUTE}, ''fine''\r\n"
        "2\t-0.6\tTepid\r\n"
        "3\t0.5\tOn the edge\r\n"
        "4\t-0.5\tOn the other edge\r\n"
        "5\t0\tNeither\r\n"
        "6\t0.51\tIt has\ta tab and a line\N{LINE SEPARATOR}separator\r\n"
        "7\t-4\tNo line break at the end".encode()
    )
    assert read_snippets(file) == [
        Snippet("A caf\N{LATIN SMALL LETTER E WITH ACUTE}, ''fine''", "positive"),
        Snippet("Tepid", "negative"),
        Snippet("It has\ta tab and a line\N{LINE SEPARATOR}separator", "positive"),
        Snippet("No line break at the end", "negative"),
    ]


def test_a_text_that_occurs_twice_is_kept_once(tmp_path: Path) -> None:
    file = tmp_path / "ratings.txt"
    file.write_text("1\t3\tGood\n2\t-3\tBad\n3\t2\tGood\n4\t-2\tGood\n")
    assert read_snippets(file) == [Snippet("Good", "positive"), Snippet("Bad", "negative")]


@pytest.mark.parametrize("line", ["", "2", "2\t1.5", "2\t1.5\t", "2\tgood\ttext", "2 1.5 text"])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "ratings.txt"
    file.write_text(f"1\t3\tGood\n{line}\n3\t2\tFine\n")
    with pytest.raises(InputError, match=r"ratings\.txt, line 2: expected a number, a rating and a text\."):
        read_snippets(file)


SNIPPETS = [Snippet(str(number), ("positive", "negative")[number % 2]) for number in range(100)]


def test_the_split_is_the_same_for_a_seed_and_has_no_snippet_twice() -> None:
    train, held_out = split(SNIPPETS, train=60, held_out=30, seed=3)
    assert len(train) == 60
    assert len(held_out) == 30
    assert len({*train, *held_out}) == 90
    assert split(SNIPPETS, train=60, held_out=30, seed=3) == (train, held_out)
    assert split(SNIPPETS, train=60, held_out=30, seed=4) != (train, held_out)


def test_what_is_measured_on_does_not_depend_on_how_much_is_trained_on() -> None:
    assert split(SNIPPETS, train=20, held_out=30, seed=3)[1] == split(SNIPPETS, train=60, held_out=30, seed=3)[1]


def test_the_written_chats_are_training_data(tmp_path: Path) -> None:
    file = write_chats([Snippet('\N{GREEK SMALL LETTER ALPHA} "b"\tc', "negative")], tmp_path / "data" / "train.jsonl")
    [example] = read_examples(file)
    assert isinstance(example, Chat)
    assert example.messages == [
        {"role": "user", "content": QUESTION + '\N{GREEK SMALL LETTER ALPHA} "b"\tc'},
        {"role": "assistant", "content": "negative"},
    ]
