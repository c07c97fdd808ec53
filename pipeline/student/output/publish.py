"""Publish a student: its folder with card and scores, its adapter, the pushes to the hub."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.layout.manifest import Manifest
from pipeline.evaluate.measures import HeldoutScores
from pipeline.storage import Store
from pipeline.student.build.lora import adapter_files, merged_state
from pipeline.student.build.vocabulary import StudentVocabulary
from pipeline.student.output.card import CardFacts, student_card
from pipeline.student.output.export import export_student
from pipeline.student.output.hub import CheckpointUploads, push_to_hub
from pipeline.student.settings.student import OutputSettings, StudentSettings
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine

__all__ = ["Publisher", "push_if_asked"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Publisher:
    """Writes the student of one run; rank 0 alone, but for `checkpoint_uploads`."""

    model: Any
    init_folder: Path
    student: StudentSettings
    output: OutputSettings
    manifest: Manifest
    cache_url: str
    vocabulary: StudentVocabulary
    total_steps: int
    resolved_config: str
    command: str

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output.output_dir)

    def write_student(
        self,
        state: dict[str, Any],
        target: Path,
        *,
        before: HeldoutScores | None,
        after: HeldoutScores | None,
        tokens: int,
        skipped_rows: int,
    ) -> None:
        """Write the scores, the adapter when asked for, and the finished student.

        Args:
            state: full weights on the CPU.
            target: the student's folder.
            before: held-out scores of the untrained student; None where it was not measured.
            after: of the finished one, likewise.
            tokens: of all steps, repeats counted.
            skipped_rows: of damaged shards, repeats counted.
        """
        store = Store(str(self.folder))
        for name, scores in (("heldout-before.json", before), ("heldout-after.json", after)):
            if scores is not None:
                store.write(name, json.dumps(scores.to_json()).encode())
            else:  # of an earlier run in this folder, and not of this student
                (self.folder / name).unlink(missing_ok=True)
        if self.student.lora.enabled and self.student.lora.save_adapter:
            self._write_adapter(state)
        card = student_card(
            self._facts(), before=before, after=after, tokens=tokens, skipped_rows=skipped_rows
        )
        self._export(state, target, card)

    def checkpoint_uploads(self, engine: DeepSpeedEngine) -> CheckpointUploads | None:
        """Return what pushes the checkpoints; None where that is not asked for."""
        if not self.output.push_checkpoints:
            return None
        assert self.output.hub_location is not None

        def export(state: dict[str, Any], folder: Path, step: int) -> None:
            self._export(state, folder, student_card(self._facts(), unfinished_step=step))

        return CheckpointUploads(
            self.output.hub_location,
            self.folder / "upload.partial",
            gather=lambda: engine.gathered_state(self.model),
            any_rank=lambda mine: engine.sum_over_ranks([float(mine)])[0] > 0,
            export=export,
        )

    def _facts(self) -> CardFacts:
        """Return what the card says of every student of the run."""
        output = self.output
        return CardFacts(
            name=self.folder.name,
            base=self.student.model,
            keep_layers=self.student.keep_layers,
            manifest=self.manifest,
            cache_url=self.cache_url,
            resolved_config=self.resolved_config,
            steps=self.total_steps,
            command=self.command,
            hub_location=output.hub_location if output.push else None,
            weights_dtype=output.weights_dtype,
            vocabulary=self.vocabulary.sentence,
        )

    def _write_adapter(self, state: dict[str, Any]) -> None:
        student = self.student
        base = str(self.init_folder) if student.keep_layers else student.model
        adapter = Store(str(self.folder / "adapter"))
        for name, data in adapter_files(self.model, state, student.lora, base=base).items():
            adapter.write(name, data)

    def _export(self, state: dict[str, Any], target: Path, card: str) -> None:
        if self.student.lora.enabled:
            state = merged_state(self.model, state, self.student.lora)
        export_student(
            self.model,
            state,
            target=target,
            init_folder=self.init_folder,
            tokenizer_files=self.vocabulary.files,
            card=card,
            weights_dtype=self.output.weights_dtype,
        )


def push_if_asked(output: OutputSettings, target: Path) -> None:
    """Push the finished student where the settings say so.

    Raises:
        StoreError: it cannot be pushed; the folder stays.
    """
    if output.push:
        assert output.hub_location is not None
        _log.info("pushed to %s", push_to_hub(target, output.hub_location))
