"""Several processes that train one model: who writes, when all stop, and that they end together.

``torchrun`` starts them and tells each its number by environment variables (``RANK``, ``WORLD_SIZE`` and their local
sisters). :func:`join` makes the process group; without it, on a machine without a GPU, transformers (5.23) makes none
unless ``use_cpu`` is set, and each process would train alone. With one process every function here is free of cost.

What they tell each other here is a few numbers and sentences, over a gloo group of its own, so that it works beside
NCCL. Gradients go through DistributedDataParallel. All processes must come to each call, in the same order.
"""

import contextlib
import datetime
import functools
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from halfbyte.errors import InputError

LOST = ("Connection closed", "Connection reset", "Broken pipe", "Connection refused")
"""How gloo (torch 2.13) says that another process is gone."""

NO_INTERFACE = ("Unable to find address for", "Unable to resolve hostname", "unsupported gloo device")
"""How gloo says that it finds no way to the network."""

WAIT = datetime.timedelta(days=7)
"""How long a process waits for another that reads data, quantizes the base or answers samples, where gloo's own is
30 minutes. One that dies is seen at once, by its connection."""

_AGREED = "The other processes of the run know of this error."


class ElsewhereError(InputError):
    """Another process of the run failed, with this sentence; that process tells it, so nobody else needs to."""


def launched() -> int:
    """Return how many processes the launcher started, whether or not they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(use_cpu: bool = False, backend: str | None = None, timeout: float = 1800) -> None:
    """Make the process group of the processes that torchrun started; with one process, or in a group, do nothing.

    Args:
        use_cpu: train on the CPU even where there is a GPU.
        backend: of torch.distributed; None takes gloo, and NCCL for what is on a GPU.
        timeout: seconds that a process waits for another.

    Raises:
        InputError: the processes do not find each other.
    """
    if launched() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available() and not use_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = backend or "cpu:gloo,cuda:nccl"
    else:
        if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own setting, which would leave cores idle
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // on_this_machine()))
        # accelerate (1.15) would name it cpu:0, and who moves a model there copies what is mapped, in each process
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        backend = backend or "gloo"
    waiting = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, timeout=waiting, **_meeting(waiting))
    except (ValueError, RuntimeError) as error:
        raise InputError(_apart(error)) from error


def _meeting(timeout: datetime.timedelta) -> dict[str, Any]:
    """Return where processes meet that torchrun has started again; nothing where that is as at the first time.

    torchrun (2.13) keeps its store, and in it the addresses of the processes that are gone, which the new ones would
    call. On several machines it counts restarts on each for itself, so there is no name that all know: there its own
    variable helps (docs/scaling.md).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not kept or on_this_machine() != launched():
        return {}
    from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch's own of torch.distributed, where it has any

    port = int(os.environ["MASTER_PORT"])
    store = TCPStore(os.environ["MASTER_ADDR"], port, launched(), is_master=False, timeout=timeout)
    named = PrefixStore(f"/halfbyte/attempt_{attempt}", store)
    return {"store": named, "rank": rank(), "world_size": launched()}


