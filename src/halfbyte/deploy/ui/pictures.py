"""What the page draws: HTML and SVG as text, every text of a user's or of a file's escaped.

Texts of data may be of any script: each stands in a ``dir="auto"`` of its own.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape, unescape
from typing import Any

from halfbyte.deploy.ui.found import FoundModel
from halfbyte.deploy.ui.jobs import Job
from halfbyte.deploy.ui.library import said
from halfbyte.deploy.ui.questions import Columns, Foretold, Preview
from halfbyte.deploy.ui.texts import entry, say
from halfbyte.errors import size_text
from halfbyte.runs.history import Run
from halfbyte.runs.report import curves, words
from halfbyte.runs.report.axes import number

TEXT = re.compile(r'(>|aria-label=")([^<>"]+)(?=[<"])')
"""What of SVG is read, by eyes or by a screen reader."""
FAR = re.compile(r"^(.*: ([\d,]+) of ([\d,]+)\b.*)$", re.MULTILINE)
"""What a command says of how far it is (``halfbyte.cli.console.bar``)."""
SHOWN_SAMPLES = 6
SHOWN_NOTES = 40


def sendable(text: str) -> str:
    """Return a text with a question mark for each half of a character, which no answer to a browser can hold."""
    return text.encode(errors="replace").decode()


def told(text: str, kind: str = "") -> str:
    """Return a sentence as a box: ``bad``, ``good`` or plain."""
    return f'<p class="hb-told {kind}" role="status">{_(text)}</p>' if text else ""


def machine(
    language: str,
    about: Mapping[str, Any],
    models: Sequence[FoundModel],
    hour: Mapping[str, float],
    latest: Sequence[tuple[str, Run]] = (),
) -> str:
    """Return what this machine is, the models that it has, how much of them it trains in an hour, the latest runs."""
    t = entry(language, "machine")
    facts = [
        (t["processor"], f"{about['processor']}"),
        (t["cores"], f"{about['cores']}"),
        (t["memory"], f"{size_text(about['memory'])} ({size_text(about['free'])} {t['free']})"),
        (t["kernels"], about["kernels"]),
    ]
    pairs = "".join(f"<div><dt>{_(name)}</dt><dd>{_(value)}</dd></div>" for name, value in facts)
    html = f'<dl class="hb-facts">{pairs}</dl>'
    html += f"<h2>{_(t['models'])}</h2>"
    rows = [(m.name, size_text(m.nbytes), f"{hour[m.path]:,.0f}" if m.path in hour else "") for m in models]
    html += table((t["name"], t["size"], t["hour"]), rows, right=(1, 2)) if models else told(t["none"])
    if hour and not about["measured"]:
        html += f'<p class="hb-dim">{_(t["guess"])}</p>'
    return html + (f"<h2>{_(t['runs'])}</h2>{runs(language, latest, ())}" if latest else "")


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = (), raw: Sequence[int] = ()
) -> str:
    """Return a table.

    Args:
        head: of its columns.
        rows: texts.
        right: columns of numbers.
        raw: columns that are HTML already.
    """
    names = "".join(f'<th scope="col"{_side(at, right)}>{_(name)}</th>' for at, name in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_side(at, right)}>{cell if at in raw else f'<bdi>{_(cell)}</bdi>'}</td>"
            for at, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    whole = f'<table class="hb-table"><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="hb-scroll">{whole}</div>'


def columns(language: str, found: Columns) -> str:
    """Return the first rows of data."""
    if not found.names:
        return ""
    heading = f"<h2>{_(say(language, 'data.columns'))}</h2>"
    return heading + table(found.names, [[_cut(cell) for cell in row] for row in found.rows[:3]])


def preview(language: str, found: Preview) -> str:
    """Return what would be trained, with what is trained coloured."""
    t = entry(language, "data")
    if found.of:
        html = told(say(language, "data.part", rows=f"{found.rows:,}", size=size_text(found.of)))
    else:
        html = told(say(language, "data.rows", rows=f"{found.rows:,}"))
    if found.bad:
        for kind, count, first in found.bad:
            line = say(language, "data.bad", count=f"{count:,}", kind=said(language, kind))
            where = f"<br><small>{_(say(language, 'data.first', first=said(language, first)))}</small>" if first else ""
            html += f'<p class="hb-told bad" dir="auto">{_(line)}{where}</p>'
    else:
        html += told(t["no_bad"], "good")
    html += f'<p class="hb-dim">{_(t["trained"])}</p>'
    names = {"": "", "chosen": t["chosen"], "rejected": t["rejected"], "good": t["good"], "bad": t["bad_answer"]}
    for title, parts in found.samples[:SHOWN_SAMPLES]:
        number, dot, where = title.partition(" · ")
        html += f'<section class="hb-sample"><h3><bdi>{_(number + dot + said(language, where))}</bdi></h3>'
        for name, spans in parts:
            label = f'<span class="hb-dim">{_(names.get(name, name))}</span>' if name else ""
            html += f'{label}<pre dir="auto">{"".join(_span(*span) for span in spans)}</pre>'
        html += "</section>"
    if found.hints:
        items = "".join(f'<li dir="auto">{_(said(language, hint))}</li>' for hint in found.hints)
        html += f"<details><summary>{_(t['hints'])}</summary><ul>{items}</ul></details>"
    pairs = "".join(
        f"<tr><th scope='row'>{_(said(language, name))}</th><td>{_(said(language, value))}</td></tr>"
        for name, value in found.figures
    )
    return html + f"<details><summary>{_(t['figures'])}</summary><table class='hb-table'>{pairs}</table></details>"


def plan(language: str, found: Foretold) -> str:
    """Return what a run takes: a bar of its memory by part, its time."""
    if found.refusal:
        return told(said(language, found.refusal), "bad")
    t = entry(language, "plan")
    room = max(found.free + found.imports, found.peak)
    parts = [(name, size) for name, size in found.parts.items() if size >= room / 400]
    x, bar, keys = 0.0, "", ""
    for at, (name, size) in enumerate(parts):
        style, width = curves.STYLES[at % len(curves.STYLES)], 100 * size / room
        title = f"{t.get(name, name)}: {size_text(size)}"
        bar += f'<rect class="{style}" x="{x:.3f}%" width="{width:.3f}%" height="100%"><title>{_(title)}</title></rect>'
        keys += f'<li><span class="hb-key {style}"></span>{_(title)}</li>'
        x += width
    peak = say(language, "plan.peak", peak=size_text(found.peak), free=size_text(max(found.free, 0)))
    picture = f'<svg class="hb-bar" role="img" aria-label="{_(peak)}">{bar}</svg>'
    html = f'<p>{_(peak)}</p>{picture}<ul class="hb-keys">{keys}</ul>'
    step = words.duration(found.step) if found.step >= 0.1 else "< 0.1 s"
    html += f"<p>{_(say(language, 'plan.step', step=step))}"
    if found.steps is not None and found.seconds is not None:
        whole = say(language, "plan.whole", steps=f"{found.steps:,}", seconds=words.duration(found.seconds))
        html += f"<strong>{_(whole)}</strong>"
        if found.evaluations >= 0.05:
            html += f"{_(say(language, 'plan.evaluations', seconds=words.duration(found.evaluations)))}"
    html += "</p>"
    if found.of:
        html += f'<p class="hb-dim">{_(t["part"])}</p>'
    if not found.measured:
        html += f'<p class="hb-dim">{_(t["guess"])}</p>'
    for flags, times in found.advice[:2]:
        line = say(language, "plan.faster", flags=flags, times=f"{times:.2f}")
        html += f'<p class="hb-dim">{_(line)}</p>'
    return html


def runs(
    language: str,
    found: Sequence[tuple[str, Run]],
    waiting: Sequence[tuple[str, Job]],
    going_on: Collection[str] = (),
) -> str:
    """Return a table of runs, each a link to itself.

    Args:
        language: of the page.
        found: runs, by what the page calls them.
        waiting: jobs that are no runs yet.
        going_on: names of runs that wait for their turn to go on.
    """
    t = entry(language, "run")
    rows = [
        (_link(name), _state(language, "waiting" if job.state == "waiting" else "starting"), "", "", "", "")
        for name, job in waiting
    ]
    for name, run in found:
        steps = f"{run.step:,}/{run.total_steps:,}" if run.total_steps else f"{run.step:,}"
        last = run.kept.figures if run.kept else {}
        loss = number(last["loss"]) if "loss" in last else "" if run.loss is None else number(run.loss)
        model = f"<bdi>{_(words.model_name(run))}</bdi>"
        state = "waiting" if name in going_on and run.state != "running" else run.state
        rows.append((_link(name), _state(language, state), steps, loss, model, words.moment(run.begun)))
    if not rows:
        return told(t["no_runs"])
    head = (t["name"], t["state"], t["step"], said(language, "Loss"), t["model"], t["begun"])
    return table(head, rows, right=(2, 3), raw=range(6))


def run(language: str, name: str, found: Run, job: Job | None, log: str) -> str:
    """Return a run: how far it is, its curves, answers, notices and log.

    Args:
        language: of the page.
        name: what the page calls it.
        found: the run.
        job: that began it.
        log: of the job.
    """
    t = entry(language, "run")
    waits = job and job.state == "waiting" and found.state != "running"
    state = _state(language, "waiting" if waits else found.state)
    html = f'<header class="hb-run"><h2><bdi>{_(found.path.name)}</bdi> {state}</h2>'
    told_now = []
    if found.total_steps:
        share = found.step / found.total_steps
        told_now.append(say(language, "run.steps", step=f"{found.step:,}", total=f"{found.total_steps:,}"))
        html += f'<progress max="1" value="{share:.4f}" aria-label="{_(told_now[-1])}"></progress>'
        if found.state == "running" and found.seconds and found.step:
            first = next((s for s in found.steps if s.elapsed), None)
            made = found.step - (first.step if first else 0)
            spent = found.seconds - (first.elapsed if first else 0)
            if made > 0:
                left = spent / made * (found.total_steps - found.step)
                told_now.append(say(language, "run.left", time=words.duration(left)))
    if found.loss is not None:
        told_now.append(say(language, "run.loss", loss=number(found.loss)))
    if found.kept and "loss" in found.kept.figures:
        told_now.append(say(language, "run.evaluation", loss=number(found.kept.figures["loss"])))
    if found.steps:
        told_now.append(say(language, "run.speed", speed=f"{found.steps[-1].tokens_per_second:,.0f}"))
        if found.steps[-1].memory_bytes:
            told_now.append(f"{t['memory']} {size_text(found.steps[-1].memory_bytes)}")
    link = f'<a href="report?run={_quoted(name)}" target="_blank" rel="noopener">{_(t["report"])}</a>'
    html += f"<p>{' · '.join([*(_(one) for one in told_now), link])}</p></header>"
    if found.error:
        html += told(said(language, found.error), "bad")
    for trouble in (*found.troubles, *found.problems):
        html += told(said(language, trouble), "look")
    if found.steps:
        html += charts(language, curves.drawings(found))
    if found.samples:
        html += f"<h3>{_(t['samples'])}</h3>"
        for prompt, answers in list(found.samples.items())[:SHOWN_SAMPLES]:
            html += f'<pre dir="auto" class="hb-prompt">{_(prompt)}</pre>'
            for answer in answers[-2:]:
                at = say(language, "run.at", step=f"{answer.step:,}")
                label = f'<span class="hb-dim">{_(at)}</span>'
                html += f'{label}<pre dir="auto">{_(answer.answer)}</pre>'
    if found.notes:
        items = "".join(f'<li dir="auto">{_(said(language, note))}</li>' for note in found.notes[-SHOWN_NOTES:])
        html += f"<details><summary>{_(t['notes'])}</summary><ul>{items}</ul></details>"
    if found.options:
        pairs = [(name, words.value(value)) for name, value in found.options.items()]
        html += f"<details><summary>{_(t['options'])}</summary>{table((t['name'], ''), pairs)}</details>"
    if log:
        is_open = " open" if job and job.state == "failed" else ""
        html += f'<details{is_open}><summary>{_(t["log"])}</summary><pre dir="auto">{_(log)}</pre></details>'
    return html


def job(language: str, found: Job) -> str:
    """Return a job that has no run yet, or is none; how far it is, if it has said that."""
    html = f'<header class="hb-run"><h2><bdi>{_(found.title)}</bdi> {_state(language, found.state)}</h2>'
    said_last = FAR.findall(found.log) if found.state == "running" else []
    if said_last:
        line, *numbers = said_last[-1]
        done, total = (int(number.replace(",", "")) for number in numbers)
        html += f'<progress max="{total}" value="{done}" aria-label="{_(line)}"></progress>'
    html += "</header>"
    return html + (f'<pre dir="auto">{_(found.log)}</pre>' if found.log else "")


def compared(language: str, found: Sequence[tuple[str, Run]]) -> str:
    """Return the curves of runs in one, and the options in which they differ."""
    from halfbyte.runs.report.page import compared_options

    html = charts(language, curves.compared(found), {name for name, _run in found})
    rows = [(name, *values) for name, values in compared_options(found)]
    head = (say(language, "run.differ"), *(name for name, _run in found))
    return html + (table(head, rows) if rows else "")


def charts(language: str, drawings: Sequence[curves.Drawing], names: Collection[str] = ()) -> str:
    """Return charts, their own words in the page's language, but ``names`` of runs as they are."""
    html = ""
    for one in drawings:
        size = "large" if one.large else "small"
        html += f'<figure class="{size}"><figcaption>{_(one.heading)}</figcaption>{one.svg}{one.legend}</figure>'

    def translated(found: re.Match[str]) -> str:
        text = unescape(found[2])
        return f"{found[1]}{_(text if text in names else said(language, text))}"

    html = TEXT.sub(translated, html)
    return f'<div class="hb-charts">{html}</div>'


