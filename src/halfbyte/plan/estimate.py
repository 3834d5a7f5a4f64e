"""A run foretold from its options, the model's configuration and the rows: nothing is loaded.

What layers keep comes from a formula (:mod:`halfbyte.plan.costs`), and what becomes of it is chosen as the run itself
chooses (:func:`halfbyte.hf.layers.activations.decide`), so that the plan's policy is the run's wherever the free memory
is what it was.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.hf.layers.activations import Policy
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.configs import config_at
from halfbyte.hf.models.foreign.packed import packing_of as foreign_packing
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.pager import least_of
from halfbyte.memory import anonymous_memory, free_memory
from halfbyte.plan import calibrate
from halfbyte.plan.costs import layer_costs
from halfbyte.plan.machine import Machine
from halfbyte.plan.memory import (
    Base,
    Memory,
    adapter_sizes,
    base_bytes,
    layer_bytes,
    memory_of,
    objects,
    resident_state,
)  # fmt: skip
from halfbyte.plan.ranks import adapter_parameters, adapter_tensors, ranks_of
from halfbyte.plan.rows import RowFacts, full_rows, packing_of, steps_of, work_of
from halfbyte.plan.shape import Shape, shape_of
from halfbyte.plan.times import Pass, StepTime, disk_seconds, pace_of, step_time
from halfbyte.runs.config import TrainConfig

FREE_SHARE = 0.9
"""Of the memory that is free, what a run takes where no budget was given."""
KEPT_CHECKPOINTS = 2
"""Checkpoints that a run keeps while it lasts."""
TOKENIZER = 5 * 2**20
"""Bytes of a tokenizer's files, about."""
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class DoesNotFitError(InputError):
    """A run that memory has no room for."""


@dataclass(frozen=True)
class Model:
    """What is known of a base before it is loaded.

    Attributes:
        name: as it was called.
        shape: of its layers.
        quant_type: number format of its linears once it is loaded; with it ``blocksize`` and ``double_quant``.
        mapped_linears: whether they are in that format in the files, which are mapped.
        mapped_dense: whether the rest is in the compute dtype there.
        converted: whether a quantized copy is made in the cache first.
    """

    name: str
    shape: Shape
    quant_type: str
    blocksize: int | str | None
    double_quant: bool
    mapped_linears: bool
    mapped_dense: bool
    converted: bool = False

    def base(self, itemsize: int, distinct: int | None = None) -> Base:
        """Return its bytes; ``distinct`` tokens of the data are looked up in untied embeddings."""
        quantized, dense = base_bytes(
            self.shape, self.quant_type, self.blocksize, self.double_quant, itemsize, distinct
        )
        mapped = quantized * self.mapped_linears + dense * self.mapped_dense
        return Base(quantized, dense, mapped)

    def pageable(self, itemsize: int) -> activations.Base:
        """Return what of the layers and of an untied head lies in files, and how much of it has to have room.

        As :mod:`halfbyte.hf.models.paging` finds on the loaded model: each layer is one unit, the head another.
        """
        shape = self.shape
        units = [
            layer_bytes(layer, self.quant_type, self.blocksize, self.double_quant) * self.mapped_linears
            + itemsize * layer.dense_weights * self.mapped_dense
            for layer in shape.layers
        ]
        head = itemsize * shape.vocabulary * shape.hidden * self.mapped_dense
        units += [] if shape.tied else [head]
        return activations.Base(sum(units), least_of(units), head if shape.tied else 0)

    def paged(self, resident: int, itemsize: int, distinct: int | None) -> Base:
        """Return what is in memory of a base of which ``resident`` bytes of layers and head are."""
        whole, pageable = self.base(itemsize, distinct), self.pageable(itemsize)
        rest = whole.all - pageable.all
        return Base(resident, rest, resident + rest - whole.anonymous)


@dataclass(frozen=True)
class Plan:
    """A run foretold.

    Attributes:
        config: its options, with numbers where they say auto.
        model: its base.
        machine: whose rates the times are made of.
        policy: what becomes of activations.
        memory: at the peak of a step.
        step: seconds of a step, by part.
        steps: how many there are, or None.
        packed: tokens that a packed pass may hold, or None.
        work: an average pass, and ``passes`` of them a step.
        evaluations: seconds of all evaluations.
        trained: parameters of the adapter.
        disk: bytes that the run writes, at most at a time.
        imports: anonymous bytes of the process that planned, which a run's process has too.
    """

    config: TrainConfig
    model: Model
    machine: Machine
    policy: Policy
    memory: Memory
    step: StepTime
    steps: int | None
    packed: int | None
    work: Pass
    passes: float
    evaluations: float
    trained: int
    disk: int
    imports: int

    @property
    def seconds(self) -> float | None:
        """Of training, evaluations included, loading apart."""
        return None if self.steps is None else self.steps * self.step.seconds + self.evaluations


