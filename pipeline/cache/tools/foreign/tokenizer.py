"""The tokenizer that made a file's ids: its files, and what identifies its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import fingerprint
from pipeline.storage import Store

__all__ = ["ForeignTokenizer", "read_tokenizer"]

_FILES = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ForeignTokenizer:
    """A tokenizer's files, and the teacher's vocabulary."""

    files: Mapping[str, bytes]
    vocabulary_sha256: str
    """As stage one computes it: over (token, id), added tokens included."""
    size: int
    vocab_size: int | None
    """Rows of the teacher's head, where a config.json stands beside it."""


def read_tokenizer(url: str) -> ForeignTokenizer:
    """Read a model's folder, at a path or an address such as `hf://owner/name`.

    Raises:
        ValueError: there is none that can be read.
        StoreError: the store fails.
    """
    store = Store(url)
    names = set(store.list(""))
    if "tokenizer.json" not in names:
        raise ValueError(f"found no tokenizer.json in {url}, expected a model's folder or address")
    files = {name: store.read(name) for name in _FILES if name in names}
    try:
        vocabulary = _vocabulary(json.loads(files["tokenizer.json"]))
        config = json.loads(store.read("config.json")) if "config.json" in names else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{url}: its tokenizer.json or config.json is damaged ({error})") from None
    digest = fingerprint(sorted(vocabulary.items(), key=lambda item: item[1]))
    return ForeignTokenizer(files, digest, len(vocabulary), _rows_of_head(config))


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    known = data["model"]["vocab"]
    if isinstance(known, list):  # unigram: pairs of token and score
        known = {token: place for place, (token, _) in enumerate(known)}
    added = {item["content"]: int(item["id"]) for item in data.get("added_tokens", ())}
    return {**known, **added}


def _rows_of_head(config: Mapping[str, Any]) -> int | None:
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    return None
