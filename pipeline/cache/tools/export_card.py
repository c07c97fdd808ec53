"""The card of an export: what its columns are, and the lines of torch that train from them."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.layout.card import CarriedLicence, front_matter, scheme_text
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import SPLITS
from pipeline.sampling.quantisation import rounding_log_bias

__all__ = ["export_card", "rounding_left"]

_COLUMNS = """
| column | type | meaning |
|---|---|---|
| `sample_id` | text | names the sample, the same in every cache of its corpus |
| `input_ids` | [tokens] | token ids; `tokenizer/` made them |
| `loss_mask` | [tokens] | true where a token is supervised |
| `positions` | [supervised] | where those tokens are in `input_ids`; never 0 |
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
_REQUESTED = """\
| `target_requested` | [supervised][entries] | true: there only because it was asked for by its id |
"""
_INCLUSION = """\
| `target_inclusion` | [supervised][entries] | probability with which it was kept; 1: always |
"""
_SHIFT = """
## A row predicts the next token

Item n of every list of targets is the teacher's distribution of the token that stands at
`positions[n]`, given the tokens before it and nothing else:

    target[n] = p( . | input_ids[0], ..., input_ids[positions[n] - 1])

A causal model gives that distribution at its output **one place before**: compare target n with
`logits[positions[n] - 1]`. `label_logprob[n]` is log p of `input_ids[positions[n]]`. Nothing is to
be shifted a second time.

## What an entry counts
"""
_WEIGHED = """
The entries of a position are a **sample** of the vocabulary. One that was always kept
(`target_inclusion` 1) stands for itself. One that was kept with probability 1/9 stands for nine
tokens like it: its weight is

    exp(target_logprobs) / target_inclusion

(at another temperature as in `distillation_loss` below),
and any sum over the vocabulary that is linear in p, such as the gradient of KL(teacher, student),
is estimated without bias by the sum over the entries with these weights. Without the weights the
targets are wrong. Do not scale the weights of a position to sum to 1: their sum varies from
position to position, and a quotient of estimates is biased. The draws of a position are not
independent of each other, those of different positions are: take standard errors over rows.

The log-probs of sampled entries were rounded to steps of {step:g} nats. The bias of that at
temperature 1 is taken out; `ROUNDING` below is what is left of it at the others. The always-kept
log-probs are rounded too, without bias taken out: their mass can come out a little above 1, and
`tail_mass` is 0 there.
"""
_BUCKET = """
The entries are the largest of each position, known one by one: each counts exp(target_logprobs).
What lies outside of them is one outcome of known mass (`tail_mass`), the *tail bucket*. The loss
below is a lower bound of the KL over the whole vocabulary.
"""
_ASKED_FOR = """\
Entries of `target_requested` are not among the largest, and as exactly known as these.
"""
_TEMPERATURES = """
## Temperatures

Item g of `log_z` and `entropy` belongs to temperature T = {temperatures}, in this order. With p the
teacher's distribution at temperature 1,

    log_z[g]   = log sum_j p_j^(1/T), over the whole vocabulary (0 at T = 1)
    log p_T(j) = log p(j) / T - log_z[g]

so an entry's log-prob at T follows from its log-prob at 1, exactly normalised. Of a temperature
that is not listed the normaliser is not known.
{covered}Programs find the temperatures and `ROUNDING` as JSON in the metadata of each Parquet file,
under `distill_export`.
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


def export_card(
    manifest: Manifest,
    spec: CodecSpec,
    *,
    command: str,
    top_k: int | None,
    licence: CarriedLicence,
) -> str:
    """Render README.md of an export; its front matter lets `datasets.load_dataset` find the splits.

    Args:
        manifest: of the exported cache.
        spec: how its targets are stored.
        command: which made the export.
        top_k: the entries of each position that it was limited to.
        licence: what the cache's own card states.
    """
    teacher, corpus = manifest.identity["teacher"], manifest.identity["corpus"]
    splits = [name for name in SPLITS if manifest.of_split(name)]
    totals = "\n".join(
        f"| {name} | {total.rows} | {total.tokens} | {total.loss_tokens} |"
        for name, total in ((name, manifest.total(name)) for name in splits)
    )
    limit = f", limited to the {top_k} largest entries of each position" if top_k else ""
    loaded = "\n".join(f'{name} = load_dataset("FOLDER", split="{name}")' for name in splits)
    return f"""{front_matter(manifest, licence.front)}
