"""From run folders and a cache to a report: scores, differences, curves, texts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.errors import ResumeError
from pipeline.evaluate.inspect import compare_tokens, generate_texts, load_for_inspection
from pipeline.evaluate.measures import HeldoutScores, paired_difference, ratio_mean
from pipeline.models.tokenizer import tokenizer_from_files
from pipeline.observe.hardware import describe_environment
from pipeline.report.curves import curves_from_metrics
from pipeline.report.model import (
    CacheFacts,
    Command,
    Curve,
    Difference,
    Generation,
    Kind,
    Measure,
    Passage,
    Report,
    Row,
    ShardFacts,
    TokenView,
)

__all__ = ["RunFolder", "compose_report"]

PROMPTS = (
    "What does json.dumps do?",
    "What is a list comprehension in Python?",
    "How do I open a file for reading?",
)
_NEW_TOKENS = 48
_PASSAGES = 3
_CURVES = {
    "train/loss": ("training loss", "nats"),
    "train/kd": ("training KL", "nats"),
    "train/ce": ("training cross-entropy", "nats"),
    "heldout/kl": ("held-out KL", "nats"),
    "throughput/tokens_per_s": ("tokens per second", "tokens/s"),
    "data/wait_s": ("waiting for data", "s"),
}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A finished run of stage two and its role in the report."""

    name: str
    kind: Kind
    path: Path
    detail: str = ""

    def scores(self, when: str = "after") -> HeldoutScores:
        """Read the scores that the run left.

        Raises:
            ResumeError: the run is not finished.
        """
        file = self.path / f"heldout-{when}.json"
        if not file.exists():
            raise ResumeError(
                f"{self.path}: no {file.name}",
                expected="a finished run of train-student",
                do="run the same train-student command again; it goes on where it stopped",
            )
        return HeldoutScores.read(str(file))


def compose_report(
    cache: Cache,
    runs: Sequence[RunFolder],
    *,
    teacher_folder: Path | None,
    commands: Sequence[Command],
    notes: Sequence[str],
    title: str,
) -> Report:
    """Read everything that the runs left and look at the models themselves.

    Args:
        cache: that all runs were trained from.
        runs: finished runs; the first is the distilled one, whose start is the "before".
        teacher_folder: to let the teacher write beside the students; None leaves it out.
        commands: what to type to get each part again.
        notes: sentences under the table.
        title: heading of the page.
    """
    first = runs[0]
    before = first.scores("before")
    scored: list[tuple[str, Kind, str, HeldoutScores]] = [
        ("student before", "before", "the cut, untrained student", before)
    ]
    scored += [(run.name, run.kind, run.detail, run.scores()) for run in runs]
    tokenizer = tokenizer_from_files(cache.tokenizer_files())
    parameters = _count_parameters(first.path / "model")
    rows = [
        Row(name, kind, _metrics(scores), parameters, detail)
        for name, kind, detail, scores in scored
    ]
    rows.append(_teacher_row(cache))
    after = first.scores()
    differences = [
        _difference(first.name, after, name, scores, metric)
        for name, _, _, scores in scored
        if name != first.name
        for metric in ("kl", "cross_entropy", "top1_agreement")
    ]
    models = {run.name: run.path / "model" for run in runs}
    return Report(
        title=title,
        rows=tuple(rows),
        differences=tuple(differences),
        curves=tuple(curve for run in runs for curve in _curves(run)),
        cache=_cache_facts(cache),
        passages=_passages(cache, first.path / "model", tokenizer),
        generations=_generations(
            {
                **({"teacher": teacher_folder} if teacher_folder else {}),
                "student before": _initial_folder(first),
                **models,
            },
            tokenizer,
        ),
        settings=_settings(cache, runs),
        environment=describe_environment(),
        commands=tuple(commands),
        notes=tuple(notes),
    )


def _metrics(scores: HeldoutScores) -> dict[str, Measure]:
    metrics = {
        name: _measure(scores.mean(name)) for name in ("kl", "cross_entropy", "top1_agreement")
    }
    metrics["perplexity"] = _measure(scores.perplexity())
    ece = scores.calibration_error()
    if ece is not None:
        metrics["ece"] = Measure(ece)
    return metrics


