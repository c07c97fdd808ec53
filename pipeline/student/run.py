"""Stage two, step by step: build the student, stream the cache, train, publish."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pipeline.data.collate import Batch
from pipeline.data.filter import FILTER_FILE
from pipeline.data.mixture.caches import caches_of
from pipeline.data.stream.skipped_shards import read_skipped_shards, write_skipped_shards
from pipeline.data.stream.train_stream import Agree, TrainStream
from pipeline.evaluate.measures import HeldoutScores
from pipeline.models.device import uses_gpu
from pipeline.observe.devices import device_of_driver
from pipeline.observe.metrics import MetricSink, open_sinks
from pipeline.storage import Store
from pipeline.storage.folder_lock import FolderLock
from pipeline.student.build.model import optimizer_groups
from pipeline.student.costs import model_flops
from pipeline.student.engine.groups import divided_groups
from pipeline.student.engine.launch import use_cores, use_threads, warn_of_short_grace
from pipeline.student.estimate import student_shape
from pipeline.student.inputs import Inputs
from pipeline.student.metric_names import divergence_name, heldout_name
from pipeline.student.output.export import is_exported
from pipeline.student.output.hub import CheckpointUploads
from pipeline.student.output.publish import Publisher, push_if_asked
from pipeline.student.sequence.parallel import SequenceParallel
from pipeline.student.student_of_run import BuiltStudent, RunOnRank, build_student
from pipeline.student.training.checkpoint import Checkpoints
from pipeline.student.training.deepspeed_engine import (
    DeepSpeedEngine,
    init_distributed,
    shut_down_distributed,
)
from pipeline.student.training.distributed import peer_errors, read_distributed
from pipeline.student.training.evaluation import HeldoutEvaluation
from pipeline.student.training.logged.speed import Peak
from pipeline.student.training.loop import LoopSettings, TrainLoop, planned_steps
from pipeline.student.training.resume import ResumePoint, find_resume_point, load_resume_point
from pipeline.student.training.shard_copies import open_local_copies
from pipeline.student.training.skip_agreement import SkipAgreement

__all__ = ["LOCK_FILE", "train_student"]

_log = logging.getLogger(__name__)
LOCK_FILE = ".train.lock"
"""In `output_dir`, while a run goes on."""


def train_student(inputs: Inputs, *, resolved_config: str, command: str) -> Path:
    """Train, evaluate and publish; the same command again goes on where it stopped.

    Returns:
        The student's folder, `output_dir/model`.
    """
    distributed = read_distributed()
    identity = inputs.identity(distributed.world_size)
    target = inputs.output_dir / "model"
    if is_exported(target, identity.digest) and inputs.train.resume_from_checkpoint == "auto":
        _log.info("%s holds the finished student of this run; nothing to train", target)
        if distributed.is_first:
            push_if_asked(inputs.output, target)
        return target
    run = RunOnRank(inputs, distributed, identity, inputs.dtype, resolved_config, command)
    use_cores()
    if distributed.is_first:
        warn_of_short_grace()
    with ExitStack() as held:
        init_distributed(distributed, timeout_s=inputs.train.timeout_s)
        try:
            with peer_errors(distributed):
                if run.is_first:
                    # Before anything is deleted; the others meet rank 0 before they write.
                    lock = FolderLock(run.folder, LOCK_FILE)
                    held.enter_context(lock.take(doing="trains a student into"))
                uploads = _train(run, target)
        finally:
            shut_down_distributed()
        # After the others have gone: a slow net is no dead peer.
        if uploads is not None:
            uploads.finish()
        if distributed.is_first:
            push_if_asked(inputs.output, target)
    return target


def _train(run: RunOnRank, target: Path) -> CheckpointUploads | None:
    """Go from the initial weights to the published folder; return uploads still under way."""
    inputs, train = run.inputs, run.inputs.train
    for cache in caches_of(inputs.cache):
        cache.copies = open_local_copies(cache, inputs.data, run.distributed)
    checkpoints = Checkpoints(
        run.folder,
        run.identity,
        keep=train.keep_checkpoints,
        world_size=run.distributed.world_size,
        slices=train.sequence_parallel_size,
    )
    resume = find_resume_point(checkpoints, train, run.distributed)
    student = build_student(run)
    use_threads(train.cpu_threads)
    sequence = SequenceParallel(run.group)
    stream = _open_stream(run)
    total_steps = planned_steps(stream, train)
    engine = _start_engine(run, student, sequence, resume, total_steps=total_steps)
    start = _load_state(run, engine, stream, resume, total_steps=total_steps)
    sinks = _open_sinks(run, resume_step=None if resume is None else start)
    loop = TrainLoop(
        _loop_settings(run, total_steps),
        engine=engine,
        stream=stream,
        evaluation=_evaluation(run, engine, sequence),
        sinks=sinks,
        checkpoints=checkpoints,
        sequence=sequence,
        agree=_agreement(run, engine, stream),
    )
    publisher = _publisher(run, student, total_steps)
    uploads = publisher.checkpoint_uploads(engine)
    before, after = loop.run(start, after_save=None if uploads is None else uploads.push)
    _publish(run, publisher, student, engine, stream, target, scores=(before, after))
    engine.barrier()
    sinks.close()
    engine.close()
    return uploads


def _open_stream(run: RunOnRank) -> TrainStream:
    from pipeline.loss.tokens.weights import cached_score

    inputs, loss = run.inputs, run.inputs.training_loss
    by_cache = loss.weight in ("teacher_entropy", "gold_surprise")
    return TrainStream(
        inputs.vocabulary.train,
        inputs.data,
        seed=inputs.seed,
        packs_per_step=inputs.packs_per_step(run.distributed.world_size),
        rank=run.group.data_rank,
        world_size=run.group.data_size,
        accumulation=inputs.train.gradient_accumulation_steps,
        pack_length=inputs.pack_length(),
        temperature=loss.temperature,
        uncached_temperature=loss.uncached_temperature,
        totals=inputs.vocabulary.totals,
        score=partial(cached_score, loss.weight) if by_cache else None,
    )


def _start_engine(
    run: RunOnRank,
    student: BuiltStudent,
    sequence: SequenceParallel,
    resume: ResumePoint | None,
    *,
    total_steps: int,
) -> DeepSpeedEngine:
    """Wrap the student in ZeRO and its optimiser; check the head where it now is."""
    from pipeline.loss.head import check_distill_head
    from pipeline.student.forward.attention import settle_attention
    from pipeline.student.forward.choice import choose_way, read_way, record_way
    from pipeline.student.training.module import StudentModule

    train = run.inputs.train
    module = StudentModule(student.model, student.router)
    engine = DeepSpeedEngine(
        module,
        train,
        dtype=run.dtype,
        distributed=run.distributed,
        total_steps=total_steps,
        optimizer_groups=divided_groups(
            optimizer_groups(student.model, train.weight_decay), student.model, train
        ),
        rank_free=resume is not None and resume.reshard,
    )
    settle_attention(
        student.model,
        module.body,
        run.attention_order,
        device=engine.device,
        gather=engine.gather_objects,
    )
    way = choose_way(
        module.body,
        student.model,
        wanted=run.inputs.student.forward,
        before=None if resume is None else read_way(run.folder),
        device=engine.device,
        gather=engine.gather_objects,
        longest_row=run.inputs.longest_row(),
        longest_sequence=run.inputs.pack_length(),
    )
    check_distill_head(student.model, device=engine.device)
    module.body = sequence.install(module.body, student.model, device=engine.device)
    if run.is_first:  # nothing refuses the student from here on
        record_way(run.folder, way)
    return engine


def _load_state(
    run: RunOnRank,
    engine: DeepSpeedEngine,
    stream: TrainStream,
    resume: ResumePoint | None,
    *,
    total_steps: int,
) -> int:
    """Load the checkpoint and the skipped shards of a run that goes on; return its step."""
    start = 0
    if resume is not None:
        start = load_resume_point(engine, resume, run.folder)
        _log.info("resuming after step %d of %d", start, total_steps)
    if start == 0:
        if run.is_first:
            write_skipped_shards(run.folder, [])
        return start
    # What was skipped before is skipped again, without a look at it.
    records = read_skipped_shards(run.folder)
    stream.skip_shards(records)
    if records and run.is_first:
        _log.warning(
            "as before, this run skips %s; a repaired shard is used by a run that starts from its "
            "beginning (--resume_from_checkpoint never)",
            ", ".join(record.path for record in records),
        )
    return start


def _open_sinks(run: RunOnRank, *, resume_step: int | None) -> MetricSink:
    """Write the run's configuration and open what its metrics go to."""
    if run.is_first:
        store = Store(str(run.folder))
        store.write("config.yaml", run.resolved_config.encode())
        if run.inputs.filtered:
            counts = {tag: asdict(kept) for tag, kept in run.inputs.filtered.items()}
            store.write(FILTER_FILE, json.dumps(counts, indent=1).encode())
            for tag, kept in run.inputs.filtered.items():
                _log.info("data.filter keeps %s%s", f"of {tag} " if tag else "", kept.text())
    return open_sinks(
        run.inputs.observe,
        run.folder,
        resume_step=resume_step,
        config=json.loads(json.dumps(run.identity.data)),
        is_writer=run.is_first,
    )


