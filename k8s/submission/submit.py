"""Apply a job, follow its logs, wait for its end, and report a failure at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from k8s.cluster.kubectl import Kubectl
from k8s.cluster.objects import Object
from k8s.cluster.workloads import address, is_workload, selector
from k8s.rendering.preflight import check_cache_job
from k8s.rendering.render import RenderedJob
from k8s.submission.admission import apply, refuse_second_job, require
from k8s.submission.job_state import (
    FinalEnd,
    JobState,
    final_end,
    job_state,
    pods_line,
    running,
    stuck_pods,
)
from k8s.submission.status import LogFollower
from pipeline.errors import CacheError, DistillError

__all__ = [
    "JobFailed",
    "JobTimeout",
    "Patience",
    "begin_stage",
    "run_once",
    "run_to_end",
    "submit_stage",
]


class JobFailed(DistillError):
    """The job ended in failure, or cannot start."""


class JobTimeout(DistillError):
    """The job did not end in the time given; it goes on."""

    exit_code = 124


@dataclass(frozen=True, slots=True)
class Patience:
    """Time-outs and intervals, in seconds."""

    timeout_s: float | None = None
    """For the whole; None waits indefinitely."""
    poll_s: float = 10.0
    """Between two polls; kubectl's watch ends the wait early when the job completes."""
    stuck_s: float = 120.0
    """For a pod that cannot start (image, Secret): registries and caches may fail in passing."""


def submit_stage(
    rendered: RenderedJob, *, cache_identity: str | None = None, patience: Patience | None = None
) -> None:
    """Check the cache (stage two), apply the job, and wait until it ends.

    The same call again attaches to the running job, restarts a failed one, and reports a
    finished one.

    Raises:
        CacheError: stage two could not start on that cache; nothing was submitted.
        JobFailed, JobTimeout: as they say.
        DistillError: the API server rejects the job, or something it needs is missing.
    """
    patience = patience or Patience()
    if begin_stage(rendered, cache_identity=cache_identity, patience=patience):
        run_to_end(Kubectl(), rendered.submitted, patience=patience, with_logs=True)


def begin_stage(
    rendered: RenderedJob, *, cache_identity: str | None = None, patience: Patience
) -> bool:
    """Check the cache (stage two) and apply the job, unless it is there; do not wait for it.

    Returns:
        Whether there is something to wait for: false where the job has succeeded already.

    Raises:
        CacheError: stage two could not start on that cache; nothing was submitted.
        DistillError: the API server rejects the job, something it needs is missing, or another
            unfinished job has this run's folder.
    """
    kubectl = Kubectl()
    require(kubectl, rendered.objects, rendered.namespace)
    job = rendered.submitted
    state = _state(kubectl, job)
    if state is not None and state.phase == "succeeded":
        print(f"{rendered.name}: has succeeded already; delete it to run it again", flush=True)
        return False
    if state is None or state.phase == "failed":
        refuse_second_job(kubectl, job)
        if rendered.stage == "train-student":
            _check_cache(kubectl, rendered, cache_identity, patience)
        if state is not None:
            print(f"{rendered.name}: failed before ({state.reason}); restarting it", flush=True)
            _delete(kubectl, *_of_run(rendered.objects))
        apply(kubectl, rendered.objects)
    else:
        print(f"{rendered.name}: is {state.phase} already; following it", flush=True)
    return True


def run_once(documents: Sequence[Object], *, timeout_s: float | None = None) -> None:
    """Apply an operation's job (prefetch, fsx-init) and wait until it ends.

    A job of an earlier call is replaced; it repeats only what is missing.

    Raises:
        JobFailed, JobTimeout: as they say.
        DistillError: the API server rejects it, or something it needs is missing.
    """
    kubectl = Kubectl()
    (job,) = (item for item in documents if item["kind"] == "Job")
    require(kubectl, documents, address(job)[2])
    _delete(kubectl, *_of_run(documents))
    apply(kubectl, documents)
    run_to_end(
        kubectl,
        job,
        patience=Patience(timeout_s, poll_s=2.0),
        with_logs=True,
    )


def run_to_end(
    kubectl: Kubectl, job: Object, *, patience: Patience, with_logs: bool = False
) -> None:
    """Wait until a job has ended; follow the logs of its first pod meanwhile, where asked to.

    A pod that ended with what another try does not change (exit codes 2, 3 and 4) ends the job:
    its restarts would hold the GPUs for nothing.

    Raises:
        JobFailed: it failed, with its reason and the last lines of its pods; or it cannot start.
        JobTimeout: it did not end in time.
    """
    kind, name, namespace = address(job)
    started = time.monotonic()
    logs = LogFollower(kubectl, namespace)
    last_line = ""
    stuck_since: dict[str, float] = {}
    try:
        while True:
            state = _state(kubectl, job)
            if state is None:
                raise JobFailed(f"{name}: was deleted", do="run the same command again")
            if state.phase == "succeeded":
                logs.drain()
                print(f"{name}: succeeded", flush=True)
                return
            if state.phase == "failed":
                logs.drain()
                _print_last_lines(kubectl, job)
                end = final_end(_pods(kubectl, job))
                said = f"; {end.pod} said: {end.message.rstrip('.')}" if end else ""
                failure = JobFailed(
                    f"{name}: failed ({state.reason or 'no reason given'}){said}",
                    do=f"the last lines are above, all of them in `kubectl -n {namespace} logs "
                    f"-l {selector(job)}`; the same command restarts it where it stopped",
                )
                failure.exit_code = end.exit_code if end else failure.exit_code
                raise failure
            pods = _pods(kubectl, job)
            line = f"{state.reason or pods_line(pods)}"
            if line != last_line:
                print(f"{name}: {line}", flush=True)
                last_line = line
            end = final_end(pods)
            if end is not None and not _ends_itself(job):
                _end_for_good(kubectl, job, end)
            _raise_if_stuck(name, namespace, stuck_pods(pods), stuck_since, patience.stuck_s)
            left = _time_left(started, patience.timeout_s)
            if left <= 0:
                raise JobTimeout(
                    f"{name}: not done after {patience.timeout_s:g} s ({line})",
                    do="it goes on; the same command follows it again, and `kubectl -n "
                    f"{namespace} delete {kind} {name}` ends it",
                )
            if with_logs:
                logs.keep_following(running(pods))
            _wait(kubectl, job, min(patience.poll_s, left))
    finally:
        logs.close()


