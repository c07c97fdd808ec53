"""What is to be captured, and how: everything that decides the bytes of the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline.cache.codec.spec import CodecSpec
from pipeline.config import fingerprint
from pipeline.teacher.capture.identity import cache_identity
from pipeline.teacher.capture.source import ShardSource
from pipeline.teacher.engines.base import Engine, Teacher
from pipeline.teacher.engines.registry import open_engine
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.scheme import capture_scheme

__all__ = ["CaptureTask", "capture_task"]


@dataclass(frozen=True, slots=True)
class CaptureTask:
    """A teacher, a corpus, and what is kept of the distributions."""

    teacher: Teacher
    settings: CaptureSettings
    source: ShardSource
    scheme: SparseScheme
    spec: CodecSpec
    identity: dict[str, Any]

    @property
    def identity_digest(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity)

    def with_source(self, source: ShardSource) -> CaptureTask:
        """Return the task over other shards: those of the responses that were written."""
        return replace(self, source=source)

    def with_scheme(self, scheme: SparseScheme) -> CaptureTask:
        """Return the task with another scheme: the one whose tau was fitted."""
        spec = replace(self.spec, rule=scheme.rule)
        return replace(
            self,
            scheme=scheme,
            spec=spec,
            identity={**self.identity, "scheme": scheme.to_json(), "codec": spec.to_json()},
        )

    def open_engine(self) -> Engine:
        """Load the teacher."""
        return open_engine(
            self.teacher.settings,
            self.settings,
            folder=self.teacher.model.path,
            scheme=self.scheme.first_phase,
            max_length=self.teacher.max_length,
        )


def capture_task(
    teacher: Teacher,
    settings: CaptureSettings,
    corpus: dict[str, Any],
    source: ShardSource,
    *,
    written_logprobs: bool = False,
    requested_entries: bool = False,
) -> CaptureTask:
    """Return the task of capturing a corpus, of which the identity is known, by these settings.

    Args:
        teacher: whose distributions.
        settings: what is kept of them.
        corpus: the corpus's part of the identity.
        source: its shards.
        written_logprobs: whether the samples carry the log-probs with which they were written.
        requested_entries: whether they carry the ids that their writer found likeliest.
    """
    scheme = capture_scheme(settings, on_device=teacher.settings.has_logits)
    spec = CodecSpec(
        teacher.vocab_size,
        scheme.rule,
        scheme.quantisation,
        written_logprobs=written_logprobs,
        requested_entries=requested_entries,
        largest_known=scheme.keeps_largest,
    )
    if scheme.heldout is not None:
        own = scheme.heldout
        spec = replace(spec, heldout=replace(spec, rule=own.rule, quantisation=own.quantisation))
    identity = cache_identity(
        teacher=teacher.model,
        engine=teacher.info,
        tokenizer=teacher.tokenizer,
        corpus_identity=corpus,
        scheme=scheme,
        spec=spec,
        shard_tokens=settings.shard_tokens,
        batch_tokens=teacher.settings.step_tokens,
        head_rows=settings.chunk_rows,
        parallel=teacher.settings.tensor_parallel_size,
        options=teacher.settings.engine_options,
        batch_invariant=teacher.settings.batch_invariant,
    )
    return CaptureTask(teacher, settings, source, scheme, spec, identity)
