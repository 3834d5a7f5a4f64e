"""A plan in words: what it takes, what becomes of it, what fits, and what would make it fit or faster."""

import re
from collections.abc import Mapping, Sequence

from halfbyte.errors import InputError, counted, size_text
from halfbyte.plan.advice import Advice, Limits
from halfbyte.plan.estimate import Plan
from halfbyte.plan.gpus import GB, OURS, Card, gpu_parts, gpu_seconds, longest_on
from halfbyte.plan.machine import Machine
from halfbyte.plan.ranks import active_adapter

WIDTH = 28
"""Characters of the longest bar."""
MEMORY = {
    "base": "base model",
    "adapter": "adapter",
    "gradients": "its gradients",
    "state": "optimizer state",
    "kept": "activations kept",
    "inputs": "inputs of layers",
    "work": "a layer at work",
    "process": "the process",
}
TIMES = {
    "base": "base products", "recomputed": "recomputing", "lora": "LoRA", "attention": "attention",
    "element_wise": "element-wise", "head": "output head", "optimizer": "optimizer", "python": "Python",
    "disk": "waiting for the disk",
}  # fmt: skip
UNITS = {"d": 86_400, "h": 3600, "min": 60, "m": 60, "s": 1}


def lines(plan: Plan) -> list[str]:
    """Return a plan as lines: the model, the machine, memory with its picture, time, disk."""
    return [*_about(plan), "", *memory_lines(plan), "", *_work(plan)]


def memory_lines(plan: Plan) -> list[str]:
    """Return the memory at the peak by part, a bar each."""
    memory = plan.memory
    mapped = memory.base_mapped
    where = ", mapped from its files" if mapped == memory.base else ", partly mapped" if mapped else ""
    parts = {MEMORY[name]: size for name, size in memory.parts().items() if size}
    parts = {name + (where if name == MEMORY["base"] else ""): size for name, size in parts.items()}
    budget = plan.config.memory
    beside = f"; with them it may take {size_text(budget)}" if budget else ""
    told = [
        f"Peak memory {size_text(memory.peak)}, of it {size_text(memory.anonymous)} anonymous, beyond the "
        f"{size_text(plan.imports)} that a process takes for its imports{beside}"
    ]
    told += bars(parts)
    if memory.paged_state:
        told.append(f"Paged to the disk: {size_text(memory.paged_state)} of optimizer state")
    return [*told, f"{plan.policy}."]


def bars(parts: Mapping[str, float]) -> list[str]:
    """Return a line a part: its name, its bytes, a bar as long as it is large."""
    if not parts:
        return []
    largest, name = max(parts.values()), max(map(len, parts))
    told = []
    for part, size in parts.items():
        bar = "█" * max(round(WIDTH * size / largest), 1) if size else ""
        told.append(f"  {part:{name}} {size_text(int(size)):>9}  {bar}".rstrip())
    return told


def _about(plan: Plan) -> list[str]:
    shape, model = plan.model.shape, plan.model
    form = {"none": "in 16 bits", "int8": "in 8 bits"}.get(model.quant_type, f"in {model.quant_type.upper()}")
    layers, parameters = counted(len(shape.layers), f"{shape.family} layer"), f"{shape.parameters:,} parameters"
    if mixtures := shape.mixtures:
        among = "" if len(mixtures) == len(shape.layers) else f", {len(mixtures)} of them"
        layers += f"{among} of {counted(mixtures[0].experts, 'expert')} each, {mixtures[0].taken} for a token"
        parameters += f", {shape.active_parameters:,} of them at work for a token"
    return [
        f"{model.name}: {layers}, {parameters}, {form}; {plan.trained:,} trained (LoRA)",
        machine_line(plan.machine),
    ]


def machine_line(machine: Machine) -> str:
    """Return what the times stand on."""
    where = f"{machine.name}, {machine.kernels}, {counted(machine.threads, 'thread')}"
    if not machine.is_measured:
        return f"{where}: not measured, times from stated rates, within a factor of two or three"
    return f"{where}: measured {machine.measured[:10]}"


def _work(plan: Plan) -> list[str]:
    step = plan.step
    parts = sorted(((seconds, TIMES[name]) for name, seconds in vars(step).items()), reverse=True)
    shown = ", ".join(
        f"{name} {seconds / step.seconds:.0%}" for seconds, name in parts if seconds > 0.01 * step.seconds
    )
    rate = plan.passes * plan.work.tokens / step.seconds
    rows, passes = plan.config.rows_a_step, f"{plan.passes:.3g}"
    told = [
        f"A step of {counted(rows, 'row')} in {passes} {'pass' if passes == '1' else 'passes'} takes "
        f"{duration(step.seconds)} "
        f"({rate:,.0f} tokens/s): {shown}"
    ]
    if plan.packed:
        told.append(f"Rows are packed, up to {plan.packed:,} tokens a pass.")
    if plan.seconds is not None and plan.steps is not None:
        ends = f", evaluations {duration(plan.evaluations)} of it" if plan.evaluations else ""
        take = "takes" if plan.steps == 1 else "take"
        told.append(f"{counted(plan.steps, 'step')} {take} {duration(plan.seconds)}{ends}; loading apart.")
    told.append(f"On the disk: at most {size_text(plan.disk)} at a time.")
    return told


