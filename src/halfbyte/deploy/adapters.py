"""What an adapter holds, and adapters made of adapters.

    info       norms and ranks of s B A, module by module
    truncate   the nearest sum of fewer ranks (Eckart and Young), with the error
    combine    a weighted sum of several: exact, or by PEFT's ways
    convert    to plain LoRA: DoRA as the nearest of a rank, with the error; PEFT's PiSSA and OLoRA exactly
    diff       how far two are apart

The energy of singular values is the sum of their squares; the part of it that is left out is the square of the relative
error. An expert of a mixture is a module like others, but that those of a stack keep one rank, as PEFT's form has it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.choices import CombineMethod
from halfbyte.errors import InputError, named
from halfbyte.files import absolute
from halfbyte.hf.layers.expert_targets import as_peft_reads
from halfbyte.hf.models.fingerprint import Fingerprint
from halfbyte.hf.models.low_rank import LowRankAdapter, Part, read_low_rank, save_low_rank
from halfbyte.hf.models.merging import Merged
from halfbyte.hf.models.weighted import weighted

NO_DENSITY = ("cat", "svd", "linear")
ENERGY = 0.99
"""The part of the energy by which ranks are judged."""


@dataclass(frozen=True)
class Module:
    """What an adapter adds to one weight.

    Attributes:
        name: of the module.
        stack: the stack of experts that it is of, or "".
        shape: of the weight.
        rank: of A and B.
        parameters: of both.
        norm: ``‖s B A‖``.
        effective: how many of the largest singular values have 99 % of the energy.
        stable: ``‖s B A‖² / σ₁²``.
    """

    name: str
    stack: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    norm: float
    effective: int
    stable: float


@dataclass(frozen=True)
class Info:
    """What an adapter holds.

    Attributes:
        modules: one by one.
        others: values of tensors beside LoRA's: lengths of DoRA, biases, modules that were saved whole.
        advice: a sentence, or None.
        base: the fingerprint of the model that it was trained on, or None.
    """

    modules: list[Module]
    others: int
    advice: str | None
    base: Fingerprint | None = None


def info(adapter: str | Path) -> Info:
    """Look at a LoRA adapter.

    Raises:
        InputError: it is none.
    """
    read = read_low_rank(adapter)
    stacks = _stacks(read)
    modules = [_module(name, stacks.get(name, ""), part) for name, part in read.parts.items()]
    ranks = [module.effective for module in modules]
    rank, most = max(module.rank for module in modules), max(ranks)
    if not any(module.norm for module in modules):
        advice = "All of it is zero: the adapter changes nothing."
    elif 2 * most <= rank:
        advice = (
            f"Rank {rank} was trained, and {ENERGY:.0%} of the energy lies in {min(ranks)} to {most}: "
            f"halfbyte adapter truncate keeps that, and rank {most} would do next time."
        )
    elif sum(module.effective >= 0.8 * module.rank for module in modules) > len(modules) / 2:
        advice = f"Most modules use all of rank {rank}; a higher one may learn more."
    else:
        advice = None
    return Info(modules, sum(x.numel() for x in read.others.values()), advice, Fingerprint.of_adapter(read.folder))


def _stacks(*adapters: LowRankAdapter) -> dict[str, str]:
    """Return of each expert's matrix the name of its stack."""
    return {name: stack.name for one in adapters for name, stack in one.stack_of.items()}


def _module(name: str, stack: str, part: Part) -> Module:
    _, values, _ = part.svd()
    energy = float(values.square().sum())
    stable = energy / float(values[0]) ** 2 if energy else 0.0
    parameters = part.a.numel() + part.b.numel()
    return Module(name, stack, part.shape, part.rank, parameters, math.sqrt(energy), _ranks_of(values, ENERGY), stable)


def _ranks_of(values: Tensor, energy: float) -> int:
    """Return how many of the values, largest first, have this part of the energy; none of nothing."""
    sums = values.square().cumsum(0)
    if not float(sums[-1]):
        return 0
    return min(int((sums < energy * (1 - 1e-12) * sums[-1]).sum()) + 1, len(values))


@dataclass(frozen=True)
class Made:
    """An adapter that was made.

    Attributes:
        folder: where.
        ranks: of its modules, the lowest and the highest.
        parameters: of A and B.
        error: ``‖D' − D‖ / ‖D‖`` of what is added to all weights together; 0 where it is exact.
        worst: the module with the largest error of its own, and that error.
    """

    folder: Path
    ranks: tuple[int, int]
    parameters: int
    error: float
    worst: tuple[str, float]


