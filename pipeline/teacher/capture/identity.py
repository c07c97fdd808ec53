"""The identity of a cache: everything that decides its bytes, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.layout.schema import FORMAT_VERSION
from pipeline.models.resolved import ResolvedModel
from pipeline.models.tokenizer import vocabulary_fingerprint
from pipeline.teacher.engines.base import EngineInfo
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["as_begun", "cache_identity"]


def cache_identity(
    *,
    teacher: ResolvedModel,
    engine: EngineInfo,
    tokenizer: Any,
    corpus_identity: dict[str, Any],
    scheme: SparseScheme,
    spec: CodecSpec,
    shard_tokens: int,
    batch_tokens: int,
    head_rows: int,
    parallel: int = 1,
    options: Mapping[str, Any] | None = None,
    batch_invariant: bool = False,
) -> dict[str, Any]:
    """Return the identity as JSON-able data.

    The tokens of a forward pass and the rows of a head chunk are part of it: they decide the shapes
    of the matrix products, and with them the last bits of the logits. So do the GPUs that share a
    layer (`parallel`, each of which sums a part) and whatever `options` vLLM is given.
    """
    extra: dict[str, Any] = {}
    if parallel > 1:
        extra["tensor_parallel_size"] = parallel
    if batch_invariant:
        extra["batch_invariant"] = True
    if options:
        extra["engine_options"] = dict(options)
    return {
        "format_version": FORMAT_VERSION,
        "teacher": {
            "model": teacher.name,
            "revision": teacher.revision,
            "batch_tokens": batch_tokens,
            "head_rows": head_rows,
            **asdict(engine),
            **extra,
        },
        "tokenizer": {
            "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
            "size": len(tokenizer),
        },
        "corpus": corpus_identity,
        "scheme": scheme.to_json(),
        "codec": spec.to_json(),
        "shard_tokens": shard_tokens,
    }


def as_begun(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the part that is known before the teacher is asked anything.

    With the taus from before they were fitted.
    """
    scheme, codec = dict(identity["scheme"]), dict(identity["codec"])
    if "taus_before" in scheme:
        scheme["taus"] = scheme["taus_before"]
        codec["inclusion_rule"] = {**codec["inclusion_rule"], "taus": scheme["taus_before"]}
    return {**identity, "scheme": scheme, "codec": codec}