def limit_lines(found: Limits, plan: Plan) -> list[str]:
    """Return the largest batch and the longest row that fit."""
    bound = ", all that the model allows" if found.positions else ""
    longest = max(plan.work.longest, 1)
    return [
        f"There is room for {counted(found.batch, 'row')} of {longest:,} tokens a pass, {found.batch_kept:,} with all "
        f"activations kept; for one row of {found.length:,} tokens{bound}."
    ]


def advice_lines(found: Sequence[Advice], plan: Plan) -> list[str]:
    """Return options that make a run faster, with what they would come to."""
    told = []
    for advice in found:
        told.append(
            f"  {advice.flags:50} {advice.gain(plan):.2f} times as fast, {size_text(advice.plan.memory.peak)}: "
            f"{duration(advice.plan.step.seconds)} a step"
        )
    return ["Faster, with options to add (another rank or dropout learns otherwise):", *told] if told else []


def card_lines(plan: Plan, card: Card, ranks: Sequence[Mapping[str, int]]) -> list[str]:
    """Return what a run would take on a GPU: an estimate from its sheet.

    Raises:
        InputError: the model does not fit on it.
    """
    shape = plan.model.shape
    parts = gpu_parts(shape, ranks, plan.work.tokens, OURS, plan.model.quant_type)
    whole, room = sum(parts.values()), card.memory * GB
    longest = longest_on(room, shape, ranks)
    if whole > room:
        fits = f"a pass of {longest:,} tokens would fit" if longest else "not even the model fits"
        raise InputError(
            f"{plan.model.name} needs about {whole / GB:.1f} GB on {card.name}, which has {card.memory:g} GB, by "
            f"estimate: {fits}; lower --batch-size or --max-length, or take another card."
        )
    seconds = gpu_seconds(card, shape, active_adapter(shape, ranks), plan.work, plan.passes)
    sheet = "" if card.confirmed else " (its arithmetic is not confirmed by a maker's sheet)"
    return [
        f"On {card.name}{sheet}, an estimate from published figures, not measured: {whole / GB:.1f} of "
        f"{card.memory:g} GB with every layer recomputed",
        *bars(parts),
        f"A step takes about {duration(seconds)}, within a factor of two; a pass may have {longest:,} tokens.",
    ]


def seconds_of(text: str) -> float:
    """Read a time such as ``2h``, ``90min``, ``1h30m`` or ``45s``.

    Raises:
        InputError: it is none.
    """
    pieces = re.findall(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)", text.strip())
    if not pieces or "".join(a + b for a, b in pieces) != re.sub(r"\s", "", text):
        raise InputError(f"--time is {text!r}; give a time such as 2h, 90min or 1h30m.")
    return sum(float(number) * UNITS[unit] for number, unit in pieces)


def duration(seconds: float) -> str:
    """Return a time as a person says it."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:.3g} days"


def compared(plan: Plan, peak: int, step: float) -> str:
    """Return what was foretold beside what a run took.

    Args:
        plan: from before it.
        peak: bytes, as :class:`halfbyte.plan.memory.Memory` counts.
        step: seconds of a step, the median.
    """
    rates = "" if plan.machine.is_measured else ", from stated rates (halfbyte plan measures this machine)"
    return (
        f"Foretold were {size_text(plan.memory.peak)} and {duration(plan.step.seconds)} a step{rates}; it took "
        f"{size_text(peak)} and {duration(step)}"
    )


def time_lines(plan: Plan, limit: float) -> list[str]:
    """Return whether a run ends in time, or what of it does.

    Args:
        plan: of the run.
        limit: seconds.

    Raises:
        InputError: not even a step does.
    """
    step = plan.step.seconds
    if step > limit:
        raise InputError(
            f"One step takes {duration(step)} here, and the run may take {duration(limit)}: lower "
            "--gradient-accumulation-steps, --batch-size or --max-length, or give it more time."
        )
    steps = int((limit - min(plan.evaluations, limit / 2)) / step)
    if plan.seconds is None:
        return [f"In {duration(limit)} there is time for {counted(steps, 'step')}: --max-steps {steps}"]
    if plan.seconds <= limit:
        return [f"The run takes {duration(plan.seconds)} of the {duration(limit)} that it may."]
    return [
        f"The run takes {duration(plan.seconds)}, more than {duration(limit)}: --max-steps {steps} would end in time."
    ]


def as_json(plan: Plan) -> dict[str, object]:
    """Return what a plan says as numbers: bytes and seconds."""
    return {
        "model": plan.model.name,
        "family": plan.model.shape.family,
        "parameters": plan.model.shape.parameters,
        "active_parameters": plan.model.shape.active_parameters,
        "trained_parameters": plan.trained,
        "peak_bytes": plan.memory.peak,
        "memory": plan.memory.parts() | {"base_mapped": plan.memory.base_mapped},
        "layers": {
            "kept": plan.policy.kept, "recomputed": plan.policy.recomputed, "offloaded": plan.policy.offloaded
        },
        "step_seconds": plan.step.seconds,
        "step": dict(vars(plan.step)),
        "steps": plan.steps,
        "seconds": plan.seconds,
        "disk_bytes": plan.disk,
        "machine": plan.machine.model_dump(mode="json"),
    }  # fmt: skip