def _loop_settings(run: RunOnRank, total_steps: int) -> LoopSettings:
    inputs = run.inputs
    return LoopSettings(
        train=inputs.train,
        loss=inputs.loss,
        divergence=divergence_name(inputs.loss, sampled=inputs.sampled),
        seed=inputs.seed,
        total_steps=total_steps,
        output_dir=run.folder,
        progress_every_s=inputs.observe.progress_every_s,
        peak=_peak(run),
        tags=inputs.tags,
    )


def _peak(run: RunOnRank) -> Peak | None:
    """Return what this rank's device can do; None without a GPU whose data sheet is known.

    Data sheets name the peak of 16-bit types.
    """
    import torch

    if not uses_gpu() or run.dtype == "float32":
        return None
    device = device_of_driver(torch.cuda.get_device_name())
    if device is None:
        return None
    shape, student = student_shape(run.inputs), run.inputs.student

    slices = run.group.size

    def flops(batch: Batch) -> float:
        # A slice has the lengths of the whole pass, and the supervised tokens that are its own.
        tokens = batch.num_loss_tokens * slices
        return model_flops(shape, student, lengths=batch.lengths, loss_tokens=tokens) / slices

    return Peak(device.flops, flops)


def _agreement(run: RunOnRank, engine: DeepSpeedEngine, stream: TrainStream) -> Agree | None:
    """Return how ranks agree on damaged shards; None where these stop the run."""
    if run.inputs.data.on_damaged_shard == "stop":
        return None
    shown = run.inputs.cache.full_url
    return SkipAgreement(engine, stream, run.folder, shown).agree


