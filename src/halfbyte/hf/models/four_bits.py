"""A base and an adapter as one model in 4 bits that keeps what was learnt (:mod:`halfbyte.quant.rounding`).

    outputs     each layer's outputs stay what they were, on texts of the training data; the default
    random      to one of the two neighbours of each value, without data
    original    nearest to the weights before they were quantized, plus the change: their own rounding is the dither

    nearest     to the nearest values, which lose most of what was learnt; to be compared with
    gptq        each layer's outputs for the inputs that the rounded model gives it (arXiv 2210.17323); the same

The base's constants stay, and with them its 4.127 bits; codes alone are written anew. A base that was not in NF4 gets
constants of its own. Tensors come in the order of the layers, one layer at a time in memory.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.choices import BLOCKSIZE, DOUBLE_QUANT, Compared, Rounding
from halfbyte.errors import InputError
from halfbyte.hf.models.blocks import Blocks
from halfbyte.hf.models.check import check_finite
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.merging import Merged
from halfbyte.quant import QuantizedWeight, quantize_4bit
from halfbyte.quant.rounding import Compensation, at_random, compensated, nearest

COMPUTED = torch.bfloat16
"""What stays dense is in, as the defaults of bitsandbytes' folders."""


class In4Bits:
    """See above.

    Args:
        adapter: folder of a run or of a PEFT adapter, or a hub id.
        rounding: which of the ways.
        texts: token ids, int64 ``[length]`` each, for ``outputs`` and ``gptq``.
        original: the base before it was quantized, for ``original``; None: as the adapter names it.
        seed: of what is drawn.
        trust_remote_code: run code that comes with the model.

    Attributes:
        adapter, base, config, architecture, sizes, values: as those of :class:`halfbyte.hf.models.merging.Merged`.

    Raises:
        InputError: as there; the base has no weights in few bits, or the way is not possible.
    """

    def __init__(
        self,
        adapter: str | Path,
        rounding: Rounding | Compared,
        texts: Sequence[Tensor] = (),
        *,
        original: str | Path | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        self._rounding, self._texts, self._seed = rounding, texts, seed
        base = None if rounding == "original" else original
        self._trained = trained = Merged(adapter, "quantized", COMPUTED, base=base, trust_remote_code=trust_remote_code)
        self._source = trained
        if rounding == "original":
            self._source = Merged(adapter, "original", COMPUTED, base=original, trust_remote_code=trust_remote_code)
        if trained.base.quantization is None:
            raise InputError(
                f"The adapter {adapter} was trained over a base in 16 bits, which has no 4 bits that could be kept; "
                "merge it to bf16, and quantize that."
            )
        self.adapter, self.base, self.architecture = trained.adapter, trained.base, trained.architecture
        self.config, self.values = trained.config, trained.values
        self._targets = {
            target for target in trained.base.quantized_names
            if target in trained.targets.values() and not isinstance(trained.wrapper(target), ModulesToSaveWrapper)
        }  # fmt: skip
        self._made: dict[str, QuantizedWeight] = {}
        self._blocks: Blocks | None = None
        self.sizes = self._in_order()
        self.config.quantization_config = self._form(trained.base.quantization)

    def make(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that a file has for the tensor ``name`` of the base, each once, in the order of ``sizes``.

        Raises:
            InputError: a value is not finite, or too large for 16 bits.
        """
        target = self._trained.targets[name]
        if target not in self._targets:
            return {name: self._trained.read(name)}
        weight = self._weight(target)
        return weight.state_dict(name)

    def _weight(self, target: str) -> QuantizedWeight:
        if self._blocks and (number := self._blocks.index_of(target)) is not None:
            while target not in self._made:
                self._advance(number)
            return self._made.pop(target)
        values = self._values(target)
        grid = self._grid(target, values)
        if self._rounding in ("original", "nearest"):
            return nearest(values, grid)
        return at_random(values, grid, self._drawn(target))

    def _advance(self, number: int) -> None:
        assert self._blocks is not None
        self._made = {name: x for name, x in self._made.items() if self._blocks.index_of(name) == number}
        self._blocks.advance()

    def _round(self, target: str, values: Tensor, inputs: Compensation | None) -> Tensor:
        """Round a weight in its layer, keep it, and return what it is now."""
        grid = self._grid(target, values)
        made = at_random(values, grid, self._drawn(target)) if inputs is None else compensated(values, grid, inputs)
        self._made[target] = made
        return made.dequantize(torch.float32)

    def _values(self, target: str) -> Tensor:
        values = self._source.exact(target)
        check_finite(target, values)
        return values.T if target.rpartition(".")[0] in self.base.transposed else values

    def _grid(self, target: str, values: Tensor) -> QuantizedWeight:
        own = self.base.quantized(target)
        if isinstance(own, QuantizedWeight) and own.quant_type == "nf4":
            return dataclasses.replace(own, dtype=COMPUTED)
        return quantize_4bit(values.to(COMPUTED), "nf4", BLOCKSIZE, DOUBLE_QUANT)

    def _drawn(self, target: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {target}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _form(self, form: HalfbyteConfig) -> HalfbyteConfig:
        """Return how the model lies."""
        skipped = {*(form.skip_modules or ())}
        for target in {*self._trained.targets.values()} - self._targets:
            path, _, key = target.rpartition(".")
            if key == "weight" and isinstance(self._layer(path), nn.Linear | Conv1D):
                skipped.add(path)
        own = form.quant_type == "nf4"
        return HalfbyteConfig(
            quant_type="nf4",
            blocksize=form.blocksize if own else BLOCKSIZE,
            double_quant=form.double_quant if own else DOUBLE_QUANT,
            compute_dtype=COMPUTED,
            skip_modules=sorted(skipped),
        )

    def _layer(self, path: str) -> Any:
        """Return a module of the base, without what PEFT has put around it."""
        module: Any = self.base.model.get_submodule(path)
        while isinstance(module, ModulesToSaveWrapper | BaseTunerLayer):
            module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module.get_base_layer()
        return module

    def _in_order(self) -> dict[str, int]:
        """Return what each tensor takes, those of the layers behind the others and in their order."""
        trained = self._trained
        sizes = dict(trained.sizes)
        for name, target in trained.targets.items():
            if target in self._targets:
                sizes[name] = math.ceil(sizes[name] / COMPUTED.itemsize * 0.6)
        if self._rounding not in ("outputs", "gptq"):
            return sizes
        self._blocks = Blocks(
            type(self.base.model), self.config, lambda target: self._source.exact(target), self._targets, self._texts,
            self._round, corrected=self._rounding == "outputs",
        )  # fmt: skip
        index = {name: self._blocks.index_of(target) for name, target in trained.targets.items()}
        return dict(sorted(sizes.items(), key=lambda item: -1 if (at := index[item[0]]) is None else at))
