"""A preview as one self-contained HTML page: no network, no script, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.corpus.preview.lengths import histogram
from pipeline.corpus.preview.record import Part, Piece, Preview
from pipeline.corpus.preview.visible import visible_texts
from pipeline.corpus.preview.wording import cut_words, outcome_words, part_words, sum_lines
from pipeline.printable import render_template

__all__ = ["render_html"]

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render_html(preview: Preview) -> str:
    """Return the page; every text of the data is escaped on the way in."""
    bins = histogram(preview.totals.lengths, preview.longest)
    return render_template(
        _TEMPLATE,
        {},
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


def _tokens(part: Part) -> list[dict[str, Any]]:
    return [
        {"text": text, "kind": _kind(piece), "note": ", ".join(map(str, piece.ids))}
        for piece, text in zip(part.pieces, visible_texts(part.pieces), strict=True)
    ]


def _kind(piece: Piece) -> str:
    kinds = [name for name, holds in (("m", piece.supervised), ("x", piece.special)) if holds]
    return " ".join(["t", *kinds])
