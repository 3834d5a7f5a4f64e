"""DoRA over 4-bit weights against PEFT's over a dense fp32 model that holds the dequantized weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import halfbyte
from halfbyte import kernels, quant
from halfbyte.hf.layers import dora
from halfbyte.nn import LowRank
from halfbyte.nn.dora import lengths, rescale, squared_lengths
from halfbyte.optim import AdamW

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))


def pair(folder: Path, dtype: torch.dtype, **options: object) -> tuple[PeftModel, PeftModel]:
    """A prepared model over 4 bits and PEFT's own over a dense copy, with the same adapters, away from their start."""
    torch.manual_seed(0)
    base = halfbyte.load(folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype=dtype))
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
    ours, theirs = halfbyte.prepare(get_peft_model(base, config)), get_peft_model(dense, config)
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
    adapters = {name: value for name, value in ours.state_dict().items() if "lora_" in name}
    assert not theirs.load_state_dict(adapters, strict=False).unexpected_keys
    return ours, theirs


def loss_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.fixture
def no_peft_norm(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make PEFT's DoRA, which expands the weight, fail from when it is called."""

    def forbid() -> None:
        def fail(*_: object, **__: object) -> None:
            raise AssertionError("the dense way was taken")

        monkeypatch.setattr("peft.tuners.lora.dora.DoraLinearLayer.forward", fail)

    return forbid


@pytest.mark.parametrize(
    ("dtype", "bound", "options"),
    [
        (torch.float32, 1e-4, {}),
        (torch.float32, 1e-4, {"use_rslora": True}),
        (torch.float32, 1e-4, {"lora_dropout": 0.4}),  # other dtypes draw other masks
        (torch.bfloat16, 5e-2, {}),
    ],
)
def test_outputs_and_all_gradients_are_pefts(
    tiny_model_folder: Path,
    dtype: torch.dtype,
    bound: float,
    options: dict[str, object],
    no_peft_norm: Callable[[], None],
) -> None:
    ours, theirs = pair(tiny_model_folder, dtype, **options)
    ours.train(), theirs.train()
    expected = loss_and_gradients(theirs)
    no_peft_norm()
    got = loss_and_gradients(ours)
    assert got.keys() == expected.keys() and sum("magnitude" in name for name in got) == 14
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < bound, (name, error)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(7, 33), (300, 257), (2050, 96)])
def test_lengths_are_those_of_the_dense_sum(shape: tuple[int, int], double_quant: bool) -> None:
    torch.manual_seed(2)
    out, width = shape
    weight = quant.quantize_4bit(torch.randn(shape), "nf4", 64, double_quant)
    adapter = LowRank(torch.randn(5, width), torch.randn(out, 5), 0.7)
    dense = weight.dequantize(torch.float32)
    torch.testing.assert_close(squared_lengths(weight), dense.square().sum(1))
    expected = (dense + 0.7 * adapter.b @ adapter.a).norm(dim=1)
    torch.testing.assert_close(lengths(weight, squared_lengths(weight), adapter), expected, rtol=1e-5, atol=1e-5)


def test_no_more_than_a_tile_is_dense_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quant.quantize_4bit(torch.randn(1000, 256), "nf4", 64, True)
    sizes: list[int] = []
    expand = kernels.dequantize_4bit
    monkeypatch.setattr("halfbyte.nn.dora.TILE", 2**16)
    monkeypatch.setattr(kernels, "dequantize_4bit", lambda w, d: sizes.append(w.shape.numel()) or expand(w, d))
    torch.testing.assert_close(squared_lengths(weight), expand(weight, torch.float32).square().sum(1))
    assert max(sizes) <= 2**16 and sum(sizes) == 256_000


@pytest.mark.parametrize("bias", [True, False])
def test_rescaling_is_differentiable_in_all_it_takes(bias: bool) -> None:
    torch.manual_seed(3)
    z, factors = torch.randn(3, 300, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    b = torch.randn(7, requires_grad=True) if bias else None
    dy = torch.randn(3, 300, 7)
    inputs = [x for x in (z, factors, b) if x is not None]
    expected = torch.autograd.grad(z * factors + (0 if b is None else b), inputs, dy)
    for got, wanted in zip(torch.autograd.grad(rescale(z, factors, b), inputs, dy), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_lengths_follow_every_change_of_the_adapter_and_are_kept_between(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair(tiny_model_folder, torch.float32)
    calls: list[None] = []
    compute = dora.lengths
    monkeypatch.setattr(dora, "lengths", lambda *args: calls.append(None) or compute(*args))
    trained = [p for p in ours.parameters() if p.requires_grad]
    steps = {
        "ours": AdamW(trained, lr=1e-2, state_bits=8),
        "torch's": torch.optim.SGD(trained, lr=1e-1),
    }
    for optimizer in steps.values():
        ours(input_ids=IDS, labels=IDS).loss.backward()
        before = len(calls)
        ours(input_ids=IDS)
        assert len(calls) == before  # an evaluation between two micro-batches computes nothing twice
        optimizer.step()
        optimizer.zero_grad()
        adapters = {name: value for name, value in ours.state_dict().items() if "lora_" in name}
        theirs.load_state_dict(adapters, strict=False)
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
        assert len(calls) == before + 14
    for name, parameter in ours.named_parameters():
        if "lora_A" in name:
            parameter.data = parameter.data * 2
            theirs.get_parameter(name).data = parameter.data
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)


def test_a_dora_adapter_opens_in_plain_peft_with_the_same_outputs(tiny_model_folder: Path, tmp_path: Path) -> None:
    ours, theirs = pair(tiny_model_folder, torch.float32)
    ours.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(theirs.unload(), tmp_path).eval()
    logits = ours.eval()(input_ids=IDS).logits
    torch.testing.assert_close(opened(input_ids=IDS).logits, logits, rtol=1e-3, atol=1e-4)
    again = halfbyte.load(tmp_path, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=0, atol=0)


def test_dora_works_together_with_other_adapters(tiny_model_folder: Path) -> None:
    ours, theirs = pair(tiny_model_folder, torch.float32)
    plain = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    for model in (ours, theirs):
        torch.manual_seed(4)
        model.add_adapter("plain", plain)
    halfbyte.prepare(ours)
    for names in (["default"], ["plain"], ["default", "plain"], ["plain", "default"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(names)
            model.eval()
        found, expected = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_small_changes_of_a_length_show_in_16_bits() -> None:
    z, factors = torch.full((4, 3), 200.0, dtype=torch.bfloat16), torch.tensor([1.0, 1.003, 0.997])
    assert rescale(z, factors, None)[0].tolist() == (200 * factors).bfloat16().tolist() == [200.0, 201.0, 199.0]
