"""The survey against counts that were planted, and against the same questions asked in plain Python."""

import copy
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import regex
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from halfbyte.choices import IGNORED
from halfbyte.data import duplicates, measure, samples, scripts, survey
from halfbyte.data.figures import figures, hints, percent
from halfbyte.data.samples import CLOSE, OPEN, Piece
from halfbyte.data.table import Counts, Tokenized
from halfbyte.errors import InputError

from .templates import template_of, tokenizer_for

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "where": datasets.Value("string"),
    }
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def row(*stretches: tuple[list[int], bool]) -> tuple[list[int], list[int]]:
    """Return ids and labels of stretches, each trained or not."""
    ids = [token for stretch, _ in stretches for token in stretch]
    labels = [token if trained else IGNORED for stretch, trained in stretches for token in stretch]
    return ids, labels


def asked(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    return row((prompt, False), (answer, True))


def table(rows: list[tuple[list[int], list[int]]], **counts: Any) -> Tokenized:
    ids, labels = [ids for ids, _ in rows], [labels for _, labels in rows]
    columns = {"input_ids": ids, "labels": labels, "where": [f"row {n + 1}" for n in range(len(rows))]}
    lengths = [len(row) for row in ids]
    return Tokenized(
        datasets.Dataset.from_dict(columns, features=FEATURES),
        Counts(
            rows=len(rows),
            tokens=sum(lengths),
            trained_tokens=sum(label != IGNORED for row in labels for label in row),
            longest=max(lengths, default=0),
            **counts,
        ),
    )


def written(tokenizer: Any, *pairs: tuple[str, str]) -> Tokenized:
    """Return a table of prompts and answers as scripts."""
    return table([asked(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in pairs])


def drawn(count: int, *, alphabet: int = 3, longest: int = 7) -> list[tuple[list[int], list[int]]]:
    """Return rows of few tokens and few lengths, many of them equal, some empty or without a trained token."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        stretches = [
            ([draw.randrange(alphabet) for _ in range(draw.randrange(longest))], draw.random() < 0.5)
            for _ in range(draw.randrange(4))
        ]
        rows.append(row(*stretches))
    return rows


def first_trained(labels: list[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def stretches(labels: list[int]) -> list[list[int]]:
    runs = itertools.groupby(labels, lambda label: label != IGNORED)
    return [list(run) for trained, run in runs if trained]


def same(keys: list[Any], hashes: Any) -> bool:
    """Tell whether equal keys have equal hashes, and others others."""
    pairs = set(zip(keys, hashes.tolist(), strict=True))
    return len(pairs) == len(set(keys)) == len(set(hashes.tolist()))


@pytest.mark.parametrize("part_tokens", [1, 60, 1 << 19])
def test_a_pass_finds_what_plain_python_finds(part_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PART_TOKENS", part_tokens)
    rows = drawn(1500)
    seen: list[tuple[int, int]] = []
    made = table(rows)
    found = measure.measure(made.rows, made.counts.longest, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1500, 1500)
    assert found.lengths.tolist() == [len(ids) for ids, _ in rows]
    assert found.trained.tolist() == [len(labels) - labels.count(IGNORED) for _, labels in rows]
    assert found.prompts.tolist() == [first_trained(labels) for _, labels in rows]
    assert same([tuple(ids) for ids, _ in rows], found.hashes)
    assert same([tuple(ids[: first_trained(labels)]) for ids, labels in rows], found.prompt_hashes)
    openings = [
        tuple([*(ids[:1] if labels[:1] == [IGNORED] != labels[1:2] else []), *answer][:5]) if answer else ()
        for ids, labels in rows
        for answer in (stretches(labels) or [[]])[:1]
    ]
    assert same(openings, found.opening_hashes)
    answers = [answer for _, labels in rows for answer in stretches(labels)]
    assert found.answers == len(answers)
    assert found.ends == Counter(answer[-1] for answer in answers)


def test_answers_end_where_a_row_does_though_the_next_begins_with_one() -> None:
    made = table([row(([1], False), ([2, 3], True)), row(([4, 5], True))])
    found = measure.measure(made.rows, made.counts.longest)
    assert (found.answers, found.ends) == (2, Counter({3: 1, 5: 1}))


def test_a_selection_of_a_table_is_what_it_selects() -> None:
    made = table(drawn(300))
    chosen = [7, 3, 3, 250, 11]
    whole = measure.measure(made.rows, made.counts.longest)
    part = measure.measure(made.rows.select(chosen), made.counts.longest)
    assert part.hashes.tolist() == whole.hashes[chosen].tolist()


def test_planted_copies_are_counted_and_the_largest_group_comes_first(tokenizer: Any) -> None:
    own = [asked([10, 11, n % 200, n // 200], [n % 50]) for n in range(400)]
    rows = [*own, own[5], own[9], own[5], own[5]]
    found = survey.survey(table(rows), tokenizer)
    assert found.duplicates.rows == 4
    groups = [(group.row, group.times, group.where) for group in found.duplicates.groups]
    assert groups == [(6, 4, "row 6"), (10, 2, "row 10")]


def test_rows_of_other_labels_but_equal_ids_are_equal(tokenizer: Any) -> None:
    rows = [row(([1, 2], False), ([3], True)), row(([1], False), ([2, 3], True))]
    assert survey.survey(table(rows), tokenizer).duplicates.rows == 1


def test_one_prompt_with_other_answers_is_counted_copies_and_bare_beginnings_are_not(tokenizer: Any) -> None:
    rows = [
        asked([1, 2], [3]),
        asked([1, 2], [4]),
        asked([1, 2], [4]),
        asked([5, 6], [7]),
        asked([5, 6], [7]),  # a copy contradicts nothing
        asked([9], [1]),
        asked([9], [2]),  # texts that begin with the same token have no prompt
        asked([8, 8], [1]),
        asked([8, 8], [2]),
    ]
    found = survey.survey(table(rows), tokenizer).contradictions
    assert (found.prompts, found.rows) == (2, 5)
    assert [(pair.row, pair.other) for pair in found.pairs] == [(1, 2), (8, 9)]


def triples(ids: list[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[place : place + 3]) for place in range(len(ids) - 2)}


def jaccard(one: list[int], other: list[int]) -> float:
    return len(triples(one) & triples(other)) / len(triples(one) | triples(other))


def near_rows(count: int, planted: int, system: list[int]) -> list[list[int]]:
    """Return rows of some hundred tokens behind one beginning, the first ones again with a token changed at the end."""
    draw = random.Random(0)
    own = [[draw.randrange(200) for _ in range(draw.randrange(60, 120))] for _ in range(count)]
    changed = [[*ids[:40], (ids[40] + 1) % 200, *ids[41:]] for ids in own[:planted]]
    return [system + ids for ids in own + changed]


@pytest.mark.parametrize("sketch", [512, 50])
def test_planted_changes_of_a_token_are_found_and_measured(
    tokenizer: Any, sketch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "SKETCH", sketch)
    rows = near_rows(300, 20, [])
    made = table([asked(ids[:5], ids[5:]) for ids in rows])
    found = survey.survey(made, tokenizer).near
    assert (found.sampled, found.rows) == (320, 20)
    assert {(pair.row, pair.other) for pair in found.pairs} == {(n, n - 300) for n in range(301, 321)}
    for pair in found.pairs:
        true = jaccard(rows[pair.row - 1], rows[pair.other - 1])
        assert pair.similarity is not None and true > 0.9
        # a sketch that holds all counts; one of 50 draws, with a standard error of sqrt(0.95 * 0.05 / 50)
        assert abs(pair.similarity - true) < (1e-9 if sketch == 512 else 4 * 0.031)


def test_sketches_of_sets_of_other_sizes_tell_their_overlap_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 40_000, 1000).tolist() for _ in range(200)]
    pairs = [(ids, ids[:700]) for ids in rows]
    monkeypatch.setattr(duplicates, "SKETCH", 50)
    made = table([row((ids, True)) for pair in pairs for ids in pair])
    sketches = list(duplicates._sketches(made.rows, np.arange(400), 1000))
    found = [one.similarity(other) for one, other in zip(sketches[::2], sketches[1::2], strict=True)]
    true = sum(jaccard(*pair) for pair in pairs) / 200
    error = (0.7 * 0.3 / 35 / 200) ** 0.5  # of a mean of 200 shares among 35 triples or more
    assert abs(sum(found) / 200 - true) < 4 * error


def test_of_many_like_it_a_row_is_compared_with_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "CANDIDATES", 1)
    draw = random.Random(3)
    rows, twins = [], set()
    for _ in range(20):
        base = [draw.randrange(200) for _ in range(100)]
        rows += [[*base, *(draw.randrange(200) for _ in range(20))] for _ in range(8)]
        twins.add((len(rows) + 1, len(rows) - 3))
        rows.append([*rows[-4][:-1], 201])
    assert jaccard(rows[0], rows[1]) < 0.8 < 0.9 < jaccard(rows[8], rows[4])
    pairs = duplicates.nearly_equal((made := table([row((ids, True)) for ids in rows])).rows,
                                    measure.measure(made.rows, 120), 120, 0)[0].pairs  # fmt: skip
    assert {(pair.row, pair.other) for pair in pairs} == twins


def test_a_long_system_prompt_makes_no_rows_alike(tokenizer: Any) -> None:
    draw = random.Random(1)
    system = [draw.randrange(200) for _ in range(400)]
    short = [system + [draw.randrange(200) for _ in range(20)] for _ in range(60)]
    assert jaccard(short[0], short[1]) > 0.8
    found = survey.survey(table([asked(ids[:-5], ids[-5:]) for ids in short]), tokenizer).near
    assert found.rows == 0
    found = survey.survey(table([asked(ids[:-5], ids[-5:]) for ids in near_rows(60, 5, system)]), tokenizer).near
    assert found.rows == 5


def test_rows_under_the_threshold_are_not_near(tokenizer: Any) -> None:
    draw = random.Random(2)
    own = [[draw.randrange(200) for _ in range(100)] for _ in range(50)]
    half = [[*ids[:70], *(draw.randrange(200) for _ in range(30))] for ids in own]
    assert all(0.4 < jaccard(one, other) < 0.75 for one, other in zip(own, half, strict=True))
    found = survey.survey(table([asked(ids[:5], ids[5:]) for ids in own + half]), tokenizer).near
    assert found.rows == 0


def test_beyond_a_number_of_rows_a_sample_is_looked_at_and_said(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "NEAR_SAMPLE", 100)
    monkeypatch.setattr(scripts, "SAMPLE", 50)
    rows = near_rows(300, 20, [])
    made = table([asked(ids[:5], ids[5:]) for ids in rows])
    found = survey.survey(made, tokenizer)
    assert (found.near.sampled, found.texts.sampled) == (100, 50)
    shown = dict(figures(found))
    assert shown["nearly equal rows"].endswith("of 100 different rows, a sample")
    assert shown["bytes that were no text"].endswith(" of 50 rows, a sample")
    assert found == survey.survey(made, tokenizer)
    assert found.near.rows < 20
    everything = [survey.survey(made, tokenizer, seed=seed).near for seed in range(1, 6)]
    assert len({near.rows for near in everything}) > 1


def test_planted_overlap_with_evaluation_rows(tokenizer: Any) -> None:
    rows = near_rows(200, 0, [])
    made = table([asked(ids[:30], ids[30:]) for ids in rows])
    changed = [*rows[7][:50], (rows[7][50] + 1) % 200, *rows[7][51:]]
    fresh = near_rows(230, 0, [])[200:]
    evaluation = [
        asked(rows[3][:30], rows[3][30:]),
        asked(rows[4][:30], rows[4][30:]),
        asked(rows[4][:30], rows[4][30:]),
        asked(changed[:30], changed[30:]),
        asked(rows[5][:30], [1, 2, 3]),
        *[asked(ids[:30], ids[30:]) for ids in fresh],
    ]
    found = survey.survey(made, tokenizer, against=table(evaluation)).overlap
    assert found is not None
    assert (found.rows, found.equal, found.same_prompt) == (35, 3, 5)
    assert (found.near, found.of, found.sampled) == (1, 200, 32)
    assert [(pair.row, pair.other) for pair in found.pairs] == [(1, 4), (2, 5), (3, 5), (4, 8)]
    assert survey.survey(made, tokenizer).overlap is None


@pytest.mark.parametrize("limit", [1, 2, 3, 12, 511, 512, 513, 5000])
def test_each_length_is_in_one_bin_and_the_greatest_alone(limit: int) -> None:
    lengths = np.array([*range(1, limit + 1), limit], np.int32)
    trained = np.ones_like(lengths)
    bins = survey.histogram(lengths, trained, limit)
    spans = [range(one.least, one.most + 1) for one in bins]
    assert [length for span in spans for length in span] == list(range(1, limit + 1))
    assert spans[-1] == range(limit, limit + 1)
    assert [one.rows for one in bins] == [len(span) for span in spans[:-1]] + [2]
    assert bins[0].trained == len(lengths)


def test_lengths_shares_and_tokens_are_counted(tokenizer: Any) -> None:
    made = table(
        [asked([1] * 200, [2]), asked([3], [4] * 199), *(asked([5] * 10, [6] * 10) for _ in range(18))], truncated=2
    )
    found = survey.survey(made, tokenizer, max_length=256)
    assert (found.rows, found.tokens, found.trained_tokens) == (20, 201 + 200 + 360, 1 + 199 + 180)
    assert found.trained_share == 380 / 761
    assert (found.little_trained, found.nearly_all_trained, found.truncated) == (1, 1, 2)
    assert found.lengths.quantiles == {"0": 20, "5": 20, "25": 20, "50": 20, "75": 20, "95": 200, "100": 201}
    assert found.trained_lengths.quantiles["0"] == 1 and found.trained_lengths.quantiles["50"] == 10
    assert found.lengths.mean == 761 / 20
    assert {one.least: one.rows for one in found.histogram if one.rows} == {16: 18, 192: 2}
    assert (found.histogram[-1].least, found.histogram[-1].most) == (256, 256)


SCRIPTS = {
    "Latin": r"\p{Script=Latin}", "Han": r"\p{Script=Han}", "Arabic": r"\p{Script=Arabic}",
    "Cyrillic": r"\p{Script=Cyrillic}", "Hebrew": r"\p{Script=Hebrew}", "Devanagari": r"\p{Script=Devanagari}",
    "Hangul": r"\p{Script=Hangul}", "Hiragana": r"\p{Script=Hiragana}", "Katakana": r"\p{Script=Katakana}",
}  # fmt: skip


def test_scripts_are_those_of_another_library() -> None:
    draw = random.Random(0)
    ranges = [(0x20, 0x24F), (0x400, 0x52F), (0x590, 0x6FF), (0x900, 0x97F), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
              (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF)]  # fmt: skip
    text = "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(5000))
    found = scripts.scripts(text)
    assert found.total() > 3000
    for name, pattern in SCRIPTS.items():
        assert found[name] == len(regex.findall(pattern, text)), name


def test_planted_scripts_are_told_apart_by_what_is_trained(tokenizer: Any) -> None:
    pairs = [("что?", "ok 12 👍"), ("что?", "漢字"), ("?", "سلام عليكم"), ("12", "42")]
    found = survey.survey(written(tokenizer, *pairs), tokenizer).texts
    assert found.main_scripts == {"Latin": 1 / 3, "Han": 1 / 3, "Arabic": 1 / 3}
    assert found.trained_scripts == {"Arabic": 9 / 13, "Latin": 2 / 13, "Han": 2 / 13}
    assert found.prompt_scripts == {"Cyrillic": 1.0}


GOOD = [
    "Straße, Größe, Öl", "Él no está aquí, ¿verdad?", "NÃO É SÓ ISSO, IRMÃO", "L’Âge d’or, à côté", "Đây là tiếng Việt",
    "Привет, мир", "日本語のテキスト", "“quotes” – and — dashes…", "Â", "£20 · 30 °C", "Île-de-France, ÂGE",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_good_text_does_not_look_wrong(text: str) -> None:
    assert not scripts.MOJIBAKE.search(text)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", ["Straße", "Él está", "“quotes”", "it’s", "20 £", "Привет"])
def test_text_that_was_read_in_a_wrong_encoding_does(text: str, encoding: str) -> None:
    wrong = text.encode().decode(encoding, errors="ignore")  # five bytes are nothing in Windows-1252
    assert scripts.MOJIBAKE.search(wrong)


def test_unreadable_bytes_are_counted_but_not_a_character_that_was_cut(tokenizer: Any) -> None:
    ids = tokenizer("aé")["input_ids"]
    cut = asked([1, 2], ids[:-1])
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    made = table(
        [cut, asked([1, 3], tokenizer("a \ufffd b")["input_ids"]), asked([1, 4], tokenizer("cafÃ©")["input_ids"])]
    )
    found = survey.survey(made, tokenizer)
    assert (found.texts.replaced, found.texts.mojibake, found.texts.sampled) == (1, 1, 3)
    told = "\n".join(hints(found))
    assert "could not be read: 1 of 3;" in told and "in a wrong encoding: 1 of 3." in told


def test_openings_that_many_answers_share_are_told(tokenizer: Any) -> None:
    pairs = [(f"q{n}", f"As an AI, {n}") for n in range(4)] + [(f"r{n}", f"{n} is it") for n in range(6)]
    found = survey.survey(written(tokenizer, *pairs), tokenizer).openings
    assert [(one.text, one.rows, one.share) for one in found] == [("As an", 4, 0.4)]
    few = survey.survey(written(tokenizer, *pairs[2:4], *pairs[4:], ("s", "x"), ("t", "y")), tokenizer)
    assert few.openings == []
    short = survey.survey(written(tokenizer, *((f"q{n}", "no") for n in range(3)), ("q4", "none")), tokenizer).openings
    assert [(one.text, one.rows) for one in short] == [("no", 3)]


def test_answers_that_do_not_stop_are_counted_and_said(tokenizer: Any) -> None:
    stop = tokenizer.eos_token_id
    stopping = row(([1, 2], False), ([3, stop], True), ([4], False), ([5, stop], True))
    rows = [stopping, asked([1, 3], [7, stop]), asked([1, 4], [8])]
    found = survey.survey(table(rows), tokenizer)
    assert (found.answers.count, found.answers.stopped, found.answers.stop_token) == (4, 3, "<|im_end|>")
    assert found.answers.ends == {"<|im_end|>": 3, tokenizer.decode([8]): 1}
    assert any(line.startswith("Only 75% of the answers end with “<|im_end|>”") for line in hints(found))
    cut = survey.survey(table(rows, truncated=1), tokenizer)
    assert not any(line.startswith("Only") for line in hints(cut))


def test_a_call_that_ends_with_a_stop_of_its_own_has_stopped() -> None:
    tokenizer = tokenizer_for(template_of("gptoss"))
    call, answer, other = (tokenizer.convert_tokens_to_ids(token) for token in ("<|call|>", "<|return|>", "<|end|>"))
    found = survey.survey(table([asked([1], [2, call]), asked([1], [3, answer])]), tokenizer)
    assert found.answers.stopped == 2 and not any(line.startswith("Only") for line in hints(found))
    found = survey.survey(table([asked([1], [2, call]), asked([1], [3, other])]), tokenizer)
    assert any(
        line.startswith("Only 50% of the answers end with “<|endoftext|>” or “<|call|>” or “<|return|>”, at which ")
        for line in hints(found)
    )


def test_a_text_begins_at_its_beginning_and_is_no_answer(tokenizer: Any) -> None:
    texts = [tokenizer(text)["input_ids"] for text in ("Socks are red", "Socks are blue", "Rocks are old", "Docks")]
    found = survey.survey(table([asked(ids[:1], ids[1:]) for ids in texts]), tokenizer)
    assert [(one.text, one.rows, one.whole) for one in found.openings] == [("Socks", 2, True)]
    assert "50% of the texts begin with “Socks”." in hints(found)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    begun = survey.survey(table([asked([tokenizer.bos_token_id], ids) for ids in texts]), tokenizer)
    assert [one.text for one in begun.openings] == ["Sock"]


def test_where_nothing_would_be_learnt_it_says_so(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="none of the 3 tokens of 1 row is trained"):
        survey.survey(table([row(([1, 2, 3], False))]), tokenizer)
    with pytest.raises(InputError, match="no rows"):
        survey.survey(table([]), tokenizer)


def test_a_survey_is_json(tokenizer: Any) -> None:
    made = table(drawn(100)[1:])
    found = dataclasses.asdict(survey.survey(made, tokenizer, against=made))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_the_preparation_said_is_told(tokenizer: Any) -> None:
    made = table(drawn(50))
    made.counts.notes["a number became text"], made.counts.unused["id"] = 4, 3
    found = dataclasses.replace(
        survey.survey(made, tokenizer),
        shapes={"alpaca": 5},
        bad={"answer is empty": 2},
        first_bad={"answer is empty": "a.csv, row 3: output is empty."},
        said=["a.csv is read as UTF-16"],
    )
    assert hints(found)[:4] == [
        "a.csv is read as UTF-16",
        "In 4 of the examples: a number became text.",
        "Left out, 2 rows: answer is empty. The first: a.csv, row 3: output is empty.",
        "Columns not used: id.",
    ]
    assert dict(figures(found))["left out"] == "2 rows" and dict(figures(found))["shapes"] == "alpaca 5"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 5, "0%"),
        (5, 5, "100%"),
        (1, 3, "33.3%"),
        (99_999, 100_000, "99.999%"),
        (1, 10**9, "under 0.001%"),
        (0, 0, "0%"),
    ],
)
def test_a_share_never_looks_like_all_or_nothing_that_is_not(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


def metaspace() -> Any:
    """A tokenizer that, like Llama 2's, takes the space of a text's first word away when it decodes."""
    words = ["▁", "▁a", "▁is", "b", "a", "i", "s", "é"]
    vocab = {word: place for place, word in enumerate(words)}
    merges = [("▁", "a"), ("i", "s"), ("▁", "is")]
    made = Tokenizer(models.BPE(vocab=vocab | {"is": len(vocab)}, merges=merges))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def test_the_pieces_of_a_row_are_its_text_with_the_spaces_of_its_words() -> None:
    tokenizer = metaspace()
    ids = [*tokenizer("a is b")["input_ids"], tokenizer.eos_token_id]
    made = table([row((ids[:1], False), (ids[1:], True))])
    shown = samples.sample(made.rows, 1, tokenizer)
    assert [(piece.text, piece.trained, piece.special) for piece in shown.pieces] == [
        ("a", False, False), (" is", True, False), (" ", True, False), ("b", True, False), ("</s>", True, True),
    ]  # fmt: skip
    assert samples.plain(samples.joined(shown.pieces)) == f"a{OPEN} is b</s>{CLOSE}"


@pytest.mark.parametrize("text", ["emoji 👩‍👩‍👧‍👦 🏳️‍🌈", "שלום עולם", "日本語", "é" * 40, "x" * 300, "", "a\n\tb"])
def test_the_pieces_are_the_text_whatever_it_is(tokenizer: Any, text: str) -> None:
    ids = tokenizer(f"{text}.")["input_ids"]
    made = table([row(([tokenizer.eos_token_id], False), (ids, True))])
    shown = samples.sample(made.rows, 1, tokenizer)
    assert "".join(piece.text for piece in shown.pieces) == f"<|im_end|>{text}."
    assert sum(piece.tokens for piece in shown.pieces) == len(ids) + 1
    assert [piece.text for piece in shown.pieces[1:]] == list(f"{text}.")  # a token a byte, so a piece a character
    assert [piece.special for piece in shown.pieces] == [True] + [False] * (len(text) + 1)


def test_bytes_that_are_no_character_make_pieces_too(tokenizer: Any) -> None:
    broken = tokenizer("é")["input_ids"][:1] * 30
    made = table([row(([1], False), (broken, True), ([2], False))])
    shown = samples.sample(made.rows, 1, tokenizer)
    assert sum(piece.tokens for piece in shown.pieces) == 32
    assert sum(piece.tokens for piece in shown.pieces if piece.trained) == 30


def test_of_a_long_row_the_middle_is_left_out(tokenizer: Any) -> None:
    ids = tokenizer("".join(f"{n:04}" for n in range(500)))["input_ids"]
    shown = samples.sample(table([row((ids[:1], False), (ids[1:], True))]).rows, 1, tokenizer, limit=40)
    text = samples.plain(samples.joined(shown.pieces))
    assert text == f"0{OPEN}0000001000200030004{CLOSE} … 1,960 tokens left out … {OPEN}04950496049704980499{CLOSE}"
    assert (shown.tokens, shown.trained) == (2000, 1999)


OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_no_character_that_would_do_something_gets_through() -> None:
    everything = "".join(map(chr, range(0x110000)))
    shown = samples.visible(everything)
    assert not set(shown) & set(OVERRIDES)
    assert not set(shown) & set("\x1b\x9b\x00\x07\x08\r\x7f\u2028\u2029\ufeff\u200b\U000e0041")
    control = {character for character in shown if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")}
    assert control == {"\n"}
    assert samples.visible("\x1b[31m\u202e\U000e0041\n\t") == "\\x1b[31m\\u202e\\U000e0041↵\n⇥"


@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "می‌خواهم", "שלום\u200f", "क्‍ष", "ﬁ ½ \u00a0"])
def test_text_that_only_shows_something_stays_as_it_is(text: str) -> None:
    assert samples.visible(text) == text


def test_token_borders_are_shown_between_tokens() -> None:
    pieces = [Piece("a"), Piece(" b"), Piece("c", trained=True), Piece("\n", trained=True)]
    assert samples.plain(pieces, "|") == f"a| b{OPEN}c|↵\n{CLOSE}"


def test_blocks_are_as_high_as_the_counts() -> None:
    assert samples.blocks(range(1, 9)) == "▁▂▃▄▅▆▇█"
    assert samples.blocks([0, 1, 800]) == " ▁█"
    assert samples.blocks([]) == "" and samples.blocks([0, 0]) == "  "


def test_shown_rows_are_the_first_the_middle_the_longest_then_drawn_ones() -> None:
    lengths = np.array([5, 9, 1, 7, 3, 8])
    assert samples.choose(lengths, 2) == [1, 2]  # the first has the median length already
    assert samples.choose(np.array([1, 9, 5]), 3) == [1, 3, 2]
    assert sorted(samples.choose(lengths, 50)) == [1, 2, 3, 4, 5, 6]
    assert len(samples.choose(lengths, 5)) == 5
    assert samples.choose(lengths, 0) == samples.choose(lengths[:0], 3) == []


def test_the_opening_of_a_run_says_counts_lengths_and_one_row(tokenizer: Any) -> None:
    made = written(tokenizer, ("hi\x1b", "yes"), ("hi", "ye"), ("hello you", "no, never"))
    lines = samples.preview_lines(made, tokenizer)
    assert lines[0] == "3 rows: 28 tokens, 14 of them trained (50%)"
    assert lines[1].startswith("tokens a row: 4 ") and lines[1].endswith(" 18, half have 6 or less")
    assert lines[2] == f"row 1 (row 1), trained is what stands in {OPEN} {CLOSE}:"
    assert lines[3] == f"hi\\x1b{OPEN}yes{CLOSE}"


MILLION = """
import sys, time
from pathlib import Path
import datasets, datasketch, numpy as np, psutil, pyarrow as pa, transformers
from fontTools import unicodedata
from halfbyte.data import samples, survey
from halfbyte.data.table import Counts, open_table
import json, dataclasses, threading

folder, model = Path(sys.argv[1]), sys.argv[2]
kind = pa.list_(pa.int32())
schema = pa.schema([("input_ids", kind), ("labels", kind), ("where", pa.string())])
counts, draw = Counts(longest=64), np.random.default_rng(0)
with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
    for _ in range(200):
        sizes = draw.integers(16, 65, 5000)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        ids = draw.integers(0, 250, offsets[-1]).astype(np.int32)
        labels = ids.copy()
        labels[(offsets[:-1, None] + np.arange(8)).ravel()] = -100
        columns = [pa.ListArray.from_arrays(offsets, ids), pa.ListArray.from_arrays(offsets, labels)]
        stream.write_batch(pa.RecordBatch.from_arrays([*columns, pa.array(["x"] * 5000)], schema=schema))
        counts.rows += 5000
        counts.tokens += len(ids)
        counts.trained_tokens += len(ids) - 8 * 5000
(folder / "about.json").write_text(json.dumps(dataclasses.asdict(counts)))
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
made = open_table(folder)

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024

samples.preview_lines(made, tokenizer)
begin = time.process_time()
samples.preview_lines(made, tokenizer)
preview = time.process_time() - begin
before, peak, ended = anonymous(), 0.0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.02):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
begin = time.process_time()
found = survey.survey(made, tokenizer)
seconds = time.process_time() - begin
ended.set(); thread.join()
print(json.dumps([found.rows, found.trained_tokens == counts.trained_tokens, preview, seconds, peak - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_million_rows_take_neither_minutes_nor_memory(tmp_path: Path, tiny_model_folder: Path) -> None:
    script = [sys.executable, "-c", MILLION, str(tmp_path), str(tiny_model_folder)]
    told = subprocess.run(script, capture_output=True, text=True, check=True)
    rows, right, preview, seconds, megabytes = json.loads(told.stdout)
    assert rows == 1_000_000 and right
    assert preview < 0.2, preview
    assert seconds < 120, seconds
    assert megabytes < 300, megabytes
