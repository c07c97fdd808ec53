"""The submit path against a stand-in of the API server: real kubectl, real cache checks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from k8s.rendering.manifests import EXAMPLE_IMAGES
from tests.cluster.api_stub import ApiStub
from tests.cluster.job_ends import ends, never_ends, one_error

Object = dict[str, Any]
TEACHER = ["cache-teacher", "--overlay", "local-kind", "--poll_s", "1"]
STUDENT = ["train-student", "--overlay", "local-kind", "--poll_s", "1"]


def test_success(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = ends("Succeeded")
    code, out, err = call(*TEACHER, "--run", "exp1")
    assert (code, err) == (0, "")
    assert "succeeded" in out
    (job,) = [name for name in api.created if name.startswith("PyTorchJob/")]
    assert job.startswith("PyTorchJob/cache-teacher-exp1-")
    assert f"ConfigMap/{job.removeprefix('PyTorchJob/')}" in api.created


def test_logs_are_followed(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = ends("Succeeded", after_s=3)
    assert "step 1, loss=2.5" in call(*TEACHER, "--run", "exp1")[1]


def test_a_failed_job_ends_the_command_at_once(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = ends("Failed", reason="BackoffLimitExceeded")
    started = time.monotonic()
    code, _, err = call(*TEACHER, "--run", "exp1", "--timeout_s", "600", "--poll_s", "300")
    assert code == 1
    assert "failed (BackoffLimitExceeded" in one_error(err)
    assert "step 1, loss=2.5" in err  # the last lines of its pods
    assert time.monotonic() - started < 120  # not after the poll of 300 s, nor the time-out


def test_a_failure_without_completion_time_is_seen(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = ends("Failed", reason="PodFailed", completed=False)
    code, _, err = call(*TEACHER, "--run", "exp1", "--timeout_s", "600")
    assert code == 1
    assert "PodFailed" in one_error(err)


def test_a_rejected_job(api: ApiStub, call: Any) -> None:
    api.reject = lambda item: (
        "Worker.replicas: quota exceeded" if item["kind"] == "PyTorchJob" else None
    )
    code, _, err = call(*TEACHER, "--run", "exp1")
    assert code == 1
    assert "quota exceeded" in one_error(err)
    assert not [name for name in api.created if name.startswith("PyTorchJob/")]


def test_time_out_leaves_the_job(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = never_ends
    code, _, err = call(*TEACHER, "--run", "exp1", "--timeout_s", "3")
    assert code == 124
    assert "not done after 3 s" in one_error(err)
    assert [name for name in api.objects if name[0] == "PyTorchJob"]


def test_the_same_command_follows_and_restarts(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = never_ends
    assert call(*TEACHER, "--run", "exp1", "--timeout_s", "2")[0] == 124
    (key,) = [key for key in api.objects if key[0] == "PyTorchJob"]
    made = list(api.created)
    # It runs: the command attaches.
    code, out, _ = call(*TEACHER, "--run", "exp1", "--timeout_s", "2")
    assert code == 124
    assert "following it" in out
    assert api.created == made
    # It has failed: the command recreates it under the same name.
    api.end_job(api.objects[key], "Failed", reason="Evicted")
    api.scripts["PyTorchJob"] = ends("Succeeded")
    code, out, _ = call(*TEACHER, "--run", "exp1")
    assert code == 0
    assert "failed before (Evicted" in out
    # It has succeeded: nothing is done again.
    made = list(api.created)
    code, out, _ = call(*TEACHER, "--run", "exp1")
    assert code == 0
    assert "has succeeded already" in out
    assert api.created == made


def test_a_pod_that_cannot_start(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = lambda stub, job: stub.add_pod(
        job, log="", phase="Pending", waiting="ImagePullBackOff"
    )
    code, _, err = call(*TEACHER, "--run", "exp1", "--stuck_s", "1")
    assert code == 1
    message = one_error(err)
    assert "cannot start (ImagePullBackOff: it is not there)" in message


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [
        ({"exitCode": 2, "message": "exit 2: alpha: found 3.\n"}, 2, "alpha: found 3"),
        # torchrun ends with 1 whatever its ranks ended with.
        ({"exitCode": 1, "message": "exit 4: the disk is full."}, 4, "the disk is full"),
        ({"exitCode": 3, "message": "a line\nerror: no such cache.\nbye"}, 3, "no such cache"),
    ],
)
def test_an_end_that_restarts_repeat_ends_the_job(
    api: ApiStub, call: Any, ended: Object, code: int, said: str
) -> None:
    """Its pod is up again, and would be until the back-off limit."""

    def script(stub: ApiStub, job: Object) -> None:
        stub.add_pod(job, log="step 1, loss=2.5\n", ended=ended)
        stub.set_status(job, {"conditions": [{"type": "Running", "status": "True"}]})

    api.scripts["PyTorchJob"] = script
    found, _, err = call(*TEACHER, "--run", "exp1", "--timeout_s", "60")
    assert found == code
    message = one_error(err)
    assert f"exit code {code}: {said}" in message
    assert "holds no GPU" in message
    assert "step 1, loss=2.5" in err
    assert not [key for key in api.objects if key[0] == "PyTorchJob"]


def test_a_killed_pod_is_no_final_end(api: ApiStub, call: Any) -> None:
    def script(stub: ApiStub, job: Object) -> None:
        stub.add_pod(job, log="", ended={"exitCode": 137, "reason": "OOMKilled"})
        stub.end_job(job, "Succeeded")

    api.scripts["PyTorchJob"] = script
    assert call(*TEACHER, "--run", "exp1")[0] == 0


def test_a_pod_that_ends_again_and_again_is_stuck(api: ApiStub, call: Any) -> None:
    ended = {"exitCode": 1, "message": "exit 1: no GPU here."}
    api.scripts["PyTorchJob"] = lambda stub, job: stub.add_pod(
        job, log="", waiting="CrashLoopBackOff", ended=ended
    )
    code, _, err = call(*TEACHER, "--run", "exp1", "--stuck_s", "1")
    assert code == 1
    assert "CrashLoopBackOff: exit 1: no GPU here" in one_error(err)


def test_a_second_job_of_a_run_is_refused(api: ApiStub, call: Any) -> None:
    """Another number of nodes, or a rebuilt image, is a job of another name in one folder."""
    api.scripts["PyTorchJob"] = never_ends
    assert call(*TEACHER, "--run", "exp1", "--timeout_s", "2")[0] == 124
    made = list(api.created)
    (name,) = (item for item in made if item.startswith("PyTorchJob/"))
    # With another operator it is a job of another kind and the same name.
    for more in (("--nodes", "3"), ("--image", "other:2"), ("--operator", "trainer")):
        code, _, err = call(*TEACHER, "--run", "exp1", *more)
        assert code == 1
        message = one_error(err)
        assert f"run exp1: {name.removeprefix('PyTorchJob/')} is running" in message
        assert "it is not submitted" in message
    assert api.created == made
    # Another run's is its own; and so is this one's after the first has ended.
    assert call(*TEACHER, "--run", "exp2", "--timeout_s", "2")[0] == 124
    (key,) = [key for key in api.objects if key[0] == "PyTorchJob" and "exp1" in key[2]]
    api.end_job(api.objects[key], "Failed")
    assert call(*TEACHER, "--run", "exp1", "--nodes", "3", "--timeout_s", "2")[0] == 124


def test_the_configuration_goes_with_its_job(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = ends("Succeeded")
    call(*TEACHER, "--run", "exp1")
    (job,) = (item for key, item in api.objects.items() if key[0] == "PyTorchJob")
    found = api.get("ConfigMap", job["metadata"]["name"])
    assert found is not None
    (owner,) = found["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("PyTorchJob", job["metadata"]["uid"])


def test_an_unreachable_cluster(
    api: ApiStub, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = json.loads((tmp_path / "kubeconfig.json").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    (tmp_path / "kubeconfig.json").write_text(json.dumps(config))
    code, _, err = call(*TEACHER)
    assert code == 1
    assert "check the cluster" in one_error(err)


def test_a_volume_that_is_not_there(api: ApiStub, call: Any) -> None:
    image = EXAMPLE_IMAGES["cache-teacher"]
    code, _, err = call("cache-teacher", "--overlay", "hyperpod", "--image", image)
    assert code == 1
    message = one_error(err)
    assert "persistentvolumeclaim fsx-claim: not in namespace hyperpod-ns-distill" in message
    assert "make fsx-volume" in message
    assert api.created == []


def test_a_secret_that_is_not_there(api: ApiStub, call: Any) -> None:
    api.put(
        {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {"name": "fsx-claim", "namespace": "distill"},
        }
    )  # fmt: skip
    code, _, err = call("prefetch", "--overlay", "local-kind", "--secret", "my-token")
    assert code == 1
    message = one_error(err)
    assert "secret my-token: not in namespace distill" in message
    assert "create secret generic my-token --from-file=token=FILE" in message
    assert api.created == []


def test_prefetch_runs_once_and_again(api: ApiStub, call: Any) -> None:
    for kind, name in (("PersistentVolumeClaim", "fsx-claim"), ("Secret", "hub-token")):
        metadata = {"name": name, "namespace": "distill"}
        api.put({"apiVersion": "v1", "kind": kind, "metadata": metadata})

    def script(stub: ApiStub, job: Object) -> None:
        stub.add_pod(job, log="teacher ...\n")
        stub.end_job(job, "Complete")

    api.scripts["Job"] = script
    for _ in range(2):
        code, out, err = call("prefetch", "--overlay", "local-kind")
        assert (code, err) == (0, "")
        assert "prefetch: succeeded" in out
    assert api.created.count("Job/prefetch") == 2


def test_jobs_and_logs(api: ApiStub, call: Any) -> None:
    assert call("jobs", "--overlay", "local-kind")[1] == "no jobs\n"
    code, _, err = call("logs", "--overlay", "local-kind", "--run", "exp1")
    assert code == 1
    assert "run exp1: no pods in namespace distill" in one_error(err)
    api.scripts["PyTorchJob"] = ends("Succeeded")
    call(*TEACHER, "--run", "exp1")
    listed = call("jobs", "--overlay", "local-kind")[1]
    assert "cache-teacher-exp1-" in listed
    assert "2 workers  succeeded" in listed
    assert "step 1, loss=2.5" in call("logs", "--overlay", "local-kind", "--run", "exp1")[1]


def test_a_dry_run_asks_no_cluster(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    code, out, err = call(*STUDENT, "--run", "exp1", "--dry_run")
    assert (code, err) == (0, "")
    kinds = [item["kind"] for item in yaml.safe_load_all(out)]
    assert kinds.count("PyTorchJob") == 1
