"""The sides of the decoding benchmark, each a process of its own that does a :class:`Work` when it is told to.

- ``halfbyte``: the decoder that chat and the server use (:func:`halfbyte.generate.decoders.decoder_for`), the arg-max
  of its logits; adapters are LoRA of rank :data:`RANK` on every linear layer, over the same base.
- ``bitsandbytes``: transformers over NF4 with double quantization; ``bf16``: over the dense model; one forward a token,
  its cache grown and cut. Where torch has no products in bf16 worth the name both compute in fp32, ``fp32`` then.
- ``llama.cpp``: in :mod:`halfbyte.bench.llama_cpp`.

Talk over a pipe: the process is sent its side and the model, loads, sends :class:`Ready` and waits; each work that it
is sent it answers with :class:`Took`, or with :class:`Phases`, if those were asked for; what goes wrong is
:class:`Failed`.
"""

import dataclasses
import importlib
import itertools
import multiprocessing
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from halfbyte.bench.decode_works import Sizes, Work
from halfbyte.bench.stacks import Failed
from halfbyte.errors import InputError
from halfbyte.kernels import product_dtype
from halfbyte.quiet import quiet

RANK = 16


class Ready(NamedTuple):
    """The side has loaded."""

    sizes: Sizes


class Took(NamedTuple):
    """The side has done a work in so many seconds, and so many of all its threads together."""

    seconds: float
    processor_seconds: float


class Phases(NamedTuple):
    """Processor seconds of each phase of halfbyte's step: in its work, and in waiting for other threads."""

    seconds: dict[str, tuple[float, float]]


class Opened(Protocol):
    """A side that has loaded."""

    sizes: Sizes

    def ask(self, work: Work) -> Took:
        """Have it do ``work``."""

    def end(self) -> None:
        """End it."""


@dataclasses.dataclass(frozen=True)
class Halfbyte:
    """halfbyte's own decoder.

    Attributes:
        head, cache: as ``decoder_for`` takes them.
        adapters: how many there are over the base.
    """

    head: str | None = None
    cache: str | None = None
    adapters: int = 0
    library = "halfbyte.generate"

    def open(self, model: str) -> tuple[Sizes, Any]:
        """Load; return what it holds, and what does a work."""
        from halfbyte.generate.decoder import PAGE
        from halfbyte.generate.decoders import decoder_for
        from halfbyte.generate.native_decoder import NativeDecoder
        from halfbyte.hf import load, prepare

        loaded: Any = load(model, device="cpu")
        names = [f"adapter-{number}" for number in range(self.adapters)]
        if names:
            loaded = _adapted(loaded, names)
            prepare(loaded)
        decoder = decoder_for(loaded.eval(), cache=self.cache, head=self.head, keep_decoded=True)
        if not isinstance(decoder, NativeDecoder):
            raise InputError(f"{model} decodes through transformers ({decoder.reason}), so none is measured.")
        parts = decoder.reading.parts
        linears = [
            weight for layer in parts.layers for place in ("qkv", "o", "gate_up", "down")
            for weight in layer.of(place).weights
        ]  # fmt: skip
        values = sum(weight.shape[0] * weight.shape[1] for weight in linears)
        sizes = Sizes(
            layer_bytes=sum(map(weight_bytes, linears)),
            head_bytes=sum(map(weight_bytes, parts.head.weights)),
            adapter_bytes=sum(2 * RANK * (weight.shape[0] + weight.shape[1]) for weight in linears if names),
            token_bytes=decoder.paged.decoder.page_bytes // PAGE,
            layer_values=values,
            head_values=parts.head.width * parts.head.depth,
            attention=parts.heads * parts.size * len(parts.layers),
        )
        return sizes, _Native(decoder)


class _Native:
    """Works of halfbyte's decoder; texts stay between works, cut back to what was held."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._held: dict[Work, list[Any]] = {}
        self._seeds = itertools.count(1000)

    def run(self, work: Work) -> Took:
        decoder = self._decoder
        if work.kind in ("prompt", "again"):
            ids = made_up(work.counted, next(self._seeds), decoder.vocab_size)  # new ones: nothing of them is kept
            start = now()
            sequence = self._read(ids, None)
            took = since(start)
            decoder.end(sequence)
            return took
        if work.kind == "turn":
            return self._turn(work)
        if work not in self._held:
            names = [decoder.adapters[row % work.adapters] if work.adapters else None for row in range(work.rows)]
            self._held[work] = [
                self._read(made_up(work.context, row, decoder.vocab_size), name) for row, name in enumerate(names)
            ]
        held = self._held[work]
        for sequence in held:
            decoder.cut(sequence, work.context)
        tokens = decoder.step(held, list(range(1, 1 + work.rows))).argmax(-1).tolist()
        start = now()
        for _ in range(work.tokens):
            tokens = decoder.step(held, tokens).argmax(-1).tolist()
        return since(start)

    def _turn(self, work: Work) -> Took:
        """Take the first token of a further turn as a chat does: what is held is found by its tokens."""
        decoder = self._decoder
        before = made_up(work.context, 0, decoder.vocab_size)
        if work not in self._held:
            decoder.end(self._read(before, None))
            self._held[work] = []
        ids = [*before, *made_up(work.tokens, next(self._seeds), decoder.vocab_size)]
        start = now()
        sequence = decoder.begin(ids, None)
        found = sequence.length
        decoder.read(sequence, ids[found:]).argmax().item()
        took = since(start)
        assert found == work.context
        decoder.end(sequence)
        return took

    def phases(self, work: Work) -> Phases:
        """Do ``work``, which decodes, once more, and return where its time goes."""
        kernels = self._decoder.paged.decoder
        kernels.profile(True)
        self.run(work)
        kernels.profile(False)
        return Phases(kernels.phase_times())

    def _read(self, ids: list[int], adapter: str | None) -> Any:
        sequence, piece = self._decoder.begin(ids, adapter), self._decoder.longest_read
        logits = None
        while sequence.length < len(ids):
            end = min(len(ids), (sequence.length // piece + 1) * piece)
            logits = self._decoder.read(sequence, ids[sequence.length : end])
        if logits is not None:
            logits.argmax().item()
        return sequence


@dataclasses.dataclass(frozen=True)
class Transformers:
    """transformers' own forward, over bitsandbytes' 4 bits or the dense model."""

    four_bit: bool

    @property
    def library(self) -> str:
        """What is imported first."""
        return "bitsandbytes" if self.four_bit else "transformers"

    def open(self, model: str) -> tuple[Sizes, Any]:
        """Load; return what it holds, and what does a work."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        dtype = product_dtype(torch.bfloat16, "cpu")
        options: dict[str, Any] = {}
        if self.four_bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map="cpu", **options).eval()
        return _sizes_of(loaded), _Dense(loaded)


