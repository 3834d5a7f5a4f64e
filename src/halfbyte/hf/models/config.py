"""The quantization configuration that transformers carries: ours in memory, bitsandbytes' on disk."""

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.choices import BLOCKSIZE, COMPUTE_DTYPE, DOUBLE_QUANT, QUANT_TYPE
from halfbyte.errors import InputError, nearest
from halfbyte.quant.weight import DTYPES, check_format

QUANT_METHOD = "halfbyte"


@register_quantization_config(QUANT_METHOD)
class HalfbyteConfig(QuantizationConfigMixin):
    """How a model's linear layers are held in 4 bits.

    ``AutoModelForCausalLM.from_pretrained(path, quantization_config=HalfbyteConfig())`` quantizes a 16-bit or 32-bit
    model while it is read. Defaults are the paper's: NF4 in blocks of 64, double quantization, bf16 compute, every
    linear layer but the output head.

    Args:
        quant_type: ``nf4``, ``fp4``, or for experiments ``e2m1``, ``e3m0``, ``int4`` (not saveable: bitsandbytes'
            format has no name for them).
        blocksize: values per block, 32 to 4096.
        double_quant: quantize the block constants too.
        compute_dtype: dtype of the products and of what stays dense; a ``torch.dtype`` or its name. None is bf16.
        skip_modules: names of modules that stay dense, in place of the default choice.
    """

    def __init__(
        self,
        quant_type: str = QUANT_TYPE,
        blocksize: int = BLOCKSIZE,
        double_quant: bool = DOUBLE_QUANT,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        check_format(quant_type, blocksize)
        self.quant_method = quant_method
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.compute_dtype = as_dtype(compute_dtype or COMPUTE_DTYPE)
        self.skip_modules = skip_modules

    @classmethod
    def from_bitsandbytes(cls, about: dict[str, Any]) -> "HalfbyteConfig":
        """Read the ``quantization_config`` of a bitsandbytes 4-bit folder.

        Raises:
            InputError: it is not one of 4 bits.
        """
        if not about.get("load_in_4bit", about.get("_load_in_4bit", False)):
            raise InputError(
                f"The model is already quantized ({about.get('quant_method')}), but not in bitsandbytes' 4 bits; "
                "start from its 16-bit original."
            )
        return cls(
            quant_type=about.get("bnb_4bit_quant_type", "fp4"),
            double_quant=about.get("bnb_4bit_use_double_quant", False),
            compute_dtype=about.get("bnb_4bit_compute_dtype", "float32"),
            skip_modules=about.get("llm_int8_skip_modules"),
        )

    def in_memory(self) -> dict[str, Any]:
        """Return the constructor's arguments, under our own method name."""
        return dict(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Return what a saved model's config.json holds: bitsandbytes' dictionary, so that its users can open it."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": self.skip_modules,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return fp32, bf16 or fp16 by its name, ``bfloat16`` or ``torch.bfloat16``.

    Raises:
        InputError: another dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"compute_dtype is {name!r}{nearest(name, DTYPES)}; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]
