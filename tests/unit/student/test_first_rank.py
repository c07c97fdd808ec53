"""One rank works for longer than any timeout, fails, or dies; the others wait, or end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from pipeline.errors import DistillError
from pipeline.student.engine.first_rank import on_first_rank


def _wait(store: Any, timeout_s: float) -> None:
    result = on_first_rank(
        lambda: pytest.fail("another rank's work"), store, is_first=False, name="init",
        timeout_s=timeout_s,
    )  # fmt: skip
    assert result is None


def test_work_may_take_longer_than_the_timeout() -> None:
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(_wait, store, 0.3)
        done = on_first_rank(
            lambda: time.sleep(1.0) or "folder", store, is_first=True, name="init", timeout_s=0.3
        )
        assert done == "folder"
        other.result(5)


def test_a_failure_ends_the_others() -> None:
    store, before = HashStore(), threading.active_count()

    def fail() -> None:
        raise DistillError("no room")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(_wait, store, 30)
        with pytest.raises(DistillError, match="no room"):
            on_first_rank(fail, store, is_first=True, name="init", timeout_s=30)
        with pytest.raises(DistillError, match="rank 0 failed at its part"):
            other.result(5)
    assert threading.active_count() <= before


def test_a_store_that_ends_with_the_first_rank_ends_the_others() -> None:
    class Gone:
        def check(self, _keys: list[str]) -> bool:
            raise RuntimeError("Connection was likely closed. Did the remote server shutdown?")

    with pytest.raises(DistillError, match=r"rank 0 is gone \(init: Connection was likely"):
        _wait(Gone(), 5)


def test_no_sign_of_life_ends_the_others() -> None:
    with pytest.raises(DistillError, match=r"no sign of life for 0\.2 s \(init\)"):
        _wait(HashStore(), 0.2)