class _Dense:
    """Works of transformers' forward."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._held: dict[Work, Any] = {}

    @torch.inference_mode()
    def run(self, work: Work) -> Took:
        from transformers import DynamicCache

        vocabulary = self._model.config.vocab_size
        if work.kind in ("prompt", "again"):
            ids = [made_up(work.counted, 0, vocabulary)]
            start = now()
            self._next(ids, DynamicCache(config=self._model.config))
            return since(start)
        if work not in self._held:
            self._held[work] = DynamicCache(config=self._model.config)
            self._next([made_up(work.context, row, vocabulary) for row in range(work.rows)], self._held[work])
        cache = self._held[work]
        if behind := cache.get_seq_length() - work.context:
            cache.crop(-behind)
        if work.kind == "turn":
            start = now()
            self._next([made_up(work.tokens, 1, vocabulary)], cache)
            return since(start)
        tokens = self._next([[1 + row] for row in range(work.rows)], cache)
        start = now()
        for _ in range(work.tokens):
            tokens = self._next([[token] for token in tokens], cache)
        return since(start)

    def _next(self, ids: list[list[int]], cache: Any) -> list[int]:
        logits = self._model(torch.tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        found: list[int] = logits[:, -1].argmax(-1).tolist()
        return found


def now() -> Took:
    """Return the time."""
    return Took(time.perf_counter(), time.process_time())


def since(start: Took) -> Took:
    """Return what has passed since ``start``."""
    return Took(time.perf_counter() - start.seconds, time.process_time() - start.processor_seconds)


def made_up(length: int, seed: int, vocabulary: int) -> list[int]:
    """Return token ids of a text that says nothing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (length,), generator=generator).tolist()


def weight_bytes(weight: Any) -> int:
    """Return the bytes of a weight of ours, its constants included."""
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    if hasattr(weight, "codes"):
        return int(weight.codes.nbytes + weight.absmax.nbytes)
    statistics = weight.statistics
    second = statistics.nested.absmax.nbytes if statistics.nested else 0
    return int(weight.packed.nbytes + statistics.absmax.nbytes + second)


def _adapted(model: Any, names: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, options, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, options)
    return adapted


def _sizes_of(model: Any) -> Sizes:
    """Return what a model of transformers holds."""
    config, head = model.config, model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        layer_bytes=sum(map(_linear_bytes, layers)),
        head_bytes=head.weight.nbytes,
        adapter_bytes=0,
        token_bytes=2 * head.weight.element_size() * config.num_key_value_heads * size * config.num_hidden_layers,
        layer_values=sum(layer.in_features * layer.out_features for layer in layers),
        head_values=head.in_features * head.out_features,
        attention=config.num_attention_heads * size * config.num_hidden_layers,
    )


def _linear_bytes(layer: Any) -> int:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return int(layer.weight.nbytes)
    second = state.state2.absmax.nbytes if state.nested else 0
    return int(layer.weight.nbytes + state.absmax.nbytes + second)


class Process:
    """A side of this module in its process, seen from the one that measures."""

    def __init__(self, side: Halfbyte | Transformers, model: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._connection.send((side, model))
            self.sizes = self._receive(Ready).sizes
        except BaseException:
            self.end()
            raise

    def ask(self, work: Work) -> Took:
        """Have the side do ``work``."""
        self._connection.send(work)
        took: Took = self._receive(Took)
        return took

    def phases(self, work: Work) -> dict[str, tuple[float, float]]:
        """Have halfbyte do ``work``, which decodes, and tell where its time goes."""
        self._connection.send(("phases", work))
        taken: Phases = self._receive(Phases)
        return taken.seconds

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self, kind: Any) -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ChildProcessError(
                f"a side's process ended with exit code {self._process.exitcode}, perhaps for want of memory"
            ) from None
        if isinstance(message, Failed):
            raise (InputError if message.user else ChildProcessError)(message.text)
        assert isinstance(message, kind), message
        return message


def serve(connection: Connection) -> None:
    """Be the side that the other end of ``connection`` names, until the process is ended or the side fails."""
    warnings.simplefilter("ignore")
    with quiet():
        try:
            side, model = connection.recv()
            importlib.import_module(side.library)
            sizes, doing = side.open(model)
            connection.send(Ready(sizes))
            while True:
                asked = connection.recv()
                connection.send(doing.run(asked) if isinstance(asked, Work) else doing.phases(asked[1]))
        except (EOFError, ConnectionError):
            return  # nobody is left to tell
        except Exception as error:
            user = isinstance(error, InputError)
            connection.send(Failed(str(error) if user else traceback.format_exc(), user))
