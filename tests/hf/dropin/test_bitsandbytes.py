"""bitsandbytes' names as ours, beside the real bitsandbytes 0.50.2; and the modules that stand in where there is none.

The kernel by which bitsandbytes dequantizes on this CPU misplaces the constants of rows that are not of whole blocks
(``backends/cpu``); where a shape has such rows, what its definition (``backends/default``) gives is the oracle.
"""

import copy
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as real
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn.modules import Linear4bit as RealLinear4bit
from bitsandbytes.nn.modules import Linear8bitLt as RealLinear8bitLt
from bitsandbytes.nn.modules import Params4bit as RealParams4bit
from bitsandbytes.optim.adamw import AdamW8bit as RealAdamW8bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import halfbyte
import halfbyte.nn
from halfbyte.hf.dropin import (
    bitsandbytes,
    bnb_embeddings,
    bnb_functional,
    bnb_layers,
    bnb_layers_8bit,
    bnb_optimizers,
    said,
)
from halfbyte.hf.dropin.bnb_state import QuantState
from halfbyte.hf.layers import adapters
from halfbyte.optim import AdamW

F = real.functional
ABSENT = Path(__file__).parent / "without_bitsandbytes.py"


@pytest.fixture
def installed() -> Iterator[None]:
    """The rows over the real bitsandbytes, in place meanwhile."""
    undos = [row.put() for row in bitsandbytes.rows()]
    yield
    for undo in reversed(undos):
        undo()
    said.forget()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def defined(packed: Tensor, state: F.QuantState) -> Tensor:
    """What bitsandbytes' definition dequantizes to."""
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    code = F.get_4bit_type(state.quant_type, "cpu")
    return _dequantize_4bit_compute(packed.view(-1), absmax, code, state.blocksize, state.shape, state.dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "blocksize"), [((64, 64), 64), ((33, 66), 32), ((1000, 160), 1024), ((130,), None)])
def test_four_bits_are_those_of_bitsandbytes(
    quant_type: str, dtype: torch.dtype, shape: tuple[int, ...], blocksize: int | None
) -> None:
    x = random(*shape, dtype=dtype)
    ours, state = bnb_functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    theirs, their_state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(ours, theirs) and ours.shape == theirs.shape
    assert torch.equal(state.absmax, their_state.absmax)
    assert torch.equal(state.code, their_state.code.cpu())
    wanted = defined(theirs, their_state)
    assert torch.equal(bnb_functional.dequantize_4bit(ours, state), wanted)
    # each library takes the other's state
    assert torch.equal(bnb_functional.dequantize_4bit(theirs, their_state), wanted)
    assert torch.equal(F.dequantize_4bit(ours, state), F.dequantize_4bit(theirs, their_state))
    assert torch.equal(bnb_functional.dequantize_4bit(ours.T, state), wanted.T if wanted.ndim == 2 else wanted)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_packed_bytes_are_seen_as_the_storage_that_was_asked_for(storage: torch.dtype) -> None:
    x = random(16, 128)
    ours, state = bnb_functional.quantize_4bit(x, quant_storage=storage)
    theirs, _ = F.quantize_4bit(x, quant_storage=storage)
    assert ours.dtype == storage and ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(
        bnb_functional.dequantize_4bit(ours, state), bnb_functional.dequantize_4bit(ours.view(torch.uint8), state)
    )


def test_double_quantization_differs_from_bitsandbytes_in_few_second_nearest_codes() -> None:
    x = random(1000, 192)
    ours, state = bnb_functional.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
    theirs, their_state = F.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
    assert torch.equal(ours, theirs)
    assert state.offset == their_state.offset
    assert torch.equal(state.state2.absmax, their_state.state2.absmax)
    assert (state.absmax != their_state.absmax).float().mean() < 0.01
    # of the same state, the same values
    assert torch.equal(bnb_functional.dequantize_4bit(theirs, their_state), F.dequantize_4bit(theirs, their_state))


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_is_written_and_read_as_bitsandbytes_does(nested: bool) -> None:
    packed, theirs = F.quantize_4bit(random(64, 96), compress_statistics=nested, quant_type="nf4")
    ours = QuantState.from_dict(theirs.as_dict(packed=True), "cpu")
    written, theirs_written = ours.as_dict(packed=True), theirs.as_dict(packed=True)
    assert list(written) == list(theirs_written)
    assert all(torch.equal(written[key], theirs_written[key]) for key in written)
    again = F.QuantState.from_dict(dict(written), "cpu")
    assert torch.equal(F.dequantize_4bit(packed, again), F.dequantize_4bit(packed, theirs))
    assert QuantState.from_dict(ours.as_dict(), "cpu") == ours
    assert ours[3] == theirs[3] and ours[5] == theirs[5]


