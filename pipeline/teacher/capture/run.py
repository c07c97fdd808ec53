"""Stage one's loop: corpus -> plan -> teacher -> shards -> manifest; goes on where it stopped."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.spec import MAX_VOCAB_SIZE, CodecSpec
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.writer import commit_shard, encode_shard, finalize, intact_record
from pipeline.cache.layout.manifest import (
    MANIFEST,
    SPLITS,
    Manifest,
    ShardRecord,
    read_manifest,
    record_name,
)
from pipeline.cache.layout.quarantine import (
    QUARANTINE,
    QuarantinedRow,
    clear_quarantine,
    read_quarantine,
)
from pipeline.config import fingerprint
from pipeline.corpus.build import build_corpus
from pipeline.corpus.sample import Corpus, Sample
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import CacheError, ConfigError
from pipeline.models.resolve import ResolvedModel, read_model_config, resolve_model
from pipeline.models.tokenizer import load_tokenizer, tokenizer_files
from pipeline.observe.progress import Progress
from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.capture.identity import cache_identity
from pipeline.teacher.capture.plan import PlannedShard, WorkPlan, make_plan, settle_plan
from pipeline.teacher.capture.worker import ShardMaker, make_all
from pipeline.teacher.engines.base import (
    CaptureRequest,
    EngineInfo,
    engine_info,
    open_engine,
)
from pipeline.teacher.fleet.leases import CLAIMS, ClaimBoard, worker_name
from pipeline.teacher.generation.plan import ResponsePlan, plan_responses
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.scheme import capture_scheme
from pipeline.teacher.sparsify.stopwatch import SPARSIFIER

__all__ = ["Prepared", "cache_teacher", "capture_requests", "prepare", "write_shard"]

_log = logging.getLogger(__name__)

_LOOKS_AT_ONCE = 16
"""Records looked at side by side: an object store answers each in 20 to 50 ms, and there are
thousands."""
_ROUNDS = 3
_FOLDERS = (
    "", "_meta", "_meta/shards", "_meta/tokenizer", CLAIMS, QUARANTINE,
    *(f"data/{split}" for split in SPLITS),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is known before the teacher is loaded."""

    model: ResolvedModel
    engine: EngineInfo
    tokenizer: Any
    corpus: Corpus
    scheme: SparseScheme
    spec: CodecSpec
    identity: dict[str, Any]
    plan: WorkPlan
    responses: ResponsePlan | None = None
    """What the teacher has still to write. Corpus and plan are upper bounds then, and the identity
    lacks what only the responses decide; see `responses.write_responses`."""
    unanswered: Mapping[str, tuple[QuarantinedRow, ...]] = field(default_factory=dict)
    """Responses that the teacher could not write, by shard of responses; not in the corpus."""

    @property
    def identity_digest(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity)


def prepare(
    teacher: TeacherSettings,
    corpus: CorpusSettings,
    capture: CaptureSettings,
    *,
    seed: int,
    generate: GenerateSettings | None = None,
) -> Prepared:
    """Resolve the teacher, tokenise the corpus and cut the plan; no teacher is loaded.

    Raises:
        ConfigError, ModelError, CorpusError: as the parts say.
    """
    engine = engine_info(teacher)
    model = resolve_model(teacher.model, revision=teacher.revision, role="teacher")
    config = read_model_config(model.path)
    config = config.get("text_config", config)
    vocab_size = int(config["vocab_size"])
    _check_fits(config, corpus, capture, vocab_size)
    tokenizer = load_tokenizer(model.path)
    responses = None
    if generate is not None and generate.enabled:
        responses = plan_responses(
            corpus, generate, tokenizer=tokenizer, folder=model.path, seed=seed
        )
        built = responses.upper_bound()
    else:
        built = build_corpus(corpus, tokenizer=tokenizer, seed=seed)
    scheme = capture_scheme(capture)
    spec = CodecSpec(vocab_size, scheme.rule, scheme.quantisation)
    identity = cache_identity(
        teacher=model,
        engine=engine,
        tokenizer=tokenizer,
        corpus_identity=built.identity,
        scheme=scheme,
        spec=spec,
        shard_tokens=capture.shard_tokens,
        batch_tokens=teacher.batch_tokens,
        head_rows=capture.head_rows,
    )
    plan = make_plan(built.samples, shard_tokens=capture.shard_tokens)
    return Prepared(model, engine, tokenizer, built, scheme, spec, identity, plan, responses)


