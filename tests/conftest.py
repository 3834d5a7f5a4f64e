"""A small real model for every layer's tests: random weights, a byte-level tokenizer, a chat template."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.bench import shapes

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

hypothesis.settings.register_profile("halfbyte", deadline=None)
hypothesis.settings.load_profile("halfbyte")
"""No test is about time: machines are busy."""


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collection: accelerate collects before each training run."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables of tokens that tests make are kept apart from the user's, also by the processes that tests start."""
    os.environ["HALFBYTE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama with two layers of 32 channels in bf16, one token per byte and two special tokens."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def save_tiny(folder: Path) -> Path:
    """Save the model of ``tiny_model_folder`` in ``folder``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,  # wide enough that an adapter can sway the logits
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mapped_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama in 4 bits with five layers of 1.3 MB, so that pages can be told, and a head that is not tied."""
    made = tmp_path_factory.mktemp("mapped") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.LARGE, "small", (256, 3072, 5, 4, 2, 64, 512))
        shapes.write_4bit_model("small", made)
    os.sync()  # what has not been written cannot be dropped
    return made


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved small models of two layers by family, with a byte-level tokenizer: encoders as trained on masked words."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_task_model(family, tmp_path_factory.mktemp("tasks") / family.replace(" ", "-"))
        return made[family]

    return folder


def save_task_model(family: str, folder: Path) -> Path:
    """Save a model of ``task_folder`` in ``folder``."""
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 259, "max_position_embeddings": 130, "pad_token_id": 0,
    }  # fmt: skip
    ends: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 1, "cls_token_id": 2, "sep_token_id": 1}
    t5: dict[str, Any] = {
        "vocab_size": 259, "d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    bart: dict[str, Any] = {
        "vocab_size": 259, "d_model": 32, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0,
        "max_position_embeddings": 130, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }  # fmt: skip
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "bert": ("BertForMaskedLM", shape),
        "roberta": ("RobertaForMaskedLM", shape),
        "distilbert": (
            "DistilBertForMaskedLM",
            {"dim": 32, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, **shape},
        ),
        "deberta": (
            "DebertaV2ForMaskedLM",
            shape | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 32},
        ),
        "modernbert": ("ModernBertForMaskedLM", shape | ends),
        "t5": ("T5ForConditionalGeneration", t5),
        "gated t5": ("T5ForConditionalGeneration", t5 | {"feed_forward_proj": "gated-gelu"}),
        "mt5": ("MT5ForConditionalGeneration", t5),
        "bart": ("BartForConditionalGeneration", bart),
    }
    name, options = kinds[family]
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**options))
        for parameter in model.parameters():  # wide enough that an adapter can sway what comes out
            if parameter.ndim > 1 and "T5" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    _task_tokenizer(is_pair=name.startswith(("Bert", "Deberta"))).save_pretrained(folder)
    return folder


def _task_tokenizer(is_pair: bool) -> PreTrainedTokenizerFast:
    special = {"<pad>": 0, "</s>": 1, "<s>": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = special | {character: i for i, character in enumerate(alphabet, start=len(special))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    names = ["input_ids", *(["token_type_ids"] if is_pair else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", bos_token="<s>", model_input_names=names
    )


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MyConfig(LlamaConfig):
    model_type = "my_llama"

class MyLM(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture
def own_code(tiny_model_folder: Path) -> Callable[[Path], Path]:
    """Copies the tiny model to a folder, as one that comes with code of its own."""

    def copy(folder: Path) -> Path:
        shutil.copytree(tiny_model_folder, folder)
        (folder / "modeling_my.py").write_text(OWN_CODE)
        own = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyLM"}
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "my_llama", "architectures": ["MyLM"], "auto_map": own}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy
