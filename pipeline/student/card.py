"""The model card of a student: what it is, how it was made, how good it measured."""

from __future__ import annotations

from pipeline.cache.manifest import Manifest
from pipeline.evaluate.measures import HeldoutScores

__all__ = ["student_card"]


def student_card(
    *,
    name: str,
    base: str,
    layers_kept: tuple[int, ...] | None,
    manifest: Manifest,
    cache_url: str,
    resolved_config: str,
    before: HeldoutScores | None,
    after: HeldoutScores,
    steps: int,
    tokens: int,
    command: str,
    rows_left_out: int = 0,
) -> str:
    """Render README.md of the exported student."""
    teacher = manifest.identity["teacher"]
    front = ["tags:", "- knowledge-distillation", "library_name: transformers"]
    if "/" in base and not base.startswith((".", "/", "~")):
        front.insert(0, f"base_model: {base}")
    cut = f", cut to its layers {list(layers_kept)}" if layers_kept else ""
    lines = [_score_line("before training", before)] if before else []
    lines.append(_score_line("after training", after))
    table = "\n".join(lines)
    without = (
        f" It did without {rows_left_out} rows (repeats counted) of damaged shards."
        if rows_left_out
        else ""
    )
    return f"""---
{chr(10).join(front)}
---

# {name}

A student of `{teacher["model"]}`, started from `{base}`{cut}, trained for {steps} steps
({tokens} tokens) on cached teacher distributions.{without}

| | |
|---|---|
| teacher | `{teacher["model"]}`, revision `{teacher["revision"]}` |
| cache | `{cache_url}`, identity `{manifest.identity_digest}` |
| corpus | `{manifest.identity["corpus"].get("source")}` |

## Held-out measures

On {len(after.counted)} sequences ({sum(after.counted)} counted tokens) of the cache that were never
trained on; standard errors over sequences. The KL is that of the cached entries with the rest as
one outcome, a lower bound of the full one.

| | KL to the teacher (nats) | cross-entropy (nats) | perplexity | top-1 agreement |
|---|---|---|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

```
lm-eval run --model hf --model_args pretrained=FOLDER --tasks hellaswag,arc_easy
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


def _score_line(name: str, scores: HeldoutScores) -> str:
    cells = []
    for measure in (scores.mean("kl"), scores.mean("cross_entropy"), scores.perplexity()):
        cells.append(f"{measure.value:.3f} ± {measure.standard_error:.3f}")
    agreement = scores.mean("top1_agreement")
    cells.append(f"{100 * agreement.value:.1f} % ± {100 * agreement.standard_error:.1f}")
    return f"| {name} | " + " | ".join(cells) + " |"