def cache_teacher(
    prepared: Prepared,
    teacher: TeacherSettings,
    capture: CaptureSettings,
    *,
    store: Store,
    max_length: int,
    command: str,
    resolved_config: str,
    progress_every_s: float,
    retry_quarantined: bool = False,
    shares: Shares | None = None,
) -> Manifest:
    """Make what is missing of the cache and return its manifest.

    Rows that the teacher cannot answer are quarantined (`cache/layout/quarantine.py`); the cache is
    complete without them, and they are tried again only when `retry_quarantined` asks for it. A run
    over a complete cache compares every checksum, makes damaged shards again, to the same bytes,
    and loads no teacher when there is nothing to make.

    Raises:
        CacheError: the store holds another identity's cache.
        ModelError: the teacher answers for no row, or for too few.
    """
    shares = shares or Shares()
    shares.inside("teacher", "sparsifier", SPARSIFIER.seconds)
    shares.level(planned_tokens=sum(shard.num_tokens for shard in prepared.plan.shards))
    settle_plan(store, prepared.plan, prepared.identity)
    if retry_quarantined:
        _log.info("%d rows were quarantined and are made again", clear_quarantine(store))
    complete = _complete_manifest(store)
    records, missing_tokens = _drop_damaged(prepared.plan, store, check_bytes=complete is not None)
    done_tokens = sum(shard.num_tokens for shard in prepared.plan.shards) - missing_tokens
    if not missing_tokens and complete is not None:
        _log.info("cache %s is complete, all checksums right", store.url)
        return complete
    if complete is not None:
        # While shards are made anew the cache must not call itself complete.
        store.delete(MANIFEST)
    store.write("_meta/config.yaml", resolved_config.encode())
    files = tokenizer_files(prepared.tokenizer)
    for name, data in files.items():
        store.write(f"_meta/tokenizer/{name}", data)
    board = ClaimBoard(store, worker_name(), capture.lease_s)
    with (
        Progress(
            done_tokens + missing_tokens,
            unit="tokens",
            description="cache-teacher",
            every_s=progress_every_s,
            initial=done_tokens,
        ) as progress,
        board.beating(),
        ShardMaker(
            lambda: open_engine(
                teacher,
                capture,
                folder=prepared.model.path,
                scheme=prepared.scheme,
                max_length=max_length,
            ),
            lambda shard: capture_requests(shard.samples),
            lambda shard, columns, failed: write_shard(
                shard, columns, failed, prepared, store, shares
            ),
            board,
            progress,
            shards=prepared.plan.shards,
            tries=capture.tries,
            most_failed=max(
                1, math.floor(capture.max_failed_fraction * prepared.corpus.counts.samples)
            ),
            bytes_per_token=max((r.bytes / r.tokens for r in records if r.tokens), default=0.0),
            shares=shares,
        ) as maker,
    ):
        # A worker that was overtaken may write a recorded shard once more at this moment, and a
        # store may cut that write short: the shard is then made again, like any that is damaged.
        for _ in range(_ROUNDS):
            make_all(prepared.plan.shards, board, maker)
            records, missing_tokens = _drop_damaged(prepared.plan, store, check_bytes=False)
            if not missing_tokens:
                break
    board.sweep()
    if missing_tokens:
        raise CacheError(
            f"{store.url}: a shard disappeared while the cache was made",
            do="run the same command again; it makes only what is missing",
        )
    counts: dict[str, int] = asdict(prepared.corpus.counts)
    failed = sum(map(len, read_quarantine(store).values()))
    if failed:  # no member where nothing failed: a retry that succeeds leaves no trace
        counts["rows_quarantined"] = failed
    manifest = finalize(
        store,
        records,
        identity=prepared.identity,
        spec=prepared.spec,
        temperatures=prepared.scheme.temperatures,
        corpus_counts=counts,
        tokenizer_files=sorted(files),
        command=command,
    )
    leftovers = store.remove_partials(_FOLDERS)
    if leftovers:
        _log.info("%d unfinished files of killed workers removed", leftovers)
    return manifest


