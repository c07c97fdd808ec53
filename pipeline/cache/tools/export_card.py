"""The card of an export: what its columns are, and the lines of torch that train from them."""

from __future__ import annotations

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.layout.card import front_matter
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import SPLITS
from pipeline.sampling.quantisation import rounding_log_bias

__all__ = ["export_card"]

_COLUMNS = """
| column | type | meaning |
|---|---|---|
| `sample_id` | text | names the sample, the same in every cache of its corpus |
| `input_ids` | [tokens] | token ids; `tokenizer/` made them |
| `loss_mask` | [tokens] | true where a token is supervised |
| `positions` | [supervised] | where those tokens are; the logits one place before predict them |
| `target_ids` | [supervised][entries] | the kept tokens of the teacher's distribution |
| `target_logprobs` | [supervised][entries] | log p at temperature 1, over the vocabulary |
| `tail_mass` | [supervised] | mass at temperature 1 outside the {always} entries |
| `log_z` | [supervised][temperatures] | log sum of p^(1/T): log p_T is log p / T - log_z |
| `entropy` | [supervised][temperatures] | the teacher's entropy over the vocabulary at T, in nats |
| `label_logprob` | [supervised] | log p, at temperature 1, of the token in the text |
"""
_WRITTEN = """\
| `written_logprob` | [supervised] | log p of that token, at temperature 1, by its writer |
"""
_INCLUSION = """\
| `target_inclusion` | [supervised][entries] | probability with which it was kept; 1: always |

The entries are a **sample**: use each with the weight p / `target_inclusion`, and sums over them
are unbiased. Without the weights the targets are wrong. The log-probs of sampled entries were
rounded to steps of {step:g} nats; the bias of that at temperature 1 is taken out, and `ROUNDING` is
what is left of it at the others. The loss below is unbiased; `pipeline.loss` has less variance,
because it takes the student's own tail as a control variate.
"""
_BUCKET = """
The entries are the largest of each position; what lies outside of them is one outcome of known
mass, the *tail bucket*. The loss below is a lower bound of the KL over the whole vocabulary.
"""

_BEGIN = """\
from itertools import chain

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM

EXPORT, STUDENT = "PATH_OF_THIS_FOLDER", "YOUR_STUDENT"  # of the same tokenizer
TEMPERATURES = {temperatures}  # of `log_z` and `entropy`
"""
_GATHER = """

def distillation_loss(logits, row, temperature=1.0):
    at = TEMPERATURES.index(temperature)
    places_N = torch.tensor(row["positions"]).long() - 1
    log_q_NV = torch.log_softmax(logits[places_N] / temperature, dim=-1)
    owner_E = torch.tensor([n for n, ids in enumerate(row["target_ids"]) for _ in ids]).long()
    log_q_E = log_q_NV[owner_E, torch.tensor([*chain(*row["target_ids"])]).long()]
    log_z_E = log_q_E.new_tensor(row["log_z"])[owner_E, at]
    log_p_E = log_q_E.new_tensor([*chain(*row["target_logprobs"])]) / temperature - log_z_E
"""
_TOP_K_LOSS = """\
    zero_N = log_q_NV.new_zeros(len(log_q_NV))
    p_kept_N, q_kept_N = (zero_N.index_add(0, owner_E, x.exp()) for x in (log_p_E, log_q_E))
    p_E = log_p_E.exp() / p_kept_N.clamp(min=1)[owner_E]  # rounded, they may sum to more than 1
    p_tail_N, q_tail_N = (1 - p_kept_N).clamp(min=0), (1 - q_kept_N).clamp(min=1e-12)
    tail_N = torch.xlogy(p_tail_N, p_tail_N) - p_tail_N * q_tail_N.log()
    return temperature**2 * ((torch.xlogy(p_E, p_E) - p_E * log_q_E).sum() + tail_N.sum())
"""
_SAMPLED_LOSS = """\
    inclusion_E = log_q_E.new_tensor([*chain(*row["target_inclusion"])])
    log_p_E = log_p_E - ROUNDING[at] * (inclusion_E < 1)
    weight_E = log_p_E.exp() / inclusion_E  # what was kept with probability 1/9 stands for nine
    return temperature**2 * (weight_E * (log_p_E - log_q_E)).sum()
"""
_LOOP = """

student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32")
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
for row in load_dataset(EXPORT, split="train"):
    if row["positions"]:
        logits = student(torch.tensor([row["input_ids"]])).logits[0]
        (distillation_loss(logits, row) / len(row["positions"])).backward()
        optimizer.step()
        optimizer.zero_grad()
"""


def export_card(manifest: Manifest, spec: CodecSpec, *, command: str, top_k: int | None) -> str:
    """Render README.md of an export; its front matter lets `datasets.load_dataset` find the splits.

    Args:
        manifest: of the exported cache.
        spec: how its targets are stored.
        command: which made the export.
        top_k: the entries of each position that it was limited to.
    """
    teacher, corpus = manifest.identity["teacher"], manifest.identity["corpus"]
    splits = [name for name in SPLITS if manifest.of_split(name)]
    totals = "\n".join(
        f"| {name} | {total.rows} | {total.tokens} | {total.loss_tokens} |"
        for name, total in ((name, manifest.total(name)) for name in splits)
    )
    sampled = spec.rule is not None
    columns = _COLUMNS.format(always="always-kept" if sampled else "kept").rstrip("\n") + "\n"
    columns += _WRITTEN if spec.written_logprobs else ""
    columns += _INCLUSION.format(step=spec.quantisation.sampled_step) if sampled else _BUCKET
    limit = f", limited to the {top_k} largest entries of each position" if top_k else ""
    return f"""{front_matter(manifest)}
# Targets of {teacher["model"]} as plain lists

Sparse next-token distributions of a teacher over a tokenised corpus, exported from a cache
(identity `{manifest.identity_digest[:12]}`){limit}.

| | |
|---|---|
| teacher | `{teacher["model"]}` (revision `{teacher["revision"]}`, {teacher["dtype"]}) |
| corpus | `{corpus.get("source", corpus.get("dataset_name", "unknown"))}` |
| scheme | {manifest.identity["scheme"]["name"]} |
| temperatures | {", ".join(f"{value:g}" for value in manifest.temperatures)} |
| vocabulary | {spec.vocab_size} |

| split | rows | tokens | supervised tokens |
|---|---|---|---|
{totals}

## Columns

`datasets.load_dataset(FOLDER)` reads them, and so does whatever reads Parquet. Lists of targets
have one item for each supervised token.
{columns}
## Training a student from it

Plain torch, one row at a time. A batch adds padding and nothing else, the cross-entropy on
`input_ids` at `positions` is added as usual.

```python
{_code(manifest, spec)}```

## Made by

```
{command}
```
"""


def _code(manifest: Manifest, spec: CodecSpec) -> str:
    temperatures = [float(value) for value in manifest.temperatures]
    begin = _BEGIN.format(temperatures=temperatures)
    if spec.rule is None:
        return begin + _GATHER + _TOP_K_LOSS + _LOOP
    step = spec.quantisation.sampled_step
    rest = [0.0] * len(temperatures)
    if step:
        at_one = rounding_log_bias(step, 1.0)
        rest = [round(rounding_log_bias(step, t) - at_one / t, 9) + 0.0 for t in temperatures]
    begin += f"ROUNDING = {rest}  # what is left of the bias of rounded log-probs\n"
    return begin + _GATHER + _SAMPLED_LOSS + _LOOP
