"""Score a student on the held-out rows of caches: its distance to the teacher on their text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from pipeline.config import Settings, option, parse_command
from pipeline.errors import run_command
from pipeline.program import command_name

if TYPE_CHECKING:
    from pipeline.evaluate.measures import HeldoutScores

__all__ = ["ScoreRun", "main", "scores_of"]

PROG = command_name("stages.score_student")


class ScoreRun(Settings):
    """Which student, and on which caches."""

    student_model: str = option(..., "the student: a folder or a hub id")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    caches: tuple[str, ...] = option(
        ...,
        "caches whose held-out rows it reads, comma-separated: a folder or URL each, with a name "
        "for the table if wanted (own=runs/own-text)",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "type of the weights (auto: bfloat16 on a GPU, float32 on a CPU)"
    )
    scores: str | None = option(None, "JSON file for the scores of every row; none: a table alone")

    @field_validator("caches")
    @classmethod
    def _some(cls, caches: tuple[str, ...]) -> tuple[str, ...]:
        if not caches:
            raise ValueError("found none, expected at least one")
        names = [_named(item)[0] for item in caches]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: there twice, expected a name of each cache")
        return caches


def main(argv: Sequence[str] | None = None) -> int:
    """Score the student, print a table and, if asked to, write the scores of every row."""
    run = parse_command(
        ScoreRun,
        list(sys.argv[1:] if argv is None else argv),
        prog=PROG,
        description=__doc__ or "",
        examples=[
            f"{PROG} --student_model runs/default/student/model --caches runs/default/cache",
            f"{PROG} --student_model NAME --caches corpus=s3://bucket/cache,own=runs/own-text",
        ],
    ).settings
    from pipeline.cache.io.reader import open_cache
    from pipeline.errors import Mistakes
    from pipeline.models.device import uses_gpu
    from pipeline.models.resolve import resolve_model
    from pipeline.observe.logs import configure_logging
    from pipeline.storage import Store
    from pipeline.student.score import distance_in, score_on_caches

    configure_logging("warning")
    mistakes, caches, model = Mistakes(), {}, None
    for name, url in map(_named, run.caches):
        with mistakes.collected():
            caches[name] = open_cache(url)
    with mistakes.collected():
        model = resolve_model(run.student_model, revision=run.revision, role="student")
    mistakes.raise_any()
    assert model is not None
    dtype = ("bfloat16" if uses_gpu() else "float32") if run.dtype == "auto" else run.dtype
    found = score_on_caches(model.path, caches, dtype=dtype)
    width = max(map(len, found))
    for name, scores in found.items():
        kl, ce = scores.mean("kl"), scores.mean("cross_entropy")
        agreement = scores.mean("top1_agreement")
        print(
            f"{name:<{width}}  {distance_in(caches[name])} {kl.value:.4f} ± {kl.standard_error:.4f}"
            f"  cross_entropy {ce.value:.4f} ± {ce.standard_error:.4f}"
            f"  top1_agreement {agreement.value:.1%} ± {agreement.standard_error:.1%}"
            f"  {_acceptance(scores, bound=distance_in(caches[name]) != 'kl')}"
            f"  ({len(scores.sample_ids)} rows, {sum(scores.loss_tokens)} tokens)"
        )
    if run.scores is not None:
        data = {
            "student": {"model": model.name, "revision": model.revision},
            "caches": {
                name: {
                    "identity_digest": caches[name].manifest.identity_digest,
                    "distance": distance_in(caches[name]),
                    "scores": scores.to_json(),
                }
                for name, scores in found.items()
            },
        }
        file = Path(run.scores)
        text = json.dumps(data, indent=1) + "\n"
        Store(str(file.parent)).write(file.name, text.encode())
    return 0


def scores_of(caches: Mapping[str, Any]) -> dict[str, HeldoutScores]:
    """Return the scores on each cache, of the `caches` of a file of scores."""
    from pipeline.evaluate.measures import HeldoutScores

    return {name: HeldoutScores.from_json(data["scores"]) for name, data in caches.items()}


def _acceptance(scores: HeldoutScores, *, bound: bool) -> str:
    """Return the expected acceptance rate as the teacher's draft model, or a lower bound of it."""
    found = scores.mean("acceptance")
    name = "acceptance_bound" if bound else "acceptance"
    return f"{name} {found.value:.1%} ± {found.standard_error:.1%}"


def _named(item: str) -> tuple[str, str]:
    """Return name and address of `name=url`, or of a plain address, which is its own name."""
    name, equals, url = item.partition("=")
    if equals and name and url and "/" not in name and ":" not in name:
        return name, url
    return item, item


if __name__ == "__main__":
    sys.exit(run_command(main))