def audit(language: str, ways: Sequence[Mapping[str, Any]], recommended: str) -> str:
    """Return the table of an audit."""
    t = entry(language, "audit")
    rows = []
    for way in ways:
        kept = way["kept"]
        bar = (
            f'<span class="hb-share" style="--share:{max(0.0, min(kept, 1.0)):.3f}"></span>'
            if math.isfinite(kept)
            else ""
        )
        best = f" <strong>{_(t['recommended'])}</strong>" if way["name"] == recommended else ""
        name = f"{_(t['names'].get(way['name'], way['name']))}{best}"
        rows.append((name, str(way["bits"]), f"{kept:.1%}{bar}", f"{way['agreement']:.1%}"))
    head = (t["way"], t["size"], t["kept"], t["agreement"])
    return f'<p class="hb-dim">{_(t["explain"])}</p>' + table(head, rows, right=(1, 2, 3), raw=(0, 2))


def _(text: Any) -> str:
    return escape(sendable(str(text)))


def _side(at: int, right: Sequence[int]) -> str:
    return ' class="right"' if at in right else ""


def _span(style: str, text: str) -> str:
    return f'<span class="hb-{style}">{_(text)}</span>' if style else _(text)


def _link(run: str) -> str:
    return f'<a href="?run={_quoted(run)}"><bdi>{_(run)}</bdi></a>'


def _cut(text: str, longest: int = 80) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _state(language: str, state: str) -> str:
    return f'<span class="hb-state {_(state.replace(" ", "-"))}">{_(entry(language, "state")[state])}</span>'


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")
