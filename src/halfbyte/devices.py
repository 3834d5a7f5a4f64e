"""Where a model runs, what it computes in there, and how much memory there is for it.

``auto`` is the CUDA GPU that torch sees, or else the CPU. MPS and XPU are never chosen: a script may put a model there
(``device_map="mps"``), and the reference's torch operations run. That has not been tried.

Each choice is a function of plain values, and beside it one that asks torch for them.
"""

import logging

import torch

from halfbyte.choices import Device
from halfbyte.errors import InputError, size_text

logger = logging.getLogger(__name__)

CONTEXT = 2**29
"""Bytes of a GPU that CUDA and its libraries take in a process, which torch's allocator does not count."""


def choose(wish: Device) -> torch.device:
    """Return the device for ``wish``: of several GPUs the current one.

    Raises:
        InputError: it is CUDA, and torch sees no CUDA GPU.
    """
    kind = chosen(wish, torch.cuda.is_available(), torch.version.cuda)
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def check(wish: Device) -> None:
    """Refuse a device that is not there, before there is work on it.

    Raises:
        InputError: as :func:`choose`.
    """
    chosen(wish, torch.cuda.is_available(), torch.version.cuda)


def chosen(wish: Device, has_gpu: bool, built_for: str | None) -> str:
    """Return the type of device for ``wish``.

    Args:
        wish: ``auto``, ``cpu`` or ``cuda``.
        has_gpu: whether torch sees a CUDA GPU.
        built_for: torch's CUDA version, None for its build for CPUs.

    Raises:
        InputError: a GPU is wished for, and there is none.
    """
    if wish != "cuda" or has_gpu:
        return ("cuda" if has_gpu else "cpu") if wish == "auto" else wish
    if built_for is None:
        raise InputError(
            "device is cuda, but this torch is PyTorch's build for CPUs: install a CUDA build (pip install torch), or "
            "use device cpu."
        )
    raise InputError(
        f"device is cuda, but torch (built for CUDA {built_for}) sees no GPU: look at nvidia-smi and "
        "CUDA_VISIBLE_DEVICES, or use device cpu."
    )


def dtype_on(wish: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in on ``device``; where it is not ``wish``, a warning is logged."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = supported(wish, has_bf16)
    if dtype != wish:
        logger.warning(
            "%s has no bf16, so that fp16 is computed in. It is less stable: by QLoRA's authors, of runs with 7B "
            "models in fp16 only 80 %% come to their end. With compute_dtype float32 it is safe, and slower.",
            torch.cuda.get_device_name(device),
        )
    return dtype


def supported(wish: torch.dtype, has_bf16: bool) -> torch.dtype:
    """Return fp16 in the place of bf16 on a chip that lacks it (compute capability below 8: T4, V100)."""
    return torch.float16 if wish == torch.bfloat16 and not has_bf16 else wish


def free_on(device: torch.device, budget: int | None = None) -> int:
    """Return the bytes that this process can still take on a CUDA device, within ``budget`` bytes for all of it."""
    free, total = torch.cuda.mem_get_info(device)
    get_fraction = getattr(torch.cuda.memory, "get_per_process_memory_fraction", None)  # torch 2.8
    fraction = 1.0 if get_fraction is None else float(get_fraction(device))
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return room(free, reserved, allocated, int(fraction * total), budget)


def memory_on(device: torch.device) -> int:
    """Return the bytes that torch's allocator has of a GPU for this process; of another device 0."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def room(free: int, reserved: int, allocated: int, limit: int, budget: int | None) -> int:
    """Return the bytes that can still be allocated.

    Args:
        free: what the driver has.
        reserved: what torch's allocator has of the driver, in use or not.
        allocated: what of that is in use.
        limit: the most that the allocator may reserve.
        budget: the most that the process may take, with its context (:data:`CONTEXT`), or None.

    Raises:
        InputError: the budget is less than what is taken already.
    """
    left = min(free + reserved - allocated, limit - allocated)
    if budget is None:
        return left
    taken = CONTEXT + allocated
    if budget <= taken:
        raise InputError(
            f"memory is {size_text(budget)}, but the model and CUDA's context take {size_text(taken)} of the GPU "
            "already: raise it."
        )
    return min(left, budget - taken)
