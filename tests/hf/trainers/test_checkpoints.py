"""What our trainers save and go on from: when, how much of it, with any optimizer; and what they cannot go on from."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Trainer

from halfbyte.errors import InputError
from halfbyte.hf import trainers as ours
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.state import flatten, unflatten
from halfbyte.optim import AdamW

TEXTS = [{"prompt": f"{i}?", "completion": " It is so." * (1 + i % 2)} for i in range(7)]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": True}
FIRST_IS_BEST = EVALUATED | {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # while it falls
}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def weights_of(trainer: Any) -> list[Tensor]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


def steps(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").iterdir())


def test_two_checkpoints_are_kept_unless_the_script_says_otherwise(
    build: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    for limit, kept in {"default": [3, 4], 1: [4], 3: [2, 3, 4], None: [1, 2, 3, 4]}.items():
        more = {} if limit == "default" else {"save_total_limit": limit}
        build("sft", tiny_model_folder, tmp_path / str(limit), **SAVING, **more).train()
        assert steps(tmp_path / str(limit)) == kept


def test_the_best_model_is_in_the_trainer_at_the_end(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    for limit, kept in {1: [1], 2: [1, 4]}.items():
        output = tmp_path / str(limit)
        trainer = build("sft", tiny_model_folder, output, **SAVING, **FIRST_IS_BEST | {"save_total_limit": limit})
        trainer.train()
        losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1] + 0.1
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
        assert trainer.state.best_model_checkpoint == str(output / "checkpoints/step-000001")
        assert steps(output) == kept


@pytest.mark.parametrize("strategy", ["no", "epoch", "best"])
def test_checkpoints_are_saved_when_the_strategy_says(
    build: Any, strategy: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    more = EVALUATED | {"metric_for_best_model": "loss"}
    trainer = build("sft", tiny_model_folder, tmp_path, **SAVING | {"save_strategy": strategy}, **more)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    best = [i + 1 for i, loss in enumerate(losses) if loss < min(losses[:i], default=np.inf)]
    expected = {"no": [], "epoch": [4], "best": best[-2:]}[strategy]
    assert (steps(tmp_path) if strategy != "no" else [*tmp_path.rglob("step-*")]) == expected


def test_true_goes_on_from_the_newest_checkpoint_and_says_where_there_is_none(
    build: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    whole = build("sft", tiny_model_folder, tmp_path / "whole")
    whole.train()
    output = tmp_path / "run"
    with pytest.raises(InputError, match=r"run holds no checkpoint to go on from \(checkpoints/step-\.\.\.\)"):
        build("sft", tiny_model_folder, output).train(resume_from_checkpoint=True)
    for folder, words in {"nowhere": "holds no adapter_model", ".": "holds no adapter_model"}.items():
        with pytest.raises(InputError, match=words):
            build("sft", tiny_model_folder, output).train(resume_from_checkpoint=str(tmp_path / folder))

    constant = {"lr_scheduler_type": "constant"}
    build("sft", tiny_model_folder, output, **SAVING | {"max_steps": 2}, **constant).train()
    resumed = build("sft", tiny_model_folder, output, max_steps=4, **constant)
    resumed.train(resume_from_checkpoint=True)
    whole = build("sft", tiny_model_folder, tmp_path / "whole", max_steps=4, **constant)
    whole.train()
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(whole).items())


def test_a_checkpoint_of_the_model_alone_is_not_resumed(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    build("sft", tiny_model_folder, tmp_path, **SAVING, save_only_model=True).train()
    names = {path.name for path in (tmp_path / "checkpoints/step-000004").iterdir()}
    assert {"adapter_model.safetensors", "trainer_state.json"} <= names and not {"state.json"} & names
    with pytest.raises(InputError, match=r"step-000004 holds no state of halfbyte's trainers.*save_only_model=True"):
        build("sft", tiny_model_folder, tmp_path, max_steps=6).train(resume_from_checkpoint=True)


def test_callbacks_go_on_from_their_states(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    more = SAVING | FIRST_IS_BEST | {"restore_callback_states_from_checkpoint": True}

    def run(patience: int, most: int, resume: bool) -> Any:
        callbacks = [EarlyStoppingCallback(early_stopping_patience=patience)]
        trainer = build("sft", tiny_model_folder, tmp_path, callbacks=callbacks, **more | {"max_steps": most})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run(3, 3, False)  # two evaluations in a row were worse
    stopped = run(3, 9, True)
    assert stopped.state.global_step == 4


def test_a_resumed_run_may_begin_the_epoch_anew(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    build("sft", tiny_model_folder, tmp_path, **SAVING | {"max_steps": 1}).train()
    seen: list[list[int]] = []
    trainer = build("sft", tiny_model_folder, tmp_path, max_steps=2, ignore_data_skip=True)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append([len(row["input_ids"]) for row in rows]) or collate(rows)
    trainer.train(resume_from_checkpoint=True)
    assert seen[0] == [len(row["input_ids"]) for row in trainer.train_dataset.select(range(2))]


def test_rows_come_in_their_order_where_that_is_asked_for(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    trainer = build("kto", tiny_model_folder, tmp_path)  # whose KL term pairs neighbours
    assert list(trainer._get_train_sampler()) == list(range(6))
    assert list(build("sft", tiny_model_folder, tmp_path, train_sampling_strategy="random")._get_train_sampler()) != [
        *range(7)
    ]
    stream = Dataset.from_list(TEXTS).to_iterable_dataset()
    streamed = build("sft", tiny_model_folder, tmp_path, train_dataset=stream, **SAVING)
    streamed.train()
    assert json.loads((tmp_path / "checkpoints/step-000004/state.json").read_text())["data"] is None


def test_the_data_seed_orders_the_rows(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    def order(**more: Any) -> list[int]:
        trainer = build("sft", tiny_model_folder, tmp_path, train_sampling_strategy="random", **more)
        return list(trainer._get_train_sampler())

    assert order(data_seed=5, seed=1) == order(data_seed=5, seed=2) == order(seed=5) != order(data_seed=6)


def test_a_checkpoint_may_be_written_on_each_node(
    build: Any, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("sft", tiny_model_folder, tmp_path, **SAVING | {"max_steps": 1})
    writes: list[Any] = []
    first = distributed.first_writes
    monkeypatch.setattr(distributed, "first_writes", lambda choice: writes.append(choice) or first(choice))
    monkeypatch.setattr(type(trainer.args), "process_index", 2)  # the first of the second machine
    trainer.args.save_on_each_node = True
    trainer.train()
    assert writes == [True] and steps(tmp_path) == [1]
    trainer.args.save_on_each_node = False
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert writes == [True, False] and not (tmp_path / "elsewhere").exists()


def test_what_the_arguments_say_of_data_parallelism_reaches_it(
    build: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    default = build("sft", tiny_model_folder, tmp_path).accelerator.ddp_handler
    assert (default.find_unused_parameters, default.broadcast_buffers) == (False, False)
    names = ("find_unused_parameters", "broadcast_buffers", "static_graph", "bucket_cap_mb")
    said = {f"ddp_{name}": 7 if name == "bucket_cap_mb" else True for name in names}
    handler = build("sft", tiny_model_folder, tmp_path, **said).accelerator.ddp_handler
    assert {f"ddp_{name}": getattr(handler, name) for name in names} == said


def test_the_group_is_made_as_the_arguments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Exception):
        pass

    def make(backend: str, timeout: Any) -> None:
        raise Made(backend, timeout.total_seconds())

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", make)
    with pytest.raises(Made) as made:
        ours.SFTConfig(output_dir=str(tmp_path), ddp_timeout=77, ddp_backend="mpi")
    assert made.value.args == ("mpi", 77)


@pytest.mark.parametrize(
    ("name", "bits", "paged"),
    [
        ("adamw_8bit", 8, False),
        ("adamw_bnb_8bit", 8, False),
        ("paged_adamw_8bit", 8, True),
        ("paged_adamw_32bit", 32, True),
    ],
)
def test_bitsandbytes_optimizers_are_ours_and_saved(
    build: Any, name: str, bits: int, paged: bool, tiny_model_folder: Path, tmp_path: Path
) -> None:
    trainer = build("sft", tiny_model_folder, tmp_path, optim=name, adam_beta1=0.8, **SAVING | {"max_steps": 1})
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is AdamW and optimizer.defaults["betas"][0] == 0.8
    assert (optimizer.state_bits, optimizer.page_dir is not None) == (bits, paged)
    resumed = build("sft", tiny_model_folder, tmp_path, optim=name, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match=f"optim='{name}' takes no optim_args"):
        build("sft", tiny_model_folder, tmp_path, optim=name, optim_args="x=1").train()


@pytest.mark.parametrize("name", ["lion_8bit", "ademamix_8bit", "adafactor", "rmsprop", "adamw_torch_fused"])
def test_the_state_of_any_optimizer_is_resumed_bit_for_bit(
    build: Any, name: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    more = {"optim": name, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    whole = build("sft", tiny_model_folder, tmp_path / "whole", max_steps=4, **more)
    whole.train()
    build("sft", tiny_model_folder, tmp_path, **SAVING | {"max_steps": 2}, **more).train()
    resumed = build("sft", tiny_model_folder, tmp_path, max_steps=4, **more)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(weights(resumed)[key], tensor) for key, tensor in weights(whole).items())


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl_s_own_trainer_saves_and_resumes_our_optimizer(
    build: Any, bits: int, tiny_model_folder: Path, tmp_path: Path
) -> None:
    def run(name: str, steps: int, **more: Any) -> Any:
        trainer = build("sft", tiny_model_folder, tmp_path / name, "theirs", max_steps=steps, **constant)
        trainer.optimizer = AdamW(weights_of(trainer), lr=1e-2, state_bits=bits, paged=True)
        trainer.train(**more)
        return trainer

    constant = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    run("one", 2)
    resumed, whole = run("one", 4, resume_from_checkpoint=str(tmp_path / "one/checkpoint-2")), run("whole", 4)
    assert all(torch.equal(weights(resumed)[key], tensor) for key, tensor in weights(whole).items())


def test_optimizers_of_other_names_are_transformers_own(tmp_path: Path) -> None:
    for name, more in {"adamw_torch": {}, "sgd": {}, "ademamix": {"optim_args": "beta3=0.5,alpha=2"}}.items():
        args = ours.SFTConfig(output_dir=str(tmp_path), optim=name, optim_target_modules=["q_proj"], **more)
        expected = Trainer.get_optimizer_cls_and_kwargs(args, None)
        assert ours.SFTTrainer.get_optimizer_cls_and_kwargs(args, None) == expected


def test_a_state_of_any_shape_survives_its_files() -> None:
    x, y = torch.arange(3), torch.ones(2, 2).t()
    tree = {"state": {0: {"step": 3, "nested": {"a": x}}, 12: {"list": [y, None, 1.5]}}, "param_groups": [{"lr": 0.1}]}
    tensors, rest = flatten(tree)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "state.0.nested.a": x.tolist(),
        "state.12.list.0": y.tolist(),
    }
    again = unflatten(tensors, json.loads(json.dumps(rest)))
    assert again["state"].keys() == {0, 12} and again["state"][12]["list"][1:] == [None, 1.5]
    assert torch.equal(again["state"][0]["nested"]["a"], x)


def test_a_model_s_name_is_opened_as_the_arguments_say(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    open_: Callable[..., Any] = trl.trainer.sft_trainer.create_model_from_path
    monkeypatch.setattr(
        trl.trainer.sft_trainer, "create_model_from_path", lambda path, **kw: seen.update(kw) or open_(path, **kw)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.SFTTrainer(
            model=str(tiny_model_folder),
            args=ours.SFTConfig(
                output_dir=str(tmp_path), model_init_kwargs={"dtype": "float32"}, trust_remote_code=True
            ),
            train_dataset=Dataset.from_list(TEXTS),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    assert seen["trust_remote_code"] is True and "float32" in str(seen["dtype"])


def test_a_router_s_loss_needs_a_router(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Mixture-of-Experts"):
        build("sft", tiny_model_folder, tmp_path, router_aux_loss_coef=0.1)


def test_what_would_be_trained_and_not_saved_is_refused(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    trainer = build("sft", tiny_model_folder, tmp_path)
    trainer.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"model\.norm\.weight would be trained, but not saved with the adapter"):
        trainer.train()
    with pytest.raises(
        InputError, match="SFTTrainer trains adapters, and LlamaForCausalLM has none: hand it peft_config"
    ):
        ours.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            args=ours.SFTConfig(output_dir=str(tmp_path)),
            train_dataset=Dataset.from_list(TEXTS),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        )


def test_checkpoints_are_free_of_pickle(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    build("sft", tiny_model_folder, tmp_path, **SAVING | {"max_steps": 1}).train()
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".jinja"}
    assert load_file(tmp_path / "checkpoints/step-000001/state.safetensors")
