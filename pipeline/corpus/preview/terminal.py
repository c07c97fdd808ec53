"""A preview as text: in colour on a terminal, with brackets elsewhere, where logs are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.corpus.preview.lengths import histogram
from pipeline.corpus.preview.record import Part, Piece, Preview, RowView
from pipeline.corpus.preview.visible import visible_texts
from pipeline.corpus.preview.wording import cut_words, outcome_words, part_words, sum_lines
from pipeline.printable import printable

__all__ = ["render_text"]

_BAR = 40
"""Characters of the longest bar."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What stands around text of a kind."""

    bold: tuple[str, str]
    faint: tuple[str, str]
    warning: tuple[str, str]
    supervised: tuple[str, str]
    special: tuple[str, str]
    special_supervised: tuple[str, str]


def _ansi(code: str) -> tuple[str, str]:
    return f"\x1b[{code}m", "\x1b[0m"


_COLOURED = _Look(
    bold=_ansi("1"),
    faint=_ansi("2"),
    warning=_ansi("1;33"),
    supervised=_ansi("32"),
    special=_ansi("36"),
    special_supervised=_ansi("1;32;7"),
)
_PLAIN = _Look(
    bold=("", ""),
    faint=("", ""),
    warning=("", ""),
    supervised=("«", "»"),
    special=("⟨", "⟩"),
    special_supervised=("⟨", "⟩"),
)


def render_text(preview: Preview, *, colour: bool, shown_tokens: int | None) -> str:
    """Return the preview as lines of text.

    Args:
        preview: what to show.
        colour: whether escape sequences mark the kinds of tokens; else brackets do.
        shown_tokens: of one sample at most; the middle is left out. None: all.
    """
    return "\n".join(_Writer(_COLOURED if colour else _PLAIN, colour, shown_tokens).lines(preview))


@dataclass(frozen=True, slots=True)
class _Writer:
    style: _Look
    colour: bool
    shown_tokens: int | None

    def lines(self, preview: Preview) -> Iterator[str]:
        yield self._marked(f"preview of {preview.name}: nothing is loaded or written", "bold")
        for fact in preview.facts:
            yield f"  {fact.name:<12} {printable(fact.text)}"
        yield ""
        yield self._marked("the first rows", "bold")
        for name, text in sum_lines(preview):
            yield f"  {name:<12} {printable(text)}"
        yield from self._histogram(preview)
        yield ""
        count = len(preview.findings)
        yield self._marked(f"suspicious: {count or 'nothing'}", "bold" if not count else "warning")
        for finding in preview.findings:
            yield f"  ! {printable(str(finding))}"
        yield ""
        yield self._legend(preview)
        for row in preview.rows:
            yield from self._row(row, preview)
        for kind in preview.missing:
            yield f"no row among the first {preview.totals.rows} is {kind}"

    def _histogram(self, preview: Preview) -> Iterator[str]:
        bins = histogram(preview.totals.lengths, preview.longest)
        most = max((found.rows for found in bins), default=0)
        is_beyond = False
        for found in bins:
            if found.is_beyond and not is_beyond:
                yield f"  {'':<12} ── {preview.longest} tokens: what is longer is cut ──"
            is_beyond = found.is_beyond
            bar = "█" * max(1, round(_BAR * found.rows / most)) if found.rows else ""
            yield f"  {f'{found.first} to {found.last}':>15} {found.rows:>6} {bar}"

    def _legend(self, preview: Preview) -> str:
        shown = [
            *([] if preview.is_prompts else [self._marked("supervised", "supervised")]),
            self._marked("special token", "special"),
            "↵ newline",
            "· space at a border",
        ]
        return f"{self._marked('rows', 'bold')}   {'   '.join(shown)}"

    def _row(self, row: RowView, preview: Preview) -> Iterator[str]:
        yield ""
        head = f"row {row.number}, {row.place}: {outcome_words(row, preview)}"
        kind = "warning" if row.outcome != "used" else "bold"
        yield self._marked(f"── {printable(head)}", kind)
        for part in row.parts:
            yield self._marked(f"   {part_words(part, row, preview)}", "faint")
            before, after = cut_words(part, preview)
            if before:
                yield self._marked(before, "warning")
            yield self._tokens(part).rstrip("\n")
            if after:
                yield self._marked(after, "warning" if part.lost_after else "bold")

    def _tokens(self, part: Part) -> str:
        pieces, texts = part.pieces, visible_texts(part.pieces)
        limit = self.shown_tokens
        if limit is None or len(part.input_ids_L) <= limit:
            return self._runs(pieces, texts)
        half = limit // 2
        head, tail = pieces[:half], pieces[-half:]
        between = sum(len(piece.ids) for piece in pieces[half:-half])
        note = self._marked(f" … {between} more tokens (--shown_tokens) … ", "faint")
        return f"{self._runs(head, texts[:half])}\n{note}\n{self._runs(tail, texts[-half:])}"

    def _runs(self, pieces: Sequence[Piece], texts: Sequence[str]) -> str:
        """Join pieces; with brackets, a whole stretch of the mask has one pair."""
        if self.colour:
            return "".join(map(self._coloured, pieces, texts))
        shown, inside = [], False
        opening, closing = self.style.supervised
        for piece, text in zip(pieces, texts, strict=True):
            if piece.supervised != inside:
                shown.append(opening if piece.supervised else closing)
                inside = piece.supervised
            shown.append(self._marked(text, "special") if piece.special else text)
        return "".join(shown) + (closing if inside else "")

    def _coloured(self, piece: Piece, text: str) -> str:
        if piece.special:
            return self._marked(text, "special_supervised" if piece.supervised else "special")
        return self._marked(text, "supervised") if piece.supervised else text

    def _marked(self, text: str, kind: str) -> str:
        before, after = getattr(self.style, kind)
        # Each line has its own colour: a pager that shows one line shows it as it is.
        return "\n".join(f"{before}{line}{after}" if line else "" for line in text.split("\n"))