def _ends_itself(job: Object) -> bool:
    """Whether Kubernetes ends a job at once where another try would change nothing."""
    spec = job["spec"]
    return job["kind"] == "Job" and ("podFailurePolicy" in spec or spec.get("backoffLimit") == 0)


def _end_for_good(kubectl: Kubectl, job: Object, end: FinalEnd) -> None:
    """Delete a job whose pods would only repeat their end.

    Raises:
        JobFailed: always, with the pod's own message and its exit code.
    """
    kind, name, namespace = address(job)
    output = kubectl.run("-n", namespace, "logs", end.pod, "--previous", "--tail=20")
    if output.returncode:
        output = kubectl.run("-n", namespace, "logs", end.pod, "--tail=20")
    if output.stdout.strip():
        print(output.stdout.rstrip(), file=sys.stderr, flush=True)
    _delete(kubectl, job)
    failure = JobFailed(
        f"{name}: {end.pod} ended with exit code {end.exit_code}: {end.message.rstrip('.')}",
        do=f"restarts would repeat it, so the {kind.partition('.')[0].rstrip('s')} was deleted and "
        "holds no GPU; what it wrote is kept, and the same command goes on from there once the "
        "cause is gone",
    )
    failure.exit_code = end.exit_code
    raise failure


def _check_cache(
    kubectl: Kubectl, rendered: RenderedJob, cache_identity: str | None, patience: Patience
) -> None:
    documents = check_cache_job(rendered, cache_identity=cache_identity)
    job = documents[-1]
    _delete(kubectl, job)  # of an earlier check: the cache may have changed since
    apply(kubectl, documents, own=False)  # the ConfigMap is the student's
    quick = Patience(patience.timeout_s, min(patience.poll_s, 2.0), patience.stuck_s)
    try:
        run_to_end(kubectl, job, patience=quick)
    except JobFailed as error:
        output = kubectl.run(
            "-n", rendered.namespace, "logs", f"job/{job['metadata']['name']}", "--tail=50"
        )
        lines = [line for line in output.stdout.splitlines() if line.startswith("error: ")]
        if not lines:
            raise
        raise CacheError(
            f"{lines[-1].removeprefix('error: ').rstrip('.')}; {rendered.name} is not submitted"
        ) from error
    output = kubectl.run("-n", rendered.namespace, "logs", f"job/{job['metadata']['name']}")
    print(output.stdout.strip(), flush=True)


def _raise_if_stuck(
    name: str, namespace: str, stuck: dict[str, str], since: dict[str, float], limit_s: float
) -> None:
    now = time.monotonic()
    for pod in set(since) - set(stuck):
        del since[pod]
    for pod, reason in stuck.items():
        if now - since.setdefault(pod, now) >= limit_s:
            raise JobFailed(
                f"{name}: {pod} cannot start ({reason})",
                do=f"fix it, delete the job in {namespace}, and run the same command again",
            )


def _print_last_lines(kubectl: Kubectl, job: Object) -> None:
    _, _, namespace = address(job)
    output = kubectl.run("-n", namespace, "logs", "-l", selector(job), "--tail=20", "--prefix")
    if output.stdout.strip():
        print(output.stdout.rstrip(), file=sys.stderr, flush=True)


def _wait(kubectl: Kubectl, job: Object, seconds: float) -> None:
    """Wait for the completion time, which both a success and a failure of a PyTorchJob set."""
    kind, name, namespace = address(job)
    started = time.monotonic()
    kubectl.run(
        "-n", namespace, "wait", f"{kind}/{name}", "--for=jsonpath={.status.completionTime}",
        f"--timeout={max(1, round(seconds))}s", timeout_s=seconds + 60,
    )  # fmt: skip
    # A kubectl older than 1.31 does not support this condition and returns at once.
    if time.monotonic() - started < 0.5:
        time.sleep(min(1.0, seconds))


def _state(kubectl: Kubectl, job: Object) -> JobState | None:
    kind, name, namespace = address(job)
    text = kubectl.ask("-n", namespace, "get", kind, name, "-o", "json", "--ignore-not-found")
    return job_state(json.loads(text)) if text.strip() else None


def _pods(kubectl: Kubectl, job: Object) -> list[Object]:
    _, _, namespace = address(job)
    text = kubectl.ask("-n", namespace, "get", "pods", "-l", selector(job), "-o", "json")
    found: list[Object] = json.loads(text).get("items", [])
    return found


def _delete(kubectl: Kubectl, *items: Object) -> None:
    for item in items:
        kind, name, namespace = address(item)
        kubectl.ask("-n", namespace, "delete", kind, name, "--ignore-not-found", "--wait=true")


def _of_run(documents: Sequence[Object]) -> list[Object]:
    """Return ConfigMap and job, to be deleted in this order.

    A ConfigMap that is applied again while its old owner goes would go with that, soon after.
    """
    return sorted(
        (item for item in documents if is_workload(item) or item["kind"] == "ConfigMap"),
        key=is_workload,
    )


def _time_left(started: float, timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else timeout_s - (time.monotonic() - started)