def _evaluation(
    run: RunOnRank, engine: DeepSpeedEngine, sequence: SequenceParallel
) -> HeldoutEvaluation:
    inputs = run.inputs
    return HeldoutEvaluation(
        engine,
        inputs.vocabulary.heldout,
        longest=inputs.pack_length(),
        distance=heldout_name(inputs.loss, sampled=inputs.heldout_sampled),
        sequence=sequence,
    )


def _publisher(run: RunOnRank, student: BuiltStudent, total_steps: int) -> Publisher:
    inputs = run.inputs
    return Publisher(
        model=student.model,
        init_folder=student.init_folder,
        student=inputs.student,
        output=inputs.output,
        manifest=inputs.cache.manifest,
        cache_url=inputs.cache_url,
        vocabulary=inputs.vocabulary,
        total_steps=total_steps,
        resolved_config=run.resolved_config,
        command=run.command,
    )


def _publish(
    run: RunOnRank,
    publisher: Publisher,
    student: BuiltStudent,
    engine: DeepSpeedEngine,
    stream: TrainStream,
    target: Path,
    *,
    scores: tuple[HeldoutScores | None, HeldoutScores | None],
) -> None:
    """Gather the weights and let rank 0 write the student's folder, then the mark that it is."""
    state = engine.gathered_state(student.model)
    if not run.is_first:
        return
    assert state is not None
    steps = publisher.total_steps
    publisher.write_student(
        state,
        target,
        before=scores[0],
        after=scores[1],
        tokens=stream.tokens_of(steps),
        skipped_rows=stream.skipped_rows_of(steps),
    )
    mark = {"identity_digest": run.identity.digest, "steps": steps}
    Store(str(run.folder)).write("finished.json", json.dumps(mark).encode())
