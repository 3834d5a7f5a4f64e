"""A GPU that is not there, as the user's own script sees it: what it sends there stays on the CPU.

Only where torch sees no GPU, and only for the script (:mod:`.callers`): transformers, accelerate, peft, trl and torch
itself are told the truth, so that they take their ways for a CPU. Each answer is said once, on standard error.

    torch.cuda.is_available() and other questions    :mod:`.cuda_answers`
    torch.zeros(..., device="cuda") and all that     torch's dispatcher asks for a kernel that allocates on a CUDA
      makes a tensor from nothing                    device; here one is registered that allocates on the CPU
    x.to("cuda"), x.cuda(), torch.tensor(...)        tried as they are, and again on the CPU where that failed
    torch.Generator("cuda"), torch.cuda.Event(), ... :mod:`.cuda_objects`
    device_map="auto", {"": 0}, "cuda:0"             none: transformers loads on the CPU
    pipeline(device=0), torch.autocast("cuda"),      the CPU's; float16 is bfloat16 under autocast
      torch.load(map_location="cuda"), ...

Nothing is in the way of a tensor that is made on the CPU: the functions that make tensors are torch's own, and
``Tensor.to`` costs a Python call more (0.2 µs), a question of a library's half a microsecond. ``torch.device("cuda")``
stays what it is. Left out: streams, and types such as ``torch.cuda.FloatTensor``.
"""

import functools
import importlib
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.hf.dropin.callers import is_users, is_wish_of_user
from halfbyte.hf.dropin.cuda_answers import ANSWERS
from halfbyte.hf.dropin.cuda_objects import event, exchange, generator
from halfbyte.hf.dropin.said import say
from halfbyte.hf.replacement import Replacement

HERE = "there is no GPU, so it stays on the CPU"
TORCH, TRANSFORMERS = ">=2.7", ">=5.23,<5.24"


def is_cuda(device: Any) -> bool:
    """Whether ``device`` names a CUDA device: ``"cuda:0"``, ``torch.device("cuda")`` or its number."""
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    if isinstance(device, int):
        return not isinstance(device, bool) and device >= 0
    return isinstance(device, torch.device) and device.type == "cuda"


def on_cpu(device: Any) -> Any:
    """Return ``device``, a CUDA device being the CPU."""
    return "cpu" if is_cuda(device) else device


# Questions


