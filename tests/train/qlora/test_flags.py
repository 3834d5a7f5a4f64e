"""The command line of qlora.py: every flag, the paper's own scripts, and what is refused."""

import dataclasses
import inspect
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any, Optional

import pytest
from transformers import GenerationConfig, HfArgumentParser

from halfbyte.errors import InputError
from halfbyte.hf.trainers import SFTConfig
from halfbyte.runs.config import TrainConfig
from halfbyte.train.qlora.arguments import trainer_arguments
from halfbyte.train.qlora.flags import Flag, Only, Own, To, parse
from halfbyte.train.qlora.inherited import INHERITED
from halfbyte.train.qlora.table import ADDED, FLAGS, GENERATION
from halfbyte.train.qlora.translate import OPTIMS, translate

OFFICIAL = Path(__file__).with_name("official")
FIELDS: dict[str, dict[str, dict[str, Any]]] = json.loads((OFFICIAL / "arguments.json").read_text())
COMMANDS: dict[str, list[str]] = json.loads((OFFICIAL / "commands.json").read_text())
SCRIPTS = [name for name in COMMANDS if name != "guanaco"]
SEED = shlex.split(
    "--model_name_or_path /root/autodl-tmp/model/Meta-Llama-3-8B --dataset alpaca --output_dir ./output --optim "
    "paged_adamw_8bit --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --max_steps 500 --learning_rate "
    "2.5e-5 --do_train True --logging_steps 30 --group_by_length True"
)


def words_of(script: str) -> list[str]:
    """The words of the command line of one of the script's shell scripts."""
    pairs = COMMANDS[script] + (COMMANDS["guanaco"] if "guanaco" in script else [])
    return [word for pair in pairs for word in pair.split(" ")]


def theirs() -> HfArgumentParser:
    """The script's own parser, over dataclasses with the fields of its own."""

    def kind(text: str) -> Any:
        name = re.search(r"bool|int|float|$", text.replace("Interval", "").replace("Union", ""))
        word = {"bool": bool, "int": int, "float": float}.get(name[0] if name else "", str)
        return Optional[word] if text.startswith("Optional") else word  # noqa: UP045

    classes = [
        dataclasses.make_dataclass(
            name,
            [
                (field, kind(about["type"]), dataclasses.field(default=about["default"]))
                for field, about in fields.items()
                if field not in ("label_names", "generation_config")
            ],
        )
        for name, fields in FIELDS.items()
    ]
    return HfArgumentParser(classes)


def test_the_table_has_every_flag_of_the_script_with_its_default():
    ours = {flag.name: flag for flag in FLAGS}
    official = {name: about for fields in FIELDS.values() for name, about in fields.items()}
    assert set(ours) - set(official) == {flag.name for flag in ADDED}
    assert set(official) - set(ours) == set()
    for name, about in official.items():
        assert ours[name].default == about["default"], name
        if ours[name].kind is not str:
            assert ours[name].kind.__name__ in about["type"], name


def test_what_is_handed_on_is_an_argument_of_todays_libraries():
    arguments = {field.name for field in dataclasses.fields(SFTConfig)}
    settings = set(GenerationConfig().to_dict())
    for flags, known in ((INHERITED, arguments), (GENERATION, settings)):
        handed_on = {flag.fate.name for flag in flags if isinstance(flag.fate, To)}
        assert handed_on <= known


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if isinstance(flag.fate, Only)], ids=lambda flag: flag.name)
def test_a_refused_flag_is_named_with_its_reason_and_what_happens_anyway_is_taken(flag: Flag):
    assert isinstance(flag.fate, Only)
    other = {bool: str(True not in flag.fate.values), int: "7", float: "0.25", str: "x"}[flag.kind]
    with pytest.raises(InputError, match=f"^--{flag.name}.* is refused: ") as error:
        parse(FLAGS, [f"--{flag.name}", other])
    assert flag.fate.reason in str(error.value)
    for value in flag.fate.values:
        assert parse(FLAGS, [f"--{flag.name}", str(value)])[flag.name] == value


