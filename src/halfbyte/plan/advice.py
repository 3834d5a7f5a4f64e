"""What would make a run fit, or faster: options to paste, each of them planned before it is said."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import InputError, size_text
from halfbyte.plan.estimate import DoesNotFitError, Plan, plan_run, with_batch
from halfbyte.plan.rows import RowFacts, full_rows
from halfbyte.runs.config import TrainConfig

MOST_ROWS = 4096
SHOWN = 4
WORTH = 1.03
"""What is so many times as fast is worth being told."""
EVALUATED, EVALUATIONS = 0.2, 10
"""Share of a run's time from which evaluations are worth being fewer, and how many are enough."""

Foretell = Callable[[TrainConfig], Plan]


@dataclass(frozen=True)
class Advice:
    """Options that change a run.

    Attributes:
        flags: to add to the command line.
        plan: what comes of it.
    """

    flags: str
    plan: Plan

    def gain(self, over: Plan) -> float:
        """Return how many times as fast a run is: the whole of it, or a step where nobody knows how many there are."""
        mine, other = self.plan, over
        if mine.seconds is not None and other.seconds is not None:
            return other.seconds / mine.seconds
        return other.step.seconds / mine.step.seconds


@dataclass(frozen=True)
class Limits:
    """What fits.

    Attributes:
        batch: the most rows of a pass, at the lengths that there are; 0: none.
        batch_kept: the most with all activations kept; 0: none.
        length: the most tokens of a row, one row a pass.
        positions: what the model allows, if that is the limit.
    """

    batch: int
    batch_kept: int
    length: int
    positions: int | None


def limits(config: TrainConfig, facts: RowFacts | None = None, **options: Any) -> Limits:
    """Return the largest batch and the longest row that fit; ``options`` are those of ``plan_run``."""
    free_choice = config.model_copy(update={"gradient_checkpointing": None})
    unpacked = {**options, "packs": False}

    def rows(count: int, kept: bool) -> bool:
        tried = free_choice.model_copy(update={"batch_size": count})
        return _fits(tried, kept, facts=facts or full_rows(config.max_length), **unpacked)

    def tokens(length: int) -> bool:
        tried = free_choice.model_copy(update={"batch_size": 1, "max_length": length})
        return _fits(tried, False, facts=full_rows(length), **unpacked)

    model = options.get("model")
    positions = model.shape.most_positions if model else None
    length = _largest(tokens, positions or 2**20)
    return Limits(
        batch=_largest(lambda count: rows(count, False), MOST_ROWS),
        batch_kept=_largest(lambda count: rows(count, True), MOST_ROWS),
        length=length,
        positions=positions if length == positions else None,
    )


def that_fit(config: TrainConfig, **options: Any) -> list[Advice]:
    """Return options with which a run fits that does not as it is; the least change first."""
    return list(_that_fit(config, options))[:SHOWN]


