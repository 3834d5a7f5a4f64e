"""``evaluate judge``: answers judged in pairs by a model behind an endpoint; ``evaluate elo``: ratings of them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from halfbyte.cli.console import bar, command, print_table, shown, stages
from halfbyte.cli.evaluate import Json
from halfbyte.cli.options import Device, RemoteCode
from halfbyte.errors import InputError, counted
from halfbyte.quiet import quiet

Orders = Annotated[int, typer.Option(min=2, help="Random orders of the games over which Elo ratings are means.")]
EloSeed = Annotated[int, typer.Option("--seed", min=0, help="Of these orders, and of what contestants draw.")]


def judge(
    questions: Annotated[str, typer.Argument(help="File of questions: rows as in training, answers may lack.")],
    contestants: Annotated[
        list[str],
        typer.Argument(help="Two or more, each as NAME=FILE of answers, or NAME=MODEL (a run, an adapter, a model)."),
    ],
    endpoint: Annotated[
        str, typer.Option(help="Address of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1.")
    ],
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for answers, judgements and what came of them.")
    ],
    judge: Annotated[
        str | None, typer.Option(help="The endpoint's model that judges.  [default: the only one that it has]")
    ] = None,
    scale: Annotated[
        Literal["classes", "scores"],
        typer.Option(help="Verdicts: the better answer or a tie, for Elo ratings; or scores from 1 to 10."),
    ] = "classes",
    baseline: Annotated[
        str | None,
        typer.Option(help="A contestant that each other one meets.  [default: all meet all; of scores the first]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions, the first ones.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Things that the judge is asked at once.")] = 4,
    judge_temperature: Annotated[float, typer.Option(min=0, max=2, help="Of the judge.")] = 0.0,
    judge_tokens: Annotated[int, typer.Option(min=1, help="Greatest length of a judgement in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="Of models that answer; the paper's.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Likewise.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Greatest length of an answer in tokens.")] = 512,
    seed: EloSeed = 0,
    orders: Orders = 10_000,
    json: Json = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Have answers judged in pairs, in both orders, by a model behind an endpoint.

    Its key, if it wants one, is read from OPENAI_API_KEY. Who was interrupted goes on with the same command.
    """
    with quiet(), bar("{task.description}", tells_rate=True) as progress:
        from halfbyte.deploy.contest import Contest, hold

        report, folder = hold(
            Contest(
                questions=questions,
                contestants=contestants,
                endpoint=endpoint,
                judge=judge,
                scale=scale,
                baseline=baseline,
                limit=limit,
                together=concurrency,
                judge_temperature=judge_temperature,
                judge_tokens=judge_tokens,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                seed=seed,
                orders=orders,
            ),
            output,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=stages(progress),
        )
        if json:
            report.write(json)
    for table in report.tables():
        print_table(table)
    for note in report.notes:
        typer.echo(note)
    typer.echo(f"{counted(report.judgements, 'judgement')} in {shown(folder)}.")
    if report.ratings:
        typer.echo("Ratings of several such files together:")
        typer.echo(f"  {command('evaluate', 'elo', shown(folder / 'judgements.jsonl'))}")


def elo(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of judgements: JSON lines with question, first, second and verdict (1, 2, 3: a tie)."
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the orders.")] = 0,
    orders: Orders = 10_000,
    json: Json = None,
) -> None:
    """Rate contestants by judgements of theirs, from models or people."""
    from halfbyte.evaluate.judge.contest import read_judgements
    from halfbyte.evaluate.judge.summary import summary_of

    lines = [line for file in files for line in read_judgements(file) if line["scale"] == "classes"]
    if not lines:
        raise InputError("There is no judgement of classes in these files; scores have no Elo ratings.")
    report = summary_of(lines, "classes", orders=orders, seed=seed)
    if json:
        report.write(json)
    for table in report.tables():
        print_table(table)
    for note in report.notes:
        typer.echo(note)