def test_each_flag_that_is_obeyed_here_is_read_by_name_somewhere():
    source = (
        "".join(
            path.read_text()
            for path in Path(inspect.getfile(parse)).parent.glob("*.py")
            if path.stem not in ("table", "inherited", "__init__")
        )
        + Path(inspect.getfile(parse)).parents[2].joinpath("cli/qlora.py").read_text()
    )
    for flag in FLAGS:
        if isinstance(flag.fate, Own) and flag.name not in ("use_auth_token",):
            name = flag.name.replace("train_batch", "{part}_batch").replace("eval_batch", "{part}_batch")
            assert f'"{flag.name}"' in source or name in source, flag.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_papers_scripts_are_read_as_their_own_parser_reads_them(script: str):
    words = words_of(script)
    ours = parse(FLAGS, words)
    *parts, rest = theirs().parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    assert [word for word in rest if word.startswith("--")] in ([], ["--lora_modules"])
    for part in parts:
        for name, value in vars(part).items():
            assert ours[name] == value, name
    assert ours["lora_modules"] == "all"
    translated = translate(ours)
    assert translated.config().rank == 64
    assert translated.config().target_modules == "all-linear"


def test_random_command_lines_are_read_as_their_own_parser_reads_them():
    parser, draw = theirs(), random.Random(0)
    known = [flag for flag in FLAGS if not isinstance(flag.fate, Only) and flag not in ADDED]
    for _ in range(100):
        words = []
        for flag in draw.sample(known, 12):
            if flag.kind is bool:
                bare = [[f"--{flag.name}"]] if flag.bare else []
                no = [[f"--no_{flag.name}"]] if flag.default is True else []
                valued = [[f"--{flag.name}", word] for word in ("True", "no", "y", "0", "FALSE")]
                words += draw.choice([*bare, *no, *valued])
            else:
                value = {int: "12", float: "1e-3", str: "a b"}[flag.kind]
                words += draw.choice([[f"--{flag.name}", value], [f"--{flag.name}={value}"]])
        ours = parse(FLAGS, words)
        for part in parser.parse_args_into_dataclasses(words, look_for_args_file=False):
            assert {name: ours[name] for name in vars(part)} == vars(part), words


def test_the_command_line_of_the_tutorial_means_this_run():
    config = translate(parse(FLAGS, SEED)).config()
    assert (config.batch_size, config.gradient_accumulation_steps, config.max_steps) == (8, 4, 500)
    assert (config.learning_rate, config.optimizer, config.compute_dtype) == (2.5e-5, "paged_adamw_8bit", "float32")
    assert (config.rank, config.lora_alpha, config.lora_dropout, config.max_length) == (64, 16, 0.0, 1280)
    assert (config.lr_scheduler_type, config.warmup_ratio, config.max_grad_norm) == ("constant", 0.0, 0.3)
    assert config.data[0].path == "tatsu-lab/alpaca"


