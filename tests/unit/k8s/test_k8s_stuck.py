"""A pod that could not start for a while, and then could, has all of its time again."""

from __future__ import annotations

import pytest

from k8s.submission import submit
from k8s.submission.submit import JobFailed, _raise_if_stuck

LIMIT_S = 120.0


def test_the_time_of_a_pod_begins_again_once_it_has_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    since: dict[str, float] = {}

    def look(now: float, *stuck: str) -> None:
        monkeypatch.setattr(submit.time, "monotonic", lambda: now)
        reasons = dict.fromkeys(stuck, "ImagePullBackOff: the registry is away")
        _raise_if_stuck("exp1", "distill", reasons, since, LIMIT_S)

    look(0.0, "pod-0", "pod-1")
    look(100.0, "pod-1")  # pod-0 has started
    look(119.0, "pod-0", "pod-1")  # and stands still again
    with pytest.raises(JobFailed, match=r"pod-1 cannot start .ImagePullBackOff"):
        look(120.0, "pod-0", "pod-1")
    look(238.0, "pod-0")
    with pytest.raises(JobFailed, match="pod-0 cannot start"):
        look(239.0, "pod-0")
