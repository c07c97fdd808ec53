"""The dataset card of a cache: what it is, how it was computed, how to read it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.amounts import BYTES_PER_TOKEN, bytes_per_token, format_kept_mass
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import SPLITS

__all__ = [
    "FRONT",
    "LICENCE_KEYS",
    "LICENCE_SECTION",
    "CarriedLicence",
    "card_text",
    "carried_licence",
    "front_matter",
    "responses_text",
    "scheme_text",
]

FRONT = re.compile(r"---\n(.*?)\n---\n+", re.DOTALL)
"""What stands above a card, with its YAML as the first group."""
LICENCE_SECTION = re.compile(r"## Licence and terms\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True)
class CarriedLicence:
    """What a card states of its licence, as it stands there."""

    front: Mapping[str, str] = field(default_factory=dict)
    """The keys of its front matter; empty where none is stated."""
    section: str = ""
    """Its section `Licence and terms`; empty where there is none."""


def carried_licence(card: bytes | None) -> CarriedLicence:
    """Return the licence that a cache's card states; nothing of it is guessed.

    Args:
        card: README.md of the cache; None where it has none.
    """
    text = (card or b"").decode("utf-8", "replace")
    found = FRONT.match(text)
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        front = {}
    stated = front if isinstance(front, dict) else {}
    keys = {key: str(stated[key]) for key in LICENCE_KEYS if stated.get(key)}
    section = LICENCE_SECTION.search(text)
    return CarriedLicence(keys, section[0].rstrip("\n") if section else "")


def front_matter(manifest: Manifest, licence: Mapping[str, str] | None = None) -> str:
    """Return what stands above a card: where `datasets.load_dataset` finds the splits, and tags.

    Args:
        manifest: of the cache.
        licence: the keys that state one; None: none is stated.
    """
    stated = yaml.safe_dump(dict(licence), sort_keys=False) if licence else ""
    files = "\n".join(
        f"  - split: {name}\n    path: data/{name}/*.parquet" for name in _splits(manifest)
    )
    return f"""---
configs:
- config_name: default
  data_files:
{files}
{stated}tags:
- knowledge-distillation
- teacher-logits
---
"""


def _splits(manifest: Manifest) -> list[str]:
    return [name for name in SPLITS if manifest.of_split(name)]


def card_text(manifest: Manifest, command: str) -> str:
    """Render README.md; its front matter lets `datasets.load_dataset` find the splits."""
    identity = manifest.identity
    teacher, scheme, corpus = identity["teacher"], identity["scheme"], identity["corpus"]
    table = "\n".join(_split_line(manifest, name) for name in _splits(manifest))
    temperatures = ", ".join(f"{value:g}" for value in manifest.temperatures)
    own = responses_text(identity, manifest.corpus_counts)
    responses = f"| responses | {own} |\n" if own else ""
    return f"""{front_matter(manifest)}
# Teacher cache: {teacher["model"]}

Sparse next-token distributions of a teacher over a tokenised corpus, to train students from
without running the teacher again.

| | |
|---|---|
| teacher | `{teacher["model"]}` (revision `{teacher["revision"]}`, {teacher["dtype"]}) |
| engine | {teacher["engine"]} {teacher["engine_version"]} on {_device(teacher)} |
| corpus | `{corpus.get("source", corpus.get("dataset_name", "unknown"))}` |
{responses}| scheme | {scheme_text(scheme)} |
| temperatures with exact normaliser | {temperatures} |
| vocabulary | {manifest.codec["vocab_size"]} |
| identity (SHA-256) | `{manifest.identity_digest}` |

| split | shards | sequences | tokens | supervised tokens | {BYTES_PER_TOKEN} | kept mass |
|---|---|---|---|---|---|---|
{table}

{_imported_text(identity)}## Reading it

The files are ordinary Parquet with zstd: `datasets.load_dataset(folder)`, DuckDB, polars and
pyarrow read them directly. Columns: `sample_id`, `input_ids`, `loss_mask` (true where a token
is a label), and the teacher's distributions of those tokens as binary columns, which
`pipeline.cache` decodes ({_format(manifest)}):

