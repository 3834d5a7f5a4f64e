"""Models that scripts open with bitsandbytes' configuration, as ours.

``from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True))`` and a folder that bitsandbytes has
quantized both ask transformers' table of quantizers (5.23: ``quantizers.auto.AUTO_QUANTIZER_MAPPING``) for
``bitsandbytes_4bit`` or ``bitsandbytes_8bit``; what answers is :class:`halfbyte.hf.models.quantizer.HalfbyteQuantizer`.

Each field of the configuration is obeyed, refused by name, or translated, which is said:

    bnb_4bit_compute_dtype   float16 is bfloat16 on a CPU, which has no units for the other; float32, the default, is
                             taken where what lies between the layers is float32 too. Elsewhere layers take and give
                             16 bits, and sums are in float32 whatever the dtype.
    bnb_4bit_quant_storage   the bytes are the same whatever dtype they are called.
    llm_int8_*               mean something with load_in_8bit only, but for the names of modules to skip. 8-bit
                             layers take and give float32 where the model is in it, and else bfloat16.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.errors import InputError
from halfbyte.hf.dropin.bnb_layers import show_quant_states
from halfbyte.hf.dropin.said import say
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.quantizer import HalfbyteQuantizer
from halfbyte.hf.replacement import MISSING, Replacement

THRESHOLD = 6.0
"""bitsandbytes' default of ``llm_int8_threshold``."""
OLD_NAMES = {"use_auth_token": "token"}
"""Keyword arguments of ``from_pretrained`` that have another name now."""


def as_halfbyte(config: BitsAndBytesConfig) -> HalfbyteConfig:
    """Return ours for bitsandbytes' configuration.

    Raises:
        InputError: it asks for what there is not.
    """
    if not config.load_in_4bit and not config.load_in_8bit:
        raise InputError(
            "BitsAndBytesConfig() asks for neither load_in_4bit=True nor load_in_8bit=True: set one, or leave it out."
        )
    if config.load_in_8bit:
        return _in_8_bits(config)
    if config.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise InputError(
            f"BitsAndBytesConfig(bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}): bitsandbytes has nf4 and fp4; "
            "others are in halfbyte.HalfbyteConfig(quant_type=...)."
        )
    if config.bnb_4bit_quant_storage != torch.uint8:
        say(
            f"bnb_4bit_quant_storage={_name(config.bnb_4bit_quant_storage)}: the packed bytes are the same, and are "
            "called uint8 here."
        )
    return HalfbyteConfig.from_folder(config.to_dict())


def _in_8_bits(config: BitsAndBytesConfig) -> HalfbyteConfig:
    if config.llm_int8_has_fp16_weight:
        raise InputError(
            "BitsAndBytesConfig(llm_int8_has_fp16_weight=True) keeps a 16-bit copy of each weight; leave it out."
        )
    if config.llm_int8_threshold != THRESHOLD:
        say(
            f"llm_int8_threshold={config.llm_int8_threshold}: activations are not rounded to int8 here, so that no "
            "outlier has to be taken out of them."
        )
    if config.llm_int8_enable_fp32_cpu_offload:
        say("llm_int8_enable_fp32_cpu_offload=True: nothing is offloaded; 8-bit weights are used where they lie.")
    return HalfbyteConfig.from_folder(config.to_dict())


class BitsAndBytesQuantizer(HalfbyteQuantizer):
    """Our quantizer, told by bitsandbytes' configuration."""

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(as_halfbyte(quantization_config), **kwargs)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of what stays dense, and settle that of the products: see the head of this file."""
        config = self.quantization_config
        wished = config.compute_dtype
        if not self.on_cpu:
            return dtype
        if config.bits == 8:  # whose products are in the dtype of the activations
            if dtype == torch.float16:
                say("dtype=float16: a CPU has units for bfloat16, which is taken instead.")
            config.compute_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
            return config.compute_dtype
        if wished == torch.float16:
            say("bnb_4bit_compute_dtype=float16: a CPU has units for bfloat16, which is taken instead.")
        if wished == torch.float32 and dtype == torch.float32:
            return dtype
        if wished == torch.float32:
            say(
                "bnb_4bit_compute_dtype=float32: the model is in 16 bits, so its 4-bit layers take and give bfloat16, "
                "with sums in float32."
            )
        config.compute_dtype = torch.bfloat16
        return config.compute_dtype

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        show_quant_states(model)
        return model


def translated(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``from_pretrained`` with old ones as what they are now."""
    kwargs = renamed(kwargs)
    bits = {name: kwargs.pop(name) for name in ("load_in_4bit", "load_in_8bit") if name in kwargs}
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(("bnb_4bit_", "llm_int8_"))}
    wished = any(bits.values())
    held = kwargs.get("quantization_config")
    if (wished or fields) and held is None:
        if not wished:
            raise InputError(f"from_pretrained({next(iter(fields))}=...) needs load_in_4bit=True or load_in_8bit=True.")
        kwargs["quantization_config"] = BitsAndBytesConfig(**bits, **fields)
        say(f"from_pretrained({', '.join([*bits, *fields])}) is quantization_config=BitsAndBytesConfig(...) now.")
    elif held is not None and (bits or fields):
        _check_agrees(held, bits | fields)
    return _without_gpu(kwargs)


