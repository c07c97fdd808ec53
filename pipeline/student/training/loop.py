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

from pipeline.data.stream.feed import StepFeed
from pipeline.data.stream.train_stream import Agree, StepBatch, TrainStream
from pipeline.data.transfer import Transfer
from pipeline.errors import Interrupted
from pipeline.evaluate.measures import HeldoutScores
from pipeline.loss.settings import LossSettings
from pipeline.observe.metrics import METRICS_FILE, MetricSink, read_metrics
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.student.sequence.parallel import SequenceParallel
from pipeline.student.settings.profile_window import profile_window
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.checkpoint import Checkpoints
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine
from pipeline.student.training.evaluation import HeldoutEvaluation
from pipeline.student.training.logged.profile import StepProfile
from pipeline.student.training.logged.speed import Peak, StepSpeed
from pipeline.student.training.logged.values import StepValues
from pipeline.student.training.module import module_inputs
from pipeline.student.training.token_weights import StepWeights

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
    peak: Peak | None = None
    """Of this rank's device, where it is known."""
    tags: tuple[str, ...] = ()
    """Of a mixture's caches."""


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
        sequence: SequenceParallel | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            settings: of the run.
            engine: with the student.
            stream: of the training rows.
            evaluation: of the held-out ones.
            sinks: for what is logged.
            checkpoints: of the run.
            agree: how ranks agree on damaged shards; None where they stop the run.
            sequence: how ranks share a pass; None where they do not.
        """
        self._sequence = sequence
        self._settings = settings
        self._engine = engine
        self._stream = stream
        self._evaluation = evaluation
        self._sinks = sinks
        self._checkpoints = checkpoints
        self._agree = agree
        self._stop_asked = False
        self._rate = 0.0
        self._values = StepValues(engine, settings.loss, settings.divergence, settings.tags)
        self._weights = StepWeights(engine, settings.loss)
        self._speed = StepSpeed(devices=engine.distributed.world_size, peak=settings.peak)

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
            DistillError: the loss is not finite. Seen at the next logged step, evaluation or
                checkpoint, none of which is made; the message names the first such step.
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
            closing(self._profile()) as profile,
            closing(self._feed(start)) as steps,
        ):
            done, waited = start, self._stream.wait_seconds
            seen = self._stream.tokens_of(start)
            for batch in steps:
                started = time.monotonic()
                wait, waited = self._stream.wait_seconds - waited, self._stream.wait_seconds
                done = batch.step + 1
                profile.before(done)
                stop = self._step(batch)
                steps.look_ahead()
                seen += batch.num_tokens
                last = done == total_steps
                saves = done % train.save_steps == 0 or last or stop
                evaluates = bool(train.eval_steps) and done % (train.eval_steps or 1) == 0
                evaluates = evaluates and not last
                logs = done % train.logging_steps == 0 or last or evaluates
                # Reading waits for the device, so it is done where the values are used. No weights
                # are saved or scored that a step without a finite loss has changed.
                values = self._read(batch) if logs or saves or evaluates else {}
                profile.after(done)
                self._speed.add(batch, seconds=time.monotonic() - started, waited=wait)
                if logs:
                    values["train/total_tokens"] = float(seen)
                    values |= self._speed.take()
                if evaluates:
                    values |= self._evaluation.metrics(self._evaluation.run())
                if logs:
                    self._sinks.log(done, values)
                shown = {"loss": f"{values['train/loss']:.4f}"} if values else {}
                progress.advance(1, **shown)
                if saves:
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

    def _step(self, batch: StepBatch) -> bool:
        """Start one optimiser step; return whether any rank was asked to stop.

        On a GPU the step may still be under way: nothing of it is read.
        """
        distributed = self._engine.distributed
        # A run that is resumed at this step draws the same numbers (dropout) as one that is not.
        torch.manual_seed(hash((self._settings.seed, batch.step, distributed.rank)) & 0x7FFFFFFF)
        loss_tokens = max(batch.num_loss_tokens, 1)
        scale = distributed.world_size * len(batch.micro_batches) / loss_tokens
        self._rate = self._engine.learning_rate
        weights = self._weights.of_step(batch.micro_batches)
        outputs = self._engine.train_step(
            [
                module_inputs(micro, scale, weight_N)
                for micro, weight_N in zip(batch.micro_batches, weights, strict=True)
            ]
        )
        self._values.add(
            outputs, step=batch.step + 1, loss_tokens=loss_tokens, batches=batch.micro_batches,
            weights=weights,
        )  # fmt: skip
        return self._engine.any_rank(self._stop_asked)

    def _read(self, batch: StepBatch) -> dict[str, float]:
        """Return what is logged of the step that `_step` started last, once it is done.

        Raises:
            DistillError: the loss of a step since the last reading is not finite.
        """
        values = (
            self._values.read()
            | self._weights.report()
            | {
                "train/learning_rate": self._rate,
                "train/epoch": (batch.step + 1) / self._stream.steps_per_epoch,
                "train/tokens": float(batch.num_tokens),
                "train/skipped_updates": float(self._engine.skipped_updates),
            }
        )
        values |= {
            f"train/epoch/{tag}": epochs
            for tag, epochs in self._stream.cache_epochs(batch.step + 1).items()
        }
        if batch.num_skipped_rows:
            values["train/skipped_rows"] = float(batch.num_skipped_rows)
        norm = self._engine.grad_norm()
        if norm is not None:
            values["train/grad_norm"] = norm
        return values

    def _feed(self, start: int) -> StepFeed:
        steps = self._stream.steps(start, self._settings.total_steps, agree=self._agree)
        # Where ranks compare what they found before each step, all have to ask at the same time.
        ready = (lambda: False) if self._agree is not None else self._stream.is_ready
        if self._sequence is not None:
            steps = self._sequence.slice_steps(steps)
        return StepFeed(steps, Transfer(self._engine.device), ready=ready)

    def _profile(self) -> StepProfile:
        """The first rank's: the others do the same, and a trace is large."""
        text = self._settings.train.profile_steps
        window = profile_window(text) if text and self._engine.distributed.is_first else None
        return StepProfile(window, self._settings.output_dir / "profile")

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
