"""Classifiers and sequence-to-sequence models over 4 bits against PEFT's own layers over the dequantized weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from halfbyte import hf
from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.hf.models.heads import TASK_TYPES, head_names, modules_within, save_config, set_pad
from halfbyte.hf.models.limits import most_positions
from halfbyte.hf.models.new_tokens import add_tokens, give_rows
from halfbyte.nn import Linear4bit

ENCODERS = {
    "bert": {"query", "key", "value", "dense"},
    "roberta": {"query", "key", "value", "dense"},
    "distilbert": {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"},
    "deberta": {"query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj", "dense"},
    "modernbert": {"Wqkv", "Wi", "Wo"},
}
READERS = {
    "t5": {"q", "k", "v", "o", "wi", "wo"},
    "gated t5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
    "mt5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
    "bart": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}
CLASSES = ["bad", "fair", "good"]


def adapted(model: Any, task: Any) -> Any:
    """The model with LoRA on all linear layers and a trained head, the same for the same model."""
    heads = head_names(model) if task == "classify" else []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lora = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            exclude_modules=modules_within(model, heads) or None,
            modules_to_save=heads or None,
            task_type=TASK_TYPES[task],
            init_lora_weights=False,
        )
        return get_peft_model(model, lora)


def both(folder: Path, task: Any) -> tuple[Any, Any]:
    """A model in 4 bits that computes in fp32, and PEFT's over the dense fp32 weights that the 4 bits stand for."""
    quantization = hf.HalfbyteConfig(compute_dtype=torch.float32)
    classes = CLASSES if task == "classify" else None
    base = hf.load(folder, quantization_config=quantization, task=task, classes=classes)
    if task == "classify":
        base.config.pad_token_id = 0
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    dense.set_attn_implementation("eager")
    return hf.prepare(adapted(base, task)).eval(), adapted(dense, task).eval()


