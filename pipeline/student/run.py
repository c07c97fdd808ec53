"""Stage two from settings to student: checks, initial weights, training, evaluation, export."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.reader import Cache, open_cache
from pipeline.data.settings import DataSettings
from pipeline.data.stream import TrainStream
from pipeline.errors import CacheError, ResumeError
from pipeline.evaluate.measures import HeldoutScores
from pipeline.loss.settings import LossSettings
from pipeline.models.resolve import ResolvedModel
from pipeline.models.tokenizer import tokenizer_from_files
from pipeline.observe.metrics import open_sinks
from pipeline.observe.settings import ObserveSettings
from pipeline.storage import Store
from pipeline.student.card import student_card
from pipeline.student.checkpoint import Checkpoints, RunIdentity
from pipeline.student.deepspeed_engine import (
    DeepSpeedEngine,
    join_world,
    leave_world,
    prepare_zero3,
)
from pipeline.student.export import export_student, is_exported, push_to_hub
from pipeline.student.fit import cache_drawn_step, cache_law, check_fit
from pipeline.student.freeze import apply_freezing
from pipeline.student.initial import initial_identity, make_initial_student, resolve_source
from pipeline.student.model import (
    check_vocabulary,
    load_student,
    optimizer_groups,
    valid_vocabulary,
)
from pipeline.student.settings import OutputSettings, StudentSettings, TrainSettings
from pipeline.student.train import TrainLoop, planned_steps
from pipeline.student.world import World, read_world

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

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.output.output_dir)

    def pack_length(self) -> int:
        """Tokens of the longest sequence that the cache allows."""
        return int(self.cache.manifest.identity["corpus"]["max_length"])

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
        train["packs_per_step"] = self.packs_per_step(world_size)
        loss = self.loss.model_dump(mode="json")
        del loss["chunk_rows"]
        return RunIdentity(
            {
                "cache": self.cache.manifest.identity_digest,
                "student": initial_identity(self.student, self.source),
                "freeze": [list(self.student.freeze), _spectrum(self.student)],
                "loss": loss,
                "data": self.data.model_dump(mode="json", exclude={"prefetch_batches"}),
                "train": train,
                "seed": self.seed,
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
        ConfigError: a loss that the cache's targets cannot serve.
        ModelError: the student cannot be reached, or has another vocabulary.
    """
    cache = open_cache(cache_url)
    check_fit(loss, data, grid=cache.manifest.temperatures, law=cache_law(cache.manifest))
    cache.source("train", top_k=data.top_k, tau_factor=data.tau_factor)  # refused now, or never
    if not cache.source("heldout").shard_rows():
        raise CacheError(
            f"{cache_url}: no held-out rows",
            expected="some, for the evaluation",
            do="make the cache with a larger --corpus.heldout_fraction",
        )
    source = resolve_source(student)
    check_vocabulary(source.path, tokenizer_from_files(cache.tokenizer_files()))
    return Inputs(student, loss, data, train, output, observe, seed, cache_url, cache, source)


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
            _push_if_asked(inputs, target)
        return target
    device = join_world(world, timeout_s=inputs.train.timeout_s)
    try:
        return _train(inputs, world, device, identity, target, resolved_config, command)
    finally:
        leave_world()


