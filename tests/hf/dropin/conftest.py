"""halfbyte installed over the other libraries, and taken away again."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import halfbyte


@pytest.fixture
def installed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what transformers says about names of its next version
        halfbyte.install(cuda=False)
        try:
            yield
        finally:
            halfbyte.undo()


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def model(installed: None, tiny_model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(scope="session")
def even_model_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole blocks: bitsandbytes (0.50.2) computes wrong on a CPU where they are not."""
    folder = tmp_path_factory.mktemp("models") / "even"
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    config = AutoConfig.from_pretrained(tiny_model_folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def lora() -> Callable[..., LoraConfig]:
    return lambda **more: LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | more)
