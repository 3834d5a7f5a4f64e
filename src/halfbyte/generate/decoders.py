"""Which decoder a model gets: the native one where it is known there, otherwise the one over transformers."""

from peft import PeftModel
from transformers import PreTrainedModel

from halfbyte.errors import InputError
from halfbyte.generate.native_decoder import NativeDecoder
from halfbyte.generate.transformers_decoder import TransformersDecoder
from halfbyte.hf.layers.decoding import NotNative
from halfbyte.hf.layers.fusion import fuse
from halfbyte.nn import FrozenLinear


def decoder_for(
    model: PreTrainedModel | PeftModel,
    *,
    cache: str | None = None,
    head: str | None = None,
    keep_decoded: bool = False,
) -> NativeDecoder | TransformersDecoder:
    """Return a decoder for ``model``.

    Args:
        model: in evaluation mode; layers of known families over frozen weights are fused, in place.
        cache: what keys and values are kept in: None as they are, or ``int8``.
        head: the output head: None as it is, or ``int8`` or ``nf4``, for speed.
        keep_decoded: whether what was decoded may serve texts that begin alike, as in a chat; then an answer may differ
            in its last places from the one that a new process gives.

    Raises:
        InputError: ``cache`` or ``head`` is asked for, and the model decodes through transformers, which has neither.
    """
    if any(isinstance(module, FrozenLinear) for module in model.modules()):
        fuse(model)
    try:
        return NativeDecoder(model, cache=cache, head=head, keep_decoded=keep_decoded)
    except NotNative as reason:
        for name, value in (("cache", cache), ("head", head)):
            if value is not None:
                raise InputError(
                    f"This model decodes through transformers ({reason}), which has no {name} {value}: leave it away."
                ) from None
        decoder = TransformersDecoder(model)
        decoder.reason = str(reason)
        return decoder