def faster(plan: Plan, **options: Any) -> list[Advice]:
    """Return options with which a run takes less time and still fits, the fastest first.

    Another rank or dropout changes what is learnt, the others do not. Where much of the time goes to evaluations, fewer
    of them are among them.
    """
    config = plan.config
    candidates: list[tuple[str, TrainConfig]] = []
    for size in _divisors(config.rows_a_step):
        if size != config.rows_a_pass:
            tried = with_batch(config, size)
            candidates.append((_batch_flags(tried), tried))
    again = plan.policy.offloaded + plan.policy.recomputed
    if config.lora_dropout and not config.adapter:
        candidates.append(("--lora-dropout 0", config.model_copy(update={"lora_dropout": 0.0})))
    if config.rank > 16 and not config.adapter:
        candidates.append(("--rank 16", config.model_copy(update={"rank": 16})))
    if plan.seconds and plan.evaluations > EVALUATED * plan.seconds and not config.keep_best:
        fewer = max((plan.steps or 0) // EVALUATIONS, 1)
        if fewer > (config.eval_steps or config.save_steps):
            candidates.append((f"--eval-steps {fewer}", config.model_copy(update={"eval_steps": fewer})))
    found = []
    if again and config.memory is not None:
        whole = _whole(config, options)
        if whole is not None:
            found.append(whole)
    for flags, tried in candidates:
        try:
            found.append(Advice(flags, plan_run(tried, **options)))
        except DoesNotFitError:
            continue
    better = [advice for advice in found if advice.gain(plan) > WORTH]
    best_batch = max((a for a in better if "batch-size" in a.flags), key=lambda a: a.gain(plan), default=None)
    chosen = [a for a in better if "batch-size" not in a.flags or a is best_batch]
    return sorted(chosen, key=lambda advice: -advice.gain(plan))[:SHOWN]


def refusal(config: TrainConfig, error: InputError, **options: Any) -> InputError:
    """Return the sentence that refuses a run which does not fit, with the options that would."""
    reason = str(error).rstrip(".").split(": ")[0]
    ways = that_fit(config, **options)
    if not ways:
        return InputError(f"{reason}, and no smaller batch, length or rank would do: take a smaller model.")
    told = " or ".join(advice.flags for advice in ways)
    return InputError(f"{reason}: it would fit with {told}.")


def _that_fit(config: TrainConfig, options: dict[str, Any]) -> Iterator[Advice]:
    smaller = [size for size in _divisors(config.rows_a_step) if size < config.rows_a_pass]
    for size in sorted(smaller, reverse=True):
        tried = with_batch(config, size)
        if (plan := _planned(tried, options)) is not None:
            yield Advice(_batch_flags(tried), plan)
            break
    if config.gradient_checkpointing is not None:
        tried = config.model_copy(update={"gradient_checkpointing": None})
        if (plan := _planned(tried, options)) is not None:
            yield Advice("gradient_checkpointing left out", plan)
    least = with_batch(config, 1)
    longest = options["facts"].longest if options.get("facts") else config.max_length

    def tokens(length: int) -> bool:
        return _planned(*_cut(least, length, options)) is not None

    length = _largest(tokens, longest)
    if 2 <= length < longest:
        plan = plan_run(*_cut(least, length, options)[:1], **_cut(least, length, options)[1])
        yield Advice(f"--max-length {length} {_batch_flags(least)}", plan)
    if config.memory is not None:
        wanted = _least_memory(config, options)
        if wanted is not None:
            yield wanted


def _cut(config: TrainConfig, length: int, options: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the options of a run whose rows are cut to ``length`` tokens."""
    return config.model_copy(update={"max_length": length}), {**options, "facts": full_rows(length), "packs": False}


def _least_memory(config: TrainConfig, options: dict[str, Any]) -> Advice | None:
    """Return the least memory, to eighths of a GiB, with which the run fits."""

    def fits(eighths: int) -> bool:
        return _planned(config.model_copy(update={"memory": eighths * 2**27}), options) is not None

    most = 2**13
    if not fits(most):
        return None
    eighths = most - _largest(lambda less: fits(most - less), most - 1)
    tried = config.model_copy(update={"memory": eighths * 2**27})
    return Advice(f"--memory {eighths / 8:g}GiB", plan_run(tried, **options))


def _whole(config: TrainConfig, options: dict[str, Any]) -> Advice | None:
    """Return the least memory with which nothing is recomputed."""

    def fits(eighths: int) -> bool:
        return _fits(config.model_copy(update={"memory": eighths * 2**27}), True, **options)

    most = 2**13
    if not fits(most):
        return None
    eighths = most - _largest(lambda less: fits(most - less), most - 1)
    return Advice(
        f"--memory {eighths / 8:g}GiB", plan_run(config.model_copy(update={"memory": eighths * 2**27}), **options)
    )


def _batch_flags(config: TrainConfig) -> str:
    return f"--batch-size {config.batch_size} --gradient-accumulation-steps {config.gradient_accumulation_steps}"


def _divisors(rows: int) -> list[int]:
    return [size for size in range(1, rows + 1) if rows % size == 0]


def _planned(config: TrainConfig, options: dict[str, Any]) -> Plan | None:
    try:
        return plan_run(config, **options)
    except DoesNotFitError:
        return None


def _fits(config: TrainConfig, kept: bool, **options: Any) -> bool:
    plan = _planned(config, options)
    return plan is not None and not (kept and plan.policy.offloaded + plan.policy.recomputed)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that fits, all smaller ones fitting too; 0: not even 1."""
    if most < 1 or not fits(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def size_of(advice: Advice) -> str:
    """Return what a run with these options takes, in words."""
    return f"{size_text(advice.plan.memory.peak)}, {advice.plan.step.seconds:.3g} s a step"
