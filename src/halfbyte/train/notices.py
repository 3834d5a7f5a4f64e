"""What a run's numbers say of trouble: a sentence each, with what to do, told once.

A function of the events alone, which holds no clock and no model. Thresholds are wide: an ordinary run tells nothing
(tests/train/test_notices.py has the metrics of one).

    untrained     the loss stays at ln V, which a model has that gives every token of the vocabulary the same chance
    leaking       the loss is nearly 0 within the first pass over the data
    rising        the loss has risen well above that of the first steps
    clipped       the gradient is always far longer than what it is cut to
    standing      the learning rate is 0
    overfitting   the loss on held-out rows rises while that of training falls
    slowed        trained tokens a second are half of what they were
    unmeasured    a figure of an evaluation is infinite or no number
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median

from halfbyte.runs.events import Evaluation, Event, StepMetrics

WINDOW = 20
"""Steps that are looked at together."""
FEW = 3
"""Steps of which the first and the last are compared where there are no more yet."""
RECENT = 200
"""Steps whose speed is what it was before."""
FLAT = 0.03
"""Share of ln V by which a loss at it may differ."""
NOTHING = 0.01
"""A loss (nats) that is nearly 0; a label in a hundred of which nothing is known costs more."""
EARLY = 50
"""Steps within which it is not."""
FAR = 10.0
"""How many times ``max_grad_norm`` a gradient is where cutting it leaves little but its direction."""
WORSE = 1.05
"""How many times the best loss of an evaluation a worse one is, twice in a row."""


class Notices:
    """Called with each event of a run, returns the sentences that it gives rise to.

    Args:
        vocabulary: logits of the model, where its loss is one over them.
        max_grad_norm: what gradients are cut to; 0: they are not.
        is_likelihood: whether the loss is a negative log-likelihood per token.
        in_4_bits: whether the base is held in 4 bits.
    """

    def __init__(
        self, *, vocabulary: int, max_grad_norm: float, is_likelihood: bool = True, in_4_bits: bool = True
    ) -> None:
        self._uniform = math.log(max(vocabulary, 2))
        self._max_grad_norm = max_grad_norm
        self._is_likelihood = is_likelihood
        self._in_4_bits = in_4_bits
        self._steps: list[StepMetrics] = []
        self._evaluations: list[Evaluation] = []
        self._told: set[str] = set()

    def __call__(self, event: Event) -> list[str]:
        """Take an event, and return what is to be said."""
        match event:
            case StepMetrics():
                self._steps.append(event)
                looks: list[tuple[str, Callable[[], str | None]]] = [
                    ("standing", self._standing), ("clipped", self._clipped), ("slowed", self._slowed),
                ]  # fmt: skip
                if self._is_likelihood:
                    looks += [("untrained", self._untrained), ("leaking", self._leaking), ("rising", self._rising)]
            case Evaluation(figures=figures, not_finite=lacking):
                looks = [("unmeasured", lambda: self._unmeasured(lacking))] if lacking else []
                if "loss" in figures:
                    self._evaluations.append(event)
                    looks.append(("overfitting", self._overfitting))
            case _:
                return []
        return list(self._new(looks))

    def _new(self, looks: list[tuple[str, Callable[[], str | None]]]) -> Iterator[str]:
        for name, look in looks:
            if name not in self._told and (sentence := look()):
                self._told.add(name)
                yield sentence

    def _last(self, count: int = WINDOW) -> list[StepMetrics]:
        """Return the last steps, or none where there are fewer."""
        return self._steps[-count:] if len(self._steps) >= count else []

    def _untrained(self) -> str | None:
        losses = [step.loss for step in self._last()]
        if not losses or any(abs(loss - self._uniform) > FLAT * self._uniform for loss in losses):
            return None
        if fmean(losses[WINDOW // 2 :]) < 0.99 * fmean(losses[: WINDOW // 2]):
            return None  # it begins there, and falls
        return (
            f"The loss stays at {fmean(losses):.2f}, which is ln of the vocabulary ({self._uniform:.2f}): the model "
            "gives every token the same chance and learns nothing; look whether the base's weights were loaded and "
            "fit its tokenizer, and at the learning rate."
        )

    def _leaking(self) -> str | None:
        last = self._last(3)
        if not last or last[-1].step > EARLY or last[-1].epoch > 1 or any(step.loss > NOTHING for step in last):
            return None
        return (
            f"The loss is {last[-1].loss:.4f} after {last[-1].step} steps, on rows that were never trained on before: "
            "the answers probably stand in the prompts, or all rows are alike; look at the rows (halfbyte data)."
        )

    def _rising(self) -> str | None:
        losses = [step.loss for step in self._steps]
        begun = fmean(losses[:FEW])
        if len(losses) < 2 * FEW:
            return None
        if len(losses) < 2 * WINDOW:
            first, now = begun, min(losses[-FEW:])
            is_risen = now > max(2 * first, first + 3)
        else:
            first, now = fmean(losses[:WINDOW]), fmean(losses[-WINDOW:])
            is_risen = now > max(1.5 * first, first + 1)
            if not is_risen and now > max(2 * begun, begun + 2):  # it rose within the first steps, and stays there
                first, is_risen = begun, True
        if not is_risen:
            return None
        base = ", or hold the base in more than 4 bits (--quant-type int8 or none)" if self._in_4_bits else ""
        return (
            f"The loss has risen from {first:.2f} to {now:.2f}: training diverges; stop it and take a lower "
            f"learning_rate than {max(step.learning_rate for step in self._steps):g}{base}."
        )

    def _clipped(self) -> str | None:
        last = self._last(2 * WINDOW)
        limit = self._max_grad_norm
        if not limit or not last or min(step.grad_norm for step in last) <= FAR * limit:
            return None
        return (
            f"The gradient's norm was {median(step.grad_norm for step in last):.3g} in the last {len(last)} steps and "
            f"never below {FAR:g} times max_grad_norm ({limit:g}), so every step is cut to a small part of itself: a "
            "larger max_grad_norm, a longer warm-up (warmup_ratio) or a look at the data is due."
        )

    def _standing(self) -> str | None:
        last = self._last(3)
        if not last or any(step.learning_rate for step in last):
            return None
        return (
            f"The learning rate is 0 since step {last[0].step}, so nothing is learned: look at lr_scheduler_type, "
            "lr_scheduler_kwargs and max_steps."
        )

    def _overfitting(self) -> str | None:
        trained = [evaluation for evaluation in self._evaluations if evaluation.step]
        if len(trained) < 3:
            return None
        best = min(trained, key=lambda evaluation: evaluation.figures["loss"])
        least = best.figures["loss"]
        if trained[-3].step < best.step or any(e.figures["loss"] < WORSE * least for e in trained[-2:]):
            return None
        until = [step.loss for step in self._steps if step.step <= best.step][-WINDOW:]
        since = [step.loss for step in self._steps if step.step > best.step][-WINDOW:]
        if not until or not since or fmean(since) >= fmean(until):
            return None
        return (
            f"The loss on held-out rows was best at step {best.step} ({least:.3f}) and has risen to "
            f"{trained[-1].figures['loss']:.3f}, while that of training falls: the run learns its rows by heart; stop "
            "there (early_stopping_patience, keep_best), or take fewer epochs, more data, or more lora_dropout."
        )

    def _unmeasured(self, names: Sequence[str]) -> str:
        said = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        texts = "the general text" if set(names) == {"general_loss"} else "the held-out rows"
        base = ", or hold the base in more bits (--quant-type int8 or none)" if self._in_4_bits else ""
        are = "is" if len(names) == 1 else "are"
        return (
            f"The evaluation's {said} {are} not finite, so nothing is known of {texts} and it is never the best one: "
            "if the loss of training is finite, look for a row there that is unlike others (halfbyte data); if not, "
            f"take a lower learning_rate, compute in float32 (compute_dtype){base}."
        )

    def _slowed(self) -> str | None:
        known = [step for step in self._steps if step.tokens_per_second]
        if len(known) < 3 * WINDOW:
            return None
        before = median(step.tokens_per_second for step in known[WINDOW // 2 : -WINDOW][-RECENT:])
        now = median(step.tokens_per_second for step in known[-WINDOW:])
        if now * 2 > before:
            return None
        return (
            f"Steps have been half as fast as before since about step {self._last()[0].step} ({now:,.0f} trained "
            f"tokens a second, {before:,.0f} before): another process may be taking the processor or the memory; look "
            "with top."
        )
