"""A chart as inline SVG: styled by the page's CSS, so that dark mode reaches it."""

from __future__ import annotations

from markupsafe import Markup

from pipeline.report.charts.scene import Label, Line, Mark, Scene, outline

__all__ = ["svg"]


def svg(scene: Scene, *, identity: str) -> Markup:
    """Return a chart; `identity` makes the ids inside unique on the page."""
    return Markup(
        '<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-labelledby="{id}-t {id}-d">'
        '<title id="{id}-t">{title}</title><desc id="{id}-d">{told}</desc>{parts}</svg>'
    ).format(
        width=scene.width,
        height=scene.height,
        id=identity,
        title=scene.title,
        told=scene.told,
        parts=Markup("").join(_element(part) for part in scene.parts),
    )


def _element(part: Line | Mark | Label) -> Markup:
    if isinstance(part, Label):
        return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
            part.kind, part.x, part.y, part.anchor, part.text
        )
    if isinstance(part, Line):
        kind = f"{part.kind} {part.style}{' pale' if part.pale else ''}".rstrip()
        return Markup('<path class="{}" d="{}"/>').format(kind, _path(part.strokes))
    kind = f"mark {part.style}{' open' if part.open else ''}"
    if part.shape == "circle":
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:g}"/>').format(
            kind, part.x, part.y, part.size
        )
    return Markup('<path class="{}" d="{}Z"/>').format(kind, _path((outline(part),)))


def _path(strokes: tuple[tuple[tuple[float, float], ...], ...]) -> str:
    # After the first of a stroke, SVG reads further pairs as lines.
    return "".join("M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in stroke) for stroke in strokes)
