"""What launchers set: read, or rejected in words."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError, DistillError
from pipeline.student.training.distributed import Distributed, peer_errors, read_distributed

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _set(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.setenv(name, value)


def test_no_launcher_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch)
    assert read_distributed() == Distributed(rank=0, local_rank=0, world_size=1)
    assert read_distributed() == Distributed(rank=0, local_rank=0, world_size=1), "and stays one"


def test_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, "3", "1", "4", "node", "29500")
    distributed = read_distributed()
    assert distributed == Distributed(rank=3, local_rank=1, world_size=4)
    assert not distributed.is_first


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("0", "0", "2"), "set RANK, LOCAL_RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT"),
        (("2", "0", "2", "node", "29500"), "RANK is 2 in a WORLD_SIZE of 2; expected a rank below"),
        (("-1", "0", "2", "node", "29500"), "RANK is -1 in a WORLD_SIZE of 2"),
        (("one", "0", "2", "node", "29500"), "expected integers"),
    ],
)
def test_what_contradicts(
    values: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, *values)
    with pytest.raises(ConfigError) as caught:
        read_distributed()
    assert said in str(caught.value)


def test_only_a_collectives_error_is_a_lost_peer() -> None:
    two, one = (
        Distributed(rank=1, local_rank=1, world_size=2),
        Distributed(rank=0, local_rank=0, world_size=1),
    )
    gloo = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1234\nmore"
    with pytest.raises(DistillError, match="rank 1 lost another rank") as caught, peer_errors(two):
        raise RuntimeError(gloo)
    assert "more" not in str(caught.value)
    with pytest.raises(RuntimeError, match="shape") as other, peer_errors(two):
        raise RuntimeError("shape mismatch")
    assert not isinstance(other.value, DistillError)
    with pytest.raises(RuntimeError, match="gloo"), peer_errors(one):
        raise RuntimeError(gloo)
