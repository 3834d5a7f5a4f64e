"""In which dtype torch multiplies dense matrices best.

On x86 without AVX-512 oneDNN has no products in 16 bits, and torch falls back on loops: of 2048×1024×576 on a Zen 3
core pair bf16 runs at 2 to 11 GFLOP/s, fp16 at 2 to 23, fp32 at 56 to 77 (torch 2.13). So there 16-bit operands are
made fp32 first; the sums are as exact or more so.
"""

import functools
import platform

import torch

X86 = ("x86_64", "AMD64", "i386", "i686")


def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return what operands of ``dtype`` on a ``device`` (its type) are to be for a large product."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and device == "cpu" and _lacks_halves() else dtype


@functools.cache
def _lacks_halves() -> bool:
    return platform.machine() in X86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
