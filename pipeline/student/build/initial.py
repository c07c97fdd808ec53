"""The student before training: resolved, pruned, reconstructed; a folder that every rank loads."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.io.reader import Cache
from pipeline.data.source import RowSource
from pipeline.models.device import uses_gpu
from pipeline.models.load import load_causal_lm
from pipeline.models.resolved import ResolvedModel
from pipeline.student.build.prune import prune_model
from pipeline.student.build.reconstruct import reconstruct_student
from pipeline.student.settings.student import StudentSettings

__all__ = ["initial_identity", "make_initial_student"]

_log = logging.getLogger(__name__)
_MARK = "made_from.json"


def initial_identity(settings: StudentSettings, source: ResolvedModel) -> dict[str, Any]:
    """Return what decides the initial weights."""
    data: dict[str, Any] = {
        "model": source.name,
        "revision": source.revision,
        "keep_layers": list(settings.keep_layers) if settings.keep_layers else None,
        "reconstruct": settings.reconstruct,
    }
    if settings.reconstruct != "none":
        data["reconstruct_tokens"] = settings.reconstruct_tokens
    return data


def make_initial_student(
    settings: StudentSettings,
    source: ResolvedModel,
    cache: Cache,
    *,
    rows: RowSource,
    output_dir: Path,
) -> Path:
    """Return the folder of the initial weights; made once, at `output_dir/init` if pruned.

    Call on one rank first; the others then find it. A folder that is there is complete, because it
    is renamed into place; it is kept when its mark says that it was made from the same model,
    layers and cache, and made again otherwise.
    """
    if settings.keep_layers is None:
        return source.path
    target = output_dir / "init"
    wanted = initial_identity(settings, source)
    if settings.reconstruct != "none":
        wanted["cache"] = cache.manifest.identity_digest
        wanted["corpus"] = cache.manifest.corpus_content
    content = json.dumps(wanted, indent=1)
    mark = target / _MARK
    if mark.exists() and mark.read_text(encoding="utf-8") == content:
        return target
    temporary = output_dir / f"init.{uuid.uuid4().hex}.partial"
    pruned = output_dir / f"pruned.{uuid.uuid4().hex}.partial"
    try:
        prune_model(source.path, settings.keep_layers, pruned)
        if settings.reconstruct == "none":
            pruned.rename(temporary)
        else:
            _reconstruct(pruned, source, settings, rows, temporary)
        (temporary / _MARK).write_text(content, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError:
        if not mark.exists():  # else another node's process made the same meanwhile
            raise
    finally:
        shutil.rmtree(pruned, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _reconstruct(
    pruned: Path, source: ResolvedModel, settings: StudentSettings, rows: RowSource, target: Path
) -> None:

    assert settings.keep_layers is not None
    device = "cuda" if uses_gpu() else "cpu"

    def load(folder: Path) -> Any:
        model = load_causal_lm(
            folder, dtype="float32", trust_remote_code=settings.trust_remote_code
        )
        return model.to(device).eval()

    sequences = _calibration_sequences(rows, settings.reconstruct_tokens)
    _log.info(
        "reconstructing the pruned layers on %d tokens of the cache", sum(s.size for s in sequences)
    )
    student, original = load(pruned), load(source.path)
    reconstruct_student(student, original, settings.keep_layers, sequences)
    student.cpu().save_pretrained(target)
    for file in sorted(pruned.iterdir()):
        if not (target / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)


def _calibration_sequences(source: RowSource, wanted_tokens: int) -> list[NDArray[np.int32]]:
    """Take rows from the front of the training shards until there are enough tokens."""
    chosen: list[NDArray[np.int32]] = []
    tokens = 0
    for shard, rows in enumerate(source.shard_rows()):
        for row in source.read_rows(shard, range(rows)):
            chosen.append(row.input_ids_L)
            tokens += int(row.input_ids_L.size)
            if tokens >= wanted_tokens:
                return chosen
    return chosen
