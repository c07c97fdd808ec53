"""What a cache's manifest says, as the report shows it, and what its KL is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.cache.io.reader import Cache
from pipeline.cache.layout.records import ShardRecord
from pipeline.report.data.cache import CacheFacts, ShardFacts

__all__ = ["cache_facts", "kl_is_bucketed"]


def kl_is_bucketed(cache: Cache) -> bool:
    """Whether a held-out KL from this cache is over a top-k and its tail bucket: a lower bound.

    Held-out rows whose tail is sampled give an unbiased estimate of the KL over the vocabulary.
    """
    return cache.heldout_rule is None


def cache_facts(cache: Cache) -> CacheFacts:
    """Return what the manifest says."""
    manifest = cache.manifest
    identity = manifest.identity
    total = manifest.total()
    return CacheFacts(
        teacher=str(identity["teacher"]["model"]),
        teacher_revision=str(identity["teacher"]["revision"]),
        corpus=str(identity["corpus"].get("source")),
        samples=total.rows,
        tokens=total.tokens,
        loss_tokens=total.loss_tokens,
        size_bytes=total.bytes,
        scheme=_scheme_words(identity["scheme"]),
        identity=manifest.identity_digest,
        temperatures=manifest.temperatures,
        kept_mass_mean=total.kept_mass,
        entropy_mean=total.entropy,
        shards=tuple(
            ShardFacts(
                name=_shard_name(r),
                split=r.split,
                samples=r.rows,
                loss_tokens=r.loss_tokens,
                size_bytes=r.bytes,
                kept_mass_mean=r.kept_mass,
                entropy_mean=r.entropy,
            )
            for r in cache.records()
        ),
    )


def _shard_name(record: ShardRecord) -> str:
    """Return a shard's short name, of a mixture with its cache's tag in front."""
    tag, data, _ = record.path.partition("data/")
    return f"{tag if data else ''}{record.split}/{record.index:05d}"


def _scheme_words(scheme: Mapping[str, Any]) -> str:
    if "heldout" in scheme:
        own = {name: value for name, value in scheme.items() if name != "heldout"}
        return f"{_scheme_words(own)}; held out: {_scheme_words(scheme['heldout'])}"
    if "taus" not in scheme and "parts" not in scheme:
        return f"top-{scheme['top_k']} with the mass of the rest"
    if "parts" in scheme:
        return "; ".join(f"{tag}: {_scheme_words(one)}" for tag, one in scheme["parts"].items())
    taus = ", ".join(f"{tau:.4g}" for tau in scheme["taus"])
    kept = f"top-{scheme['top_k']}" if "top_k" in scheme else "the largest entries"
    return f"{kept} and a sample of the rest, tau {taus}"
