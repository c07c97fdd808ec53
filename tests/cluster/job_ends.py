"""What becomes of a job on the stand-in of a cluster: a script's end, or its pods as processes."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from tests.cluster.api_stub import ApiStub
from tests.cluster.pod_process import Isolation, Node, PodProcess

Object = dict[str, Any]


def ends(kind: str, *, reason: str = "", completed: bool = True, after_s: float = 1.0) -> Any:
    """Return what becomes of a PyTorchJob: its worker runs, prints a line, and it ends."""

    def script(api: ApiStub, job: Object) -> None:
        api.add_pod(job, log="step 1, loss=2.5\n")
        running = {"type": "Running", "status": "True"}
        api.set_status(job, {"conditions": [running]})
        time.sleep(after_s)
        api.end_job(job, kind, reason=reason, completed=completed)

    return script


def never_ends(api: ApiStub, job: Object) -> None:
    api.add_pod(job, log="waiting\n")
    api.set_status(job, {"conditions": [{"type": "Running", "status": "True"}]})


def one_error(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


class Kubelet:
    """Runs the pods of a Job as processes, on a volume of the test, and reports their end."""

    def __init__(self, volume: Path, work: Path) -> None:
        self.volume, self.work = volume, work
        self.commands: list[list[str]] = []

    def __call__(self, api: ApiStub, job: Object) -> None:
        documents = list(api.objects.values())
        with Node(self.work, self.volume, Isolation.LOOPBACK) as node:
            pods = [
                PodProcess(node, self._pod(job, index), documents)
                for index in range(job["spec"].get("completions", 1))
            ]
            for pod in pods:
                container = pod.pod["spec"]["containers"][0]
                self.commands.append([*container["command"], *container["args"]])
                pod.start()
            codes = [pod.process.wait(240) for pod in pods if pod.process is not None]
            failed = any(codes)
            log = "".join(pod.log for pod in pods)
            api.add_pod(job, log=log, phase="Failed" if failed else "Succeeded")
        if failed:
            api.end_job(job, "Failed", reason="BackoffLimitExceeded", completed=False)
        else:
            api.end_job(job, "Complete")

    @staticmethod
    def _pod(job: Object, index: int) -> Object:
        template = copy.deepcopy(job["spec"]["template"])
        name = f"{job['metadata']['name']}-{index}"
        annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
        metadata = {**template["metadata"], "name": name, "annotations": annotations}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
