"""Capture settings become a scheme; its defaults, its identity, and what it will take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.cache.codec.spec import CodecSpec
from pipeline.config import fingerprint
from pipeline.models.resolved import ResolvedModel
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import HELDOUT_QUANTISATION, SAMPLED_QUANTISATION
from pipeline.teacher.capture.identity import as_begun, cache_identity
from pipeline.teacher.costs import expected_entries
from pipeline.teacher.engines.base import EngineInfo
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.scheme import OVERSAMPLING, capture_scheme


def scheme(**capture: Any) -> SparseScheme:
    return capture_scheme(CaptureSettings.model_validate(capture))


def test_what_the_settings_ask_for() -> None:
    grid = (1.0, 2.0)
    assert scheme(top_k=9, heldout="same") == SparseScheme(9, grid)
    held = SparseScheme(9, grid, InclusionRule(grid, (1 / 64, 1 / 64)), HELDOUT_QUANTISATION)
    assert scheme(top_k=9) == SparseScheme(9, grid, heldout=held)
    assert scheme(top_k=9).of_split("heldout") == held
    assert capture_scheme(CaptureSettings(), on_device=False).heldout is None
    sampled = scheme(scheme="threshold", tau=(0.1, 0.05))
    assert sampled == SparseScheme(
        1, (1.0, 2.0), InclusionRule((1.0, 2.0), (0.1, 0.05)), SAMPLED_QUANTISATION,
        oversampling=OVERSAMPLING,
    )  # fmt: skip
    assert sampled.name == "threshold"
    assert "top_k" not in sampled.to_json()
    assert scheme(scheme="top_k_sampled", top_k=9, tau=(0.1, 0.05)).top_k == 9


@pytest.mark.parametrize(
    ("grid", "taus"),
    [
        ((1.0,), (1 / 28,)),
        ((1.0, 2.0), (1 / 9, 1 / 23.5)),
        ((4.0, 1.0, 2.0), (1 / 23.5, 1 / 9, 0.0)),
        ((0.5, 1.0), (0.0, 1 / 28)),
    ],
)
def test_default_taus(grid: tuple[float, ...], taus: tuple[float, ...]) -> None:
    """One is sampled for at 1, and one at the highest temperature, which no rule may leave out."""
    rule = scheme(scheme="threshold", temperatures=grid).rule
    assert rule is not None
    assert rule.taus == taus
    assert rule.highest == max(grid)
    CaptureSettings.model_validate({"scheme": "threshold", "temperatures": grid, "tau": taus})


@pytest.mark.parametrize(
    "settings",
    [
        {"capture": {"heldout": "sampled"}, "teacher": {"capture_path": "prompt_logprobs"}},
        {
            "capture": {"heldout": "sampled", "temperatures": [1.0]},
            "teacher": {"engine": "openai", "endpoint": {"urls": ["http://a:1"]}},
        },
        {"capture": {"heldout": "sampled", "scheme": "threshold"}},
    ],
)
def test_held_out_rows_that_cannot_be_sampled(settings: dict[str, Any]) -> None:
    """Where it is left to the engine, such rows are as the training rows."""
    from pipeline.api.settings import TeacherRun

    with pytest.raises(ValidationError, match=r"capture\.heldout: found sampled"):
        TeacherRun.model_validate(settings)


def test_an_empty_grid() -> None:
    with pytest.raises(ValueError, match=r"found an empty list, expected at least \[1\.0\]"):
        CaptureSettings.model_validate({"temperatures": ()})


def test_fitted_tau_is_in_the_identity_and_can_be_taken_out() -> None:
    before = scheme(scheme="threshold", mean_entries=12)
    after = SparseScheme(
        1, before.temperatures, InclusionRule((1.0, 2.0), (0.07, 0.035)), before.quantisation, 12,
        before.taus_before, before.oversampling,
    )  # fmt: skip

    def identity(of: SparseScheme) -> dict[str, Any]:
        codec = CodecSpec(600, of.rule, of.quantisation).to_json()
        return {"corpus": {"name": "x"}, "scheme": of.to_json(), "codec": codec}

    assert identity(after)["scheme"]["mean_entries"] == 12
    assert identity(before) != identity(after)
    assert as_begun(identity(after)) == identity(before)
    assert as_begun(identity(before)) == identity(before)
    assert identity(before) != identity(scheme(scheme="threshold", mean_entries=13))
    assert identity(before) != identity(scheme(scheme="threshold"))


def test_expected_entries() -> None:
    """Beside what was measured: 7.8, 18.5 and 51 at T = 1; 26 at two temperatures; 38 at T = 2."""

    def at(*taus: float) -> float:
        grid = (1.0, 2.0)[: len(taus)]
        return expected_entries(SparseScheme(0, grid, InclusionRule(grid, taus)))

    for found, measured in (
        (at(1 / 16), 7.8), (at(1 / 50), 18.5), (at(1 / 200), 51), (at(1 / 12, 1 / 25), 26),
        (at(0.0, 1 / 40), 38),
    ):  # fmt: skip
        assert found == pytest.approx(measured, rel=0.2)
    assert expected_entries(SparseScheme(64, (1.0,))) == 64
    assert expected_entries(scheme(scheme="threshold", mean_entries=9)) == 9


def test_mistakes_of_several_fields_are_told_together() -> None:
    with pytest.raises(ValidationError) as caught:
        CaptureSettings.model_validate(
            {"scheme": "treshold", "tau": (1.5,), "temperatures": (2.0,)}
        )
    wrong = {error["loc"] for error in caught.value.errors()}
    assert wrong == {("scheme",), ("temperatures",), ("tau",)}


class _Tokenizer:
    """As much of one as its fingerprint takes."""

    def __init__(self, *words: str) -> None:
        self._vocabulary = {word: number for number, word in enumerate(words)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def __len__(self) -> int:
        return len(self._vocabulary)


_HELDOUT = SparseScheme(4, (1.0, 2.0), InclusionRule((1.0, 2.0), (0.1, 0.1)))
_PARTS: dict[str, Any] = {
    "teacher": ResolvedModel("name", Path("/somewhere"), "revision"),
    "engine": EngineInfo("vllm", "1.0", "float32", "cpu"),
    "tokenizer": _Tokenizer("a", "b"),
    "corpus_identity": {"rows": 3},
    "scheme": SparseScheme(4, (1.0, 2.0)),
    "spec": CodecSpec(600),
    "shard_tokens": 1000,
    "batch_tokens": 2048,
    "head_rows": 256,
}


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("teacher", ResolvedModel("another", Path("/somewhere"), "revision")),
        ("teacher", ResolvedModel("name", Path("/somewhere"), "another")),
        ("engine", EngineInfo("transformers", "1.0", "float32", "cpu")),
        ("engine", EngineInfo("vllm", "1.1", "float32", "cpu")),
        ("engine", EngineInfo("vllm", "1.0", "bfloat16", "cpu")),
        ("engine", EngineInfo("vllm", "1.0", "float32", "cuda")),
        ("tokenizer", _Tokenizer("a", "c")),
        ("corpus_identity", {"rows": 4}),
        ("scheme", SparseScheme(5, (1.0, 2.0))),
        ("scheme", SparseScheme(4, (1.0, 2.5))),
        ("scheme", SparseScheme(4, (1.0, 2.0), heldout=_HELDOUT)),
        ("scheme", SparseScheme(4, (1.0, 2.0), heldout=replace(_HELDOUT, top_k=5))),
        ("spec", CodecSpec(600, heldout=CodecSpec(600, _HELDOUT.rule))),
        ("spec", CodecSpec(600, largest_known=True)),
        ("spec", CodecSpec(601)),
        ("shard_tokens", 1001),
        ("batch_tokens", 1024),
        ("head_rows", 128),
        ("parallel", 2),
        ("batch_invariant", True),
        ("options", {"enforce_eager": True}),
    ],
)
def test_what_decides_the_last_bits_changes_the_identity(part: str, other: Any) -> None:
    before = fingerprint(cache_identity(**_PARTS))
    assert fingerprint(cache_identity(**_PARTS)) == before
    assert fingerprint(cache_identity(**_PARTS | {part: other})) != before


def test_where_the_files_are_does_not_change_the_identity() -> None:
    moved = ResolvedModel("name", Path("/elsewhere"), "revision")
    assert cache_identity(**_PARTS | {"teacher": moved}) == cache_identity(**_PARTS)
