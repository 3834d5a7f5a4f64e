"""A survey as one page to send: no script, nothing loaded from elsewhere, every text escaped.

Should something still slip through, the page's own policy (Content-Security-Policy) lets a browser run no script, load
nothing but the pictures that lie in the page, and take no style but the one whose hash it names.
"""

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import __version__

if TYPE_CHECKING:
    from halfbyte.data.duplicates import Pair
    from halfbyte.data.samples import Piece, Sample
    from halfbyte.data.survey import Survey

TEMPLATE = "data_page.html"
SHORT_TOKENS = 160
"""Tokens of a row that are shown beside another."""


def page(survey: "Survey", opened: Any, samples: Sequence["Sample"], files: Sequence[str], model: str) -> str:
    """Return the page.

    Args:
        survey: what is shown.
        opened: rows, evaluation rows and their tokenizer, to show duplicates.
        samples: rows to show.
        files: what the user named as data.
        model: and as the model.
    """
    import jinja2
    from markupsafe import Markup

    from halfbyte.data.figures import figures, hints, percent
    from halfbyte.data.samples import one_line

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (Path(__file__).parent / "data_page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    show = _Shower(opened)
    return environment.get_template(TEMPLATE).render(
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        version=__version__,
        files=[one_line(name) for name in files],
        model=one_line(model),
        figures=figures(survey),
        hints=hints(survey),
        light=_picture(survey, dark=False),
        dark=_picture(survey, dark=True),
        groups=[(group, show.row(group.row)) for group in survey.duplicates.groups],
        comparisons=[
            ("Nearly equal rows", [show.pair(pair) for pair in survey.near.pairs]),
            ("One prompt, other answers", [show.pair(pair) for pair in survey.contradictions.pairs]),
            ("Evaluation rows and the training rows that they are like", show.overlap(survey)),
        ],
        samples=[(one, [(name, _spans(pieces)) for name, pieces in one.parts()]) for one in samples],
        percent=percent,
        one_line=one_line,
    )


class _Shower:
    """Rows of a table, short, to be seen beside each other."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def row(self, number: int, *, evaluation: bool = False) -> list[tuple[str, str]]:
        from halfbyte.data.samples import sample

        table = self._opened.data.evaluation if evaluation else self._opened.data.train
        return _spans(sample(table.rows, number, self._opened.tokenizer, SHORT_TOKENS).pieces)

    def pair(self, pair: "Pair", *, evaluation: bool = False) -> tuple["Pair", list[Any], list[Any]]:
        return pair, self.row(pair.row, evaluation=evaluation), self.row(pair.other)

    def overlap(self, survey: "Survey") -> list[Any]:
        return [self.pair(pair, evaluation=True) for pair in survey.overlap.pairs] if survey.overlap else []


def _spans(pieces: Sequence["Piece"]) -> list[tuple[str, str]]:
    """Return a row as pairs of a style's classes and a text."""
    from halfbyte.data.samples import gap, joined, visible

    spans = []
    for piece in joined(pieces):
        classes = [name for name, holds in (("gap", piece.is_gap), ("t", piece.trained), ("s", piece.special)) if holds]
        spans.append((" ".join(classes), gap(piece) if piece.is_gap else visible(piece.text)))
    return spans


def _picture(survey: "Survey", *, dark: bool) -> str:
    from halfbyte.data.picture import draw_lengths

    stream = io.BytesIO()
    draw_lengths(survey, stream, form="svg", dark=dark)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
