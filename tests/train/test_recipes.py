"""Optimizers, schedules and groups of parameters of a run, beside torch's and transformers'; resumed bit for bit."""

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from transformers.optimization import get_scheduler

from halfbyte.choices import WATCHING, Schedule
from halfbyte.cli.options import flags_of
from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.optim import AdamW
from halfbyte.runs.events import StepMetrics
from halfbyte.runs.metrics import read_events
from halfbyte.train import Interrupted, TrainConfig, batch, fine_tune
from halfbyte.train.build import build_model, build_optimizer


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("halfbyte.optim.adamw.SMALLEST_8BIT", 64)  # so that these small layers have state in 8 bits
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"{'really ' * (i % 4)}{i}?", "output": "yes" if i % 3 else "no"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_model_folder), "data": str(file), "output": tmp_path / "run", "preset": "quick",
        "sample_prompts": [], "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "rank": 16,
    }  # fmt: skip


def steps_of(run: Path) -> list[StepMetrics]:
    return [event for event in read_events(run / "metrics.jsonl") if isinstance(event, StepMetrics)]


def interrupted(config: dict[str, Any], after: int) -> None:
    def listen(event: Any) -> None:
        if isinstance(event, StepMetrics) and event.step == after - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fine_tune(TrainConfig(**config), listen)