def _answering(name: str, answer: Callable[..., Any], told: str) -> Callable[[Any], Any]:
    sentence = f"{name}: there is no GPU; the script is told {told}."

    def make(old: Any) -> Any:
        @functools.wraps(old)
        def query(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not is_users(sys._getframe(1)):
                return old(*args, **kwargs)
            say(sentence)
            return answer(*args, **kwargs)

        return query

    return make


# Tensors


class Allocating:
    """``torch.cuda._lazy_init`` (torch 2.13), which torch calls before it first makes something on a CUDA device.

    It is where a library is told that there is none. Until :meth:`end`, the dispatcher has kernels that allocate on the
    CPU what the script wishes on a CUDA device. (Once one was used, torch does not call it any more, and after that it
    says in other words that there is no kernel.)
    """

    def __init__(self, old: Callable[[], None]) -> None:
        self.old = old
        self.library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a torch that is built for CUDA says that it has such kernels already
            for name, kernel in (("empty.memory_format", _empty), ("empty_strided", _empty_strided)):
                self.library.impl(name, functools.partial(kernel, old), "CUDA")  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        if not is_wish_of_user(sys._getframe(1)):
            self.old()

    def end(self) -> None:
        """Take the kernels away."""
        self.library._destroy()  # type: ignore[no-untyped-call]


def _check_wish(old: Callable[[], None], depth: int) -> None:
    if not is_wish_of_user(sys._getframe(depth + 1)):
        old()  # raises what it always does
        raise AssertionError("Torch not compiled with CUDA enabled")
    say(f'device="cuda": {HERE}.')


def _empty(old: Callable[[], None], size: Any, **options: Any) -> Tensor:
    _check_wish(old, 1)
    layout = options.get("memory_format") or torch.contiguous_format
    return torch.empty(size, dtype=options.get("dtype"), device="cpu", memory_format=layout)


def _empty_strided(old: Callable[[], None], size: Any, stride: Any, **options: Any) -> Tensor:
    _check_wish(old, 1)
    return torch.empty_strided(size, stride, dtype=options.get("dtype"), device="cpu")


def _moving(old: Any) -> Any:
    """``to`` of tensors and models, tried again on the CPU where it failed and the script named a CUDA device."""

    @functools.wraps(old)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return old(self, *args, **kwargs)
        except (AssertionError, RuntimeError):
            here = [on_cpu(args[0]), *args[1:]] if args else []
            named = {key: on_cpu(value) if key == "device" else value for key, value in kwargs.items()}
            if (here == list(args) and named == kwargs) or not is_wish_of_user(sys._getframe(1)):
                raise
        say(f'.to("cuda"): {HERE}.')
        return old(self, *here, **named)

    return to


def _staying(old: Any) -> Any:
    """``Tensor.cuda`` or ``Tensor.pin_memory``: the tensor itself."""

    @functools.wraps(old)
    def stay(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return old(self, *args, **kwargs)
        except (AssertionError, RuntimeError):
            if not is_wish_of_user(sys._getframe(1)):
                raise
        say(f".{old.__name__}(): {HERE}.")
        return self

    return stay


def _making(old: Any) -> Any:
    """``torch.tensor``, tried again on the CPU where it failed and the script named a CUDA device."""

    @functools.wraps(old)
    def make(*args: Any, **kwargs: Any) -> Any:
        try:
            return old(*args, **kwargs)
        except (AssertionError, RuntimeError):
            if not is_cuda(kwargs.get("device")) or not is_wish_of_user(sys._getframe(1)):
                raise
        say(f'device="cuda": {HERE}.')
        return old(*args, **kwargs | {"device": "cpu"})

    # torch.jit.script (torch 2.13) knows operators by their functions.
    operators = importlib.import_module("torch.jit._builtins")._get_builtin_table()
    if operator := operators.get(id(old)):
        operators[id(make)] = operator
        weakref.finalize(make, operators.pop, id(make), None)
    return make


# Places


def _placing(argument: str, position: int, default: Any = None) -> Callable[[Any], Any]:
    """A function whose ``argument`` names a device, at ``position``; where the script gives none it is ``default``."""

    def make(old: Any) -> Any:
        @functools.wraps(old)
        def placed(*args: Any, **kwargs: Any) -> Any:
            given = args[position] if len(args) > position else kwargs.get(argument)
            wished = given if given is not None else default
            if (wished is None or on_cpu(wished) == given) or not is_wish_of_user(sys._getframe(1)):
                return old(*args, **kwargs)
            if is_cuda(given):
                say(f"{old.__name__}({argument}={given!r}): {HERE}.")
            if len(args) > position:
                args = (*args[:position], "cpu", *args[position + 1 :])
            else:
                kwargs = kwargs | {argument: "cpu"}
            return old(*args, **kwargs)

        return placed

    return make


def _mapping(old: Any) -> Any:
    """Which device holds what (``transformers.modeling_utils.check_and_set_device_map``, 5.23)."""

    @functools.wraps(old)
    def check(device_map: Any) -> Any:
        places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
        automatic = device_map in ("auto", "balanced", "balanced_low_0", "sequential")
        if automatic or any(is_cuda(place) for place in places):
            say(f"device_map={device_map!r}: there is no GPU, so the model is loaded on the CPU.")
            if automatic or all(is_cuda(place) or str(place) == "cpu" for place in places):
                return old(None)
            device_map = {name: on_cpu(place) for name, place in device_map.items()}
        return old(device_map)

    return check


def _keyword(argument: str, told: str) -> Callable[[Any], Any]:
    """A method whose keyword ``argument`` names a device, whoever calls it: nobody wishes a GPU but the script."""

    def make(old: Any) -> Any:
        @functools.wraps(old)
        def placed(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_cuda(kwargs.get(argument)):
                say(f"{told}({argument}={kwargs[argument]!r}): there is no GPU, so it runs on the CPU.")
                kwargs[argument] = "cpu"
            return old(self, *args, **kwargs)

        return placed

    return make


def _casting(old: Any) -> Any:
    """``torch.autocast``."""

    @functools.wraps(old)
    def __init__(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type == "cuda" and is_wish_of_user(sys._getframe(1)):
            say('torch.autocast("cuda"): there is no GPU, so it casts to bfloat16 on the CPU.')
            device_type, dtype = "cpu", torch.bfloat16 if dtype in (None, torch.float16) else dtype
        old(self, device_type, dtype, enabled, cache_enabled)

    return __init__


def rows() -> list[Replacement]:
    """What is answered for a GPU; nothing where there is one."""
    if torch.cuda.is_available():
        return []
    # It remembers torch's own functions, by which `with torch.device("meta")` knows them (torch 2.13).
    importlib.import_module("torch.utils._device")._device_constructors()
    table = [
        (f"{module}:{name}", _answering(f"{module}.{name}", answer, told), f"the script is told {told}")
        for module, answers in ANSWERS.items()
        for name, (answer, told) in answers.items()
        if hasattr(sys.modules.get(module), name)
    ]
    table += [
        ("torch:Tensor.to", _moving, '.to("cuda") of tensors, models and batches'),
        ("torch.nn:Module.to", _moving, ".to(0) of models, which is read before it comes to their tensors"),
        ("torch:Tensor.cuda", _staying, ".cuda() of tensors, models and batches"),
        ("torch:Tensor.pin_memory", _staying, "pinned memory is for copies to a GPU"),
        ("torch:tensor", _making, 'torch.tensor(..., device="cuda")'),
        ("torch:as_tensor", _making, 'torch.as_tensor(..., device="cuda")'),
        ("torch:Generator", generator(is_cuda), 'torch.Generator("cuda")'),
        ("torch.cuda:Event", event, "torch.cuda.Event(enable_timing=True), by which scripts take the time"),
        ("torch.cuda:_exchange_device", exchange, "with torch.cuda.device(0), going there"),
        ("torch.cuda:_maybe_exchange_device", exchange, "with torch.cuda.device(0), coming back"),
        ("torch:set_default_device", _placing("device", 0), 'torch.set_default_device("cuda")'),
        (
            "torch:load",
            _placing("map_location", 1, "cuda"),
            "torch.load of what was saved on a GPU, or is wished there",
        ),
        ("torch.amp.autocast_mode:autocast.__init__", _casting, 'torch.autocast("cuda") and torch.cuda.amp.autocast()'),
    ]
    return [
        *(Replacement(where, make, why, "torch", TORCH, cuda=True) for where, make, why in table),
        Replacement(
            "torch.cuda:_lazy_init",
            Allocating,
            'torch.zeros(..., device="cuda") and the like',
            "torch",
            TORCH,
            cuda=True,
            after=Allocating.end,
        ),
        Replacement(
            "safetensors.torch:load_file",
            _placing("device", 1),
            'load_file(..., device="cuda")',
            "safetensors",
            ">=0.6",
            cuda=True,
        ),
        Replacement(
            "transformers.modeling_utils:check_and_set_device_map",
            _mapping,
            'from_pretrained(device_map="auto"), {"": 0} or "cuda:0"',
            "transformers",
            TRANSFORMERS,
            cuda=True,
        ),
        Replacement(
            "transformers.pipelines.base:Pipeline.__init__",
            _keyword("device", "pipeline"),
            "pipeline(device=0)",
            "transformers",
            TRANSFORMERS,
            cuda=True,
        ),
        Replacement(
            "peft.peft_model:PeftModel.load_adapter",
            _keyword("torch_device", "PeftModel"),
            'PeftModel.from_pretrained(..., torch_device="cuda")',
            "peft",
            ">=0.21,<0.22",
            cuda=True,
        ),
    ]
