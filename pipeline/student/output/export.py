"""The finished student: a safetensors folder any tool loads, with its tokenizer and its card."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import StoreError

__all__ = ["WeightsDtype", "export_student", "is_exported"]

_log = logging.getLogger(__name__)

WeightsDtype = Literal["as_trained", "float32", "bfloat16", "float16"]


def export_student(
    model: Any,
    state: dict[str, Any],
    *,
    target: Path,
    init_folder: Path,
    tokenizer_files: Mapping[str, bytes],
    card: str,
    weights_dtype: WeightsDtype = "as_trained",
) -> None:
    """Write `target` as `save_pretrained` does, complete or not at all; rank 0 only.

    Args:
        model: the student; only its configuration and tying are used.
        state: full weights on the CPU.
        target: the folder to make; an older one is replaced.
        init_folder: the folder the student started from; its other files are kept.
        tokenizer_files: of the cache, by name.
        card: content of README.md.
        weights_dtype: of the floating-point weights in the file, and in config.json.

    Raises:
        StoreError: the disk is full or fails.
    """
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    use_cache = model.config.use_cache
    try:
        temporary.mkdir(parents=True)
        model.config.use_cache = True  # training switched it off; whoever generates wants it
        model.save_pretrained(temporary, state_dict=_cast(state, weights_dtype))
        if weights_dtype != "as_trained":
            _name_dtype(temporary / "config.json", weights_dtype)
        for name, data in tokenizer_files.items():
            (temporary / name).write_bytes(data)
        generation = init_folder / "generation_config.json"
        if generation.exists():
            shutil.copyfile(generation, temporary / generation.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise StoreError(
            f"{target}: the student cannot be written ({error.strerror})",
            do="free some space and run the same command again; training is not repeated",
        ) from error
    finally:
        model.config.use_cache = use_cache
        shutil.rmtree(temporary, ignore_errors=True)
    _log.info("student written to %s", target)


def _cast(state: dict[str, Any], dtype: WeightsDtype) -> dict[str, Any]:
    """Return the weights in another type; a tensor that is there twice is cast once."""
    import torch

    if dtype == "as_trained":
        return state
    wanted = getattr(torch, dtype)
    cast: dict[int, Any] = {}
    for value in state.values():
        if value.is_floating_point():
            cast.setdefault(id(value), value.to(wanted))
    return {name: cast.get(id(value), value) for name, value in state.items()}


def _name_dtype(config: Path, dtype: str) -> None:
    """`save_pretrained` names the type of the model, not of the weights that it is given."""
    data = json.loads(config.read_text(encoding="utf-8"))
    for part in (data, data.get("text_config")):
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = dtype
    config.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_exported(target: Path, run_digest: str) -> bool:
    """Whether `target` holds the finished student of this very run."""
    try:
        mark = json.loads((target.parent / "finished.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(mark.get("identity_digest") == run_digest and (target / "config.json").exists())
