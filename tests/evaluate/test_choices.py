"""The figures of ``score_choices`` against a plain loop over single rows."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.choices import IGNORED
from halfbyte.evaluate import score_choices


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


def random_rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Prompts of 1 to 30 tokens; answers of 1 to 4 that begin with 5, 6 or 7; some rows go on after the answer."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(8, 200, (length,), generator=draw).tolist()

    rows = []
    for index in range(count):
        prompt, answer, rest = tokens(1, 31), [5 + index % 3, *tokens(0, 4)], tokens(0, 3)
        labels = [IGNORED] * len(prompt) + answer + [IGNORED] * len(rest)
        rows.append({"input_ids": prompt + answer + rest, "labels": labels})
    return rows


def one_by_one(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> tuple[float, float]:
    """Accuracy and loss by the formulas, a row and a token at a time."""
    right, surprises = 0, []
    for row in rows:
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        answer = [position for position, label in enumerate(row["labels"]) if label != IGNORED]
        for position in answer:
            surprises.append(-log_probabilities[position - 1, row["labels"][position]].item())
        before = log_probabilities[answer[0] - 1]
        right += max((5, 6, 7), key=lambda choice: before[choice].item()) == row["labels"][answer[0]]
    return right / len(rows), math.fsum(surprises) / len(surprises)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_the_figures_are_those_of_single_rows_whatever_the_batches(model: torch.nn.Module, batch_size: int) -> None:
    rows = random_rows(23, seed=1)
    accuracy, loss = one_by_one(model, rows)
    assert 0 < accuracy < 1
    score = score_choices(model, rows, batch_size=batch_size)
    assert score.accuracy == accuracy
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.rows == 23
    assert score.tokens == sum(label != IGNORED for row in rows for label in row["labels"])


def test_only_the_first_answer_of_a_row_is_chosen_but_all_count_for_the_loss(model: torch.nn.Module) -> None:
    rows = [
        {"input_ids": [9, 5, 10, 11, 6, 12], "labels": [IGNORED, 5, IGNORED, IGNORED, 6, 12]},
        {"input_ids": [13, 14, 6], "labels": [IGNORED, IGNORED, 6]},
        {"input_ids": [13, 14, 15, 7], "labels": [IGNORED, IGNORED, IGNORED, 7]},
    ]
    accuracy, loss = one_by_one(model, rows)
    score = score_choices(model, rows)
    assert score.accuracy == accuracy
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.tokens == 5


def test_progress_counts_up_to_all_rows(model: torch.nn.Module) -> None:
    seen: list[tuple[int, int]] = []
    score_choices(model, random_rows(10, seed=2), batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