def _train(
    inputs: Inputs,
    world: World,
    device: Any,
    identity: RunIdentity,
    target: Path,
    resolved_config: str,
    command: str,
) -> Path:
    import torch

    cache, train = inputs.cache, inputs.train
    dtype = train.dtype(on_gpu=torch.cuda.is_available())
    tokenizer = tokenizer_from_files(cache.tokenizer_files())
    checkpoints = Checkpoints(inputs.output_dir, identity, keep=train.keep_checkpoints)
    checkpoint = _checkpoint_to_resume(checkpoints, train, world)
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
    from pipeline.student.module import StudentModule

    # Cross-entropy alone has no temperature; its KL is logged at 1, which every cache holds.
    loss = inputs.loss
    if loss.alpha == 0:
        loss = loss.model_copy(update={"temperature": 1.0})
    install_distill_head(
        model,
        loss,
        valid_vocab=valid_vocabulary(tokenizer, init_folder),
        drawn_log_step=cache_drawn_step(cache.manifest),
    )
    apply_freezing(model, inputs.student)
    stream = TrainStream(
        cache.source("train", top_k=inputs.data.top_k, tau_factor=inputs.data.tau_factor),
        inputs.data,
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
    )
    check_distill_head(model, device=engine.device)
    start = 0
    if checkpoint is not None:
        start = engine.load(checkpoint.folder)
        _log.info("resuming after step %d of %d", start, total_steps)
    if world.is_first:
        Store(str(inputs.output_dir)).write("config.yaml", resolved_config.encode())
    sinks = open_sinks(
        inputs.observe,
        inputs.output_dir,
        resume_step=start if checkpoint is not None else None,
        config=json.loads(json.dumps(identity.data)),
        is_writer=world.is_first,
    )
    loop = TrainLoop(inputs, engine, stream, sinks, checkpoints, total_steps)
    before, after = loop.run(start)
    state = engine.gathered_state(model)
    if world.is_first:
        assert state is not None
        _export(
            inputs, model, state, target, init_folder, before, after, loop, resolved_config, command
        )
        mark = {"identity_digest": identity.digest, "steps": total_steps}
        Store(str(inputs.output_dir)).write("finished.json", json.dumps(mark).encode())
        _push_if_asked(inputs, target)
    engine.barrier()
    sinks.close()
    engine.close()
    return target


def _push_if_asked(inputs: Inputs, target: Path) -> None:
    if inputs.output.push:
        assert inputs.output.hub_location is not None
        _log.info("pushed to %s", push_to_hub(target, inputs.output.hub_location))


def _checkpoint_to_resume(checkpoints: Checkpoints, train: TrainSettings, world: World) -> Any:
    wanted = train.resume_from_checkpoint
    if wanted == "never":
        if world.is_first:
            checkpoints.clear()
        return None
    found = checkpoints.newest() if wanted == "auto" else checkpoints.read(Path(wanted))
    if found is not None and found.world_size != world.size:
        # Under ZeRO each rank has its own part of the optimiser's state.
        raise ResumeError(
            f"{found.folder}: written by {found.world_size} processes, this run has {world.size}",
            expected="the same number",
            do=f"start with NPROC={found.world_size}, or anew with --resume_from_checkpoint never",
        )
    return found


def _initial_folder(inputs: Inputs, world: World) -> Path:
    """Rank 0 makes the folder, the others wait for it."""
    import torch.distributed as dist

    if world.is_first:
        # What a killed run left half-written; a run has its output folder to itself.
        for leftover in inputs.output_dir.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = make_initial_student(
            inputs.student, inputs.source, inputs.cache, output_dir=inputs.output_dir
        )
    if world.size > 1:
        dist.barrier()
    if not world.is_first:
        folder = make_initial_student(
            inputs.student, inputs.source, inputs.cache, output_dir=inputs.output_dir
        )
    return folder


def _export(
    inputs: Inputs,
    model: Any,
    state: dict[str, Any],
    target: Path,
    init_folder: Path,
    before: HeldoutScores | None,
    after: HeldoutScores,
    loop: TrainLoop,
    resolved_config: str,
    command: str,
) -> None:
    store = Store(str(inputs.output_dir))
    for name, scores in (("heldout-before.json", before), ("heldout-after.json", after)):
        if scores is not None:
            store.write(name, json.dumps(scores.to_json()).encode())
    card = student_card(
        name=inputs.output_dir.name,
        base=inputs.student.model,
        layers_kept=inputs.student.layers_kept,
        manifest=inputs.cache.manifest,
        cache_url=inputs.cache_url,
        resolved_config=resolved_config,
        before=before,
        after=after,
        steps=loop.total_steps,
        tokens=loop.tokens_of_run(),
        command=command,
    )
    export_student(
        model,
        state,
        target=target,
        init_folder=init_folder,
        tokenizer_files=inputs.cache.tokenizer_files(),
        card=card,
    )


def _spectrum(student: StudentSettings) -> list[str]:
    from pipeline.student.freeze import read_unfrozen_parameters

    return (
        read_unfrozen_parameters(student.layers_to_unfreeze) if student.layers_to_unfreeze else []
    )
