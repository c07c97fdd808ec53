"""The state of a job and its pods, read from the objects that the API server returns; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from k8s.cluster.objects import Object
from pipeline.errors import FINAL_EXIT_CODES, last_word_code

__all__ = ["FinalEnd", "JobState", "final_end", "job_state", "pods_line", "running", "stuck_pods"]

# Reasons that waiting does not resolve: a wrong image, a missing Secret or ConfigMap, a program
# that ends again and again.
_STUCK = {
    "CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "ErrImagePull",
    "ImagePullBackOff", "InvalidImageName", "RunContainerError",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a job, whatever its kind."""

    phase: Literal["waiting", "running", "succeeded", "failed"]
    reason: str


@dataclass(frozen=True, slots=True)
class FinalEnd:
    """An end of a pod's container that another try does not change."""

    pod: str
    exit_code: int
    message: str


def job_state(item: Object) -> JobState:
    """Read the conditions; a failure counts even where no completion time is set."""
    status = item.get("status") or {}
    true = {
        str(condition.get("type")): condition
        for condition in status.get("conditions") or []
        if str(condition.get("status")) == "True"
    }
    for name, phase in (
        ("Failed", "failed"), ("Succeeded", "succeeded"), ("Complete", "succeeded"),
        ("Completed", "succeeded"),
    ):  # fmt: skip
        if name in true:
            condition = true[name]
            parts = [str(condition.get(key) or "") for key in ("reason", "message")]
            return JobState(phase, ": ".join(part for part in parts if part))  # type: ignore[arg-type]
    if "Suspended" in true:
        return JobState("waiting", "suspended (a queue holds it)")
    active = [status, *(status.get("jobsStatus") or [])]
    runs = "Running" in true or any(part.get("active") for part in active)
    return JobState("running" if runs else "waiting", "")


def stuck_pods(pods: Iterable[Object]) -> dict[str, str]:
    """Return, by pod, why its container cannot start, where waiting does not resolve it."""
    found = {}
    for pod in pods:
        for container in _statuses(pod):
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _STUCK:
                ended = (container.get("lastState") or {}).get("terminated") or {}
                message = str(ended.get("message") or waiting.get("message") or "").strip()
                found[str(pod["metadata"]["name"])] = f"{waiting['reason']}: {message}".rstrip(": ")
    return found


def final_end(pods: Iterable[Object]) -> FinalEnd | None:
    """Return an end that restarts only repeat: a mistake, unusable input, a full disk.

    The program's own code counts, which it leaves with its message (`pipeline.errors`): torchrun
    ends with 1 whatever its ranks ended with.
    """
    for pod in pods:
        for container in _statuses(pod):
            for state in ("state", "lastState"):
                ended = (container.get(state) or {}).get("terminated")
                if not ended:
                    continue
                text = str(ended.get("message") or "").strip()
                code, message = last_word_code(text)
                if code is None:  # the end of the log
                    code = int(ended.get("exitCode") or 0)
                    said = [line for line in text.splitlines() if line.startswith("error: ")]
                    message = (said or text.splitlines() or [""])[-1].removeprefix("error: ")
                if code in FINAL_EXIT_CODES and ended.get("exitCode"):
                    return FinalEnd(str(pod["metadata"]["name"]), code, message or "no message")
    return None


def running(pods: Iterable[Object]) -> list[str]:
    """Return the names of the pods that run, sorted."""
    found = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Running"]
    return sorted(str(pod["metadata"]["name"]) for pod in found)


def pods_line(pods: Iterable[Object]) -> str:
    """Return one line about the pods: how many run, restarts, why others wait."""
    phases: dict[str, int] = {}
    restarts = 0
    reason = ""
    for pod in pods:
        status = pod.get("status") or {}
        phase = str(status.get("phase") or "Pending")
        phases[phase] = phases.get(phase, 0) + 1
        restarts += sum(int(c.get("restartCount") or 0) for c in _statuses(pod))
        for condition in status.get("conditions") or []:
            if condition.get("reason") == "Unschedulable":
                reason = f" ({condition.get('message')})"
    if not phases:
        return "no pods yet"
    counts = ", ".join(f"{count} {phase.lower()}" for phase, count in sorted(phases.items()))
    return f"pods: {counts}{f', {restarts} restarts' if restarts else ''}{reason}"


def _statuses(pod: Object) -> list[dict[str, Any]]:
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
