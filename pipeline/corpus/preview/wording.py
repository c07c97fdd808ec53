"""The words of a preview that the terminal and the page share: counts, outcomes, places of cuts."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.corpus.preview.lengths import length_summary
from pipeline.corpus.preview.record import Part, Preview, RowView, Totals

__all__ = ["cut_words", "number_of", "outcome_words", "part_words", "sum_lines"]


def number_of(count: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def sum_lines(preview: Preview) -> Iterator[tuple[str, str]]:
    """Yield name and text of what the first rows add up to."""
    totals = preview.totals
    what = "prompt" if preview.is_prompts else "sample"
    yield "rows", f"{totals.rows}, {'all there are' if totals.is_all else 'the first of more'}"
    used, samples = number_of(totals.used, "row"), number_of(totals.samples, what)
    yield "used", f"{used}: {samples} of {number_of(totals.tokens, 'token')}"
    if not preview.is_prompts:
        yield (
            "supervised",
            f"{totals.loss_tokens} tokens ({_share(totals.loss_tokens, totals.tokens)})",
        )
    yield "split", _split(totals)
    yield "lengths", length_summary(totals.lengths)
    cut = totals.counts.get("truncated_rows", 0)
    lost = totals.counts.get("truncated_tokens", 0)
    yield (
        "truncated",
        f"{number_of(cut, 'row')} ({_share(cut, totals.rows)}), {number_of(lost, 'token')}",
    )
    if totals.counts.get("split_rows"):
        yield "divided", f"{totals.counts['split_rows']} rows, into {totals.counts['split_parts']}"
    nothing = "nothing to answer" if preview.is_prompts else "no supervised token"
    dropped = [
        f"{totals.counts[name]} {why}"
        for name, why in (("dropped_no_labels", nothing), ("dropped_overlong", "too long"))
        if totals.counts.get(name)
    ]
    yield "left out", ", ".join(dropped) or "none"
    kinds = ", ".join(f"{count} {kind}" for kind, count in totals.quarantined.items())
    yield (
        "quarantined",
        f"{totals.bad} ({_share(totals.bad, totals.rows)}){': ' if kinds else ''}{kinds}",
    )
    for note, count in totals.notes.items():
        yield "note", f"{number_of(count, 'row')}: {note}"


def outcome_words(row: RowView, preview: Preview) -> str:
    """Return what became of a row, on one line."""
    if row.outcome == "quarantined":
        return f"quarantined: {row.reason}"
    if row.outcome == "dropped":
        return f"left out: {row.reason} ({row.tokens} tokens)"
    split = "held out" if row.split == "heldout" else "train"
    if not preview.totals.is_settled:
        split += " (so far: a small corpus holds out other rows)"
    return f"{split}, {row.tokens} tokens"


def part_words(part: Part, row: RowView, preview: Preview) -> str:
    """Return the numbers of one sample of a row."""
    length = len(part.input_ids_L)
    number = f"part {part.number}, " if len(row.parts) > 1 else ""
    if preview.is_prompts:
        return f"{number}prompt of {length} tokens, {part.sample_id}"
    return (
        f"{number}{length} tokens, {part.supervised} supervised "
        f"({_share(part.supervised, length)}), {part.sample_id}"
    )


def cut_words(part: Part, preview: Preview) -> tuple[str, str]:
    """Return what is to be said before and after the text of a sample; empty where nothing is."""
    before = after = ""
    if part.lost_before:
        before = (
            f"✂ {number_of(part.lost_before, 'token')} cut off before ({preview.longest} at most)"
        )
    if preview.is_prompts:
        after = "✎ here the teacher writes"
        if part.lost_after:
            after += f" (the document's other {part.lost_after} tokens are not used)"
    elif part.lost_after:
        after = (
            f"✂ {number_of(part.lost_after, 'token')} cut off at max_length {preview.longest}, "
            f"{part.lost_supervised} of them supervised"
        )
    return before, after


def _split(totals: Totals) -> str:
    train = number_of(totals.used - totals.heldout_rows, "row")
    text = f"{train} train, {totals.heldout_rows} held out"
    return text if totals.is_settled else f"{text} so far"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
