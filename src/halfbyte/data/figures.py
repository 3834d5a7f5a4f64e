"""A survey in words: its figures, and what in them somebody should look at before training."""

from collections.abc import Mapping

from halfbyte.data.samples import one_line
from halfbyte.data.survey import LITTLE, NEARLY_ALL, Answers, Spread, Survey
from halfbyte.errors import counted

SCRIPTS = 6
STOPPED = 0.99
"""Share of the answers that should end with the stop token, those that were cut apart."""


def figures(survey: Survey) -> list[tuple[str, str]]:
    """Return names and values, in the order in which they are shown."""
    texts, answers, near = survey.texts, survey.answers, survey.near
    lines = [
        ("rows", f"{survey.rows:,}"),
        ("tokens", f"{survey.tokens:,}"),
        ("trained tokens", f"{survey.trained_tokens:,} ({percent(survey.trained_tokens, survey.tokens)})"),
        ("tokens a row", _spread(survey.lengths)),
        ("trained tokens a row", _spread(survey.trained_lengths)),
        (f"cut at {survey.max_length:,} tokens", counted(survey.truncated, "example")),
        (f"under {LITTLE:.0%} trained", counted(survey.little_trained, "row")),
        (f"over {NEARLY_ALL:.0%} trained", counted(survey.nearly_all_trained, "row")),
        ("answers", f"{answers.count:,}"),
        ("they end with", _ends(answers)),
        ("equal rows", f"{survey.duplicates.rows:,} repeat an earlier one"),
        (
            "one prompt, other answers",
            f"{counted(survey.contradictions.rows, 'row')}, {counted(survey.contradictions.prompts, 'prompt')}",
        ),
        ("nearly equal rows", f"{near.rows:,} of {near.sampled:,} different rows{_of(near.sampled, survey)}"),
        ("answers mostly in", f"{_shares(texts.main_scripts)} of the rows{_of(texts.sampled, survey)}"),
        ("scripts, trained", f"{_shares(texts.trained_scripts)} of the characters"),
        ("scripts, not trained", f"{_shares(texts.prompt_scripts)} of the characters"),
        ("bytes that were no text", f"{texts.replaced:,} of {texts.sampled:,} rows{_of(texts.sampled, survey)}"),
        ("wrong encoding, by its looks", f"{texts.mojibake:,} of {texts.sampled:,} rows{_of(texts.sampled, survey)}"),
    ]
    if survey.rejected_lengths:
        lines.append(("tokens a rejected row", _spread(survey.rejected_lengths)))
    if survey.good is not None:
        lines.append(("answers judged good", f"{survey.good:,} ({percent(survey.good, survey.rows)})"))
    if overlap := survey.overlap:
        lines += [
            ("evaluation rows", f"{overlap.rows:,}"),
            ("trained on too", counted(overlap.equal, "evaluation row")),
            ("their prompt is trained on", counted(overlap.same_prompt, "evaluation row")),
            (
                "nearly a training row",
                f"{overlap.near:,} of {overlap.sampled:,}, compared with {counted(overlap.of, 'row')}",
            ),
        ]
    if survey.shapes:
        lines.append(("shapes", ", ".join(f"{one_line(shape)} {count:,}" for shape, count in survey.shapes.items())))
    if survey.bad:
        lines.append(("left out", counted(sum(survey.bad.values()), "row")))
    return lines


def hints(survey: Survey) -> list[str]:
    """Return what should be looked at, a sentence each; what the preparation said comes first."""
    lines = [one_line(sentence) for sentence in survey.said]
    lines += [f"In {count:,} of the examples: {one_line(note)}." for note, count in survey.notes.items()]
    lines += [
        f"Left out, {counted(count, 'row')}: {one_line(kind)}." + _first(survey.first_bad.get(kind))
        for kind, count in survey.bad.items()
    ]
    if survey.unused:
        names = ", ".join(one_line(name) for name in list(survey.unused)[:10])
        lines.append(f"Columns not used: {names}{' …' if len(survey.unused) > 10 else ''}.")
    return lines + _findings(survey)


def _findings(survey: Survey) -> list[str]:
    lines, answers, texts = [], survey.answers, survey.texts
    stops = [answers.stop_token] * bool(answers.stop_token) + answers.other_stops
    if not stops:
        lines.append("The tokenizer names no stop token, so nobody can tell whether the model learns to stop.")
    elif answers.stopped < STOPPED * (answers.count - survey.truncated):
        lines.append(
            f"Only {percent(answers.stopped, answers.count)} of the answers end with "
            f"{' or '.join(map(_quoted, stops))}, at which an answer stops; the model may not learn to."
        )
    if survey.truncated:
        lines.append(f"Examples cut at max_length {survey.max_length:,}: {survey.truncated:,}; raise it if it can be.")
    if survey.little_trained:
        lines.append(f"Rows with under {LITTLE:.0%} trained: {survey.little_trained:,}; are those the answers meant?")
    if survey.duplicates.rows:
        lines.append(f"Rows equal to an earlier one: {survey.duplicates.rows:,}; they are trained again each time.")
    if survey.overlap and survey.overlap.equal:
        lines.append(
            f"Evaluation rows that are trained on too: {survey.overlap.equal:,} of {survey.overlap.rows:,}; their loss "
            "says nothing about other rows."
        )
    if texts.replaced:
        lines.append(
            f"Rows with U+FFFD, the sign for bytes that could not be read: {texts.replaced:,} of {texts.sampled:,}; "
            "name the file's encoding."
        )
    if texts.mojibake:
        lines.append(f"Rows that look as if read in a wrong encoding: {texts.mojibake:,} of {texts.sampled:,}.")
    for opening in survey.openings:
        what = "texts" if opening.whole else "answers"
        lines.append(f"{opening.share:.0%} of the {what} begin with {_quoted(opening.text)}.")
    return lines


def percent(part: float, whole: float) -> str:
    """Return a share in per cent, to three digits; what is not all or nothing does not look like it."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.001:
        return "under 0.001%"
    texts = (f"{share:.{digits}g}" for digits in range(3, 18))
    return next(text for text in texts if text != "100" or share == 100) + "%"


def _spread(spread: Spread) -> str:
    least, most = spread.quantiles["0"], spread.quantiles["100"]
    if least == most:
        return f"{most:,} in every row"
    half, nearly = spread.quantiles["50"], spread.quantiles["95"]
    return f"{least:,} to {most:,}; half have {half:,} or less, 95% {nearly:,} or less; mean {spread.mean:,.0f}"


def _ends(answers: Answers) -> str:
    ends = [(text, times) for text, times in answers.ends.items() if times >= LITTLE * answers.count]
    return ", ".join(f"{_quoted(text)} {percent(times, answers.count)}" for text, times in ends) or "many tokens"


def _shares(shares: Mapping[str, float]) -> str:
    named = [f"{name} {percent(share, 1)}" for name, share in list(shares.items())[:SCRIPTS]]
    return ", ".join([*named, "…"] if len(shares) > SCRIPTS else named) or "none"


def _quoted(text: str) -> str:
    return f"“{one_line(text)}”"


def _of(sampled: int, survey: Survey) -> str:
    return ", a sample" if sampled < survey.rows - survey.duplicates.rows else ""


def _first(sentence: str | None) -> str:
    return f" The first: {one_line(sentence)}" if sentence else ""
