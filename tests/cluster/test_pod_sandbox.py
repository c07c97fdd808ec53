"""The sandbox of a simulated pod: name, network, mounts, and a root it cannot write to."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from k8s.cluster.expand import pods_for
from k8s.cluster.objects import main_container
from k8s.rendering.render import render_job
from tests.cluster.pod_process import Isolation, Node, PodProcess, best_isolation

# Standard library only, so that it takes no time to import.
PROBE = """
import json, os, pathlib, socket, sys
def writes(folder):
    try:
        (pathlib.Path(folder) / "x").write_text("x")
        return True
    except OSError:
        return False
me, config = socket.gethostname(), pathlib.Path(sys.argv[1])
other = me[:-1] + "1"
try:
    address = socket.gethostbyname(other)
except OSError:
    address = None
print(json.dumps({
    "host": me, "other": address, "config": "cache_dir" in config.read_text(), "pid": os.getpid(),
    "directory": os.getcwd(), "index": os.environ["DISTILL_REPLICA_INDEX"],
    "volume": writes(os.getcwd()), "root": [writes(folder) for folder in sys.argv[2:]],
}))
"""


@pytest.mark.parametrize("isolation", [best_isolation(), Isolation.LOOPBACK])
def test_a_pod_sees_what_its_manifest_says(isolation: Isolation, tmp_path: Path) -> None:
    rendered = render_job(stage="cache-teacher", run="probe", overlay="local-kind")
    pods = pods_for(copy.deepcopy(rendered.job))
    volume = tmp_path / "volume"
    with Node(tmp_path / "node", volume, isolation) as node:
        for pod in pods:
            node.address(pod["metadata"]["name"])
        container = main_container(pods[0])
        container["command"] = ["python", "-c", PROBE]
        container["args"] = container["args"][1:]
        if isolation is Isolation.NAMESPACES:  # elsewhere they are this machine's own
            container["args"] += ["/", "/usr", "/etc", "/etc/distill"]
        process = PodProcess(node, pods[0], rendered.documents)
        process.start()
        assert process.process is not None
        assert process.process.wait(60) == 0, process.log
        seen = json.loads(process.log)
    assert seen["config"] is True
    assert seen["index"] == "0"
    assert seen["volume"] is True
    assert (volume / "distill/x").exists()
    if isolation is Isolation.NAMESPACES:
        assert seen["host"] == pods[0]["metadata"]["name"]
        assert seen["other"] == node.addresses[pods[1]["metadata"]["name"]]
        assert seen["directory"] == "/fsx"
        assert seen["pid"] == 1
        assert seen["root"] == [False, False, False, False]
    else:
        assert seen["directory"] == str(volume / "distill")