def truncate(adapter: str | Path, output: str | Path, *, rank: int | None = None, energy: float | None = None) -> Made:
    """Write the nearest adapter of a lower rank.

    Args:
        adapter: folder or hub id of LoRA.
        output: the new folder.
        rank: of every module, at most.
        energy: the part of each module's energy that is to be kept, by as few ranks as it takes; of a stack of experts
            by as many as that of its experts takes which needs most.

    Raises:
        InputError: neither or both are given, it is no LoRA adapter or one of DoRA, or the folder is there already.
    """
    output = _free(output)
    if (rank is None) == (energy is None):
        raise InputError("Give a rank or a part of the energy to keep (--rank 8 or --energy 0.99), one of the two.")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}; it must be at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is {energy}; it is a part of the whole, between 0 and 1.")
    read = read_low_rank(adapter)
    if read.is_dora:
        raise InputError(
            f"{adapter} is DoRA, whose sum is no product of B and A; halfbyte adapter convert makes plain LoRA of it."
        )
    parts: dict[str, Part] = {}
    errors, stack_of = _Errors(), read.stack_of
    together = [[name] for name in read.parts if name not in stack_of]
    for names in (*together, *(stack.members for stack in read.stacks.values())):
        found = {name: read.parts[name].svd() for name in names}
        keep = rank or max(1, *(_ranks_of(values, energy or 1.0) for _, values, _ in found.values()))
        parts |= {name: errors.cut(name, svd, keep, read.parts[name].form) for name, svd in found.items()}
    return _made(dataclasses.replace(read, parts=parts), output, errors)


def convert(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    base: str | Path | None = None,
    initial: str | Path | None = None,
) -> Made:
    """Write as plain LoRA what an adapter of DoRA, or of PEFT's PiSSA or OLoRA, adds to its base.

    Args:
        adapter: folder or hub id.
        output: the new folder.
        rank: of DoRA's, the rank of the nearest plain LoRA: what DoRA adds has more ranks than it trains.
        base: of DoRA's, another place for the base model than the adapter names.
        initial: of PiSSA's, the adapter as it began, which PEFT took out of the base: s (B A - B₀ A₀) is exact.

    Raises:
        InputError: it is plain LoRA already, something is missing, or the folder is there already.
    """
    output = _free(output)
    read = read_low_rank(adapter)
    if read.is_dora:
        return _of_dora(read, adapter, output, rank, base)
    start = read.config.init_lora_weights
    if not (isinstance(start, str) and start.startswith(("pissa", "olora"))):
        raise InputError(f"{adapter} is plain LoRA already; there is nothing to convert.")
    if initial is None:
        raise InputError(
            f"{adapter} began with {start}, which was taken out of its base; name the adapter as it began with "
            "--initial, as PEFT's save_pretrained had written it before training."
        )
    began = read_low_rank(initial)
    _check_shapes([str(adapter), str(initial)], [read, began])
    if began.parts.keys() != read.parts.keys():
        raise InputError(f"{initial} has other modules than {adapter}; it is not how that began.")
    parts = {name: _sum(name, [read, began], [1.0, -1.0]) for name in read.parts}
    return _made(dataclasses.replace(read, parts=parts), output, _Errors())


def _of_dora(
    read: LowRankAdapter, adapter: str | Path, output: Path, rank: int | None, base: str | Path | None
) -> Made:
    if rank is None or rank < 1:
        raise InputError(f"DoRA becomes plain LoRA of a rank that is to be given (--rank), at least 1, not {rank}.")
    merged = Merged(adapter, "quantized", torch.float32, base=base)
    parts, errors = {}, _Errors()
    for name, part in read.parts.items():
        target = f"{name}.weight"
        added = (merged.exact(target).float() - merged.base.read(target).float()).double()
        if part.is_embedding or name in merged.base.transposed:
            added = added.T
        u, values, vh = torch.linalg.svd(added, full_matrices=False)
        parts[name] = errors.cut(name, (u, values, vh.T), rank, part.form)
    read.config.use_dora = False
    others = {key: x for key, x in read.others.items() if "lora_magnitude_vector" not in key}
    return _made(dataclasses.replace(read, parts=parts, others=others), output, errors)