@pytest.mark.parametrize("nested", [False, True])
def test_bytes_are_the_nearest_codes_and_differ_from_bitsandbytes_in_few(nested: bool) -> None:
    x, blocksize = random(70, 96), 256
    ours, state = bnb_functional.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    theirs, their_state = F.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    assert ours.shape == theirs.shape and (ours != theirs).float().mean() < 0.01
    assert torch.allclose(
        bnb_functional.dequantize_blockwise(theirs, their_state), F.dequantize_blockwise(theirs, their_state), atol=1e-6
    )
    blocks = x.view(-1)[: x.numel() // blocksize * blocksize].view(-1, blocksize)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    distance = (scaled.unsqueeze(-1) - state.code).abs()
    chosen = distance.gather(-1, ours.view(-1)[: blocks.numel()].view_as(blocks).long().unsqueeze(-1)).squeeze(-1)
    assert (chosen - distance.amin(-1)).max() < 1e-6


def test_a_table_that_is_not_ascending_is_taken_as_it_is() -> None:
    x, code = random(512), F.create_dynamic_map().flip(0)
    ours, state = bnb_functional.quantize_blockwise(x, code=code, blocksize=64)
    plain, plain_state = bnb_functional.quantize_blockwise(x, blocksize=64)
    assert torch.equal(
        bnb_functional.dequantize_blockwise(ours, state), bnb_functional.dequantize_blockwise(plain, plain_state)
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"blocksize": 48}, ValueError), ({"quant_type": "int4"}, ValueError), ({"A": torch.ones(4).long()}, ValueError)],
)
def test_errors_are_of_the_types_of_bitsandbytes(arguments: dict[str, object], error: type[Exception]) -> None:
    for quantize in (F.quantize_4bit, bnb_functional.quantize_4bit):
        with pytest.raises(error):
            quantize(**{"A": random(8, 8), **arguments})


def twins(bias: bool = True, dtype: torch.dtype | None = None, **options: object) -> tuple[nn.Module, nn.Module]:
    """A layer of each library over the same dense weight, quantized."""
    dense = nn.Linear(128, 70, bias=bias)
    layers = []
    for kind in (bnb_layers.Linear4bit, RealLinear4bit):
        layer = kind(128, 70, bias=bias, **options)
        layer.load_state_dict(dense.state_dict())
        layers.append(layer.to("cpu") if dtype is None else layer.to("cpu").to(dtype))
    return layers[0], layers[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
def test_a_layer_computes_what_that_of_bitsandbytes_does(
    bias: bool, quant_type: str, compute_dtype: torch.dtype | None
) -> None:
    ours, theirs = twins(bias, quant_type=quant_type, compute_dtype=compute_dtype, compress_statistics=False)
    assert torch.equal(ours.weight, theirs.weight) and ours.weight.dtype == torch.uint8
    x = random(5, 128).requires_grad_()
    again = x.detach().clone().requires_grad_()
    y, wanted = ours(x), theirs(again)
    assert y.dtype == wanted.dtype
    y.sum().backward()
    wanted.sum().backward()
    tolerance = 1e-5 if compute_dtype != torch.bfloat16 else 2e-2  # bf16: 8 bits, sums of 96
    assert torch.allclose(y, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
    assert torch.allclose(x.grad, again.grad, rtol=tolerance, atol=tolerance * again.grad.abs().max().item())
    assert not ours.weight.requires_grad and isinstance(ours, halfbyte.nn.Linear4bit)


def test_state_dicts_are_the_same_and_go_both_ways() -> None:
    ours, theirs = twins(quant_type="nf4", compress_statistics=False)
    written, wanted = ours.state_dict(), theirs.state_dict()
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], wanted[key]) for key in written)
    fresh = bnb_layers.Linear4bit(128, 70, quant_type="nf4")
    fresh.load_state_dict(wanted)
    x = random(3, 128)
    assert torch.equal(fresh(x), ours(x))
    assert fresh.weight.quant_state is fresh.quant_state and fresh.weight.bnb_quantized


