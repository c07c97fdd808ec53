"""What the models expect on held-out text, and what they write for the same prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cache.io.reader import Cache
from pipeline.errors import DistillError
from pipeline.evaluate.inspect import compare_tokens, generate_texts, load_for_inspection
from pipeline.models.resolve import resolve_model
from pipeline.models.tokenizer import load_tokenizer
from pipeline.report.compose.runs import Run
from pipeline.report.data.runs import Generation, Passage, TokenView

__all__ = ["generations", "passages", "writers"]

PROMPTS = (
    "What does json.dumps do?",
    "What is a list comprehension in Python?",
    "How do I open a file for reading?",
)
_NEW_TOKENS = 32
_PASSAGES = 3


def passages(cache: Cache, model_folder: Path, tokenizer: Any) -> tuple[Passage, ...]:
    """Return a few held-out texts with what teacher and student expected at each position.

    None for a student whose tokens are not the teacher's, one by one and under the same ids.
    """
    if load_tokenizer(model_folder).get_vocab() != tokenizer.get_vocab():
        return ()
    source = cache.source("heldout")
    rows = [
        row
        for shard, count in enumerate(source.shard_rows())
        for row in source.read_rows(shard, range(min(count, _PASSAGES)))
    ][:_PASSAGES]
    model = load_for_inspection(model_folder)

    def named(top: tuple[tuple[int, float], ...]) -> tuple[tuple[str, float], ...]:
        return tuple((tokenizer.decode([token]), p) for token, p in top)

    return tuple(
        Passage(
            title=f"held-out sequence {row.sample_id[:8]}",
            tokens=tuple(
                TokenView(
                    text=tokenizer.decode([token.token_id]),
                    kl=token.kl,
                    teacher_top=named(token.teacher_top),
                    student_top=named(token.student_top),
                )
                for token in compare_tokens(model, row)
            ),
        )
        for row in rows
    )


def generations(folders: Mapping[str, Path], tokenizer: Any) -> tuple[Generation, ...]:
    """Return what each model writes for the same prompts, greedily, in its own tokens.

    They are asked through the chat template of the cache's `tokenizer`, as they were trained.
    """
    texts: dict[str, list[str]] = {}
    for name, folder in folders.items():
        model, own = load_for_inspection(folder), load_tokenizer(folder)
        own.chat_template = tokenizer.chat_template
        texts[name] = generate_texts(model, own, PROMPTS, max_new_tokens=_NEW_TOKENS)
        del model
    return tuple(
        Generation(prompt, {name: written[index] for name, written in texts.items()})
        for index, prompt in enumerate(PROMPTS)
    )


def writers(teacher: Path | None, first: Run, trained: Mapping[str, Path]) -> dict[str, Path]:
    """Return the folders of the models that write for the prompts, by name, teacher first."""
    before = _initial_folder(first)
    return {
        **({"teacher": teacher} if teacher else {}),
        **({"student before": before} if before else {}),
        **trained,
    }


def _initial_folder(run: Run) -> Path | None:
    """Return the student before training; none where its folder is not known any more."""
    init = run.folder.path / "init"
    if init.exists():
        return init
    student = run.config.get("student", {})
    if not student.get("model") or student.get("keep_layers") is not None:
        return None
    # A student that was not pruned starts from the model itself.
    with contextlib.suppress(DistillError):
        name, revision = str(student["model"]), student.get("revision")
        return resolve_model(name, revision=revision, role="student").path
    return None
