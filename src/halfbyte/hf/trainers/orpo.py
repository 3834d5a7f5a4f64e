"""TRL's ORPO trainer (1.16: ``trl.experimental.orpo``) as ours, its logits never whole.

ORPO (arXiv 2403.07691, equations 3 to 7) needs no reference. Of a pair with prompt x, w chosen and l rejected,

    loss = NLL(x, w) - beta log sigmoid(log odds(w|x) - log odds(l|x)),    odds(y|x) = p(y|x) / (1 - p(y|x))

where log p(y|x) is the mean over the tokens of y, and the likelihood NLL is that of prompt and answer, as in TRL. TRL
takes both from logits of all positions, in fp32 a vocabulary for each token of both sequences; here the head is asked
for log-probabilities where one is needed. What TRL logs as ``logits/chosen`` and ``logits/rejected`` is a mean over
all positions, padding included; here it is over those of the answer (of the chosen one, of its prompt too).

NLL is a mean over the tokens of a pass, the other term one over its pairs. In several processes both are those of all
of them together (:mod:`halfbyte.hf.trainers.shares`); TRL's NLL is then the mean of the processes' means.
"""

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte.choices import IGNORED
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.methods import _Joined
from halfbyte.hf.trainers.preference import Preferences, is_tokenized

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental import orpo


@dataclass
class ORPOConfig(_Joined, orpo.ORPOConfig):
    """TRL's ``ORPOConfig`` with the defaults of :class:`halfbyte.hf.trainers.SFTConfig`."""

    bf16: bool | None = field(default=False, metadata={"help": "Whether to run the model under bf16 autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many checkpoints are kept, beside the best one; None keeps all."}
    )


class ORPOTrainer(Preferences, orpo.ORPOTrainer):
    """TRL's ``ORPOTrainer`` for a PEFT model: see :mod:`halfbyte.hf.trainers.base` for what differs."""

    _config = ORPOConfig
    _weighs_itself = True

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        datasets = {name: kwargs[name] for name in ("train_dataset", "eval_dataset") if is_tokenized(kwargs.get(name))}
        super().__init__(model, *args, **kwargs | {name: _unmapped(rows) for name, rows in datasets.items()})
        for name, rows in datasets.items():
            setattr(self, name, rows)
        self.use_dpo_data_collator = True  # else each evaluation warns, whatever the collator makes

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return log-probabilities and mean logits of both answers, and the chosen sequences' loss, as TRL does."""
        if "completion_mask" in batch:
            ids, attention = batch["input_ids"], batch["attention_mask"]
            answers = batch["completion_mask"].bool()
        else:
            both = self.concatenated_inputs(batch, False, self.padding_value, self.accelerator.device)
            ids, attention = both["concatenated_input_ids"], both["concatenated_attention_mask"]
            answers = both["concatenated_labels"] != IGNORED
        pairs = len(ids) // 2
        scored = torch.cat([attention[:pairs].bool(), answers[pairs:]])
        outputs = model(
            input_ids=ids,
            attention_mask=attention,
            labels=ids.masked_fill(~scored, IGNORED),
            use_cache=False,
            fused_lm_head=True,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        scored, answers = scored[:, 1:], answers[:, 1:]
        log_probs = outputs.log_probs[:, -scored.shape[1] :]
        logits = outputs.mean_logits[:, -scored.shape[1] :].detach()
        means = (log_probs * answers).sum(1) / answers.sum(1)
        nll = -log_probs[:pairs][scored[:pairs]]
        of_chosen, of_rejected = self._weights([int(scored[:pairs].sum()), int(scored[pairs:].sum())])
        chosen, rejected = logits[:pairs][scored[:pairs]] * of_chosen, logits[pairs:][scored[pairs:]] * of_rejected
        parts = (means[:pairs], means[pairs:], chosen, rejected, nll.mean() * of_chosen)
        return (*parts, outputs.aux_loss) if self.aux_loss_enabled else parts

    def _weights(self, tokens: list[int]) -> list[float]:
        """Return what multiplies means over this process's tokens, the mean over processes being that over tokens."""
        if self._is_alone or distributed.world_size() == 1:
            return [1.0] * len(tokens)
        own = [number * bool(self._share.own) for number in tokens]
        everywhere = distributed.totals(own)
        return [here * distributed.world_size() / there for here, there in zip(own, everywhere, strict=True)]

    def odds_ratio_loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return TRL's terms of each pair, weighted where the processes have not as many pairs."""
        losses, chosen, rejected, ratio, log_odds = super().odds_ratio_loss(*args, **kwargs)
        weight = self._share.weight
        return losses * weight, chosen, rejected, ratio * weight, log_odds * weight


def _unmapped(dataset: Any) -> Any:
    """Return a dataset that TRL's constructor, which tokenizes with ``map`` whatever it is given, leaves as it is."""
    still = copy.copy(dataset)
    still.map = lambda *_, **__: still
    return still
