"""A GGUF file as a checkpoint: its tensors under transformers' names, each expanded when it is read.

The package ``gguf`` maps the file and expands single tensors; which name a tensor has in the model, and what
llama.cpp's conversion did to it (Llama's rotated rows, Gemma's norms), is transformers' own (5.23) knowledge,
whose loader would expand the whole model first. Read from its private module are ``TENSOR_PROCESSORS`` and
``get_gguf_hf_weights_map``.

Left out: mixtures of experts, whose tensors it puts together from several (those that are known are read by
:mod:`halfbyte.hf.models.foreign.gguf_mixture`), and architectures of its newer loader.
"""

import contextlib
import functools
import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from halfbyte import __version__
from halfbyte.errors import InputError
from halfbyte.files import cache_folder, stamp, whole_folder
from halfbyte.hf.models.gguf_form.mixtures import config_of, family_of
from halfbyte.hf.models.gguf_scale import scaled_by

logger = logging.getLogger(__name__)

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
PLAIN = ("F32", "F16", "BF16")
HEADER = 3
"""Counts up when what is kept of a file's description changes."""


def open_gguf(file: Path) -> Any:
    """Map ``file`` and return its reader.

    Raises:
        InputError: it is not GGUF, or one part of several, or holds numbers of an unknown type.
    """
    if found := PART.search(file.name):
        raise InputError(
            f"{file} is part {int(found[1])} of {int(found[2])}; put the parts together with llama.cpp's "
            "llama-gguf-split --merge first."
        )
    about = file.stat()
    return _opened(file, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a vocabulary takes seconds to read
def _opened(file: Path, *_: int) -> Any:
    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise InputError(
            f"{file} cannot be read as GGUF ({_first(error)}): the file is damaged, or of a newer kind."
        ) from error
    for kind in {tensor.tensor_type for tensor in reader.tensors}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            raise InputError(
                f"{file} holds tensors of the type {kind.name}, which the package gguf cannot expand; take a file in "
                f"another one, as {GGMLQuantizationType.Q8_0.name}."
            ) from None
        except ValueError:
            if kind.name not in PLAIN:
                raise
    return reader


def complete(config: PreTrainedConfig, file: Path) -> None:
    """Set what transformers (5.23) does not read of a GGUF file's description: the width of a head, and by what Gemma's
    queries are scaled, which the file does not say and llama.cpp knows."""
    fields, text = open_gguf(file).fields, config.get_text_config()
    width = fields.get(f"{fields['general.architecture'].contents()}.attention.key_length")
    if width is not None and hasattr(text, "head_dim"):
        text.head_dim = int(width.contents())
    if hasattr(text, "query_pre_attn_scalar"):
        text.query_pre_attn_scalar = scaled_by(text)


def mixture_config(file: Path) -> PreTrainedConfig | None:
    """Return the configuration of the mixture of experts in a GGUF file, or None where it is none that is known.

    Raises:
        InputError: as :func:`open_gguf`, or the file says something that is not read.
    """
    reader = open_gguf(file)
    return config_of(file, reader.fields, frozenset(tensor.name for tensor in reader.tensors))


def header_of(file: Path) -> Path:
    """Return the folder in the cache that has configuration and tokenizer of a GGUF file, once :func:`keep_header` has
    made it: to read them anew takes transformers three passes over a vocabulary, of seconds each."""
    digest = hashlib.sha256(f"{HEADER} {__version__} {transformers.__version__} {stamp(file)}".encode()).hexdigest()
    return cache_folder() / "gguf" / f"{file.stem}-{digest[:16]}"


def keep_header(file: Path, config: PreTrainedConfig) -> None:
    """Keep a GGUF file's configuration and tokenizer, as far as they can be kept."""
    with contextlib.suppress(OSError), whole_folder(header_of(file)) as folder:
        config.save_pretrained(folder)
        # AutoTokenizer asks transformers for the family, and it knows few mixtures.
        kind: Any = PreTrainedTokenizerFast if family_of(open_gguf(file).fields) else AutoTokenizer
        with contextlib.suppress(Exception):  # transformers' of any kind; who wants the tokenizer is told
            kind.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def tokenizer_source(file: Path) -> tuple[str, dict[str, str]]:
    """Return where a GGUF file's tokenizer is opened, and with which options."""
    kept = header_of(file)
    if not kept.is_dir() and (config := mixture_config(file)) is not None:
        keep_header(file, config)
    if (kept / "tokenizer_config.json").is_file():
        return str(kept), {}
    return str(file.parent), {"gguf_file": file.name}


class GgufCheckpoint:
    """The tensors of a GGUF file under their names in the model.

    It has what :class:`~halfbyte.hf.models.checkpoint.Checkpoint` has.

    Args:
        file: the GGUF file.
        model: what its configuration describes, without memory.

    Raises:
        InputError: as :func:`open_gguf`, or the file's is a mixture of experts.
    """

    quantized: dict[str, torch.Size]

    def __init__(self, file: Path, model: PreTrainedModel) -> None:
        self.files, self.where, self.quantized = [file], file, {}
        reader = open_gguf(file)
        architecture = str(reader.fields["general.architecture"].contents())
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
        try:
            places = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise InputError(
                f"{file} is a {architecture}, of which the package gguf has no names: {_first(error)}"
            ) from error
        experts = [tensor.name for tensor in reader.tensors if "_exps" in tensor.name or "_projs" in tensor.name]
        if experts:
            raise InputError(
                f"{file} is a mixture of experts ({experts[0]}), which is not opened from GGUF; take the model's "
                "folder with safetensors."
            )
        self._tensors = {places[tensor.name]: tensor for tensor in reader.tensors if tensor.name in places}
        self.names = list(self._tensors)
        unused = [tensor.name for tensor in reader.tensors if tensor.name not in places]
        if unused:
            logger.warning("%s has tensors that transformers leaves out: %s.", file, ", ".join(sorted(unused)[:6]))

    def form(self, name: str) -> Tensor:
        """Return the tensor ``name`` on the meta device."""
        tensor = self._tensors[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = self._processed(tensor, np.broadcast_to(np.float32(0), shape))
        return torch.empty(values.shape, dtype=torch.bfloat16, device="meta")

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, fp32."""
        tensor = self._tensors[name]
        values = self._processed(tensor, dequantize(tensor.data, tensor.tensor_type))
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def _processed(self, tensor: Any, values: Any) -> Any:
        return self._processor.process(weights=values, name=tensor.name).weights


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
