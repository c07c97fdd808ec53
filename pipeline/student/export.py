"""The finished student: a safetensors folder any tool loads, its card, and the push to the hub."""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError

__all__ = ["export_student", "push_to_hub"]

_log = logging.getLogger(__name__)
_PUSH_ATTEMPTS = 3


def export_student(
    model: Any,
    state: dict[str, Any],
    *,
    target: Path,
    init_folder: Path,
    tokenizer_files: Mapping[str, bytes],
    card: str,
) -> None:
    """Write `target` as `save_pretrained` does, whole or not at all; rank 0 only.

    Args:
        model: the student; only its configuration and tying are used.
        state: full weights on the CPU.
        target: the folder to make; an older one is replaced.
        init_folder: the folder the student started from; its other files are kept.
        tokenizer_files: of the cache, by name.
        card: content of README.md.

    Raises:
        StoreError: the disk is full or fails.
    """
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    use_cache = model.config.use_cache
    try:
        temporary.mkdir(parents=True)
        model.config.use_cache = True  # training switched it off; whoever generates wants it
        model.save_pretrained(temporary, state_dict=state)
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


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a student folder and return its address.

    Raises:
        StoreError: after three attempts; the local copy stays, and the push can be repeated.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    for attempt in range(1, _PUSH_ATTEMPTS + 1):
        try:
            api.create_repo(repository, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repository)
        except Exception as error:
            # One of a dozen kinds of the hub's client; all mean "not there yet".
            if attempt == _PUSH_ATTEMPTS:
                reason = str(error).strip().splitlines()[0] or type(error).__name__
                raise StoreError(
                    f"{repository}: the student cannot be pushed ({reason})",
                    expected="HF_TOKEN with the right to write there",
                    do=f"the student is safe in {folder}; repeat with `make push-student "
                    f'ARGS="--output_dir {folder.parent} --hub_location {repository}"`',
                ) from None
            time.sleep(2**attempt)
        else:
            break
    return f"{api.endpoint}/{repository}"


def is_exported(target: Path, run_digest: str) -> bool:
    """Whether `target` holds the finished student of this very run."""
    try:
        mark = json.loads((target.parent / "finished.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(mark.get("identity_digest") == run_digest and (target / "config.json").exists())