def _apart(error: Exception) -> str:
    """Return why the processes cannot meet, and what to do, from what torch (2.13) says."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return f"The processes cannot meet at {where}, since another program uses this port; name a free one."
    if "GLOO_SOCKET_IFNAME" in os.environ and any(words in str(error) for words in NO_INTERFACE):
        given = os.environ["GLOO_SOCKET_IFNAME"]
        there = ", ".join(name for _, name in socket.if_nameindex())
        return f"GLOO_SOCKET_IFNAME is {given}, but this machine's network interfaces are {there}; name one of them."
    if any(words in str(error) for words in NO_INTERFACE):
        return (
            f"The processes find no network interface for this machine's name ({socket.gethostname()}); set "
            f"GLOO_SOCKET_IFNAME to one of {', '.join(name for _, name in socket.if_nameindex())}."
        )
    return (
        f"WORLD_SIZE says that there are {launched()} processes, but they cannot meet ({said}); start them with "
        "torchrun, or unset WORLD_SIZE."
    )


def leave() -> None:
    """Leave the process group, if there is one: the last call of a run."""
    if dist.is_initialized():
        _group.cache_clear()
        dist.destroy_process_group()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """:func:`join` for as long as this lasts; a group that is there already stays."""
    before = dist.is_initialized()
    join()
    try:
        yield
    finally:
        if not before:
            leave()


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes have joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_this_machine() -> int:
    """Return how many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the process that writes, shows and decides."""
    return rank() == 0


def is_first_here() -> bool:
    """Return whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def gather(value: Any) -> list[Any]:
    """Return the value of each process, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with ended_by_others():
        dist.all_gather_object(values, value, group=_group())
    return values


def check_alike(told: Mapping[str, str], remedy: str) -> None:
    """Look whether all processes have the same.

    Args:
        told: what is to be the same, by its name.
        remedy: what to do where it is not.

    Raises:
        InputError: something is other; it names what, of which process, and both values.
    """
    if world_size() == 1:
        return
    with agreed_errors():
        everywhere = gather(dict(told))
        for number, other in enumerate(everywhere):
            for name, value in everywhere[0].items():
                if other.get(name) != value:
                    same = [i for i, each in enumerate(everywhere) if each.get(name) == other.get(name)]
                    those = f"process{'es' * (len(same) > 1)} {', '.join(map(str, same))}"
                    raise InputError(
                        f"{name} of the processes differ: {value} of process 0, {other.get(name)} of {those} "
                        f"({gathered_hosts()[number]}); {remedy}."
                    )


def gathered_hosts() -> list[str]:
    """Return the name of each process's machine."""
    return [str(name) for name in gather(socket.gethostname())]


def largest(numbers: Sequence[int]) -> list[int]:
    """Return, for each place, the largest number that a process has there."""
    return _reduced(numbers, dist.ReduceOp.MAX)


def total(number: int) -> int:
    """Return the sum of the processes' numbers."""
    return totals([number])[0]


def totals(numbers: Sequence[int]) -> list[int]:
    """Return, for each place, the sum of the numbers that the processes have there."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def agreed(flag: bool) -> bool:
    """Return whether any process wants it: when one is to stop, all stop after the same step."""
    return bool(largest([flag])[0])


@contextlib.contextmanager
def agreed_errors() -> Iterator[None]:
    """Leave the block together: all after each has come to its end, or all with the first one's error.

    Raises:
        ElsewhereError: the work of another process failed; the process itself raises what it raised.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if world_size() == 1 or isinstance(raised, ElsewhereError) or _AGREED in getattr(raised, "__notes__", ()):
            raise  # a block within this one has told the others
        error = raised
    if world_size() == 1:
        return
    told = str(error) if error is None or isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    sentences = gather(None if error is None else told)
    failed = next((number for number, sentence in enumerate(sentences) if sentence is not None), None)
    if failed is None:
        return
    if error is not None and failed == rank():
        error.add_note(_AGREED)
        raise error
    raise ElsewhereError(sentences[failed]) from error


@contextlib.contextmanager
def first_writes(writes: bool | None = None) -> Iterator[bool]:
    """Yield whether this process is the one that writes; all go on when it has written, or end with its error.

    Args:
        writes: another choice than the first process, as one on each machine.
    """
    with agreed_errors():
        yield is_first() if writes is None else writes


@contextlib.contextmanager
def ended_by_others() -> Iterator[None]:
    """Tell in one sentence that another process is gone, wherever this one waits for it.

    Raises:
        ElsewhereError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not any(words in str(error) for words in LOST):
            raise
        raise ElsewhereError("Another process of this run has ended, and so does this one.") from error


def ignore_frozen(model: nn.Module) -> None:
    """Keep DistributedDataParallel from sending what is not trained: the base is the same in all processes."""
    frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    # read by torch 2.13 from the module that is wrapped
    model._ddp_params_and_buffers_to_ignore = [*frozen, *buffers]  # type: ignore[assignment]


def _reduced(numbers: Sequence[int], how: Any) -> list[int]:
    if world_size() == 1:
        return [int(number) for number in numbers]
    values = torch.tensor([int(number) for number in numbers])
    with ended_by_others():
        dist.all_reduce(values, how, group=_group())
    reduced: list[int] = values.tolist()
    return reduced


@functools.cache
def _group() -> Any:
    return dist.new_group(backend="gloo", timeout=WAIT)
