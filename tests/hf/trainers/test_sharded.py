"""A base that is divided over processes (FSDP2): its bytes come back as they went, and the training is that of one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.errors import InputError
from halfbyte.hf.trainers import sharded
from halfbyte.nn import Linear4bit, Linear8bit

SCRIPT = Path(__file__).with_name("sharded_run.py")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (66, 2), (7, 4)])
def test_bytes_held_as_bf16_are_the_same_bytes(inputs: int, outputs: int, double_quant: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(inputs, outputs, bias=False)
    layer = Linear4bit.from_linear(dense, double_quant=double_quant, compute_dtype=torch.float32)
    codes, values, x = layer.weight.clone(), layer.dequantize(), torch.randn(3, inputs)
    y, state = layer(x), layer.quantized_weight.state_dict()
    layer.hold_bytes_as(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.nbytes == codes.nbytes
    layer = layer.to(torch.float16)  # what casts a model must not cast these
    assert torch.equal(layer.quantized_weight.packed, codes) and torch.equal(layer.dequantize(), values)
    assert torch.equal(layer.float()(x), y)
    after = layer.quantized_weight.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


def test_every_pair_of_bytes_survives_as_a_bf16() -> None:
    """Among them all that are no number as bf16."""
    pairs = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    layer = Linear4bit.from_linear(nn.Linear(512, 512, bias=False))
    layer.weight.data.copy_(pairs.view(-1, 1))
    layer.hold_bytes_as(torch.bfloat16)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    assert torch.equal(layer.quantized_weight.packed.view(-1), pairs)


@pytest.mark.parametrize(("inputs", "outputs", "held"), [(64, 3, torch.bfloat16), (33, 4, torch.int8)])
def test_int8_is_held_as_bf16_where_rows_are_even(inputs: int, outputs: int, held: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Linear8bit.from_linear(nn.Linear(inputs, outputs), compute_dtype=torch.float32)
    codes, x = layer.weight.clone(), torch.randn(2, inputs)
    y = layer(x)
    layer.hold_bytes_as(torch.bfloat16)
    assert layer.weight.dtype == held
    assert torch.equal(layer.quantized_weight.codes, codes) and torch.equal(layer(x), y)
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}


def test_an_odd_number_of_bytes_stays_bytes() -> None:
    layer = Linear4bit.from_linear(nn.Linear(2, 3))
    layer.hold_bytes_as(torch.bfloat16)
    assert layer.weight.dtype == torch.uint8


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(InputError, match="Sequential has none that are held as ours"):
        sharded.shard(nn.Sequential(Linear4bit.from_linear(nn.Linear(4, 4))), "full_shard", torch.device("cpu"))


def run(model: Path, output: Path, processes: int, quant_type: str, how: str) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [str(SCRIPT), str(model), str(output), quant_type, how]
    command = [sys.executable, *(launch if processes > 1 else []), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    seen: dict[str, Any] = torch.load(output, weights_only=True)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quant_type", "how", "processes"),
    [("nf4", "full_shard", 2), ("nf4", "full_shard", 3), ("int8", "shard_grad_op", 2)],
)
def test_loss_and_gradients_are_those_of_one_process_with_the_whole_base(
    quant_type: str, how: str, processes: int, tiny_model_folder: Path, tmp_path: Path
) -> None:
    if processes == 3:  # whose rows do not divide: the bytes alone
        assert run(tiny_model_folder, tmp_path / "three", processes, quant_type, how)["same"]
        return
    one = run(tiny_model_folder, tmp_path / "one", 1, quant_type, how)
    many = run(tiny_model_folder, tmp_path / "many", processes, quant_type, how)
    assert many["same"] and many["held"] == one["held"] / processes
    for (loss, gradients), (ours, our_gradients) in zip(one["passes"], many["passes"], strict=True):
        torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
        assert our_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (our_gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    assert len(one["passes"][0][1]) == 28