def test_a_layer_is_quantized_by_its_first_forward_and_not_by_a_cast() -> None:
    layer = bnb_layers.LinearNF4(64, 32).to(torch.bfloat16)
    assert layer.weight.quant_state is None and layer.weight.dtype == torch.bfloat16
    layer(random(2, 64).bfloat16())
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.uint8


def test_a_weight_that_a_script_puts_into_a_layer_is_the_one_that_counts() -> None:
    layer = bnb_layers.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    dense = random(32, 64, seed=1)
    layer.weight = bnb_layers.Params4bit(dense, quant_type="nf4", compress_statistics=False).to("cpu")
    packed, state = F.quantize_4bit(dense, quant_type="nf4")
    x = random(2, 64)
    assert torch.allclose(layer(x), x @ F.dequantize_4bit(packed, state).T, atol=1e-5)
    loaded = bnb_layers.Params4bit.from_prequantized(packed, state.as_dict(packed=True), device="cpu", module=layer)
    assert torch.equal(loaded, packed) and layer.quant_state is loaded.quant_state


@pytest.mark.parametrize("kind", [bnb_layers.LinearNF4, bnb_layers_8bit.Linear8bitLt])
def test_copies_and_files_keep_what_belongs_to_the_weight(kind: type[nn.Module]) -> None:
    options = {"has_fp16_weights": False} if kind is bnb_layers_8bit.Linear8bitLt else {}
    layer = kind(64, 32, **options).to("cpu")
    x = random(2, 64)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and torch.equal(loaded(x), layer(x))


