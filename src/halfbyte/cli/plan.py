"""``plan``: memory, time and disk of a run before anything is loaded."""

import contextlib
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import notes
from halfbyte.cli.options import flags_of
from halfbyte.errors import InputError
from halfbyte.files import absolute, write_text
from halfbyte.quiet import quiet
from halfbyte.runs.config import TrainConfig

OWN: dict[str, Any] = {
    "time": Annotated[
        str | None, typer.Option(help="How long the run may take, such as 2h, 90min or 1h30m; says what does.")
    ],
    "card": Annotated[
        str | None,
        typer.Option(
            help="A GPU to estimate for beside this machine, such as 'RTX 4090', or one by its sheet: "
            "24GB,165TFLOPS,1008GB/s."
        ),
    ],
    "calibrate": Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--stated",
            help="Measure this machine anew, half a minute; or take stated rates.  [default: measure it once]",
        ),
    ],
    "picture": Annotated[
        Path | None, typer.Option(help="Where a picture of the memory by part goes, as PNG.", dir_okay=False)
    ],
    "json_file": Annotated[Path | None, typer.Option("--json", help="Where the plan goes as JSON.", dir_okay=False)],
}
CONFIG = Annotated[Path | None, typer.Option("--config", help="YAML file with any of the options below.")]
MODEL = Annotated[
    str | None, typer.Argument(help="Folder or hub id of the base model; of a hub id the configuration is enough.")
]
NOT_HERE = ("model", "output", "resume", "overwrite", "ray", "report_to")


def plan(**options: Any) -> None:
    """Say what a run takes before anything is loaded: memory by part, time, disk, what fits.

    From the model's configuration, the options of halfbyte train, and the rows if --data names any; without them each
    row has max_length tokens. The first time this machine is measured, which takes half a minute.
    """
    given = {name: value for name, value in options.items() if value is not None}
    own = {name: given.pop(name, None) for name in OWN}
    config = _config(given)
    with quiet():
        from halfbyte.plan import words
    limit = words.seconds_of(own["time"]) if own["time"] else None
    with quiet():
        _plan(config, own, limit)


def _config(given: dict[str, Any]) -> TrainConfig:
    file, written = given.pop("config", None), {}
    if file is not None:
        from halfbyte.options import read_mapping

        written = read_mapping(absolute(file))
    if not (given.get("model") or written.get("model")):
        raise InputError("There is no model to plan for: name a folder or a hub id.")
    for name, stand_in in (("data", "-"), ("output", "runs/plan")):
        if name not in written:
            given.setdefault(name, stand_in)
    return TrainConfig.from_yaml(file, given)


def _plan(config: TrainConfig, own: dict[str, Any], limit: float | None) -> None:
    from halfbyte.plan import advice, calibrate, words
    from halfbyte.plan.estimate import DoesNotFitError, look_at, plan_run
    from halfbyte.plan.gpus import card_named
    from halfbyte.plan.ranks import ranks_of
    from halfbyte.plan.rows import facts_of
    from halfbyte.train.methods import method_of
    from halfbyte.train.prediction import of_method

    card = card_named(own["card"]) if own["card"] else None
    model = look_at(config)
    options: dict[str, Any] = {"model": model, **of_method(config, method_of(config))}
    if [source.path for source in config.data] != ["-"]:
        from halfbyte.train.rows import opened_tokenizer, prepared

        tokenizer, _ = opened_tokenizer(config, lambda _: None)
        options["facts"] = facts_of(prepared(config, method_of(config), tokenizer))
    machine = calibrate.stated() if own["calibrate"] is False else calibrate.known()
    if own["calibrate"] or (own["calibrate"] is None and not machine.is_measured):
        with notes.status("Measuring this machine") if notes.is_terminal else contextlib.nullcontext() as shown:
            machine = calibrate.calibrate(lambda text: shown.update(f"Measuring {text}") if shown else None)
    options["machine"] = machine
    try:
        found = plan_run(config, **options)
    except DoesNotFitError as error:
        raise advice.refusal(config, error, **options) from None
    told = words.lines(found)
    told += words.limit_lines(advice.limits(found.config, **options), found)
    told += words.advice_lines(advice.faster(found, **options), found)
    if limit is not None:
        told += words.time_lines(found, limit)
    if card:
        told += ["", *words.card_lines(found, card, ranks_of(found.config, model.shape))]
    typer.echo("\n".join(told))
    try:
        _write(found, own)
    except OSError as error:
        raise InputError(f"The plan cannot be written there ({error.strerror}); name another file.") from None


def _write(found: Any, own: dict[str, Any]) -> None:
    from halfbyte.plan import words
    from halfbyte.plan.picture import draw

    if own["picture"]:
        draw(found, absolute(own["picture"]))
        typer.echo(f"The picture is in {own['picture']}.")
    if own["json_file"]:
        write_text(absolute(own["json_file"]), json.dumps(words.as_json(found), indent=2) + "\n")


def _signature() -> inspect.Signature:
    names = [name for name in TrainConfig.model_fields if name not in NOT_HERE]
    flags = flags_of(TrainConfig, names)
    first = {"model": MODEL, **OWN}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in first.items()
    ]
    return inspect.Signature([*parameters, *flags.parameters.values()])


plan.__signature__ = _signature()  # type: ignore[attr-defined]
