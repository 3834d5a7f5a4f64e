"""``evaluate``: a model or a run measured; ``evaluate judge`` and ``evaluate elo`` are in ``evaluate_judge``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from halfbyte.cli.console import bar, print_table, shown, stages
from halfbyte.cli.options import Device, Model, RemoteCode, System
from halfbyte.cli.talk import system_text
from halfbyte.quiet import quiet

DEFAULT = "model"
Json = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write all figures to this file too.")]


class EvaluateGroup(typer.core.TyperGroup):
    """A group of which everything but the name of a command is an argument of its ``model``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; what is no command is a model."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def model(
    model: Model,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-eval, by names with commas between them, a YAML file, or a file of rows with question, "
            "choices and answer; may be repeated (needs halfbyte[eval])."
        ),
    ] = None,
    mmlu: Annotated[
        str | None,
        typer.Option(help="MMLU behind five examples, as QLoRA's paper takes it: hub, or a file of its questions."),
    ] = None,
    mmlu_shots: Annotated[
        str | None, typer.Option(help="The answered questions before those of a file that has them not.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Texts, for their perplexity; may be repeated.")] = None,
    references: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows with what should come, one text or several (references), which greedy answers are compared "
            "with: ROUGE-L, F1, exact match; may be repeated."
        ),
    ] = None,
    contamination: Annotated[
        bool, typer.Option("--contamination", help="Look whether the rows stand in the run's training data.")
    ] = False,
    train_data: Annotated[
        list[str] | None, typer.Option(help="Training data to look in, where it is not a run's own; may be repeated.")
    ] = None,
    ngram: Annotated[int, typer.Option(min=1, help="Words in a row that are called an overlap.")] = 13,
    shots: Annotated[str | None, typer.Option(help="Solved examples for a task that is a file of rows.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question of a task.  [default: the task's]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task and file, the first ones.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put the questions of tasks as conversations.")
    ] = False,
    system: System = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Greatest length of an answer that is compared with references.")
    ] = 256,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens that are read at once.  [default: what the model attends to; of texts and MMLU at most 2048]",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions of MMLU per forward pass.")] = 8,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Measure the base of an adapter beside it.")] = True,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Keep what each task asked and was answered.")
    ] = False,
    skip_bad_rows: Annotated[
        Literal["yes", "no", "true", "false", "all"] | None,
        typer.Option(help="Leave out rows that cannot be measured on, up to a tenth of them; all: however many."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for results and answers.  [default: RUN/evaluate/DATE]"),
    ] = None,
    json: Json = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure a model, or a run: its base and its adapter beside each other, with standard errors.

    evaluate MODEL is the same as evaluate model MODEL.
    """
    skip: Any = "all" if skip_bad_rows == "all" else skip_bad_rows in ("yes", "true")
    with quiet(), bar("{task.description}", tells_rate=True) as progress:
        from halfbyte.deploy.evaluation import Wanted
        from halfbyte.deploy.evaluation import evaluate as evaluated

        wanted = Wanted(
            tasks=tasks or [],
            mmlu=mmlu,
            mmlu_shots=mmlu_shots,
            data=data or [],
            references=references or [],
            shots=shots,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            system=system_text(system),
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            batch_size=batch_size,
            with_base=base,
            contamination=contamination,
            train_data=train_data or [],
            ngram=ngram,
            log_samples=log_samples,
            skip_bad_rows=skip,
        )
        report, folder = evaluated(
            model,
            wanted,
            output=output,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=stages(progress),
        )
        if json:
            report.write(json)
    print_table(report.table())
    if report.overlaps:
        print_table(report.overlap_table())
        for overlap in report.overlaps:
            for one in overlap.examples[:1]:
                typer.echo(f'{one.where} has "{one.words}", as {one.trained}.')
        if clean := report.clean_table():
            print_table(clean)
    for note in report.notes:
        typer.echo(note)
    if folder:
        typer.echo(f"Kept in {shown(folder)}.")
