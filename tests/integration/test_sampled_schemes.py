"""Sampled targets from the command line to a student: both engines, every scheme, every refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.amounts import BYTES_PER_TOKEN
from pipeline.cache.codec.targets import SparseTargets
from pipeline.cache.io.reader import Cache, open_cache
from pipeline.cache.layout.names import MANIFEST
from pipeline.sampling.quantisation import rounding_log_bias
from pipeline.teacher.capture.fit_tau import FITTED_TAU
from tests.conftest import Stage, Tiny, digests

SIZE = r"[\d.]+ (?:bytes|[KMGT]iB)"
TAUS = ("--capture.tau", "0.08,0.04")
SCHEMES = {
    "threshold": ("--capture.scheme", "threshold", *TAUS),
    "top-k-sampled": ("--capture.scheme", "top_k_sampled", "--capture.top_k", "4", *TAUS),
}


def _targets(cache: Cache, split: str = "train") -> list[SparseTargets]:
    source = cache.source(split)
    return [
        row.targets
        for shard, rows in enumerate(source.shard_rows())
        for row in source.read_rows(shard, range(rows))
    ]


def _entries(cache: Path) -> float:
    """Return the mean entries of a supervised token."""
    shards = open_cache(str(cache)).records()
    return sum(r.entries for r in shards) / sum(r.loss_tokens for r in shards)


@pytest.fixture(scope="module")
def make(tiny: Tiny, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a cache by the given flags."""

    def run(*flags: object) -> Path:
        folder = tmp_path_factory.mktemp("sampled") / "cache"
        stage("cache_teacher", [*tiny.stage_one, "--cache_dir", folder, *flags]).ok()
        return folder

    return run


@pytest.fixture(scope="module")
def caches(make: Callable[..., Path]) -> dict[str, Path]:
    """Return one cache of each scheme."""
    return {name: make(*flags) for name, flags in SCHEMES.items()}


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written(name: str, caches: dict[str, Path]) -> None:
    cache = open_cache(str(caches[name]))
    scheme = cache.manifest.identity["scheme"]
    assert scheme["name"] == name
    assert scheme["taus"] == [0.08, 0.04]
    assert scheme.get("top_k") == (4 if name == "top-k-sampled" else None)
    assert cache.manifest.codec["inclusion_rule"]["taus"] == [0.08, 0.04]
    for targets in _targets(cache):
        assert targets.inclusion_E is not None
        always_kept_E = targets.inclusion_E == 1
        owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
        assert (np.bincount(owner_E[always_kept_E]) >= (4 if name == "top-k-sampled" else 1)).all()
        # What is sampled stands for the rest: the mass is 1 but for the draw's own noise.
        # The known factor of the dither is the loss's to take off.
        factor_E = np.where(always_kept_E, 0.0, rounding_log_bias(targets.sampled_step, 1.0))
        weight_E = np.exp(targets.logprobs_E - factor_E) / targets.inclusion_E
        mass_N = np.bincount(owner_E, weight_E)
        assert abs(mass_N.mean() - 1) < 0.1


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("temperature", ["1", "2"])
def test_a_student_at_each_temperature_of_one_cache(
    name: str, temperature: str, caches: dict[str, Path], tiny: Tiny, stage: Stage, tmp_path: Path
) -> None:
    flags = [
        *tiny.stage_two, "--cache_dir", caches[name], "--output_dir", tmp_path / "student",
        "--temperature", temperature,
    ]  # fmt: skip
    stage("train_student", flags).ok()
    assert (tmp_path / "student" / "model" / "config.json").exists()
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    heldout = [m["heldout/kl"] for m in map(json.loads, lines) if "heldout/kl" in m]
    assert 0 < heldout[-1] < 0.9 * heldout[0]


def test_a_temperature_off_the_grid(
    caches: dict[str, Path], tiny: Tiny, stage: Stage, tmp_path: Path
) -> None:
    flags = [
        *tiny.stage_two, "--cache_dir", caches["threshold"], "--output_dir", tmp_path / "student",
        "--max_steps", "2", "--temperature",
    ]  # fmt: skip
    message = stage("train_student", [*flags, "1.5"]).refused(2)
    assert "loss.temperature: found 1.5; expected one that the cache holds: 1, 2;" in message
    assert "--loss.uncached_temperature interpolated" in message
    assert not (tmp_path / "student").exists()
    stage("train_student", [*flags, "1.5", "--loss.uncached_temperature", "interpolated"]).ok()


