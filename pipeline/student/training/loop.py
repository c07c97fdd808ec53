"""The training loop: step, log, evaluate, checkpoint; reads from top to bottom."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from pipeline.data.stream.train_stream import Agree, StepBatch, TrainStream
from pipeline.errors import DistillError, Interrupted
from pipeline.evaluate.measures import HeldoutScores
from pipeline.loss.settings import LossSettings
from pipeline.observe.memory import peak_rss_bytes
from pipeline.observe.metrics import METRICS_FILE, MetricSink, read_metrics
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.student.train_settings import TrainSettings
from pipeline.student.training.checkpoint import Checkpoints
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine
from pipeline.student.training.evaluation import HeldoutEvaluation
from pipeline.student.training.module import module_inputs

__all__ = ["LoopSettings", "TrainLoop", "planned_steps"]

_log = logging.getLogger(__name__)


def planned_steps(stream: TrainStream, settings: TrainSettings) -> int:
    """Return the optimiser steps of the whole run."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.ceil(settings.num_train_epochs * stream.steps_per_epoch))


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What the loop needs to know of its run."""

    train: TrainSettings
    loss: LossSettings
    divergence: str
    """The name under which the trained divergence is logged."""
    seed: int
    total_steps: int
    output_dir: Path
    progress_every_s: float = 5.0


class TrainLoop:
    """One run on one rank; everything that changes is in the engine."""

    def __init__(
        self,
        settings: LoopSettings,
        *,
        engine: DeepSpeedEngine,
        stream: TrainStream,
        evaluation: HeldoutEvaluation,
        sinks: MetricSink,
        checkpoints: Checkpoints,
        agree: Agree | None = None,
    ) -> None:
        """Keep the parts; `agree` is how ranks agree on damaged shards, None where they stop it."""
        self._settings = settings
        self._engine = engine
        self._stream = stream
        self._evaluation = evaluation
        self._sinks = sinks
        self._checkpoints = checkpoints
        self._agree = agree
        self._stop_asked = False

    def run(
        self, start: int, *, after_save: Callable[[int], None] | None = None
    ) -> tuple[HeldoutScores | None, HeldoutScores | None]:
        """Train from step `start` to the end; return the scores before (step 0 only) and after.

        Each is None where the settings leave that evaluation out.

        Args:
            start: steps that are done.
            after_save: called by every rank with the step of each checkpoint but the last.

        Raises:
            Interrupted: SIGTERM came; a checkpoint is written first.
            DistillError: the loss is not finite.
        """
        train, total_steps = self._settings.train, self._settings.total_steps
        before = self._scores_before(start)
        with (
            self._sigterm(),
            Progress(
                total_steps,
                unit="steps",
                description="train-student",
                every_s=self._settings.progress_every_s,
                initial=start,
                enabled=self._engine.distributed.is_first,
            ) as progress,
            closing(self._stream.steps(start, total_steps, agree=self._agree)) as steps,
        ):
            done, waited = start, self._stream.wait_seconds
            seen = self._stream.tokens_of(start)
            for batch in steps:
                started = time.monotonic()
                values, stop = self._step(batch)
                done = batch.step + 1
                seen += batch.num_tokens
                values["train/total_tokens"] = float(seen)
                seconds = time.monotonic() - started
                wait = self._stream.wait_seconds - waited
                waited = self._stream.wait_seconds
                values["throughput/tokens_per_s"] = batch.num_tokens / (seconds + wait)
                values["data/wait_s"] = wait
                values["memory/peak_gib"] = peak_rss_bytes() / (1 << 30)
                last = done == total_steps
                if train.eval_steps and done % train.eval_steps == 0 and not last:
                    values |= self._evaluation.metrics(self._evaluation.run())
                if done % train.logging_steps == 0 or last or "heldout/perplexity" in values:
                    self._sinks.log(done, values)
                progress.advance(1, loss=f"{values['train/loss']:.4f}")
                if done % train.save_steps == 0 or last or stop:
                    self._save(done)
                    if after_save is not None and not (last or stop):
                        after_save(done)
                if stop and not last:
                    raise Interrupted(
                        f"stopped by SIGTERM after step {done} of {total_steps}",
                        do="run the same command again; it goes on from there",
                    )
        # Evaluated and exported at the end; checkpoints hold both.
        self._engine.use_average()
        if train.evaluate == "never":
            return before, None
        after = self._evaluation.run()
        # Killed between this line and the export, the next run comes here a second time.
        if not self._end_is_logged():
            self._sinks.log(total_steps, self._evaluation.metrics(after))
        return before, after

    def _step(self, batch: StepBatch) -> tuple[dict[str, float], bool]:
        """Run one optimiser step; return what is logged, and whether any rank was asked to stop."""
        distributed, loss = self._engine.distributed, self._settings.loss
        # A run that is resumed at this step draws the same numbers (dropout) as one that is not.
        torch.manual_seed(hash((self._settings.seed, batch.step, distributed.rank)) & 0x7FFFFFFF)
        loss_tokens = max(batch.num_loss_tokens, 1)
        scale = distributed.world_size * len(batch.micro_batches) / loss_tokens
        rate = self._engine.learning_rate
        outputs = self._engine.train_step(
            [module_inputs(b.to(self._engine.device), scale) for b in batch.micro_batches]
        )
        divergence = sum(float(terms.divergence_N.double().sum()) for _, terms in outputs)
        entropy = sum(float(terms.ce_N.double().sum()) for _, terms in outputs)
        divergence, entropy, stop = self._engine.sum_over_ranks(
            [divergence, entropy, float(self._stop_asked)]
        )
        divergence, entropy = divergence / loss_tokens, entropy / loss_tokens
        values = {
            "train/loss": loss.alpha * loss.temperature**2 * divergence
            + (1 - loss.alpha) * entropy,
            f"train/{self._settings.divergence}": divergence,
            "train/cross_entropy": entropy,
            "train/learning_rate": rate,
            "train/epoch": (batch.step + 1) / self._stream.steps_per_epoch,
            "train/tokens": float(batch.num_tokens),
        }
        if batch.num_skipped_rows:
            values["train/skipped_rows"] = float(batch.num_skipped_rows)
        norm = self._engine.grad_norm()
        if norm is not None:
            values["train/grad_norm"] = norm
        if not math.isfinite(values["train/loss"]):
            raise DistillError(
                f"the loss is not finite at step {batch.step + 1}",
                do="lower train.learning_rate, or train in bfloat16 or float32; the last "
                "checkpoint is complete",
            )
        return values, stop > 0

    def _save(self, step: int) -> None:
        folder = self._checkpoints.folder(step)
        self._engine.save(folder, step=step)
        self._engine.barrier()
        distributed = self._engine.distributed
        if distributed.is_first:
            self._checkpoints.mark_complete(step, world_size=distributed.world_size)
        self._engine.barrier()

    def _end_is_logged(self) -> bool:
        file = self._settings.output_dir / METRICS_FILE
        return self._engine.distributed.is_first and any(
            record.step == self._settings.total_steps and "heldout/perplexity" in record.values
            for record in read_metrics(file)
        )

    def _scores_before(self, start: int) -> HeldoutScores | None:
        """Score the untrained student; a resumed run keeps what the first one wrote."""
        path = self._settings.output_dir / "heldout-before.json"
        if not self._settings.train.evaluate_before:
            return None
        if start > 0:
            return HeldoutScores.read(str(path)) if path.exists() else None
        scores = self._evaluation.run()
        if self._engine.distributed.is_first:
            Store(str(path.parent)).write(path.name, json.dumps(scores.to_json()).encode())
            self._sinks.log(0, self._evaluation.metrics(scores))
        return scores

    @contextmanager
    def _sigterm(self) -> Iterator[None]:
        """SIGTERM sets a flag; the step in progress ends, is saved, and then the run stops."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self._stop_asked = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