# Targets of {teacher["model"]} as plain lists

Sparse next-token distributions of a teacher over a tokenised corpus, exported from a cache{limit}.

| | |
|---|---|
| teacher | `{teacher["model"]}` (revision `{teacher["revision"]}`, {teacher["dtype"]}) |
| engine | {teacher["engine"]} {teacher["engine_version"]} on {teacher["device"]} |
| corpus | `{corpus.get("source", corpus.get("dataset_name", "unknown"))}` |
| scheme | {scheme_text(manifest.identity["scheme"])} |
| temperatures | {_listed(manifest.temperatures)} |
| vocabulary | {spec.vocab_size} |
| licence | {_stated(licence)} |
| identity of the cache (SHA-256) | `{manifest.identity_digest}` |

| split | rows | tokens | supervised tokens |
|---|---|---|---|
{totals}

## Reading it

```
from datasets import load_dataset

{loaded}
```

`pyarrow`, `polars` and DuckDB read `data/*/*.parquet` as they are. The rows of `heldout` are not
for training: students are scored on them.

## Columns

Lists of targets have one item for each supervised token. All logarithms are natural.
{_columns(spec)}{_SHIFT}{_weights(spec)}{_temperatures(manifest, spec)}
## Training a student from it

Plain torch, one row at a time. A batch adds padding and nothing else, the cross-entropy on
`input_ids` at `positions` is added as usual.

```python
{_code(manifest, spec)}```

{licence.section + chr(10) * 2 if licence.section else ""}## Made by

```
{command}
```
"""


_NO_LICENCE = (
    "not stated in the cache; the terms of the teacher and of the corpus bind all the same"
)


def _stated(licence: CarriedLicence) -> str:
    name = licence.front.get("license_name")
    return licence.front.get("license", _NO_LICENCE) + (f" ({name})" if name else "")


def _columns(spec: CodecSpec) -> str:
    always = "kept" if spec.rule is None else "always-kept"
    columns = _COLUMNS.format(always=always).rstrip("\n") + "\n"
    columns += _WRITTEN if spec.written_logprobs else ""
    columns += _INCLUSION if spec.rule is not None else ""
    return columns + (_REQUESTED if spec.requested_entries else "")


def _weights(spec: CodecSpec) -> str:
    if spec.rule is None:
        return _BUCKET + (_ASKED_FOR if spec.requested_entries else "")
    return _WEIGHED.format(step=spec.quantisation.sampled_step)


def _temperatures(manifest: Manifest, spec: CodecSpec) -> str:
    covered = ""
    if spec.rule is not None:
        covered = (
            f"The sample was drawn for T = {_listed(spec.rule.covered)}; above "
            f"{spec.rule.highest:g} the estimates are unbiased and almost only noise.\n"
        )
    return _TEMPERATURES.format(temperatures=_listed(manifest.temperatures), covered=covered)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def rounding_left(spec: CodecSpec, temperatures: Sequence[float]) -> list[float]:
    """Return the log of the bias by which exp(log p / T) of a sampled entry is still too large.

    For each temperature, of the exported log-probs, from which that at temperature 1 is taken out.
    """
    step = spec.quantisation.sampled_step if spec.rule is not None else 0.0
    if not step:
        return [0.0] * len(temperatures)
    at_one = rounding_log_bias(step, 1.0)
    return [round(rounding_log_bias(step, t) - at_one / t, 9) + 0.0 for t in temperatures]


def _code(manifest: Manifest, spec: CodecSpec) -> str:
    temperatures = [float(value) for value in manifest.temperatures]
    begin = _BEGIN.format(temperatures=temperatures)
    if spec.rule is None:
        return begin + _GATHER + _TOP_K_LOSS + _LOOP
    left = rounding_left(spec, temperatures)
    begin += f"ROUNDING = {left}  # what is left of the bias of rounded log-probs\n"
    return begin + _GATHER + _SAMPLED_LOSS + _LOOP
