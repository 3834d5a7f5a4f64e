"""What the experiments on training share: three tasks, the ways to train, and what is measured.

One loop trains all: the ways differ in the model that it gets, its optimizer and its learning rate, and in nothing
else. The seed decides the order of the rows, the new head, the adapter as it begins and the masks of dropout, so runs
of one seed are a pair.

    full             all weights, plain transformers: fp32 weights, products in bf16 (autocast), torch's AdamW
    LoRA bf16        plain transformers and peft: a bf16 base, fp32 adapters, autocast, torch's AdamW
    QLoRA ...        halfbyte: the base in int8, FP4, or NF4 with double quantization, bf16 compute, paged 8-bit AdamW
"""

import contextlib
import functools
import hashlib
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lab
import small_t5
import texts
import torch
from lab import Book
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

import halfbyte
from halfbyte.choices import IGNORED
from halfbyte.evaluate.references import reference_scores
from halfbyte.example.sources import MODEL, convert, fetch
from halfbyte.files import cache_folder
from halfbyte.hf.models.heads import hold_in_fp32

Kind = Literal["classify", "seq2seq", "chat"]
OPENED = {
    "classify": (AutoModelForSequenceClassification, "SEQ_CLS"),
    "seq2seq": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "chat": (AutoModelForCausalLM, "CAUSAL_LM"),
}
FORMATS: dict[str, dict[str, Any]] = {
    "QLoRA int8": {"quant_type": "int8"},
    "QLoRA FP4": {"quant_type": "fp4", "double_quant": False},
    "QLoRA NF4 + DQ": {},
}
WAYS = ("full", "LoRA bf16", *FORMATS)
ANSWER = 28
"""Tokens of an answer, at most."""


@dataclass(frozen=True)
class Task:
    """A model, and rows to train, to choose rates with, and to test with.

    Attributes:
        name: in results.
        kind: what the model does.
        metric: which of the figures counts; all are percent, but ``loss``.
        model: its folder.
        rows: in a fixed order: those to test with, to choose with, and to train on.
        tested, chosen, trained: their numbers.
        steps, batch: optimizer steps, and rows of each.
        longest: tokens of a row that are read.
    """

    name: str
    kind: Kind
    metric: str
    model: Path
    rows: Sequence[texts.Row]
    tested: int
    chosen: int
    trained: int
    steps: int
    batch: int
    longest: int

    @property
    def test(self) -> Sequence[texts.Row]:
        return self.rows[: self.tested]

    @property
    def choice(self) -> Sequence[texts.Row]:
        return self.rows[self.tested : self.tested + self.chosen]

    @property
    def train(self) -> Sequence[texts.Row]:
        return self.rows[self.tested + self.chosen :][: self.trained]

    @property
    def digest(self) -> str:
        """Of all rows that are used: 12 digits of SHA-256."""
        used = [vars(row) for row in (*self.test, *self.choice, *self.train)]
        return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained, or all weights.

    Attributes:
        way: one of :data:`WAYS`.
        rate: learning rate; it rises for a tenth of the steps and falls to zero.
        rank: of LoRA.
        alpha: LoRA's scale is alpha / rank.
        dropout: before LoRA's matrices.
        targets: layers that get LoRA, as peft takes them.
    """

    way: str
    rate: float
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: str | list[str] = "all-linear"


@functools.cache
def reviews_task() -> Task:
    """Movie reviews, positive or negative: accuracy."""
    return Task("reviews", "classify", "accuracy", texts.minilm(), texts.reviews(), 1000, 500, 1280, 80, 16, 96)


@functools.cache
def synopses_task() -> Task:
    """Synopses of libraries by the small T5: ROUGE-L."""
    rows = [row for row in texts.synopses() if row.kind in texts.LIBRARIES]
    return Task("synopses", "seq2seq", "rouge_l", small_t5.small_t5(), rows, 300, 200, 800, 50, 16, small_t5.READ)


@functools.cache
def instructions_task() -> Task:
    """Instructions to the chat model, whose weights come from a file in 4 bits (Q4_1): ROUGE-L."""
    cache = cache_folder()
    model = convert(fetch(MODEL, cache), cache / "SmolLM2-135M-Instruct")
    return Task("instructions", "chat", "rouge_l", model, texts.instructions(), 100, 50, 192, 24, 8, 128)


def open_model(task: Task, recipe: Recipe, seed: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Return the model, ready to train, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    auto, task_type = OPENED[task.kind]
    more: dict[str, Any] = {"num_labels": len(labels_of(task))} if task.kind == "classify" else {}
    if recipe.way in FORMATS:
        more["quantization_config"] = halfbyte.HalfbyteConfig(**FORMATS[recipe.way])
    else:
        more["dtype"] = torch.float32 if recipe.way == "full" else torch.bfloat16
    model = auto.from_pretrained(task.model, **more)
    torch.manual_seed(seed)
    if task.kind == "classify":
        if recipe.way in FORMATS:
            hold_in_fp32(model)
        model.classifier.float()
        nn.init.normal_(model.classifier.weight, std=0.02)
        nn.init.zeros_(model.classifier.bias)
    if recipe.way != "full":
        lora = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=recipe.targets,
            task_type=task_type,
        )  # fmt: skip
        model = get_peft_model(model, lora)
        if recipe.way in FORMATS:
            model = halfbyte.prepare(model)
    return model, tokenizer


def labels_of(task: Task) -> list[str]:
    """Return the classes of a task, in order."""
    return sorted({row.target for row in task.rows})


def encoded(task: Task, rows: Sequence[texts.Row], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return for each row ``input_ids`` and ``labels``; in a conversation the question has no labels."""
    if task.kind == "chat":
        return [conversation(task, row, tokenizer) for row in rows]
    sources = tokenizer([row.source for row in rows], truncation=True, max_length=task.longest)["input_ids"]
    if task.kind == "classify":
        names = labels_of(task)
        return [{"input_ids": ids, "labels": names.index(row.target)} for ids, row in zip(sources, rows, strict=True)]
    targets = tokenizer([row.target for row in rows], truncation=True, max_length=ANSWER)["input_ids"]
    return [{"input_ids": ids, "labels": answer} for ids, answer in zip(sources, targets, strict=True)]


