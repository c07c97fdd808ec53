"""Settings against what a cache's targets can serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.cache.layout.manifest import Manifest
from pipeline.data.settings import DataSettings
from pipeline.errors import ConfigError
from pipeline.loss.settings import LossSettings
from pipeline.sampling.inclusion import InclusionRule
from pipeline.student.compatibility import (
    TextKnown,
    cache_inclusion_rule,
    cache_sampled_step,
    check_compatibility,
)

GRID = (1.0, 2.0)
ONE = InclusionRule(GRID, (1 / 32, 0.0))
HIGH = InclusionRule(GRID, (0.0, 1 / 40))
BOTH = InclusionRule(GRID, (1 / 32, 1 / 40))


def refused(
    rule: InclusionRule | None,
    max_entries: int | None = None,
    text: TextKnown | None = None,
    **loss: Any,
) -> list[str]:
    """Return the mistakes, none where there is none."""
    settings = LossSettings.model_validate(loss)
    data = DataSettings.model_validate({"max_entries": max_entries})
    try:
        check_compatibility(settings, data, grid=GRID, rule=rule, text=text)
    except ConfigError as error:
        return list(error.mistakes)
    return []


@pytest.mark.parametrize("rule", [None, BOTH])
@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl"]
)
def test_the_default_tail_fits_every_cache(
    rule: InclusionRule | None, temperature: float, divergence: str
) -> None:
    assert not refused(rule, temperature=temperature, divergence=divergence)


def test_temperatures() -> None:
    (mistake,) = refused(BOTH, temperature=3)
    assert mistake.startswith("loss.temperature: found 3; expected one that the cache holds: 1, 2;")
    assert "--capture.temperatures 1,2,3" in mistake
    assert not refused(BOTH, temperature=3, uncached_temperature="self_normalised")
    assert not refused(BOTH, temperature=1.5, uncached_temperature="interpolated")
    (mistake,) = refused(BOTH, temperature=1.5)
    assert "--loss.uncached_temperature interpolated" in mistake
    (mistake,) = refused(BOTH, temperature=3, uncached_temperature="interpolated")
    assert "--loss.uncached_temperature self_normalised" in mistake
    assert not refused(BOTH, temperature=3, alpha=0)
    (mistake,) = refused(ONE, temperature=2)
    assert mistake.startswith("loss.temperature: found 2; expected at most 1, the highest temp")
    # No normaliser helps where the entries themselves are too few.
    assert refused(ONE, temperature=3, uncached_temperature="self_normalised")
    assert not refused(HIGH, temperature=1)
    assert not refused(ONE, temperature=1)
    assert not refused(ONE, temperature=2, tail="bucket")


def test_tail_policies() -> None:
    (mistake,) = refused(None, tail="control_variate")
    assert mistake.startswith("loss.tail: found control_variate with a top-k cache")
    (mistake,) = refused(None, control_variate=0.5)
    assert mistake.startswith("loss.control_variate: found 0.5 with a top-k cache")
    for tail in ("auto", "control_variate", "zero", "renormalise", "bucket"):
        assert not refused(BOTH, tail=tail)
    for tail in ("auto", "zero"):
        assert not refused(ONE, tail=tail, temperature=1, divergence="skew_kl")


def test_all_mistakes_at_once() -> None:
    found = refused(BOTH, max_entries=4, temperature=3)
    assert [mistake.split(":")[0] for mistake in found] == ["loss.temperature", "data.max_entries"]


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"found zero with loss\.divergence reverse_kl"):
        LossSettings.model_validate({"divergence": "reverse_kl", "tail": "zero"})
    with pytest.raises(ValueError, match=r"found 0\.5 with loss\.tail bucket"):
        LossSettings.model_validate({"tail": "bucket", "control_variate": 0.5})


def test_the_rule_of_a_cache() -> None:
    manifest = Manifest({}, {"name": "x"}, GRID, (), {}, {}, 1)
    assert cache_inclusion_rule(manifest) is None
    assert cache_inclusion_rule(replace(manifest, codec={"inclusion_rule": BOTH.to_json()})) == BOTH
    assert [rule.highest for rule in (ONE, BOTH, HIGH)] == [1, 2, 2]
    quantisation = {"sampled_step": 0.5}
    assert (
        cache_sampled_step(
            replace(manifest, codec={"inclusion_rule": None, "quantisation": quantisation})
        )
        == 0
    )
    assert (
        cache_sampled_step(
            replace(
                manifest, codec={"inclusion_rule": BOTH.to_json(), "quantisation": quantisation}
            )
        )
        == 0.5
    )


def test_the_policy_gradient_needs_written_text_and_the_clip_its_log_probs() -> None:
    loss = {"divergence": "sampled_reverse_kl", "temperature": 1.0}
    corpus, bare, known = TextKnown(False, False), TextKnown(True, False), TextKnown(True, True)
    (mistake,) = refused(BOTH, text=corpus, **loss)
    assert "sampled_reverse_kl with a cache of text that no model wrote" in mistake
    assert not refused(BOTH, text=bare, **loss)
    (mistake,) = refused(None, text=bare, importance_clip=2.0, **loss)
    assert "loss.importance_clip: found 2 with a cache without the writer's log-probs" in mistake
    assert "--generate.record_logprobs" in mistake
    assert not refused(None, text=known, importance_clip=2.0, **loss)
    assert not refused(BOTH, text=corpus)
