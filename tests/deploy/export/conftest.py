"""What the tests of exports share: an adapter over a base, and the quick start's model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

SMOLLM2 = Path("~/.cache/halfbyte/SmolLM2-135M-Instruct").expanduser()


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter over a base, one that sways what it says, and returns its folder."""

    def adapted(base: Path, **options: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        given = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
        adapted = get_peft_model(model, LoraConfig(**given))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        folder = tmp_path / "adapter"
        adapted.save_pretrained(folder)
        return folder

    return adapted


@pytest.fixture(scope="session")
def wide_model_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, but so wide that its rows have groups of 64."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    config = LlamaConfig.from_pretrained(tiny_model_folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def smollm2() -> Path:
    """The quick start's model, where it was fetched."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("the quick start's model is not there; make quickstart fetches it")
    return SMOLLM2