def asked(row: texts.Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a question as tokens, up to where the answer begins."""
    chat = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": row.source}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])


def conversation(task: Task, row: texts.Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a question and its answer as tokens; a row without a question is text that goes on, all of it learnt."""
    answer = tokenizer(row.target, add_special_tokens=False)["input_ids"]
    if not row.source:
        return {"input_ids": answer[: task.longest], "labels": answer[: task.longest]}
    question = asked(row, tokenizer)
    answer = [*answer, tokenizer.eos_token_id]
    labels = [IGNORED] * len(question) + answer
    return {"input_ids": (question + answer)[: task.longest], "labels": labels[: task.longest]}


def collated(rows: Sequence[dict[str, Any]], pad: int, left: bool = False) -> dict[str, Tensor]:
    """Pad rows to the longest: on the right, or on the left to write on from."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], filler: int, width: int) -> Tensor:
        gaps = [[filler] * (width - len(value)) for value in values]
        return torch.tensor([gap + value if left else value + gap for value, gap in zip(values, gaps, strict=True)])

    ids = [row["input_ids"] for row in rows]
    batch = {"input_ids": padded(ids, pad, width), "attention_mask": padded([[1] * len(one) for one in ids], 0, width)}
    labels = [row["labels"] for row in rows if "labels" in row]
    if labels:
        single = isinstance(labels[0], int)
        batch["labels"] = torch.tensor(labels) if single else padded(labels, IGNORED, max(map(len, labels)))
    return batch


def batches(rows: Sequence[Any], steps: int, size: int, seed: int) -> Iterator[list[Any]]:
    """Yield the rows of each step: every row once before any comes again, in an order of the seed's."""
    dice = random.Random(seed)
    order: list[Any] = []
    for _ in range(steps):
        while len(order) < size:
            order += dice.sample(rows, len(rows))
        yield order[:size]
        order = order[size:]


@dataclass(frozen=True)
class Trained:
    """A model after training, or before it, and how it is measured."""

    task: Task
    recipe: Recipe
    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def parameters(self) -> int:
        """How many are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def measure(self, rows: Sequence[texts.Row]) -> dict[str, float]:
        """Return the loss, and in percent a classifier's accuracy, or ROUGE-L and exact matches of greedy answers."""
        if self.task.kind == "classify":
            return self.loss(rows)
        answers = self.answers(rows)
        scores = reference_scores(answers, [row.target for row in rows])
        return self.loss(rows) | {name: 100 * value for name, value in scores.items()}

    @torch.no_grad()
    def loss(self, rows: Sequence[texts.Row]) -> dict[str, float]:
        """Return the mean loss over labels, in nats, and a classifier's accuracy in percent."""
        nats, labels, right = 0.0, 0, 0
        for some in self._by_length(encoded(self.task, rows, self.tokenizer), 25):
            batch = collated([row for _, row in some], self._pad)
            with computing(self.recipe.way):
                loss, logits = loss_of(self.task, self.model, batch)
            shifted = batch["labels"][:, 1:] if self.task.kind == "chat" else batch["labels"]
            count = int((shifted != IGNORED).sum())
            nats, labels = nats + float(loss) * count, labels + count
            if self.task.kind == "classify":
                right += int((logits.argmax(-1) == batch["labels"]).sum())
        found = {"loss": nats / labels}
        return found | ({"accuracy": 100 * right / len(rows)} if self.task.kind == "classify" else {})

    @torch.no_grad()
    def answers(self, rows: Sequence[texts.Row]) -> list[str]:
        """Return the greedy answers, of :data:`ANSWER` tokens at most, by transformers' ``generate``."""
        if self.task.kind == "chat":
            questions = [{"input_ids": asked(row, self.tokenizer)} for row in rows]
        else:
            questions = [{"input_ids": row["input_ids"]} for row in encoded(self.task, rows, self.tokenizer)]
        found = [""] * len(rows)
        for some in self._by_length(questions, 100):
            batch = collated([row for _, row in some], self._pad, left=self.task.kind == "chat")
            with computing(self.recipe.way):
                ids = self.model.generate(**batch, max_new_tokens=ANSWER, do_sample=False, pad_token_id=self._pad)
            begin = batch["input_ids"].shape[1] if self.task.kind == "chat" else 1
            for (place, _), text in zip(some, self.tokenizer.batch_decode(ids[:, begin:], True), strict=True):
                found[place] = text.strip()
        return found

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def _by_length(self, rows: list[dict[str, Any]], size: int) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        """Yield rows of like length with their places."""
        order = sorted(enumerate(rows), key=lambda pair: len(pair[1]["input_ids"]))
        for start in range(0, len(order), size):
            yield order[start : start + size]


def untrained(task: Task, recipe: Recipe) -> Trained:
    """Return the model as it is before training."""
    model, tokenizer = open_model(task, recipe, seed=0)
    return Trained(task, recipe, model.eval(), tokenizer)


def fit(task: Task, recipe: Recipe, seed: int, rows: Sequence[texts.Row] | None = None) -> Trained:
    """Train a model on the rows of the task, or on others; the rate rises for a tenth of the steps, then falls to 0."""
    model, tokenizer = open_model(task, recipe, seed)
    trained = Trained(task, recipe, model, tokenizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rising = max(1, task.steps // 10)

    def share(step: int) -> float:
        return min((step + 1) / rising, (task.steps - step) / (task.steps - rising + 1))

    with tempfile.TemporaryDirectory() as pages:
        optimizer = optimizer_of(recipe, parameters, Path(pages))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        model.train()
        torch.manual_seed(seed)
        for some in batches(encoded(task, rows or task.train, tokenizer), task.steps, task.batch, seed):
            with computing(recipe.way):
                loss = loss_of(task, model, collated(some, tokenizer.pad_token_id or 0))[0]
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    return trained


def loss_of(task: Task, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Return the mean loss over labels, in fp32, and the logits; a chat model that halfbyte trains holds none."""
    output = model(**batch)
    if task.kind == "chat":
        return output.loss, output.logits
    logits = output.logits.float().flatten(0, -2)  # T5 takes the loss of bf16 logits in bf16, to two digits
    return nn.functional.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORED), output.logits


def optimizer_of(recipe: Recipe, parameters: list[nn.Parameter], pages: Path) -> torch.optim.Optimizer:
    """Return AdamW without decay: torch's, or halfbyte's with 8-bit state that is paged to ``pages``."""
    if recipe.way in FORMATS:
        return halfbyte.optim.AdamW(
            parameters, lr=recipe.rate, weight_decay=0.0, state_bits=8, paged=True, page_dir=pages
        )
    return torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.0)


def computing(way: str) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: halfbyte's layers compute in bf16 by themselves."""
    return contextlib.nullcontext() if way in FORMATS else torch.autocast("cpu", torch.bfloat16)


def lines(book: Book, **by: Any) -> list[dict[str, Any]]:
    """Return the raw results that have these values."""
    return [line for line in book.lines() if by.items() <= line.items()]


def told(values: Iterable[float], digits: int) -> str:
    """Return a mean, half of its 95 % interval, and of how many seeds."""
    values = list(values)
    mean, half = lab.mean_and_half(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f} ({len(values)})" if len(values) > 1 else f"{mean:.{digits}f} (1)"


def holds(claim: bool) -> str:
    """Return a verdict in words."""
    return "holds" if claim else "does not hold"


def tiny_tasks(folder: Path) -> list[Task]:
    """Return the three tasks in the smallest form: models of random weights in ``folder``, rows that a line makes."""
    things = [f"{adjective} {noun}" for noun in NOUNS for adjective in ADJECTIVES]
    judged = [
        texts.Row(f"a {thing}", "good" if thing.split()[0] in ADJECTIVES[:2] else "bad", "tiny") for thing in things
    ]
    named = [texts.Row(f"name a {thing}", thing, "tiny") for thing in things]
    tokenizer = small_t5.tokenizer_of([row.source for row in named], 400)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    made: dict[Kind, Any] = {
        "classify": lambda: BertModel(BertConfig(**sizes, num_hidden_layers=1, pad_token_id=tokenizer.pad_token_id)),
        "seq2seq": lambda: small_t5.new_model(tokenizer, width=64, layers=1),
        "chat": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **ends, num_hidden_layers=2)),
    }
    found = []
    for kind, metric in (("classify", "accuracy"), ("seq2seq", "rouge_l"), ("chat", "rouge_l")):
        torch.manual_seed(0)
        model = made[kind]()
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
        rows = texts.drawn(judged if kind == "classify" else named)
        found.append(Task(f"tiny {kind}", kind, metric, folder / kind, rows, 8, 8, 16, 3, 4, 24))
    return found


NOUNS = ["plum", "pear", "film", "book", "road", "song", "tree", "town"]
ADJECTIVES = ["fine", "great", "poor", "dull"]
