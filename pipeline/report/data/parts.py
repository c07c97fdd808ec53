"""The parts of a report that runs and a cache give: scores, curves, speeds, texts, settings."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.cache.io.reader import Cache
from pipeline.errors import DistillError, ResumeError
from pipeline.evaluate.inspect import compare_tokens, generate_texts, load_for_inspection
from pipeline.evaluate.measures import HeldoutScores, MeanError, paired_difference, ratio_mean
from pipeline.models.resolve import resolve_model
from pipeline.models.tokenizer import load_tokenizer
from pipeline.observe.metrics import METRICS_FILE, read_metrics
from pipeline.report.data.curves import curves_from_metrics
from pipeline.report.data.records import (
    CacheFacts,
    Curve,
    Difference,
    Generation,
    Kind,
    Measure,
    Passage,
    Row,
    SettingDifference,
    ShardFacts,
    Speed,
    TokenView,
)

__all__ = [
    "RunFolder",
    "cache_facts",
    "count_parameters",
    "differences",
    "generations",
    "initial_folder",
    "measure",
    "metrics_of",
    "passages",
    "run_curves",
    "run_speed",
    "setting_differences",
    "settings_of",
    "teacher_row",
]

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
    "memory/peak_gib": ("peak memory", "GiB"),
}
_PLACES = ("output.output_dir", "observe.")
"""Settings that say where a run writes, not what it is."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A finished run of stage two and its role in the report."""

    name: str
    kind: Kind
    path: Path
    detail: str = ""
    rank: int = 0
    seconds: float | None = None

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

    def scores_before(self) -> HeldoutScores | None:
        """Read the scores of the untrained student; none where they were not measured."""
        file = self.path / "heldout-before.json"
        return HeldoutScores.read(str(file)) if file.exists() else None


def metrics_of(scores: HeldoutScores) -> dict[str, Measure]:
    """Return every measure of a row."""
    metrics = {name: measure(scores.mean(name)) for name in scores.sums}
    metrics["perplexity"] = measure(scores.perplexity())
    ece = scores.calibration_error()
    if ece is not None:
        metrics["ece"] = measure(ece)
    return metrics


def measure(mean: MeanError) -> Measure:
    """Return a mean with its standard error, none where that is not a number."""
    error = mean.standard_error
    return Measure(mean.value, error if np.isfinite(error) else None)


def differences(
    a: str, scores_a: HeldoutScores, b: str, scores_b: HeldoutScores
) -> list[Difference]:
    """Return every metric of a minus that of b, subtracted sequence by sequence."""
    found = []
    for metric in scores_a.metrics:
        if metric in scores_b.metrics:
            mean = measure(paired_difference(scores_a, scores_b, metric))
            found.append(Difference(a, b, metric, mean.value, mean.standard_error, paired=True))
    return found


def teacher_row(cache: Cache) -> Row:
    """The teacher's own cross-entropy stands in the cache; it agrees with itself by definition."""
    sums, counts = [], []
    source = cache.source("heldout")
    for shard, rows in enumerate(source.shard_rows()):
        for row in source.read_rows(shard, range(rows)):
            sums.append(-float(row.targets.label_logprob_N.sum(dtype=np.float64)))
            counts.append(row.targets.num_positions)
    entropy = measure(ratio_mean(sums, counts))
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


def run_curves(run: RunFolder) -> list[Curve]:
    """Return the curves of one run."""
    file = run.path / METRICS_FILE
    if not file.exists():
        return []
    return list(
        curves_from_metrics(file, names=_CURVES, series=run.name, kind=run.kind, rank=run.rank)
    )


