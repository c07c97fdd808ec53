"""One pod of a teacher that spans nodes: a group's first runs stage one, the others lend GPUs.

The pods of a job form groups by their index. vLLM reaches the GPUs of a group through Ray, whose
head is in the first pod; that pod alone holds leases and writes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, EngineStalled, ModelError, run_command

__all__ = ["GROUP_NODES", "Place", "follow", "lead", "main", "place_of"]

GROUP_NODES = "DISTILL_GROUP_NODES"
"""Variable: nodes of a group. The job's name, the pod's index and address are others."""
PORT = 6379
"""Of Ray's head."""
_RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats")
_ENDED_S = 60.0
"""A head that is away for so long has ended, if the cache is complete; else it is restarted."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod is."""

    rank: int
    """Of its group; 0 leads."""
    nodes: int
    head: str
    """Host name of its group's first pod."""
    address: str
    """Its own address."""


def place_of(variables: Mapping[str, str]) -> Place:
    """Read a pod's place from its environment.

    Raises:
        ConfigError: this is no pod of such a job.
    """
    try:
        nodes, index = int(variables[GROUP_NODES]), int(variables["DISTILL_REPLICA_INDEX"])
        head = f"{variables['DISTILL_JOB']}-worker-{index - index % nodes}"
        return Place(index % nodes, nodes, head, variables["VLLM_HOST_IP"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{error}: not in the environment",
            expected="a pod of `make cache-teacher OVERLAY=...` whose teacher spans nodes",
        ) from None


def lead(place: Place, stage: Callable[[], int]) -> int:
    """Start Ray's head, then run stage one in this process; vLLM waits for the other nodes.

    Raises:
        EngineStalled: a node of the group was not there: another try may find it.
        DistillError: what stage one raises.
    """
    subprocess.run(
        [*_RAY, "--head", f"--port={PORT}", f"--node-ip-address={place.address}",
         "--include-dashboard=false"],
        check=True,
    )  # fmt: skip
    os.environ["RAY_ADDRESS"] = f"{place.address}:{PORT}"
    try:
        return stage()
    except ModelError as error:
        there = _nodes()
        if there >= place.nodes:
            raise
        raise EngineStalled(
            f"{there} of {place.nodes} nodes of the teacher are there ({error.found})",
            do="it is tried again; look after the pods of the others",
        ) from error


def _nodes() -> int:
    ray: Any = importlib.import_module("ray")  # in the image alone
    return sum(bool(node["Alive"]) for node in ray.nodes()) if ray.is_initialized() else 0


def follow(
    place: Place,
    is_done: Callable[[], bool],
    *,
    is_there: Callable[[str], bool] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Lend this node to the group's head, as often as that starts, until the cache is complete.

    Args:
        place: of this pod.
        is_done: whether the cache is complete.
        is_there: whether a head answers at a host name.
        sleep: waits.
    """
    away_s = 0.0
    command = [*_RAY, f"--address={place.head}:{PORT}", f"--node-ip-address={place.address}"]
    while True:
        if (is_there or _answers)(place.head):
            away_s = 0.0
            print(f"lending this node's GPUs to {place.head}", flush=True)
            with subprocess.Popen([*command, "--block"]) as node:
                try:
                    node.wait()
                finally:
                    node.terminate()
        elif away_s >= _ENDED_S and is_done():
            print("the cache is complete", flush=True)
            return 0
        sleep(2.0)
        away_s += 2.0


def _answers(host: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, PORT), timeout=2):
        return True
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one pod; the flags are those of stage one."""
    from stages.cache_teacher import main as cache_teacher
    from stages.cache_teacher import teacher_command

    arguments = list(sys.argv[1:] if argv is None else argv)
    place = place_of(os.environ)
    run = teacher_command(arguments).settings
    if place.rank == 0:
        return lead(place, lambda: cache_teacher(arguments))
    from pipeline.cache.layout.names import MANIFEST
    from pipeline.storage import Store
    from pipeline.teacher.fleet.signals import interruptible

    with interruptible():
        return follow(place, lambda: Store(run.cache_dir).exists(MANIFEST))


if __name__ == "__main__":
    sys.exit(run_command(main))
