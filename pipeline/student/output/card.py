"""The model card of a student: what it is, how it was made, how good it measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pipeline.cache.layout.manifest import Manifest
from pipeline.evaluate.harness import TaskScore
from pipeline.evaluate.measures import HeldoutScores

__all__ = ["card_with_tasks", "student_card"]

_BEGIN, _END = "<!-- lm-eval: written by eval-student -->", "<!-- end of lm-eval -->"


def student_card(
    *,
    name: str,
    base: str,
    layers_kept: tuple[int, ...] | None,
    manifest: Manifest,
    cache_url: str,
    resolved_config: str,
    before: HeldoutScores | None,
    after: HeldoutScores | None,
    steps: int,
    tokens: int,
    command: str,
    hub_location: str | None = None,
    weights_dtype: str = "as_trained",
    vocabulary: str = "",
    unfinished_step: int | None = None,
    rows_left_out: int = 0,
) -> str:
    """Render README.md of the exported student.

    Args:
        name: of the run.
        base: what the student started from.
        layers_kept: of a cut.
        manifest: the cache's.
        cache_url: where it lay.
        resolved_config: YAML of the run.
        before: held-out scores without training.
        after: those of the student; None in a checkpoint, which has not been measured.
        steps: of the whole run.
        tokens: of the whole run.
        command: that made it.
        hub_location: named in the commands to copy instead of a folder.
        weights_dtype: setting of the export.
        vocabulary: one sentence on how the student's tokens stand to the teacher's, or nothing.
        unfinished_step: the step of a checkpoint; None for the finished student.
        rows_left_out: of damaged shards, repeats counted.
    """
    teacher, corpus = manifest.identity["teacher"], manifest.identity["corpus"]
    front = ["tags:", "- knowledge-distillation", "library_name: transformers"]
    front.append("pipeline_tag: text-generation")
    if "/" in base and not base.startswith((".", "/", "~")):
        front.insert(0, f"base_model: {base}")
    cut = f", cut to its layers {list(layers_kept)}" if layers_kept else ""
    place = hub_location or "FOLDER"
    facts = {
        "teacher": f"`{teacher['model']}`, revision `{teacher['revision']}`",
        "cache": f"`{cache_url}`, identity `{manifest.identity_digest}`",
        "temperatures in the cache": ", ".join(f"{t:g}" for t in manifest.temperatures),
        "corpus": f"`{corpus.get('source')}`",
        "longest sequence": f"{corpus['max_length']} tokens",
    }
    if weights_dtype != "as_trained":
        facts["weights"] = f"cast to {weights_dtype}; the measures below are those before the cast"
    if vocabulary:
        facts["vocabulary"] = vocabulary
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    trained = f"trained for {steps} steps\n({tokens} tokens) on cached teacher distributions."
    if rows_left_out:
        trained += f" It did without {rows_left_out} rows (repeats counted) of damaged shards."
    if unfinished_step is not None:
        trained = (
            f"**in training**: step {unfinished_step} of {steps}\n"
            "on cached teacher distributions; not measured."
        )
    return f"""---
{chr(10).join(front)}
---

# {name}

A student of `{teacher["model"]}`, started from `{base}`{cut}, {trained}

| | |
|---|---|
{rows}
{_heldout(before, after)}
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
{command}
```

```yaml
{resolved_config.strip()}
```
"""


def card_with_tasks(card: str, scores: Sequence[TaskScore], versions: Mapping[str, str]) -> str:
    """Return the card with a table of the harness's tasks, in place of an older one.

    Args:
        card: as `student_card` renders it.
        scores: in the order in which they are shown.
        versions: of what measured, by name.
    """
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = ["| task | version | examples | shots | metric | value |", "|---|---|---|---|---|---|"]
    for score in scores:
        error = "" if score.standard_error is None else f" ± {score.standard_error:.4f}"
        filtered = "" if score.filter in ("", "none") else f", {score.filter}"
        lines.append(
            f"| {score.task} | {score.version} | {score.examples} | {score.num_fewshot} "
            f"| {score.metric}{filtered} | {score.value:.4f}{error} |"
        )
    table = "\n".join(lines)
    section = f"{_BEGIN}\n## Tasks\n\nMeasured with {named}.\n\n{table}\n{_END}\n"
    old = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END) + r"\n", re.DOTALL)
    if old.search(card):
        return old.sub(lambda _: section, card, count=1)
    head, use, tail = card.partition("\n## Use\n")
    return f"{head}\n{section}{use}{tail}" if use else f"{card}\n{section}"


def _heldout(before: HeldoutScores | None, after: HeldoutScores | None) -> str:
    if after is None:
        return ""
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
        "The KL is that of the cached entries with the rest as\none outcome, a lower bound of the "
        "full one."
    )
    if distance == "uld":
        meaning = (
            "ULD is the L1 distance of the sorted probabilities, between 0 and\n2, at the "
            "positions where both tokenizers begin a token; cross-entropy is per student token."
        )
    if "top1_agreement" in after.sums:
        heads.append("top-1 agreement")
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
        cells.append(f"{measure.value:.3f} ± {measure.standard_error:.3f}")
    if "top1_agreement" in scores.sums:
        agreement = scores.mean("top1_agreement")
        cells.append(f"{100 * agreement.value:.1f} % ± {100 * agreement.standard_error:.1f}")
    return f"| {name} | " + " | ".join(cells) + " |"
