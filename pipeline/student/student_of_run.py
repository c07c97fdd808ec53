"""The student of a run: its initial weights, the loss in its head, what learns in it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.models.device import uses_gpu
from pipeline.student.build.freeze import apply_freezing, freeze_unreached
from pipeline.student.build.initial import make_initial_student
from pipeline.student.build.lora import add_lora
from pipeline.student.build.model import compile_layers, load_student
from pipeline.student.compatibility import sampled_facts
from pipeline.student.engine.first_rank import on_first_rank
from pipeline.student.engine.kernels import apply_kernels
from pipeline.student.forward.attention import attention_order
from pipeline.student.forward.body import text_config
from pipeline.student.forward.router import RouterLoss, router_loss
from pipeline.student.inputs import Inputs
from pipeline.student.sequence.groups import SequenceGroup
from pipeline.student.sequence.memory import offload_checkpoints, tile_mlps
from pipeline.student.training.checkpoint import RunIdentity
from pipeline.student.training.deepspeed_engine import prepare_zero3, process_store
from pipeline.student.training.distributed import Distributed

__all__ = ["BuiltStudent", "RunOnRank", "build_student"]


@dataclass(frozen=True, slots=True)
class RunOnRank:
    """One training run on one rank, as every step sees it."""

    inputs: Inputs
    distributed: Distributed
    identity: RunIdentity
    dtype: str
    """Of weights and activations."""
    resolved_config: str
    command: str

    @property
    def attention_order(self) -> tuple[str, ...]:
        """The attentions that may be used, by their names in transformers."""
        return attention_order(self.inputs.student.chosen_attention, self.dtype, on_gpu=uses_gpu())

    @property
    def folder(self) -> Path:
        """Where everything of the run goes."""
        return self.inputs.output_dir

    @property
    def group(self) -> SequenceGroup:
        """The ranks that share this one's packs."""
        train, world_size = self.inputs.train, self.distributed.world_size
        return SequenceGroup.of(
            self.distributed.rank,
            size=train.sequence_parallel_size,
            data_size=train.data_parallel_size(world_size),
        )

    @property
    def is_first(self) -> bool:
        """Whether this rank writes for all."""
        return self.distributed.is_first


@dataclass(frozen=True, slots=True)
class BuiltStudent:
    """The model with the loss in its head, and what else there is to know of it."""

    model: Any
    init_folder: Path
    """Where its weights came from."""
    router: RouterLoss | None = None
    """What a mixture of experts learns beside, if asked to."""


def build_student(run: RunOnRank) -> BuiltStudent:
    """Make the initial weights, load them, and put the loss and what learns into the model."""
    from pipeline.loss.head import install_distill_head

    inputs, train, settings = run.inputs, run.inputs.train, run.inputs.student
    init_folder = _initial_folder(run)
    with prepare_zero3(
        train, dtype=run.dtype, world_size=run.distributed.world_size, on_gpu=uses_gpu()
    ):
        model = load_student(
            init_folder,
            dtype=run.dtype,
            attention=run.attention_order,
            gradient_checkpointing=settings.gradient_checkpointing,
            trust_remote_code=settings.trust_remote_code,
        )
    apply_kernels(model, settings.kernels)
    log_step, rule_highest = sampled_facts(inputs.cache)
    install_distill_head(
        model,
        inputs.training_loss,
        valid_vocab=inputs.vocabulary.size,
        sampled_log_step=log_step,
        rule_highest=rule_highest,
    )
    if settings.lora.enabled:
        add_lora(model, settings.lora, seed=inputs.seed)
        freeze_unreached(model)
    else:
        apply_freezing(model, settings)
    if train.torch_compile:
        compile_layers(model)
    if train.tiled_mlp:
        tokens = max(inputs.pass_tokens(run.distributed.world_size), 1)
        tile_mlps(model, tiles=-(-tokens // text_config(model).hidden_size))
    if train.offload_activations:
        offload_checkpoints(model, on_gpu=uses_gpu())
    router = router_loss(model, settings.router_aux_loss, settings.router_aux_coefficient)
    return BuiltStudent(model, init_folder, router)


def _initial_folder(run: RunOnRank) -> Path:
    """Rank 0 makes the folder, the others wait for it: layers of a large student take minutes."""
    inputs = run.inputs

    def make() -> Path:
        return make_initial_student(
            inputs.student,
            inputs.source,
            inputs.cache,
            rows=inputs.vocabulary.train,
            output_dir=run.folder,
        )

    def make_first() -> Path:
        # What a killed run left half-written; a run has its output folder to itself.
        for leftover in run.folder.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        return make()

    if run.distributed.world_size == 1:
        return make_first()
    made = on_first_rank(
        make_first,
        process_store(),
        is_first=run.is_first,
        name="the initial student",
        timeout_s=inputs.train.timeout_s,
    )
    return make() if made is None else made
