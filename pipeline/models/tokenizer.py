"""Tokenizers: loading, the fingerprint of their content, and how two of them differ."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import fingerprint
from pipeline.errors import ModelError

__all__ = [
    "end_tokens",
    "load_tokenizer",
    "tokenizer_files",
    "tokenizer_from_files",
    "vocabulary_difference",
    "vocabulary_fingerprint",
]


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a model folder; never by code that the folder brings.

    Raises:
        ModelError: the folder holds none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        # Unless it is told no, transformers asks on a terminal whether to run the folder's code.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # Missing files, unknown classes and missing back ends: in each case the folder has no
        # usable tokenizer.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{folder}: no usable tokenizer ({reason})",
            expected="tokenizer.json beside the weights",
        ) from None


def end_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return every token that a model's files name as the end of generation, ascending.

    Engines disagree on where they look (generation config, model config, tokenizer); all of them
    get this list.
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        given = data.get("eos_token_id")
        found |= set(given) if isinstance(given, list) else {given}
    return tuple(sorted(int(token) for token in found if token is not None))


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Return SHA-256 over (token, id) of the whole vocabulary, added tokens included.

    By content, not name: two checkpoints of one family agree, a reordered vocabulary does not.
    """
    return fingerprint(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def vocabulary_difference(
    wanted: Mapping[str, int], found: Mapping[str, int], *, limit: int = 3
) -> str:
    """Describe how two vocabularies differ: counts, and the first examples of each kind."""
    missing = sorted((wanted.keys() - found.keys()), key=wanted.__getitem__)
    extra = sorted((found.keys() - wanted.keys()), key=found.__getitem__)
    moved = [token for token in wanted if token in found and wanted[token] != found[token]]
    parts = []
    for count, what, tokens in (
        (len(missing), "missing", missing),
        (len(extra), "more", extra),
        (len(moved), "under another id", moved),
    ):
        if count:
            examples = ", ".join(repr(token) for token in tokens[:limit])
            parts.append(f"{count} {what} (such as {examples})")
    return "; ".join(parts) or "nothing"


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files `save_pretrained` writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # Several chat templates are saved in a subfolder.
        found = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}
    if "tokenizer_config.json" in files:
        config = json.loads(files["tokenizer_config.json"])
        for name in ("name_or_path", "is_local", "local_files_only"):
            config.pop(name, None)  # where it was loaded from is not part of its content
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        files["tokenizer_config.json"] = text.encode()
    return files


def tokenizer_from_files(files: Mapping[str, bytes]) -> Any:
    """Load a tokenizer from the files in a cache."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            file = Path(folder) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return load_tokenizer(folder)