def test_an_int8_layer_holds_the_bytes_of_bitsandbytes_and_is_nearer_to_its_weights() -> None:
    dense = nn.Linear(96, 70)
    layers = []
    for kind in (bnb_layers_8bit.Linear8bitLt, RealLinear8bitLt):
        layer = kind(96, 70, has_fp16_weights=False)
        layer.load_state_dict(dense.state_dict())
        layers.append(layer.to("cpu"))
    ours, theirs = layers
    written = ours.state_dict()
    assert written.keys() == theirs.state_dict().keys()
    assert torch.equal(ours.weight.SCB, theirs.weight.SCB)
    # theirs divides in fp16, so that a value halfway between two integers may fall to either side
    difference = (ours.weight.data.int() - theirs.weight.data.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.02
    x = random(4, 96).requires_grad_()
    exact = x @ (ours.weight.data * (ours.weight.SCB[:, None] / 127)).T + ours.bias
    y = ours(x)
    assert torch.allclose(y, exact, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, torch.autograd.grad(exact.sum(), x)[0], atol=1e-5)
    assert (theirs(x.half()).float() - exact).abs().max() < 0.1 * exact.abs().max()
    fresh = bnb_layers_8bit.Linear8bitLt(96, 70, has_fp16_weights=False)
    fresh.load_state_dict(written)
    assert torch.equal(fresh(x), y)
    for kind in (bnb_layers_8bit.Linear8bitLt, RealLinear8bitLt):
        with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into"):
            kind(96, 70, has_fp16_weights=True).load_state_dict(written)


def test_rows_of_any_number_of_dimensions_are_rounded_as_bitsandbytes_does() -> None:
    x = random(3, 5, 96)
    ours = bnb_functional.int8_vectorwise_quant(x)
    theirs = F.int8_vectorwise_quant(x.view(15, 96))  # which takes more dimensions on a GPU only
    assert torch.equal(ours[0], theirs[0].view(3, 5, 96)) and torch.equal(ours[1], theirs[1])


def test_layers_of_a_model_of_ours_count_as_those_of_bitsandbytes() -> None:
    layer = halfbyte.nn.Linear4bit.from_linear(nn.Linear(64, 32), "nf4")
    assert isinstance(layer, bnb_layers.Linear4bit) and isinstance(layer, bnb_layers.LinearNF4)
    assert not isinstance(layer, bnb_layers.LinearFP4) and not isinstance(nn.Linear(2, 2), bnb_layers.Linear4bit)
    assert not isinstance(layer, bnb_layers_8bit.Linear8bitLt)
    assert not isinstance(layer.weight, bnb_layers.Params4bit)
    own = type("Own", (bnb_layers.Linear4bit,), {})
    assert not isinstance(layer, own) and isinstance(own(64, 32), bnb_layers.Linear4bit)
    dense = layer.dequantize()
    bnb_layers.show_quant_states(nn.Sequential(layer))
    assert isinstance(layer.weight, bnb_layers.Params4bit) and not isinstance(
        nn.Parameter(dense), bnb_layers.Params4bit
    )
    state = copy.deepcopy(layer.weight.quant_state)
    state.dtype = torch.float16  # as scripts do that dequantize a model by hand
    assert torch.equal(F.dequantize_4bit(layer.weight.data, state, quant_type="nf4"), dense.half())


def test_an_adapter_over_a_scripts_own_layers_learns_as_over_dense_ones(tiny_model_folder: Path) -> None:
    def gradients(of_four_bits: bool) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        for name, dense in list(model.named_modules()):
            if isinstance(dense, nn.Linear) and name != "lm_head":
                layer = bnb_layers.LinearNF4(dense.in_features, dense.out_features, bias=False)
                layer.load_state_dict(dense.state_dict())
                layer.to("cpu")
                if of_four_bits:
                    model.set_submodule(name, layer)
                else:
                    dense.weight.data = layer.dequantize()
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        if of_four_bits:
            halfbyte.prepare(model)
        loss = model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss
        loss.backward()
        return loss, [p.grad for p in model.parameters() if p.grad is not None]

    (loss, ours), (wanted, dense) = gradients(True), gradients(False)
    assert torch.allclose(loss, wanted, rtol=1e-5) and len(ours) == len(dense) == 28
    for mine, theirs in zip(ours, dense, strict=True):
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


def test_a_model_of_ours_is_dequantized_by_hand_as_scripts_do_and_keeps_its_fast_path(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig())
    bnb_layers.show_quant_states(model)
    count = 0
    for module in model.modules():
        if isinstance(module, bnb_layers.Linear4bit):
            state = copy.deepcopy(module.weight.quant_state)
            state.dtype = torch.float32
            dense = bnb_functional.dequantize_4bit(module.weight.data, quant_state=state, quant_type="nf4")
            assert torch.equal(dense.bfloat16(), module.dequantize()) and dense.shape == (
                module.out_features,
                module.in_features,
            )
            count += 1
    assert count == 14
    model = halfbyte.prepare(get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")))
    assert type(model.base_model.model.model.layers[0].mlp.up_proj).__name__ == "LoraLinear4bit"
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("name", ["Embedding", "StableEmbedding"])
def test_embeddings_begin_and_compute_as_those_of_bitsandbytes(name: str) -> None:
    layers = []
    for kind in (getattr(bnb_embeddings, name), getattr(real.nn, name)):
        torch.manual_seed(0)
        layers.append(kind(20, 12, padding_idx=3))
    ids = torch.tensor([[1, 3], [19, 0]])
    ours, theirs = (layer(ids) for layer in layers)
    assert torch.equal(ours, theirs) and ours.shape == (2, 2, 12)
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    bnb_optimizers.GlobalOptimManager.get_instance().initialize()
    real.optim.GlobalOptimManager.get_instance().initialize()


def test_optimizers_step_as_ours_by_the_names_and_defaults_of_bitsandbytes() -> None:
    assert set(bnb_optimizers.OPTIMIZERS) == {
        name for name in dir(real.optim) if name.startswith(("Adam", "PagedAdam"))
    }
    for name, kind in bnb_optimizers.OPTIMIZERS.items():
        p, q = (nn.Parameter(random(80, 80)) for _ in range(2))
        theirs = getattr(real.optim, name)([nn.Parameter(random(2))])
        bits = 8 if "8bit" in name else 32
        ours = kind([p], lr=0.01)
        assert {k: ours.defaults[k] for k in ("betas", "eps", "weight_decay")} == {
            k: theirs.defaults[k] for k in ("betas", "eps", "weight_decay")
        }
        assert (ours.page_dir is not None) == theirs.is_paged == name.startswith("Paged")
        assert ours.state_bits == bits
        wanted = AdamW([q], lr=0.01, weight_decay=theirs.defaults["weight_decay"], state_bits=bits)
        for step in range(2):
            p.grad = q.grad = random(80, 80, seed=step)
            ours.step()
            wanted.step()
        assert torch.equal(p, q)
    assert isinstance(ours, AdamW) and "bitsandbytes" not in repr(type(ours))


def test_eight_bit_steps_are_near_those_of_bitsandbytes() -> None:
    p, q = (nn.Parameter(random(128, 64)) for _ in range(2))
    ours, theirs = bnb_optimizers.OPTIMIZERS["AdamW8bit"]([p], lr=1e-2), RealAdamW8bit([q], lr=1e-2)
    for step in range(5):
        p.grad = q.grad = random(128, 64, seed=step)
        ours.step()
        theirs.step()
    moved = (q - random(128, 64)).abs().mean()
    assert (p - q).abs().mean() < 0.02 * moved  # second nearest codes


def test_the_manager_says_how_many_bits_single_parameters_have(installed: None) -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100))
    other = nn.Parameter(random(90, 90))
    manager = real.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    manager.override_config(other, "optim_bits", 32)
    optimizer = real.optim.AdamW8bit([*model.parameters(), other])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    dtypes = [optimizer.state[p]["exp_avg"].dtype for p in (model[0].weight, model[1].weight, other)]
    assert dtypes == [torch.float32, torch.uint8, torch.float32]
    manager.override_config(other, "lr", 0.1)
    again = real.optim.AdamW8bit([other])
    with pytest.raises(ValueError, match=r"GlobalOptimManager was told \{'lr': 0.1\}"):
        again.step()
    manager.initialize()