def look_at(config: TrainConfig) -> Model:
    """Look at a base model without loading it.

    Raises:
        InputError: there is none, or no formula for it.
    """
    place = locate(config.model)
    found = config_at(place, config.trust_remote_code)
    shape = shape_of(found, config.model)
    held = getattr(found, "quantization_config", None)
    converted = bool(place.gguf or foreign_packing(found))
    dtype = str(getattr(found, "dtype", None) or "float32").removeprefix("torch.")
    if held is None or converted:
        shared = converted or (config.processes > 1 and config.quant_type != "none")
        quant = HalfbyteConfig(config.quant_type, config.blocksize, config.double_quant)
        dense = dtype == config.compute_dtype
        as_it_is = config.quant_type == "none" and dense
        return _model(config, shape, quant, shared or as_it_is, shared or dense, shared)
    quant = HalfbyteConfig.from_folder(held if isinstance(held, dict) else held.to_dict())
    return _model(config, shape, quant, True, dtype == config.compute_dtype, False)


def _model(
    config: TrainConfig, shape: Shape, quant: HalfbyteConfig, linears: bool, dense: bool, converted: bool
) -> Model:
    name = Path(config.model).name if Path(config.model).is_absolute() else config.model
    return Model(name, shape, quant.quant_type, quant.blocksize, bool(quant.double_quant), linears, dense, converted)


