"""The sides of the training benchmark: each a process of its own, which takes a step when it is told to.

- ``halfbyte``: ``halfbyte train`` itself; a listener of its events is what waits, so that everything a run does in a
  step counts.
- ``bitsandbytes``: transformers and peft over an NF4 base with double quantization, PagedAdamW8bit, bf16 autocast.
- ``lora16``: transformers and peft over a dense bf16 base, torch's AdamW; with bf16 autocast over fp32 adapters, or
  without autocast and with bf16 adapters.

The two peers run with gradient checkpointing and without. All clip gradients as ``halfbyte train`` does, start from the
same adapter (one seed, drawn by PEFT in the order of the layers) and train on the same rows.

Talk over a pipe: the process is sent which side it is and its job, imports, sends :class:`Imported` and waits; told to
go on it loads, sends :class:`Loaded` and waits; told ``"step"`` or ``"profile"`` it takes a step, sends :class:`Step`
and waits, until it is ended. What goes wrong is sent as :class:`Failed`.

transformers and peft are imported by the side's process alone, once it has silenced what they log on import.
"""

import contextlib
import dataclasses
import importlib
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from halfbyte import data, kernels
from halfbyte.bench.parts import Profile
from halfbyte.errors import InputError
from halfbyte.quiet import quiet
from halfbyte.runs import events

LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 0.3
SEED = 0


class Imported(NamedTuple):
    """The side has imported what it needs."""


class Loaded(NamedTuple):
    """The side has loaded the model and put the adapter on it, in so many seconds."""

    seconds: float


class Step(NamedTuple):
    """The side has taken a step.

    Attributes:
        seconds: that it took.
        processor_seconds: that all its threads together took.
        loss: before the update.
        parts: where the time of a profiled step went.
    """

    seconds: float
    processor_seconds: float
    loss: float
    parts: dict[str, float] | None


class Failed(NamedTuple):
    """The side cannot go on; ``user`` tells whether the input is at fault."""

    text: str
    user: bool


@dataclasses.dataclass(frozen=True)
class Job:
    """The work that every side does.

    Attributes:
        model: folder or hub id of a 16-bit model.
        data: a data file of ``batch`` rows of at least ``length`` tokens, which every step trains on.
        folder: where a side may write.
        batch, length: rows of a step, tokens of a row.
        rank: of LoRA, on every linear layer but the head; its alpha is twice that.
        steps: how many there will be, at most.
    """

    model: str
    data: str
    folder: str
    batch: int
    length: int
    rank: int
    steps: int


class Pace:
    """A side's end of the pipe.

    Args:
        connection: where the other end is.
        rank: LoRA's, by which a profile tells products apart.
    """

    def __init__(self, connection: Connection, rank: int) -> None:
        self._connection = connection
        self._rank = rank
        self._begun = self._loaded = time.perf_counter()
        self._processor = time.process_time()
        self._profile: Profile | None = None

    def loading(self) -> None:
        """The clock of loading starts."""
        self._begun = time.perf_counter()

    def loaded(self) -> None:
        """The model and its adapter are there."""
        self._loaded = time.perf_counter()

    def ready(self) -> None:
        """All is ready for the first step; wait for it."""
        self._connection.send(Loaded(self._loaded - self._begun))
        self._wait()

    def stepped(self, loss: float) -> None:
        """A step is done; wait for the next."""
        seconds, processor = time.perf_counter() - self._begun, time.process_time() - self._processor
        parts = None
        if self._profile is not None:
            parts = self._profile.stop(self._rank)
            self._profile = None
        self._connection.send(Step(seconds, processor, loss, parts))
        self._wait()

    def _wait(self) -> None:
        if self._connection.recv() == "profile":
            self._profile = Profile()
        self._begun, self._processor = time.perf_counter(), time.process_time()


class Side(Protocol):
    """An implementation of training."""

    @property
    def setting(self) -> str:
        """Which of its ways this is; empty if it has one."""

    def run(self, job: Job, pace: Pace) -> None:
        """Load, then take a step each time that ``pace`` returns."""