def test_another_tau_is_another_cache(caches: dict[str, Path], tiny: Tiny, stage: Stage) -> None:
    before = digests(caches["threshold"])
    flags = [
        *tiny.stage_one, "--cache_dir", caches["threshold"], "--capture.scheme", "threshold",
        "--capture.tau", "0.08,0.05",
    ]  # fmt: skip
    message = stage("cache_teacher", flags).refused(3)
    assert "scheme.taus: [0.08, 0.04] there, [0.08, 0.05] asked for" in message
    assert digests(caches["threshold"]) == before


MEAN = ("--capture.scheme", "threshold", "--capture.mean_entries", "12")


def test_mean_entries_are_measured_once_and_frozen(
    make: Callable[..., Path], tiny: Tiny, stage: Stage
) -> None:
    folder = make(*MEAN)
    assert _entries(folder) == pytest.approx(12, rel=0.12)
    manifest = open_cache(str(folder)).manifest
    scheme = manifest.identity["scheme"]
    assert scheme["mean_entries"] == 12
    assert scheme["taus_before"] == [1 / 9, 1 / 23.5]
    assert scheme["taus"] != scheme["taus_before"]
    assert manifest.codec["inclusion_rule"]["taus"] == scheme["taus"]
    # The teacher that is not loaded again has nothing to say; nor has one that measures anew.
    before = digests(folder)
    flags = [*tiny.stage_one, "--cache_dir", folder, *MEAN]
    stage("cache_teacher", flags).ok()
    (folder / FITTED_TAU).unlink()
    (folder / MANIFEST).unlink()
    stage("cache_teacher", flags).ok()
    assert digests(folder) == before
    message = stage("cache_teacher", [*flags, "--capture.mean_entries", "13"]).refused(3)
    assert "scheme.mean_entries: 12.0 there, 13.0 asked for" in message
    assert digests(folder) == before
    message = stage("cache_teacher", flags[:-2]).refused(3)
    assert "another identity" in message
    assert digests(folder) == before


