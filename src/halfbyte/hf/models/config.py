"""The quantization configuration that transformers carries: ours in memory, bitsandbytes' on disk where it has one."""

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.choices import BITSANDBYTES_TYPES, COMPUTE_DTYPE, QUANT_TYPE, ROW
from halfbyte.errors import InputError, nearest
from halfbyte.options import base_format
from halfbyte.quant.weight import DTYPES

QUANT_METHOD = "halfbyte"


@register_quantization_config(QUANT_METHOD)
class HalfbyteConfig(QuantizationConfigMixin):
    """How a model's linear layers are held: in 4 bits, or in 8, or as they are.

    ``AutoModelForCausalLM.from_pretrained(path, quantization_config=HalfbyteConfig())`` quantizes a 16-bit or 32-bit
    model while it is read. Defaults are the paper's: NF4 in blocks of 64, double quantization, bf16 compute, every
    linear layer but the output head.

    Args:
        quant_type: ``nf4``, ``fp4``, or for experiments ``e2m1``, ``e3m0``, ``int4``; ``int8``; or ``none``, which
            leaves the weights in the compute dtype, for comparison on the same way.
        blocksize: values per block, 32 to 4096; None is 64. For ``int8`` also ``row``: a block for each row, which is
            how bitsandbytes holds and saves 8 bits.
        double_quant: quantize the block constants too; None does so in 4 bits. In 8 bits they stay as they are.
        compute_dtype: dtype of the products and of what stays dense; a ``torch.dtype`` or its name. None is bf16.
        skip_modules: names of modules that stay dense, in place of the default choice.
    """

    def __init__(
        self,
        quant_type: str = QUANT_TYPE,
        blocksize: int | str | None = None,
        double_quant: bool | None = None,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.quant_type = quant_type
        self.blocksize, self.double_quant = base_format(quant_type, blocksize, double_quant)
        self.compute_dtype = as_dtype(compute_dtype or COMPUTE_DTYPE)
        self.skip_modules = skip_modules

    @classmethod
    def from_folder(cls, about: dict[str, Any]) -> "HalfbyteConfig":
        """Read the ``quantization_config`` of a folder in 4 or 8 bits, bitsandbytes' or our own.

        Raises:
            InputError: it is neither.
        """
        method = about.get("quant_method")
        if method == QUANT_METHOD:
            try:
                return cls(**about)
            except TypeError as error:
                raise InputError(f"config.json has a quantization_config that is not ours ({error}).") from error
        compute_dtype, skip = about.get("bnb_4bit_compute_dtype", "float32"), about.get("llm_int8_skip_modules")
        if about.get("load_in_4bit", about.get("_load_in_4bit", False)):
            return cls(
                quant_type=about.get("bnb_4bit_quant_type", "fp4"),
                double_quant=about.get("bnb_4bit_use_double_quant", False),
                compute_dtype=compute_dtype,
                skip_modules=skip,
            )
        if about.get("load_in_8bit", about.get("_load_in_8bit", False)):
            # Of 8 bits bitsandbytes computes in the dtype of the activations, so that none is written.
            return cls(quant_type="int8", blocksize=ROW, skip_modules=skip)
        if method is None and {"group_size", "bits"} <= about.keys():
            method = "MLX"
        raise InputError(
            f"The model is already quantized ({method}), which is not opened: bitsandbytes' 4 and 8 bits, GPTQ, AWQ, "
            "MXFP4 and GGUF are; start from its 16-bit original."
        )

    @property
    def bits(self) -> int | None:
        """4 or 8, or None where the weights stay as they are."""
        return {"none": None, "int8": 8}.get(self.quant_type, 4)

    @property
    def is_bitsandbytes(self) -> bool:
        """Whether bitsandbytes' files have a name for the format."""
        return self.quant_type in BITSANDBYTES_TYPES or (self.quant_type == "int8" and self.blocksize == ROW)

    def in_memory(self) -> dict[str, Any]:
        """Return the constructor's arguments, under our own method name."""
        return dict(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Return what a saved model's config.json holds: bitsandbytes' dictionary, so that its users can open it.

        Of formats that it does not know, it is our own.
        """
        dtype = str(self.compute_dtype).removeprefix("torch.")
        if not self.is_bitsandbytes:
            return vars(self) | {"compute_dtype": dtype}
        in_4bit = self.bits == 4
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": in_4bit,
            "load_in_8bit": not in_4bit,
            "_load_in_4bit": in_4bit,
            "_load_in_8bit": not in_4bit,
            "bnb_4bit_quant_type": self.quant_type if in_4bit else "fp4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": dtype,
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
