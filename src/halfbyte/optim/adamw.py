"""AdamW (arXiv 1711.05101) whose moments take 32 bits or block-wise 8 bits (arXiv 2110.02861), in memory or paged.

32 bits: the moments are fp32 whatever the parameter's dtype; over fp32 parameters each step is bitwise
that of ``torch.optim.AdamW``, by torch's own operations; or, not ``exact``, that of the native kernel, which is
faster and rounds the square root correctly, as torch does not. 8 bits: bitsandbytes' format (0.50.2): blocks of 256,
its signed dynamic map for the first moment and its unsigned one for the second, and 32 bits for tensors under 4096
elements, which cost little and need it most; 2.03 bytes a parameter instead of 8. The formulas are in
:mod:`halfbyte.kernels.reference`.

Where bitsandbytes disagrees with itself:

- Weight decay comes before the update, as in the paper, in torch and in bitsandbytes on a CPU (its 8-bit CUDA kernel
  decays after), so that 32 and 8 bits mean the same.
- Moments take the nearest code. Its CPU library looks codes up in a table of 65,536 even steps instead, which turns a
  zero moment into 2e-5 of its block's largest; its CUDA kernel then moves a first moment that rounding took across
  zero to the smallest code of its old sign. On a GPU its kernel is the one that runs, with these departures.
- A NaN or infinite gradient: over 8 bits the element is skipped and its moments start anew, as in its CUDA kernel;
  over 32 bits it spoils that element, as in torch.

State of a parameter: ``step`` (an int), ``exp_avg`` and ``exp_avg_sq`` (torch's names; fp32 or uint8 in the shape of
the parameter), and over 8 bits ``exp_avg_absmax`` and ``exp_avg_sq_absmax`` (fp32, one per block). The tables are not
part of it. 32-bit state goes to and from ``torch.optim.AdamW``. Left out: amsgrad, maximize, sparse gradients, tensor
learning rates.
"""

import contextlib
import dataclasses
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.kernels.checks import FLOATING
from halfbyte.optim import paged as paging
from halfbyte.quant import codebook

BLOCKSIZE = 256
SMALLEST_8BIT = 4096
BATCH = 2**22

Layout = dict[str, tuple[torch.dtype, torch.Size]]
Batch = kernels.Adamw8bit | kernels.Adamw32bit


@dataclasses.dataclass
class _Division:
    """How the parameters of a group that had gradients were stepped the last time.

    Attributes:
        params: they.
        state: the tensors of their state, in the same order.
        steps: the step counts that belong to the next step.
        batches: which of them go together, as indices.
    """

    params: list[Tensor]
    state: list[Tensor]
    steps: list[int]
    batches: list[tuple[list[int], Batch]]

    def holds(self, params: list[Tensor], state: list[Tensor], steps: list[int]) -> bool:
        """Whether these are the same objects, each one step further."""
        return steps == self.steps and _same(params, self.params) and _same(state, self.state)


