"""``adapter``: what an adapter holds, and adapters made of adapters."""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from halfbyte import choices
from halfbyte.cli.console import print_table, shown
from halfbyte.errors import InputError, counted
from halfbyte.quiet import quiet

if TYPE_CHECKING:
    from halfbyte.deploy.adapters import Made

Adapter = Annotated[str, typer.Argument(help="Run folder, or a PEFT adapter's folder or hub id.")]
Output = Annotated[Path, typer.Argument(help="Folder for the new adapter.")]
Modules = Annotated[bool, typer.Option("--modules", help="Each module by itself, not those of a name together.")]
AsJson = Annotated[bool, typer.Option("--json", help="The figures of every module as JSON.")]


@quiet()
def info(adapter: Adapter, modules: Modules = False, as_json: AsJson = False) -> None:
    """Norms and effective ranks of a LoRA adapter, and what follows from them."""
    from halfbyte.deploy.adapters import ENERGY
    from halfbyte.deploy.adapters import info as looked_at

    found = looked_at(adapter)
    if as_json:
        about = {"modules": [vars(module) for module in found.modules], "others": found.others, "advice": found.advice}
        about["base"] = None if found.base is None else {"model": found.base.model} | found.base.digests
        typer.echo(json.dumps(about, indent=2))
        return
    groups: dict[str, list[Any]] = defaultdict(list)
    for module in found.modules:
        groups[_group(module, modules)].append(module)
    table = Table("module", "layers", "shape", "rank", "parameters", "norm", f"{ENERGY:.0%} of the energy in")
    for name, group in groups.items():
        norm = math.sqrt(sum(module.norm**2 for module in group) / len(group))
        table.add_row(
            name, str(len(group)), _range([module.shape for module in group]),
            _range([module.rank for module in group]), f"{sum(module.parameters for module in group):,}",
            f"{norm:.3g}", _range([module.effective for module in group]),
        )  # fmt: skip
    print_table(table)
    total = sum(module.parameters for module in found.modules)
    beside = f", and {found.others:,} beside LoRA" if found.others else ""
    typer.echo(f"{total:,} parameters in {counted(len(found.modules), 'module')}{beside}.")
    if found.base:
        typer.echo(f"Trained on {found.base}.")
    if found.advice:
        typer.echo(found.advice)


@quiet()
def truncate(
    adapter: Adapter,
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Part of each module's energy to keep, by as few ranks as it takes: 0.99.")
    ] = None,
) -> None:
    """Write the nearest adapter of a lower rank."""
    from halfbyte.deploy.adapters import truncate as truncated

    _tell(truncated(adapter, output, rank=rank, energy=energy))


@quiet()
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Two or more, as PATH or PATH=WEIGHT, or one PATH=WEIGHT to scale it; and the folder to write."
        ),
    ],
    method: Annotated[
        choices.CombineMethod,
        typer.Option(help="cat: exact, the ranks add up; svd: the nearest of --rank; others as PEFT has them."),
    ] = "cat",
    density: Annotated[
        float | None, typer.Option(help="Part of the values that ties, dare and magnitude_prune keep.  [default: 0.5]")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of svd.  [default: the highest of the first]")] = None,
) -> None:
    """Write a weighted sum of adapters of a base: combine ONE=0.7 OTHER=0.3 OUT. Or scale one: combine ONE=0.5 OUT."""
    from halfbyte.deploy.adapters import combine as combined

    *words, output = adapters
    weights: dict[str, float] = {}
    for word in words:
        path, equals, weight = word.rpartition("=")
        try:
            number = float(weight) if equals else 1.0
        except ValueError:
            raise InputError(f"{word!r} has no number behind the =; write PATH=0.5.") from None
        if not math.isfinite(number):
            raise InputError(f"The weight of {path} is {weight}; it must be a finite number.")
        name = path if equals else word
        if name in weights:
            raise InputError(f"{name} is there twice; give it once, with the sum of the weights.")
        weights[name] = number
    _tell(combined(weights, output, method=method, density=density, rank=rank))


@quiet()
def convert(
    adapter: Adapter,
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Of DoRA: rank of the nearest plain LoRA.")] = None,
    base: Annotated[str | None, typer.Option(help="Of DoRA: another place for the base than it names.")] = None,
    initial: Annotated[str | None, typer.Option(help="Of PEFT's PiSSA or OLoRA: the adapter as it began.")] = None,
) -> None:
    """Write an adapter of DoRA, or of PEFT's PiSSA or OLoRA, as plain LoRA."""
    from halfbyte.deploy.adapters import convert as converted

    _tell(converted(adapter, output, rank=rank, base=base, initial=initial))


@quiet()
def diff(one: Adapter, other: Adapter, modules: Modules = False) -> None:
    """How far two LoRA adapters are apart, module by module, and what differs in their configurations."""
    from halfbyte.deploy.adapters import diff as compared

    found, settings = compared(one, other)
    groups: dict[str, list[Any]] = defaultdict(list)
    for module in found:
        groups[_group(module, modules)].append(module)
    table = Table("module", "norm of the first", "of the second", "apart", "cosine")
    for name, group in groups.items():
        norms = [math.sqrt(sum(module.norms[i] ** 2 for module in group)) for i in (0, 1)]
        apart = median(module.apart for module in group)
        cosine = median(module.cosine for module in group)
        table.add_row(name, f"{norms[0]:.3g}", f"{norms[1]:.3g}", f"{apart:.3g}", f"{cosine:.3f}")
    print_table(table)
    for key, (before, after) in settings.items():
        typer.echo(f"{key}: {before} in the first, {after} in the second")


def _group(module: Any, alone: bool) -> str:
    """Return what a row of a table is called: the experts of a stack are in one."""
    name = module.stack or module.name
    return name if alone else ".".join(name.split(".")[-2 if module.stack else -1 :])


def _range(values: list[Any]) -> str:
    """Return the lowest and the highest value, or the one that there is."""
    low, high = (_said(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _said(value: Any) -> str:
    return " × ".join(f"{size:,}" for size in value) if isinstance(value, tuple) else str(value)


def _tell(made: "Made") -> None:
    low, high = made.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    error = "exactly" if made.error == 0 else f"with an error of {made.error:.2%}"
    worst = f" ({made.worst[1]:.2%} in {made.worst[0]})" if made.error else ""
    typer.echo(f"{made.parameters:,} parameters of {ranks}, {error}{worst}, in {shown(made.folder)}.")
