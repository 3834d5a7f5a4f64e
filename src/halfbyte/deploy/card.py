"""The card of a model that was made of a run: a README as hubs read it.

It says what the base is and its licence as far as that is known, what was trained on and how, what came of it, and how
to run it. Nothing of it tells where on this machine anything lay: of paths the last part alone stands there.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from halfbyte import __version__
from halfbyte.deploy.audit_report import AuditReport
from halfbyte.errors import InputError
from halfbyte.hf.models.hub import Place
from halfbyte.runs.differences import given
from halfbyte.runs.history import Run, is_run, read_run
from halfbyte.runs.report import words
from halfbyte.runs.report.axes import number

CARD = "README.md"
SAMPLES = 3
"""Prompts whose answers before and after are shown."""
UNSAID = ("output", "resume", "overwrite", "report_to")
"""Options that say nothing to somebody else."""
PIPELINES = {"lm": "text-generation", "classify": "text-classification", "seq2seq": "text2text-generation"}
AUDIT = Path("audit", "audit.json")
"""In a run's folder."""
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def write_card(
    folder: Path,
    adapter: Path | None,
    base: Place,
    source: Path,
    form: str,
    *,
    use: str | None = None,
    packages: str | None = None,
    library: str = "transformers",
    quantized: bool = False,
    tags: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write the card of a model.

    Args:
        folder: of the model.
        adapter: the run's folder, or that of an adapter of which no run is known; None: there is none.
        base: where the base model is.
        source: the folder with the base's files.
        form: what was made, as part of a sentence.
        use: how it is run, as Markdown; None is with transformers' pipeline.
        packages: that this takes beside transformers, as pip has them.
        library: that opens it, by the hub's names.
        quantized: whether it has fewer than 16 bits.
        tags: more of them.
        sections: further parts by their titles, as Markdown: what was measured of this very model.
    """
    run = run_of(adapter) if adapter else None
    name = last(str(base.gguf or base.path))
    relation = "finetune" if adapter else "quantized" if quantized else None
    about = ModelCardData(
        base_model=None if base.is_folder else base.path,
        base_model_relation=None if base.is_folder else relation,
        license=licence_of(source),
        library_name=library,
        pipeline_tag=PIPELINES.get(str(run.options.get("task", "lm")) if run else "lm"),
        tags=[*(["qlora", "lora"] if adapter else []), "halfbyte", *tags],
    )
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# {plain(folder.name)}",
        f"{plain(name)}, {form}, by halfbyte {__version__}.",
    ]
    if (there := next((file for file in LICENCES if (source / file).is_file()), None)) is not None:
        parts.append(f"The base's licence is in `{there}`.")
    if run:
        parts += list(of_run(run))
    parts += [f"## {title}\n\n{text}" for title, text in (sections or {}).items()]
    parts.append("## Use")
    if packages:
        parts.append(f"With `pip install {packages}`:")
    parts.append(use or code("python", _use(folder.name, run)))
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def evaluation_of(adapter: Path | None, way: str) -> dict[str, str]:
    """Return what ``halfbyte audit`` found of a way of merging, as a part of the card; nothing where it has not been.

    Args:
        adapter: the run's folder, with the audit's file if there is one.
        way: its name there.
    """
    file = (adapter or Path()) / AUDIT
    if adapter is None or not file.is_file():
        return {}
    try:
        report = AuditReport.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not any(one.name == way for one in report.ways):
        return {}
    names = {"base": "the base", "adapter": "base and adapter", way: "this model"}
    rows = [
        f"| {names[one.name]} | {one.loss:.4f} | {one.accuracy:.1%} | {one.divergence:.4f} | {one.agreement:.1%} |"
        for one in report.ways
        if one.name in names
    ]
    told = (
        f"By `halfbyte audit` on {plain(report.rows)}, {report.positions:,} labelled tokens, everything in fp32; "
        "divergence (KL, in nats) and agreement (the same first choice) are from base and adapter."
    )
    head = "| | loss | accuracy | divergence | agreement |\n|---|---|---|---|---|"
    return {"Evaluation": "\n".join([told, "", head, *rows])}


def licence_of(folder: Path) -> str | None:
    """Return the licence that the card of the model in ``folder`` names, or None."""
    file = folder / CARD
    if not file.is_file():
        return None
    try:
        told = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("license")
    except (ValueError, TypeError, OSError, yaml.YAMLError):
        return None
    return told if isinstance(told, str) and re.fullmatch(r"[\w.+-]{1,60}", told) else None


def run_of(adapter: Path) -> Run | None:
    """Return the run whose folder ``adapter`` is, or None; of a newer layout what the adapter itself says will do."""
    if is_run(adapter):
        with contextlib.suppress(InputError):
            return read_run(adapter)
    return None


def at_hub(card: str, name: str, repo_id: str, base: str | None = None) -> str:
    """Return a card of :func:`write_card` for the model ``name`` that others find as ``repo_id``.

    Args:
        card: the text.
        name: of the folder that it was written for.
        repo_id: of the hub.
        base: hub id of the base, where the card is to name another one.
    """
    card = card.replace(f"model={json.dumps(name)}", f"model={json.dumps(repo_id)}")
    if base is None:
        return card
    whole = ModelCard(card, ignore_metadata_errors=True)
    whole.data["base_model"] = base
    if whole.data.get("base_model_relation") is None:
        whole.data["base_model_relation"] = "finetune"
    return str(whole)


def of_run(run: Run) -> Iterator[str]:
    """Yield what a card says of a run: figures, answers, data, recipe, versions; paragraphs of Markdown."""
    if run.state != "finished":
        yield f"The run had not finished ({words.STATES[run.state]}, step {run.step:,})."
    if changes := words.changes(run):
        before, after = words.change_heads(run)
        rows = [f"| {plain(name)} | {number(one)} | {number(other)} |" for name, one, other in changes]
        told = "Measured on the base, and on base and adapter as they were trained:"
        yield "\n".join(["## Results", "", told, "", f"| held out | {before} | {after} |", "|---|---|---|", *rows])
    else:
        yield "## Results\n\nNothing was held out, so nothing is known of texts that were not trained on."
    asked = run.samples if run.options.get("sample_prompts") else {}  # else they are rows of the data
    for prompt, answers in list(asked.items())[:SAMPLES]:
        left = next((answer for answer in answers if answer.step == run.adapter_step), answers[-1])
        yield f"Asked:\n\n{code('', prompt)}\n\nBefore:\n\n{code('', answers[0].answer)}"
        yield f"After:\n\n{code('', left.answer)}"
    if data := run.data:
        share = f", {data.trained_tokens:,} of them trained" if data.trained_tokens else ""
        more = f", {data.evaluation:,} held out" if data.evaluation else ""
        files = ", ".join(f"`{last(str(name))}`" for name in _listed(run.options.get("data")))
        yield f"## Data\n\n{files}: {data.examples:,} examples of {data.tokens:,} tokens{share}{more}."
    options = {name: _bare(value) for name, value in given(run.options).items() if name not in UNSAID}
    options["model"] = words.model_name(run)
    cards = ", ".join(f"{name} {text}" for name, text, _ in words.cards(run) if name in ("steps", "training time"))
    yield f"## Recipe\n\n{cards[:1].upper()}{cards[1:]}, with `halfbyte train` and these options beside the defaults:"
    yield code("yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
    versions = run.circumstances.get("versions")
    if isinstance(versions, Mapping):
        yield "Versions: " + ", ".join(f"{plain(str(n))} {plain(str(v))}" for n, v in versions.items()) + "."


def _use(name: str, run: Run | None) -> str:
    task = str(run.options.get("task", "lm")) if run else "lm"
    kind = PIPELINES.get(task, PIPELINES["lm"])
    asked = '[{"role": "user", "content": "Your question"}]' if task == "lm" else '"Your text"'
    lines = ["from transformers import pipeline", "", f'model = pipeline("{kind}", model={json.dumps(name)})']
    return "\n".join([*lines, f"print(model({asked}))"])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _bare(value: Any) -> Any:
    """Return an option's value with the last part of each path in it alone."""
    if isinstance(value, str):
        return last(value) if value.startswith(("/", "~", "./", "../")) else value
    if isinstance(value, list):
        return [_bare(one) for one in value]
    if isinstance(value, dict):
        return {_bare(key): _bare(one) for key, one in value.items()}
    return value


def last(path: str) -> str:
    """Return the last part of a path."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "unnamed"


def plain(text: str) -> str:
    """Return a text as Markdown shows it."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def code(language: str, text: str) -> str:
    """Return a block of code in Markdown, whose fence no line of it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
