"""The Dockerfiles, as far as they go without a registry; the push, with stand-ins."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.stage_runner import ROOT, run_python

DOCKERFILES = [ROOT / f"docker/{name}.Dockerfile" for name in ("teacher", "student")]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_a_dockerfile(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    sources = [
        word
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
    # What is copied is what the build context holds.
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if "!" in line
    ]
    assert all(any(s == a or s.startswith(f"{a}/") for a in allowed) for s in sources)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    bases = [line.partition("=")[2] for line in lines if re.match(r"ARG \w+_BASE=", line)]
    assert len(bases) == 3
    for base in bases:
        assert re.search(r":[\w.-]*\d[\w.-]*$", base), base
        assert "latest" not in base
    assert f"stages/locks/{file.stem}-gpu.lock" in text
    # Code comes after the packages, so that a change of it rebuilds the last layers only.
    assert text.index("check_image.py", text.index("RUN")) < text.index("--mount=type=bind")


def test_the_base_has_the_version_of_the_lock_file() -> None:
    lock = (ROOT / "stages/locks/teacher-gpu.lock").read_text()
    version = re.search(r"^vllm==(\S+)$", lock, re.MULTILINE)
    assert version
    assert f"vllm/vllm-openai:v{version[1]}" in DOCKERFILES[0].read_text()
    torch = re.search(
        r"^torch==(\d+\.\d+)", (ROOT / "stages/locks/student-gpu.lock").read_text(), 8
    )
    assert torch
    assert f"pytorch:{torch[1]}-" in DOCKERFILES[1].read_text()


def test_the_wheel_of_the_build_context_holds_the_stages(tmp_path: Path) -> None:
    """Built as the image builds it, from what .dockerignore lets through."""
    source = tmp_path / "src"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = (
        "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    )
    run_python(["-c", build, tmp_path], cwd=source).ok()
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for module in ("cache_teacher", "train_student", "check_cache", "prefetch"):
        assert f"stages/{module}.py" in names
    assert "stages/configs/teacher.yaml" in names
    assert not [name for name in names if name.startswith(("k8s", "tests", "docker"))]


def test_an_image_of_other_packages_is_rejected(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    script = ROOT / "docker/check_image.py"
    import numpy
    import yaml

    lock.write_text(f"numpy=={numpy.__version__}\nPyYAML=={yaml.__version__}\n")
    assert "2 packages as pinned" in run_python([script, lock, "--needs", "pip"]).ok().out
    lock.write_text("numpy==0.1\nno-such-thing==1.0\nnvidia-x==1\n")
    result = run_python([script, lock, "--without", "nvidia-", "--needs", "flash-attn-nowhere"])
    assert result.code == 1
    assert f"numpy: found {numpy.__version__}, expected 0.1" in result.err
    assert "no-such-thing: found nothing, expected 1.0" in result.err
    assert "flash-attn-nowhere" in result.err
    assert "nvidia" not in result.err
    minor = ".".join(numpy.__version__.split(".")[:2])
    lock.write_text(f"numpy=={minor}.999\n")
    run_python([script, lock, "--from-base", "numpy"]).ok()


# Stand-ins that record their calls. ECR has the student's repository only.
DOCKER = """#!/bin/sh
echo "docker $*" >> "$CALLS"
case "$1" in login) cat > "$CALLS.password" ;; esac
"""
AWS = """#!/bin/sh
echo "aws $*" >> "$CALLS"
case "$1 $2" in
  "sts get-caller-identity") echo 111122223333 ;;
  "configure get") echo us-west-2 ;;
  "ecr get-login-password") echo s3cret ;;
  "ecr describe-repositories") case "$*" in *student*) exit 0 ;; *) exit 254 ;; esac ;;
  "ecr describe-images") echo "sha256:$(printf %064d 7)" ;;
esac
"""


def _push(
    tmp_path: Path, *arguments: str, programs: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for tool in ("dirname", "mkdir", "mv", "cat", "sh", "bash"):
        target = folder / tool
        if not target.exists():
            target.symlink_to(str(shutil.which(tool)))
    return subprocess.run(
        [str(shutil.which("bash")), str(ROOT / "docker/push.sh"), *arguments],
        env={"PATH": str(folder), "CALLS": str(tmp_path / "calls"), "HOME": os.devnull},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_push_logs_in_creates_repositories_and_records_digests(tmp_path: Path) -> None:
    record = tmp_path / "runs/k8s/images.json"
    done = _push(tmp_path, "v1", str(record), programs={"docker": DOCKER, "aws": AWS})
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    registry = "111122223333.dkr.ecr.us-west-2.amazonaws.com"
    assert f"docker login --username AWS --password-stdin {registry}" in calls
    assert (tmp_path / "calls.password").read_text() == "s3cret\n"
    assert "s3cret" not in calls + done.stdout + done.stderr
    assert calls.count("ecr create-repository") == 1
    assert "create-repository --region us-west-2 --repository-name distill-teacher" in calls
    recorded = json.loads(record.read_text())
    assert recorded == {
        name: f"{registry}/{name}@sha256:{7:064d}"
        for name in ("distill-teacher", "distill-student")
    }


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ({"aws": AWS}, "error: docker: no such program"),
        ({"docker": DOCKER}, "error: aws: no such program"),
        ({"docker": "#!/bin/sh\nexit 1\n", "aws": AWS}, "error: image distill-teacher:v1 does not"),
        ({"docker": DOCKER, "aws": "#!/bin/sh\nexit 1\n"}, "error: no AWS region"),
    ],
)
def test_push_that_cannot(tmp_path: Path, programs: dict[str, str], message: str) -> None:
    done = _push(tmp_path, "v1", str(tmp_path / "images.json"), programs=programs)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert not (tmp_path / "images.json").exists()


def test_images_are_built_for_the_device_asked_for(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\necho "docker $*"\n')
    docker.chmod(0o755)
    done = subprocess.run(
        ["make", "image-student", "DEVICE=cpu"], cwd=ROOT, capture_output=True, text=True,
        check=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert "--build-arg DEVICE=cpu --tag distill-student:cpu ." in done.stdout
