"""EVA (arXiv 2410.07170) as PEFT (0.21) computes it: A spans the directions of a layer's inputs, and ranks go where
they vary most.

The model runs over batches of the training data until the directions stand still. PEFT would run for ever where they do
not, or where a batch has fewer tokens than directions; here that ends in a sentence.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from halfbyte.errors import InputError

PASSES = 200
"""The most batches that are run."""
TOKENS = 2
"""Of each batch, times the most directions that are looked for."""
BATCHES = 16
"""Batches that are run over and over."""


def eva_config(ranks: Sequence[int], widths: Sequence[int]) -> EvaConfig:
    """Return PEFT's options: ranks may double where they serve most, if every layer is that wide.

    All tokens count, not only those with a label, of which short answers have too few.
    """
    doubles = 2 * max(ranks) <= min(widths)
    return EvaConfig(rho=2.0 if doubles else 1.0, use_label_mask=False)


def begin_with_eva(model: PeftModel, batches: Sequence[dict[str, Tensor]]) -> None:
    """Let the model's new adapter, of ``init_lora_weights='eva'``, begin with the directions that ``batches`` have.

    Raises:
        InputError: a batch has too few tokens, or the directions do not stand still.
    """
    config = model.peft_config["default"]
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    needed = round(max(ranks) * config.eva_config.rho)
    fewest = min(int(batch["attention_mask"].sum()) for batch in batches)
    if fewest < needed:
        raise InputError(
            f"init_lora_weights 'eva' looks for {needed} directions and found {fewest} tokens in a batch; take a lower "
            "rank or more data."
        )
    initialize_lora_eva_weights(
        model,
        _Bounded(batches),
        prepare_layer_inputs_fn=_tokens,
        show_progress_bar=False,
        gather_distributed_inputs=False,
    )
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None  # whoever opens the adapter has its values
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_A.float()  # PEFT has made new ones, in the dtype of the model
            layer.lora_B.float()


def _tokens(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return what a layer reads of the tokens at ``model_input``, rows and places: PEFT's (0.21), without padding.

    A shared expert reads all rows of a batch as one, which PEFT does not know.
    """
    x: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    if x.ndim == 2:
        x = x.view(int(model_input[:, 0].max()) + 1, -1, x.shape[1])
    return x[model_input.T.unbind()]


class _Bounded:
    """The batches, which may be asked for so many times and no more."""

    def __init__(self, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches, self.left = batches, PASSES

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            self.left -= 1
            if self.left < 0:
                raise InputError(
                    f"init_lora_weights 'eva' found no steady directions in {PASSES} batches; take a lower rank, more "
                    "data or another beginning."
                )
            yield batch


def batches_of(rows: Any, collate: Any, order: Sequence[int], tokens: int) -> list[dict[str, Tensor]]:
    """Return up to ``BATCHES`` batches of at least so many ``tokens`` of ``rows`` each, in this order."""
    batches: list[dict[str, Tensor]] = []
    held: list[Any] = []
    for index in order:
        held.append(rows[index])
        if sum(len(row["input_ids"]) for row in held) >= tokens:
            batches.append(collate(held))
            held = []
            if len(batches) == BATCHES:
                break
    return batches or [collate(held)]
