"""The only file that knows DeepSpeed: process group, ZeRO engine, checkpoints, gathered weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DistillError, ModelError, ResumeError, StoreError
from pipeline.models.device import uses_gpu
from pipeline.student.engine.average import WeightAverage
from pipeline.student.engine.config import deepspeed_config
from pipeline.student.engine.deepspeed_parts import (
    keep_convolutions_whole,
    keep_gradient_norm,
    make_muon,
    one_kind_of_zero_optimizer,
)
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.distributed import Distributed
from pipeline.student.training.optimizer import make_optimizer, make_schedule

__all__ = [
    "DeepSpeedEngine",
    "init_distributed",
    "prepare_zero3",
    "process_store",
    "shut_down_distributed",
]

_log = logging.getLogger(__name__)


def init_distributed(distributed: Distributed, *, timeout_s: float) -> Any:
    """Connect the ranks and return this rank's torch device.

    Raises:
        DistillError: the others do not come within the timeout.
    """
    import torch

    on_gpu = uses_gpu()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not on_gpu:
        # Without this DeepSpeed compiles a shared-memory collective on first use: minutes of
        # g++ on two cores, for processes that gloo serves as well.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(distributed.local_rank)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    timeout = timedelta(seconds=timeout_s)
    # DeepSpeed makes groups of its own without a timeout. Torch then takes its default: a stalled
    # peer would hold the others for 30 minutes under gloo, whatever the default group's timeout is.
    c10d: Any = torch.distributed.distributed_c10d
    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timeout,
        )
    except (RuntimeError, ValueError, torch.distributed.DistError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DistillError(
            f"rank {distributed.rank} of {distributed.world_size} did not meet the others at "
            f"{address} within {timeout_s:g} s ({str(error).strip().splitlines()[0]})",
            do="check that all ranks were started and can reach that address",
        ) from None
    return torch.device("cuda", distributed.local_rank) if on_gpu else torch.device("cpu")


def shut_down_distributed() -> None:
    """Disconnect; does nothing where nothing was connected."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def process_store() -> Any:
    """Return the store of the process group, which all ranks reach."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def _host_group(distributed: Distributed) -> Any:
    """Return the group over which hosts exchange what is not on a device; None is the default one.

    NCCL moves what is on a GPU only, and the host would wait for all that the GPU has to do.
    """
    import torch.distributed as dist

    if distributed.world_size == 1 or "gloo" in str(dist.get_backend()):
        return None
    return dist.new_group(backend="gloo")


@contextmanager
def prepare_zero3(
    settings: TrainSettings, *, dtype: str, world_size: int, on_gpu: bool
) -> Iterator[None]:
    """While open, from_pretrained partitions the weights as it loads them (ZeRO 3 only)."""
    if settings.stage(dtype=dtype, world_size=world_size) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    config = deepspeed_config(settings, dtype=dtype, world_size=world_size, on_gpu=on_gpu)
    keep = HfDeepSpeedConfig(config)  # transformers holds it weakly
    try:
        yield
    finally:
        del keep
        unset_hf_deepspeed_config()


class DeepSpeedEngine:
    """A student under ZeRO: steps over micro-batches, checkpoints, gathered weights."""

    def __init__(
        self,
        module: Any,
        settings: TrainSettings,
        *,
        dtype: str,
        distributed: Distributed,
        total_steps: int,
        optimizer_groups: Sequence[dict[str, Any]],
        rank_free: bool = False,
    ) -> None:
        """Wrap `module`, whose forward returns the scaled loss first.

        `rank_free`: the checkpoint that `load` will get is one that `rank_free_copy` made.
        """
        import deepspeed

        self.distributed = distributed
        self._rank_free = rank_free
        world_size = distributed.world_size
        self._stage = settings.stage(dtype=dtype, world_size=world_size)
        self._clip = settings.max_grad_norm
        self._hosts = _host_group(distributed)
        config = deepspeed_config(settings, dtype=dtype, world_size=world_size, on_gpu=uses_gpu())
        config["checkpoint"] = {"load_universal": rank_free}
        make = make_muon if settings.optim == "muon" else make_optimizer
        try:
            with one_kind_of_zero_optimizer():
                self._engine, *_ = deepspeed.initialize(
                    model=module,
                    model_parameters=[p for p in module.parameters() if p.requires_grad],
                    optimizer=make(settings, optimizer_groups),
                    lr_scheduler=partial(make_schedule, settings, total_steps=total_steps),
                    config=config,
                    dist_init_required=False,
                )
        except (ValueError, AssertionError) as error:
            raise ConfigError(
                f"DeepSpeed rejects these settings ({str(error).strip().splitlines()[0]})",
                do="change train.zero_stage, train.offload_optimizer or the precision",
            ) from error
        if world_size == 1 and self._stage == 0:
            # It copies all gradients into one tensor and back to add up what one rank has: 8 % of
            # a step of the default run.
            self._engine.enable_backward_allreduce = False

        if self._stage == 0:
            keep_gradient_norm(self._engine)
        elif self._stage == 3:
            keep_convolutions_whole(self._engine)
        self._average = None
        if settings.ema_decay is not None:
            self._average = WeightAverage(
                [(name, p) for name, p in module.named_parameters() if p.requires_grad],
                decay=settings.ema_decay, rank=distributed.rank, world_size=world_size,
            )  # fmt: skip

    @property
    def module(self) -> Any:
        """The student module; its forward is safe under every ZeRO stage."""
        return self._engine.module

    @property
    def device(self) -> Any:
        """Where batches belong."""
        return self._engine.device

    @property
    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return float(self._engine.get_lr()[0])

    @property
    def skipped_updates(self) -> int:
        """Steps that changed no weight, since the run's beginning: gradients were not finite."""
        return int(self._engine.skipped_steps)

    def train_step(self, micro_batches: Sequence[dict[str, Any]]) -> list[Any]:
        """Run one optimiser step; returns what the module returned for each micro-batch."""
        self._engine.train()
        outputs = []
        for batch in micro_batches:
            output = self._engine(**batch)
            self._engine.backward(output[0])
            self._engine.step()
            outputs.append(output)
        if self._average is not None and self._engine.was_step_applied():
            self._average.update()
        return outputs

    def use_average(self) -> None:
        """Replace the weights by their moving average, where there is one; training is over."""
        if self._average is not None:
            self._average.to_weights()

    def evaluate(self, batch: dict[str, Any]) -> Any:
        """Run the module without gradients."""
        import torch

        self._engine.eval()
        with torch.no_grad():
            return self._engine.module(**batch)

    def grad_norm(self) -> float | None:
        """Return the global gradient norm of the last step, where the ZeRO stage computes one."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; asks the hosts, not the devices."""
        import torch
        import torch.distributed as dist

        if self.distributed.world_size == 1:
            return flag
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags, group=self._hosts)
        return bool(flags[0] > 0)

    def sum_over_ranks(self, values: Any) -> list[float]:
        """Return the element-wise sum over all ranks, in float64, and wait for it.

        `values` are numbers, or a tensor on the device.
        """
        import torch
        import torch.distributed as dist

        if isinstance(values, torch.Tensor):
            total = values.to(torch.float64)
        else:
            total = torch.tensor(list(values), dtype=torch.float64, device=self._engine.device)
        if self.distributed.world_size > 1:
            dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def total_over_ranks(self, values: Any) -> Any:
        """Return the element-wise sum of a tensor over all ranks, on the device; waits for nothing.

        The tensor is used up.
        """
        import torch.distributed as dist

        if self.distributed.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value`, on every rank."""
        import torch.distributed as dist

        if self.distributed.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.distributed.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        import torch.distributed as dist

        if self.distributed.world_size > 1:
            dist.barrier()

    def save(self, folder: Path, *, step: int) -> None:
        """Write weights, optimiser and schedule into `folder`.

        Raises:
            StoreError: the disk is full or fails.
        """
        state = {"step": step, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        try:
            self._engine.save_checkpoint(
                str(folder.parent), tag=folder.name, client_state=state, save_latest=False
            )
            if self._average is not None:
                self._average.save(folder)
        except (OSError, RuntimeError) as error:
            raise StoreError(
                f"{folder}: the checkpoint cannot be written ({str(error).splitlines()[0]})",
                do="free some space and run the same command again; it goes on from the last "
                "complete checkpoint",
            ) from error

    def load(self, folder: Path, *, average: Path | None = None) -> int:
        """Load what `save` wrote and return the step.

        Args:
            folder: of the checkpoint, or of its rank-free form.
            average: the checkpoint's own folder, where `folder` is another.

        Raises:
            ResumeError: the files do not fit this engine.
        """
        groups = [dict(group, params=()) for group in self._base_optimizer().param_groups]
        if self._rank_free:  # it warns that there is no tensor parallelism, once a rank
            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        try:
            path, state = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        except Exception as error:
            # DeepSpeed raises whatever torch.load or its own asserts raise on a damaged file.
            raise ResumeError(
                f"{folder}: cannot be loaded ({str(error).strip().splitlines()[0]})",
                do="delete that folder to go on from the checkpoint before it",
            ) from error
        if path is None:
            raise ResumeError(f"{folder}: holds no DeepSpeed checkpoint")
        if self._rank_free and self._stage == 3:
            self._mend_universal_load(groups)
        if self._average is not None:
            self._average.load(average or folder)
        return int(state["step"])

    def _base_optimizer(self) -> Any:
        """Return torch's optimiser below DeepSpeed's wrapper, if there is one."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _mend_universal_load(self, groups: Sequence[dict[str, Any]]) -> None:
        """Undo what DeepSpeed 0.19.8 gets wrong for several parameter groups under ZeRO 3.

        It gives all states one step tensor, which then counts once per group and step, and every
        group the first one's hyperparameters, so that biases and norms would decay as well.
        """
        optimizer = self._base_optimizer()
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
        rates = self._engine.lr_scheduler.get_last_lr()
        for loaded, own, rate in zip(optimizer.param_groups, groups, rates, strict=True):
            loaded.update(weight_decay=own["weight_decay"], lr=rate)
            loaded.update({key: own[key] for key in ("initial_lr",) if key in own})

    def gathered_state(self, model: Any) -> dict[str, Any] | None:
        """Return the full weights of `model` on the CPU at rank 0, None on the others."""
        import deepspeed

        state: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            if self._stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    if self.distributed.is_first:
                        state[name] = parameter.detach().cpu().clone()
            elif self.distributed.is_first:
                state[name] = parameter.detach().cpu().clone()
        if not self.distributed.is_first:
            return None
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                state[name] = buffer.detach().cpu().clone()
        if not state:
            raise ModelError("the student has no weights to export")
        return state

    def close(self) -> None:
        """Free the engine."""
        self._engine.destroy()