```python
from pipeline.cache.io.reader import open_cache

cache = open_cache("FOLDER_OR_URL")
for row in cache.source("train").read_rows(0, range(3)):
    print(row.sample_id, row.targets.token_ids_E[:8], row.targets.logprobs_E[:8])
```

```sql
SELECT sum(num_loss_tokens) / sum(num_tokens) FROM 'data/train/*.parquet';
```

## Made by

```
{command}
```
"""


def _device(teacher: Mapping[str, Any]) -> str:
    """Name the device; of a server take back the promise of the same bytes."""
    device = str(teacher["device"])
    if teacher["engine"] != "openai":
        return device
    return f"{device}; its batches are not repeated, so neither need be the bytes"


def _imported_text(identity: Mapping[str, Any]) -> str:
    """Say what a cache made from another project's files does not know; else nothing."""
    imported = identity.get("imported")
    if imported is None:
        return ""
    unknown = "\n".join(f"- {item}" for item in imported["unknown"])
    return f"""## Imported

Made from files of another project (`{imported["format"]}`), so it serves students at temperature 1
alone. Its files did not tell:

{unknown}

"""


def _format(manifest: Manifest) -> str:
    version = manifest.format_version
    return f"format version {version}, `pipeline/cache/FORMAT.md`; `export` writes plain lists"


def scheme_text(scheme: Mapping[str, Any]) -> str:
    """Describe what is kept of a distribution."""
    parts = [scheme["name"]]
    if "top_k" in scheme:
        parts.append(f"{scheme['top_k']} entries a position")
    if "taus" in scheme:
        taus = ", ".join(f"{tau:.4g}" for tau in scheme["taus"])
        parts.append(f"the rest sampled with tau {taus}")
    else:
        parts.append("tail mass kept")
    if "heldout" in scheme:
        parts.append(f"held-out rows: {scheme_text(scheme['heldout'])}")
    return ", ".join(parts)


def responses_text(identity: Mapping[str, Any], counts: Mapping[str, int]) -> str | None:
    """Describe who wrote the responses, and how; None where they are the corpus's own.

    Args:
        identity: of the cache.
        counts: of the manifest; those of a derived or unfinished cache do not have all.
    """
    corpus = identity.get("corpus", {})
    if "generate" not in corpus:
        return None
    # A cache merged from several teachers' has lists of what differs.
    all_sampled = _listed(corpus["generate"])
    sampled = all_sampled[0]
    filters = [
        f"{label} {sampled[name]:g}"
        for name, label, off in (
            ("top_p", "top-p", 1), ("top_k", "top-k", 0), ("min_p", "min-p", 0),
        )
        if sampled[name] != off
    ]  # fmt: skip
    seed = sampled.get("seed", corpus.get("seed"))
    how = ", ".join([f"temperature {sampled['temperature']:g}", *filters, f"seed {seed}"])
    if len(all_sampled) > 1:
        how = f"{len(all_sampled)} sampling settings"
    limit = max(settings["max_new_tokens"] for settings in all_sampled)
    text = f"written by {_writers(all_sampled)} ({how})"
    if "responses" not in counts:  # a derived cache holds rows, not the text
        return f"{text}, at most {limit} tokens each"
    return (
        f"{text}: {counts['responses']} responses, {counts['loss_tokens']} tokens, "
        f"{counts['responses_unfinished']} cut off at {limit}; text in `_meta/responses`"
    )


def _writers(all_sampled: Sequence[Mapping[str, Any]]) -> str:
    """Return who wrote, in words; a derived cache may have several writers."""
    found = [settings.get("writer") for settings in all_sampled]
    names = dict.fromkeys(
        "the teacher itself" if writer is None else f"`{writer['model']}` ({writer['revision']})"
        for writer in found
    )
    return " and ".join(names)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _split_line(manifest: Manifest, split: str) -> str:
    total = manifest.total(split)
    means = "| — | — |"
    if total.loss_tokens:
        each = bytes_per_token(total.bytes, total.loss_tokens)
        means = f"| {each:.1f} | {format_kept_mass(total.kept_mass)} |"
    return (
        f"| {split} | {total.shards} | {total.rows} | {total.tokens} | {total.loss_tokens} {means}"
    )
