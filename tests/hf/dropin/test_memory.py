"""Gradient checkpointing of a plain Trainer over rows whose ``input_ids`` its collator makes."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from halfbyte.hf.dropin import memory

ROWS = [{"text": "a" * n, "answer": "b"} for n in (3, 40, 7, 11)]


def collate(rows: list[dict[str, str]]) -> dict[str, Any]:
    longest = max(len(row["text"]) for row in rows)
    ids = torch.tensor([list(row["text"].ljust(longest).encode()) for row in rows])
    return {"input_ids": ids, "labels": ids}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=1, gradient_checkpointing=True, remove_unused_columns=False, report_to="none",
        disable_tqdm=True, use_cpu=True, **more,
    )  # fmt: skip


def test_the_length_is_that_of_the_largest_row_as_the_collator_makes_it(
    model: Any, lora: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    plan = memory.activations.plan
    monkeypatch.setattr(memory.activations, "plan", lambda *a, **k: lengths.append(k["length"]) or plan(*a, **k))
    with caplog.at_level(logging.WARNING, "halfbyte"):
        Trainer(get_peft_model(model, lora()), arguments(tmp_path), collate, train_dataset=ROWS).train()
    assert lengths == [40] and "gradient checkpointing is as memory needs it" in caplog.text


def test_rows_that_were_not_looked_at_may_be_longer(installed: None, tmp_path: Path) -> None:
    many = ROWS * 1500
    assert memory._collated(many, arguments(tmp_path), collate) == 50


@pytest.mark.parametrize("case", ["stream", "pixels", "failing"])
def test_where_nothing_tells_the_length_all_is_recomputed(installed: None, case: str, tmp_path: Path) -> None:
    def failing(rows: Any) -> Any:
        raise KeyError("x")

    def pixels(rows: Any) -> Any:
        return {"input_ids": torch.zeros(1, 4), "pixel_values": torch.zeros(1)}

    rows: Any = iter(ROWS) if case == "stream" else ROWS
    made = {"stream": collate, "pixels": pixels, "failing": failing}[case]
    assert memory._collated(rows, arguments(tmp_path), made) is None