def batch_for(model: Any, task: Any) -> dict[str, Tensor]:
    """Two rows of 13 and 8 tokens that end with the stop token, and their labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 259, (2, 13), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, -1] = ids[1, 7] = 1
    ids[1, 8:] = mask[1, 8:] = 0
    labels = torch.tensor([2, 0]) if task == "classify" else torch.randint(3, 259, (2, 5), generator=generator)
    if task == "seq2seq":
        labels[1, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    ("family", "task"),
    [*((name, "classify") for name in (*ENCODERS, "t5", "bart", "llama")), *((name, "seq2seq") for name in READERS)],
)
def test_logits_and_gradients_of_lora_and_head_are_peft_s_over_the_dequantized_weights(
    family: str, task: str, task_folder: Callable[[str], Path], tiny_model_folder: Path
) -> None:
    folder = tiny_model_folder if family == "llama" else task_folder(family)
    ours, theirs = both(folder, task)
    layers = {name.rpartition(".")[2] for name, module in ours.named_modules() if hasattr(module, "lora_A")}
    if wanted := (ENCODERS if task == "classify" else READERS).get(family):
        assert layers == wanted
    assert sum(isinstance(module, Linear4bit) for module in ours.modules()) > 5

    batch = batch_for(ours, task)
    outputs = []
    for model in (ours, theirs):
        output = model(**batch)
        output.loss.backward()
        outputs.append(output.logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert gradients[0].keys() == gradients[1].keys()
    heads = [name for name in gradients[0] if ".modules_to_save." in name]
    assert bool(heads) == (task == "classify")
    for name, gradient in gradients[1].items():
        assert gradient is not None and gradients[0][name] is not None, name
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7, msg=name
        )


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_the_head_is_fp32_over_bf16_layers_and_stays_so_when_the_adapter_is_opened(
    family: str, task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base: Any = hf.load(task_folder(family), task="classify", classes=CLASSES)
    assert base.dtype == torch.bfloat16
    model = hf.prepare(adapted(base, "classify")).eval()
    own = {name: p for name, p in model.named_parameters() if ".modules_to_save." in name}
    assert own and {p.dtype for p in own.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(1e-4)  # less than bf16 tells apart
    batch = batch_for(model, "classify")
    del batch["labels"]
    logits = model(**batch).logits
    assert logits.dtype == torch.float32

    model.save_pretrained(tmp_path)
    save_config(model, tmp_path)
    opened: Any = hf.load(tmp_path)
    assert opened.config.id2label == dict(enumerate(CLASSES))
    assert torch.equal(opened(**batch).logits, logits)
    assert isinstance(opened.base_model.model, type(base))


def test_the_adapter_and_its_head_open_in_plain_peft_over_the_dequantized_base(
    task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    ours, _ = both(task_folder("roberta"), "classify")
    ours.save_pretrained(tmp_path)
    save_config(ours, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.label2id == {"bad": 0, "fair": 1, "good": 2}
    plain = AutoModelForSequenceClassification.from_pretrained(
        task_folder("roberta"), config=config, dtype=torch.float32
    )
    for name, module in ours.get_base_model().named_modules():
        weight = getattr(module, "base_layer", module)
        if isinstance(weight, Linear4bit) and not name.endswith(".base_layer"):
            plain.get_submodule(name).weight = nn.Parameter(weight.quantized_weight.dequantize(torch.float32))
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    batch = batch_for(ours, "classify")
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_peft_alone_has_saved_tells_its_number_of_classes_by_its_head(
    task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(task_folder("distilbert"), num_labels=5)
    lora = LoraConfig(target_modules=["q_lin"], modules_to_save=["pre_classifier"], task_type="SEQ_CLS")
    get_peft_model(plain, lora).save_pretrained(tmp_path)
    opened: Any = hf.load(tmp_path)
    assert opened.config.num_labels == 5 and opened.config.id2label[4] == "LABEL_4"


def test_a_pooler_that_the_checkpoint_lacks_is_trained_whole_and_one_that_it_has_gets_lora(
    task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    new: Any = hf.load(task_folder("bert"), task="classify", classes=CLASSES)
    assert head_names(new) == ["classifier", "bert.pooler"]
    options = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertForSequenceClassification(BertConfig(**options, vocab_size=259, num_labels=2)).save_pretrained(tmp_path)
    known: Any = hf.load(tmp_path, task="classify", classes=CLASSES)
    assert head_names(known) == ["classifier"]
    assert known.classifier.weight.shape == (3, 32)  # made anew: the checkpoint's told two classes apart


@pytest.mark.slow
def test_activations_of_encoders_and_of_encoders_with_decoders_are_planned_and_recomputed_alike(
    task_folder: Callable[[str], Path],
) -> None:
    for family, task in (("bert", "classify"), ("t5", "seq2seq"), ("bart", "seq2seq")):
        model, _ = both(task_folder(family), task)
        model.train()
        batch = batch_for(model, task)
        found = []
        for recompute in (False, True):
            policy = activations.plan(model, length=13, batch_size=2, free=2**34, recompute=recompute)
            assert (policy.recomputed, policy.kept) == ((0, 2), (2, 0))[recompute] or task == "seq2seq"
            activations.apply(model, policy)
            model.zero_grad()
            torch.manual_seed(0)  # of dropout
            model(**batch).loss.backward()
            found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_positions_of_roberta_begin_behind_the_padding_s(task_folder: Callable[[str], Path]) -> None:
    model: Any = hf.load(task_folder("roberta"), task="classify", classes=CLASSES)
    limit = most_positions(model)
    assert limit == 129  # of 130: padding is 0
    model(input_ids=torch.full((1, 129), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 130), 5))


def test_a_pad_token_is_told_to_a_decoder_that_classifies(tiny_model_folder: Path) -> None:
    model: Any = hf.load(tiny_model_folder, task="classify", classes=CLASSES)
    model.config.pad_token_id = None
    set_pad(model, hf.load_tokenizer(tiny_model_folder))
    ids = torch.randint(0, 256, (1, 6))
    padded = torch.cat([ids, torch.full((1, 3), model.config.pad_token_id)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(ids).logits, rtol=0.02, atol=0.02)


def test_a_classifier_gets_rows_for_new_tokens_though_it_writes_none(tiny_model_folder: Path) -> None:
    model: Any = hf.load(tiny_model_folder, task="classify", classes=CLASSES)
    tokens = add_tokens(hf.load_tokenizer(tiny_model_folder), ["<never>", "<ever>"])
    rows = give_rows(model, tokens)
    assert rows == {"model.embed_tokens": [token.id for token in tokens]}
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows, task_type="SEQ_CLS")
    peft = get_peft_model(model, lora)
    peft(torch.tensor([[5, tokens[1].id]])).logits.square().sum().backward()
    (delta,) = [value for name, value in peft.named_parameters() if "token_adapter" in name and value.requires_grad]
    assert delta.grad[1].any() and not delta.grad[0].any()


@pytest.mark.parametrize(
    ("family", "task", "sentence"),
    [
        ("llama", "seq2seq", "is a llama model, which is not an encoder with a decoder, as task seq2seq needs"),
        ("bert", "seq2seq", "is a bert model, which is not an encoder with a decoder, as task seq2seq needs"),
    ],
)
def test_a_model_that_is_not_for_the_task_is_refused(
    family: str, task: Any, sentence: str, task_folder: Callable[[str], Path], tiny_model_folder: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        hf.load(tiny_model_folder if family == "llama" else task_folder(family), task=task)
