"""What a run delivers: the student's folder with its card and scores, the adapter, the pushes."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluate.measures import HeldoutScores
from pipeline.storage import Store
from pipeline.student.build.lora import adapter_files, merged_state
from pipeline.student.output.card import student_card
from pipeline.student.output.export import export_student
from pipeline.student.output.hub import CheckpointUploads, push_to_hub
from pipeline.student.settings import OutputSettings

if TYPE_CHECKING:
    from pipeline.student.run import Inputs
    from pipeline.student.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.student.training.loop import TrainLoop

__all__ = ["Delivery", "push_if_asked"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Writes the student of one run; rank 0 alone, but for `checkpoint_uploads`."""

    inputs: Inputs
    model: Any
    init_folder: Path
    loop: TrainLoop
    resolved_config: str
    command: str

    def finished(
        self,
        state: dict[str, Any],
        target: Path,
        *,
        before: HeldoutScores | None,
        after: HeldoutScores,
    ) -> None:
        """Write the scores, the adapter when asked for, and the finished student.

        Args:
            state: full weights on the CPU.
            target: the student's folder.
            before: held-out scores of the untrained student.
            after: of the finished one.
        """
        store = Store(str(self.inputs.output_dir))
        for name, scores in (("heldout-before.json", before), ("heldout-after.json", after)):
            if scores is not None:
                store.write(name, json.dumps(scores.to_json()).encode())
        student = self.inputs.student
        if student.lora.enabled and student.lora.save_adapter:
            base = str(self.init_folder) if student.layers_kept else student.model
            adapter = Store(str(self.inputs.output_dir / "adapter"))
            for name, data in adapter_files(self.model, state, student.lora, base=base).items():
                adapter.write(name, data)
        self._export(state, target, before=before, after=after)

    def checkpoint_uploads(self, engine: DeepSpeedEngine) -> CheckpointUploads | None:
        """Return what pushes the checkpoints; None where that is not asked for."""
        output = self.inputs.output
        if not output.push_checkpoints:
            return None
        assert output.hub_location is not None
        return CheckpointUploads(
            output.hub_location,
            self.inputs.output_dir / "upload.partial",
            gather=lambda: engine.gathered_state(self.model),
            any_rank=lambda mine: engine.sum_over_ranks([float(mine)])[0] > 0,
            export=lambda state, folder, step: self._export(state, folder, step=step),
        )

    def _export(
        self,
        state: dict[str, Any],
        target: Path,
        *,
        before: HeldoutScores | None = None,
        after: HeldoutScores | None = None,
        step: int | None = None,
    ) -> None:
        inputs, output = self.inputs, self.inputs.output
        card = student_card(
            name=inputs.output_dir.name,
            base=inputs.student.model,
            layers_kept=inputs.student.layers_kept,
            manifest=inputs.cache.manifest,
            cache_url=inputs.cache_url,
            resolved_config=self.resolved_config,
            before=before,
            after=after,
            steps=self.loop.total_steps,
            tokens=self.loop.tokens_of_run(),
            rows_left_out=self.loop.rows_left_out_of_run(),
            command=self.command,
            hub_location=output.hub_location if output.push else None,
            weights_dtype=output.weights_dtype,
            vocabulary=inputs.vocabulary.sentence,
            unfinished_step=step,
        )
        if inputs.student.lora.enabled:
            state = merged_state(self.model, state, inputs.student.lora)
        export_student(
            self.model,
            state,
            target=target,
            init_folder=self.init_folder,
            tokenizer_files=inputs.vocabulary.files,
            card=card,
            weights_dtype=output.weights_dtype,
        )


def push_if_asked(output: OutputSettings, target: Path) -> None:
    """Push the finished student where the settings say so.

    Raises:
        StoreError: it cannot be pushed; the folder stays.
    """
    if output.push:
        assert output.hub_location is not None
        _log.info("pushed to %s", push_to_hub(target, output.hub_location))
