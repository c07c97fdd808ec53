"""Where workers start to look for shards: numbered pods evenly, whatever their number."""

from __future__ import annotations

import pytest

from pipeline.teacher.worker import first_shard


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 13, 32])
def test_numbered_workers_are_spread(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1000
    starts = []
    for index in range(workers):
        monkeypatch.setenv("DISTILL_REPLICA_INDEX", str(index))
        starts.append(first_shard("any", count))
    assert all(0 <= start < count for start in starts)
    ordered = sorted(starts)
    gaps = [b - a for a, b in zip(ordered, [*ordered[1:], ordered[0] + count], strict=True)]
    # The largest gap of golden-ratio points is below 2.62 times the even one (three-gap theorem).
    assert max(gaps) <= 2.62 * count / workers + 1
    assert min(gaps) > 0


def test_workers_without_a_number_start_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTILL_REPLICA_INDEX", raising=False)
    starts = {first_shard(name, 1000) for name in ("a", "b", "c", "d")}
    assert len(starts) == 4
    assert first_shard("a", 1000) == first_shard("a", 1000)
    assert first_shard("a", 0) == 0
    monkeypatch.setenv("DISTILL_REPLICA_INDEX", "3")
    assert first_shard("a", 0) == 0