def combine(
    adapters: Mapping[str, float],
    output: str | Path,
    *,
    method: CombineMethod = "cat",
    density: float | None = None,
    rank: int | None = None,
) -> Made:
    """Write a weighted sum of adapters of one base, or one of them scaled.

    Args:
        adapters: folders or hub ids, with the weight of each.
        output: the new folder.
        method: ``cat`` is exact, its rank the sum of theirs; ``svd`` the nearest of a rank; the others are PEFT's.
        density: the part of each adapter's values that ``ties``, ``dare_*`` and ``magnitude_prune`` keep.
        rank: of ``svd``.

    Raises:
        InputError: there is none, or one as it is, or they differ in what they are or in their base; or the folder is
            there already.
    """
    output = _free(output)
    for name, value, is_its in (("rank", rank, method == "svd"), ("density", density, method not in NO_DENSITY)):
        if value is not None and not is_its:
            raise InputError(f"--{name} says nothing of {method}; leave it out, or take another method.")
    if rank is not None and rank < 1:
        raise InputError(f"A rank is 1 or more, not {rank}.")
    if len({str(Path(path).expanduser().resolve()) for path in adapters}) < len(adapters):
        raise InputError("One adapter is named twice; name it once, with the sum of the weights.")
    if not adapters or list(adapters.values()) == [1]:
        raise InputError("Combining takes two adapters or more, as NAME=WEIGHT or NAME, or one with a weight.")
    read = [read_low_rank(path) for path in adapters]
    weights = list(adapters.values())
    for path, one in zip(adapters, read, strict=True):
        if one.is_dora or one.others:
            what = "is DoRA" if one.is_dora else f"holds more than LoRA ({named([*one.others][:3])})"
            raise InputError(
                f"{path} {what}, of which there is no weighted sum; merge it (halfbyte merge), or leave it."
            )
        if one.parts.keys() != read[0].parts.keys() and method not in ("cat", "svd"):
            raise InputError(
                f"{path} has other modules than {read[0].folder}; {method} needs the same, cat and svd do not."
            )
    _check_shapes(list(adapters), read)
    if other := _other_base(read):
        last, first, found = other
        raise InputError(
            f"{last} was trained on another base model than {first}: {found}; only adapters of one base have a sum."
        )
    names = list(dict.fromkeys(name for one in read for name in one.parts))
    sums = {name: _sum(name, read, weights) for name in names}
    read[0].stacks = {name: stack for one in read for name, stack in one.stacks.items()}
    if len(names) > len(read[0].parts):
        stacks, config = _stacks(*read), read[0].config
        config.target_modules, config.exclude_modules = {name for name in names if name not in stacks}, None
        config.layers_to_transform = config.layers_pattern = None
        if any(one.config.target_parameters for one in read):
            config.target_parameters = [*read[0].stacks]
            as_peft_reads(config)
    if method == "cat":
        return _made(dataclasses.replace(read[0], parts=sums), output, _Errors())
    if method == "svd":
        wanted, parts, errors = rank or max(part.rank for part in read[0].parts.values()), {}, _Errors()
        for name, part in sums.items():
            parts[name] = errors.cut(name, part.svd(), wanted, part.form)
        return _made(dataclasses.replace(read[0], parts=parts), output, errors)
    ranks = {part.rank for one in read for part in one.parts.values()}
    if len(ranks) > 1:
        raise InputError(
            f"{method} needs adapters of one rank, and these have {named(sorted(ranks))}; take cat or svd."
        )
    errors = _Errors()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same adapter each time
        parts = {name: weighted([one.parts[name] for one in read], weights, method, density) for name in names}
    for name in names:
        exact = sums[name].dense()
        errors.add(name, float((parts[name].dense() - exact).square().sum()), float(exact.square().sum()))
    return _made(dataclasses.replace(read[0], parts=parts), output, errors)


@dataclass(frozen=True)
class Difference:
    """How far two adapters are apart in one module.

    Attributes:
        name: of the module.
        stack: the stack of experts that it is of, or "".
        norms: of what each adds; 0 where it has nothing.
        apart: ``‖D₂ − D₁‖ / ‖D₁‖``; infinite where the first has nothing.
        cosine: of the angle between them.
    """

    name: str
    stack: str
    norms: tuple[float, float]
    apart: float
    cosine: float


