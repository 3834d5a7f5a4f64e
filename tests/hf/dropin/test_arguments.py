"""Names of 2023 are the names of today, said once, in configurations and on command lines."""

import dataclasses
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from halfbyte.hf.dropin import old_names

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.orpo import ORPOConfig

CONFIGS = (TrainingArguments, Seq2SeqTrainingArguments, trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, ORPOConfig)


def test_no_old_name_is_one_of_today() -> None:
    known = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    # ORPO, which is experimental, still has two of those that the others have lost
    assert not known & (old_names.RENAMED.keys() | old_names.WITHOUT_MEANING.keys()) - {
        "is_encoder_decoder",
        "padding_value",
    }
    assert set(old_names.RENAMED.values()) <= known


@pytest.mark.parametrize("config", CONFIGS)
def test_old_names_are_read_as_those_of_today(
    installed: None, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    given = {
        "evaluation_strategy": "steps", "eval_steps": 5, "warmup_ratio": 0.03, "group_by_length": True,
        "no_cuda": True, "logging_dir": "logs", "per_gpu_train_batch_size": 3, "save_safetensors": True,
        "overwrite_output_dir": True, "report_to": "wandb", "fp16": True, "half_precision_backend": "auto",
        "neftune_noise_alpha": 5, "optim": "paged_adamw_32bit",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, "halfbyte"):
        args = config(str(tmp_path), **given)
        config(str(tmp_path), **given)
    assert args.eval_strategy.value == "steps" and args.warmup_steps == 0.03 and args.use_cpu
    assert args.train_sampling_strategy == "group_by_length" and args.per_device_train_batch_size == 3
    assert not args.fp16 and not args.bf16 and args.report_to == [] and args.neftune_noise_alpha == 5
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 11
    assert f"halfbyte: {config.__name__}(evaluation_strategy=...) is eval_strategy= now." in said


@pytest.mark.parametrize(("steps", "wanted"), [(0, 0.03), (5, 5)])
def test_a_ratio_counts_where_no_number_of_warmup_steps_is_given(
    installed: None, tmp_path: Path, steps: int, wanted: float
) -> None:
    for given in ({"warmup_ratio": 0.03, "warmup_steps": steps}, {"warmup_steps": steps, "warmup_ratio": 0.03}):
        assert TrainingArguments(str(tmp_path), **given).warmup_steps == wanted


def test_bf16_without_a_gpu_is_no_error_and_false_values_stay_false(installed: None, tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), bf16=True, tf32=True, group_by_length=False, warmup_ratio=0.0, report_to=None
    )
    assert args.bf16 and args.use_cpu and args.tf32 is None and args.device.type == "cpu"
    assert args.train_sampling_strategy == "random" and args.warmup_steps == 0


def test_a_name_that_never_was_is_the_library_s_error(installed: None, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="learning_rats"):
        TrainingArguments(str(tmp_path), learning_rats=1e-3)
    with pytest.raises(TypeError, match="max_seq_length"):
        TrainingArguments(str(tmp_path), max_seq_length=512)


def test_trl_s_own_names(installed: None, tmp_path: Path) -> None:
    args = trl.SFTConfig(str(tmp_path), max_seq_length=77, dataset_batch_size=9, num_of_sequences=3)
    assert args.max_length == 77 and not args.bf16
    assert trl.SFTConfig(str(tmp_path), max_seq_length=77, max_length=88).max_length == 88
    assert ORPOConfig(str(tmp_path), max_target_length=5, max_prompt_length=7).max_completion_length == 5
    assert trl.DPOConfig(str(tmp_path), max_prompt_length=7, max_target_length=5).max_length == 1024


@dataclasses.dataclass
class OwnArguments(Seq2SeqTrainingArguments):
    """As qlora.py's: a field that transformers has no more."""

    group_by_length: bool = dataclasses.field(default=False)
    warmup_ratio: float = dataclasses.field(default=0.03)
    output_dir: str = dataclasses.field(default="./output")


def test_fields_of_a_script_s_own_class_are_obeyed(installed: None) -> None:
    (args,) = HfArgumentParser(OwnArguments).parse_args_into_dataclasses(
        ["--group_by_length", "--evaluation_strategy", "steps", "--eval_steps", "7", "--fp16", "--report_to", "none"]
    )
    assert args.train_sampling_strategy == "group_by_length" and args.warmup_steps == 0.03
    assert args.eval_strategy.value == "steps" and args.eval_steps == 7 and not args.fp16


@dataclasses.dataclass
class GenerationArguments:
    """As qlora.py's: a flag that TrainingArguments has got since."""

    use_cache: bool | None = dataclasses.field(default=True)
    num_beams: int = dataclasses.field(default=1)


def test_a_flag_that_two_classes_have_is_the_first_one_s(installed: None, tmp_path: Path) -> None:
    training, generation = HfArgumentParser((TrainingArguments, GenerationArguments)).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--num_beams", "4"]
    )
    assert (training.use_cache, generation.use_cache, generation.num_beams) == (False, True, 4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--warmup_ratio", "0.1"], {"warmup_steps": 0.1}),
        (["--warmup_ratio=0.1", "--no_cuda"], {"warmup_steps": 0.1, "use_cpu": True}),
        (["--group_by_length", "True"], {"train_sampling_strategy": "group_by_length"}),
        (["--group_by_length", "False", "--seed", "3"], {"train_sampling_strategy": "random", "seed": 3}),
        (["--overwrite_output_dir", "--seed", "4"], {"seed": 4}),
        (["--logging_dir", "somewhere", "--seed", "4"], {"seed": 4}),
        (["--adafactor", "true"], {"optim": "adafactor"}),
    ],
)
def test_old_flags_of_a_command_line(
    installed: None, tmp_path: Path, words: list[str], expected: dict[str, Any]
) -> None:
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
    assert {name: getattr(args, name) for name in expected} == expected


def test_without_installation_the_libraries_refuse_them(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="evaluation_strategy"):
        TrainingArguments(str(tmp_path), evaluation_strategy="steps")
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="bf16"):
            TrainingArguments(str(tmp_path), bf16=True)
