"""Options: the paper's defaults, presets under explicit values, and one sentence for each mistake."""

import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

import halfbyte.optim
from halfbyte.choices import TRANSFORMERS_OPTIMIZERS
from halfbyte.errors import InputError
from halfbyte.quant.codebooks import CODEBOOKS, codebook
from halfbyte.train import TrainConfig
from halfbyte.train.methods import METHODS

NEEDED = {"model": "m", "data": "d.jsonl", "output": "run"}


def test_the_defaults_are_the_papers_recipe() -> None:
    config = TrainConfig.from_yaml(None, NEEDED)
    assert (config.rank, config.lora_alpha, config.lora_dropout, config.target_modules) == (64, 16, 0.1, "all-linear")
    assert (config.quant_type, config.blocksize, config.double_quant) == ("nf4", 64, True)
    assert (config.compute_dtype, config.optimizer) == ("bfloat16", "paged_adamw_8bit")
    assert (config.learning_rate, config.lr_scheduler_type) == (2e-4, "constant")
    assert (config.max_grad_norm, config.adam_beta2, config.weight_decay) == (0.3, 0.999, 0.0)
    assert config.batch_size * config.gradient_accumulation_steps == 16
    assert config.group_by_length


def test_a_preset_changes_defaults_and_explicit_values_win_over_it() -> None:
    config = TrainConfig.from_yaml(None, NEEDED | {"preset": "quick", "learning_rate": 1e-3})
    assert (config.rank, config.lr_scheduler_type, config.learning_rate) == (16, "linear", 1e-3)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nrank: 8\nlearning_rate: 2e-5\n")  # YAML reads 2e-5 as text
    config = TrainConfig.from_yaml(file, {"rank": 4})
    assert (config.rank, config.learning_rate) == (4, 2e-5)