def capture_requests(samples: Sequence[Sample]) -> list[CaptureRequest]:
    """Return what the engine is asked for: a supervised token's target stands one row before it."""
    return [
        CaptureRequest(
            sample_id=sample.sample_id,
            input_ids_L=sample.input_ids,
            rows_N=np.flatnonzero(sample.loss_mask).astype(np.int64) - 1,
        )
        for sample in samples
    ]


def _drop_damaged(
    plan: WorkPlan, store: Store, *, check_bytes: bool
) -> tuple[list[ShardRecord], int]:
    """Remove the records of damaged shards; return the others, and the tokens that are missing.

    A run that goes on trusts sizes: reading back all of a large cache at each restart would cost
    more than the work lost. Readers compare checksums anyway.
    """
    recorded = set(store.list("_meta/shards"))
    failures = read_quarantine(store)

    def look(shard: PlannedShard) -> ShardRecord | None:
        name = record_name(shard.split, shard.index)
        if name.rsplit("/", 1)[-1] not in recorded:
            return None
        record = intact_record(store, shard.split, shard.index, check_bytes=check_bytes)
        if record is None or not _is_covered(shard, record, failures):
            store.delete(name)
            return None
        return record

    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        found = list(pool.map(look, plan.shards))
    missing = sum(
        shard.num_tokens for shard, record in zip(plan.shards, found, strict=True) if record is None
    )
    return [record for record in found if record is not None], missing


def _is_covered(
    shard: PlannedShard, record: ShardRecord, failures: Mapping[str, tuple[QuarantinedRow, ...]]
) -> bool:
    """Whether the rows of the record and those quarantined are the rows of the plan."""
    return record.rows + len(failures.get(shard.name, ())) == len(shard.samples)


def write_shard(
    shard: PlannedShard,
    columns: list[NDArray[np.float32]],
    failed: frozenset[str],
    prepared: Prepared,
    store: Store,
    shares: Shares,
) -> ShardRecord:
    """Encode the columns of a shard's rows, but for those that failed, and commit it."""
    rows: list[CachedSequence] = []
    tails: list[NDArray[np.float32]] = []
    answered = [sample for sample in shard.samples if sample.sample_id not in failed]
    with shares.spent("encoding"):
        for sample, columns_NC in zip(answered, columns, strict=True):
            targets, tail_N = to_targets(
                columns_NC,
                prepared.scheme,
                sample_id=sample.sample_id,
                label_N=sample.input_ids[sample.loss_mask],
            )
            rows.append(
                CachedSequence(sample.sample_id, sample.input_ids, sample.loss_mask, targets)
            )
            tails.append(tail_N)
        record, data = encode_shard(
            rows,
            prepared.spec,
            split=shard.split,
            index=shard.index,
            temperatures=prepared.scheme.temperatures,
            identity_digest=prepared.identity_digest,
            tails=tails,
        )
    with shares.spent("store"):
        commit_shard(store, record, data)
    return record


def _complete_manifest(store: Store) -> Manifest | None:
    """Return the manifest where there is a readable one; a damaged one is written anew."""
    if not store.exists(MANIFEST):
        return None
    try:
        return read_manifest(store)
    except CacheError as error:
        _log.warning("%s", error)
        return None


def _check_fits(
    config: dict[str, Any], corpus: CorpusSettings, capture: CaptureSettings, vocab_size: int
) -> None:
    mistakes = []
    if vocab_size > MAX_VOCAB_SIZE:
        mistakes.append(
            f"teacher.model: found a vocabulary of {vocab_size} tokens, expected at most "
            f"{MAX_VOCAB_SIZE} (2^18), which is what a cache can hold"
        )
    if capture.scheme != "threshold" and capture.top_k >= vocab_size:
        mistakes.append(
            f"capture.top_k: found {capture.top_k}, expected less than the teacher's "
            f"vocabulary of {vocab_size}"
        )
    positions = config.get("max_position_embeddings")
    if positions and corpus.max_length > int(positions):
        mistakes.append(
            f"corpus.max_length: found {corpus.max_length}, expected at most the teacher's "
            f"{positions} positions"
        )
    if mistakes:
        raise ConfigError(mistakes=mistakes)
