"""A preview as one self-contained HTML page: no network, no script, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.corpus.preview.lengths import histogram
from pipeline.corpus.preview.record import Part, Piece, Preview
from pipeline.corpus.preview.visible import visible_texts
from pipeline.corpus.preview.wording import cut_words, outcome_words, part_words, sum_lines
from pipeline.printable import printable

__all__ = ["render_html"]

_TEMPLATES = Path(__file__).parent


def render_html(preview: Preview) -> str:
    """Return the page; every text of the data is escaped on the way in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    bins = histogram(preview.totals.lengths, preview.longest)
    page = environment.get_template("page.html.jinja").render(
        preview=preview,
        sums=list(sum_lines(preview)),
        bins=bins,
        most=max((found.rows for found in bins), default=1),
        rows=[
            {
                "row": row,
                "outcome": outcome_words(row, preview),
                "parts": [
                    {
                        "words": part_words(part, row, preview),
                        "cuts": cut_words(part, preview),
                        "tokens": list(_tokens(part)),
                    }
                    for part in row.parts
                ],
            }
            for row in preview.rows
        ],
    )
    # A lone surrogate has no UTF-8 and would end the write.
    return page.encode("utf-8", "replace").decode("utf-8")


def _tokens(part: Part) -> list[dict[str, Any]]:
    return [
        {"text": text, "kind": _kind(piece), "note": ", ".join(map(str, piece.ids))}
        for piece, text in zip(part.pieces, visible_texts(part.pieces), strict=True)
    ]


def _kind(piece: Piece) -> str:
    kinds = [name for name, holds in (("m", piece.supervised), ("x", piece.special)) if holds]
    return " ".join(["t", *kinds])