class AdamW(torch.optim.Optimizer):
    """AdamW with a choice of where, and in how many bits, its state lives.

    Args:
        params: contiguous fp32, bf16 or fp16 parameters, or groups of them as in any torch optimizer.
        lr: as in ``torch.optim.AdamW``, with the next three; each group may have its own.
        betas: of the two moments.
        eps: added to the root of the second.
        weight_decay: decoupled.
        state_bits: 32 or 8.
        paged: whether the state may be evicted: by the operating system from a mapped file, or on a CUDA device, with
            bitsandbytes, by its driver from managed memory (:mod:`halfbyte.optim.paged`).
        exact: whether a step over 32 bits has torch's bits.
        page_dir: the folder of that file; where it lies in memory (tmpfs), or none is given, the temporary folder or
            ``/var/tmp``. The attribute ``page_dir`` tells which was taken.

    Raises:
        InputError: an argument is out of range, or a parameter is not of the kind above.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_bits: int = 32,
        paged: bool = False,
        page_dir: Path | str | None = None,
        exact: bool = True,
    ) -> None:
        if state_bits not in (8, 32):
            raise InputError(f"state_bits is {state_bits}; it must be 8 or 32.")
        self.state_bits = state_bits
        self.exact = exact
        self.page_dir = paging.choose_folder(Path(page_dir) if page_dir is not None else None) if paged else None
        self._divisions: dict[int, _Division] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not name are the optimizer's own."""
        first = sum(len(group["params"]) for group in self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise InputError(f"{name} is {group[name]}; it must be 0 or more.")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise InputError(f"betas are {group['betas']}; both must be at least 0 and below 1.")
        for index, param in enumerate(group["params"], first):
            if not param.requires_grad:
                continue  # frozen, perhaps in 4 bits: never stepped
            if param.dtype not in FLOATING or not param.is_contiguous():
                raise InputError(
                    f"Parameter {index} is {param.dtype} {tuple(param.shape)} with strides {param.stride()}; AdamW "
                    "steps contiguous float32, bfloat16 or float16 parameters."
                )
            if self.page_dir is not None and not paging.possible(param.device):
                raise InputError(
                    f"Parameter {index} is on {param.device}, and optimizer state is paged on a CPU or, with "
                    "bitsandbytes, on a CUDA device; use an optimizer that is not paged."
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model anew and returns its loss, which is passed on.

        Raises:
            InputError: a gradient is sparse, or paged state does not fit on the disk.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [
            [(p, self._gradient(p, grad)) for p in group["params"] if (grad := p.grad) is not None]
            for group in self.param_groups
        ]
        new = [p for p, _ in chain.from_iterable(moved) if not self.state[p]]
        self.state.update(zip(new, self._zero_states(new), strict=True))
        for index, pairs in enumerate(moved):
            self._step_group(index, [p for p, _ in pairs], [grad for _, grad in pairs])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state and the options of ``state_dict``, bit for bit; paged state is paged again.

        Raises:
            InputError: it belongs to other parameters or to another kind of optimizer. Nothing has changed then.
        """
        params = self._parameters()
        ours = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) for group in state_dict["param_groups"]]
        if ours != theirs:
            raise InputError(
                f"The saved optimizer state is of groups of {theirs} parameters, and this optimizer has {ours}; "
                "resume with the model and the optimizer that wrote it."
            )
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        saved = {i: state_dict["state"][key] for i, key in enumerate(keys) if state_dict["state"].get(key)}
        for i, state in saved.items():
            found = {name: (value.dtype, value.shape) for name, value in state.items() if name != "step"}
            if found != self._layout(params[i]) or "step" not in state:
                raise InputError(
                    f"The saved optimizer state of parameter {i} is {_describe(found)}, but this optimizer needs "
                    f"{_describe(self._layout(params[i]))}; resume with the model and the optimizer that wrote it."
                )
        self._divisions.clear()
        states = self._zero_states([params[i] for i in saved])
        for state, old in zip(states, saved.values(), strict=True):
            state["step"] = int(old["step"])
            for name in state.keys() - {"step"}:
                state[name].copy_(old[name])
        super().load_state_dict({**state_dict, "state": {}})  # with state, it would cast that to the parameters' dtype
        self.state.update(zip([params[i] for i in saved], states, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = super().__getstate__()
        return kept | {"state_bits": self.state_bits, "page_dir": self.page_dir, "exact": self.exact}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be what was copied or pickled; paged state is paged again. (torch's ``load_state_dict`` comes here too.)"""
        self._divisions = {}
        super().__setstate__(state)
        page_dir: Path | None = state.get("page_dir")
        if page_dir is not None:
            self.page_dir = paging.choose_folder(page_dir if page_dir.is_dir() else None)
            self.load_state_dict(self.state_dict())

    def _step_group(self, index: int, params: list[Tensor], grads: list[Tensor]) -> None:
        """Step ``params`` of one group in few calls; how they are divided holds until state or step counts differ."""
        group = self.param_groups[index]
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        steps = [state["step"] for state in states]
        found = [x for state in states for x in state.values() if isinstance(x, Tensor)]
        division = self._divisions.get(index)
        if division is None or not division.holds(params, found, steps):
            division = self._divisions[index] = _Division(params, found, steps, self._batches(params, states))
        division.steps = [step + 1 for step in steps]
        options = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
        for indices, batch in division.batches:
            own = [grads[i] for i in indices]
            # The native 32-bit step rounds the square root otherwise than torch.
            exact = self.exact and isinstance(batch, kernels.Adamw32bit)
            with kernels.use_provider("reference") if exact else contextlib.nullcontext():
                batch.step(own, kernels.AdamwStep(steps[indices[0]], *options))

    def _batches(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> list[tuple[list[int], Batch]]:
        """Divide ``params`` into those that go together: of one device, step count and kind of state, small or not.

        Batches of about ``BATCH`` elements bound the memory for intermediate results and walk through paged state once.
        """
        alike = defaultdict(list)
        elements = 0
        for i, (p, state) in enumerate(zip(params, states, strict=True)):
            elements += p.numel()
            alike[
                p.device, state["step"], "exp_avg_absmax" in state, p.numel() < SMALLEST_8BIT, elements // BATCH
            ].append(i)
        batches: list[tuple[list[int], Batch]] = []
        for (device, _, in_8_bits, small, _), indices in alike.items():
            own, kept = [params[i] for i in indices], [states[i] for i in indices]
            if not in_8_bits:
                ms, vs = ([s[name] for s in kept] for name in ("exp_avg", "exp_avg_sq"))
                batches.append((indices, kernels.Adamw32bit(own, ms, vs, joined=small)))
            else:
                tables = codebook("dynamic", device), codebook("dynamic_unsigned", device)
                first, second = ([(s[name], s[f"{name}_absmax"]) for s in kept] for name in ("exp_avg", "exp_avg_sq"))
                batches.append((indices, kernels.Adamw8bit(own, first, second, *tables, BLOCKSIZE)))
        return batches

    def _gradient(self, param: Tensor, grad: Tensor) -> Tensor:
        if grad.layout != torch.strided:
            index = next(i for i, p in enumerate(self._parameters()) if p is param)
            raise InputError(f"The gradient of parameter {index} is sparse; AdamW needs a dense one (sparse=False).")
        return grad.contiguous()

    def _parameters(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _bits(self, param: Tensor) -> int:
        """Return how many bits a moment of ``param`` takes, 32 or 8."""
        return 32 if param.numel() < SMALLEST_8BIT else self.state_bits

    def _layout(self, param: Tensor) -> Layout:
        """Return dtype and shape of each tensor of a parameter's state."""
        if self._bits(param) == 32:
            return {name: (torch.float32, param.shape) for name in ("exp_avg", "exp_avg_sq")}
        blocks = torch.Size([-(-param.numel() // BLOCKSIZE)])
        return {
            "exp_avg": (torch.uint8, param.shape),
            "exp_avg_absmax": (torch.float32, blocks),
            "exp_avg_sq": (torch.uint8, param.shape),
            "exp_avg_sq_absmax": (torch.float32, blocks),
        }

    def state_bytes(self) -> int:
        """Return what the tensors of the state of all parameters take, whether or not a step has made them yet."""
        layouts = (self._layout(p) for p in self._parameters())
        return sum(shape.numel() * dtype.itemsize for layout in layouts for dtype, shape in layout.values())

    def _zero_states(self, params: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Return the state before the first step of each of ``params``; if paged, in one piece for each device."""
        layouts = [self._layout(p) for p in params]
        by_device: dict[torch.device, list[tuple[torch.dtype, torch.Size]]] = defaultdict(list)
        for p, layout in zip(params, layouts, strict=True):
            by_device[p.device] += layout.values()
        ordered = {device: iter(self._zeros(entries, device)) for device, entries in by_device.items()}
        return [
            {"step": 0} | {name: next(ordered[p.device]) for name in layout}
            for p, layout in zip(params, layouts, strict=True)
        ]

    def _zeros(self, entries: Sequence[tuple[torch.dtype, torch.Size]], device: torch.device) -> list[Tensor]:
        if self.page_dir is not None:
            return paging.zeros(entries, self.page_dir if device.type == "cpu" else device)
        return [torch.zeros(shape, dtype=dtype, device=device) for dtype, shape in entries]


def _same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _describe(layout: Layout) -> str:
    return ", ".join(f"{name} {dtype} {tuple(shape)}".replace("torch.", "") for name, (dtype, shape) in layout.items())
