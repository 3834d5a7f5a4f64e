"""The self-test: right kernels pass on every tier, and each operation that computes something else is found."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import native, reference
from halfbyte.plan.doctor import kernels
from halfbyte.plan.doctor.kernels import check
from halfbyte.plan.doctor.self_test import CASES, self_test

TIERS = native.tiers()
pytestmark = pytest.mark.skipif(not native.available(), reason="there is no native provider here")


@pytest.mark.parametrize("tier", TIERS)
def test_the_kernels_of_this_machine_are_right(tier: str):
    assert list(self_test("native", tier)) == []


def test_bitsandbytes_are_right_too_where_it_is_there():
    pytest.importorskip("bitsandbytes")
    assert list(self_test("bitsandbytes")) == []


def _disturbed(results: Any, by: float) -> Any:
    """The same results with one value of the last changed a little, as a kernel that forgets the tail leaves them."""
    whole = list(results) if isinstance(results, tuple) else [results]
    last = whole[-1].clone()
    flat = last.view(-1)
    flat[-1] = flat[-1] ^ 1 if flat.dtype == torch.uint8 else flat[-1] + by * (1 + flat.float().norm())
    whole[-1] = last
    return tuple(whole) if isinstance(results, tuple) else last


RETURNING = [
    "quantize_4bit", "dequantize_4bit", "quantize_coded", "matmul_4bit", "matmul_4bit_dx", "rms_norm",
    "rms_norm_gradient", "rms_norm_weight_gradient", "gated", "rotary", "attention", "attention_backward",
]  # fmt: skip


@pytest.mark.parametrize("name", RETURNING)
def test_an_operation_that_gives_one_wrong_value_is_found(name: str, monkeypatch: pytest.MonkeyPatch):
    right = getattr(native, name)
    monkeypatch.setattr(native, name, lambda *args: _disturbed(right(*args), 0.1))
    found = list(self_test("native", TIERS[0]))
    assert found and {finding.level for finding in found} == {"fault"}
    assert all(f"of native ({TIERS[0]})" in finding.value for finding in found)


def _wrong_int8(x: Tensor, blocksize: int) -> Any:
    return reference.quantize_int8(-x, blocksize)


def _wrong_gradient(dy: Tensor, gate: Tensor, up: Tensor, name: str, dgate: Tensor, dup: Tensor) -> None:
    reference.gated_gradient(dy, gate, up, name, dup, dgate)  # exchanged


def _wrong_sums(sums: Any) -> None:
    reference.matmul_sums([type(one)(one.terms[:1], one.out, one.bias) for one in sums])  # a term is lost


def _wrong_softmax(logits: Tensor, *rest: Any) -> None:
    reference.fold_softmax(logits, *rest)
    logits.mul_(1.5)


def _wrong_adamw(params: list[Tensor], grads: list[Tensor], *rest: Any) -> None:
    reference.adamw_32bit(params, [-grad for grad in grads], *rest)


def _wrong_adamw_8bit(params: list[Tensor], grads: list[Tensor], *rest: Any) -> None:
    reference.adamw_8bit(params, [-grad for grad in grads], *rest)


def _crashing(*_: Any) -> None:
    raise TypeError("incompatible function arguments")


OTHERS = {
    "quantize_int8": _wrong_int8, "gated_gradient": _wrong_gradient, "matmul_sums": _wrong_sums,
    "fold_softmax": _wrong_softmax, "adamw_32bit": _wrong_adamw, "adamw_8bit": _wrong_adamw_8bit, "gated": _crashing,
    "dequantize_int8": lambda weight, dtype: reference.dequantize_int8(weight, dtype) * 2,
    "dequantize_coded": lambda *args: reference.dequantize_coded(*args).flip(0),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_an_operation_that_computes_another_formula_is_found(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, name, OTHERS[name])
    found = list(check())
    wrong = [finding for finding in found if finding.what == "self-test"]
    assert wrong and all(finding.level == "fault" and finding.value.startswith(name) for finding in wrong)
    assert len(wrong) == len(TIERS)


def test_every_operation_of_the_contract_is_tried():
    from halfbyte.kernels.provider import Provider

    operations = {name for name in vars(Provider) if not name.startswith("_")}
    assert operations == set(RETURNING) | set(OTHERS)
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_tier_that_is_not_the_best_is_told_and_one_that_is_not_there_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HALFBYTE_ISA", "scalar")
    [tier] = [finding for finding in check() if finding.what == "instruction set"]
    assert tier.level == ("warning" if TIERS[0] != "scalar" else "ok")
    monkeypatch.setenv("HALFBYTE_ISA", "avx1024")
    found = list(check())
    [tier] = [finding for finding in found if finding.what == "instruction set"]
    assert tier.level == "fault" and tier.fix == "unset HALFBYTE_ISA"
    assert os.environ["HALFBYTE_ISA"] == "avx1024"
    assert [finding.level for finding in found if finding.what == "self-test"] == ["ok"]


def test_without_the_extension_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(native.runtime, "AVAILABLE", False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    found = {finding.what: finding for finding in check()}
    assert found["kernels"].level == "warning" and "reference" in found["kernels"].value
    assert "apt-get install g++" in found["kernels"].fix
    assert found["C++ compiler"].value == "none"
    (tmp_path / "_native.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    monkeypatch.setattr(kernels, "_folders", lambda: [tmp_path])
    [reason] = [finding.value for finding in check() if finding.what == "kernels"]
    assert reason == "reference; _native.cpython-39-x86_64-linux-gnu.so is for another Python or system"
    monkeypatch.setenv("HALFBYTE_ISA", "avx2")
    assert {finding.what: finding for finding in check()}["instruction set"].level == "fault"
