"""The training loop: step, log, evaluate, checkpoint; reads from top to bottom."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from pipeline.data.collate import Batch
from pipeline.data.heldout import heldout_batches
from pipeline.data.stream.skipped_shards import LeftOut, write_left_out
from pipeline.data.stream.train_stream import Agree, StepBatch, TrainStream
from pipeline.errors import DistillError, Interrupted
from pipeline.evaluate.heldout import merge_scores, score_batches
from pipeline.evaluate.measures import HeldoutScores
from pipeline.observe.memory import peak_rss_bytes
from pipeline.observe.metrics import METRICS_FILE, MetricSink, read_metrics
from pipeline.observe.progress import Progress
from pipeline.storage import Store
from pipeline.student.settings import TrainSettings
from pipeline.student.training.checkpoint import Checkpoints
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine

if TYPE_CHECKING:
    from pipeline.student.run import Inputs

__all__ = ["TrainLoop", "planned_steps"]

_log = logging.getLogger(__name__)
_EVAL_TOKENS = 2048


def planned_steps(stream: TrainStream, settings: TrainSettings) -> int:
    """Return the optimiser steps of the whole run."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.ceil(settings.num_train_epochs * stream.steps_per_epoch))


class TrainLoop:
    """One run on one rank; everything that changes lives in the engine."""

    def __init__(
        self,
        inputs: Inputs,
        engine: DeepSpeedEngine,
        stream: TrainStream,
        sinks: MetricSink,
        checkpoints: Checkpoints,
        total_steps: int,
    ) -> None:
        """Keep the parts."""
        self._inputs = inputs
        self._engine = engine
        self._stream = stream
        self._sinks = sinks
        self._checkpoints = checkpoints
        self.total_steps = total_steps
        self._stop_asked = False
        self.after_save: Callable[[int], None] | None = None
        """Called by every rank with the step of each checkpoint but the last."""

    def run(self, start: int) -> tuple[HeldoutScores | None, HeldoutScores]:
        """Train from step `start` to the end; return the scores before (step 0 only) and after.

        Raises:
            Interrupted: SIGTERM came; a checkpoint is written first.
            DistillError: the loss is not finite.
        """
        train = self._inputs.train
        before = self._scores_before(start)
        with (
            self._sigterm(),
            Progress(
                self.total_steps,
                unit="steps",
                description="train-student",
                every_s=self._inputs.observe.progress_every_s,
                initial=start,
                enabled=self._engine.world.is_first,
            ) as progress,
            closing(self._stream.steps(start, self.total_steps, agree=self._agree())) as steps,
        ):
            done, waited = start, self._stream.wait_seconds
            for batch in steps:
                started = time.monotonic()
                values, stop = self._step(batch)
                done = batch.step + 1
                seconds = time.monotonic() - started
                wait = self._stream.wait_seconds - waited
                waited = self._stream.wait_seconds
                values["throughput/tokens_per_s"] = batch.num_tokens / (seconds + wait)
                values["data/wait_s"] = wait
                values["memory/peak_gib"] = peak_rss_bytes() / (1 << 30)
                last = done == self.total_steps
                if train.eval_steps and done % train.eval_steps == 0 and not last:
                    values |= _as_metrics(self.evaluate())
                if done % train.logging_steps == 0 or last or "heldout/perplexity" in values:
                    self._sinks.log(done, values)
                progress.advance(1, loss=f"{values['train/loss']:.4f}")
                if done % train.save_steps == 0 or last or stop:
                    self._save(done)
                    if self.after_save is not None and not (last or stop):
                        self.after_save(done)
                if stop and not last:
                    raise Interrupted(
                        f"stopped by SIGTERM after step {done} of {self.total_steps}",
                        do="run the same command again; it goes on from there",
                    )
        after = self.evaluate()
        # Killed between this line and the export, the next run comes here a second time.
        if not self._end_is_logged():
            self._sinks.log(self.total_steps, _as_metrics(after))
        return before, after

    def evaluate(self) -> HeldoutScores:
        """Score the held-out rows at temperature 1, all ranks together."""
        world = self._engine.world

        def forward(batch: Batch) -> Any:
            inputs = _module_inputs(batch.to(self._engine.device), scale=1.0)
            return self._engine.evaluate({**inputs, "predictions": True, "temperature": 1.0})[1]

        part = score_batches(
            heldout_batches(
                self._inputs.vocabulary.heldout,
                tokens_per_batch=max(_EVAL_TOKENS, self._inputs.pack_length()),
                temperature=1.0,
                rank=world.rank,
                world=world.size,
            ),
            forward,
            across_tokenizers=self._inputs.loss.cross_tokenizer != "refuse",
        )
        return merge_scores(self._engine.gather_objects(part))

    def tokens_of_run(self) -> int:
        """Return the tokens of all steps, repeats counted."""
        return sum(self._stream.plan.step(step).num_tokens for step in range(self.total_steps))

    def rows_left_out_of_run(self) -> int:
        """Return the rows of damaged shards that the steps did without, repeats counted."""
        if not self._stream.left_out:
            return 0
        plan = self._stream.plan
        return sum(plan.step(step).num_rows_left_out for step in range(self.total_steps))

    def _agree(self) -> Agree | None:
        """Return how ranks agree on damaged shards; None where these stop the run."""
        if self._inputs.data.on_damaged_shard == "stop":
            return None
        return self._write_down

    def _write_down(self, found: Sequence[LeftOut]) -> Sequence[LeftOut]:
        """Return what any rank found damaged, once it is written down.

        Written before the step: killed after it, the run leaves out the same from the same step.
        """
        if not self._engine.sum_over_ranks([float(len(found))])[0]:
            return ()
        every = sorted({r for part in self._engine.gather_objects(list(found)) for r in part})
        records = list({record.shard: record for record in reversed(every)}.values())
        if self._engine.world.is_first:
            write_left_out(self._inputs.output_dir, [*self._stream.left_out, *records])
            for record in records:
                _log.warning(
                    "%s is damaged (%s): its %d rows are left out from step %d on",
                    self._inputs.cache.store.full_url(record.path),
                    record.reason,
                    record.rows,
                    record.from_step + 1,
                )
        return records

    def _step(self, batch: StepBatch) -> tuple[dict[str, float], bool]:
        """Run one optimiser step; return what is logged, and whether any rank was asked to stop."""
        world, loss = self._engine.world, self._inputs.loss
        # A run that is resumed at this step draws the same numbers (dropout) as one that is not.
        torch.manual_seed(hash((self._inputs.seed, batch.step, world.rank)) & 0x7FFFFFFF)
        loss_tokens = max(batch.num_loss_tokens, 1)
        scale = world.size * len(batch.micro_batches) / loss_tokens
        rate = self._engine.learning_rate
        outputs = self._engine.train_step(
            [_module_inputs(b.to(self._engine.device), scale) for b in batch.micro_batches]
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
            "train/kd": divergence,
            "train/ce": entropy,
            "train/learning_rate": rate,
            "train/epoch": (batch.step + 1) / self._stream.steps_per_epoch,
            "train/tokens": float(batch.num_tokens),
        }
        if batch.num_rows_left_out:
            values["train/rows_left_out"] = float(batch.num_rows_left_out)
        norm = self._engine.grad_norm()
        if norm is not None:
            values["train/grad_norm"] = norm
        if not math.isfinite(values["train/loss"]):
            raise DistillError(
                f"the loss is not finite at step {batch.step + 1}",
                do="lower train.learning_rate, or train in bfloat16 or float32; the last "
                "checkpoint is whole",
            )
        return values, stop > 0

    def _save(self, step: int) -> None:
        folder = self._checkpoints.folder(step)
        self._engine.save(folder, step=step)
        self._engine.barrier()
        if self._engine.world.is_first:
            self._checkpoints.mark_complete(step, world_size=self._engine.world.size)
        self._engine.barrier()

    def _end_is_logged(self) -> bool:
        file = self._inputs.output_dir / METRICS_FILE
        return self._engine.world.is_first and any(
            record.step == self.total_steps and "heldout/perplexity" in record.values
            for record in read_metrics(file)
        )

    def _scores_before(self, start: int) -> HeldoutScores | None:
        """Score the untrained student; a resumed run keeps what the first one wrote."""
        path = self._inputs.output_dir / "heldout-before.json"
        if not self._inputs.train.evaluate_before:
            return None
        if start > 0:
            return HeldoutScores.read(str(path)) if path.exists() else None
        scores = self.evaluate()
        if self._engine.world.is_first:
            Store(str(path.parent)).write(path.name, json.dumps(scores.to_json()).encode())
            self._sinks.log(0, _as_metrics(scores))
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


def _module_inputs(batch: Batch, scale: float) -> dict[str, Any]:
    return {
        "input_ids_1T": batch.input_ids_1T,
        "position_ids_1T": batch.position_ids_1T,
        "label_index_N": batch.label_index_N,
        "ids_NK": batch.ids_NK,
        "logprobs_NK": batch.logprobs_NK,
        "inclusion_NK": batch.inclusion_NK,
        "log_z_N": batch.log_z_N,
        "entropy_N": batch.entropy_N,
        "label_N": batch.label_ids_N,
        "scale": scale,
    }


def _as_metrics(scores: HeldoutScores) -> dict[str, float]:
    values = {f"heldout/{name}": scores.mean(name).value for name in scores.sums}
    values["heldout/perplexity"] = scores.perplexity().value
    ece = scores.calibration_error()
    if ece is not None:
        values["heldout/ece"] = ece.value
    return values
