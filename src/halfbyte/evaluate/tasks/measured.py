"""What lm-eval found, as figures: its own value of each metric, and what each question adds to it where that is plain.

A metric is plain if its value is the mean of the questions' values, or made of the sums of pairs (log-likelihood, size)
as perplexities are; then the difference of two models has a standard error of its own
(:mod:`halfbyte.evaluate.estimates`). Of others (F1, BLEU, groups) there is lm-eval's value and standard error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate

from halfbyte.evaluate.estimates import Estimate, Rows
from halfbyte.evaluate.tasks.harness import HalfbyteLM
from halfbyte.evaluate.tasks.named import Loaded, begin, without_bars

BOOTSTRAPS = 1000
"""Draws for the standard errors of metrics that have no formula; lm-eval's 100,000 take minutes."""


@dataclass(frozen=True)
class TaskMetric:
    """A metric of a task.

    Attributes:
        task: its name, or a group's.
        name: of the metric, with the filter that answers went through.
        estimate: lm-eval's own.
        higher_is_better: None where that is not known.
        count: of questions.
        rows: what each adds, if that is plain.
        is_inner: whether the task is part of a group that was measured as a whole.
    """

    task: str
    name: str
    estimate: Estimate
    higher_is_better: bool | None
    count: int
    rows: Rows | None
    is_inner: bool


def measure(
    lm: HalfbyteLM, loaded: Loaded, *, limit: int | None = None, apply_chat_template: bool = False
) -> tuple[list[TaskMetric], dict[str, list[dict[str, Any]]]]:
    """Ask a model all tasks; return the figures, and of each task what was asked and answered.

    Args:
        lm: the model.
        loaded: the tasks.
        limit: questions of each task, the first ones.
        apply_chat_template: put questions as conversations.
    """
    begin(loaded)
    with without_bars():
        found: Any = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    samples: dict[str, list[dict[str, Any]]] = {
        name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()
    }
    inner = {child for children in found["group_subtasks"].values() for child in children}
    metrics = []
    for task, results in found["results"].items():
        better = found["higher_is_better"].get(task) or {}
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            own = [row[metric] for row in samples.get(task, ()) if row["filter"] == filtered and metric in row]
            rows = _plain(own, float(value))
            stderr = results.get(f"{metric}_stderr,{filtered}")
            error = float(stderr) if isinstance(stderr, int | float) else rows.estimate().stderr if rows else None
            metrics.append(
                TaskMetric(
                    task=task,
                    name=metric if filtered == "none" else f"{metric} ({filtered})",
                    estimate=Estimate(float(value), error),
                    higher_is_better=better.get(metric),
                    count=int(results.get("sample_len") or len(own)),
                    rows=rows,
                    is_inner=task in inner,
                )
            )
    return metrics, samples


def texts_of(loaded: Loaded, samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Return of each task its questions as texts, those that were asked, each once, in order."""
    found = {}
    for name, rows in samples.items():
        task = loaded["tasks"][name]
        docs = {row["doc_id"]: row["doc"] for row in rows}
        found[name] = [_text(task, doc) for doc in docs.values()]
    return found


def _text(task: Any, doc: Any) -> str:
    """Return the question of a row: what lm-eval's own search for overlaps takes, or else what is asked."""
    query = task.doc_to_decontamination_query(doc) if task.should_decontaminate() else None
    text = query or task.doc_to_text(doc)
    if isinstance(text, str):
        return text
    return " ".join(map(str, task.doc_to_choice(doc)))  # a choice between contexts


def _plain(values: Sequence[Any], value: float) -> Rows | None:
    """Return the questions' values as rows, if the metric's value is made of them in one of the known ways."""
    candidates: list[Rows] = []
    if values and all(isinstance(one, int | float) for one in values):
        candidates = [Rows(np.array(values, float))]
    elif values and all(isinstance(one, tuple | list) and [type(x) for x in one] == [float, int] for one in values):
        nats, sizes = -np.array([one[0] for one in values]), np.array([one[1] for one in values], float)
        if sizes.sum() > 0:
            candidates = [Rows(nats, sizes, is_exponent=True), Rows(nats / math.log(2), sizes)]
    return next((rows for rows in candidates if math.isclose(rows.estimate().value, value, rel_tol=1e-9)), None)