@pytest.mark.slow
def test_killed_after_the_calibration(
    tiny: Tiny, stage: Stage, make: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGKILL at every early write: what is frozen stays, and the cache comes out the same."""
    whole = digests(make(*MEAN) / "data")
    flags = [*tiny.stage_one, *MEAN, "--cache_dir"]
    for number in (1, 3, 6):
        folder = tmp_path / str(number)
        assert stage("cache_teacher", [*flags, folder], hook=("kill_at_sync", number)).code != 0
        stage("cache_teacher", [*flags, folder]).ok()
        assert digests(folder / "data") == whole, number


def test_dry_run(tiny: Tiny, stage: Stage, caches: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    out = stage("cache_teacher", [*tiny.stage_one, *MEAN, "--cache_dir", folder, "--dry-run"]).ok()
    found = re.search(r"^entries +([\d.]+) a supervised token with capture.tau ", out.out, re.M)
    assert found is not None, out.out
    assert float(found[1]) == pytest.approx(12, rel=0.2)
    assert re.search(rf"^cache +about {SIZE}, \d+\.\d {BYTES_PER_TOKEN}$", out.out, re.M)
    assert not folder.exists()
    before = digests(caches["threshold"])
    flags = [*tiny.stage_one, *SCHEMES["threshold"], "--cache_dir", caches["threshold"]]
    stage("cache_teacher", [*flags, "--dry-run"]).ok()
    assert digests(caches["threshold"]) == before


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--capture.tau", "0.1,0.1"], "of the sampled schemes: found them with capture.scheme"),
        (["--capture.mean_entries", "9"], "of the sampled schemes: found them with capture.scheme"),
        (["T", "--capture.tau", "1.0,0.1"], "capture.tau: found [1.0, 0.1], expected values in"),
        (["T", "--capture.tau=-0.1,0.1"], "capture.tau: found [-0.1, 0.1], expected values in (0"),
        (["T", "--capture.tau", "nan,0.1"], "capture.tau: found 'nan', expected a finite number"),
        (["T", "--capture.tau", "0,0"], "capture.tau: found [0.0, 0.0], expected values in (0, 1)"),
        (["T", "--capture.tau", "0.1"], "capture.tau: found 1 values, expected one for each of"),
        (["T", "--capture.tau", "0.1,1e-5"], "may keep 100010 entries, expected at most 4096"),
        (["T", "--capture.tau", "0.1,0"], "found 0 at temperature 2, the highest of capture.temp"),
        (["T", "--capture.temperatures", ""], "capture.temperatures: found None, expected list"),
        (["T", "--capture.mean_entries", "1"], "capture.mean_entries: found 1"),
        (["T", "--capture.mean_entries", "3000"], "capture.mean_entries: found 3000"),
        (
            ["S", "--capture.top_k", "30", "--capture.mean_entries", "12"],
            "capture.mean_entries: found 12, expected more than 31, which are kept in any case",
        ),
        (
            ["T", "--teacher.engine", "vllm", "--teacher.capture_path", "prompt_logprobs"],
            "capture.scheme: found threshold through prompt_logprobs, expected top_k",
        ),
    ],
)
def test_refusals(flags: list[str], wanted: str, tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    schemes = {"T": "threshold", "S": "top_k_sampled"}
    if flags[0] in schemes:
        flags = ["--capture.scheme", schemes[flags[0]], *flags[1:]]
    folder = tmp_path / "cache"
    message = stage("cache_teacher", [*tiny.stage_one, "--cache_dir", folder, *flags]).refused(2)
    assert wanted in message
    assert not folder.exists() or not list(folder.rglob("*.parquet"))


def test_a_vocabulary_that_is_too_large(tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in tiny.teacher.iterdir():
        (teacher / file.name).write_bytes(file.read_bytes())
    config = json.loads((teacher / "config.json").read_text())
    config["vocab_size"] = 1 << 19
    (teacher / "config.json").write_text(json.dumps(config))
    flags = [*tiny.stage_one, "--teacher_model", teacher, "--cache_dir", tmp_path / "cache"]
    for scheme in ("top_k", "threshold"):
        message = stage("cache_teacher", [*flags, "--capture.scheme", scheme]).refused(2)
        assert "found a vocabulary of 524288 tokens, expected at most 524287 (2^19 - 1)" in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_that_are_not_finite_are_named_and_quarantined(
    name: str, caches: dict[str, Path], tiny: Tiny, stage: Stage, tmp_path: Path
) -> None:
    source = open_cache(str(caches[name])).source("train")
    (row,) = source.read_rows(0, [1])
    flags = [
        *tiny.stage_one, *SCHEMES[name], "--cache_dir", tmp_path / "cache",
        "--capture.max_quarantined_fraction", "0.2",
    ]  # fmt: skip
    hook = ("poison", "nan", [row.sample_id])
    message = stage("cache_teacher", flags, hook=hook).refused(5)
    assert f"sample {row.sample_id}" in message
    assert "the logits of supervised position 1 are not finite" in message
    counts = open_cache(str(tmp_path / "cache")).manifest.corpus_counts
    assert counts["rows_quarantined"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_vllm_draws_the_same_tokens(
    name: str, caches: dict[str, Path], make: Callable[..., Path]
) -> None:
    """Noise is the sample's, not the engine's: the draws agree but where rounding decides."""
    folder = make(
        *SCHEMES[name], "--teacher.engine", "vllm", "--teacher.kv_cache_gib", "0.25",
        "--no-bf16", "--no-fp16",
    )  # fmt: skip
    ours, theirs = (_targets(open_cache(str(path))) for path in (caches[name], folder))
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        ends_a, ends_b = np.cumsum(a.counts_N), np.cumsum(b.counts_N)
        for n in range(a.num_positions):
            ids_a = set(a.token_ids_E[ends_a[n] - a.counts_N[n] : ends_a[n]].tolist())
            ids_b = set(b.token_ids_E[ends_b[n] - b.counts_N[n] : ends_b[n]].tolist())
            same += len(ids_a & ids_b)
            total += len(ids_a | ids_b)
    assert same / total > 0.97


@pytest.mark.slow
def test_a_student_of_what_vllm_drew(
    make: Callable[..., Path], tiny: Tiny, stage: Stage, tmp_path: Path
) -> None:
    folder = make(
        *MEAN, "--teacher.engine", "vllm", "--teacher.kv_cache_gib", "0.25", "--no-bf16",
        "--no-fp16",
    )  # fmt: skip
    assert _entries(folder) == pytest.approx(12, rel=0.12)
    flags = [*tiny.stage_two, "--cache_dir", folder, "--output_dir", tmp_path / "student"]
    stage("train_student", [*flags, "--temperature", "2"]).ok()
