"""``trl.DataCollatorForCompletionOnlyLM``, gone since TRL 0.20: labels begin after the template of the answer.

A row's last ``response_template`` ends what is not trained; with an ``instruction_template`` each answer of a
conversation is trained, from a response's template to the next instruction's. A row without is not trained at all,
which is said once.
"""

from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling

from halfbyte.choices import IGNORED
from halfbyte.hf.dropin.said import say


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Pads rows, and gives labels to their answers alone.

    Args:
        response_template: what an answer begins after, as text or as ids.
        instruction_template: what a question begins with, likewise; None where a row has one answer.
        mlm: as of transformers' collator.
        ignore_index: the label of what is not trained.
        padding_free: refused.
        **kwargs: of transformers' collator.
    """

    def __init__(
        self,
        response_template: str | list[int],
        instruction_template: str | list[int] | None = None,
        *args: Any,
        mlm: bool = False,
        ignore_index: int = IGNORED,
        padding_free: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, mlm=mlm, **kwargs)
        if padding_free:
            raise ValueError("DataCollatorForCompletionOnlyLM(padding_free=True): use SFTConfig(padding_free=True).")
        self.response_template = response_template
        self.instruction_template = instruction_template
        self.response_token_ids = self._ids(response_template)
        self.instruction_token_ids = None if instruction_template is None else self._ids(instruction_template)
        self.ignore_index = ignore_index

    def _ids(self, template: str | list[int]) -> list[int]:
        if isinstance(template, str):
            ids: list[int] = self.tokenizer.encode(template, add_special_tokens=False)
            return ids
        return list(template)

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[B, L]``."""
        examples = [
            {key: row[key] for key in ("input_ids", "attention_mask") if key in row} if isinstance(row, dict) else row
            for row in examples
        ]
        batch: dict[str, Any] = super().torch_call(examples)
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"], strict=True):
            trained = torch.zeros_like(labels, dtype=torch.bool)
            for begin, end in self._answers(row):
                trained[begin:end] = True
            if not trained.any():
                say(
                    f"DataCollatorForCompletionOnlyLM: a row has no response template {self.response_template!r}, so "
                    "that it is not trained; it may be cut off, or be other tokens in its surroundings."
                )
            labels[~trained] = self.ignore_index
        return batch

    def _answers(self, row: list[int]) -> list[tuple[int, int]]:
        responses = _ends(row, self.response_token_ids)
        if self.instruction_token_ids is None:
            return [(responses[-1], len(row))] if responses else []
        questions = [end - len(self.instruction_token_ids) for end in _ends(row, self.instruction_token_ids)]
        return [(begin, min([at for at in questions if at >= begin], default=len(row))) for begin in responses]


def _ends(row: list[int], template: list[int]) -> list[int]:
    """Return where ``template`` ends in ``row``, each time."""
    width = len(template)
    return [at + width for at in range(len(row) - width + 1) if row[at : at + width] == template]