def plan_run(
    config: TrainConfig,
    *,
    facts: RowFacts | None = None,
    length: int | None = None,
    model: Model | None = None,
    machine: Machine | None = None,
    sequences: int = 1,
    packs: bool = True,
    reference: bool = False,
    free: int | None = None,
) -> Plan:
    """Foretell a run.

    Args:
        config: its options.
        facts: of its rows; None: each has ``length`` tokens, all but the first trained.
        length: None: ``max_length``.
        model: its base, if it was looked at before.
        machine: whose rates to take; None: this one's.
        sequences: that go through the model for a row.
        packs: whether the rows of a step may be packed.
        reference: whether each pass is one of the untrained model too.
        free: bytes that training may take beyond what the process has now, the base's anonymous ones included; None:
            as the run would find.

    Raises:
        DoesNotFitError: nothing fits.
        InputError: the options say something else than the model has.
    """
    model = model or look_at(config)
    facts = facts or full_rows(length or config.max_length)
    machine = machine or calibrate.known()
    if config.batch_size == "auto":
        config = _fitted(config, facts, model, machine, sequences, packs, free)
    ranks = ranks_of(config, model.shape)
    trained = adapter_parameters(model.shape, ranks)
    itemsize, dropout = ITEMSIZE[config.compute_dtype], config.lora_dropout > 0
    base = model.base(itemsize, facts.distinct)
    together = config.gradient_accumulation_steps if layer_by_layer(config) else 1
    if free is None:
        free = free_for(config) - objects(model.shape)
    free -= base.anonymous + 4 * trained

    state = resident_state(adapter_sizes(model.shape, ranks), config.optimizer)

    def policy_for(tokens: int) -> Policy:
        rows = max(config.rows_a_pass * sequences, -(-tokens // facts.longest))
        costs = layer_costs(model.shape, ranks, facts.longest, rows, itemsize, dropout)
        recompute = config.gradient_checkpointing
        try:
            pageable = model.pageable(itemsize)
            pace = pace_of(machine.rates, model.shape.active_weights, rows * facts.longest, pageable.all)
            return activations.decide(costs, trained, free, rows, recompute, pageable, together, state, pace)
        except InputError as error:
            raise DoesNotFitError(str(error)) from None

    packed = packing_of(config, facts, packs, config.max_length)
    policy = None
    if packed:
        try:
            policy = policy_for(packed.tokens)
        except DoesNotFitError:
            policy = None
        if policy is None or (policy.offloaded + policy.recomputed and config.gradient_checkpointing is None):
            packed, policy = packing_of(config, facts, packs, facts.longest), None
    policy = policy or policy_for(0)
    work, passes = work_of(config, facts, packed, sequences)
    steps = steps_of(config, facts)
    largest = packed.tokens if packed else config.rows_a_pass * sequences * facts.longest
    largest_trained = round(work.trained * largest / work.tokens) if work.tokens else 0
    memory = memory_of(
        model.shape,
        ranks,
        base if policy.paged is None else model.paged(policy.paged, itemsize, facts.distinct),
        policy,
        largest,
        largest_trained,
        config.optimizer,
        dropout,
        itemsize,
        together if policy.together else 1,
    )
    again = policy.offloaded + policy.recomputed
    tensors = adapter_tensors(ranks)
    options = {"recomputed": again, "dropout": dropout, "parameters": trained, "tensors": tensors}
    step = step_time(machine.rates, model.shape, ranks, work, passes, **options)  # type: ignore[arg-type]
    if policy.paged is not None:
        rounds = 1 if policy.together else passes
        read = disk_seconds(model.pageable(itemsize).all, policy.paged, machine.rates.disk)
        step = dataclasses.replace(step, disk=max(rounds * read - step.seconds, 0.0))
    if reference:
        more = step_time(machine.rates, model.shape, ranks, work, passes, backward=False)
        step = dataclasses.replace(step, base=step.base + more.seconds)
    evaluations = _evaluations(config, facts, model.shape, machine, ranks, steps)
    return Plan(
        config=config, model=model, machine=machine, policy=policy, memory=memory, step=step, steps=steps,
        packed=packed.tokens if packed else None, work=work, passes=passes, evaluations=evaluations, trained=trained,
        disk=_disk(config, memory, base, model, steps),
        imports=anonymous_memory(),
    )  # fmt: skip


def layer_by_layer(config: TrainConfig) -> bool:
    """Return whether the micro-batches of a step may go together through a base that is paged."""
    noisy = config.neftune_noise_alpha  # each would have to draw what it draws after the one before
    return config.task == "lm" and config.method == "sft" and not noisy and config.processes == 1


def free_for(config: TrainConfig) -> int:
    """Return the bytes that a run may take beyond what this process has now."""
    if config.memory is not None:
        return int(config.memory) - anonymous_memory()
    return int(FREE_SHARE * free_memory()) // config.processes


def threads_of(config: TrainConfig) -> int:
    """Return the threads of each process of a run."""
    return max(torch.get_num_threads() // config.processes, 1)


def _fitted(
    config: TrainConfig, facts: RowFacts, model: Model, machine: Machine, sequences: int, packs: bool, free: int | None
) -> TrainConfig:
    """Return ``config`` with the number of rows a pass that the run would find for ``auto``."""
    step = config.rows_a_step
    sizes = [size for size in range(step, 0, -1) if step % size == 0]
    for size in sizes:
        tried = with_batch(config, size)
        try:
            plan = plan_run(
                tried, facts=facts, model=model, machine=machine, sequences=sequences, packs=packs, free=free
            )
        except DoesNotFitError:
            continue
        if config.gradient_checkpointing is not None or not plan.policy.offloaded + plan.policy.recomputed:
            return tried
    return with_batch(config, 1)


def with_batch(config: TrainConfig, size: int) -> TrainConfig:
    """Return ``config`` with ``size`` rows a pass and as many rows a step as it has, or the next number that can be."""
    return config.model_copy(
        update={"batch_size": size, "gradient_accumulation_steps": max(-(-config.rows_a_step // size), 1)}
    )


def _evaluations(
    config: TrainConfig, facts: RowFacts, shape: Shape, machine: Machine, ranks: Any, steps: int | None
) -> float:
    """Return the seconds of all evaluations: forward alone."""
    if not facts.evaluated or steps is None:
        return 0.0
    times = steps // (config.eval_steps or config.save_steps) + 1 + config.eval_before
    share = facts.evaluated / facts.tokens
    work = Pass(facts.evaluated, share * facts.squares, share * facts.trained, facts.longest)
    once = step_time(machine.rates, shape, ranks, work, backward=False)
    return times * once.seconds


def _disk(config: TrainConfig, memory: Memory, base: Base, model: Model, steps: int | None) -> int:
    """Return the bytes that a run writes, at most at a time: checkpoints, adapter, paged state, a converted base."""
    state = memory.state + memory.paged_state
    kept = (config.keep or KEPT_CHECKPOINTS) + config.keep_best + 1
    if steps is not None and not config.save_minutes:
        kept = min(kept, -(-steps // config.save_steps) + config.keep_best)
    one = memory.adapter + TOKENIZER
    return kept * (one + state) + one + memory.paged_state + (base.all if model.converted else 0)
