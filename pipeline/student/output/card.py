"""The model card of a student: what it is, how it was made, how good it measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.amounts import error_decimals
from pipeline.cache.layout.manifest import Manifest
from pipeline.evaluate.comparison import Difference, ModelScores, markdown_tables
from pipeline.evaluate.measures import HeldoutScores
from pipeline.student.compatibility import heldout_inclusion_rule

__all__ = ["CardFacts", "card_with_tasks", "student_card"]

_BEGIN, _END = "<!-- lm-eval: written by eval-student -->", "<!-- end of lm-eval -->"

_NOT_MEASURED = """
## Held-out measures

Not measured: the run had `train.evaluate: never`.
"""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says of every student of a run, finished or not."""

    name: str
    """Of the run."""
    base: str
    """What the student started from."""
    keep_layers: tuple[int, ...] | None
    """Of a pruned student."""
    manifest: Manifest
    """The cache's."""
    cache_url: str
    resolved_config: str
    """YAML of the run."""
    steps: int
    """Of the whole run."""
    command: str
    """That made it."""
    hub_location: str | None = None
    """Named in the commands to copy instead of a folder."""
    weights_dtype: str = "as_trained"
    """Setting of the export."""
    vocabulary: str = ""
    """One sentence on how the student's tokens relate to the teacher's, or nothing."""


def student_card(
    facts: CardFacts,
    *,
    before: HeldoutScores | None = None,
    after: HeldoutScores | None = None,
    tokens: int = 0,
    skipped_rows: int = 0,
    unfinished_step: int | None = None,
) -> str:
    """Render README.md of the exported student.

    Args:
        facts: of the run.
        before: held-out scores without training.
        after: those of the student; None where it was not measured, as in every checkpoint.
        tokens: of the whole run.
        skipped_rows: of damaged shards, repeats counted.
        unfinished_step: the step of a checkpoint; None for the finished student.
    """
    manifest, base, keep_layers = facts.manifest, facts.base, facts.keep_layers
    teacher, corpus = manifest.identity["teacher"], manifest.identity["corpus"]
    front = ["tags:", "- knowledge-distillation", "library_name: transformers"]
    front.append("pipeline_tag: text-generation")
    if "/" in base and not base.startswith((".", "/", "~")):
        front.insert(0, f"base_model: {base}")
    pruned = f", pruned to its layers {list(keep_layers)}" if keep_layers else ""
    place = facts.hub_location or "FOLDER"
    table = {
        "teacher": f"`{teacher['model']}`, revision `{teacher['revision']}`",
        "cache": f"`{facts.cache_url}`, identity `{manifest.identity_digest}`",
        "temperatures in the cache": ", ".join(f"{t:g}" for t in manifest.temperatures),
        "corpus": f"`{corpus.get('source')}`",
        "longest sequence": f"{corpus['max_length']} tokens",
    }
    if facts.weights_dtype != "as_trained":
        table["weights"] = f"cast to {facts.weights_dtype}"
        if after is not None:
            table["weights"] += "; the measures below are those before the cast"
    if facts.vocabulary:
        table["vocabulary"] = facts.vocabulary
    rows = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    trained = f"trained for {facts.steps} steps\n({tokens} tokens) on cached teacher distributions."
    if skipped_rows:
        trained += f" {skipped_rows} rows of damaged shards were skipped (repeats counted)."
    if unfinished_step is not None:
        trained = (
            f"**in training**: step {unfinished_step} of {facts.steps}\n"
            "on cached teacher distributions; not measured."
        )
    heldout = ""
    if after is not None:
        sampled = heldout_inclusion_rule(manifest) is not None
        heldout = _heldout(before, after, sampled=sampled)
    elif unfinished_step is None:
        heldout = _NOT_MEASURED
    return f"""---
{chr(10).join(front)}
---

# {facts.name}

A student of `{teacher["model"]}`, started from `{base}`{pruned}, {trained}

| | |
|---|---|
{rows}
{heldout}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

```
lm-eval run --model hf --model_args pretrained={place} --tasks hellaswag,arc_easy
```

The licences of the base model and of the teacher apply to what was learned from them.

## Made by

```
{facts.command}
```

```yaml
{facts.resolved_config.strip()}
```
"""


def card_with_tasks(
    card: str,
    models: Sequence[ModelScores],
    gaps: Sequence[Difference],
    versions: Mapping[str, str],
) -> str:
    """Return the card with a table of the harness's tasks, in place of an older one.

    Args:
        card: as `student_card` renders it.
        models: side by side, the student first.
        gaps: its differences from the others.
        versions: of what measured, by name.
    """
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    table = markdown_tables(models, gaps)
    section = f"{_BEGIN}\n## Tasks\n\nMeasured with {named}.\n\n{table}\n{_END}\n"
    old = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END) + r"\n", re.DOTALL)
    if old.search(card):
        return old.sub(lambda _: section, card, count=1)
    head, use, tail = card.partition("\n## Use\n")
    return f"{head}\n{section}{use}{tail}" if use else f"{card}\n{section}"


def _heldout(before: HeldoutScores | None, after: HeldoutScores, *, sampled: bool) -> str:
    distance = after.distance
    lines = [_score_line("before training", before, distance)] if before else []
    lines.append(_score_line("after training", after, distance))
    columns = {
        "kl": "KL to the teacher (nats)",
        "uld": "ULD to the teacher",
        "cross_entropy": "cross-entropy (nats)",
    }
    heads = [columns[distance], columns["cross_entropy"], "perplexity"]
    meaning = (
        "The KL is bucketed: over the cached entries and\none tail bucket, a lower bound of the KL "
        "over the whole vocabulary."
    )
    if sampled:
        meaning = (
            "The KL is an unbiased estimate\nof the one over the whole vocabulary, from sampled "
            "entries."
        )
    if distance == "uld":
        meaning = (
            "ULD is the L1 distance of the sorted probabilities, between 0 and\n2, at the "
            "positions where both tokenizers begin a token; cross-entropy is per student token."
        )
    if "top1_agreement" in after.sums:
        heads.append("top-1 agreement")
    if "acceptance" in after.sums:
        heads.append("acceptance rate" if sampled else "acceptance rate (bound)")
        meaning += (
            "\nAcceptance is the rate at which the teacher would accept the student's tokens in "
            "speculative\ndecoding, the sum of min(p, q)"
        )
        meaning += ", unbiased." if sampled else " over the cached entries alone, a lower bound."
    table = "\n".join(lines)
    return f"""
## Held-out measures

On {len(after.loss_tokens)} sequences ({sum(after.loss_tokens)} supervised tokens) of the cache that
were never trained on; standard errors over sequences. {meaning}

| | {" | ".join(heads)} |
|{"---|" * (len(heads) + 1)}
{table}
"""


def _score_line(name: str, scores: HeldoutScores, distance: str) -> str:
    cells = []
    for measure in (scores.mean(distance), scores.mean("cross_entropy"), scores.perplexity()):
        cells.append(_with_error(measure.value, measure.standard_error, 3))
    for share in ("top1_agreement", "acceptance"):
        if share in scores.sums:
            mean = scores.mean(share)
            shown = _with_error(100 * mean.value, 100 * mean.standard_error, 1)
            cells.append(shown.replace(" ±", " % ±"))
    return f"| {name} | " + " | ".join(cells) + " |"


def _with_error(value: float, error: float, decimals: int) -> str:
    """Return a value and its error with so many decimals, or as many as the error is known to."""
    if math.isfinite(error) and error > 0:
        decimals = max(decimals, error_decimals(error))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