@pytest.mark.parametrize(
    "option", [{"amsgrad": True}, {"optim_bits": 8}, {"percentile_clipping": 5}, {"block_wise": False}]
)
def test_an_option_that_there_is_not_is_refused_by_name(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"AdamW8bit does not take {next(iter(option))}="):
        bnb_optimizers.OPTIMIZERS["AdamW8bit"]([nn.Parameter(random(2))], **option)


def test_over_the_real_one_its_layers_and_optimizers_are_ours_and_the_rest_its_own(installed: None) -> None:
    assert real.nn.Linear4bit is bnb_layers.Linear4bit and real.nn.modules.Params4bit is bnb_layers.Params4bit
    assert real.optim.PagedAdamW8bit is bnb_optimizers.OPTIMIZERS["PagedAdamW8bit"]
    assert real.optim.adamw.AdamW8bit is real.optim.AdamW8bit
    assert (
        real.functional.quantize_4bit is F.quantize_4bit and real.optim.Lion8bit.__module__ == "bitsandbytes.optim.lion"
    )
    layer = real.nn.LinearNF4(128, 64, bias=False).to("cpu")
    x = random(2, 128)
    y = real.matmul_4bit(x, layer.weight, quant_state=layer.weight.quant_state)
    assert torch.allclose(y, layer(x), atol=1e-4)
    table = real.nn.EmbeddingNF4(16, 64)  # its layer over our parameter
    rows = table.weight.data.clone()
    table = table.to("cpu")
    assert (table(torch.arange(16)) - rows).abs().max() < 0.25 * rows.abs().max()


def test_undone_the_real_one_is_as_it_was() -> None:
    where = [row.where.split(":") for row in bitsandbytes.rows()]
    before = [getattr(sys.modules[module], name) for module, name in where]
    assert RealParams4bit in before and RealAdamW8bit in before
    undos = [row.put() for row in bitsandbytes.rows()]
    assert all(getattr(sys.modules[m], n) is not old for (m, n), old in zip(where, before, strict=True))
    for undo in reversed(undos):
        undo()
    assert [getattr(sys.modules[module], name) for module, name in where] == before


def test_where_it_is_not_installed_modules_stand_in_and_libraries_go_on_without(tiny_model_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, ABSENT, tiny_model_folder], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    x = torch.tensor(said["x"])
    packed, state = F.quantize_4bit(x, quant_type="nf4", blocksize=64)
    assert packed.flatten().tolist() == said["packed"]
    assert defined(packed, state).tolist() == said["dequantized"]


def test_an_adapter_over_layers_put_in_by_hand_takes_the_fast_path(tiny_model_folder: Path) -> None:
    halfbyte.install(cuda=False)
    try:
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
        for name, dense in [*base.named_modules()]:
            if name.endswith("_proj"):
                layer = bnb_layers.Linear4bit(
                    dense.in_features, dense.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                layer.load_state_dict(dense.state_dict())
                base.set_submodule(name, layer.to("cpu"))
        opened = AutoModelForCausalLM.from_pretrained(
            tiny_model_folder,
            dtype=torch.bfloat16,
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
            attn_implementation="sdpa",
        )
        grads = []
        for made in (base, opened):
            torch.manual_seed(0)
            model = get_peft_model(made, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
            first = model.base_model.model.model.layers[0]
            assert type(first).__module__ == "halfbyte.hf.layers.fusion"
            assert adapters._projection(first.mlp.up_proj) is not None
            ids = torch.arange(40).view(2, 20)
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    finally:
        halfbyte.undo()