def run_speed(run: RunFolder) -> Speed | None:
    """Return how fast a run was; none where it logged no step."""
    file = run.path / METRICS_FILE
    if not file.exists():
        return None
    steps = [r.values for r in read_metrics(file) if "throughput/tokens_per_s" in r.values]
    steps = [values for values in steps if values["throughput/tokens_per_s"] > 0]
    if not steps:
        return None
    seconds = [
        values.get("train/tokens", 0.0) / values["throughput/tokens_per_s"] for values in steps
    ]
    waited = sum(values.get("data/wait_s", 0.0) for values in steps)
    peaks = [values["memory/peak_gib"] for values in steps if "memory/peak_gib" in values]
    return Speed(
        name=run.name,
        steps=len(steps),
        tokens=round(sum(values.get("train/tokens", 0.0) for values in steps)),
        tokens_per_s=statistics.median(values["throughput/tokens_per_s"] for values in steps),
        wait_share=waited / sum(seconds) if sum(seconds) else 0.0,
        peak_memory_gib=max(peaks) if peaks else None,
        seconds=run.seconds,
        rank=run.rank,
    )


def cache_facts(cache: Cache) -> CacheFacts:
    """Return what the manifest says."""
    manifest = cache.manifest
    identity = manifest.identity
    records = manifest.shards
    loss_tokens = sum(record.loss_tokens for record in records)
    scheme = identity["scheme"]
    return CacheFacts(
        teacher=str(identity["teacher"]["model"]),
        teacher_revision=str(identity["teacher"]["revision"]),
        corpus=str(identity["corpus"].get("source")),
        samples=sum(record.rows for record in records),
        tokens=sum(record.tokens for record in records),
        loss_tokens=loss_tokens,
        size_bytes=sum(record.bytes for record in records),
        scheme=f"top-{scheme['top_k']} with the mass of the rest",
        identity=manifest.identity_digest,
        temperatures=manifest.temperatures,
        kept_mass_mean=sum(r.kept_mass * r.loss_tokens for r in records) / max(loss_tokens, 1),
        entropy_mean=sum(r.entropy * r.loss_tokens for r in records) / max(loss_tokens, 1),
        shards=tuple(
            ShardFacts(
                name=f"{r.split}/{r.index:05d}",
                split=r.split,
                samples=r.rows,
                loss_tokens=r.loss_tokens,
                size_bytes=r.bytes,
                kept_mass_mean=r.kept_mass,
                entropy_mean=r.entropy,
            )
            for r in records
        ),
    )


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


def initial_folder(run: RunFolder) -> Path | None:
    """Return the student before training; none where its folder is not known any more."""
    if (run.path / "init").exists():
        return run.path / "init"
    student = _config(run).get("student", {})
    if not student.get("model") or student.get("layers_kept") is not None:
        return None
    # A student that was not cut starts from the model itself.
    with contextlib.suppress(DistillError):
        name, revision = str(student["model"]), student.get("revision")
        return resolve_model(name, revision=revision, role="student").path
    return None


def settings_of(cache: Cache, runs: Sequence[RunFolder]) -> dict[str, str]:
    """Return the resolved configuration of each stage, as YAML."""
    settings: dict[str, str] = {}
    # A cache that was merged or sliced has no single configuration.
    with contextlib.suppress(FileNotFoundError):
        settings["cache-teacher"] = cache.store.read("_meta/config.yaml").decode()
    for run in runs:
        file = run.path / "config.yaml"
        if file.exists():
            settings[f"train-student ({run.name})"] = file.read_text(encoding="utf-8")
    return settings


def setting_differences(runs: Sequence[RunFolder]) -> tuple[SettingDifference, ...]:
    """Return the settings in which the runs differ, those of their folders left out."""
    flat = {run.name: _flat(_config(run)) for run in runs}
    fields = dict.fromkeys(name for settings in flat.values() for name in settings)
    return tuple(
        SettingDifference(field, {name: settings.get(field, "") for name, settings in flat.items()})
        for field in fields
        if not field.startswith(_PLACES)
        and len({settings.get(field) for settings in flat.values()}) > 1
    )


def count_parameters(folder: Path) -> int:
    """Count the numbers in the safetensors headers, without reading the weights."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(
            int(np.prod(entry["shape"])) for key, entry in header.items() if key != "__metadata__"
        )
    return total


def _config(run: RunFolder) -> dict[str, Any]:
    file = run.path / "config.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
    return data if isinstance(data, dict) else {}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat
