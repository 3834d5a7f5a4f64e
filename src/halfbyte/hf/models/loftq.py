"""LoftQ (arXiv 2310.08659) over a base that stays as it is, computed while the base is read and quantized.

LoftQ alternates between the quantized weight and the adapter until their sum is near the weight. Here the quantized
weight Q(W) is what it is without an adapter, as in the first of LoftQ's iterations (PEFT's default is one), so that an
adapter fits every copy of the base: its start is

    s B A = the nearest matrix of the adapter's rank to W - dequant(Q(W))

The residual of a layer exists only while that layer is quantized; kept are its A and B. A weight that lies in 4 bits
already has no residual.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.hf.layers.lora_config import adapted_layers, check_ranks
from halfbyte.hf.layers.starts import set_factors
from halfbyte.hf.models.check import Names
from halfbyte.hf.models.checkpoint import Checkpoint, weight_files
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.quantize_files import on_disk
from halfbyte.hf.models.quantizer import watched
from halfbyte.nn import QuantizedLinear
from halfbyte.nn.principal import principal
from halfbyte.quant import QuantizedInt8, QuantizedWeight

ITERATIONS = 4
"""Of the random decomposition: a residual of rounding errors has many directions of nearly one size."""


class LoftQ:
    """The start of an adapter, from the residuals of the layers that it goes on.

    In a script::

        loftq = halfbyte.hf.LoftQ(lora_config)
        with loftq.watching():
            model = AutoModelForCausalLM.from_pretrained(path, quantization_config=halfbyte.HalfbyteConfig())
        model = loftq.apply(get_peft_model(model, lora_config))

    Args:
        config: of the adapter, or what makes it when the model is there, without weights.
        seed: of the random directions.
    """

    def __init__(self, config: LoraConfig | Callable[[Any], LoraConfig], seed: int = 0) -> None:
        self.seed = seed
        self._config = config
        self._ranks: dict[str, tuple[int, float]] | None = None
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the weights that are quantized meanwhile."""
        with watched(self._watch):
            yield

    def _watch(self, model: nn.Module, name: str, dense: Tensor, weight: QuantizedWeight) -> None:
        """Keep the factors of a layer: ``dense [out, in]`` has become ``weight``."""
        if self._ranks is None:
            config = self._config if isinstance(self._config, LoraConfig) else self._config(model)
            self._ranks = adapted_layers(model, config)
        path = name.removesuffix(".weight")
        if path in self._ranks:
            rank, scaling = self._ranks[path]
            self._found[path] = _factors(dense, weight, rank, scaling, self.seed + crc32(path.encode()))

    def apply(self, model: PeftModel, adapter: str = "default") -> PeftModel:
        """Give ``adapter``, new and of the configuration that this was made with, its start, in place.

        Raises:
            InputError: a layer of it was not quantized meanwhile, or is smaller than the rank.
        """
        layers = [
            (path.removeprefix("base_model.model."), layer)
            for path, layer in model.named_modules()
            if isinstance(layer, LoraLinear) and adapter in layer.lora_A
        ]
        # a layer that stays dense (T5's wo) has no residual, and begins as by default
        missing = [
            path for path, each in layers if path not in self._found and isinstance(each.base_layer, QuantizedLinear)
        ]
        if layers and not self._found:
            missing = [layers[0][0]]
        if missing:
            raise InputError(
                f"init_lora_weights 'loftq' needs the weights before they are quantized, and {missing[0]} of "
                f"{model.config._name_or_path} was not: name the 16-bit model, or take pissa or the default."
            )
        check_ranks(model.get_base_model(), {path: (layer.r[adapter], 1.0) for path, layer in layers})
        for path, layer in layers:
            if path in self._found:
                set_factors(layer, adapter, *self._found.pop(path))
        return model


def begin_from_files(
    model: PeftModel,
    adapter: str = "default",
    *,
    source: str | Path | None = None,
    seed: int = 0,
    keep: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Give ``adapter`` its start over a base that is quantized already, whose 16-bit files are read again.

    Args:
        model: what ``get_peft_model`` has returned.
        adapter: new.
        source: the 16-bit model, folder, hub id or one file; None: the one that the base was loaded from.
        seed: of the random directions.
        keep: is asked after each layer, by its name, whether it is to begin so.

    Raises:
        InputError: the weights of a layer are not there in 16 bits.
    """
    base = model.get_base_model()
    source = source or base.config._name_or_path
    files = [Path(source)] if Path(source).suffix == ".safetensors" else _files(source, base)
    checkpoint, names = Checkpoint(files), Names(base)
    homes = {target: name for name in checkpoint.names for target, pattern in [names.of(name)] if pattern is None}
    for path, layer in [*model.named_modules()]:
        if not isinstance(layer, LoraLinear) or adapter not in layer.lora_A:
            continue
        path = path.removeprefix("base_model.model.")
        name = f"{path}.weight"
        packed = name in homes and homes[name] in checkpoint.quantized
        if not isinstance(layer.base_layer, QuantizedLinear) or name not in homes or packed:
            raise _without(source, path)
        before = [layer.lora_A[adapter].weight.clone(), layer.lora_B[adapter].weight.clone()] if keep else []
        dense = checkpoint.read(homes[name])
        dense = dense.T if layer.base_layer.transposed else dense
        set_factors(
            layer,
            adapter,
            *_factors(
                dense,
                layer.base_layer.quantized_weight,
                layer.r[adapter],
                layer.scaling[adapter],
                seed + crc32(path.encode()),
            ),
        )
        if keep and not keep(model, path):
            set_factors(layer, adapter, *before)


def _files(source: str | Path, base: Any) -> list[Path]:
    place = locate(source)
    if place.gguf:
        raise _without(source)
    return weight_files(on_disk(place), getattr(base.config, "transformers_weights", None))


def _without(source: str | Path, path: str = "") -> InputError:
    return InputError(
        f"init_lora_weights 'loftq' needs the weights before they are quantized, and {path + ' of ' if path else ''}"
        f"{source} is not there in 16 bits by itself: name the 16-bit model, or take pissa or the default."
    )


def _factors(
    dense: Tensor, weight: QuantizedWeight | QuantizedInt8, rank: int, scaling: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return A and B for what ``dense [out, in]`` has lost when it became ``weight``."""
    b, a = principal(dense.float() - weight.dequantize(torch.float32), rank, ITERATIONS, seed)
    return a / math.sqrt(scaling), b / math.sqrt(scaling)