@pytest.mark.parametrize(("bits", "quant_type"), [(4, "nf4"), (8, "int8"), (16, "none")])
def test_the_bits_of_the_base_are_its_format(bits: int, quant_type: str):
    made = translate(parse(FLAGS, [*SEED, "--bits", str(bits), "--double_quant", "True"]))
    assert made.config().quant_type == quant_type
    assert made.config().double_quant == (bits == 4)
    assert any("double_quant" in note for note in made.notes) == (bits != 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lora_alpah 3", "no flag --lora_alpah (did you mean '--lora_alpha'?)"),
        ("–learning_rate 0.1", "did you mean '--learning_rate'?"),
        ("train.json", "no word 'train.json'"),
        ("--bits 5", "--bits 5: a base has 4, 8 or 16 bits"),
        ("--quant_type nf5", "did you mean 'nf4'?"),
        ("--lora_r 0", "--lora_r: 0 is wrong"),
        ("--lora_dropout 1.5", "--lora_dropout: 1.5 is wrong"),
        ("--optim adamw_hf", "use adamw_torch"),
        ("--optim paged_adamw_8bits", "did you mean 'paged_adamw_8bit'?"),
        ("--optim adamw_32bit", "--optim adamw_32bit: there is no such word"),
        ("--lr_scheduler_type cosinus", "did you mean 'cosine'?"),
        ("--dataset vicuna", "was not released"),
        ("--dataset alpacca", "did you mean 'alpaca'?"),
        ("--dataset_format alpac", "did you mean 'alpaca'?"),
        ("--do_predict", "needs --predict_with_generate"),
        ("--do_mmlu_eval", "set --do_eval too"),
        ("--do_eval --do_mmlu_eval --mmlu_dataset mmlu-os", "did you mean 'mmlu-zs'?"),
        ("--do_train False", "nothing to do"),
        ("--adam8bit --optim adamw_torch", "exclude each other"),
        ("--adafactor --optim sgd", "exclude each other"),
        ("--evaluation_strategy step", "did you mean 'steps'?"),
        ("--source_max_len 0", "at least 1"),
        ("--do_sample --temperature 0", "at least 1e-12"),
        ("--top_p 7", "at most 1"),
        ("--dataloader_num_workers -1", "at least 0"),
        ("--min_new_tokens 9 --max_new_tokens 3", "more than --max_new_tokens"),
        ("--metric_for_best_model los", "did you mean 'loss'?"),
        ("--log_level loud", "choose debug"),
        ("--lora_modules ,", "names no layers"),
        ("--max_steps many", "invalid int value"),
        ("--output_dir", "expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words: str, told: str):
    with pytest.raises(InputError) as error:
        translate(parse(FLAGS, words.split())).config()
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--warmup_ratio 0.1", "constant has no warm-up"),
        ("--max_new_tokens 32", "Without --do_predict nothing is generated"),
        ("--do_predict --predict_with_generate --top_p 0.9", "Without --do_sample"),
        ("--eval_steps 3", "--eval_steps does nothing without --evaluation_strategy steps"),
        ("--save_strategy no --save_steps 3", "--save_steps does nothing without --save_strategy steps"),
        ("--eval_delay 3", "Without --do_eval"),
        ("--eval_dataset_size 3 --max_eval_samples 2", "do nothing: --eval_dataset_size, --max_eval_samples"),
        ("--do_eval --mmlu_split test --max_mmlu_samples 5", "Without --do_mmlu_eval these do nothing"),
        ("--do_train no --do_eval --max_train_samples 9", "Without --do_train these do nothing"),
        ("--metric_for_best_model loss", "Without --load_best_model_at_end"),
        ("--num_train_epochs 3", "max_steps 10000 wins"),
        ("--logging_dir logs", "Without --report_to tensorboard"),
    ],
)
def test_what_another_flag_makes_void_is_told(words: str, told: str):
    assert any(told in note for note in translate(parse(FLAGS, words.split())).notes)


def test_an_evaluation_without_training_voids_no_flag_of_its_own():
    words = "--do_train no --do_predict --predict_with_generate --eval_dataset_size 3 --per_device_eval_batch_size 2"
    assert translate(parse(FLAGS, words.split())).notes == []


@pytest.mark.parametrize("name", OPTIMS)
def test_each_optimizer_that_is_taken_is_one_of_ours_and_of_the_trainer(name: str, tmp_path: Path):
    translated = translate(parse(FLAGS, ["--optim", name]))
    assert translated.config().optimizer == OPTIMS[name]
    assert trainer_arguments(translated.flags, tmp_path).optim == name


@pytest.mark.parametrize("words", [SEED, *map(words_of, SCRIPTS)], ids=["seed", *SCRIPTS])
def test_the_configuration_of_a_command_line_is_read_back_the_same(words: list[str], tmp_path: Path):
    translated = translate(parse(FLAGS, words))
    file = tmp_path / "run.yaml"
    file.write_text(translated.to_yaml(words))
    assert TrainConfig.from_yaml(file) == translated.config()
    text = file.read_text()
    for name in translated.lacking:
        assert f"# no counterpart: --{name} " in text


def test_epochs_count_where_max_steps_does_not():
    config = translate(parse(FLAGS, ["--max_steps", "-1", "--num_train_epochs", "2.5"])).config()
    assert (config.max_steps, config.epochs) == (None, 2.5)
