"""Stage two from settings to student: checks, initial weights, training, evaluation, export."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.io.local_copies import LocalCopies
from pipeline.cache.io.reader import Cache, open_cache
from pipeline.data.settings import DataSettings
from pipeline.data.stream.skipped_shards import read_left_out, write_left_out
from pipeline.data.stream.train_stream import TrainStream
from pipeline.errors import CacheError
from pipeline.loss.settings import LossSettings
from pipeline.models.resolved import ResolvedModel
from pipeline.observe.metrics import open_sinks
from pipeline.observe.settings import ObserveSettings
from pipeline.storage import Store
from pipeline.student.build.freeze import apply_freezing
from pipeline.student.build.initial import initial_identity, make_initial_student, resolve_source
from pipeline.student.build.lora import add_lora, check_lora_targets
from pipeline.student.build.model import compile_layers, load_student, optimizer_groups
from pipeline.student.build.vocabulary import StudentVocabulary, open_vocabulary
from pipeline.student.compatibility import cache_inclusion_rule, cache_sampled_step, check_fit
from pipeline.student.output.export import is_exported
from pipeline.student.output.hub import CheckpointUploads
from pipeline.student.output.publish import Delivery, push_if_asked
from pipeline.student.settings import OutputSettings, StudentSettings, TrainSettings
from pipeline.student.training.checkpoint import Checkpoints, RunIdentity
from pipeline.student.training.deepspeed_engine import (
    DeepSpeedEngine,
    join_world,
    leave_world,
    prepare_zero3,
)
from pipeline.student.training.distributed import World, peer_errors, read_world
from pipeline.student.training.loop import TrainLoop, planned_steps
from pipeline.student.training.resume import find_resume_point, load_resume_point

__all__ = ["Inputs", "open_inputs", "train_student"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The settings of stage two, and what is known before anything is loaded."""

    student: StudentSettings
    loss: LossSettings
    data: DataSettings
    train: TrainSettings
    output: OutputSettings
    observe: ObserveSettings
    seed: int
    cache_url: str
    cache: Cache
    source: ResolvedModel
    vocabulary: StudentVocabulary

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.output.output_dir)

    def pack_length(self) -> int:
        """Tokens of the longest sequence there can be, in the student's tokens."""
        return self.vocabulary.pack_length()

    def identity(self, world_size: int) -> RunIdentity:
        """Return everything that decides the losses of the run."""
        train = self.train.model_dump(mode="json")
        for name in (
            "save_steps", "keep_checkpoints", "logging_steps", "eval_steps", "evaluate_before",
            "resume_from_checkpoint", "timeout_s", "per_device_train_batch_size",
            "gradient_accumulation_steps",
        ):  # fmt: skip
            del train[name]
        # How the global batch is divided among ranks and passes does not change it.
        if self.data.batch_tokens is None:
            train["packs_per_step"] = self.packs_per_step(world_size)
        loss = self.loss.model_dump(mode="json")
        del loss["chunk_rows"]
        if loss["cross_tokenizer"] == "refuse":
            del loss["cross_tokenizer"]  # it refuses and changes nothing
        digest = self.vocabulary.digest
        lora = self.student.lora
        adapters = {"lora": lora.model_dump(mode="json", exclude={"save_adapter"})}
        return RunIdentity(
            {
                "cache": self.cache.manifest.identity_digest,
                **({"vocabulary": digest} if digest is not None else {}),
                "student": initial_identity(self.student, self.source),
                "freeze": [list(self.student.freeze), _spectrum(self.student)],
                "loss": loss,
                "data": self.data.identity(),
                "train": train,
                "seed": self.seed,
                **(adapters if lora.enabled else {}),
            }
        )

    def packs_per_step(self, world_size: int) -> int:
        """Packed sequences of one optimiser step, over all ranks."""
        train = self.train
        return train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size


def open_inputs(
    *,
    cache_url: str,
    student: StudentSettings,
    loss: LossSettings,
    data: DataSettings,
    train: TrainSettings,
    output: OutputSettings,
    observe: ObserveSettings,
    seed: int,
) -> Inputs:
    """Open the cache and resolve the student; refuse what does not fit together.

    Raises:
        CacheError: no complete cache there, nothing held out, or more entries asked for than held.
        ConfigError: a loss that the cache's targets cannot serve, or adapters on layers that the
            student does not have.
        ModelError: the student cannot be reached, or has another tokenizer.
    """
    cache = open_cache(cache_url)
    check_fit(
        loss, data, grid=cache.manifest.temperatures, rule=cache_inclusion_rule(cache.manifest)
    )
    if not cache.source("heldout").shard_rows():
        raise CacheError(
            f"{cache_url}: no held-out rows",
            expected="some, for the evaluation",
            do="make the cache with a larger --corpus.heldout_fraction",
        )
    rows = cache.source(
        "train",
        top_k=data.max_entries,
        tau_factor=data.tau_factor,
        open_shards=2 * data.shuffle_shards,
    )
    source = resolve_source(student)
    vocabulary = open_vocabulary(
        source.path, cache, cross_tokenizer=loss.cross_tokenizer, train=rows
    )
    if student.lora.enabled:
        check_lora_targets(source.path, student.lora, trust_remote_code=student.trust_remote_code)
    return Inputs(
        student, loss, data, train, output, observe, seed, cache_url, cache, source, vocabulary
    )