def test_a_saved_configuration_reads_back_the_same_without_run_options(tmp_path: Path) -> None:
    values = {"preset": "quick", "target_modules": ["q_proj", "v_proj"], "max_steps": 3, "data": "ä b.jsonl"}
    config = TrainConfig.from_yaml(None, NEEDED | values | {"overwrite": True})
    config.save(tmp_path / "c.yaml")
    assert TrainConfig.from_yaml(tmp_path / "c.yaml", {"overwrite": True}) == config
    assert "overwrite" not in (tmp_path / "c.yaml").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1}, "unknown option 'lerning_rate' (did you mean 'learning_rate'?)"),
        ({"rank": "many"}, "option 'rank': 'many' is wrong"),
        ({"rank": 0}, "option 'rank': 0 is wrong, it should be greater than or equal to 1"),
        ({"quant_type": "nf5"}, "option 'quant_type': 'nf5' is wrong, it should be 'nf4'"),
        (
            {"method": "spt"},
            "option 'method': 'spt' is wrong, it should be 'sft', 'text', 'dpo', 'kto' or 'orpo' (did you mean 'sft'?)",
        ),
        (
            {"task": "clasify"},
            "option 'task': 'clasify' is wrong, it should be 'lm', 'classify' or 'seq2seq' (did you mean 'classify'?).",
        ),
        ({"preset": "quik"}, "option 'preset': 'quik' is wrong, it should be 'paper', 'paper-7b'"),
        (
            {"bias": "al"},
            "option 'bias': 'al' is wrong, it should be 'none', 'all' or 'lora_only' (did you mean 'all'?)",
        ),
        ({"method": "kto", "bias": "lora_only"}, "bias 'lora_only' does not go with method kto"),
        ({"learning_rate": float("inf")}, "option 'learning_rate': inf is wrong"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"model": None}, "option 'model'"),
        ({"task": "seq2seq", "init_lora_weights": "eva"}, "init_lora_weights 'eva' is for language models"),
        ({"skip_bad_rows": "al"}, "option 'skip_bad_rows': 'al' is wrong, it should be a valid boolean or be 'all'"),
        ({"split_text": "lines"}, "option 'split_text': 'lines' is wrong, it should be a valid integer or be 'docu"),
    ],
)
def test_a_wrong_option_is_one_sentence_that_names_it(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("".join(f"{key}: {_yaml(value)}\n" for key, value in (NEEDED | values).items()))
    for path, overrides in [(file, {}), (None, NEEDED | values)]:
        with pytest.raises(InputError) as error:
            TrainConfig.from_yaml(path, overrides)
        text = str(error.value)
        assert message in text and "\n" not in text
        assert text.startswith(f"{file}: ") == (path is not None and "option" in message)


def _yaml(value: Any) -> str:
    return ".inf" if value == float("inf") else "null" if value is None else str(value)


# QLoRA, arXiv 2305.14314, appendix B.2, table 9: rate, dropout and rows a step by size.
@pytest.mark.parametrize(
    ("size", "rate", "dropout", "rows"),
    [("7b", 2e-4, 0.1, 16), ("13b", 2e-4, 0.1, 16), ("33b", 1e-4, 0.05, 32), ("65b", 1e-4, 0.05, 64)],
)
def test_the_papers_presets_are_those_of_its_table(size: str, rate: float, dropout: float, rows: int) -> None:
    config = TrainConfig(**NEEDED, preset=f"paper-{size}")
    assert (config.learning_rate, config.lora_dropout, config.rows_a_step) == (rate, dropout, rows)
    assert (config.rank, config.lora_alpha, config.lr_scheduler_type, config.max_grad_norm) == (64, 16, "constant", 0.3)
    assert TrainConfig(**NEEDED, preset=f"paper-{size}", method="dpo").learning_rate == 5e-6


def test_a_missing_option_is_named_with_its_meaning() -> None:
    with pytest.raises(InputError, match="'data' is missing: Training data"):
        TrainConfig.from_yaml(None, {"model": "m", "output": "o"})


@pytest.mark.parametrize("text", ["a: [1\n", "- a\n- b\n", "just text", "", "\x00", b"\xff\xfe"])
def test_a_file_that_is_not_a_yaml_mapping_is_one_sentence(text: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        TrainConfig.from_yaml(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_a_configuration_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


def test_every_option_says_what_it_is() -> None:
    assert all(field.description for field in TrainConfig.model_fields.values())


def test_the_choices_are_those_that_the_layers_below_offer() -> None:
    choices = {name: typing.get_args(field.annotation) for name, field in TrainConfig.model_fields.items()}
    ours = {*halfbyte.optim.KINDS, *halfbyte.optim.LIONS}
    assert set(choices["optimizer"]) == ours | set(TRANSFORMERS_OPTIMIZERS)
    assert set(TRANSFORMERS_OPTIMIZERS) <= {name.value for name in OptimizerNames}
    assert set(choices["lr_scheduler_type"]) == {name.value for name in SchedulerType}
    formats = {name for name in CODEBOOKS if len(codebook(name, torch.device("cpu"))) == 16}
    assert set(choices["quant_type"]) == {*formats, "int8", "none"}
    assert set(choices["method"]) == set(METHODS)


def test_the_options_are_known_without_importing_torch() -> None:
    code = "import sys; from halfbyte.train import TrainConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_part_of_the_options_takes_the_place_of_another_ones_check() -> None:
    """Checks are inherited by their names, and two of one name would be one."""
    parts = [part for part in TrainConfig.__mro__ if part.__module__.startswith("halfbyte")]
    own = [(name, value) for part in parts for name, value in vars(part).items() if not name.startswith("__")]
    checks = [name for name, value in own if name.startswith("_") and callable(getattr(value, "__func__", value))]
    assert len(checks) > 20 and len(checks) == len(set(checks))


def test_columns_and_patterns_are_pairs_on_the_command_line(tmp_path: Path) -> None:
    given = {"model": "m", "data": "d.jsonl", "output": tmp_path, "columns": "prompt=q,completion=a"}
    config = TrainConfig.from_yaml(None, given | {"rank_pattern": "q_proj=8"})
    assert config.columns == {"prompt": "q", "completion": "a"} and config.rank_pattern == {"q_proj": 8}
