"""The state of a job and its pods, read from the objects that the API server returns; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from k8s.cluster.objects import Object

__all__ = ["JobState", "job_state", "pods_line", "stuck_pods"]

# Reasons that waiting does not resolve: a wrong image, a missing Secret or ConfigMap.
_STUCK = {
    "CreateContainerConfigError", "CreateContainerError", "ErrImagePull", "ImagePullBackOff",
    "InvalidImageName", "RunContainerError",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a PyTorchJob or a Job."""

    phase: Literal["waiting", "running", "succeeded", "failed"]
    reason: str


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
    ):  # fmt: skip
        if name in true:
            condition = true[name]
            parts = [str(condition.get(key) or "") for key in ("reason", "message")]
            return JobState(phase, ": ".join(part for part in parts if part))  # type: ignore[arg-type]
    if "Suspended" in true:
        return JobState("waiting", "suspended (a queue holds it)")
    return JobState("running" if "Running" in true or status.get("active") else "waiting", "")


def stuck_pods(pods: Iterable[Object]) -> dict[str, str]:
    """Return, by pod, why its container cannot start, where waiting does not resolve it."""
    found = {}
    for pod in pods:
        for container in _statuses(pod):
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _STUCK:
                message = str(waiting.get("message") or "").strip()
                found[str(pod["metadata"]["name"])] = f"{waiting['reason']}: {message}".rstrip(": ")
    return found


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