def renamed(kwargs: dict[str, Any], called: str = "from_pretrained") -> dict[str, Any]:
    """Return keyword arguments of the function ``called`` under the names of today."""
    kwargs = dict(kwargs)
    for old, new in OLD_NAMES.items():
        if old in kwargs:
            kwargs.setdefault(new, kwargs.pop(old))
            say(f"{called}({old}=...) is {new}= now.")
    return kwargs


def _check_agrees(config: Any, given: dict[str, Any]) -> None:
    """Refuse arguments beside a configuration that says otherwise; qlora.py gives both."""
    about = config.to_dict() if isinstance(config, QuantizationConfigMixin) else dict(config)
    for name, value in given.items():
        if name in about and value is not None and about[name] not in (value, _name(value)):
            raise ValueError(
                f"from_pretrained({name}={value!r}) contradicts its quantization_config, which has {about[name]!r}; "
                "leave one out."
            )


def _without_gpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    if torch.cuda.is_available():
        return kwargs
    if kwargs.pop("use_flash_attention_2", False) or str(kwargs.get("attn_implementation")).startswith("flash_attenti"):
        if is_flash_attn_2_available():
            kwargs.setdefault("attn_implementation", "flash_attention_2")
        else:
            kwargs.pop("attn_implementation", None)
            say("flash attention has no kernels for a CPU: a quantized model attends our way, others by SDPA.")
    if kwargs.pop("max_memory", None) is not None:
        say("max_memory: there is no GPU whose memory it could limit.")
    return kwargs


def _name(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _translating(old: Any) -> Any:
    """A ``from_pretrained`` that takes old arguments."""
    original: Callable[..., Any] = old.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return original(cls, *args, **translated(kwargs))

    return classmethod(from_pretrained)


def _tokenizing(old: Any) -> Any:
    """``AutoTokenizer.from_pretrained`` with arguments of 2023: qlora.py says ``tokenizer_type="llama"``."""
    original: Callable[..., Any] = old.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = renamed(kwargs)
        kind = kwargs.get("tokenizer_type")
        if kind is not None and kind not in TOKENIZER_MAPPING_NAMES:
            del kwargs["tokenizer_type"]
            say(f"AutoTokenizer.from_pretrained(tokenizer_type={kind!r}): the tokenizer's files say what it is.")
        return original(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _pad_token(old: Any) -> Any:
    return property(lambda self: self._special_tokens_map.get("pad_token")) if old is MISSING else old


def rows() -> list[Replacement]:
    """What loading replaces."""
    library = ("transformers", ">=5.23,<5.24")
    table = "transformers.quantizers.auto:AUTO_QUANTIZER_MAPPING"
    return [
        Replacement(
            f"{table}[bitsandbytes_4bit]",
            lambda old: BitsAndBytesQuantizer,
            "BitsAndBytesConfig(load_in_4bit=True) and folders in bitsandbytes' 4 bits give our layers",
            *library,
        ),
        Replacement(
            f"{table}[bitsandbytes_8bit]",
            lambda old: BitsAndBytesQuantizer,
            "the same for load_in_8bit=True and 8-bit folders",
            *library,
        ),
        Replacement(
            "transformers.models.auto.tokenization_auto:AutoTokenizer.from_pretrained",
            _tokenizing,
            "use_auth_token=, and types of tokenizers that are files' business now",
            *library,
        ),
        Replacement(
            "transformers.tokenization_utils_base:PreTrainedTokenizerBase._pad_token",
            _pad_token,
            "qlora.py and its heirs ask it whether there is a pad token",
            *library,
        ),
        *(
            Replacement(
                where,
                _translating,
                "load_in_4bit=, load_in_8bit=, bnb_4bit_*= (gone since transformers 5); flash attention",
                *library,
            )
            for where in ("transformers.modeling_utils:PreTrainedModel.from_pretrained", *_auto_classes())
        ),
    ]


def _auto_classes() -> list[str]:
    """Return the ``from_pretrained`` of AutoModel and its sisters: each has one of its own, a copy."""
    return [
        f"{modeling_auto.__name__}:{name}.from_pretrained"
        for name, kind in vars(modeling_auto).items()
        if isinstance(kind, type) and issubclass(kind, _BaseAutoModelClass) and "from_pretrained" in vars(kind)
    ]