def same_when_resumed(options: dict[str, Any], after: int, folder: Path) -> Path:
    whole = fine_tune(TrainConfig(**(options | {"output": folder})))
    interrupted(options, after)
    resumed = fine_tune(TrainConfig(**options, resume=True))
    one, other = (load_file(run.output / "adapter_model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    first, second = ([step.learning_rate for step in steps_of(run.output)] for run in (whole, resumed))
    assert first == second
    return whole.output


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


OPTIMIZERS = ["paged_lion_8bit", "adafactor", *map(slow, ("adamw_32bit", "lion_32bit", "sgd", "rmsprop", "adagrad"))]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_of_any_kind_learns_and_is_resumed_bit_for_bit(
    optimizer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"optimizer": optimizer, "epochs": 2, "weight_decay": 0.01}
    options |= {"learning_rate": 1.0, "max_grad_norm": 0} if optimizer == "sgd" else {}
    steps = steps_of(same_when_resumed(options, 3, tmp_path / "whole"))
    assert len(steps) == 6 and sum(s.loss for s in steps[3:]) < sum(s.loss for s in steps[:3])


SCHEDULES: dict[Schedule, dict[str, Any]] = {
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "polynomial": {"power": 2.0, "lr_end": 1e-5},
    "inverse_sqrt": {"timescale": 3},
    "warmup_stable_decay": {"num_decay_steps": 2, "decay_type": "linear"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rates_of_a_run_are_transformers(name: Schedule, options: dict[str, Any]) -> None:
    options |= {"lr_scheduler_type": name, "warmup_ratio": 0.34, "epochs": 2, "rank": 2}
    run = fine_tune(TrainConfig(**options, lr_scheduler_kwargs=SCHEDULES[name] or None))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(name, optimizer, math.ceil(0.34 * 6), 6, SCHEDULES[name])
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = [step.learning_rate for step in steps_of(run.output)]
    assert rates == pytest.approx(expected) and len(set(rates)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", WATCHING)
def test_a_schedule_that_watches_evaluations_falls_and_is_resumed(
    name: Schedule, options: dict[str, Any], tmp_path: Path
) -> None:
    # no evaluation is better than all before it by so much
    never = {"threshold": 1e9, "patience": 0, "factor": 0.5}
    options |= {"lr_scheduler_type": name, "eval_data": options["data"], "eval_steps": 1, "epochs": 2, "rank": 2}
    options |= {"lr_scheduler_kwargs": never}
    rates = [step.learning_rate for step in steps_of(same_when_resumed(options, 3, tmp_path / "whole"))]
    assert rates[0] <= 1e-3 and rates[-1] <= rates[0] / (8 if name == "reduce_lr_on_plateau" else 1)


@pytest.mark.slow
def test_a_run_that_watches_evaluations_goes_on_with_as_many(options: dict[str, Any]) -> None:
    options |= {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_data": options["data"], "eval_steps": 1, "rank": 2}
    interrupted(options, 2)
    with pytest.raises(InputError, match=r"other options than it was begun with \(eval_steps: 1 → 2\)"):
        fine_tune(TrainConfig(**(options | {"eval_steps": 2, "resume": True})))


def test_schedules_that_cannot_be_followed_are_told(options: dict[str, Any]) -> None:
    def refused(sentence: str, **more: Any) -> None:
        given = {name: str(value) if name == "output" else value for name, value in (options | more).items()}
        with pytest.raises(InputError, match=sentence):
            fine_tune(TrainConfig.from_yaml(None, given))
        assert not options["output"].exists()

    refused("goes by the loss of evaluations", lr_scheduler_type="reduce_lr_on_plateau")
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_share": 0.3}
    refused("no warm-up, but warmup_ratio is given", **plateau, warmup_ratio=0.1)
    refused(
        r"no argument 'factr' \(lr_scheduler_kwargs\) \(did you mean 'factor'", **plateau, lr_scheduler_kwargs="factr=1"
    )
    refused("factor", **plateau, lr_scheduler_kwargs="factor=2")
    refused("no argument 'num_cycles'.*it has none", lr_scheduler_kwargs="num_cycles=2")
    refused("needs num_decay_steps", lr_scheduler_type="warmup_stable_decay")
    refused("min_lr or min_lr_rate", lr_scheduler_type="cosine_with_min_lr")
    refused("must be pairs", lr_scheduler_kwargs="num_cycles")
    refused("adam_beta2 is AdamW's and Lion's, but the optimizer is sgd", optimizer="sgd", adam_beta2=0.95)
    refused("lr_scheduler_type", lr_scheduler_type="cosin")


def test_flags_give_a_schedule_what_it_is_told() -> None:
    given = {
        "model": "m",
        "data": "d",
        "output": "o",
        "lr_scheduler_kwargs": "num_cycles=2, decay_type=linear,min_lr=1e-5",
    }
    config = TrainConfig.from_yaml(None, given)
    assert config.lr_scheduler_kwargs == {"num_cycles": 2, "decay_type": "linear", "min_lr": 1e-5}


def test_norms_and_biases_do_not_decay(options: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**options, weight_decay=0.1)
    model = build_model(config)
    norm = model.get_submodule("base_model.model.model.norm")
    norm.weight.requires_grad_(True)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    groups = build_optimizer(config, model, tmp_path).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [len(trained) - 1, 1]
    assert trained[id(groups[1]["params"][0])] == "base_model.model.model.norm.weight"
    kept = Trainer.get_decay_parameter_names(None, model)
    assert all(trained[id(p)] in kept for p in groups[0]["params"])
    alone = build_optimizer(TrainConfig(**options), model, tmp_path).param_groups
    assert len(alone) == 1 and len(alone[0]["params"]) == len(trained)


def test_native_32_bit_steps_are_torch_s_but_for_the_last_places() -> None:
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator) for shape in ((300, 17), (5,))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in first] for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    one, other = AdamW(ours, exact=False, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_batch_size_may_be_left_to_memory_and_the_step_stays(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the quick preset's 16 rows a step, as many a pass as the plan of memory keeps, by an independent count."""
    rows = [{"text": "word " * 40}] * 64
    file = tmp_path / "equal.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options |= {"data": str(file), "batch_size": "auto", "gradient_accumulation_steps": 1, "rank": 4}
    asked: list[int] = []

    def kept_up_to(limit: int) -> Any:
        def plan(config: TrainConfig, *_: Any, **__: Any) -> activations.Policy:
            asked.append(config.rows_a_pass)
            fits = config.rows_a_pass <= limit
            return activations.Policy(0, 0 if fits else 1, 2 if fits else 1, 1, 2)

        return plan

    for limit, size in ((16, 16), (15, 8), (7, 4), (1, 1), (0, 1)):
        asked.clear()
        monkeypatch.setattr(batch, "plan_activations", kept_up_to(limit))
        told: list[str] = []
        found = batch.fit_batch(TrainConfig(**options), None, SimpleNamespace(longest=9), told.append)  # type: ignore[arg-type]
        assert (found.batch_size, found.gradient_accumulation_steps) == (size, 16 // size)
        assert asked == [n for n in (16, 8, 4, 2, 1) if n >= max(size, 1)] and f"batch_size {size} with" in told[0]
    monkeypatch.undo()

    run = fine_tune(TrainConfig(**options))
    about = json.loads((run.output / "run.json").read_text())
    assert about["rows_a_pass"] == 16 and run.summary.steps == 4  # there is room for all
    assert "batch_size: auto" in (run.output / "config.yaml").read_text()
    by_hand = fine_tune(TrainConfig(**(options | {"batch_size": 16, "output": tmp_path / "hand"})))
    one, other = (load_file(each.output / "adapter_model.safetensors") for each in (run, by_hand))
    assert all(torch.equal(one[name], other[name]) for name in one)

    # a resumed run keeps what it began with, whatever memory there is by then
    options |= {"output": tmp_path / "stopped"}
    interrupted(options, 2)
    monkeypatch.setattr("halfbyte.train.run.fit_batch", None)
    resumed = load_file(fine_tune(TrainConfig(**options, resume=True)).output / "adapter_model.safetensors")
    assert all(torch.equal(one[name], resumed[name]) for name in one)


def test_a_batch_size_is_a_number_or_auto(options: dict[str, Any]) -> None:
    flag = flags_of(TrainConfig).parameters["batch_size"].annotation
    assert get_args(flag)[0] == str | None  # typer's int has no auto
    given = {**options, "output": "o"}
    assert TrainConfig.from_yaml(None, given | {"batch_size": "8"}).batch_size == 8
    for wrong in ("0", "many"):
        with pytest.raises(InputError, match="batch_size"):
            TrainConfig.from_yaml(None, given | {"batch_size": wrong})
    kto = TrainConfig(**(options | {"method": "kto", "batch_size": "auto", "gradient_accumulation_steps": 3}))
    assert kto.rows_a_step == 48