def train_student(inputs: Inputs, *, resolved_config: str, command: str) -> Path:
    """Train, evaluate and export; the same command again goes on where it stopped.

    Returns:
        The student's folder, `output_dir/model`.
    """
    world = read_world()
    identity = inputs.identity(world.size)
    target = inputs.output_dir / "model"
    if is_exported(target, identity.digest) and inputs.train.resume_from_checkpoint == "auto":
        _log.info("%s holds the finished student of this run; nothing to train", target)
        if world.is_first:
            push_if_asked(inputs.output, target)
        return target
    device = join_world(world, timeout_s=inputs.train.timeout_s)
    try:
        with peer_errors(world):
            uploads = _train(inputs, world, device, identity, target, resolved_config, command)
    finally:
        leave_world()
    # After the others have gone: a slow net is no dead peer.
    if uploads is not None:
        uploads.finish()
    if world.is_first:
        push_if_asked(inputs.output, target)
    return target


def _train(
    inputs: Inputs,
    world: World,
    device: Any,
    identity: RunIdentity,
    target: Path,
    resolved_config: str,
    command: str,
) -> CheckpointUploads | None:
    import torch

    cache, train, data = inputs.cache, inputs.train, inputs.data
    if data.disk_cache is not None:
        cache.copies = LocalCopies(data.disk_cache, int(data.disk_cache_gib * (1 << 30)))
    dtype = train.dtype(on_gpu=torch.cuda.is_available())
    checkpoints = Checkpoints(
        inputs.output_dir, identity, keep=train.keep_checkpoints, world_size=world.size
    )
    resume = find_resume_point(checkpoints, train, world)
    init_folder = _initial_folder(inputs, world)
    with prepare_zero3(train, dtype=dtype, world_size=world.size):
        model = load_student(
            init_folder,
            dtype=dtype,
            use_flash_attention=inputs.student.use_flash_attention,
            gradient_checkpointing=inputs.student.gradient_checkpointing,
            trust_remote_code=inputs.student.trust_remote_code,
        )
    from pipeline.loss.head import check_distill_head, install_distill_head
    from pipeline.student.training.module import StudentModule

    # Cross-entropy alone has no temperature; its KL is logged at 1, which every cache holds.
    loss = inputs.loss
    if loss.alpha == 0:
        loss = loss.model_copy(update={"temperature": 1.0})
    rule = cache_inclusion_rule(cache.manifest)
    install_distill_head(
        model,
        loss,
        valid_vocab=inputs.vocabulary.size,
        sampled_log_step=cache_sampled_step(cache.manifest),
        rule_highest=rule.highest if rule else 0.0,
    )
    if inputs.student.lora.enabled:
        add_lora(model, inputs.student.lora, seed=inputs.seed)
    else:
        apply_freezing(model, inputs.student)
    if train.torch_compile:
        compile_layers(model)
    stream = TrainStream(
        inputs.vocabulary.train,
        data,
        seed=inputs.seed,
        packs_per_step=inputs.packs_per_step(world.size),
        rank=world.rank,
        world=world.size,
        accumulation=train.gradient_accumulation_steps,
        pack_length=inputs.pack_length(),
        temperature=loss.temperature,
        off_grid=loss.off_grid,
    )
    total_steps = planned_steps(stream, train)
    engine = DeepSpeedEngine(
        StudentModule(model),
        train,
        dtype=dtype,
        world=world,
        total_steps=total_steps,
        optimizer_groups=optimizer_groups(model, train.weight_decay),
        rank_free=resume is not None and resume.reshard,
    )
    check_distill_head(model, device=engine.device)
    start = 0
    if resume is not None:
        start = load_resume_point(engine, resume, inputs.output_dir)
        _log.info("resuming after step %d of %d", start, total_steps)
    _restore_left_out(stream, inputs.output_dir, start=start, is_first=world.is_first)
    if world.is_first:
        Store(str(inputs.output_dir)).write("config.yaml", resolved_config.encode())
    sinks = open_sinks(
        inputs.observe,
        inputs.output_dir,
        resume_step=None if resume is None else start,
        config=json.loads(json.dumps(identity.data)),
        is_writer=world.is_first,
    )
    loop = TrainLoop(inputs, engine, stream, sinks, checkpoints, total_steps)
    delivery = Delivery(inputs, model, init_folder, loop, resolved_config, command)
    uploads = delivery.checkpoint_uploads(engine)
    if uploads is not None:
        loop.after_save = uploads.push
    before, after = loop.run(start)
    state = engine.gathered_state(model)
    if world.is_first:
        assert state is not None
        delivery.finished(state, target, before=before, after=after)
        mark = {"identity_digest": identity.digest, "steps": total_steps}
        Store(str(inputs.output_dir)).write("finished.json", json.dumps(mark).encode())
    engine.barrier()
    sinks.close()
    engine.close()
    return uploads


def _restore_left_out(stream: TrainStream, folder: Path, *, start: int, is_first: bool) -> None:
    """Leave out what the run left out before, without looking at it again."""
    if start == 0:
        if is_first:
            write_left_out(folder, [])
        return
    records = read_left_out(folder)
    stream.leave_out(records)
    if records and is_first:
        _log.warning(
            "as before, this run does without %s; a repaired shard is used by a run that starts "
            "anew (--resume_from_checkpoint never)",
            ", ".join(record.path for record in records),
        )


def _initial_folder(inputs: Inputs, world: World) -> Path:
    """Rank 0 makes the folder, the others wait for it."""
    import torch.distributed as dist

    if not world.is_first:
        dist.barrier()
    else:
        # What a killed run left half-written; a run has its output folder to itself.
        for leftover in inputs.output_dir.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = make_initial_student(
        inputs.student,
        inputs.source,
        inputs.cache,
        rows=inputs.vocabulary.train,
        output_dir=inputs.output_dir,
    )
    if world.is_first and world.size > 1:
        dist.barrier()
    return folder


def _spectrum(student: StudentSettings) -> list[str]:
    from pipeline.student.build.freeze import read_unfrozen_parameters

    return (
        read_unfrozen_parameters(student.layers_to_unfreeze) if student.layers_to_unfreeze else []
    )
