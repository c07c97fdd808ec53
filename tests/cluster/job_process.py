"""A PyTorchJob as operator and kubelet run it: pods, restarts in place, when it is done."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from k8s.cluster.expand import Operator, pods_for
from k8s.rendering.render import RenderedJob
from tests.cluster.pod_process import Node, PodProcess


@dataclass
class JobProcess:
    """The pods of one job."""

    node: Node
    rendered: RenderedJob
    operator: Operator
    pods: list[PodProcess] = field(init=False)

    def __post_init__(self) -> None:
        self.pods = [
            PodProcess(self.node, pod, self.rendered.documents)
            for pod in pods_for(self.rendered.job, self.operator)
        ]
        for pod in self.pods:  # every name resolves before the first pod starts
            self.node.address(pod.name)

    @property
    def log(self) -> str:
        return "\n".join(f"==== {pod.name}\n{pod.log}" for pod in self.pods)

    def run(self, *, disturb: Callable[[JobProcess], bool] | None = None, timeout_s: float) -> None:
        """Run to the end.

        Args:
            disturb: called in a loop until it returns true: it has done its harm.
            timeout_s: an end that does not come by then is a failure.
        """
        spec = self.rendered.job["spec"]
        elastic = "elasticPolicy" in spec
        end = time.monotonic() + timeout_s
        try:
            for pod in self.pods:
                pod.start()
            while True:
                assert time.monotonic() < end, f"not done after {timeout_s:g} s\n{self.log}"
                if disturb is not None and disturb(self):
                    disturb = None
                codes = [pod.exit_code() for pod in self.pods]
                # With an elastic policy the first worker that succeeds makes the job a success.
                if (any if elastic else all)(code == 0 for code in codes):
                    break
                for pod, code in zip(self.pods, codes, strict=True):
                    if code not in (None, 0):  # restartPolicy OnFailure
                        restarts = sum(other.restarts for other in self.pods)
                        limit = spec["runPolicy"]["backoffLimit"]
                        assert restarts < limit, f"backoffLimit {limit} reached\n{self.log}"
                        time.sleep(0.5)
                        pod.restart()
                time.sleep(0.002)
            assert disturb is None, f"the job ended undisturbed\n{self.log}"
            # cleanPodPolicy Running: what still runs gets SIGTERM.
            for pod in self.pods:
                if pod.exit_code() is None:
                    pod.kill(signal.SIGTERM)
            for pod in self.pods:
                assert pod.process is not None
                pod.process.wait(60)
        finally:
            for pod in self.pods:
                if pod.process is not None and pod.exit_code() is None:
                    pod.kill()