@dataclasses.dataclass(frozen=True)
class Halfbyte:
    """``halfbyte train``."""

    setting = ""

    def run(self, job: Job, pace: Pace) -> None:
        """Train as the command does."""
        from halfbyte.train import TrainConfig, fine_tune

        options = TrainConfig(
            model=job.model,
            data=job.data,
            output=Path(job.folder),
            rank=job.rank,
            lora_alpha=2 * job.rank,
            lora_dropout=0.0,
            max_steps=job.steps,
            batch_size=job.batch,
            gradient_accumulation_steps=1,
            max_length=job.length,
            group_by_length=False,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            seed=SEED,
            save_steps=job.steps + 1,
            overwrite=True,
        )

        def listen(event: events.Event) -> None:
            """Take a step only when told to: what a run does in a step counts, its events included."""
            match event:
                case events.Stage(name="model"):
                    pace.loading()
                case events.Stage(name="plan"):  # the model is there
                    pace.loaded()
                case events.Begin():
                    pace.ready()
                case events.StepMetrics(loss=loss):
                    pace.stepped(loss)

        fine_tune(options, listen)


@dataclasses.dataclass(frozen=True)
class Peer:
    """transformers and peft, as their documentation combines them with bitsandbytes or a 16-bit base.

    Attributes:
        four_bit: over a base in bitsandbytes' 4 bits, or in bf16.
        checkpointing: with gradient checkpointing.
        autocast: bf16 autocast over fp32 adapters, or bf16 adapters without autocast.

    Where torch has no products in bf16 worth the name (:func:`halfbyte.kernels.product_dtype`) all is in fp32.
    """

    four_bit: bool
    checkpointing: bool
    autocast: bool = True

    @property
    def setting(self) -> str:
        """Which way this is, in words."""
        adapters = ", fp32" if self.dtype == torch.float32 else "" if self.autocast else ", bf16 adapters"
        return f"{'with' if self.checkpointing else 'without'} checkpointing{adapters}"

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return kernels.product_dtype(torch.bfloat16, "cpu")

    def run(self, job: Job, pace: Pace) -> None:
        """Train by hand, as short scripts do."""
        from halfbyte import hf

        pace.loading()
        model, optimizer = self._load(job)
        pace.loaded()
        rows = data.tokenize(data.read_examples(job.data), hf.load_tokenizer(job.model), job.length).rows
        batch = data.Collator(None)(rows)
        inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}  # no row is padded
        parameters = [p for p in model.parameters() if p.requires_grad]
        autocast = self.autocast and self.dtype == torch.bfloat16
        pace.ready()
        while True:
            with torch.autocast("cpu", self.dtype) if autocast else contextlib.nullcontext():
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            pace.stepped(loss.item())

    def _load(self, job: Job) -> tuple[Any, Any]:
        import transformers
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        options: dict[str, Any] = {}
        if self.four_bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=self.dtype, device_map="cpu", **options)
        model.config.use_cache = False
        reentrant = {"use_reentrant": False}
        if self.four_bit:
            model = prepare_model_for_kbit_training(
                model, use_gradient_checkpointing=self.checkpointing, gradient_checkpointing_kwargs=reentrant
            )
        elif self.checkpointing:
            model.gradient_checkpointing_enable(reentrant)
            model.enable_input_require_grads()
        transformers.set_seed(SEED)
        lora = LoraConfig(
            r=job.rank,
            lora_alpha=2 * job.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=self.autocast).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:  # PEFT begins in the base's dtype: all sides as over bf16
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        if self.four_bit:
            make = importlib.import_module("bitsandbytes.optim").PagedAdamW8bit
            return model, make(parameters, lr=LEARNING_RATE, weight_decay=0.0)
        return model, torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)


OURS = Halfbyte()
PEERS: dict[str, tuple[Peer, ...]] = {
    "bitsandbytes": (Peer(True, True), Peer(True, False)),
    "lora16": (Peer(False, True), Peer(False, False), Peer(False, True, False), Peer(False, False, False)),
}
"""The settings of each peer, of which the fastest is measured."""


def serve(connection: Connection) -> None:
    """Be the side that the other end of ``connection`` names, until the process is ended or the side fails."""
    warnings.simplefilter("ignore")
    with quiet():
        _serve(connection)


def _serve(connection: Connection) -> None:
    try:
        side, job = connection.recv()
        if isinstance(side, Peer):
            libraries = ["peft", "halfbyte.hf", *(["bitsandbytes.optim"] if side.four_bit else [])]
        else:
            libraries = ["halfbyte.train.run"]
        for library in libraries:
            importlib.import_module(library)
        connection.send(Imported())
        connection.recv()
        side.run(job, Pace(connection, job.rank))
    except (EOFError, ConnectionError):
        return  # nobody is left to tell
    except Exception as error:
        user = isinstance(error, InputError)
        connection.send(Failed(str(error) if user else traceback.format_exc(), user))
