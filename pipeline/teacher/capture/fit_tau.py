"""Fits tau: scales an inclusion rule until a position keeps the wanted number of entries, once.

The first samples are captured under the rule as it is. Every kept entry stands for 1 / pi of its
kind, so the mean number under a rule scaled by f is estimated by sum min(1, pi_f) / pi over the
kept entries (Horvitz and Thompson 1952), for every f at once: no second pass of the teacher.

The result is written to the cache by create-only write: of several workers that start together,
each of which finds the same, one is first and the others read it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.layout.manifest import describe_difference
from pipeline.config import fingerprint
from pipeline.corpus.sample import Sample
from pipeline.errors import CacheError, ConfigError, ModelError
from pipeline.sampling.inclusion import InclusionRule
from pipeline.storage import Store
from pipeline.teacher.capture.identity import as_begun
from pipeline.teacher.capture.plan import another_identity, begun_identity, capture_requests
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.fleet.pulse import Pulse, WatchedEngine
from pipeline.teacher.fleet.quarantine import foreign_id
from pipeline.teacher.settings import MOST_ENTRIES
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["FITTED_TAU", "can_begin", "fit_scheme", "fit_tau", "mean_entries", "scale_rule"]

FITTED_TAU = "_meta/fitted_tau.json"
_SLICE_TOKENS = 2048
_WIDEST = 256.0

_log = logging.getLogger(__name__)


def fit_tau(
    task: CaptureTask, store: Store, *, keep: bool = True, pulse: Pulse | None = None
) -> CaptureTask:
    """Return the task with its tau fitted to `capture.mean_entries`; as it is where that is unset.

    The teacher is loaded only where the result is not yet known.

    Args:
        task: with the beginning of its corpus known.
        store: the cache's root.
        keep: write the result; False for an estimate.
        pulse: notices a teacher that is stuck.

    Raises:
        CacheError: the store holds another cache, or the fitted tau of one.
        ConfigError: no rule of this form keeps so few or so many.
        ModelError: the teacher's logits of the first samples are not finite.
    """
    if task.scheme.mean_entries is None:
        return task
    identity = as_begun(task.identity)
    begun = begun_identity(store)
    if begun is not None and begun != identity:
        raise another_identity(store, describe_difference(begun, identity))

    watch = pulse or Pulse()

    def capture(samples: list[Sample]) -> list[NDArray[np.float32]]:
        with watch.expecting(loading=True):
            engine = WatchedEngine(task.open_engine(), watch)
        try:
            fitting = [
                request
                for request in capture_requests(samples)
                if foreign_id(request, engine.vocab_size) is None
            ]
            return engine.capture(fitting)
        finally:
            engine.close()

    scheme = fit_scheme(
        task.scheme, task.scheme.mean_entries, store=store, samples=task.source.first_samples(),
        identity=identity, capture=capture, keep=keep,
    )  # fmt: skip
    return task.with_scheme(scheme)


def can_begin(task: CaptureTask) -> bool:
    """Look for more of the corpus; return whether there is a shard, and enough to fit tau by."""
    task.source.refresh()
    if task.source.is_complete:
        return True
    if not task.source.shards:
        return False
    if task.scheme.mean_entries is None:
        return True
    tokens = 0
    for sample in task.source.first_samples():
        tokens += int(sample.loss_mask.sum())
        if tokens >= _SLICE_TOKENS:
            return True
    return False


def fit_scheme(
    scheme: SparseScheme,
    wanted: float,
    *,
    store: Store,
    samples: Iterable[Sample],
    identity: dict[str, object],
    capture: Callable[[list[Sample]], list[NDArray[np.float32]]],
    keep: bool = True,
) -> SparseScheme:
    """Return the scheme with its rule scaled to `wanted` entries a position, the label included.

    Args:
        scheme: with a rule.
        wanted: mean entries.
        store: the cache's root, where the result is kept or is already.
        samples: from the beginning of the corpus on; the first few are captured.
        identity: the cache's, with the rule as it is; another one's result is rejected.
        capture: the teacher's columns of some samples.
        keep: write the result; False for an estimate.

    Raises:
        CacheError: the store holds the fitted tau of another cache.
        ConfigError: no rule of this form keeps so few or so many.
    """
    digest = fingerprint({"identity": identity, "mean_entries": wanted})
    try:
        return _read(store, scheme, digest)
    except FileNotFoundError:
        pass
    chosen: list[Sample] = []
    tokens = 0
    for sample in samples:
        chosen.append(sample)
        tokens += int(sample.loss_mask.sum())
        if tokens >= _SLICE_TOKENS:
            break
    rule = scale_rule(np.concatenate(capture(chosen)), scheme, wanted)
    _log.info("capture.tau is %s for %g entries a position", list(rule.taus), wanted)
    if not keep:
        return replace(scheme, rule=rule)
    content = {"digest": digest, "mean_entries": wanted, "taus": list(rule.taus)}
    store.create(FITTED_TAU, json.dumps(content, indent=1).encode())
    # Of this worker or of one that was faster: what is written is what all go by.
    return _read(store, scheme, digest)


def scale_rule(
    columns_NC: NDArray[np.float32], scheme: SparseScheme, wanted: float
) -> InclusionRule:
    """Return the scheme's rule, scaled so that `mean_entries` is `wanted`; taus to four digits.

    Raises:
        ConfigError: out of reach.
        ModelError: not one row of the columns is finite.
    """
    rule = scheme.rule
    assert rule is not None
    columns_NC = columns_NC[np.isfinite(columns_NC).all(axis=1)]
    if not len(columns_NC):
        raise ModelError(
            "the teacher's logits of the first samples are not finite",
            expected="finite logits",
            do="run the teacher in bfloat16 or float32 (float16 overflows)",
        )
    # Mean entries fall with the factor; it may neither push a tau to 1 nor ask for more places
    # than settings allow.
    most_places = sum(1 / tau for tau in rule.taus if tau)
    low = max(1 / _WIDEST, most_places / MOST_ENTRIES)
    high = min(_WIDEST, 0.99 / max(rule.taus))
    most, least = (mean_entries(columns_NC, scheme, factor) for factor in (low, high))
    if not least < wanted < most:
        raise ConfigError(
            f"capture.mean_entries: found {wanted:g}",
            expected=f"between {least:.2f} and {most:.0f} with this teacher and corpus",
            do="choose another value, or set capture.tau",
        )
    for _ in range(60):
        middle = math.sqrt(low * high)
        if mean_entries(columns_NC, scheme, middle) > wanted:
            low = middle
        else:
            high = middle
    taus = tuple(float(f"{tau * high:.4g}") for tau in rule.taus)
    return InclusionRule(rule.temperatures, taus)


def mean_entries(columns_NC: NDArray[np.float32], scheme: SparseScheme, factor: float) -> float:
    """Estimate the entries kept at a position by the rule scaled by `factor`, label included."""
    rule, first = scheme.rule, scheme.first_phase
    assert rule is not None
    assert first.rule is not None
    grid = len(scheme.temperatures)
    start, places = 2 + 2 * grid, first.always_kept_places + first.sampled_places
    kept_NP = columns_NC[:, start : start + places] >= 0
    values_E = columns_NC[:, start + places :][kept_NP]
    log_z_EG = np.repeat(columns_NC[:, 2 : 2 + grid], kept_NP.sum(axis=1), axis=0)
    before_E = first.rule.inclusion(values_E, log_z_EG)
    after_E = rule.scaled(factor).inclusion(values_E, log_z_EG)
    place_E = np.nonzero(kept_NP)[1]
    before_E[place_E < first.always_kept_places] = 1.0
    after_E[place_E < scheme.top_k] = 1.0
    return 1.0 + float((after_E / before_E).sum()) / max(len(columns_NC), 1)


def _read(store: Store, scheme: SparseScheme, digest: str) -> SparseScheme:
    content = store.read(FITTED_TAU)
    assert scheme.rule is not None
    try:
        data = json.loads(content)
        taus = tuple(float(tau) for tau in data["taus"])
        fits = data["digest"] == digest and len(taus) == len(scheme.temperatures)
    except (ValueError, KeyError, TypeError):
        raise CacheError(
            f"{store.full_url(FITTED_TAU)}: damaged", do="delete it; tau is fitted again"
        ) from None
    if not fits:
        raise CacheError(
            f"{store.url}: its tau was fitted for another teacher, corpus or capture.mean_entries",
            expected="an empty folder, or a cache made with these settings",
            do="choose another --cache_dir, or delete that cache",
        )
    return replace(scheme, rule=InclusionRule(scheme.rule.temperatures, taus))