def diff(one: str | Path, other: str | Path) -> tuple[list[Difference], dict[str, tuple[Any, Any]]]:
    """Return how far two LoRA adapters are apart, module by module, and what differs in their configurations.

    Raises:
        InputError: one of them is no LoRA adapter, or they do not belong to models of one shape.
    """
    first, second = read_low_rank(one), read_low_rank(other)
    _check_shapes([str(one), str(other)], [first, second])
    found = []
    stacks = _stacks(first, second)
    for name in dict.fromkeys((*first.parts, *second.parts)):
        a, b = first.parts.get(name), second.parts.get(name)
        norms = [0.0 if part is None else math.sqrt(_product(part, part)) for part in (a, b)]
        product = 0.0 if a is None or b is None else _product(a, b)
        apart = math.sqrt(max(0.0, norms[0] ** 2 + norms[1] ** 2 - 2 * product))
        cosine = product / (norms[0] * norms[1]) if all(norms) else 0.0
        ratio = apart / norms[0] if norms[0] else math.inf
        found.append(Difference(name, stacks.get(name, ""), (norms[0], norms[1]), ratio, cosine))
    configs = [json.loads((adapter.folder / "adapter_config.json").read_text()) for adapter in (first, second)]
    keys = sorted({*configs[0], *configs[1]} - {"peft_version", "inference_mode", "revision"})
    pairs = {key: (_plain(configs[0].get(key)), _plain(configs[1].get(key))) for key in keys}
    told = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if unlike := _other_base([first, second]):
        bases = [str(Fingerprint.of_adapter(adapter.folder)) for adapter in (first, second)]
        told["base model"] = (bases[0], f"{bases[1]} ({unlike[2]})")
    return found, told


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def _product(one: Part, other: Part) -> float:
    """Return the inner product of two sums, ``trace((s B A)ᵀ (s' B' A'))``."""
    inner = (one.b.double().T @ other.b.double()) * (one.a.double() @ other.a.double().T)
    return one.scaling * other.scaling * float(inner.sum())


def _sum(name: str, adapters: Sequence[LowRankAdapter], weights: Sequence[float]) -> Part:
    """Return the exact weighted sum of what adapters add to one module."""
    there = [(one.parts[name], weight) for one, weight in zip(adapters, weights, strict=True) if name in one.parts]
    a = torch.cat([part.a for part, _ in there])
    b = torch.cat([part.b * (part.scaling * weight) for part, weight in there], dim=1)
    return Part(a, b, 1.0, there[0][0].form)


def _check_shapes(paths: Sequence[str], adapters: Sequence[LowRankAdapter]) -> None:
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    counts: dict[str, tuple[str, int]] = {}
    for path, adapter in zip(paths, adapters, strict=True):
        for name, stack in adapter.stacks.items():
            first, count = counts.setdefault(stack.path, (path, stack.experts))
            if count != stack.experts:
                raise InputError(
                    f"{path} and {first} are of different models: {name} has {stack.experts} experts in one and "
                    f"{count} in the other."
                )
        for name, part in adapter.parts.items():
            first, known = shapes.setdefault(name, (path, part.shape))
            if known != part.shape:
                raise InputError(
                    f"{path} and {first} are of different models: {name} is {list(part.shape)} in one and "
                    f"{list(known)} in the other."
                )


def _other_base(adapters: Sequence[LowRankAdapter]) -> tuple[Path, Path, str] | None:
    """Return the first adapter of another base than one before it, that one, and what tells the bases apart."""
    known: list[tuple[Path, Fingerprint]] = []
    for adapter in adapters:
        if base := Fingerprint.of_adapter(adapter.folder):
            for folder, other in known:
                if found := other.difference(base):
                    return adapter.folder, folder, found
            known.append((adapter.folder, base))
    return None


class _Errors:
    """Squares of errors and of what they are of."""

    def __init__(self) -> None:
        self.apart = self.size = 0.0
        self.worst = ("", 0.0)

    def add(self, name: str, apart: float, size: float) -> None:
        self.apart += apart
        self.size += size
        own = math.sqrt(apart / size) if size else 0.0
        self.worst = max(self.worst, (name, own), key=lambda pair: pair[1])

    def cut(self, name: str, svd: tuple[Tensor, Tensor, Tensor], rank: int, form: int) -> Part:
        """Return the largest ``rank`` terms of a sum, and count the others in."""
        u, values, v = svd
        roots = values[:rank].sqrt()
        self.add(name, float(values[rank:].square().sum()), float(values.square().sum()))
        return Part((v[:, :rank] * roots).T.float(), (u[:, :rank] * roots).float(), 1.0, form)

    @property
    def relative(self) -> float:
        return math.sqrt(self.apart / self.size) if self.size else 0.0


def _made(adapter: LowRankAdapter, output: Path, errors: _Errors) -> Made:
    save_low_rank(adapter, output)
    ranks = [part.rank for part in adapter.parts.values()]
    parameters = sum(part.a.numel() + part.b.numel() for part in adapter.parts.values())
    return Made(output, (min(ranks), max(ranks)), parameters, errors.relative, errors.worst)


def _free(output: str | Path) -> Path:
    path = absolute(output)
    if path.exists():
        raise InputError(f"{path} is there already; choose another folder.")
    return path
