"""Texts as vectors, by an encoder: the states of its last layer, pooled over its tokens, of length 1 if so asked.

How to pool is said by the folder's files of sentence-transformers (``modules.json``, ``1_Pooling/config.json``): the
mean over the tokens, or the first one's state (CLS). Without them it is the mean, as sentence-transformers has it. A
text is computed together with texts of as many tokens only, so nothing is padded.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import InputError
from halfbyte.hf.models.limits import check_tokens, most_positions

TOGETHER = 16
"""Texts in one pass."""


class Embedder:
    """An encoder with its pooling.

    Attributes:
        width: numbers of a vector.
        longest: tokens of a text, at most, or None where there is no limit.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
        """
        Args:
            model: an encoder, in evaluation mode.
            tokenizer: its.
            folder: of its files, if it is one.

        Raises:
            InputError: it pools in a way that is not known, or has layers behind the pooling.
        """
        self._backbone: Any = model.base_model
        self._model, self._tokenizer = model, tokenizer
        self.pooling: Literal["mean", "cls"] = "mean"
        self.normalizes = False
        self.longest = most_positions(model)
        if folder is not None and (folder / "modules.json").is_file():
            self._obey(folder)
        self.width = int(model.config.hidden_size)

    def _obey(self, folder: Path) -> None:
        modules = _json(folder / "modules.json")
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        for kind in kinds:
            if kind not in ("Transformer", "Pooling", "Normalize"):
                raise InputError(f"{folder} has a layer {kind} behind its encoder, which is not known here.")
        self.normalizes = "Normalize" in kinds
        for module in modules:
            if str(module.get("type", "")).endswith(".Pooling"):
                about = _json(folder / str(module["path"]) / "config.json")
                chosen = [name for name, value in about.items() if name.startswith("pooling_mode_") and value is True]
                known: dict[str, Literal["mean", "cls"]] = {
                    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls",
                }  # fmt: skip
                if len(chosen) != 1 or chosen[0] not in known:
                    raise InputError(f"{folder} pools by {' and '.join(chosen) or 'nothing'}; known are mean and CLS.")
                self.pooling = known[chosen[0]]
        limits = folder / "sentence_bert_config.json"
        longest = _json(limits).get("max_seq_length") if limits.is_file() else None
        if longest is not None:
            self.longest = longest if self.longest is None else min(self.longest, longest)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, those around it included.

        Raises:
            InputError: it is empty.
        """
        if not text:
            raise InputError("A text is empty; give at least one character.")
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def check(self, ids: Sequence[int]) -> None:
        """Check that a text can be read.

        Raises:
            InputError: it is too long, or holds tokens that there are not.
        """
        if not ids:
            raise InputError("A text is empty; give at least one token.")
        if self.longest is not None and len(ids) > self.longest:
            raise InputError(f"A text is {len(ids)} tokens long, but the model attends to {self.longest}: shorten it.")
        check_tokens(self._model, self._tokenizer, max(ids), "A text")

    @torch.no_grad()
    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the vectors of texts.

        Args:
            texts: their tokens.

        Returns:
            fp32 [texts, width].
        """
        vectors = torch.empty(len(texts), self.width, dtype=torch.float32)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        while order:
            length = len(texts[order[0]])
            places = [place for place in order[:TOGETHER] if len(texts[place]) == length]
            order = order[len(places) :]
            ids = torch.tensor([list(texts[place]) for place in places], device=self._backbone.device)
            states = self._backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
            pooled = states[:, 0] if self.pooling == "cls" else states.mean(1)
            if self.normalizes:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            vectors[places] = pooled.cpu()
        return vectors


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}.") from None
