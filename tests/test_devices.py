"""Where a model runs: the choices, over plain values."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import devices
from halfbyte.errors import InputError
from halfbyte.hf.models import quantizer

GIB = 2**30


@pytest.mark.parametrize(
    ("wish", "has_gpu", "expected"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_auto_is_the_gpu_where_there_is_one_and_a_wish_is_a_wish(wish: Any, has_gpu: bool, expected: str) -> None:
    assert devices.chosen(wish, has_gpu, "13.0") == expected


@pytest.mark.parametrize(("built_for", "said"), [(None, "build for CPUs"), ("13.0", r"CUDA 13\.0\) sees no GPU")])
def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(built_for: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        devices.chosen("cuda", False, built_for)


def test_only_bf16_gives_way_to_fp16_and_only_where_the_chip_lacks_it() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert devices.supported(dtype, True) == dtype
    assert devices.supported(torch.bfloat16, False) == torch.float16
    assert devices.supported(torch.float32, False) == torch.float32


def test_what_the_allocator_has_and_does_not_use_is_free_too() -> None:
    assert devices.room(10 * GIB, 6 * GIB, 4 * GIB, 80 * GIB, None) == 12 * GIB


def test_a_limit_of_the_process_and_a_budget_bound_what_is_free() -> None:
    assert devices.room(70 * GIB, 6 * GIB, 4 * GIB, 24 * GIB, None) == 20 * GIB
    assert devices.room(70 * GIB, 6 * GIB, 4 * GIB, 24 * GIB, 10 * GIB) == 6 * GIB - devices.CONTEXT
    assert devices.room(GIB, 4 * GIB, 4 * GIB, 80 * GIB, 10 * GIB) == GIB
    with pytest.raises(InputError, match=r"memory is 4\.00 GiB, but the model and CUDA's context take 4\.50 GiB"):
        devices.room(70 * GIB, 6 * GIB, 4 * GIB, 80 * GIB, 4 * GIB)


def test_a_model_opens_on_the_device_that_is_named(tiny_model_folder: Path) -> None:
    assert halfbyte.load(tiny_model_folder, device="cpu").device == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device is cuda, but"):
            halfbyte.load(tiny_model_folder, device="cuda")


def test_no_more_than_one_weight_is_dense_while_a_model_is_quantized(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    most = 0

    def watched(name: str, dense: torch.Tensor, *rest: Any) -> Any:
        nonlocal most
        alive.append(weakref.ref(dense.untyped_storage()))
        most = max(most, sum(reference() is not None for reference in alive))
        return quantized(name, dense, *rest)

    quantized = quantizer.quantized
    monkeypatch.setattr(quantizer, "quantized", watched)
    halfbyte.load(tiny_model_folder, device="cpu")
    assert len(alive) == 14 and most == 1