def _measure(mean: Any) -> Measure:
    error = mean.standard_error
    return Measure(mean.value, error if np.isfinite(error) else None)


def _difference(
    a: str, scores_a: HeldoutScores, b: str, scores_b: HeldoutScores, metric: str
) -> Difference:
    mean = _measure(paired_difference(scores_a, scores_b, metric))
    return Difference(a, b, metric, mean.value, mean.standard_error, paired=True)


def _teacher_row(cache: Cache) -> Row:
    """The teacher's own cross-entropy stands in the cache; it agrees with itself by definition."""
    sums, counts = [], []
    source = cache.source("heldout")
    for shard, rows in enumerate(source.shard_rows()):
        for row in source.read_rows(shard, range(rows)):
            sums.append(-float(row.targets.gold_logprob_N.sum(dtype=np.float64)))
            counts.append(row.targets.num_positions)
    entropy = _measure(ratio_mean(sums, counts))
    perplexity = float(np.exp(entropy.value))
    error = entropy.standard_error
    return Row(
        "teacher",
        "teacher",
        {
            "kl": Measure(0.0),
            "cross_entropy": entropy,
            "perplexity": Measure(perplexity, None if error is None else perplexity * error),
            "top1_agreement": Measure(1.0),
        },
        None,
        str(cache.manifest.identity["teacher"]["model"]),
    )


def _curves(run: RunFolder) -> list[Curve]:
    file = run.path / "metrics.jsonl"
    if not file.exists():
        return []
    return list(curves_from_metrics(file, names=_CURVES, series=run.name, kind=run.kind))


def _cache_facts(cache: Cache) -> CacheFacts:
    manifest = cache.manifest
    identity = manifest.identity
    records = manifest.shards
    counted = sum(record.counted for record in records)
    scheme = identity["scheme"]
    return CacheFacts(
        teacher=str(identity["teacher"]["model"]),
        teacher_revision=str(identity["teacher"]["revision"]),
        corpus=str(identity["corpus"].get("source")),
        samples=sum(record.rows for record in records),
        tokens=sum(record.tokens for record in records),
        counted_tokens=counted,
        size_bytes=sum(record.bytes for record in records),
        scheme=f"top-{scheme['top_k']} with the mass of the rest",
        identity=manifest.identity_digest,
        temperatures=manifest.temperatures,
        kept_mass_mean=sum(r.kept_mass * r.counted for r in records) / max(counted, 1),
        entropy_mean=sum(r.entropy * r.counted for r in records) / max(counted, 1),
        shards=tuple(
            ShardFacts(
                name=f"{r.split}/{r.index:05d}",
                split=r.split,
                samples=r.rows,
                counted_tokens=r.counted,
                size_bytes=r.bytes,
                kept_mass_mean=r.kept_mass,
                entropy_mean=r.entropy,
            )
            for r in records
        ),
    )


def _passages(cache: Cache, model_folder: Path, tokenizer: Any) -> tuple[Passage, ...]:
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


def _generations(folders: dict[str, Path], tokenizer: Any) -> tuple[Generation, ...]:
    texts: dict[str, list[str]] = {}
    for name, folder in folders.items():
        model = load_for_inspection(folder)
        texts[name] = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=_NEW_TOKENS)
        del model
    return tuple(
        Generation(prompt, {name: written[index] for name, written in texts.items()})
        for index, prompt in enumerate(PROMPTS)
    )


def _initial_folder(run: RunFolder) -> Path:
    return run.path / "init" if (run.path / "init").exists() else run.path / "model"


def _settings(cache: Cache, runs: Sequence[RunFolder]) -> dict[str, str]:
    settings: dict[str, str] = {}
    # A cache that was merged or sliced has no single configuration.
    with contextlib.suppress(FileNotFoundError):
        settings["cache-teacher"] = cache.store.read("_meta/config.yaml").decode()
    for run in runs:
        file = run.path / "config.yaml"
        if file.exists():
            settings[f"train-student ({run.name})"] = file.read_text(encoding="utf-8")
    return settings


def _count_parameters(folder: Path) -> int:
    """Count the numbers in the safetensors headers, without reading the weights."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(
            int(np.prod(entry["shape"])) for key, entry in header.items() if key != "__metadata__"
        )
    return total
